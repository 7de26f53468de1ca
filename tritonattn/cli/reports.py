"""Compile reports as a table, side by side, and as JSON."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict

from ..analysis import sass
from ..analysis.compile_report import KernelReport
from ..analysis.cost_model import estimate
from ..autotune.prune import REASONS, check_report
from .format import columns

UNITS = ("tensor", "special", "fp32", "alu", "issue", "shared")
SHORT = {"shared memory": "smem", "tensor memory": "tmem"}
HEAD = ["GPU", "kernel", "config", "regs", "stack", "spills", "smem", "tmem", "blocks/SM", "mma", "work", "beside",
        *UNITS, "bound", "of peak"]
FIGURES = ("registers", "stack", "loop_spills", "accumulation", "scalar", "spilled", "shared_memory", "tensor_memory",
           "fits", "threads", "occupancy", "occupancy_limiter", "blocks_by_resource", "precision", "serialized", "race",
           "mma_instruction")


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
    least = min(each.loops[0].softmax_beside_products for each in report.passes)
    beside = f"{least:.0%}" if "HGMMA" in report.mma_instruction else "-"
    cycles = [f"{model.units[unit]:.0f}" for unit in UNITS]
    share = f"{100 * model.likely[0]:.0f}-{model.likely[1]:.0%}" if model.likely else f"model {model.share:.0%}"
    return [*row, report.mma_instruction or "none", work, beside, *cycles, model.bound, share]


def warnings(reports: Sequence[KernelReport]) -> list[str]:
    """Return one line per kernel that pruning would reject, with the reason."""
    verdicts = [(report, check_report(report)) for report in reports if report.kernel != "delta"]
    return [f"{report.gpu.arch} {report.kernel} {report.config}: {verdict.reason}: {REASONS[verdict.reason]}"
            + (f" ({verdict.note})" if verdict.note else "") for report, verdict in verdicts if verdict.reason]


def side_by_side(reports: Sequence[KernelReport]) -> str:
    """Format one column per report and one line per figure that is not zero; instructions are per warp."""
    figures = [dict(_flatten(_figures(report))) for report in reports]
    rows = [[name, *(each.get(name, "0") for each in figures)] for name in dict.fromkeys(itertools.chain(*figures))]
    shown = [row for row in rows if not {*row[1:]} <= {"0", "0.0", "None"}]
    title = f"{reports[0].kernel} on {reports[0].gpu.name} ({reports[0].gpu.arch}), {reports[0].problem}"
    return "\n".join([title, *columns([["", *(str(report.config) for report in reports)], *shown]), *warnings(reports)])


def _flatten(value, name: str = ""):
    """Yield (name, text) for every number and word in nested plain data; the names of the levels are joined."""
    if isinstance(value, dict | list | tuple):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flatten(each, f"{name} {key}".strip())
    else:
        yield name, str(round(value, 3) if isinstance(value, float) else value)


def as_json(report: KernelReport) -> dict:
    """Return a report and its estimate as plain data, without the text of the loops."""
    return {"kernel": report.kernel, "gpu": report.gpu.name, "arch": report.gpu.arch, "config": str(report.config),
            "problem": report.problem.as_json(), "warnings": warnings([report])} | _figures(report)


def _figures(report):
    model = estimate(report)
    return {name: getattr(report, name) for name in FIGURES} | {
        "loops": [{"part": each.part, "instructions": len(loop.instructions), "products": loop.products,
                   "softmax_beside_products": loop.softmax_beside_products,
                   "kinds": {kind: loop.counts.get(kind, 0) for kind in sass.KINDS}}
                  for each in report.passes for loop in each.loops],
        "model": None if model is None else {"bound": model.bound} | asdict(model),
    }
