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
    facts = {name: str(run.environment.get(name) or "not recorded") for name in ("driver", "torch", "triton", "date", "commit")}
    return (f"driver {facts['driver']}, torch {facts['torch']}, Triton {facts['triton']}, {facts['date'][:10]}, "
            f"commit {facts['commit']}")


def newest(runs: Iterable[Run]) -> list[Run]:
    """Return the last run of each GPU, suite and dtype. Runs in Triton's interpreter are left out."""
    runs = [run for run in runs if run.jobs and run.environment.get("arch") != "interpreter"]
    runs.sort(key=lambda run: str(run.environment.get("date")))
    last = {(str(run.environment.get("gpu")), run.jobs[0].suite, dtypes(run)): run for run in runs}
    return [last[key] for key in sorted(last)]


def section(run: Run) -> str:
    """Return the heading and the table of one run: a line per case, a column per direction."""
    shown = [job for job in run.jobs if job.problem.n_q in SHOWN or not cases.in_paper_grid(job.problem)] or run.jobs
    jobs = {(job.case, job.direction): job for job in shown}
    directions = [direction for direction in cases.DIRECTIONS if any(job.direction == direction for job in shown)]
    lines = [["case", *directions], ["---"] * (1 + len(directions))]
    lines += [[case.replace("|", r"\|"), *(entry(jobs.get((case, direction))) for direction in directions)]
              for case in dict.fromkeys(job.case for job in shown)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    head = (f"**{run.environment.get('gpu')}**, {run.jobs[0].suite} suite, {dtypes(run)} ({provenance(run)}). "
            "In TFLOP/s: ours / best baseline (its name) = ratio; above 1, in bold, ours is faster.")
    return "\n\n".join([head, table] + ["† The GPU was throttled during this measurement."] * ("†" in table))


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


def written(text: str, folder: Path) -> str:
    """Return the text of the README with the tables of all results in a folder. Raises ValueError, JournalError."""
    return replace_block(text, "\n\n".join(map(section, newest(results.load(folder)))) or NOTHING)


def main(argv: list[str] | None = None) -> int:
    """Write the tables. Return 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser("python -m perf.readme_table", description="Write the speed tables of README.md.")
    parser.add_argument("--results", type=Path, default=results.RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.readme.read_bytes().decode()  # bytes keep the line ends
        arguments.readme.write_bytes(written(text, arguments.results).encode())
    except (ValueError, JournalError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
