"""Draw the rooflines of recorded runs: python -m perf.plot

TFLOP/s against length on the grid of the FlashAttention papers, a panel for each head size, mask and direction, below two
ceilings of the GPU: all units overlapped, and matrix products in turn with exponentials (see perf.limits).
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tritonattn import Problem
from tritonattn import gpu as gpus
from tritonattn.gpu import Gpu
from tritonattn.measure.journal import JournalError

from . import cases, limits, results
from .readme_table import dtypes, provenance
from .results import OURS, Job, Run

MARKERS = "s^vDPX<>phd8*"
CEILINGS = {"tflops": ("ceiling: all units overlapped", "-"), "serial_tflops": ("ceiling: products, then exponentials", ":")}


def grid_jobs(jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs on the papers' grid that were timed, by length."""
    return sorted((job for job in jobs if cases.in_paper_grid(job.problem) and job.direction != "both" and job.timed),
                  key=lambda job: job.problem.n_q)


def roofline(title: str, jobs: list[Job], gpu: Gpu | None) -> Figure:
    """Draw jobs on the papers' grid, below the ceilings of a GPU if it is known."""
    sizes = sorted({job.problem.d for job in jobs})
    rows = sorted({(job.problem.mask, job.direction) for job in jobs}, key=lambda row: (row[1] != "forward", row[0] != "full"))
    names = sorted({name for job in jobs for name in job.timed}, key=lambda name: (name != OURS, name))
    figure = Figure(figsize=(2 + 3.2 * len(sizes), 2.2 + 2.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(sizes), sharex=True, sharey=True, squeeze=False)
    for row, (mask, direction) in zip(grid, rows):
        for axes, d in zip(row, sizes):
            axes.set_title(f"{direction}, {mask}, head size {d}", fontsize=9)
            panel = [job for job in jobs if (job.problem.d, job.problem.mask, job.direction) == (d, mask, direction)]
            for index, name in enumerate(names):
                if timed := [job for job in panel if name in job.timed]:
                    draw_curve(axes, name, timed, index)
            if gpu:
                draw_ceilings(axes, [cases.of_paper(d, mask, n).problem for n in cases.PAPER_LENGTHS], direction, gpu)
    grid[0][0].set_xscale("log", base=2)
    grid[0][0].set_xticks(cases.PAPER_LENGTHS, map(str, cases.PAPER_LENGTHS))
    grid[0][0].set_ylim(bottom=0)
    for axes in grid[-1]:
        axes.set_xlabel("sequence length (tokens)")
    for axes in grid[:, 0]:
        axes.set_ylabel("TFLOP/s")
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    order = [*(name for name in names if name in handles), *(label for label in handles if label not in names)]
    figure.legend([handles[label] for label in order], order, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_curve(axes: Axes, name: str, jobs: list[Job], index: int) -> None:
    """Draw one implementation with bars between the quantiles. Hollow markers: throttled."""
    color, marker = ("black", "o") if name == OURS else (f"C{index % 10}", MARKERS[index % len(MARKERS)])
    lengths = [job.problem.n_q for job in jobs]
    tflops, low, high = ([job.tflops(getattr(job.timed[name], field)) for job in jobs] for field in ("seconds", "q80", "q20"))
    axes.plot(lengths, tflops, color=color, marker=marker, linewidth=2.4 if name == OURS else 1.2, markersize=5, label=name)
    axes.vlines(lengths, low, high, color=color)
    for job, n, rate in zip(jobs, lengths, tflops):
        if job.timed[name].throttled:
            axes.plot(n, rate, color=color, marker=marker, markerfacecolor="white", markersize=5)


def draw_ceilings(axes: Axes, problems: list[Problem], direction: str, gpu: Gpu) -> None:
    """Draw the ceilings of a GPU for these problems."""
    floors = [limits.floor(problem, direction, gpu) for problem in problems]
    for field, (label, dashes) in CEILINGS.items():
        axes.plot([problem.n_q for problem in problems], [getattr(floor, field) for floor in floors], color="grey",
                  linestyle=dashes, label=label)


def known_gpu(run: Run) -> Gpu | None:
    """Return the GPU of a run, or None if its limits are not known. A MIG slice has fewer multiprocessors than its GPU."""
    known = gpus.find_gpu(str(run.environment.get("gpu")))
    return known if known and run.environment.get("sms") in (None, known.sms) else None


def summary(run: Run, gpu: Gpu | None) -> str:
    """Return the title of a run's figure: its GPU, the share of the ceiling that ours reaches, and the provenance."""
    shares = [job.tflops(job.ours.seconds) / limits.floor(job.problem, job.direction, gpu).tflops
              for job in grid_jobs(run.jobs) if gpu and job.ours]
    share = (f"{OURS} reaches {min(shares):.0%} to {max(shares):.0%} of the ceiling" if shares else
             "no ceilings: the limits of this GPU are not known" if gpu is None else f"{OURS} has no result")
    return f"{run.environment.get('gpu')}, {dtypes(run)}: {share}\n{provenance(run)}"


def main(argv: list[str] | None = None) -> int:
    """Save a figure for each run with jobs on the papers' grid. Return 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser("python -m perf.plot", description="Draw the rooflines of recorded runs, as PNG.")
    parser.add_argument("--results", type=Path, default=results.RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: next to the results")
    arguments = parser.parse_args(argv)
    try:
        drawn = [run for run in results.load(arguments.results) if grid_jobs(run.jobs)]
        for run in drawn:
            path = (arguments.out or arguments.results) / run.path.relative_to(arguments.results)
            path = path.with_name(f"{path.stem}-roofline.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            roofline(summary(run, known_gpu(run)), grid_jobs(run.jobs), known_gpu(run)).savefig(path, dpi=150)
            print(path)
    except (JournalError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if not drawn:
        print(f"{arguments.results}: no run of the papers' grid is recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
