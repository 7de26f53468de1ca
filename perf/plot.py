"""Pictures of what was recorded: python -m perf.plot

    roofline   TFLOP/s against length, with the ceilings of the GPU's units       ratio   ours / best rival in every case

A ceiling is what a unit would allow if it alone took time. Every figure reads in black and white, comes as PNG and SVG,
and is the same to the byte when it is drawn again.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from matplotlib import style as sheets
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from tritonattn import Problem
from tritonattn import gpu as gpus
from tritonattn.gpu import Gpu
from tritonattn.measure.drawing import GREY, INK, headline, rc_params
from tritonattn.measure.journal import JournalError

from . import cases, limits
from . import results as record
from .readme_table import DAGGER, DIRECTIONS, Cell, decimals, dtypes, fact, lacking, length, place, ratio, split
from .results import OURS, Job, Run

# text stays text, and names in it are stable
LOOK = rc_params({"svg.hashsalt": "tritonattn", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9.5,
             "figure.constrained_layout.h_pad": 0.06, "figure.constrained_layout.w_pad": 0.06})
SIZES = 12.5, 8.5  # of letters, in points: of the headline and of what stands below it


class Style(NamedTuple):
    """How a contender's line looks. Marker and dashes alone tell it from every other."""

    color: str
    marker: str
    dashes: tuple[float, ...] = ()  # on, off, ... in points; none is a solid line
    width: float = 1.2

    @property
    def line(self):
        return (0, self.dashes) if self.dashes else "-"


STYLES = {
    OURS: Style(INK, "o", (), 2.6),
    "tritonattn-plain-grad": Style(INK, "o", (3, 1.5), 1.6),
    "torch": Style("#b04a00", "s", (7, 1.5)),
    "cudnn": Style("#2b7a0b", "^", (5, 1.5, 1, 1.5)),
    "flash": Style("#0072b2", "v", (1, 1)),
    "efficient": Style("#cc79a7", "D", (4, 2)),
    "math": Style("#8c8c8c", "X", (1, 3)),
    "flex": Style("#d55e00", "P", (6, 1.5, 1, 1.5, 1, 1.5)),
    "eager": Style("#8c8c8c", "d", (4, 4)),
    "flash_attn": Style("#56b4e9", "<", (2, 1)),
    "flash_attn_3": Style("#0072b2", ">", (9, 2)),
    "flash_attn_4": Style("#1b4f8a", "*", (9, 2, 1, 2)),
    "xformers": Style("#e69f00", "h", (1, 1.7)),
}
# for names that have no style of their own
SPARE = [Style(color, marker, dashes) for (dashes, marker), color in zip(
    itertools.product(((5, 2), (2, 2), (8, 2, 2, 2), (1, 2)), ("p", "8", "H")),
    itertools.cycle(("#7b3294", "#008080", "#a0522d", "#555500", "#c2185b", "#444444", "#2e86de")))]

CEILINGS = {  # the field of a limits.Floor: what it is called, and its dashes
    "tensor": ("tensor cores", (10, 3)), "special": ("special-function units", (2, 2)), "fp32": ("fp32 units", (6, 2, 2, 2)),
    "memory": ("memory", (4, 2, 1, 2, 1, 2)), "serial": ("tensor + special", (1, 2)),
}
EXPLAINED = "Grey: what each unit alone would allow, at its vendor's clock; tensor + special: both in turns, not side by side."

# implementations as published, under the names of the contenders they are
ALIASES = {"FA2": "flash_attn", "FA3": "flash_attn_3", "FA4": "flash_attn_4", "cuDNN 9": "cudnn"}
OTHER = Style("#b0b0b0", ".", (1, 5))


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each name, ours first; the same name looks the same in every figure, if it is known."""
    order = list(STYLES)
    names = sorted(set(names), key=lambda name: (order.index(name) if name in STYLES else len(order), name))
    spare = itertools.cycle(SPARE)
    return {name: STYLES[name] if name in STYLES else next(spare) for name in names}


class Point(NamedTuple):
    """One measurement: TFLOP/s at a length, from the slower quantile to the faster; nan where there is none."""

    n: int
    tflops: float
    low: float
    high: float
    throttled: bool


def curve(jobs: Iterable[Job], contender: str) -> list[Point]:
    """One contender along the lengths."""
    points = []
    for job in sorted(jobs, key=lambda job: job.problem.n_q):
        result = job.results.get(contender)
        if result is None or result.status != "ok":
            points.append(Point(job.problem.n_q, math.nan, math.nan, math.nan, False))
        else:
            rates = [job.flops / time / 1e12 for time in (result.seconds, result.q80 or result.seconds,
                                                          result.q20 or result.seconds)]
            points.append(Point(job.problem.n_q, *rates, result.throttled))
    return points


def ceilings(problem: Problem, direction: str, lengths: Iterable[int], gpu: Gpu) -> dict[str, list[float]]:
    """What each unit alone would allow at these lengths, in TFLOP/s; infinite where it has nothing to do."""
    found = {unit: [] for unit in CEILINGS}
    for n in lengths:
        at = replace(problem, n_q=n, n_k=n)
        floor, flops = limits.floor(at, direction, gpu), at.flops(direction)
        for unit, line in found.items():
            seconds = getattr(floor, unit)
            line.append(flops / seconds / 1e12 if seconds else math.inf)
    return found


def _panels(figure: Figure, cells: Iterable[Cell]) -> dict[tuple[int, str, str], Axes]:
    """Empty axes for each (head size, mask, direction): a column per head size, a row per direction and mask."""
    cells = list(cells)
    sizes, lengths = sorted({cell.d for cell in cells}), sorted({cell.n for cell in cells})
    rows = sorted({(cell.direction, cell.mask) for cell in cells}, key=lambda row: (DIRECTIONS.index(row[0]), row[1] != "full"))
    figure.set_size_inches(max(1 + 3.05 * len(sizes), 8), 1 + 1.95 * len(rows))
    grid = figure.subplots(len(rows), len(sizes), sharex=True, sharey=True, squeeze=False)
    panels = {}
    for (row, (direction, mask)), (column, d) in itertools.product(enumerate(rows), enumerate(sizes)):
        axes = panels[d, mask, direction] = grid[row][column]
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FixedFormatter([length(n) for n in lengths]))
        axes.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
        axes.grid(axis="y", color="#e3e3e3", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"head size {d}" if row == 0 else "")
        axes.set_ylabel(f"{direction}, {mask}\nTFLOP/s" if column == 0 else "")
        axes.set_xlabel("sequence length (tokens)" if row == len(rows) - 1 else "")
    return panels


def _draw_curve(axes: Axes, points: Sequence[Point], style: Style, zorder: float) -> None:
    """A line that breaks where nothing is known, a bar from quantile to quantile, and hollow markers where throttled."""
    xs = [point.n for point in points]
    axes.plot(xs, [point.tflops for point in points], color=style.color, linestyle=style.line, linewidth=style.width,
              zorder=zorder)
    axes.vlines(xs, [point.low for point in points], [point.high for point in points], color=style.color,
                linewidth=style.width, zorder=zorder)
    for throttled in (False, True):
        shown = [point for point in points if point.throttled == throttled and not math.isnan(point.tflops)]
        axes.plot([point.n for point in shown], [point.tflops for point in shown], linestyle="none",
                  **_marker(style, throttled), zorder=zorder + 0.1)


def _marker(style: Style, hollow: bool = False) -> dict:
    return {"marker": style.marker, "markersize": 4 + 0.6 * style.width, "color": style.color, "markeredgewidth": 1.0,
            "markerfacecolor": "white" if hollow else style.color}


def _draw_ceilings(axes: Axes, problem: Problem, direction: str, gpu: Gpu) -> None:
    """Each unit's ceiling with its name beside it; what lies above the picture is named in its corner."""
    lengths, top = axes.xaxis.get_majorticklocs(), axes.get_ylim()[1]
    first, last = (lengths[0], lengths[-1]) if len(lengths) > 1 else axes.get_xlim()
    fine = [round(first * (last / first) ** (step / 128)) for step in range(129)]
    lines, above = ceilings(problem, direction, fine, gpu), []
    for unit, line in lines.items():
        if min(line) < top:
            axes.plot(fine, line, color=GREY, linestyle=(0, CEILINGS[unit][1]), linewidth=1, zorder=1.5, scaley=False)
            _name_ceiling(axes, unit, fine, lines)
        elif unit != "fp32" and min(line) < math.inf:
            above.append(f"{CEILINGS[unit][0]} {min(line):.0f}{'+' * _slopes(line)}")
    if above:
        axes.text(0.99, 0.99, f"above: {', '.join(above)}", transform=axes.transAxes, fontsize=7, color=GREY, ha="right",
                  va="top")


def _slopes(line: Sequence[float]) -> bool:
    """Whether a ceiling rises with the length, and not only at the shortest ones, where memory binds."""
    return line[-1] > 1.01 * line[len(line) // 2]


def _name_ceiling(axes: Axes, unit: str, fine: Sequence[int], lines: dict[str, list[float]]) -> None:
    """A ceiling's name where curves seldom run: over its right end or at its left one, or beside it where it leaves."""
    top, line, name = axes.get_ylim()[1], lines[unit], CEILINGS[unit][0]
    if _slopes(line):
        # below the corner's line of text
        at, offset, sides = max((i for i, rate in enumerate(line) if rate < 0.92 * top), default=0), (3, 0), ("left", "center")
    elif unit == "tensor":
        at, name, offset, sides = len(line) - 1, f"{name} {line[-1]:.0f}", (0, 2), ("right", "bottom")
    else:
        # to the right of where memory's ceiling crosses; under the line where the tensor cores' is close over it
        at = next((i for i, rate in enumerate(lines["memory"]) if rate > 1.25 * line[-1]), 0)
        low = line[-1] <= lines["tensor"][-1] < line[-1] + 0.1 * top
        name, offset, sides = f"{name} {line[-1]:.0f}", (0, -2 if low else 2), ("left", "top" if low else "bottom")
    axes.annotate(name, (fine[at], line[at]), offset, textcoords="offset points", ha=sides[0], va=sides[1], fontsize=7,
                  color=GREY)


@sheets.context(LOOK)
def roofline(run: Run) -> Figure:
    """Every contender of a run at the grid of the papers, in TFLOP/s."""
    grid, _ = split(run.jobs)
    figure, gpu = Figure(layout="constrained"), known_gpu(run)
    panels = _panels(figure, grid)
    _set_top(panels, grid.values(), gpu)
    looks = styles(name for job in grid.values() for name in job.results)
    for key, axes in panels.items():
        jobs = [job for cell, job in grid.items() if cell[:3] == key]
        for rank, (name, style) in enumerate(looks.items()):
            _draw_curve(axes, curve(jobs, name), style, zorder=4 - rank / 20)
        _say_what_is_lacking(axes, jobs)
        if jobs and gpu:
            _draw_ceilings(axes, jobs[0].problem, jobs[0].direction, gpu)
    _legend(figure, looks, list(grid.values()))
    what = "TFLOP/s of the pairs that see each other; 16k tokens in all, heads x head size = 2048."
    headline(figure, reach(list(grid.values()), gpu), [
        provenance(run), what + (f" {EXPLAINED}" if gpu else " No ceilings: this GPU's limits are not known here.")], *SIZES)
    return figure


def reach(jobs: Sequence[Job], gpu: Gpu | None) -> str:
    """How near ours comes to what the hardware allows, in a sentence."""
    shares = [job.ours.tflops(job) / limits.floor(job.problem, job.direction, gpu).tflops for job in jobs if gpu and job.ours]
    if not shares:
        return f"{OURS} and its rivals along the sequence length"
    return (f"{OURS} reaches {min(shares):.0%} to {max(shares):.0%} of what the hardware allows; "
            f"median {statistics.median(shares):.0%}")


def _set_top(panels, jobs: Iterable[Job], gpu: Gpu | None) -> None:
    """One scale for all panels, from zero to a little over the highest ceiling that binds and every measurement."""
    jobs = list(jobs)
    rates = [result.tflops(job) for job in jobs for result in job.results.values() if result.status == "ok"]
    rates += [limits.floor(job.problem, job.direction, gpu).tflops for job in jobs if gpu]
    for axes in panels.values():
        axes.set_ylim(0, 1.22 * max(rates, default=1))


def _say_what_is_lacking(axes: Axes, jobs: Sequence[Job]) -> None:
    """Where ours has no point, the reason stands on the axis instead; likewise in a panel with no job."""
    if not jobs:
        axes.text(0.5, 0.5, lacking(None), transform=axes.transAxes, ha="center", color=GREY)
    for job in jobs:
        if job.ours is None:
            # under the curves, which it must not hide
            axes.text(job.problem.n_q, 0.02, lacking(job).replace(" ", "\n", 1), transform=axes.get_xaxis_transform(),
                      ha="center", va="bottom", fontsize=7.5, color=INK, weight="bold", zorder=1.8)


def _legend(figure: Figure, looks: dict[str, Style], jobs: Sequence[Job]) -> None:
    """Every contender once, with the reason where it has no point at all; then the signs of the points."""
    handles = []
    for name, style in looks.items():
        found = {job.results[name].status for job in jobs if name in job.results}
        label = name if "ok" in found else f"{name}: {', '.join(sorted(found))}"
        handles.append(Line2D([], [], linestyle=style.line, linewidth=style.width, label=label, **_marker(style)))
    handles.append(Line2D([], [], linestyle="none", marker="|", markersize=9, color=GREY, label="20% to 80% of samples"))
    if any(result.throttled for job in jobs for result in job.results.values()):
        handles.append(Line2D([], [], linestyle="none", marker="o", color=GREY, markerfacecolor="white",
                              label="hollow: throttled"))
    figure.legend(handles=handles, loc="outside lower center", ncols=int(figure.get_size_inches()[0] / 2), frameon=False,
                  handlelength=4, fontsize=8.5)


def provenance(run: Run) -> str:
    """Where a run's numbers come from, in one line."""
    return (f"{fact(run, 'gpu')} · {dtypes(run.jobs)} · torch {fact(run, 'torch')} · Triton {fact(run, 'triton')} · "
            f"{fact(run, 'date')} · commit {fact(run, 'commit')}")


def known_gpu(run: Run) -> Gpu | None:
    """The GPU of a run, if its limits are known: a part of one has others."""
    known = gpus.find(str(run.environment.get("gpu")))
    return known if known and run.environment.get("sms") in (None, known.sms) else None


class Map(NamedTuple):
    """Rows and columns of jobs; in place of one that is not there the reason, or nothing where none was asked for."""

    title: str
    rows: list[str]
    columns: list[str]
    cells: list[list[Job | str | None]]


def maps(jobs: Sequence[Job], tallest: int = 16) -> list[Map]:
    """The grid of the papers; then the other cases, in as many maps side by side as they fill."""
    grid, others = split(jobs)
    found, names = [_grid_map(grid)] if grid else [], list(dict.fromkeys(case for case, _ in others))
    directions = [direction for direction in DIRECTIONS if any(key[1] == direction for key in others)]
    asked = {(case.name, direction) for job in jobs[:1] for case in cases.SUITES.get(job.suite, ())
             for direction in case.directions}
    share = math.ceil(len(names) / math.ceil(len(names) / tallest)) if names else 1
    for start in range(0, len(names), share):
        part = names[start:start + share]
        keys = [[(case, direction) for direction in directions] for case in part]
        found.append(Map("direction", part, directions, [
            [others.get(key) or (lacking(None) if key in asked else None) for key in row] for row in keys]))
    return found


def _grid_map(grid: dict[Cell, Job]) -> Map:
    """A family in a row, a length in a column."""
    lengths = sorted({cell.n for cell in grid})
    families = sorted({(cell.direction, cell.d, cell.mask) for cell in grid},
                      key=lambda family: (DIRECTIONS.index(family[0]), family[1], family[2] != "full"))
    return Map("sequence length", [f"{direction}, size {d}, {mask}" for direction, d, mask in families],
               [*map(length, lengths)],
               [[grid.get(Cell(d, mask, direction, n), lacking(None)) for n in lengths] for direction, d, mask in families])


def why_not(cell: Job | str) -> str | None:
    """The reason why a cell has no comparison, None if it has one."""
    return cell if isinstance(cell, str) else lacking(cell)


def finding(jobs: Sequence[Job]) -> str:
    """What the comparisons of a run come to, in a sentence."""
    ratios = [ratio(job) for job in jobs if not lacking(job)]
    if not ratios:
        return f"no comparison in any of {len(jobs)} cells"
    wins = sum(value > 1 for value in ratios)
    return f"{OURS} is faster in {wins} of {len(ratios)} cells; median {statistics.median(ratios):.2f} of the best rival"


def shade(value: float) -> tuple[str, str]:
    """The colors of a cell and its text: wins light under black, losses dark under white, both stronger away from 1."""
    near, far = ("#fff1cf", "#ffb733") if value > 1 else ("#4f6390", "#0b1230")
    # at twice or half the rival's speed the color is at its end
    share = min(abs(math.log2(value)), 1) ** 0.7
    mixed = [a + (b - a) * share for a, b in zip(to_rgb(near), to_rgb(far))]
    return to_hex(mixed), "black" if value > 1 else "white"


def label(job: Job) -> tuple[str, str]:
    """What stands in a cell with a comparison: the ratio, and the rival's name."""
    return decimals(ratio(job)) + DAGGER * (job.ours.throttled or job.best_rival.throttled), job.best_rival.contender


def _draw_cell(axes: Axes, column: int, row: int, cell: Job | str) -> None:
    middle = {"ha": "center", "va": "center"}
    if reason := why_not(cell):
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor="white", edgecolor="#c4c4c4", hatch="/////", linewidth=0))
        axes.text(column + 0.5, row + 0.5, reason, fontsize=7.5, **middle,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    else:
        (face, ink), (number, rival) = shade(ratio(cell)), label(cell)
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=face, linewidth=0))
        axes.text(column + 0.5, row + 0.36, number, fontsize=10, weight="bold", color=ink, **middle)
        axes.text(column + 0.5, row + 0.75, rival, fontsize=7, color=ink, **middle)
    axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="white", linewidth=1.5))


def _draw_map(axes: Axes, shown: Map, tallest: int) -> None:
    """One map; `tallest` rows give every map's cells the same height."""
    for row, column in itertools.product(range(len(shown.rows)), range(len(shown.columns))):
        if shown.cells[row][column] is not None:
            _draw_cell(axes, column, row, shown.cells[row][column])
    axes.set(xlim=(0, len(shown.columns)), ylim=(tallest, 0))
    axes.set_xticks([column + 0.5 for column in range(len(shown.columns))], shown.columns)
    axes.set_yticks([row + 0.5 for row in range(len(shown.rows))], shown.rows)
    axes.set_xlabel(shown.title)
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


@sheets.context(LOOK)
def ratios(run: Run) -> Figure:
    """Ours against the best rival in every case of a run."""
    shown, figure = maps(run.jobs), Figure(layout="constrained")
    tallest = max((len(part.rows) for part in shown), default=1)
    names = [max(map(len, part.rows)) * 0.068 for part in shown]
    widths = [0.95 * len(part.columns) for part in shown]
    figure.set_size_inches(max(sum(names) + sum(widths) + 0.3 * len(shown), 8), 0.65 + 0.42 * tallest)
    for axes, part in zip(figure.subplots(1, max(len(shown), 1), squeeze=False, width_ratios=widths or None)[0], shown):
        _draw_map(axes, part, tallest)
    cells = [cell for part in shown for row in part.cells for cell in row if cell is not None]
    without = sum(why_not(cell) is not None for cell in cells)
    throttled = any(DAGGER in label(job)[0] for job in run.jobs if not lacking(job))
    headline(figure, finding(run.jobs), [
        provenance(run), "In each cell, the best rival's time / ours, and that rival. Light: ours is faster. Dark: slower."
        + f" Hatched: no comparison, in {without} of {len(cells)}." * bool(without)
        + f" {DAGGER}: throttled while one of the two was measured." * throttled], *SIZES)
    return figure


@sheets.context(LOOK)
def published(gpu: Gpu) -> Figure:
    """What others have published at the grid of the papers, under the ceilings of a GPU; no measurement of ours."""
    grid = {}
    for case in cases.SUITES["paper"]:
        for direction in case.directions:
            job = Job("paper", case.name, case.problem, direction, {})
            grid[place(job)] = job
    figure = Figure(layout="constrained")
    panels, lengths = _panels(figure, grid), sorted({cell.n for cell in grid})
    _set_top(panels, grid.values(), gpu)
    for cell, job in grid.items():
        if cell.n == lengths[0]:
            _draw_ceilings(panels[cell[:3]], job.problem, job.direction, gpu)
    rows = [row for row in limits.published() if _alike(row.gpu, gpu) and (row.d, row.mask, row.direction) in panels
            and lengths[0] <= row.n <= lengths[-1]]
    found, points = "ceilings only, nothing published is on file", "16k tokens in all, heads x head size = 2048."
    if rows:
        _draw_published(figure, panels, rows)
        found = f"points are published by others on {' and '.join(sorted({row.gpu for row in rows}))}"
        points = ("Points: what others have published, in any 16-bit type, with 16k tokens in all, heads x head size = 2048, "
                  "unless small and grey; sources in perf/published.csv.")
    headline(figure, f"No measurement of {OURS} yet; {found}",
             [f"TFLOP/s, and ceilings of {gpu.name}. {points}", EXPLAINED], *SIZES)
    return figure


def _draw_published(figure: Figure, panels, rows) -> None:
    """Points without lines: large and named where they were measured on the papers' grid, else small and grey."""
    exact = [row for row in rows if row.heads * row.d == 2048 and row.batch * row.n == 16384]
    looks = styles(ALIASES.get(row.implementation, row.implementation) for row in exact)
    looks = {name: looks[ALIASES.get(name, name)] for name in dict.fromkeys(row.implementation for row in exact)}
    for row in rows:
        style = looks[row.implementation] if row in exact else OTHER
        panels[row.d, row.mask, row.direction].plot([row.n], [row.tflops], linestyle="none", **_marker(style),
                                                    zorder=3 if row in exact else 2)
    known = {(row.d, row.mask, row.direction) for row in rows}
    for key, axes in panels.items():
        if key not in known:
            axes.text(0.5, 0.3, "nothing published on file", transform=axes.transAxes, ha="center", color=GREY)
    handles = [Line2D([], [], linestyle="none", label=name, **_marker(style)) for name, style in looks.items()]
    if len(exact) < len(rows):
        handles.append(Line2D([], [], linestyle="none", label="other batch or head counts", **_marker(OTHER)))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)


def _alike(name: str, gpu: Gpu) -> bool:
    """Whether a GPU of this name computes as another does, whatever its memory."""
    known = gpus.find(name)
    return known is not None and (known.arch, known.sms) == (gpu.arch, gpu.sms)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as <stem>.png and <stem>.svg, without the date and the version that matplotlib would put in."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with sheets.context(LOOK):
        figure.savefig(paths[0], dpi=200, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def draw(runs: Iterable[Run], results: Path, out: Path | None) -> list[Path]:
    """All figures of all runs that hold a job, beside their files or in the same order under `out`."""
    paths = []
    for run in runs:
        if not run.jobs:
            continue
        stem = (out / run.path.relative_to(results) if out else run.path).with_suffix("")
        if split(run.jobs)[0]:
            paths += save(roofline(run), stem.with_name(f"{stem.name}-roofline"))
        paths += save(ratios(run), stem.with_name(f"{stem.name}-ratio"))
    return paths


def _gpu(name: str) -> Gpu:
    try:
        return gpus.named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Draw everything that is recorded, or say that nothing is; 0 all is well, 2 wrong input."""
    parser = argparse.ArgumentParser("python -m perf.plot", description="Draw what was recorded, as PNG and SVG.",
                                     epilog="exit code: 0 all is well, 2 wrong usage or input")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: beside each file of results")
    parser.add_argument("--gpu", type=_gpu, default="h200", metavar="NAME",
                        help="whose ceilings to draw while nothing is recorded (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        paths = draw(record.load(arguments.results), arguments.results, arguments.out)
        if not paths:
            print(f"nothing is recorded in {arguments.results}: drawn are ceilings and what others have published, "
                  "no measurement of tritonattn")
            stem = (arguments.out or arguments.results) / f"published-{arguments.gpu.name.lower().replace(' ', '-')}"
            paths = save(published(arguments.gpu), stem)
    except (JournalError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
