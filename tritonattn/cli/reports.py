"""Compile reports as a table, side by side, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict

from ..analysis import sass
from ..analysis.compile_report import KernelReport
from ..analysis.cost_model import estimate
from ..autotune.prune import REASONS, check_report
from .format import columns

UNITS = ("tensor", "special", "fp32", "alu", "issue", "shared")
SHORT = {"shared memory": "smem", "tensor memory": "tmem"}
HEAD = ["GPU", "kernel", "config", "regs", "stack", "spills", "smem", "tmem", "blocks/SM", "mma", "work", *UNITS, "bound",
        "of peak"]
FIGURES = ("registers", "stack", "spills", "loop_spills", "shared_memory", "tensor_memory", "threads", "occupancy",
           "occupancy_limiter")
FIGURES_OF_AMD = ("accumulation", "scalar", "spilled")


def table(reports: Sequence[KernelReport]) -> str:
    """Format one line per report. The units' columns are cycles of an SM in one iteration of the loop without a mask."""
    return "\n".join([*columns([HEAD, *map(_row, reports)], left=(0, 1, 2, 9)), *warnings(reports)])


def _row(report):
    model, limiter = estimate(report), report.occupancy_limiter
    row = [f"{report.gpu.name}, {report.gpu.arch}", report.kernel, str(report.config), str(report.registers),
           str(report.stack), str(report.loop_spills), f"{report.shared_memory / 1024:g}K", str(report.tensor_memory),
           f"{report.occupancy} ({SHORT.get(limiter, limiter)})"]
    if model is None:
        return row + ["-"] * (len(HEAD) - len(row))
    work = f"{report.duplicated:.2f}x" if report.mma_instruction else "-"
    cycles = [f"{model.units[unit]:.0f}" for unit in UNITS]
    return [*row, report.mma_instruction or "none", work, *cycles, model.bound, f"{model.share:.0%}"]


def warnings(reports: Sequence[KernelReport]) -> list[str]:
    """Return one line per kernel that pruning would reject, with the reason."""
    verdicts = [(report, check_report(report)) for report in reports if report.kernel != "delta"]
    return [f"{report.gpu.arch} {report.kernel} {report.config}: {verdict.reason}: {REASONS[verdict.reason]}"
            + (f" ({verdict.note})" if verdict.note else "") for report, verdict in verdicts if verdict.reason]


def side_by_side(reports: Sequence[KernelReport]) -> str:
    """Format one column per report and one line per figure; instructions are per warp, in the loop without a mask."""
    all_figures = [figures(report) for report in reports]
    rows = [["", *(str(report.config) for report in reports)]]
    rows += [[name, *(str(each.get(name, 0)) for each in all_figures)]
             for name in dict.fromkeys(name for each in all_figures for name in each)]
    title = f"{reports[0].kernel} on {reports[0].gpu.name} ({reports[0].gpu.arch}), {reports[0].problem}"
    return "\n".join([title, *columns(rows), *warnings(reports)])


def figures(report: KernelReport) -> dict:
    """Return every figure of a report by its name in `side_by_side`."""
    names = FIGURES + FIGURES_OF_AMD if report.gpu.is_amd else FIGURES
    rows = {name.replace("_", " "): getattr(report, name) for name in names}
    for loop in report.loops[:1]:
        rows |= {"instructions": len(loop.instructions), **{f"  {name}": n for name, n in loop.products.items()}}
        rows |= {f"  {kind}": loop.counts[kind] for kind in sass.KINDS if kind in loop.counts and kind != "tensor"}
    if (model := estimate(report)) is not None:
        rows |= {f"cycles: {unit}": round(model.units[unit]) for unit in UNITS}
        rows |= {"cycles per iteration": round(model.iteration[0]), "bound by": model.bound, "waves": model.waves,
                 "share of peak": f"{model.share:.1%}"}
    return rows


def as_json(report: KernelReport) -> dict:
    """Return a report and its estimate as plain data, without the text of the loops."""
    model = estimate(report)
    names = (*FIGURES, *FIGURES_OF_AMD, "kernel", "fits", "blocks_by_resource", "precision", "serialized", "mma_instruction")
    return {name: getattr(report, name) for name in names} | {
        "gpu": report.gpu.name, "arch": report.gpu.arch, "config": str(report.config), "problem": report.problem.as_json(),
        "loops": [{"instructions": len(loop.instructions), "kinds": loop.counts, "products": loop.products}
                  for loop in report.loops],
        "model": None if model is None else asdict(model) | {"bound": model.bound}, "warnings": warnings([report]),
    }
