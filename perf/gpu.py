"""Test, benchmark and tune on a GPU within a time limit: python -m perf.gpu --minutes 9 --out DIR

    tests       tests of timing (alone on the GPU); the others that need a GPU, those in float32 last, since they compile
                longest; then all attention cases compiled
    peaks       rates of a large matrix product and a large copy, and the backends torch's SDPA selects
    benchmark   tritonattn and its baselines on a suite
    tuning      sweeps of all kernels at head sizes 128, 64 and 256, full and causal

Each step is a process with a share of the time that is left; its output is appended to DIR/<step>.log, and its last line
printed. Run the same command again to continue: benchmarks and sweeps resume from their journals in DIR. Further options are
those of perf.run, with other defaults: --suite short --baselines torch,cudnn,flash --seconds 0.1.

On a machine without a GPU, --precompile h200 compiles kernels of the tests, the benchmark and the tuning for that GPU, and
packs them into DIR/kernels.tar.xz, after an interruption too. If that file is there, the steps start with these kernels; the
first line says whether Triton finds them.

Needs no network. Exit codes: 0 success; 1 a step or a compilation failed, or exceeded its limit; 2 wrong usage; 130 after
Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tritonattn import Problem
from tritonattn.autotune import trials
from tritonattn.gpu import Gpu, named

from . import cases, precompile, run
from .run import DEVICE_LOST

GRACE = 15  # seconds between the interrupt and the kill of a step that exceeds its limit
PROBE_SECONDS = 60  # limit of looking for a precompiled kernel
STAGES = ("tests", "peaks", "benchmark", "tuning")
SHAPES = ("4x32x32x4096x128", "4x32x32x4096x64", "4x16x16x4096x256")  # of the sweeps, each full and causal
# the tests in these files that call cases.check in a dtype that GPUs run, with the marks of all steps but tests-alone
COMPILED_TESTS = ("-p", "perf.null_driver.compile_tests", "tests/gpu/test_gpu.py", "tests/test_attention.py",
                  "-m", "not alone", "-k", "test_accuracy or test_every_shipped_config or test_low_precision")
BENCHMARK_DEFAULTS = ["--suite", "short", "--baselines", "torch,cudnn,flash", "--seconds", "0.1"]


def steps(out: Path, benchmark: list[str]) -> Iterator[tuple[str, str, float, list[str]]]:
    """Yield the stage, the name, the share of the time that is left, and the arguments of `python -m` of each step."""
    workers = str(max(1, min(12, (os.cpu_count() or 1) - 2)))
    others = ["gpu and not alone", "-k"]
    for name, share, count, marks in (("alone", 0.15, "0", ["gpu and alone"]), ("gpu", 0.3, workers, [*others, "not float32"]),
                                      ("float32", 0.2, workers, [*others, "float32"]),
                                      ("cases", 0.2, workers, ["not gpu and not alone", "tests/test_attention.py"])):
        yield "tests", f"tests-{name}", share, ["pytest", "-n", count, "--continue-on-collection-errors", "-m", *marks]
    yield "peaks", "peaks", 0.2, ["perf.peaks", "--out", str(out / "peaks.json")]
    yield "benchmark", "benchmark", 1.0, ["perf.run", "--out", str(out), *benchmark]
    for shape in SHAPES:
        for mask in cases.MASKS:
            folder = out / f"sweep-{shape.rpartition('x')[2]}-{mask}"
            shape_options = ["--shape", shape, *(["--causal"] if mask == "causal" else [])]
            yield "tuning", folder.name, 1.0, ["tritonattn", "sweep", str(folder),
                                               *([] if (folder / trials.JOURNAL).exists() else shape_options)]


def run_step(path: Path, arguments: list[str], seconds: float) -> int | None:
    """Run `python -m ARGUMENTS`, append its output to a file and print the last line.

    Return the exit code; None if it was interrupted after so many seconds.
    """
    with path.open("ab") as log:
        # a shell starts background jobs with SIGINT ignored, which a step would inherit
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        try:
            code = process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            code = None
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            # workers may be left of a step whose first process has ended, and would disturb the next
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome = "time limit reached; " if code is None else f"exit code {code}; " if code else ""
    print(f"{path.stem}: {outcome}{(path.read_text(errors='replace').strip().splitlines() or ['no output'])[-1]}", flush=True)
    return code


def run_stages(out: Path, stages: list[str], benchmark: list[str], deadline: float) -> bool:
    """Run the steps of these stages while time is left. Return whether all of them succeeded."""
    success = True
    for stage, name, share, arguments in steps(out, benchmark):
        again = stage in stages
        while again:
            limit = share * (deadline - time.monotonic()) - GRACE
            if limit < GRACE:
                print(f"{name}: skipped, {max(limit, 0):.0f} s are left for it", flush=True)
                break
            # these end by themselves in time
            minutes = [] if stage in ("tests", "peaks") else ["--minutes", f"{max(1.0, limit - GRACE) / 60:.2f}"]
            code = run_step(out / f"{name}.log", arguments + minutes, limit)
            # continue without the implementation that lost the device
            again = stage == "benchmark" and code is not None and (code == DEVICE_LOST or code < 0)
            success &= again or code == 0
    return success


def make_archive(out: Path, tests: bool, todo: list[tuple], on: Gpu, deadline: float) -> bool:
    """Compile for a GPU until the deadline, pack what is compiled, and return whether that is all.

    The tests' kernels come first, with the null driver, which imitates an H200, and take at most half of the time.
    """
    folder = (out / precompile.FOLDER).resolve()
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    complete, done = False, []
    try:
        precompile.probe_entry(on)
        complete = not tests or 0 == run_step(
            out / "precompile-tests.log", ["pytest", "-n", str(os.cpu_count() or 1), *COMPILED_TESTS],
            (deadline - time.monotonic()) / (2 if todo else 1))
        # one by one: an interrupt leaves those that are done
        for failure in precompile.compile_all(todo, deadline):
            done.append(failure)
    finally:
        packed, left_out = precompile.pack(folder, out / precompile.ARCHIVE)
        print(f"{out / precompile.ARCHIVE}: {len(done)} of {len(todo)} jobs done, {len(done) - done.count(None)} failed; "
              f"{packed} binaries packed, {left_out} left out for the limit of {precompile.LIMIT >> 20} MiB", flush=True)
    # a candidate of a sweep may fail, a kernel of the benchmark may not
    errors = [(job, failure) for job, failure in zip(todo, done) if failure and job[2] is None]
    for (kernel, problem, *_), failure in errors:
        print(f"{kernel} of {problem}: {failure.code}: {failure.message}", flush=True)
    return complete and len(done) == len(todo) and not left_out and not errors


def jobs_of(stages: list[str], options: argparse.Namespace, on: Gpu) -> list[tuple]:
    """Return what to compile for the benchmark with these options of perf.run, and for the tuning."""
    suite = cases.suite(options.suite, run.DTYPES.get(options.dtype)) if "benchmark" in stages else ()
    sweeps = [Problem.parse(shape, torch.bfloat16, mask == "causal") for shape in SHAPES for mask in cases.MASKS]
    return list(precompile.jobs(suite, sweeps if "tuning" in stages else [], on))


def use_archive(out: Path) -> None:
    """Let the steps start with the kernels of DIR/kernels.tar.xz, and print whether Triton finds them on this GPU."""
    folder = (out / precompile.FOLDER).resolve()
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    try:
        entries = precompile.unpack(out / precompile.ARCHIVE, folder)
        # in a process of its own: a CUDA context in this one would stay for the whole session
        probe = subprocess.run([sys.executable, "-m", "perf.precompile"], stdout=subprocess.PIPE, text=True, check=True,
                               timeout=PROBE_SECONDS)
    except (*precompile.UNREADABLE, subprocess.SubprocessError) as error:
        print(f"precompiled binaries: miss: {out / precompile.ARCHIVE}: {type(error).__name__}: {error}", flush=True)
    else:
        known = probe.stdout.strip() in entries
        result = "hit" if known else "miss: made by another Python, Triton or source, or for another GPU"
        print(f"{len(entries)} precompiled binaries: {result}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the stages in order, print a line for each step and return the exit code."""
    top = argparse.ArgumentParser("python -m perf.gpu", description=__doc__.split("\n\n", 1)[1], allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--out", type=Path, required=True, metavar="DIR")
    top.add_argument("--minutes", type=run.positive, default=9.0, metavar="M", help="default: %(default)s")
    top.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    top.add_argument("--precompile", type=named, metavar="GPU", help="compile for this GPU, and run nothing")
    arguments, further = top.parse_known_args(argv)
    benchmark = BENCHMARK_DEFAULTS + further
    options = run.parser().parse_args(benchmark)  # exits if an option is wrong
    deadline = time.monotonic() + 60 * arguments.minutes
    on, stages, out = arguments.precompile, arguments.stages, arguments.out
    if on and "tests" in stages and on.arch != "sm_90":
        top.error(f"--precompile {on.name}: tests can be compiled for sm_90 alone, not for {on.arch}; name the other stages "
                  "with --stages")
    if not on and not torch.cuda.is_available():
        top.error("perf.gpu needs a GPU, and torch detects none")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with run.interruptible():
            if on:
                return 0 if make_archive(out, "tests" in stages, jobs_of(stages, options, on), on, deadline) else 1
            if (out / precompile.ARCHIVE).exists():
                use_archive(out)
            return 0 if run_stages(out, stages, benchmark, deadline) else 1
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue")
        return 130


if __name__ == "__main__":
    sys.exit(main())
