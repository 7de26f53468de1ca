"""The README's tables of speed, written from what was recorded: python -m perf.readme_table

    ours / best rival (its name) = ratio          TFLOP/s of the pairs that see each other; above 1 ours is faster

They stand between two markers. What lies outside the markers is not touched; nothing is written if these are amiss.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tritonattn.measure.journal import JournalError

from . import results
from .results import OURS, Job, Result, Run

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- perf.readme_table: begin -->", "<!-- perf.readme_table: end -->"
SHOWN = (1024, 4096, 16384)  # lengths that stand for the grid in a table; the figures show all
DIRECTIONS = ("forward", "backward", "both")
DAGGER = "†"
NOTHING = "Nothing has been measured on a GPU yet, so there is no number here."


class TableError(ValueError):
    """A README in which the tables have no place."""


class Cell(NamedTuple):
    """Where a job lies in the grid of the FlashAttention papers."""

    d: int
    mask: str
    direction: str
    n: int


def place(job: Job) -> Cell | None:
    """A job's cell in the grid, whose batch x length is 16,384 and heads x head size 2048; None outside it."""
    problem = job.problem
    (batch,) = problem.batch if len(problem.batch) == 1 else (0,)
    square = problem.n_q == problem.n_k and problem.d == problem.dv and problem.heads == problem.kv_heads
    inside = square and batch * problem.n_q == 16384 and problem.heads * problem.d == 2048
    known = problem.mask in ("full", "causal") and job.direction in ("forward", "backward")
    return Cell(problem.d, problem.mask, job.direction, problem.n_q) if inside and known else None


def split(jobs: Iterable[Job]) -> tuple[dict[Cell, Job], dict[tuple[str, str], Job]]:
    """Jobs inside the grid by their cell, and the others by case and direction."""
    grid, others = {}, {}
    for job in jobs:
        if (cell := place(job)) and grid.get(cell, job).case == job.case:
            grid[cell] = job
        else:
            others[job.case, job.direction] = job
    return grid, others


def ratio(job: Job | None) -> float | None:
    """Our speed as a multiple of the best rival's; None where there is no comparison."""
    return None if lacking(job) else job.best_rival.seconds / job.ours.seconds


def lacking(job: Job | None) -> str | None:
    """Why there is no comparison; None where there is one."""
    if job is None:
        return "not measured"
    if job.ours is None:
        return f"ours: {job.results[OURS].status}" if OURS in job.results else "ours: not run"
    return None if job.best_rival else "no rival"


def decimals(value: float) -> str:
    """A ratio in two decimals; in three where two would make a tie of what is none."""
    return f"{value:.2f}" if abs(value - 1) >= 0.005 else f"{value:.3f}"


def length(n: int) -> str:
    """A length as people say it: 512, 1k, 16k."""
    return f"{n // 1024}k" if n and n % 1024 == 0 else str(n)


def dtypes(jobs: Iterable[Job]) -> str:
    """The dtypes of jobs, in words."""
    return ", ".join(sorted({str(job.problem.dtype).removeprefix("torch.") for job in jobs}))


def fact(run: Run, key: str) -> str:
    """What a run's environment says under a key, in one line: of a date the day, of a commit twelve digits."""
    text = " ".join(str(run.environment.get(key) or f"{key} not recorded").split())
    if key == "commit":
        return re.sub(r"\b([0-9a-f]{12})[0-9a-f]+", r"\1", text)
    return text[:10] if key == "date" and re.match(r"\d{4}-\d\d-\d\d", text) else text


def newest(runs: Iterable[Run]) -> list[Run]:
    """Of all runs of a suite on one model of GPU, in the same dtypes, the last to begin; Triton's interpreter is no GPU."""
    runs, chosen = [run for run in runs if run.jobs and run.environment.get("arch") != "interpreter"], {}
    for run in sorted(runs, key=lambda run: str(run.environment.get("date"))):
        chosen[fact(run, "gpu"), run.jobs[0].suite, dtypes(run.jobs)] = run
    return [chosen[key] for key in sorted(chosen)]


def block(runs: Iterable[Run]) -> str:
    """All that stands between the markers."""
    return "\n\n".join(section(run) for run in newest(runs)) or NOTHING


def section(run: Run) -> str:
    """One run: where its numbers come from, what they mean, and its tables."""
    grid, others = split(run.jobs)
    source = ", ".join((f"driver {fact(run, 'driver')}", f"torch {fact(run, 'torch')}", f"Triton {fact(run, 'triton')}",
                        fact(run, "date"), f"commit {fact(run, 'commit')}"))
    parts = [f"**{_escape(fact(run, 'gpu'))}**, {run.jobs[0].suite} suite, {dtypes(run.jobs)} ({_escape(source)}). "
             "In TFLOP/s: ours / best rival (its name) = ratio; above 1, in bold, ours is faster."]
    if grid:
        parts.append(_grid_table(grid))
    if others:
        parts.append(_case_table(others))
    if any(DAGGER in part for part in parts[1:]):
        parts.append(f"{DAGGER} The GPU held its clocks back while this was measured.")
    return "\n\n".join(parts)


def _grid_table(grid: dict[Cell, Job]) -> str:
    lengths = sorted({cell.n for cell in grid})
    lengths = [n for n in lengths if n in SHOWN] or lengths
    families = sorted({cell[:3] for cell in grid}, key=lambda key: (key[0], key[1] != "full", DIRECTIONS.index(key[2])))
    rows = [[*map(str, family), *(entry(grid.get(Cell(*family, n))) for n in lengths)] for family in families]
    return _markdown(["head size", "mask", "direction", *map(length, lengths)], rows)


def _case_table(jobs: dict[tuple[str, str], Job]) -> str:
    directions = [direction for direction in DIRECTIONS if any(key[1] == direction for key in jobs)]
    cases = dict.fromkeys(case for case, _ in jobs)
    return _markdown(["case", *directions],
                     [[case, *(entry(jobs.get((case, direction))) for direction in directions)] for case in cases])


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *(map(_escape, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    return text.replace("|", r"\|")


def entry(job: Job | None) -> str:
    """One job in a table; where ours is not ok, no number stands that could be taken for ours."""
    if job is None:
        return "-"
    if job.ours is None:
        return lacking(job)
    if job.best_rival is None:
        return f"{speed(job.ours, job)} ({lacking(job)})"
    bold = "**" * (ratio(job) > 1)
    return (f"{speed(job.ours, job)} / {speed(job.best_rival, job)} ({job.best_rival.contender}) = "
            f"{bold}{decimals(ratio(job))}{bold}")


def speed(result: Result, job: Job) -> str:
    """TFLOP/s in three digits, with a dagger if the device was throttled."""
    tflops = result.tflops(job)
    return (f"{tflops:.0f}" if tflops >= 100 else f"{tflops:.3g}") + DAGGER * result.throttled


def spliced(text: str, content: str, name: str = "README") -> str:
    """A text with this content between its markers. Raises TableError unless each stands there once, in order."""
    for marker in (BEGIN, END):
        if (count := text.count(marker)) != 1:
            raise TableError(f"{name}: expected the marker {marker} once, got it {count} times")
    begin, end = text.index(BEGIN), text.index(END)
    if end < begin:
        lines = [text.count("\n", 0, at) + 1 for at in (begin, end)]
        raise TableError(f"{name}: expected {BEGIN} before {END}, got them on lines {lines[0]} and {lines[1]}")
    return f"{text[:begin + len(BEGIN)]}\n{content}\n{text[end:]}"


def write(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a kill, finds the old text or the new one."""
    path = path.resolve()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(handle, "wb") as file:
            file.write(text.encode())
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main(argv: list[str] | None = None) -> int:
    """Write the tables, or with --check compare; 0 all is well, 1 the README differs, 2 wrong input."""
    parser = argparse.ArgumentParser("python -m perf.readme_table", description="Write the README's tables of speed.",
                                     epilog="exit code: 0 all is well, 1 the README differs (--check), 2 wrong input")
    parser.add_argument("--results", type=Path, default=results.RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the README is in step")
    arguments = parser.parse_args(argv)
    try:
        # bytes, so that line ends stay as they are
        held = arguments.readme.read_bytes().decode()
        wanted = spliced(held, block(results.load(arguments.results)), arguments.readme.name)
        if arguments.check:
            return _compare(held, wanted, arguments.readme.name)
        if wanted != held:
            write(arguments.readme, wanted)
    except (TableError, JournalError, OSError, UnicodeDecodeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.readme.name}: {'in step already' if wanted == held else 'written'}")
    return 0


def _compare(held: str, wanted: str, name: str) -> int:
    if held != wanted:
        print(f"{name}: expected what `python -m perf.readme_table` writes, got something else; run it", file=sys.stderr)
    return int(held != wanted)


if __name__ == "__main__":
    sys.exit(main())
