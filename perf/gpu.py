"""python -m perf.gpu --minutes 9 --out DIR: what a short visit to a GPU should yield; `--only tuning` is a visit of its own.

    truth      every test that needs a GPU, then all cases compiled, against float64; tests of timing last, alone
    baseline   what a large product and a copy reach, which backend torch picks, ours beside every rival on a short grid
    tuning     sweeps of forward, dQ, dK and dV at head sizes 64, 128 and 256, full and causal; asked for by its name alone

Each step is a process of its own that ends in time; what it wrote until then is whole and can be used. Their output is in
<out>/<name>.log; what came of it is added to <out>/summary.txt line by line, and printed at the end. Needs nothing from the
network. Exit codes: 0 all went well, 1 a test failed or a contender of ours is wrong, 2 wrong usage, 130 after Ctrl-C or a
request to end.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tritonattn.autotune import trials
from tritonattn.measure.journal import JournalError

from . import cases
from . import results as record
from .run import LOST, ended_in_order, ours_is_bad, verdict

GRACE = 15          # seconds in which an interrupted step puts its things in order
LAST = 10           # seconds kept for the table at the end
TRUTH_SHARE = 0.45  # of the time, at most, where other steps follow


class Ended(NamedTuple):
    """How a step ended: its exit code (None if it had to be killed, or was not begun), whether by itself, and its output."""

    code: int | None
    in_time: bool
    output: str

    @property
    def lost(self) -> bool:
        """Whether the device was lost, to an exception or to a signal."""
        return self.in_time and (self.code == LOST or self.code < 0)

    @property
    def bad(self) -> bool:
        """Whether it ended by itself, and not well."""
        return self.in_time and self.code != 0

    @property
    def failures(self) -> bool:
        """Whether the last words of a test run count any, also of one that was interrupted."""
        return any(re.search(r"\b[1-9]\d* (failed|errors?)\b", line) for line in self.output.splitlines()[-3:])

    @property
    def last_line(self) -> str:
        lines = self.output.strip().splitlines()
        return lines[-1] if lines else "no output"


@dataclass
class Visit:
    """One call: where results go, until when, and what was found."""

    out: Path
    deadline: float
    suite: str
    commit: str | None
    seconds: float
    truth_share: float = TRUTH_SHARE
    now: Callable[[], float] = time.perf_counter
    bad: bool = False
    stopped: bool = False  # by the user: what is not begun is not begun any more
    lines: list[str] = field(default_factory=list)

    def left(self) -> float:
        return self.deadline - LAST - self.now()

    def say(self, *lines: str) -> None:
        """Keep lines for the table at the end, and for whoever ends this visit before it."""
        self.lines += lines
        with (self.out / "summary.txt").open("a") as file:
            file.writelines(f"{line}\n" for line in lines)

    def step(self, name: str, command: list[str], limit: float) -> Ended:
        """Run a command, its output added to <out>/<name>.log, until `limit` seconds have passed."""
        path = self.out / f"{name}.log"
        with path.open("ab") as log:
            start = log.tell()
            if self.stopped or limit < 2 * GRACE:
                why = "the visit was stopped" if self.stopped else f"{limit:.0f} s were left"
                log.write(f"not begun: {why}\n".encode())
                ended = None, False
            else:
                ended = self._run(command, limit - GRACE, log)
        return Ended(*ended, path.read_bytes()[start:].decode(errors="replace"))

    def _run(self, command, patience, log) -> tuple[int | None, bool]:
        # a group of its own: an interrupt reaches the workers of a test run too
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                   preexec_fn=_hears_interrupts)
        try:
            return process.wait(patience), True
        except subprocess.TimeoutExpired:
            return _interrupt(process), False
        except KeyboardInterrupt:
            self.stopped = True
            return _interrupt(process), False
        finally:
            # workers may be left of a leader that has gone
            _signal(process, signal.SIGKILL)
            process.wait()


def _hears_interrupts() -> None:
    """In a child: what was begun in the background, by nohup say, ignores interrupts, and would hand that down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(process) -> int | None:
    """Ask a process to end, and its exit code if it does."""
    _signal(process, signal.SIGINT)
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        return None


def _signal(process, sent) -> None:
    # a group that has gone needs no signal
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sent)


def truth(visit: Visit) -> None:
    """The tests that need a GPU, every case of test_attention compiled, the tests of timing; compiling keeps cores busy."""
    workers = str(max(1, min(12, (os.cpu_count() or 1) - 2)))
    steps = (("truth-gpu", workers, ["-m", "gpu and not alone"]), ("truth-cases", workers, ["tests/test_attention.py"]),
             ("truth-alone", "0", ["-m", "gpu and alone"]))
    end = visit.now() + visit.truth_share * visit.left()
    for name, count, arguments in steps:
        command = [sys.executable, "-m", "pytest", "-n", count, "--continue-on-collection-errors", *arguments]
        ended = visit.step(name, command, end - visit.now())
        visit.bad |= ended.bad or ended.failures
        visit.say(f"{name}: {'' if ended.in_time else 'time was up; '}{ended.last_line}")


def baseline(visit: Visit) -> None:
    """Ceilings, then the suite; a device that is lost to one contender is taken up again without it."""
    file = visit.out / "ceilings.json"
    ended = visit.step("ceilings", [sys.executable, "-m", "perf.peaks", "--out", str(file)], min(60, visit.left()))
    visit.bad |= ended.bad
    visit.say(*ended.output.splitlines()[-2:])
    results, lost = None, True
    # the journal knows which contender lost the device, or counts the deaths
    while lost:
        minutes = max(0.01, visit.left() - 2 * GRACE) / 60
        command = [sys.executable, "-m", "perf.run", "--suite", visit.suite, "--rivals", "all", "--device", "cuda", "--out",
                   str(visit.out), "--resume-from", str(record.RESULTS), "--minutes", f"{minutes:.2f}",
                   "--seconds", str(visit.seconds), *(["--commit", visit.commit] if visit.commit else [])]
        ended = visit.step("baseline", command, visit.left())
        results, lost = results_in(ended.output) or results, ended.lost
    visit.bad |= ended.bad
    if results:
        report(visit, results)
    else:
        visit.say(f"baseline: {ended.last_line}")


def tuning(visit: Visit) -> None:
    """A sweep for each head size, full and causal, as far as the time goes; one that is not done goes on in the next visit."""
    asked = [(size, heads, mask) for size, heads in ((128, 32), (64, 32), (256, 16)) for mask in ("full", "causal")]
    for size, heads, mask in asked:
        folder = visit.out / f"sweep-{size}-{mask}"
        begun = (folder / trials.PLAN).exists()
        named = [] if begun else ["--shape", f"4x{heads}x{heads}x4096x{size}", *(["--causal"] if mask == "causal" else [])]
        # one after the other: compiling alone takes minutes, and a plan that is not done is not written
        limit = visit.left()
        minutes = max(0.01, limit - 2 * GRACE) / 60
        command = [sys.executable, "-m", "tritonattn", "sweep", str(folder), *named, "--minutes", f"{minutes:.2f}"]
        ended = visit.step("tuning", command, limit)
        visit.bad |= ended.bad
        visit.say(f"sweep of {size} {mask}: {'' if ended.in_time else 'time was up; '}{ended.last_line}")


def results_in(output: str) -> Path | None:
    """The file that perf.run says it writes to: an earlier visit's, or another plan's, may lie beside it."""
    found = re.findall(r"^results: (.+)$", output, re.MULTILINE)
    return Path(found[-1]) if found else None


def report(visit: Visit, results: Path) -> None:
    """A line for each job: ours beside the best rival."""
    try:
        jobs = record.read(results).jobs
    except (JournalError, OSError) as error:
        visit.say(f"no results: {error}")
        return
    visit.bad |= any(map(ours_is_bad, jobs))
    visit.say(*(f"{job.name:48} {verdict(job)}" for job in jobs))


STEPS = {"truth": truth, "baseline": baseline}
ALONE = {"tuning": tuning}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m perf.gpu", description=__doc__.split(": ", 1)[1],
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--minutes", type=float, default=9.0, metavar="M", help="default: %(default)s")
    top.add_argument("--out", type=Path, required=True, metavar="DIR")
    top.add_argument("--only", choices=STEPS | ALONE, help="one step instead of truth and baseline")
    top.add_argument("--suite", choices=cases.SUITES, default="short", help="of the baseline (default: %(default)s)")
    top.add_argument("--seconds", type=float, default=0.1, help="of samples per contender and job (default: %(default)s)")
    top.add_argument("--commit", metavar="ID", help="to be recorded, where the tree came without its repository")
    return top


def main(argv: list[str] | None = None) -> int:
    """Do the steps that the command line asks for, and print a short table last."""
    start, top = time.perf_counter(), parser()
    arguments = top.parse_args(argv)
    if arguments.minutes * 60 <= GRACE + LAST:
        top.error(f"--minutes: expected more than {(GRACE + LAST) / 60:.1f}, got {arguments.minutes}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    visit = Visit(arguments.out, start + 60 * arguments.minutes, arguments.suite, arguments.commit, arguments.seconds,
                  1.0 if arguments.only else TRUTH_SHARE)
    try:
        with ended_in_order():
            for name in [arguments.only] if arguments.only else STEPS:
                visit.say(f"== {name}")
                (STEPS | ALONE)[name](visit)
    except KeyboardInterrupt:
        visit.stopped = True
    finally:
        print("\n".join(visit.lines))
    return 130 if visit.stopped else int(visit.bad)


if __name__ == "__main__":
    sys.exit(main())
