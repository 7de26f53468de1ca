"""Reports of the lens for people: a table, several side by side, JSON, and a picture of what keeps each unit busy."""

from collections.abc import Sequence
from dataclasses import asdict

from ..analysis import sass
from ..analysis.compile_report import KernelReport
from ..analysis.cost_model import Estimate, estimate
from ..autotune.prune import REASONS, check_report

UNITS = ("tensor", "special", "fp32", "alu", "issue", "shared")
SHORT = {"shared memory": "smem", "tensor memory": "tmem"}


def table(reports: Sequence[KernelReport]) -> str:
    """A line for each report; the model's columns are cycles of an SM for one round of the loop without a mask."""
    head = ["GPU", "kernel", "config", "regs", "stack", "spills", "smem", "tmem", "blocks/SM", "products", "work",
            *UNITS, "bound", "share"]
    rows = [head, *(_row(report) for report in reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(text.ljust(width) if i in (0, 1, 2, 9) else text.rjust(width)
                       for i, (text, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
    return "\n".join([*lines, *warnings(reports)])


def _row(report):
    found = estimate(report)
    first = [f"{report.gpu.name}, {report.gpu.arch}", report.kernel, str(report.config), str(report.registers),
             str(report.stack), str(report.loop_spills), f"{report.shared_memory / 1024:g}K", str(report.tensor_memory),
             f"{report.occupancy} ({SHORT.get(report.limit, report.limit)})"]
    if found is None:
        return first + ["-"] * (4 + len(UNITS))
    work = f"{report.duplicated:.2f}x" if report.path else "-"
    cycles = [f"{found.rounds[0][unit]:.0f}" for unit in UNITS]
    return [*first, report.path or "none", work, *cycles, found.bound, f"{found.share:.0%}"]


def warnings(reports: Sequence[KernelReport]) -> list[str]:
    """What speaks against these kernels, a line each."""
    found = [(report, check_report(report)) for report in reports if report.kernel != "delta"]
    return [f"{report.gpu.arch} {report.kernel} {report.config}: {verdict.reason}: {REASONS[verdict.reason]}"
            + (f" ({verdict.note})" if verdict.note else "") for report, verdict in found if verdict.reason]


def side_by_side(reports: Sequence[KernelReport]) -> str:
    """A column for each report, a line for each figure; instructions are those of the loop without a mask, of a warp."""
    columns = [figures(report) for report in reports]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [["", *(str(report.config) for report in reports)]]
    rows += [[name, *(str(column.get(name, 0)) for column in columns)] for name in names]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))])
             for row in rows]
    title = f"{reports[0].kernel} on {reports[0].gpu.name} ({reports[0].gpu.arch}), {reports[0].problem}"
    return "\n".join([title, *lines, *warnings(reports)])


def figures(report: KernelReport) -> dict:
    """Everything there is to say of one report, by name."""
    found = {"registers": report.registers, "stack": report.stack, "spills": report.spills, "loop spills": report.loop_spills,
             "shared memory": report.shared_memory, "tensor memory": report.tensor_memory, "threads": report.threads,
             "blocks per SM": report.occupancy, "limited by": report.limit}
    if report.gpu.is_amd:
        found |= {"accumulation registers": report.accumulation, "scalar registers": report.scalar,
                  "spilled registers": report.spilled}
    found |= {f"registers of partition {i}": registers for i, registers in enumerate(report.partitions)}
    for loop in (report.loops or ())[:1]:
        found |= {"instructions": len(loop.instructions), **{f"  {name}": n for name, n in loop.products.items()}}
        found |= {f"  {kind}": loop.counts[kind] for kind in sass.KINDS if kind in loop.counts and kind != "tensor"}
    if (model := estimate(report)) is not None:
        found |= {f"cycles: {unit}": round(model.rounds[0][unit]) for unit in UNITS}
        found |= {"cycles of a round": round(model.round_cycles[0]), "bound by": model.bound, "waves": model.waves,
                  "share of peak": f"{model.share:.1%}"}
    return found


def as_json(report: KernelReport) -> dict:
    """A report and its estimate as JSON knows them; without the text of the loops."""
    loops = None if report.loops is None else [{"instructions": len(loop.instructions), "kinds": loop.counts,
                                                "products": loop.products} for loop in report.loops]
    model = estimate(report)
    return {
        "kernel": report.kernel, "gpu": report.gpu.name, "arch": report.gpu.arch, "config": str(report.config),
        "problem": report.problem.as_json(), "registers": report.registers, "stack": report.stack,
        "spills": report.spills, "loop_spills": report.loop_spills,
        "shared_memory": report.shared_memory, "tensor_memory": report.tensor_memory,
        "accumulation": report.accumulation, "scalar": report.scalar, "spilled": report.spilled,
        "partitions": list(report.partitions),
        "threads": report.threads, "fits": report.fits, "occupancy": report.occupancy, "resident": report.resident,
        "precision": report.precision, "serialized": report.serialized, "path": report.path, "loops": loops,
        "model": None if model is None else asdict(model) | {"bound": model.bound},
        "warnings": warnings([report]),
    }


def plot(reports: Sequence[KernelReport], path: str) -> None:
    """A bar for each report, stacked of its units' cycles in one round of the loop without a mask, per score of the tile."""
    from matplotlib import style
    from matplotlib.figure import Figure

    from ..measure.drawing import rc_params

    shown: list[tuple[KernelReport, Estimate]] = [(report, found) for report in reports if (found := estimate(report)) is not None]
    with style.context(rc_params({})):
        figure = Figure(figsize=(9, 1.2 + 0.5 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        labels = [f"{report.gpu.name} {report.kernel}\n{report.config}" for report, _ in shown]
        left = [0.0] * len(shown)
        for unit in UNITS:
            # per 1000 scores, so that tiles of different sizes compare
            width = [1000 * found.rounds[0][unit] / (report.config.block_m * report.config.block_n) for report, found in shown]
            # at places and not at labels, of which two may be the same
            axes.barh(range(len(shown)), width, left=left, label=unit)
            left = [a + b for a, b in zip(left, width)]
        axes.set_yticks(range(len(shown)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("cycles of an SM that each unit is busy, per 1000 scores (units work side by side; the longest binds)")
        axes.legend(ncols=len(UNITS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        figure.savefig(path, dpi=150)
