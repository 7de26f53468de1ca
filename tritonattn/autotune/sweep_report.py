"""The report of a sweep: a text table, summary.csv, t4.json and a heat map.

    cost      of a config: its time / the time of the default, in the same rounds
    slowdown  of a config: its cost / the least cost of its job, among the configs that are ok
    spread    of samples: half the distance from the 20th to the 80th percentile / the median
"""

import collections
import csv
import functools
import importlib
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..measure.timing import quantiles
from .prune import REASONS
from .search import FAILURES
from .trials import Job, Run, Trial

SYNTHETIC = "synthetic: no GPU was timed"
TOP = 8      # configs of the model's ranking in which the best is looked for
NEAR = 1.05  # an excluded config with a smaller slowdown was excluded wrongly
STATIC = ("registers", "stack", "shared_memory", "tensor_memory", "occupancy", "bound", "cycles")
# https://github.com/odgaard/TuningSchema; all other statuses are its "constraints"
T4_INVALIDITY = {"ok": "correct", "compile error": "compile", "compile timeout": "timeout", "hang": "timeout",
                 "incorrect": "correctness", "not repeatable": "correctness", "launch error": "runtime",
                 "device lost": "runtime"}


@dataclass(frozen=True)
class JobResult:
    """The trials of one job, and their costs."""

    job: Job
    trials: dict[str, Trial]  # in the order of the job's configs
    costs: dict[str, float]   # of the configs with samples; seconds where the default was never timed
    default_seconds: float | None

    @functools.cached_property
    def slowdowns(self) -> dict[str, float]:
        """{config: slowdown} of the configs that are ok, the fastest first."""
        ok = {config: cost for config, cost in self.costs.items() if self.trials[config].status == "ok"}
        return {config: ok[config] / min(ok.values()) for config in sorted(ok, key=ok.get)}

    @property
    def best(self) -> Trial | None:
        return next((self.trials[config] for config in self.slowdowns), None)

    @property
    def default_slowdown(self) -> float | None:
        """The time of the default / the time of the best. Below 1 if the default is fast but not ok."""
        return None if self.best is None or self.default_seconds is None else 1 / self.costs[self.best.config]

    @property
    def spearman(self) -> float | None:
        """The rank correlation of modelled cycles and times of the configs that are ok."""
        known = [config for config in self.slowdowns if self.trials[config].static.get("cycles") is not None]
        return spearman([self.trials[config].static["cycles"] for config in known], [self.costs[config] for config in known])

    @property
    def model_rank(self) -> int | None:
        """The rank of the best in the model's order, from 1."""
        return None if self.best is None else 1 + self.job.configs.index(self.best.config)

    @property
    def excluded(self) -> dict[str, float]:
        """{config: slowdown} of the configs that were excluded by static pruning, and timed to check it."""
        least = self.best and self.costs[self.best.config]
        return {config: cost / least for config, cost in self.costs.items() if least and self.trials[config].status in REASONS}


def results_of(run: Run) -> list[JobResult]:
    """Return the result of every job of a run, tried or not."""
    results = []
    for job in run.jobs:
        trials = run.of(job)
        own = trials[job.incumbent].samples if job.incumbent in trials else ()
        sides = own, *(trial.beside for trial in trials.values())
        default = next((statistics.median(samples) for samples in sides if samples), None)
        costs = {config: trial.ratio if trial.beside else trial.seconds / (default or 1)
                 for config, trial in trials.items() if trial.samples}
        results.append(JobResult(job, trials, costs, default))
    return results


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Return the rank correlation, or None for fewer than three values or if all are equal; ties share their mean rank."""
    if len(xs) < 3 or len(set(xs)) == 1 or len(set(ys)) == 1:
        return None

    def ranks(values):
        order = sorted(values)
        return [order.index(value) + order.count(value) / 2 for value in values]

    return statistics.correlation(ranks(xs), ranks(ys))


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
    rows = [["job", "tried", "ok", "best", "us", "spread", "default", "slowdown", "Spearman", "model rank"]]
    for result in results:
        best, ok = result.best, sum(trial.status == "ok" for trial in result.trials.values())
        q20, median, q80 = quantiles(best.samples) if best else (0, 1, 0)
        rows.append([result.job.name, f"{len(result.trials)}/{len(result.job.configs)}", f"{ok}", best.config if best else "-",
                     f"{1e6 * median:.4g}" if best else "-", f"{(q80 - q20) / 2 / median:.1%}" if best else "-",
                     result.job.incumbent, _number(result.default_slowdown, 3), _number(result.spearman, 2),
                     f"{result.model_rank or '-'}"])
    parts = [f"Sweep of {len(results)} jobs; {origin(run)}", table(rows, {0, 3, 6}), *_conclusions(results)]
    counts = collections.Counter((result.job.kernel, trial.status) for result in results for trial in result.trials.values()
                                 if trial.status != "ok")
    failed = [[kernel, reason, f"{count}", (REASONS | FAILURES).get(reason, "")]
              for (kernel, reason), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1]))]
    if failed:
        parts.append(table([["kernel", "reason", "configs", ""], *failed], {0, 1, 3}))
    return "\n\n".join(parts)


def _conclusions(results) -> list[str]:
    slowdowns = [result.default_slowdown for result in results if result.default_slowdown is not None]
    ranks = [result.model_rank for result in results if result.best]
    excluded = [(result, config, slowdown) for result in results for config, slowdown in result.excluded.items()]
    wrong = [f"{config} of {result.job.name} ({result.trials[config].status}, slowdown {slowdown:.2f})"
             for result, config, slowdown in excluded if slowdown <= NEAR]
    lines = []
    if slowdowns:
        lines.append(f"Slowdown of the defaults: {statistics.geometric_mean(slowdowns):.3f} in the geometric mean, "
                     f"{max(slowdowns):.3f} at most.")
    if ranks:
        lines.append(f"The model ranks the best among its first {TOP} in {sum(rank <= TOP for rank in ranks)} of "
                     f"{len(ranks)} jobs.")
        lines.append(f"{len(excluded)} excluded configs were timed; within {NEAR - 1:.0%} of the best: "
                     f"{', '.join(wrong) or 'none'}.")
    return ["\n".join(lines)] if lines else []


def table(rows: list[list[str]], left: set[int]) -> str:
    """Align cells in columns: those in `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def as_csv(run: Run) -> str:
    """Return one row for each trial; times in seconds."""
    rows = []
    for result in results_of(run):
        for trial in result.trials.values():
            q20, median, q80 = quantiles(trial.samples) if trial.samples else ("", "", "")
            rows.append({
                "job": result.job.name, "kernel": result.job.kernel, "config": trial.config, "status": trial.status,
                "note": trial.note, "seconds": median, "q20": q20, "q80": q80, "n": len(trial.samples),
                "cost": result.costs.get(trial.config), "slowdown": result.slowdowns.get(trial.config),
                **{name: trial.static.get(name) for name in STATIC}, "check_seconds": trial.check_seconds,
                "source": SYNTHETIC if run.synthetic else "timed"} | result.job.problem.as_json())
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else ["job"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_t4(run: Run) -> dict:
    """Return the trials in the Open Autotuning Results Schema (T4) 1.0.0; times in milliseconds."""
    warning = {"note": SYNTHETIC} if run.synthetic else {}
    results = []
    for trial in (trial for job in run.jobs for trial in run.of(job).values()):
        invalidity = T4_INVALIDITY.get(trial.status, "constraints")
        results.append({
            "configuration": {"job": trial.job, "config": trial.config, **vars(Config.parse(trial.config)), **warning},
            "times": {"compilation_time": 1e3 * trial.check_seconds, "runtimes": [1e3 * sample for sample in trial.samples],
                      "framework": 0, "search_algorithm": 0, "validation": 0},
            "invalidity": invalidity, "correctness": int(invalidity == "correct"), "objectives": ["time"],
            "measurements": [{"name": "time", "value": 1e3 * trial.seconds, "unit": "ms"}] if trial.samples else []})
    return {"schema_version": "1.0.0", **warning, "results": results}


def write(run: Run, folder: Path, plot: bool = False) -> list[Path]:
    """Write summary.csv and t4.json to a folder, and heat.png if `plot`; return their paths. Raises RuntimeError."""
    if plot:
        require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "summary.csv", folder / "t4.json"]
    paths[0].write_text(as_csv(run))
    paths[1].write_text(json.dumps(as_t4(run), indent=1, allow_nan=False))
    if plot:
        paths.append(folder / "heat.png")
        heat_map(run).savefig(paths[2], dpi=150)
    return paths


def require_matplotlib() -> None:
    """Raise RuntimeError if matplotlib cannot be imported."""
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise RuntimeError('--plot needs matplotlib: pip install "tritonattn[demo]"') from error


def heat_map(run: Run):
    """Draw the least slowdown of each job and tile, over warps and stages; grey tiles have no time."""
    from matplotlib import colormaps, style
    from matplotlib.figure import Figure

    results = [result for result in results_of(run) if result.best]
    least = {}  # {(number of the job, tile): slowdown}
    for y, result in enumerate(results):
        # the fastest config of a tile comes first
        for config, slowdown in result.slowdowns.items():
            parsed = Config.parse(config)
            least.setdefault((y, (parsed.block_m, parsed.block_n)), slowdown)
    tiles = sorted({(parsed.block_m, parsed.block_n) for result in results for parsed in map(Config.parse, result.job.configs)})
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
