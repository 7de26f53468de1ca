"""The config that each kernel of a call would use, its origin, the rejected configs, and what bounds the kernel."""

from dataclasses import asdict, dataclass

from .. import config, gpu
from ..configs import lookup
from ..configs.shipped import SOURCES, Entry
from ..configs.user_cache import Record
from ..gpu import Gpu
from ..problem import Problem
from ..runtime.packed_arguments import problem_of


@dataclass(frozen=True)
class KernelChoice:
    """The config of one kernel of a call."""

    kernel: str
    config: str
    origin: str                # "pinned", or one of configs.lookup.ORIGINS
    table: str | None          # the file in configs/data/
    entry: Entry | None        # the recorded figures of the config's binary
    lost: dict[str, str]       # {config: reason} of the rejected and the slower ones
    record: Record | None = None  # of the user cache

    def __str__(self):
        origin = lookup.ORIGINS.get(self.origin, self.origin) + (f" ({self.table}.json)" if self.table else "")
        notes = []
        if self.record:
            run, default = self.record.run, self.record.default_seconds
            untuned = f"; {self.record.default}, the config without tuning, took {default * 1e6:.0f}" if default else ""
            load = " windows of continuous load" if self.record.sustained else ""
            load += f" at {self.record.clock:.0f} MHz" if self.record.clock else ""
            notes = [f"measured: {self.record.seconds * 1e6:.0f} us, the median of {self.record.samples}{load}{untuned}",
                     f"by {run.get('strategy')} on {run['time']}, with Triton {self.record.versions['triton']}; "
                     f"{run.get('trials')} configs tried"]
        if self.entry:
            notes.append(f"{self.entry.source}, {SOURCES[self.entry.source]}")
        if figures := self.entry.as_json() if self.entry else self.record and self.record.static:
            notes += _describe_figures(figures)
        if self.entry and self.entry.accepted_fault:
            notes.append(f"despite {self.entry.accepted_fault}: no better config was found")
        for reason in dict.fromkeys(self.lost.values()):
            notes.append(f"{reason}: {', '.join(name for name, why in self.lost.items() if why == reason)}")
        return f"\n{' ' * 11}".join([f"{self.kernel:11}{self.config:16}{origin}", *notes])


@dataclass(frozen=True)
class Explanation:
    """The configs of a call, kernel by kernel. `str` formats them; `as_json` returns plain data."""

    problem: Problem
    gpu: Gpu
    lines: tuple[KernelChoice, ...]

    def as_json(self) -> dict:
        return {"problem": self.problem.as_json(), "gpu": self.gpu.name, "arch": self.gpu.arch,
                "kernels": [asdict(line) | {"entry": line.entry and line.entry.as_json(),
                                            "record": line.record and line.record.as_json()} for line in self.lines]}

    def __str__(self):
        return "\n".join([f"{self.problem}", f"on {self.gpu.name} ({self.gpu.arch})", *(f"\n{line}" for line in self.lines)])


def _describe_figures(figures: dict) -> list[str]:
    """Format the recorded figures of a binary in one line, if there are any."""
    if figures.get("registers") is None:
        return []
    bound = f"bound by {figures['bound']}; " if figures.get("bound") else ""
    blocks = figures.get("occupancy")
    occupancy = "" if blocks is None else f", {blocks} block{'s' * (blocks != 1)} per SM"
    return [f"{bound}{figures['registers']} registers, {figures['shared_memory']} bytes of shared memory{occupancy}"]


def explain(q, k, v, **options) -> Explanation:
    """Return the configs that `attention(q, k, v, **options)` would use, without running it.

    The arguments and errors are those of `attention`; with cu_seqlens_q, of `attention_varlen`. Printing the result shows, for
    each kernel, the config, its origin, the registers and memory of its binary, and the configs that were rejected, with a
    reason.
    """
    return explain_problem(problem_of(q, k, v, **options), gpu.gpu_of(q.device))


def explain_problem(problem: Problem, target: Gpu) -> Explanation:
    """Return the configs that the kernels of a problem would use on a GPU, which need not be present.

    Raises RuntimeError: the kernels do not support the GPU or the head size.
    """
    limit = target.largest_head(problem.dtype)
    if max(problem.d, problem.dv) > limit:
        raise RuntimeError(f"head size: expected at most {limit} in {problem.dtype} on {target.name}, got "
                           f"{max(problem.d, problem.dv)}")
    kernels = ("forward", "delta", "dq", "dkdv") if problem.normalizer == "softmax" else ("forward", "dq", "dkdv")
    kernels += ("dbias",) if problem.bias is not None else ()
    kernels += ("diagonals",) if problem.alibi or problem.relative else ()
    kernels += ("key_mass", "mass_delta") if problem.key_mass else ()
    return Explanation(problem, target, tuple(_line(kernel, problem, target) for kernel in kernels))


def _line(kernel, problem, target):
    if (pinned := config.pinned_config(kernel)) is not None:
        return KernelChoice(kernel, str(pinned), "pinned", None, None, {})
    choice = lookup.lookup_config(kernel, problem, target)
    entry = getattr(choice.row, choice.fill) if choice.row else None
    lost = choice.row.rejected if choice.row else {}
    if choice.record and choice.record.default != choice.record.config:
        lost = {str(choice.record.default): "slower" if choice.record.default_seconds else "could not be timed"}
    return KernelChoice(kernel, str(choice.config), choice.origin, choice.table, entry, lost, choice.record)
