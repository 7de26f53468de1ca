"""python -m perf.gpu --minutes 9 --out DIR: everything a short visit to a GPU should yield, in one call.

    truth      every test that needs a GPU, then all cases compiled, against float64
    baseline   what a large product and a copy reach, which backend torch picks, ours beside every rival on a short grid

Each step is a process of its own that ends in time; what it wrote until then is whole and can be used. Needs nothing
from the network. Exit codes: 0 all went well, 1 a test failed or a contender of ours is wrong, 2 wrong usage.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perf import cases, record
from perf.run import LOST, verdict

GRACE = 15          # seconds in which an interrupted step puts its things in order
LAST = 10           # seconds kept for the table at the end
TRUTH_SHARE = 0.45  # of the time, at most, where other steps follow


@dataclass
class Visit:
    """One call: where results go, until when, and what was found."""

    out: Path
    deadline: float
    suite: str
    commit: str | None
    seconds: float
    now: Callable[[], float] = time.perf_counter
    bad: bool = False

    def left(self) -> float:
        return self.deadline - LAST - self.now()

    def step(self, name: str, command: list[str], limit: float) -> int | None:
        """Run a command, its output to <out>/<name>.log; its exit code, None if it had too little time."""
        if limit < 2 * GRACE:
            (self.out / f"{name}.log").write_text(f"not begun: {limit:.0f} s were left\n")
            return None
        with (self.out / f"{name}.log").open("ab") as log:
            # a group of its own: an interrupt reaches the workers of a test run too
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                return process.wait(limit - GRACE)
            except subprocess.TimeoutExpired:
                _end(process)
                return None
            except KeyboardInterrupt:
                _end(process)
                raise


def _end(process) -> None:
    """Interrupt, and kill what does not end by itself."""
    for sent, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sent)
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def truth(visit: Visit, share: float = TRUTH_SHARE) -> list[str]:
    """The tests that need a GPU, then every case of test_attention compiled; compiling keeps many cores busy."""
    workers = str(max(1, min(12, (os.cpu_count() or 1) - 2)))
    pytest = [sys.executable, "-m", "pytest", "-n", workers, "--continue-on-collection-errors"]
    end, lines = visit.now() + share * visit.left(), []
    for name, arguments in (("truth-gpu", ["-m", "gpu"]), ("truth-cases", ["tests/test_attention.py"])):
        code = visit.step(name, [*pytest, *arguments], end - visit.now())
        visit.bad |= code not in (0, None)
        lines.append(f"{name}: {'time was up; ' if code is None else ''}{last_line(visit.out / f'{name}.log')}")
    return lines


def baseline(visit: Visit) -> list[str]:
    """Ceilings, then the suite; a device that is lost to one contender is taken up again without it."""
    file = visit.out / "ceilings.json"
    visit.bad |= visit.step("ceilings", [sys.executable, "-m", "perf.ceilings", "--out", str(file)], min(60, visit.left())) != 0
    lines = (visit.out / "ceilings.log").read_text().splitlines()[-2:]
    _bring_earlier(visit)
    code = LOST
    # lost to an exception, or to a signal: the journal knows which contender, or counts the deaths
    while code == LOST or (code is not None and code < 0):
        minutes = max(0.01, visit.left() - 2 * GRACE) / 60
        command = [sys.executable, "-m", "perf.run", "--suite", visit.suite, "--rivals", "all", "--device", "cuda", "--out",
                   str(visit.out), "--minutes", f"{minutes:.2f}", "--seconds", str(visit.seconds)]
        code = visit.step("baseline", command + (["--commit", visit.commit] if visit.commit else []), visit.left())
    visit.bad |= code not in (0, None)
    return lines + [line for run in record.load(visit.out) for line in compared(run.jobs)]


def _bring_earlier(visit: Visit) -> None:
    """Go on from what perf/results holds of the same plan: a digest stands for one."""
    for path in record.RESULTS.rglob(f"{visit.suite}-*.jsonl"):
        target = visit.out / path.relative_to(record.RESULTS)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def compared(jobs: list[record.Job]) -> list[str]:
    """A line for each job: ours beside the best rival."""
    return [f"{job.name:48} {verdict(job)}" for job in jobs]


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


STEPS = {"truth": truth, "baseline": baseline}


def main(argv: list[str] | None = None) -> int:
    """Do the steps that the command line asks for, and print a short table last."""
    start, top = time.perf_counter(), argparse.ArgumentParser("python -m perf.gpu", description=__doc__.split(": ", 1)[1],
                                                             formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--minutes", type=float, default=9.0, metavar="M", help="default: %(default)s")
    top.add_argument("--out", type=Path, required=True, metavar="DIR")
    top.add_argument("--only", choices=STEPS, help="one step instead of all")
    top.add_argument("--suite", choices=cases.SUITES, default="short", help="of the baseline (default: %(default)s)")
    top.add_argument("--seconds", type=float, default=0.1, help="of samples per contender and job (default: %(default)s)")
    top.add_argument("--commit", metavar="ID", help="to be recorded, where the tree came without its repository")
    arguments = top.parse_args(argv)
    if arguments.minutes * 60 <= GRACE + LAST:
        top.error(f"--minutes: expected more than {(GRACE + LAST) / 60:.1f}, got {arguments.minutes}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    visit = Visit(arguments.out, start + 60 * arguments.minutes, arguments.suite, arguments.commit, arguments.seconds)
    steps = {arguments.only: STEPS[arguments.only]} if arguments.only else STEPS
    lines = []
    for name, step in steps.items():
        alone = {"share": 1.0} if len(steps) == 1 and name == "truth" else {}
        lines += [f"== {name}", *step(visit, **alone)]
    (arguments.out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(visit.bad)


if __name__ == "__main__":
    sys.exit(main())
