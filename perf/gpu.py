"""Test, benchmark and tune on a GPU within a time limit: python -m perf.gpu --minutes 9 --out DIR

    tests       tests of timing (alone on the GPU), all other tests that need a GPU, then all attention cases compiled
    benchmark   peak rates of this GPU, then tritonattn and its baselines on a suite
    tuning      sweeps of all kernels at head sizes 128, 64 and 256, full and causal

Each step is a process with a time limit; its output is appended to DIR/<step>.log, and its last line printed. Run the same
command again to continue: benchmarks and sweeps resume from their journals in DIR. Further options are those of perf.run,
with other defaults: --suite short --baselines torch,cudnn,flash --seconds 0.1.

Needs no network. Exit codes: 0 success; 1 a test failed or tritonattn is wrong; 2 wrong usage; 130 after Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tritonattn.autotune import trials

from . import cases, run
from .run import DEVICE_LOST

GRACE = 15          # seconds between the interrupt and the kill of a step that exceeds its limit
STAGES = ("tests", "benchmark", "tuning")
TESTS_SHARE = 0.45  # share of the time for the tests if other stages follow
BENCHMARK_DEFAULTS = ["--suite", "short", "--baselines", "torch,cudnn,flash", "--seconds", "0.1"]


@dataclass
class Session:
    """One run of the command: the folder of its output, the deadline, and whether a step has failed."""

    out: Path
    deadline: float
    failed: bool = False

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def minutes(self) -> str:
        """Return the minutes for a step that stops by itself, before its limit."""
        return f"{max(1.0, self.left() - 2 * GRACE) / 60:.2f}"

    def step(self, name: str, arguments: list[str], limit: float) -> tuple[int | None, str]:
        """Run `python -m ARGUMENTS` for at most `limit` seconds: interrupt it when they have passed, then kill it.

        Return the exit code, or None if it was skipped or exceeded its limit, and the output.
        """
        if limit < 2 * GRACE:
            print(f"{name}: skipped, {max(limit, 0):.0f} s are left", flush=True)
            return None, ""
        path = self.out / f"{name}.log"
        with path.open("ab") as log:
            start = log.tell()
            code = run_process([sys.executable, "-m", *arguments], limit - GRACE, log)
        output = path.read_bytes()[start:].decode(errors="replace")
        outcome = "time limit reached; " if code is None else f"exit code {code}; " if code else ""
        print(f"{name}: {outcome}{(output.strip().splitlines() or ['no output'])[-1]}", flush=True)
        return code, output


def run_process(command: list[str], seconds: float, log) -> int | None:
    """Run a command, its output to a file. Return its exit code, or None if it was interrupted after so many seconds."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        if isinstance(error, KeyboardInterrupt):
            raise
        return None
    finally:
        # workers may be left of a step whose first process has ended, and would disturb the next
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tests(session: Session, seconds: float) -> None:
    """Run the tests for at most so many seconds."""
    end = time.monotonic() + seconds
    workers = str(max(1, min(12, (os.cpu_count() or 1) - 2)))
    for name, count, arguments in [("alone", "0", ["-m", "gpu and alone"]), ("gpu", workers, ["-m", "gpu and not alone"]),
                                   ("cases", workers, ["-m", "not gpu and not alone", "tests/test_attention.py"])]:
        command = ["pytest", "-n", count, "--continue-on-collection-errors", *arguments]
        code, output = session.step(f"tests-{name}", command, end - time.monotonic())
        summary = "\n".join(output.splitlines()[-3:])
        session.failed |= bool(code) or re.search(r"\b[1-9]\d* (failed|errors?)\b", summary) is not None


def benchmark(session: Session, options: list[str]) -> None:
    """Measure peak rates, then the suite. A lost device is a reason to continue without the implementation that lost it."""
    code, _ = session.step("peaks", ["perf.peaks", "--out", str(session.out / "peaks.json")], min(60 + GRACE, session.left()))
    session.failed |= bool(code)
    lost = True
    while lost:
        command = ["perf.run", "--out", str(session.out), "--minutes", session.minutes(), *options]
        code, _ = session.step("benchmark", command, session.left())
        lost = code is not None and (code == DEVICE_LOST or code < 0)
    session.failed |= bool(code)


def tuning(session: Session) -> None:
    """Sweep each head size, full and causal, one after the other while time is left."""
    for d, heads in ((128, 32), (64, 32), (256, 16)):
        for mask in cases.MASKS:
            folder = session.out / f"sweep-{d}-{mask}"
            shape = ["--shape", f"4x{heads}x{heads}x4096x{d}", *(["--causal"] if mask == "causal" else [])]
            command = ["tritonattn", "sweep", str(folder), "--minutes", session.minutes()]
            code, _ = session.step(folder.name, command + ([] if (folder / trials.PLAN).exists() else shape), session.left())
            session.failed |= bool(code)


def main(argv: list[str] | None = None) -> int:
    """Run the stages in order, print a line for each step and return the exit code."""
    top = argparse.ArgumentParser("python -m perf.gpu", description=__doc__.split("\n\n", 1)[1], allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--out", type=Path, required=True, metavar="DIR")
    top.add_argument("--minutes", type=run.positive, default=9.0, metavar="M", help="default: %(default)s")
    top.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    arguments, further = top.parse_known_args(argv)
    options = BENCHMARK_DEFAULTS + further
    run.parser().parse_args(options)  # exits if an option is wrong
    if not torch.cuda.is_available():
        top.error("perf.gpu needs a GPU, and torch detects none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    session = Session(arguments.out, time.monotonic() + 60 * arguments.minutes)
    try:
        with run.interruptible():
            if "tests" in arguments.stages:
                tests(session, session.left() * (1 if arguments.stages == ["tests"] else TESTS_SHARE))
            if "benchmark" in arguments.stages:
                benchmark(session, options)
            if "tuning" in arguments.stages:
                tuning(session)
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue")
        return 130
    return int(session.failed)


if __name__ == "__main__":
    sys.exit(main())
