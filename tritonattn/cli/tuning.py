"""Tuning commands: python -m tritonattn tune | sweep | replay | report | cache."""

import argparse
import contextlib
import importlib.util
import math
import sys
import time
from pathlib import Path

import torch

from ..autotune import record_problems, replay, search, trials
from ..configs import user_cache
from ..measure.journal import JournalError
from ..problem import Problem
from .format import columns

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ERRORS = (ValueError, OSError, RuntimeError, JournalError)  # of input


def add(commands) -> None:
    """Add these commands to a parser."""
    def command(name, run, summary, to=commands, **defaults):
        parser = to.add_parser(name, help=summary)
        parser.set_defaults(run=_checked(run), **defaults)
        return parser

    tune = command("tune", _tune, "find the best configs for some shapes on this GPU, and use them in later calls",
                   compiled=True)
    _add_problems(tune, required=True)
    tune.add_argument("--together", action="store_true",
                      help="one config for all shapes: the one with the least time in all, by the calls that FILE has of each")
    tune.add_argument("--strategy", choices=search.STRATEGIES, default="halving", help="default: %(default)s")
    tune.add_argument("--trials", type=_positive(int), metavar="N", help="try at most N configs for each kernel")
    tune.add_argument("--seconds", type=_positive(float), default=math.inf, metavar="S", help="at most S s for each kernel")
    tune.add_argument("--again", action="store_true", help="try earlier configs again (default: only new candidates)")

    sweep = command("sweep", _sweep, "time every config of some kernels and shapes; resumes after an interruption",
                    compiled=True)
    sweep.add_argument("folder", type=Path, help="a new folder; or a sweep to resume, without other arguments")
    _add_problems(sweep, required=False)
    sweep.add_argument("--rounds", type=_positive(int), default=search.EXHAUSTIVE_SAMPLES, metavar="N",
                       help="samples of each config (default: %(default)s)")
    sweep.add_argument("--minutes", type=_positive(float), default=math.inf, metavar="M", help="stop after so many minutes")

    compare = command("replay", _replay, "compare search strategies on a recorded sweep, without a GPU")
    compare.add_argument("folder", type=Path, help="a sweep")
    compare.add_argument("--seeds", type=_positive(int), default=20, metavar="N", help="runs of each (default: %(default)s)")

    report = command("report", _report, "print the results of a sweep, and write t4.json")
    report.add_argument("folder", type=Path, help="a sweep")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where the files go (default: the sweep's own folder)")
    report.add_argument("--plot", action="store_true", help="also draw heat.png: the best time of each tile (needs matplotlib)")

    actions = commands.add_parser("cache", help="the configs tuned on this machine").add_subparsers(
        required=True, metavar="path|ls|clear")
    command("path", _cache_path, "print the folder", actions)
    command("ls", _cache_ls, "list the tuned configs", actions)
    clear = command("clear", _cache_clear, "remove all tuned configs", actions)
    clear.add_argument("--yes", action="store_true", required=True, help="confirm: this cannot be undone")


def _add_problems(command, required: bool) -> None:
    source = command.add_mutually_exclusive_group(required=required)
    source.add_argument("--shape", metavar="BxHxHKxNxD,...", help="batch, heads, kv heads, length, head size")
    source.add_argument("--from", dest="file", type=Path, metavar="FILE", help="a file of tritonattn.record_problems")
    command.add_argument("--dtype", choices=DTYPES, default="bf16", help="with --shape (default: %(default)s)")
    command.add_argument("--causal", action="store_true", help="with --shape: mask later keys")
    command.add_argument("--forward", action="store_true", help="only the forward pass")
    command.add_argument("--seed", type=int, default=0, help="of inputs and random choices (default: %(default)s)")


def _checked(run):
    """Return the command with ERRORS printed as one line on stderr, and exit code 2 for them."""
    def command(arguments) -> int:
        try:
            return run(arguments) or 0
        except ERRORS as error:
            print(error, file=sys.stderr)
            return 2

    return command


def _positive(kind):
    """Return the type of a positive int or float for argparse."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if 0 < kind(text) < math.inf:
                return kind(text)
        raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {text}")

    return parse


def _problems(arguments) -> list[tuple]:
    """Return the requested (problem, {kernel: calls})."""
    from ..autotune.tune import kernels_of

    if arguments.file:
        # the problems with the most calls first
        recorded = sorted(record_problems.read(arguments.file), key=lambda entry: -sum(entry[1].values()))
        return [(problem, {kernel: calls[kernel] for kernel in kernels_of(problem, not arguments.forward) if kernel in calls})
                for problem, calls in recorded]
    dtype = getattr(torch, DTYPES[arguments.dtype])
    problems = [Problem.parse(shape, dtype, arguments.causal) for shape in arguments.shape.split(",")]
    return [(problem, dict.fromkeys(kernels_of(problem, not arguments.forward), 1)) for problem in problems]


def _tune(arguments) -> int:
    from ..autotune import tune

    problems = _problems(arguments)
    if arguments.together and len(problems) < 2:
        raise ValueError(f"--together: expected at least two shapes, got {len(problems)}")
    setup = tune.local_setup(seed=arguments.seed)
    budget = search.Budget(arguments.trials, arguments.seconds)
    with setup.compilers:
        records, failed = tune.tune_all(problems, setup, arguments.strategy, budget, arguments.again,
                                        arguments.together)
    if records:
        print(f"stored in {setup.store.folder or 'memory only'}")
    return 1 if failed else 0


def _sweep(arguments) -> None:
    from ..autotune import sweep, sweep_report, tune

    new, start = bool(arguments.shape or arguments.file), time.monotonic()
    if not new and not (arguments.folder / trials.JOURNAL).exists():
        raise ValueError(f"{arguments.folder} has no sweep to resume; to begin one, add --shape or --from")
    problems, setup = _problems(arguments) if new else None, tune.local_setup(seed=arguments.seed, command="sweep")
    with setup.compilers:
        if new:
            sweep.begin(arguments.folder, problems, setup, arguments.rounds)
        done = sweep.resume(arguments.folder, setup, 60 * arguments.minutes - (time.monotonic() - start))
    print(sweep_report.text(trials.read(arguments.folder)))
    print("done" if done else "time limit reached; run `sweep` on the same folder to resume")


def _replay(arguments) -> None:
    recorded = trials.read(arguments.folder)
    rows = [("strategy", "regret: mean", "p95", "largest", "configs", "device s")]
    for strategy in replay.REPLAYED:
        outcomes = replay.replay(recorded, strategy, range(arguments.seeds))
        if not outcomes:
            raise ValueError(f"{arguments.folder}: no config of this sweep was timed")
        row = replay.summary(outcomes)
        rows.append((strategy, *(f"{row[name]:.2%}" for name in ("mean", "p95", "largest")), f"{row['trials']:.1f}",
                     f"{row['device_seconds']:.3f}"))
    print("synthetic: no GPU was timed\n" if recorded.synthetic else "", "\n".join(columns(rows)), sep="")


def _report(arguments) -> None:
    from ..autotune import sweep_report

    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed; fix: pip install 'tritonattn[demo]'")
    run = trials.read(arguments.folder)
    print(sweep_report.text(run))
    for path in sweep_report.write(run, arguments.out or arguments.folder, arguments.plot):
        print(f"wrote {path}")


def _cache_path(arguments) -> int:
    folder = user_cache.current_cache().folder
    print(folder or "none: no home folder; set TRITONATTN_CACHE_DIR")
    return 0 if folder else 1


def _cache_ls(arguments) -> None:
    for path, record in user_cache.current_cache().records():
        print(f"{path.stem}  {record.gpu['name']}  {record.key}  {record.config}  {record.seconds * 1e6:.0f} us"
              f"{'' if record.is_current else '  stale: other kernels or another Triton'}")


def _cache_clear(arguments) -> None:
    print(f"removed {user_cache.current_cache().clear()} files")
