"""What a sweep found, from what it recorded: as text, as JSON, as tables for other tools, and as pictures (pictures.py).

    cost of a config       its time as a multiple of the incumbent's, in the same rounds
    slowdown of a config   its cost as a multiple of the least of its job; only configs that are ok have one
    spread of numbers      half of what lies between their 20th and 80th percentile, as a share of the median
"""

import collections
import csv
import functools
import io
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..measure.timing import quantiles
from .prune import REASONS
from .trials import Job, Run, Trial

SYNTHETIC = "synthetic: no GPU was timed"
LEVELS = (1.01, 1.05, 1.1, 1.25, 1.5, 2.0)  # slowdowns whose share of configs is told
MOST = 6           # configs that a cover may have
TOPS = (1, 4, 8)   # of the static order
NEAR = 1.05        # a config that is out and as near to the best was pruned wrongly
TIE, SPREADS = 0.01, 2  # what differs by less than a share, or by less than so many spreads, is a tie
# of a trial's status: its name in the T4 schema, https://github.com/odgaard/TuningSchema
INVALIDITY = {
    "ok": "correct", "constraint": "constraints", "prefilter": "constraints", "compile error": "compile",
    "compile timeout": "timeout", "shared memory": "constraints", "tensor memory": "constraints",
    "register collapse": "constraints", "spill": "constraints", "wrong tensor path": "constraints",
    "duplicate work": "constraints", "serialized": "constraints", "unclear": "constraints", "slower": "constraints",
    "incorrect": "correctness", "not repeatable": "correctness", "hang": "timeout", "launch error": "runtime",
    "device lost": "runtime",
}
PROBLEM = ("heads", "kv_heads", "n_q", "n_k", "d", "dv", "mask", "masked", "dropout", "lengths", "mapped")
SEEN = ("registers", "shared_memory", "occupancy", "bound", "cycles")  # of a trial's binary


@dataclass(frozen=True)
class Standing:
    """One job: what came of its configs, and what each costs."""

    job: Job
    trials: dict[str, Trial]  # in the order of the job's configs
    costs: dict[str, float]   # of all that have samples; in seconds where the incumbent has none
    incumbent: float | None   # its seconds

    @functools.cached_property
    def slowdowns(self) -> dict[str, float]:
        """{config: slowdown}, the fastest first; of equals, what the model expects to be faster."""
        ok = {config: cost for config, cost in self.costs.items() if self.trials[config].status == "ok"}
        least = min(ok.values(), default=None)
        return {config: ok[config] / least for config in sorted(ok, key=ok.get)}

    @property
    def best(self) -> Trial | None:
        return next((self.trials[config] for config in self.slowdowns), None)

    @property
    def ratio(self) -> float | None:
        """The best's time as a multiple of the incumbent's."""
        return None if self.best is None or self.incumbent is None else self.costs[self.best.config]

    @property
    def beside(self) -> float | None:
        """The incumbent's seconds in the rounds of the best, if they had any in common."""
        return statistics.median(self.best.beside) if self.best and self.best.beside else self.incumbent

    @property
    def margin(self) -> float:
        """A smaller difference between the best and the incumbent is a tie."""
        if self.best.beside:
            return max(TIE, SPREADS * spread([a / b for a, b in zip(self.best.samples, self.best.beside)]))
        both = [self.trials[config].samples for config in (self.best.config, self.job.incumbent) if config in self.costs]
        return max(TIE, *(SPREADS * spread(samples) for samples in both))

    @property
    def verdict(self) -> str:
        """The best beside the incumbent, in words."""
        if self.best is None:
            return "nothing timed"
        if self.best.config == self.job.incumbent:
            return "the incumbent is the best"
        if self.ratio is None:
            return "no time of the incumbent"
        if abs(self.ratio - 1) < self.margin:
            return "a tie with the incumbent"
        return f"{abs(1 - self.ratio):.1%} {'less' if self.ratio < 1 else 'more'} time than the incumbent"

    @property
    def spearman(self) -> float | None:
        """How far the model's cycles order the configs as their costs do: 1 wholly, -1 the other way round."""
        known = [config for config in self.slowdowns if self.trials[config].static.get("cycles") is not None]
        return spearman([self.trials[config].static["cycles"] for config in known], [self.costs[config] for config in known])

    @property
    def place(self) -> int | None:
        """The best's place in the static order, from 1."""
        return None if self.best is None else 1 + self.job.configs.index(self.best.config)

    def missed(self, top: int) -> float | None:
        """The slowdown that is left when only so many are timed, the first of the static order."""
        return min((self.slowdowns[config] for config in self.job.configs[:top] if config in self.slowdowns), default=None)

    @property
    def pruned(self) -> dict[str, float]:
        """{config: slowdown} of those that are out by what was seen of them, and were timed all the same."""
        if self.best is None:
            return {}
        least = self.costs[self.best.config]
        return {config: cost / least for config, cost in self.costs.items() if self.trials[config].status in REASONS}

    @property
    def wrongly_pruned(self) -> dict[str, float]:
        return {config: slowdown for config, slowdown in self.pruned.items() if slowdown <= NEAR}


def standings(run: Run) -> list[Standing]:
    """Every job of a run, also those of which nothing was tried yet."""
    found = []
    for job in run.jobs:
        trials = run.of(job)
        own = trials[job.incumbent].seconds if job.incumbent in trials else None
        others = [statistics.median(trial.beside) for trial in trials.values() if trial.beside]
        incumbent = own if own is not None else statistics.median(others) if others else None
        costs = {config: trial.ratio if trial.beside else trial.seconds / (incumbent or 1)
                 for config, trial in trials.items() if trial.samples}
        found.append(Standing(job, trials, costs, incumbent))
    return found


def spread(values: Sequence[float]) -> float:
    """Half of what lies between the 20th and the 80th percentile, as a share of the median."""
    q20, median, q80 = quantiles(values)
    return (q80 - q20) / 2 / median


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value from the least; equals share the mean of theirs."""
    order = sorted(values)
    return [order.index(value) + (1 + order.count(value)) / 2 for value in values]


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The correlation of ranks; None of fewer than three, or where all are the same."""
    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return statistics.correlation(ranks(one), ranks(other))


def shares(standing: Standing) -> dict[float, float]:
    """{level: the share of configs whose slowdown is no more}."""
    found = standing.slowdowns.values()
    return {level: sum(slowdown <= level for slowdown in found) / len(found) for level in LEVELS} if found else {}


def regret(jobs: Sequence[Standing]) -> tuple[float, float] | None:
    """What the incumbents' times are as multiples of the bests': the geometric mean, and the worst."""
    found = [1 / standing.ratio for standing in jobs if standing.ratio is not None]
    return (statistics.geometric_mean(found), max(found)) if found else None


@dataclass(frozen=True)
class Cover:
    """Some configs, and the slowdowns that are left where each job has the best of them."""

    configs: tuple[str, ...]
    worst: float        # infinite where none of them is ok for some job
    mean: float         # geometric, over the jobs for which one is
    without: int        # jobs for which none is


def coverage(jobs: Sequence[Standing]) -> dict[tuple[str, str, str], list[Cover]]:
    """{(kernel, dtype, head size): covers of one config, of two, ...} by greed, until one more would help no job.

    Each step takes the config with which the fewest jobs are without, and of those the one with the least mean.
    """
    groups = collections.defaultdict(list)
    for standing in jobs:
        if standing.best is not None:
            groups[group(standing.job)].append(standing.slowdowns)
    return {key: _covers(found) for key, found in groups.items()}


def group(job: Job) -> tuple[str, str, str]:
    """Jobs that are covered together: their kernel, dtype and head size."""
    d, dv = job.problem.d, job.problem.dv
    return job.kernel, _dtype(job), f"{d}" if d == dv else f"{d}/{dv}"


def _covers(jobs: list[dict[str, float]]) -> list[Cover]:
    # in one order, whatever the jobs': of equals the first is taken
    names, covers = sorted(set().union(*jobs)), []
    while len(covers) < MOST:
        before = covers[-1].configs if covers else ()
        cover = min((_cover((*before, name), jobs) for name in names if name not in before),
                    key=lambda cover: (cover.without, cover.mean), default=None)
        if cover is None or (covers and (cover.without, cover.mean) == (covers[-1].without, covers[-1].mean)):
            break
        covers.append(cover)
    return covers


def _cover(configs: tuple[str, ...], jobs: list[dict[str, float]]) -> Cover:
    least = [min(job.get(config, math.inf) for config in configs) for job in jobs]
    covered = [slowdown for slowdown in least if slowdown < math.inf]
    # no config is taken that is ok nowhere
    return Cover(configs, max(least), statistics.geometric_mean(covered), len(least) - len(covered))


def failures(run: Run) -> dict[str, dict[str, int]]:
    """{kernel: {status: how many}} of all that is not ok, what is most frequent first."""
    counts = {job.kernel: collections.Counter() for job in run.jobs}
    for job in run.jobs:
        counts[job.kernel].update(trial.status for trial in run.of(job).values() if trial.status != "ok")
    return {kernel: dict(counter.most_common()) for kernel, counter in counts.items()}


def done(run: Run) -> tuple[int, int]:
    """How many configs were tried, and out of how many."""
    return sum(len(run.of(job)) for job in run.jobs), sum(len(job.configs) for job in run.jobs)


def origin(run: Run) -> str:
    """Where the numbers come from, in one line, beginning with what speaks against them."""
    tried, planned = done(run)
    facts = {"": "gpu", "torch ": "torch", "Triton ": "triton", "commit ": "commit"}
    known = [f"{name}{run.environment[key]}" for name, key in facts.items() if run.environment.get(key)]
    warnings = [SYNTHETIC] * run.synthetic + [f"unfinished: {tried} of {planned} configs tried"] * (tried < planned)
    return "; ".join([*warnings, ", ".join(known) or "where it ran was not recorded"])


def text(run: Run) -> str:
    """The whole report for people."""
    jobs, (tried, planned) = standings(run), done(run)
    head = [f"Sweep of {len(jobs)} jobs, {tried} of {planned} configs tried", origin(run)]
    if not tried:
        return "\n".join([*head, "Nothing was tried yet, so there is nothing to report."])
    parts = ["\n".join(head), _best(jobs), _failures(run)]
    if any(standing.best for standing in jobs):
        parts[2:2] = [_slowdowns(jobs), _coverage(jobs), _model(jobs)]
    return "\n\n".join(parts)


def _best(jobs) -> str:
    rows = [["job", "tried", "ok", "best", "us", "q20..q80", "incumbent", "us", "ratio", "in words"]]
    for standing in jobs:
        best, beside, ratio = standing.best, standing.beside, standing.ratio
        ok = sum(trial.status == "ok" for trial in standing.trials.values())
        q20, _, q80 = quantiles(best.samples) if best else (None,) * 3
        rows.append([standing.job.name, f"{len(standing.trials)}/{len(standing.job.configs)}", f"{ok}",
                     best.config if best else "-", _us(best and best.seconds), f"{_us(q20)}..{_us(q80)}" if best else "-",
                     standing.job.incumbent, _us(beside), _number(ratio, 3), standing.verdict])
    lost = regret(jobs)
    said = "" if lost is None else (f"The incumbents take {lost[0]:.3f} times as long as the best in the geometric mean, "
                                    f"{lost[1]:.3f} times at the worst.\n")
    return ("The best config of each job. Ratio: of its time to the incumbent's, in the same rounds.\n"
            f"A tie differs by less than {TIE:.0%} or {SPREADS} spreads, whichever is more.\n"
            f"{said}{_table(rows, {0, 3, 6, 9})}")


def _slowdowns(jobs) -> str:
    rows = [["job", "timed", *(f"{level:g}x" for level in LEVELS)]]
    rows += [[standing.job.name, f"{len(standing.slowdowns)}", *(f"{share:.0%}" for share in shares(standing).values())]
             for standing in jobs if standing.best]
    return f"The share of configs that take no more than so many times the best's time.\n{_table(rows, {0})}"


def _coverage(jobs) -> str:
    rows = [["kernel", "dtype", "head", "configs", "worst", "mean", "jobs without", "added"]]
    for key, covers in coverage(jobs).items():
        rows += [[*key, f"{k}", _number(cover.worst), _number(cover.mean), f"{cover.without}", cover.configs[-1]]
                 for k, cover in enumerate(covers, 1)]
    return ("How few configs would do: the slowdown that is left, at the worst and in the geometric mean of the jobs.\n"
            + _table(rows, {0, 1, 7}))


def _model(jobs) -> str:
    rows = [["job", "Spearman", "winner's place", *(f"first {top}" for top in TOPS), "out but timed", "wrongly pruned"]]
    for standing in jobs:
        if standing.best:
            wrong = ", ".join(f"{config} ({standing.trials[config].status}, {slowdown:.2f})"
                              for config, slowdown in standing.wrongly_pruned.items())
            rows.append([standing.job.name, _number(standing.spearman), f"{standing.place}/{len(standing.job.configs)}",
                         *(_number(standing.missed(top)) for top in TOPS), f"{len(standing.pruned)}", wrong or "none"])
    said = ", ".join(f"{share:.0%} in its first {top}" for top, share in recall(jobs).items())
    return (f"What the model's order was worth: of the winners, it had {said}.\n"
            "First 8: the slowdown that is left where only these are timed. "
            f"Wrongly pruned: out, but within {NEAR - 1:.0%} of the best.\n{_table(rows, {0, 7})}")


def recall(jobs: Sequence[Standing]) -> dict[int, float]:
    """{top: the share of jobs whose winner is among so many of the static order}."""
    places = [standing.place for standing in jobs if standing.best]
    return {top: sum(place <= top for place in places) / len(places) for top in TOPS} if places else {}


def _failures(run) -> str:
    rows = [[kernel, reason, f"{count}", REASONS.get(reason, "")] for kernel, counts in failures(run).items()
            for reason, count in counts.items()]
    return "No config failed." if not rows else (
        f"Configs that are not ok.\n{_table([['kernel', 'reason', 'configs', ''], *rows], {0, 1, 3})}")


def _table(rows: list[list[str]], left: set[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.4g}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or math.isinf(value) else f"{value:.{digits}f}"


def as_json(run: Run) -> dict:
    """The whole report for programs; slowdowns in full."""
    jobs, (tried, planned) = standings(run), done(run)
    return {
        "synthetic": SYNTHETIC if run.synthetic else None, "finished": tried == planned, "tried": tried, "planned": planned,
        "environment": run.environment, "jobs": [_job_as_json(standing) for standing in jobs],
        "coverage": [dict(zip(("kernel", "dtype", "head_size"), key)) | {"covers": [
            {"configs": list(cover.configs), "worst": None if cover.without else cover.worst, "mean": cover.mean,
             "without": cover.without} for cover in covers]} for key, covers in coverage(jobs).items()],
        "recall": {str(top): share for top, share in recall(jobs).items()}, "regret": regret(jobs) and list(regret(jobs)),
        "failures": failures(run),
    }


def _job_as_json(standing: Standing) -> dict:
    best = standing.best
    q20, _, q80 = quantiles(best.samples) if best else (None,) * 3
    return {
        "job": standing.job.name, "kernel": standing.job.kernel, "problem": standing.job.problem.as_json(),
        "planned": len(standing.job.configs), "tried": len(standing.trials),
        "ok": sum(trial.status == "ok" for trial in standing.trials.values()),
        "best": best and best.config, "seconds": best and best.seconds, "q20": q20, "q80": q80,
        "incumbent": standing.job.incumbent, "incumbent_seconds": standing.beside, "ratio": standing.ratio,
        "verdict": standing.verdict, "slowdowns": standing.slowdowns,
        "within": {f"{level:g}": share for level, share in shares(standing).items()},
        "spearman": standing.spearman, "place": standing.place, "missed": {str(top): standing.missed(top) for top in TOPS},
        "pruned_but_timed": standing.pruned, "wrongly_pruned": standing.wrongly_pruned,
    }


def as_csv(run: Run) -> str:
    """A row for each trial, for spreadsheets."""
    file = io.StringIO()
    head = ["job", "kernel", "batch", "dtype", *PROBLEM, "config", "block_m", "block_n", "warps", "stages", "status", "note",
            "seconds", "q20", "q80", "n", "ratio", *SEEN, "check_seconds", "source"]
    table = csv.DictWriter(file, head, restval="", lineterminator="\n")
    table.writeheader()
    for standing in standings(run):
        of_job = {"job": standing.job.name} | _asked(standing.job) | {"source": SYNTHETIC if run.synthetic else "timed"}
        for trial in standing.trials.values():
            config = Config.parse(trial.config)
            table.writerow(of_job | _timed(standing, trial) | {name: trial.static.get(name) for name in SEEN} | {
                "config": trial.config, "block_m": config.block_m, "block_n": config.block_n, "warps": config.num_warps,
                "stages": config.num_stages, "status": trial.status, "note": trial.note,
                "check_seconds": trial.check_seconds})
    return file.getvalue()


def _asked(job: Job) -> dict:
    problem = job.problem
    return {"kernel": job.kernel, "batch": "x".join(map(str, problem.batch)), "dtype": _dtype(job)} | {
        name: getattr(problem, name) for name in PROBLEM}


def _dtype(job: Job) -> str:
    return job.problem.as_json()["dtype"]


def _timed(standing: Standing, trial: Trial) -> dict:
    if not trial.samples:
        return {"n": 0}
    q20, _, q80 = quantiles(trial.samples)
    ratio = {"ratio": standing.costs[trial.config]} if standing.incumbent is not None else {}
    return {"seconds": trial.seconds, "q20": q20, "q80": q80, "n": len(trial.samples)} | ratio


def as_t4(run: Run) -> dict:
    """The trials as other tuners exchange them: the Open Autotuning Results Schema 1.0.0. Times in milliseconds."""
    warning = {"note": SYNTHETIC} if run.synthetic else {}
    results = [_as_t4(job, trial, warning) for job in run.jobs for trial in run.of(job).values()]
    return {"schema_version": "1.0.0", **warning, "results": results}


def _as_t4(job: Job, trial: Trial, warning: dict) -> dict:
    config, verdict = Config.parse(trial.config), invalidity(trial.status)
    named = [("time", trial.seconds, 1e3, "ms"), ("registers", trial.static.get("registers"), 1, ""),
             ("shared_memory", trial.static.get("shared_memory"), 1, "bytes")]
    return {
        # a job's name tells apart what its fields do not, such as a window's width
        "configuration": {"job": job.name} | _asked(job) | warning | {
            "block_m": config.block_m, "block_n": config.block_n, "num_warps": config.num_warps,
            "num_stages": config.num_stages, "edge_stages": config.edge_stages or config.num_stages},
        "times": {"compilation_time": 1e3 * trial.check_seconds, "runtimes": [1e3 * sample for sample in trial.samples],
                  "framework": 0, "search_algorithm": 0, "validation": 0},
        "invalidity": verdict, "correctness": int(verdict == "correct"),
        "measurements": [{"name": name, "value": scale * value, "unit": unit} for name, value, scale, unit in named
                         if value is not None],
        "objectives": ["time"],
    }


def invalidity(status: str) -> str:
    """A trial's status as the T4 schema calls it. ValueError: it is unknown."""
    if status not in INVALIDITY:
        raise ValueError(f"status: expected one of {', '.join(INVALIDITY)}; got {status!r}")
    return INVALIDITY[status]


def write(run: Run, folder: Path, say: Callable = print) -> list[Path]:
    """summary.csv, t4.json and plots/*.png in a folder, each whole or not at all; what is not drawn is said."""
    files = {"summary.csv": as_csv(run).encode(), "t4.json": json.dumps(as_t4(run), indent=1, allow_nan=False).encode()}
    try:
        from . import sweep_plots
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        say("no pictures: expected matplotlib, got none; pip install matplotlib")
    else:
        jobs = standings(run)
        pages = sweep_plots.pages(jobs, coverage(jobs), origin(run))
        files |= {f"plots/{name}.png": sweep_plots.png(figure) for name, figure in pages.items()}
        if not pages:
            say("no pictures: nothing was timed")
    return [_put(folder / name, content) for name, content in files.items()]


def _put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_bytes(content)
    os.replace(beside, path)
    return path
