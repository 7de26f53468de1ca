"""Tuning commands: python -m tritonattn tune | sweep | replay | report | table | cache."""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import torch

from .. import gpu
from ..autotune import record_problems, replay, search, trials
from ..autotune.record_problems import RecordingError
from ..config import Config
from ..configs import shipped, user_cache
from ..configs.kernel_hash import kernel_hash
from ..configs.shipped import FILLS, FOLDER, TableError
from ..measure.journal import JournalError
from ..problem import Problem

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ERRORS = (ValueError, OSError, RuntimeError, JournalError, TableError, RecordingError)  # of input


def add(commands, gpus) -> None:
    """Add these commands to a parser; `gpus` parses the names of GPUs."""
    _add_tune(commands)
    _add_sweep(commands)
    replay_parser = commands.add_parser("replay", help="compare search strategies on a recorded sweep, without a GPU")
    replay_parser.add_argument("folder", type=Path, help="a sweep")
    replay_parser.add_argument("--strategy", choices=replay.REPLAYED, help="only this one (default: all)")
    replay_parser.add_argument("--seeds", type=_count, default=20, metavar="N", help="runs of each (default: %(default)s)")
    replay_parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    replay_parser.set_defaults(run=_checked(_replay))
    report = commands.add_parser("report", help="print the results of a sweep, and write summary.csv and t4.json")
    report.add_argument("folder", type=Path, help="a sweep")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where the files go (default: the sweep's own folder)")
    report.add_argument("--plot", action="store_true", help="also draw heat.png: the best time of each tile (needs matplotlib)")
    report.set_defaults(run=_checked(_report))
    _add_table(commands, gpus)
    _add_cache(commands)


def _add_problems(command, required: bool) -> None:
    source = command.add_mutually_exclusive_group(required=required)
    source.add_argument("--shape", metavar="BxHxHKxNxD,...", help="batch, heads, kv heads, length, head size")
    source.add_argument("--from", dest="file", type=Path, metavar="FILE", help="a file of tritonattn.record_problems")
    command.add_argument("--dtype", choices=DTYPES, default="bf16", help="with --shape (default: %(default)s)")
    command.add_argument("--causal", action="store_true", help="with --shape: mask later keys")
    command.add_argument("--forward", action="store_true", help="only the forward pass")
    command.add_argument("--seed", type=int, default=0, help="of inputs and random choices (default: %(default)s)")


def _add_tune(commands) -> None:
    tune = commands.add_parser("tune", help="find the best configs for some shapes on this GPU, and use them in later calls")
    _add_problems(tune, required=True)
    tune.add_argument("--strategy", choices=search.STRATEGIES, default="halving", help="default: %(default)s")
    tune.add_argument("--trials", type=_count, metavar="N", help="most configs to try for each kernel")
    tune.add_argument("--seconds", type=_positive, default=float("inf"), metavar="S", help="most seconds for each kernel")
    tune.add_argument("--again", action="store_true", help="try earlier configs again (default: only new candidates)")
    tune.set_defaults(run=_checked(_tune), compiled=True)


def _add_sweep(commands) -> None:
    sweep = commands.add_parser("sweep", help="time every config of some kernels and shapes; resumes after an interruption")
    sweep.add_argument("folder", type=Path, help="a new folder; or a sweep to resume, without other arguments")
    _add_problems(sweep, required=False)
    sweep.add_argument("--kernels", metavar="NAMES", help="forward,dq,dkdv,dbias (default: those of the pass)")
    sweep.add_argument("--rounds", type=_count, default=search.LONG, metavar="N", help="samples of each (default: %(default)s)")
    sweep.add_argument("--minutes", type=_positive, default=float("inf"), metavar="M", help="stop after so many minutes")
    sweep.set_defaults(run=_checked(_sweep), compiled=True)


def _add_table(commands, gpus) -> None:
    table = commands.add_parser("table", help="make, compare or check the shipped tables of configs")
    kinds = table.add_subparsers(required=True, metavar="build|diff|validate")
    build = kinds.add_parser("build", help="from what the compiler makes of the kernels, or from sweeps")
    build.add_argument("gpus", type=gpus, metavar="GPU,...", help="models or architectures: h200,a100")
    how = build.add_mutually_exclusive_group()
    how.add_argument("--from", dest="sweeps", type=Path, nargs="+", metavar="FOLDER", help="sweeps that were timed there")
    how.add_argument("--everything", action="store_true", help="look for better configs of float32 and all head sizes too")
    how.add_argument("--like", type=gpus, metavar="GPU", help="look at another GPU's configs, at more where they fail: faster")
    build.add_argument("--also", metavar="PYTHON", help="a Python with another Triton, which the rows must do well with too")
    build.add_argument("--work", default="build", metavar="FOLDER", help="journals, to go on from (default: %(default)s)")
    build.add_argument("--out", metavar="FOLDER", help="where the files go (default: the package's configs)")
    build.add_argument("--jobs", type=_count, metavar="N", help="compilers side by side (default: one for each core)")
    build.set_defaults(run=_checked(_table_build), compiled=True)
    diff = kinds.add_parser("diff", help="the rows in which two tables differ")
    diff.add_argument("paths", type=Path, nargs=2, metavar="FILE")
    diff.set_defaults(run=_checked(_table_diff))
    validate = kinds.add_parser("validate", help="whether tables are whole, fit their GPU and are of the kernels as they are")
    validate.add_argument("paths", type=Path, nargs="*", metavar="FILE", help="default: all that are shipped")
    validate.set_defaults(run=_checked(_table_validate))


def _add_cache(commands) -> None:
    kept = commands.add_parser("cache", help="the configs that were tuned on this machine")
    kinds = kept.add_subparsers(required=True, metavar="path|ls|show|verify|merge|export|clear")
    for name, text, run in (("path", "print its folder", _cache_path), ("ls", "list what is there", _cache_ls),
                            ("verify", "list what no call will use, and why", _cache_verify)):
        kinds.add_parser(name, help=text).set_defaults(run=_checked(run))
    show = kinds.add_parser("show", help="print a record with everything that is known of it")
    show.add_argument("name", help="the name of its file, or how it begins")
    show.set_defaults(run=_checked(_cache_show))
    merge = kinds.add_parser("merge", help="take over another cache's folder, or an exported file")
    merge.add_argument("path", type=Path)
    merge.set_defaults(run=_checked(_cache_merge))
    export = kinds.add_parser("export", help="write all records to one file, to be merged elsewhere")
    export.add_argument("path", type=Path)
    export.set_defaults(run=_checked(_cache_export))
    clear = kinds.add_parser("clear", help="remove all records")
    clear.add_argument("--yes", action="store_true", required=True, help="say so: nothing brings them back")
    clear.set_defaults(run=_checked(_cache_clear))


def _checked(run):
    """Return the command with input errors as one line on stderr and exit code 2."""
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
    """Return the requested (problem, kernels)."""
    from ..autotune.tune import kernels_of

    if arguments.file:
        # the problems with the most calls first
        recorded = sorted(record_problems.read(arguments.file), key=lambda entry: -sum(entry[1].values()))
        return [(problem, [kernel for kernel in kernels_of(problem, not arguments.forward) if kernel in kernels])
                for problem, kernels in recorded]
    dtype = getattr(torch, DTYPES[arguments.dtype])
    problems = [Problem.parse(shape, dtype, arguments.causal) for shape in arguments.shape.split(",")]
    return [(problem, kernels_of(problem, not arguments.forward)) for problem in problems]


def _tune(arguments) -> int:
    from ..autotune import tune

    problems, setup = _problems(arguments), tune.local_setup(seed=arguments.seed)
    budget = search.Budget(arguments.trials, arguments.seconds)
    with setup.compilers:
        records, failed = tune.tune_all(problems, setup, arguments.strategy, budget, arguments.again)
    if records:
        print(f"stored in {setup.store.folder or 'memory only'}")
    return 1 if failed else 0


def _sweep(arguments) -> int:
    from ..autotune import sweep, sweep_report, tune

    new, start = bool(arguments.shape or arguments.file), time.monotonic()
    if new:
        sweep.expect_new(arguments.folder)
    elif not (arguments.folder / trials.PLAN).exists():
        raise ValueError(f"{arguments.folder} has no sweep to resume; to begin one, add --shape or --from")
    problems = _with_kernels(_problems(arguments), arguments.kernels) if new else None
    setup = tune.local_setup(seed=arguments.seed, command="sweep")
    with setup.compilers:
        if new:
            sweep.begin(arguments.folder, sweep.plan_of(problems, setup, arguments.rounds), setup.environment)
        done = sweep.resume(arguments.folder, setup, 60 * arguments.minutes - (time.monotonic() - start))
    print(sweep_report.text(trials.read(arguments.folder)))
    print("done" if done else "time limit reached; run `sweep` on the same folder to resume")
    return 0


def _with_kernels(problems, names: str | None) -> list[tuple]:
    """Replace the kernels of these problems by the named ones, as far as a problem has them."""
    from ..autotune.tune import kernels_of

    kernels = names.split(",") if names else []
    if unknown := sorted(set(kernels) - {"forward", "dq", "dkdv", "dbias"}):
        raise ValueError(f"--kernels: expected forward, dq, dkdv or dbias, got {', '.join(unknown)}")
    return [(problem, [kernel for kernel in kernels if kernel in kernels_of(problem)] or own) for problem, own in problems]


def _replay(arguments) -> None:
    recorded, summaries = trials.read(arguments.folder), {}
    for strategy in [arguments.strategy] if arguments.strategy else replay.REPLAYED:
        outcomes = replay.replay(recorded, strategy, range(arguments.seeds))
        if not outcomes:
            raise ValueError(f"{arguments.folder}: no config of this sweep was timed")
        summaries[strategy] = replay.summary(outcomes)
    if arguments.json:
        print(json.dumps({"synthetic": recorded.synthetic, "strategies": summaries}, indent=1))
        return
    print("synthetic: no GPU was timed\n" if recorded.synthetic else "", end="")
    print(f"{'strategy':12}{'regret: mean':>14}{'p95':>9}{'largest':>9}{'tried':>8}{'device s':>10}   per job")
    for strategy, row in summaries.items():
        print(f"{strategy:12}{row['mean']:14.2%}{row['p95']:9.2%}{row['largest']:9.2%}{row['trials']:8.1f}"
              f"{row['device_seconds']:10.3f}")


def _report(arguments) -> None:
    from ..autotune import sweep_report

    if arguments.plot:
        sweep_report.require_matplotlib()
    run = trials.read(arguments.folder)
    print(sweep_report.text(run))
    for path in sweep_report.write(run, arguments.out or arguments.folder, arguments.plot):
        print(f"wrote {path}")


def _table_build(arguments) -> None:
    from ..autotune import config_table, measured

    out, work = Path(arguments.out or FOLDER), Path(arguments.work)
    look = config_table.EVERYTHING if arguments.everything else config_table.USUAL
    if arguments.like:
        look = config_table.shipped_like(arguments.like[0])
    for target in arguments.gpus:
        if arguments.sweeps:
            found = [trials.read(folder) for folder in arguments.sweeps]
            path = next((FOLDER / f"{each.name}.json" for each in shipped.shipped_tables() if each.is_of(target)), None)
            if path is None:
                raise ValueError(f"table: expected a GPU with a shipped table, got {target.name}")
            print(f"wrote {measured.build(found, target, path, out)}")
        else:
            print(f"wrote {config_table.build(target, config_table.cells(target), out, work, arguments.jobs, look, arguments.also)}")


def _table_diff(arguments) -> int:
    old, new = map(shipped.read_table, arguments.paths)
    lines = []
    for key in dict.fromkeys([*old.rows, *new.rows]):
        for fill in FILLS:
            before, after = (getattr(table.rows.get(key), fill, None) for table in (old, new))
            if (before and before.config) != (after and after.config):
                told = [f"{entry.config} ({entry.source})" if entry else "nothing" for entry in (before, after)]
                lines.append(f"{key[0]:8} {8 * key[1]} bits {key[2]:3} {key[3]:6} {fill:4}  {told[0]} -> {told[1]}")
    print("\n".join(lines) or "the same configs everywhere")
    return 1 if lines else 0


def _table_validate(arguments) -> int:
    wrong = []
    for path in arguments.paths or sorted(FOLDER.glob("*.json")):
        table = shipped.read_table(path)
        on = next((known for known in gpu.KNOWN.values() if table.is_of(known)), None)
        if table.made.get("source") != kernel_hash():
            wrong.append(f"{path}: expected to be made from the kernels {kernel_hash()}, got {table.made.get('source')}")
        for row in table.rows.values():
            for fill in FILLS:
                entry = getattr(row, fill)
                try:
                    Config.parse(entry.config)
                except ValueError as error:
                    wrong.append(f"{path}, {row.key}, {fill}: {error}")
                if on and not entry.fits(on):
                    wrong.append(f"{path}, {row.key}, {fill}: expected a config that fits {on.name}, got {entry.config}")
    print("\n".join(wrong) or "all is well")
    return 1 if wrong else 0


def _cache_path(arguments) -> int:
    print(user_cache.current_cache().folder or "none: no home was found; set TRITONATTN_CACHE_DIR")
    return 0 if user_cache.current_cache().folder else 1


def _cache_ls(arguments) -> None:
    for path, record in user_cache.current_cache().records():
        state = "stale" if record.stale else "old kernels" if record.source != kernel_hash() else ""
        told = f"{record.config}  {record.seconds * 1e6:.0f} us  {state}".rstrip()
        print(f"{path.stem}  {record.gpu['name']}  {record.key}  {told}")


def _cache_show(arguments) -> None:
    found = [record for path, record in user_cache.current_cache().records() if path.name.startswith(arguments.name)]
    if len(found) != 1:
        raise ValueError(f"cache: expected the name of one record, got {arguments.name!r}, which {len(found)} have")
    print(json.dumps(found[0].as_json(), indent=1))


def _cache_verify(arguments) -> int:
    lines = user_cache.current_cache().verify()
    print("\n".join(lines) or "all is well")
    return 1 if lines else 0


def _cache_merge(arguments) -> None:
    taken, kept = user_cache.current_cache().merge(arguments.path)
    print(f"{taken} taken over, {kept} kept")


def _cache_export(arguments) -> None:
    user_cache.current_cache().export(arguments.path)
    print(f"wrote {arguments.path}")


def _cache_clear(arguments) -> None:
    print(f"{user_cache.current_cache().clear()} removed")
