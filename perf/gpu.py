"""Test, benchmark and tune on a GPU within a time limit: python -m perf.gpu --minutes 9 --out DIR

    truth      tests of timing (alone on the GPU), all other tests that need a GPU, then all attention cases compiled
    baseline   peak rates of this GPU, then tritonattn and its baselines on a suite
    tuning     sweeps of all kernels at head sizes 128, 64 and 256, full and causal

Each step is a process with a time limit; its output is appended to DIR/<step>.log, its outcome to DIR/summary.txt. Run the
same command again to continue: benchmarks and sweeps resume from their journals, and benchmarks also from perf/results.
Needs no network. Exit codes: 0 success; 1 a test failed or tritonattn is wrong; 2 wrong usage; 130 after Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tritonattn.autotune import trials

from . import cases, results
from .run import DEVICE_LOST, has_failure, interruptible, verdict

GRACE = 15          # seconds between the interrupt and the kill of a step that exceeds its limit
TRUTH_SHARE = 0.45  # share of the time for the tests if other stages follow
STAGES = ("truth", "baseline", "tuning")


class Ended(NamedTuple):
    """The exit code of a step, or None if it was skipped or exceeded its limit; and its output."""

    code: int | None
    output: str


@dataclass
class Visit:
    """One run of the command: the options, the deadline, and whether a step has failed."""

    options: argparse.Namespace
    deadline: float
    failed: bool = False

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, line: str) -> None:
        """Print a line and append it to the summary."""
        print(line, flush=True)
        with (self.options.out / "summary.txt").open("a") as file:
            print(line, file=file)

    def step(self, name: str, arguments: list[str], limit: float, **environment: str) -> Ended:
        """Run `python -m ARGUMENTS` for at most `limit` seconds: interrupt it when they have passed, then kill it."""
        if limit < 2 * GRACE:
            self.say(f"{name}: skipped, {max(limit, 0):.0f} s are left")
            return Ended(None, "")
        command = ["timeout", "--signal=INT", f"--kill-after={GRACE}", f"{limit - GRACE}", sys.executable, "-m", *arguments]
        path, end = self.options.out / f"{name}.log", time.monotonic() + limit - GRACE
        with path.open("ab") as log:
            start = log.tell()
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment,
                                       start_new_session=True)
            try:
                code = process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)  # `timeout` forwards it, and kills the step after the grace period
                process.wait()
                raise
            finally:
                # workers may be left of a step whose first process has ended, and would disturb the next
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        late = time.monotonic() >= end
        output = path.read_bytes()[start:].decode(errors="replace")
        last_line = (output.strip().splitlines() or ["no output"])[-1]
        self.say(f"{name}: {'time limit reached; ' if late else f'exit code {code}; ' if code else ''}{last_line}")
        return Ended(None if late else code, output)


def truth(visit: Visit) -> None:
    """Run the tests, and again with another ptxas if one is given."""
    end = visit.deadline - (1 - TRUTH_SHARE) * visit.left() * (visit.options.stages != ["truth"])
    workers = str(max(1, min(12, (os.cpu_count() or 1) - 2)))
    tests = [("truth-alone", "0", ["-m", "gpu and alone"]), ("truth-gpu", workers, ["-m", "gpu and not alone"]),
             ("truth-cases", workers, ["-m", "not gpu and not alone", "tests/test_attention.py"])]
    runs = [(*test, {}) for test in tests]
    if visit.options.ptxas:
        runs.insert(2, ("truth-gpu-ptxas", *tests[1][1:], {"TRITON_PTXAS_PATH": visit.options.ptxas}))
    for name, count, arguments, environment in runs:
        command = ["pytest", "-n", count, "--continue-on-collection-errors", *arguments]
        ended = visit.step(name, command, end - time.monotonic(), **environment)
        summary = "\n".join(ended.output.splitlines()[-3:])
        visit.failed |= bool(ended.code) or re.search(r"\b[1-9]\d* (failed|errors?)\b", summary) is not None


def baseline(visit: Visit) -> None:
    """Measure peak rates, then the suite. A lost device is a reason to continue without the implementation that lost it."""
    options = visit.options
    ended = visit.step("peaks", ["perf.peaks", "--out", str(options.out / "peaks.json")], min(60 + GRACE, visit.left()))
    visit.failed |= bool(ended.code)
    for path in results.RESULTS.rglob("*.jsonl"):
        target = options.out / path.relative_to(results.RESULTS)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    files, lost = [], True
    while lost:
        minutes = max(1.0, visit.left() - 2 * GRACE) / 60
        ended = visit.step("baseline", ["perf.run", "--suite", options.suite, "--baselines", options.baselines, "--device",
                                        "cuda", "--out", str(options.out), "--minutes", f"{minutes:.2f}", "--seconds",
                                        str(options.seconds), *(["--commit", options.commit] if options.commit else [])],
                           visit.left())
        files += re.findall(r"^results: (.+)$", ended.output, re.MULTILINE)
        lost = ended.code is not None and (ended.code == DEVICE_LOST or ended.code < 0)
    visit.failed |= bool(ended.code)
    if files and Path(files[-1]).exists():
        for job in results.read(Path(files[-1])).jobs:
            visit.failed |= has_failure(job)
            visit.say(f"{job.name:48} {verdict(job)}")


def tuning(visit: Visit) -> None:
    """Sweep each head size, full and causal, one after the other while time is left."""
    for d, heads in ((128, 32), (64, 32), (256, 16)):
        for mask in cases.MASKS:
            folder = visit.options.out / f"sweep-{d}-{mask}"
            shape = ["--shape", f"4x{heads}x{heads}x4096x{d}", *(["--causal"] if mask == "causal" else [])]
            minutes = max(1.0, visit.left() - 2 * GRACE) / 60
            ended = visit.step(folder.name, ["tritonattn", "sweep", str(folder), "--minutes", f"{minutes:.2f}",
                                             *([] if (folder / trials.PLAN).exists() else shape)], visit.left())
            visit.failed |= bool(ended.code)


def _stages(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(STAGES):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}; known are {', '.join(STAGES)}")
    return names


def main(argv: list[str] | None = None) -> int:
    """Run the stages in order, print the summary and return the exit code."""
    top = argparse.ArgumentParser("python -m perf.gpu", description=__doc__.split("\n\n", 1)[1],
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--out", type=Path, required=True, metavar="DIR")
    top.add_argument("--minutes", type=float, default=9.0, metavar="M", help="default: %(default)s")
    top.add_argument("--stages", type=_stages, default=list(STAGES), metavar="NAMES", help=f"default: {','.join(STAGES)}")
    top.add_argument("--suite", choices=cases.SUITES, default="short", help="of the benchmark (default: %(default)s)")
    top.add_argument("--baselines", default="torch,cudnn,flash", metavar="NAMES", help="default: %(default)s")
    top.add_argument("--seconds", type=float, default=0.1, help="samples per implementation and job (default: %(default)s)")
    top.add_argument("--commit", metavar="ID", help="commit to record, for a source tree without its repository")
    top.add_argument("--ptxas", metavar="FILE", help="repeat the tests with this ptxas (see perf/README.md)")
    options = top.parse_args(argv)
    if not torch.cuda.is_available():
        top.error("perf.gpu needs a GPU, and torch detects none")
    options.out.mkdir(parents=True, exist_ok=True)
    visit = Visit(options, time.monotonic() + 60 * options.minutes)
    try:
        with interruptible():
            for stage in options.stages:
                visit.say(f"== {stage}")
                {"truth": truth, "baseline": baseline, "tuning": tuning}[stage](visit)
    except KeyboardInterrupt:
        visit.say("interrupted; run the same command to continue")
        return 130
    return int(visit.failed)


if __name__ == "__main__":
    sys.exit(main())
