"""The report of a sweep: a text table, t4.json and a heat map.

    slowdown  of a config: its time / the time of the fastest config of the job that is ok; both relative to the default's,
              under continuous load (trials.sustained_times)
"""

import collections
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..configs.shipped import replace_file
from .prune import REASONS
from .search import FAILURES
from .trials import Job, Run, Trial, sustained_times

SYNTHETIC = "synthetic: no GPU was timed"
WRONGLY_EXCLUDED = 1.05  # an excluded config with a smaller slowdown was excluded wrongly
# https://github.com/odgaard/TuningSchema; all other statuses are its "constraints"
T4_INVALIDITY = {"ok": "correct", "compile error": "compile", "compile timeout": "timeout", "hang": "timeout",
                 "incorrect": "correctness", "not repeatable": "correctness", "launch error": "runtime",
                 "device lost": "runtime"}


@dataclass(frozen=True)
class JobResult:
    """The trials of one job, and the slowdowns of its configs."""

    job: Job
    trials: dict[str, Trial]        # in the order of the job's configs
    slowdowns: dict[str, float]     # of the configs with samples, the fastest first; {} if none of them is ok
    default_slowdown: float | None  # None if the default or all others have no time; below 1 if the default is not ok

    @property
    def ok(self) -> list[Trial]:
        """The trials with samples that are ok, the fastest first."""
        return [self.trials[config] for config in self.slowdowns if self.trials[config].status == "ok"]

    @property
    def correlation(self) -> float | None:
        """The rank correlation of modelled cycles and times of the configs that are ok."""
        return spearman([(trial.static["cycles"], self.slowdowns[trial.config]) for trial in self.ok
                         if trial.static.get("cycles") is not None])


def results_of(run: Run) -> list[JobResult]:
    """Return the result of every job of a run, tried or not."""
    results = []
    for job in run.jobs:
        trials = run.of(job)
        times = sustained_times(trials)
        least = min((time for config, time in times.items() if trials[config].status == "ok"), default=None)
        slowdowns = {config: time / least for config, time in times.items()} if least else {}
        relative = any(trial.beside for trial in trials.values())
        results.append(JobResult(job, trials, slowdowns, 1 / least if least and relative else None))
    return results


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return the rank correlation, or None for fewer than three pairs or if all are equal; ties share their mean rank."""
    if len(pairs) < 3 or any(len(set(values)) == 1 for values in zip(*pairs)):
        return None
    return statistics.correlation(*([sorted(values).index(value) + values.count(value) / 2 for value in values]
                                    for values in zip(*pairs)))


def origin(run: Run) -> str:
    """Return one line that says where the numbers come from, warnings first."""
    tried, planned = sum(len(run.of(job)) for job in run.jobs), sum(len(job.configs) for job in run.jobs)
    warnings = [SYNTHETIC] * run.synthetic + [f"unfinished: {tried} of {planned} configs tried"] * (tried < planned)
    facts = [f"{name}{run.environment[key]}" for name, key in (("", "gpu"), ("torch ", "torch"), ("Triton ", "triton"))
             if run.environment.get(key)]
    return "; ".join([*warnings, ", ".join(facts) or "environment not recorded"])


def text(run: Run) -> str:
    """Return the report as text."""
    results = results_of(run)
    rows = [["job", "tried", "ok", "best", "us", "MHz", "default", "slowdown", "Spearman"], *map(_row, results)]
    counts = collections.Counter((result.job.kernel, trial.status) for result in results for trial in result.trials.values()
                                 if trial.status != "ok")
    failed = [[kernel, reason, f"{count}", (REASONS | FAILURES).get(reason, "")]
              for (kernel, reason), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1]))]
    parts = [f"Sweep of {len(results)} jobs; {origin(run)}", table(rows, {0, 3, 6}), *_conclusions(results)]
    parts += [table([["kernel", "reason", "configs", ""], *failed], {0, 1, 3})] if failed else []
    return "\n\n".join(parts)


def _row(result) -> list[str]:
    fastest = result.ok[0] if result.ok else None
    best = [fastest.config, f"{1e6 * fastest.seconds:.4g}"] if fastest else ["-", "-"]
    best.append(f"{fastest.clock:.0f}" if fastest and fastest.clock else "-")
    statuses = [trial.status for trial in result.trials.values()]
    return [result.job.name, f"{len(statuses)}/{len(result.job.configs)}", f"{statuses.count('ok')}", *best,
            result.job.incumbent, "-" if result.default_slowdown is None else f"{result.default_slowdown:.3f}",
            "-" if result.correlation is None else f"{result.correlation:.2f}"]


def _conclusions(results) -> list[str]:
    """Rate the defaults, and the configs that were excluded by static pruning and timed to check it."""
    slowdowns = [result.default_slowdown for result in results if result.default_slowdown is not None]
    excluded = [(result, config, slowdown) for result in results for config, slowdown in result.slowdowns.items()
                if result.trials[config].status in REASONS]
    wrong = [f"{config} of {result.job.name} ({result.trials[config].status}, slowdown {slowdown:.2f})"
             for result, config, slowdown in excluded if slowdown <= WRONGLY_EXCLUDED]
    if not slowdowns:
        return []
    return [f"Slowdown of the defaults: {statistics.geometric_mean(slowdowns):.3f} in the geometric mean, {max(slowdowns):.3f} "
            f"at most.\n{len(excluded)} excluded configs were timed; within {WRONGLY_EXCLUDED - 1:.0%} of the best: "
            f"{', '.join(wrong) or 'none'}."]


def table(rows: list[list[str]], left: set[int]) -> str:
    """Align cells in columns: those in `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)


def as_t4(run: Run) -> dict:
    """Return the trials in the Open Autotuning Results Schema (T4) 1.0.0; times in milliseconds.

    "time" is the median of the samples, "sustained time" that of the windows. How long a config compiled is not known, since
    compilers run in parallel; the time of a check, with the wait for its binaries, is "validation".
    """
    warning = {"note": SYNTHETIC} if run.synthetic else {}
    results = []
    for trial in (trial for job in run.jobs for trial in run.of(job).values()):
        invalidity = T4_INVALIDITY.get(trial.status, "constraints")
        times = {"time": trial.samples, "sustained time": trial.windows}
        results.append({
            "configuration": {"job": trial.job, "config": trial.config, **vars(Config.parse(trial.config)), **warning},
            "times": {"compilation_time": 0, "runtimes": [1e3 * sample for sample in trial.samples],
                      "framework": 0, "search_algorithm": 0, "validation": 1e3 * trial.check_seconds},
            "invalidity": invalidity, "correctness": int(invalidity == "correct"), "objectives": ["time"],
            "measurements": [{"name": name, "value": 1e3 * statistics.median(each), "unit": "ms"}
                             for name, each in times.items() if each]})
    return {"schema_version": "1.0.0", **warning, "results": results}


def write(run: Run, folder: Path, plot: bool = False) -> list[Path]:
    """Write t4.json to a folder, and heat.png if `plot`, which needs matplotlib; return their paths."""
    figures = {folder / "heat.png": heat_map(run)} if plot else {}
    replace_file(folder / "t4.json", json.dumps(as_t4(run), indent=1, allow_nan=False))
    for path, figure in figures.items():
        figure.savefig(path, dpi=150)
    return [folder / "t4.json", *figures]


def heat_map(run: Run):
    """Draw the least slowdown of each job and tile, over warps and stages; grey tiles have no time."""
    from matplotlib import colormaps, style
    from matplotlib.figure import Figure

    results = [result for result in results_of(run) if result.ok]
    least = {}  # {(number of the job, tile): slowdown}
    for y, result in enumerate(results):
        # the fastest config of a tile comes first
        for trial in result.ok:
            least.setdefault((y, _tile(trial.config)), result.slowdowns[trial.config])
    tiles = sorted({_tile(config) for result in results for config in result.job.configs})
    with style.context("default"):
        figure = Figure(figsize=(5 + 0.55 * len(tiles), 2 + 0.4 * len(results)), layout="constrained")
        axes = figure.add_subplot(facecolor="0.85")
        if results:
            image = axes.imshow([[least.get((y, tile), math.nan) for tile in tiles] for y in range(len(results))],
                                aspect="auto", cmap=colormaps["Blues_r"], vmin=1, vmax=2)
            figure.colorbar(image, label="time / job's best", extend="max")
        for (y, tile), slowdown in least.items():
            axes.text(tiles.index(tile), y, f"{slowdown:.2f}", ha="center", va="center", fontsize=8,
                      color="white" if slowdown < 1.5 else "black", weight="bold" if slowdown == 1 else "normal")
        axes.set_xticks(range(len(tiles)), [f"{m}x{n}" for m, n in tiles], rotation=45, ha="right")
        axes.set_yticks(range(len(results)), [result.job.name for result in results])
        axes.set_xlabel("tile: block_m x block_n; the least over warps and stages; grey: no time")
        axes.set_title(origin(run), loc="left", fontsize=9)
    return figure


def _tile(config: str) -> tuple[int, int]:
    parsed = Config.parse(config)
    return parsed.block_m, parsed.block_n
