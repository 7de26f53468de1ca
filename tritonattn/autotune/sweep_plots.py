"""Pictures of a sweep, each under what it shows and where its numbers come from.

    heat       best slowdown of each tile, over warps and stages       slowdown   how many configs are near the best
    coverage   how few configs would do for all                        model      measured time against modelled cycles

What is drawn are report.standings and report.coverage: report.py imports this file, which knows nothing of files or runs.
Colors are told apart by the colour-blind; no setting of the user's reaches a picture, and none of his is changed.
"""

import io
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence

from matplotlib import colormaps
from matplotlib import style as sheets
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

from ..config import Config
from ..measure.drawing import GREY, INK, PALE, headline, rc_params

PAGE, COLUMNS = 8, 4  # jobs of a figure; panels in a row of it
LOOK = rc_params({"font.size": 10, "axes.titlesize": 10,
             "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.08})
# color, dashes and marker of the lines of a figure; the color alone tells them apart, and so does the marker
LINES = tuple(zip(("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b"),
                  2 * ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5))),
                  ("o", "s", "^", "D", "v", "P", "X", "*")))
# where a tile has no time: what stands in its place; other reasons stand as they are
SHORT = {"register collapse": "collapse", "wrong tensor path": "wrong path", "duplicate work": "double work",
         "tensor memory": "tensor mem.", "shared memory": "shared mem.", "ok": "not timed"}
WORST = 2.0  # a slowdown whose color is that of all beyond
TICKS = (1, 1.05, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
COLORS, SCALE = colormaps["Blues_r"], LogNorm(1, WORST)


@sheets.context(LOOK)
def pages(jobs: Sequence, covers: Mapping[tuple, list], origin: str) -> dict[str, Figure]:
    """{name: figure} of all that can be drawn; of each kind as many as the jobs fill. Empty where nothing was timed.

    jobs: report.standings; covers: report.coverage of them; origin: report.origin, which stands under every title.
    """
    timed = [job for job in jobs if job.best is not None]
    if not timed:
        return {}
    kernels = list(dict.fromkeys(job.job.kernel for job in timed))
    modelled = sorted((job for job in timed if _points(job)), key=lambda job: kernels.index(job.job.kernel))
    kinds = {
        "heat": (_heat, [job for job in jobs if job.trials], f"{_found_by_tiles(timed)}; darker is faster"),
        "slowdown": (_slowdown, timed, _found_by_slowdowns(timed)),
        "coverage": (_coverage, list(covers.items()), _found_by_covers(covers)),
        "model": (_model, modelled, _found_by_model(modelled)),
    }
    found = {}
    for kind, (draw, shown, title) in kinds.items():
        count = math.ceil(len(shown) / PAGE)
        for page in range(count):
            figure = Figure(layout="constrained")
            below = draw(figure, shown[page * PAGE:(page + 1) * PAGE])
            part = f"Page {page + 1} of {count}. " * (count > 1)
            headline(figure, title, [origin, part + below])
            found[f"{kind}-{page + 1}"] = figure
    return found


@sheets.context(LOOK)
def png(figure: Figure) -> bytes:
    """A figure as a file's content, without the version that matplotlib would put in."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def _found_by_tiles(jobs) -> str:
    winners = [Config.parse(job.best.config) for job in jobs]
    tiles = [f"{config.block_m} x {config.block_n}" for config in winners]
    tile = statistics.mode(tiles)
    if tiles.count(tile) == 1 < len(tiles):
        return f"Each of {len(tiles)} jobs has another best tile"
    return f"A tile of {tile} is the fastest in {tiles.count(tile)} of {len(tiles)} jobs"


def _found_by_slowdowns(jobs) -> str:
    every = [slowdown for job in jobs for slowdown in job.slowdowns.values()]
    return (f"Of all configs that were timed, {sum(slowdown <= 1.05 for slowdown in every) / len(every):.0%} are within 5% of "
            f"their job's best; half take more than {statistics.median(every):.2f} times as long")


def _found_by_covers(covers) -> str:
    worst = {key: [cover.worst for cover in steps] for key, steps in covers.items()}
    needed = [next((k for k, value in enumerate(each, 1) if value <= 1.05), None) for each in worst.values()]
    if None not in needed:
        return (f"{_configs(max(needed))} for each kernel, dtype and head size would do: "
                "each job then has one within 5% of its best")
    left = max(each[-1] for each in worst.values())
    most = _configs(max(map(len, worst.values())))
    return f"With {most} for each kernel, dtype and head size, " + (
        f"a slowdown of {left:.2f} is left at the worst" if left < math.inf else "there are jobs for which none is ok")


def _configs(count: int) -> str:
    return f"{count} config{'s' * (count > 1)}"


def _found_by_model(jobs) -> str:
    early = sum(job.place <= 8 for job in jobs)
    return (f"{_correlation(jobs)} between model and measurement; "
            f"the winner is among the model's first 8 in {early} of {len(jobs)} jobs")


def _correlation(jobs) -> str:
    known = [job.spearman for job in jobs if job.spearman is not None]
    return f"Spearman {statistics.median(known):.2f}" if known else "Spearman unknown"


def _grid(figure: Figure, count: int, width: float, height: float) -> list[Axes]:
    """So many panels in rows, each of this size in inches."""
    rows = math.ceil(count / COLUMNS)
    columns = math.ceil(count / rows)
    figure.set_size_inches(max(width * columns + 0.8, 7), height * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    return panels[:count]


def _heat(figure: Figure, jobs) -> str:
    configs = [Config.parse(config) for job in jobs for config in job.job.configs]
    rows, columns = (sorted({getattr(config, side) for config in configs}) for side in ("block_m", "block_n"))
    width = 0.9 + 0.78 * len(columns)
    panels = _grid(figure, len(jobs), width, 1.1 + 0.52 * len(rows))
    for axes, job in zip(panels, jobs):
        for i, m in enumerate(rows):
            for j, n in enumerate(columns):
                _cell(axes, j, i, *_tile(job, m, n))
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xlabel="BLOCK_N (keys)", ylabel="BLOCK_M (queries)")
        axes.set_title("\n".join([job.job.kernel, *textwrap.wrap(str(job.job.problem), int(width / 0.09))]), loc="left")
        axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(ScalarMappable(SCALE, COLORS), ax=panels, label="time / job's best", extend="max", pad=0.01,
                          aspect=12 * math.ceil(len(jobs) / COLUMNS))
    bar.ax.yaxis.set_major_locator(FixedLocator([1, 1.1, 1.25, 1.5, WORST]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return ("In each tile, the least time over warps and stages as a multiple of the job's best, and its warps (w) and stages "
            "(s); framed: the best. Hatched: no time, and the most frequent reason; empty: no such config in the plan.")


def _tile(job, m, n) -> tuple[str | None, float | None]:
    """(what stands in a tile's place, its slowdown); nothing where no config of this tile was planned."""
    planned = [text for text in job.job.configs if (config := Config.parse(text)).block_m == m and config.block_n == n]
    timed = {config: job.slowdowns[config] for config in planned if config in job.slowdowns}
    if timed:
        best = min(timed, key=timed.get)
        return f"{timed[best]:.2f}\nw{best.partition('w')[2]}", timed[best]
    if not planned:
        return None, None
    # a config with status ok is among those above
    reasons = [job.trials[config].status for config in planned if config in job.trials]
    reason = statistics.mode(reasons) if reasons else "not tried"
    return SHORT.get(reason, reason).replace(" ", "\n"), None


def _cell(axes: Axes, column: int, row: int, text: str | None, slowdown: float | None) -> None:
    middle = {"x": column + 0.5, "y": row + 0.5, "ha": "center", "va": "center", "fontsize": 8.5, "linespacing": 1.15}
    if slowdown is not None:
        red, green, blue, _ = face = COLORS(SCALE(min(slowdown, WORST)))
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="white", linewidth=1))
        axes.text(s=text, color="white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black", **middle)
        if slowdown == 1:
            axes.add_patch(Rectangle((column + 0.04, row + 0.05), 0.92, 0.9, fill=False, edgecolor="#d55e00", linewidth=2.5))
    elif text is not None:
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor="white", edgecolor="#c4c4c4", hatch="/////", linewidth=0))
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="white", linewidth=2))
        axes.text(s=text, color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1}, **middle)


def _slowdown(figure: Figure, jobs) -> str:
    figure.set_size_inches(10, 4.7)
    axes = figure.add_subplot()
    worst = max(max(job.slowdowns.values()) for job in jobs)
    for job, (color, dashes, marker) in zip(jobs, LINES):
        values = list(job.slowdowns.values())
        share = [100 * (i + 1) / len(values) for i in range(len(values))]
        axes.plot(share, values, color=color, linestyle=dashes, linewidth=1.8, marker=marker, markersize=4.5,
                  label=job.job.name)
    axes.set(xlim=(0, 102), xlabel="configs that were timed and are ok, the fastest first (% of the job's)",
             ylabel="time, as a multiple of the job's best")
    _slowdown_axis(axes, worst, 0.06)
    _legend(figure, jobs)
    return "A point for each config: the lower and the longer a line stays low, the less a choice matters."


def _legend(figure: Figure, jobs) -> None:
    """The jobs' names under the panels, side by side where they are short enough."""
    columns = 2 if max(len(job.job.name) for job in jobs) <= 48 else 1
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, handlelength=3)
    figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(jobs) / columns))


def _slowdown_axis(axes: Axes, worst: float, apart: float) -> None:
    """A logarithmic axis from the best on, with a line at round slowdowns that lie so far apart, as a share of its height."""
    height, kept = math.log(max(1.04 * worst, 1.12)), [1]
    for tick in TICKS:
        if apart * height <= math.log(tick / kept[-1]) and math.log(tick) < height:
            kept.append(tick)
    axes.set_yscale("log")
    axes.set_ylim(math.exp(-0.04 * height), math.exp(1.04 * height))
    axes.yaxis.set_major_locator(FixedLocator(kept))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=PALE, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _coverage(figure: Figure, groups) -> str:
    panels = _grid(figure, len(groups), 3.1, 2.9)
    worst = max((cover.worst for _, covers in groups for cover in covers if cover.worst < math.inf), default=1)
    for axes, ((kernel, dtype, head), covers) in zip(panels, groups):
        xs = range(1, len(covers) + 1)
        axes.plot(xs, [cover.worst if cover.worst < math.inf else math.nan for cover in covers], color="#d55e00", marker="o",
                  markersize=10, markerfacecolor="white", label="worst job")
        axes.plot(xs, [cover.mean for cover in covers], color="#0072b2", marker="s", linestyle=(0, (5, 1.5)),
                  label="geometric mean of the jobs")
        for x, cover in zip(xs, covers):
            if cover.without:
                axes.text(x, 0.97, f"{cover.without} without", transform=axes.get_xaxis_transform(), rotation=90, ha="center",
                          va="top", fontsize=8.5, color=GREY)
        _slowdown_axis(axes, worst, 0.14)
        axes.set_title(f"{kernel}\n{dtype}, head size {head}", loc="left")
        axes.set(xlim=(0.6, len(covers) + 0.4), ylabel="time / job's best")
        axes.set_xticks(xs, [f"{k}: {'+' * (k > 1)}{cover.configs[-1]}" for k, cover in enumerate(covers, 1)], rotation=30,
                        ha="right", rotation_mode="anchor", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return ("How much longer than its own best a job takes when each has only the best of so many configs; each step adds the "
            "one that helps most. Without: jobs for which none of them is ok.")


def _points(job) -> list[tuple[float, float]]:
    """(modelled cycles, measured seconds) of each config that has both."""
    both = [(job.trials[config].static.get("cycles"), job.trials[config].seconds) for config in job.slowdowns]
    return [(cycles, seconds) for cycles, seconds in both if cycles]


def _model(figure: Figure, jobs) -> str:
    kernels = list(dict.fromkeys(job.job.kernel for job in jobs))
    panels = dict(zip(kernels, _grid(figure, len(kernels), 4.2, 4.4)))
    figure.set_figwidth(max(figure.get_figwidth(), 10))
    for job, (color, _, marker) in zip(jobs, LINES):
        cycles, seconds = zip(*_points(job))
        panels[job.job.kernel].scatter(cycles, seconds, s=26, color=color, marker=marker, alpha=0.85, linewidths=0,
                                       label=job.job.name)
    for kernel, axes in panels.items():
        shown = [job for job in jobs if job.job.kernel == kernel]
        axes.set_title(f"{kernel}: {_correlation(shown)}" + f", median of {len(shown)} jobs" * (len(shown) > 1), loc="left")
        points = [point for job in shown for point in _points(job)]
        _log_axis(axes.xaxis, axes.set_xlim, [cycles for cycles, _ in points], EngFormatter(sep=""))
        _log_axis(axes.yaxis, axes.set_ylim, [seconds for _, seconds in points], EngFormatter("s"))
        axes.set(xlabel="modelled time (cycles of an SM)", ylabel="measured time")
        rate = statistics.median(seconds / cycles for cycles, seconds in points)
        ends = [min(cycles for cycles, _ in points), max(cycles for cycles, _ in points)]
        axes.plot(ends, [rate * end for end in ends], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
        axes.grid(color=PALE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, jobs)
    return "A point for each config that is ok. Dashed: in proportion. The model claims an order within a job, and no times."


def _log_axis(axis: Axis, limit: Callable, values: Sequence[float], form: EngFormatter) -> None:
    """A logarithmic axis around these values, with round numbers at it, however near they lie to each other."""
    low, high = min(values) / 1.25, max(values) * 1.25
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    limit(low, high)
    steps = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 6, 8)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(form)
    axis.set_minor_locator(NullLocator())
