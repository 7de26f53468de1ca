"""Write the speed tables of README.md from perf/results: python -m perf.readme_table

    ours / best baseline (its name) = ratio     in TFLOP/s of unmasked pairs; a ratio above 1, in bold: ours is faster

The tables stand between two markers. The text outside the markers is kept.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tritonattn.measure.journal import JournalError

from . import cases, results
from .results import OURS, Job, Result, Run

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- perf.readme_table: begin -->", "<!-- perf.readme_table: end -->"
SHOWN = (1024, 4096, 16384)  # lengths of the papers' grid that the table shows; the figure shows all
NOTHING = "Nothing has been measured on a GPU yet, so there is no number here."


def dtypes(run: Run) -> str:
    """Return the dtypes of a run's jobs, separated by commas."""
    return ", ".join(sorted({str(job.problem.dtype).removeprefix("torch.") for job in run.jobs}))


def provenance(run: Run) -> str:
    """Return the versions, the date and the commit of a run, separated by commas."""
    def fact(key):
        return str(run.environment.get(key) or "not recorded")

    return (f"driver {fact('driver')}, torch {fact('torch')}, Triton {fact('triton')}, {fact('date')[:10]}, "
            f"commit {fact('commit')}")


def newest(runs: Iterable[Run]) -> list[Run]:
    """Return the last run of each GPU, suite and dtype. Runs in Triton's interpreter are left out."""
    runs = [run for run in runs if run.jobs and run.environment.get("arch") != "interpreter"]
    runs.sort(key=lambda run: str(run.environment.get("date")))
    last = {(str(run.environment.get("gpu")), run.jobs[0].suite, dtypes(run)): run for run in runs}
    return [last[key] for key in sorted(last)]


def section(run: Run) -> str:
    """Return the heading and the tables of one run."""
    parts = [f"**{run.environment.get('gpu')}**, {run.jobs[0].suite} suite, {dtypes(run)} ({provenance(run)}). "
             "In TFLOP/s: ours / best baseline (its name) = ratio; above 1, in bold, ours is faster."]
    grid, others = {}, {}
    for job in run.jobs:
        problem = job.problem
        if cases.in_paper_grid(problem) and job.direction != "both":
            grid[(str(problem.d), problem.mask, job.direction), cases.length_name(problem.n_q)] = job
        else:
            others[(job.case,), job.direction] = job
    if grid:
        lengths = [cases.length_name(n) for n in sorted({job.problem.n_q for job in grid.values()})]
        shown = [n for n in lengths if n in map(cases.length_name, SHOWN)] or lengths
        rows = sorted({row for row, _ in grid}, key=lambda row: (int(row[0]), row[1] != "full", row[2] != "forward"))
        parts.append(markdown(("head size", "mask", "direction"), rows, shown, grid))
    if others:
        directions = [direction for direction in cases.DIRECTIONS if any(key[1] == direction for key in others)]
        parts.append(markdown(("case",), dict.fromkeys(row for row, _ in others), directions, others))
    if any("†" in part for part in parts[1:]):
        parts.append("† The GPU was throttled during this measurement.")
    return "\n\n".join(parts)


def markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], columns: list[str], jobs: dict) -> str:
    """Return a table: a line per row key, a column per column key, and the comparison of the job with both keys."""
    lines = [[*head, *columns], ["---"] * (len(head) + len(columns))]
    lines += [[*(text.replace("|", r"\|") for text in row), *(entry(jobs.get((row, column))) for column in columns)]
              for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def entry(job: Job | None) -> str:
    """Return the comparison of a job, or the reason why there is none."""
    if job is None:
        return "-"
    ours, best = job.ours, job.best_baseline
    if ours is None:
        return f"ours: {job.results[OURS].status}" if OURS in job.results else "ours: not run"
    if best is None:
        return f"{rate(ours, job)} (no baseline)"
    ratio = best.seconds / ours.seconds
    bold = "**" if ratio > 1 else ""
    return f"{rate(ours, job)} / {rate(best, job)} ({best.name}) = {bold}{ratio:.2f}{bold}"


def rate(result: Result, job: Job) -> str:
    """Return TFLOP/s in three digits, with a dagger if the GPU was throttled."""
    tflops = job.tflops(result.seconds)
    return (f"{tflops:.0f}" if tflops >= 100 else f"{tflops:.3g}") + "†" * result.throttled


def replace_block(text: str, content: str) -> str:
    """Return the text with this content between the markers. Raises ValueError unless there is one pair, in order."""
    blocks = re.findall(f"{BEGIN}.*?{END}", text, re.DOTALL)
    if len(blocks) != 1 or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README: expected one block from {BEGIN} to {END}, found {len(blocks)}")
    return text.replace(blocks[0], f"{BEGIN}\n{content}\n{END}")


def main(argv: list[str] | None = None) -> int:
    """Write the tables or, with --check, compare them. Return 0, 1 if the README differs, 2 for wrong input."""
    parser = argparse.ArgumentParser("python -m perf.readme_table", description="Write the speed tables of README.md.",
                                     epilog="exit codes: 0 success; 1 the README is out of date (--check); 2 wrong input")
    parser.add_argument("--results", type=Path, default=results.RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.readme.read_bytes().decode()  # bytes keep the line ends
        wanted = replace_block(text, "\n\n".join(map(section, newest(results.load(arguments.results)))) or NOTHING)
        if arguments.check and wanted != text:
            print(f"{arguments.readme.name} is out of date: run python -m perf.readme_table", file=sys.stderr)
            return 1
        if wanted != text:
            arguments.readme.write_bytes(wanted.encode())
    except (ValueError, JournalError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.readme.name}: {'unchanged' if wanted == text else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
