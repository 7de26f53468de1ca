"""The commands of tuning: python -m tritonattn tune | sweep | replay | report | cache."""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import torch

from ..autotune import record_problems, replay, search, trials
from ..autotune.record_problems import RecordingError
from ..configs import user_cache
from ..configs.kernel_hash import kernel_hash
from ..measure.journal import JournalError
from ..problem import Problem

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ERRORS = (ValueError, OSError, RuntimeError, JournalError, RecordingError)  # of input, told in a line


def add(commands) -> None:
    """Add these commands to a parser."""
    _add_tune(commands)
    _add_sweep(commands)
    again = commands.add_parser("replay", help="try strategies on a recorded sweep: regret against time, without a GPU")
    again.add_argument("folder", type=Path, help="of a sweep")
    again.add_argument("--strategy", choices=replay.REPLAYED, help="one alone (default: all)")
    again.add_argument("--seeds", type=_count, default=20, metavar="N", help="runs of each (default: %(default)s)")
    again.add_argument("--json", action="store_true", help="print JSON instead of a table")
    again.set_defaults(run=_told(_replay))
    report = commands.add_parser("report", help="what a sweep found: text, and summary.csv, t4.json and plots in its folder")
    report.add_argument("folder", type=Path, help="of a sweep")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where the files go (default: the sweep's own folder)")
    report.add_argument("--json", action="store_true", help="print JSON instead of text")
    report.set_defaults(run=_told(_report))
    _add_cache(commands)


def _add_problems(command, required: bool) -> None:
    which = command.add_mutually_exclusive_group(required=required)
    which.add_argument("--shape", metavar="BxHxHKxNxD,...", help="batch, heads, kv heads, length, head size")
    which.add_argument("--from", dest="file", type=Path, metavar="FILE", help="what tritonattn.record_problems wrote")
    command.add_argument("--dtype", choices=DTYPES, default="bf16", help="with --shape (default: %(default)s)")
    command.add_argument("--causal", action="store_true", help="with --shape: a query sees no later key")
    command.add_argument("--forward", action="store_true", help="leave the backward pass out")
    command.add_argument("--seed", type=int, default=0, help="of inputs, and of what is drawn (default: %(default)s)")


def _add_tune(commands) -> None:
    tune = commands.add_parser("tune", help="find the best configs for some shapes on this GPU, and keep them for all calls")
    _add_problems(tune, required=True)
    tune.add_argument("--strategy", choices=search.STRATEGIES, default="halving", help="default: %(default)s")
    tune.add_argument("--trials", type=_count, metavar="N", help="at most so many configs for each kernel")
    tune.add_argument("--seconds", type=_positive, default=float("inf"), metavar="S", help="of timing, for each kernel")
    tune.add_argument("--again", action="store_true", help="try what was tried before too (default: only new candidates)")
    tune.set_defaults(run=_told(_tune), compiled=True)


def _add_sweep(commands) -> None:
    sweep = commands.add_parser("sweep", help="time every config of some kernels and shapes; goes on after a kill")
    sweep.add_argument("folder", type=Path, help="new; or of a sweep, which goes on, without other arguments")
    _add_problems(sweep, required=False)
    sweep.add_argument("--kernels", metavar="NAMES", help="forward,dq,dkdv,dbias (default: those of the pass)")
    sweep.add_argument("--rounds", type=_count, default=search.LONG, metavar="N", help="samples of each (default: %(default)s)")
    sweep.add_argument("--minutes", type=_positive, default=float("inf"), metavar="M", help="stop after so many")
    sweep.set_defaults(run=_told(_sweep), compiled=True)


def _add_cache(commands) -> None:
    cache = commands.add_parser("cache", help="the configs tuned on this machine")
    actions = cache.add_subparsers(required=True, metavar="path|ls|clear")
    actions.add_parser("path", help="print the folder").set_defaults(run=_told(_cache_path))
    actions.add_parser("ls", help="list the tuned configs").set_defaults(run=_told(_cache_ls))
    clear = actions.add_parser("clear", help="remove all tuned configs")
    clear.add_argument("--yes", action="store_true", required=True, help="confirm: this cannot be undone")
    clear.set_defaults(run=_told(_cache_clear))


def _told(run):
    """The command, with what is wrong with its input told in a line: exit code 2."""
    def command(arguments) -> int:
        try:
            return run(arguments) or 0
        except ERRORS as error:
            print(error, file=sys.stderr)
            return 2

    return command


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")


def _problems(arguments) -> list[tuple]:
    """(problem, kernels) of everything that is asked for."""
    from ..autotune.tuner import kernels_of

    if arguments.file:
        asked = record_problems.read(arguments.file)
        # those that ran most come first
        asked = sorted(asked, key=lambda each: -sum(each[1].values()))
        return [(problem, [kernel for kernel in kernels_of(problem, not arguments.forward) if kernel in kernels])
                for problem, kernels in asked]
    dtype = getattr(torch, DTYPES[arguments.dtype])
    found = [Problem.parse(shape, dtype, arguments.causal) for shape in arguments.shape.split(",")]
    return [(problem, kernels_of(problem, not arguments.forward)) for problem in found]


def _lab(arguments):
    from ..autotune import tuner

    return tuner.local_setup(seed=arguments.seed)


def _tune(arguments) -> int:
    from ..autotune import tuner

    asked, lab = _problems(arguments), _lab(arguments)
    with lab.compilers:
        found, missed = tuner.tune_all(asked, lab, arguments.strategy, search.Budget(arguments.trials, arguments.seconds),
                                       arguments.again)
    if found:
        print(f"kept in {lab.store.folder or 'memory alone'}")
    return 1 if missed else 0


def _sweep(arguments) -> int:
    from ..autotune import sweep, tuner

    new, began = bool(arguments.shape or arguments.file), time.monotonic()
    if new:
        sweep.expect_new(arguments.folder)
    if not new and not (arguments.folder / trials.PLAN).exists():
        raise ValueError(f"{arguments.folder}: expected a sweep that has begun, or --shape or --from; got neither")
    lab = _lab(arguments)
    with lab.compilers:
        if new:
            asked = _problems(arguments)
            if arguments.kernels:
                named = arguments.kernels.split(",")
                if unknown := sorted(set(named) - {"forward", "dq", "dkdv", "dbias"}):
                    raise ValueError(f"--kernels: expected forward, dq, dkdv or dbias, got {', '.join(unknown)}")
                asked = [(problem, [kernel for kernel in named if kernel in tuner.kernels_of(problem)]) for problem, _ in asked]
            sweep.begin(arguments.folder, sweep.plan_of(asked, lab, arguments.rounds), lab.environment)
        done = sweep.carry_on(arguments.folder, lab, 60 * arguments.minutes - (time.monotonic() - began))
    code = _report(argparse.Namespace(folder=arguments.folder, out=None, json=False))
    print("all is done" if done else "time is up; the same folder goes on")
    return code


def _replay(arguments) -> None:
    recorded, found = trials.read(arguments.folder), {}
    for strategy in [arguments.strategy] if arguments.strategy else replay.REPLAYED:
        outcomes = replay.replay(recorded, strategy, range(arguments.seeds))
        if not outcomes:
            raise ValueError(f"{arguments.folder}: expected a sweep with timed configs, got none")
        found[strategy] = replay.summary(outcomes)
    if arguments.json:
        print(json.dumps({"synthetic": recorded.synthetic, "strategies": found}, indent=1))
        return
    print("synthetic: no GPU was timed\n" if recorded.synthetic else "", end="")
    print(f"{'strategy':12}{'regret: mean':>14}{'p95':>9}{'largest':>9}{'tried':>8}{'device s':>10}   per job")
    for strategy, each in found.items():
        print(f"{strategy:12}{each['mean']:14.2%}{each['p95']:9.2%}{each['largest']:9.2%}{each['trials']:8.1f}"
              f"{each['device_seconds']:10.3f}")


def _report(arguments) -> int:
    from ..autotune import sweep_report

    run = trials.read(arguments.folder)
    if arguments.json:
        print(json.dumps(sweep_report.as_json(run), indent=1))
        return 0
    print(sweep_report.text(run))
    for path in sweep_report.write(run, arguments.out or arguments.folder):
        print(f"wrote {path}")
    return 0


def _cache_path(arguments) -> int:
    folder = user_cache.current_cache().folder
    print(folder or "none: no home folder; set TRITONATTN_CACHE_DIR")
    return 0 if folder else 1


def _cache_ls(arguments) -> None:
    for path, record in user_cache.current_cache().records():
        state = "other kernels" if record.kernel_hash != kernel_hash() else "another Triton" if record.stale else ""
        line = f"{path.stem}  {record.gpu['name']}  {record.key}  {record.config}  {record.seconds * 1e6:.0f} us  {state}"
        print(line.rstrip())


def _cache_clear(arguments) -> None:
    print(f"removed {user_cache.current_cache().clear()} files")
