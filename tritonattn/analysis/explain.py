"""Which config each kernel of a call would use, where it comes from, why others lost, and what bounds it."""

from dataclasses import asdict, dataclass

from .. import config, gpu
from ..configs import lookup
from ..configs.shipped import SOURCES, Entry
from ..configs.user_cache import Record
from ..gpu import Gpu
from ..problem import Problem
from ..runtime.arguments import problem_of

ENGINE = "the portable Triton kernels"


@dataclass(frozen=True)
class KernelChoice:
    """One kernel of a call."""

    kernel: str
    config: str
    origin: str                # "pinned", or one of config.ORIGINS
    table: str | None          # the file in configs/
    entry: Entry | None        # what is known of the config's binary
    lost: dict[str, str]       # {config: reason}, of those that were out or slower
    record: Record | None = None  # of the user's cache
    pinned: dict | None = None    # what the lens sees of a pinned config's binary, as far as it can be compiled here

    @property
    def seen(self) -> dict | None:
        """Registers, shared memory, occupancy and what bounds the loop, from wherever they are known."""
        return self.pinned or (self.entry.as_json() if self.entry else self.record and self.record.static)


@dataclass(frozen=True)
class Explanation:
    """What would run, kernel by kernel. `str` prints it; `as_json` gives plain data."""

    problem: Problem
    gpu: Gpu
    lines: tuple[KernelChoice, ...]

    def as_json(self) -> dict:
        return {"problem": self.problem.as_json(), "gpu": self.gpu.name, "arch": self.gpu.arch, "engine": ENGINE,
                "kernels": [asdict(line) | {"entry": line.entry and line.entry.as_json(),
                                            "record": line.record and line.record.as_json()} for line in self.lines]}

    def __str__(self):
        text = [f"{self.problem}", f"on {self.gpu.name} ({self.gpu.arch}); engine: {ENGINE}"]
        for line in self.lines:
            origin = "pinned" if line.origin == "pinned" else lookup.ORIGINS[line.origin]
            text.append(f"\n{line.kernel:9}{line.config:16}{origin}" + (f" ({line.table}.json)" if line.table else ""))
            if line.record:
                text += [f"{'':9}{told}" for told in _told(line.record)]
            if line.entry:
                text.append(f"{'':9}{line.entry.source}, {SOURCES[line.entry.source]}")
            if line.pinned and "refused" in line.pinned:
                text.append(f"{'':9}the compiler refuses it: {line.pinned['refused']}")
            elif line.seen and line.seen.get("registers") is not None:
                text.append(f"{'':9}{_in_words(line.seen)}")
            if line.entry and line.entry.accepted_fault:
                text.append(f"{'':9}in spite of {line.entry.accepted_fault}: nothing better was found")
            for reason in dict.fromkeys(line.lost.values()):
                names = ", ".join(name for name, why in line.lost.items() if why == reason)
                text.append(f"{'':9}{reason}: {names}")
        return "\n".join(text)


def _in_words(seen: dict) -> str:
    """What a binary takes, as far as it is known."""
    bound = f"bound by {seen['bound']}; " if seen.get("bound") else ""
    blocks = seen.get("occupancy")
    beside = "" if blocks is None else f", {blocks} block{'s' * (blocks != 1)} per SM"
    return (f"{bound}{seen['registers']} registers, {seen['shared_memory']} bytes of shared memory{beside}"
            f"{'' if seen.get('fits', True) else ': more than this GPU has'}")


def _told(record: Record) -> list[str]:
    """A record in a few lines."""
    run, default = record.run, record.default_seconds
    than = f"; {record.default}, which a call would have used, took {default * 1e6:.0f}" if default else ""
    return [f"measured: {record.seconds * 1e6:.0f} us, the median of {record.samples}{than}",
            f"by {run.get('strategy')} on {run['time']}, with Triton {record.versions['triton']}; "
            f"{run.get('trials')} configs tried"]


def explain(q, k, v, **options) -> Explanation:
    """What `attention(q, k, v, **options)` would run, and why; nothing runs. The same options, and the same errors."""
    return explain_problem(problem_of(q, k, v, **options), gpu.gpu_of(q.device))


def explain_problem(problem: Problem, on: Gpu) -> Explanation:
    """The same for a problem without tensors. RuntimeError for a GPU that the kernels do not run on, or not with such heads."""
    most = on.largest_head(problem.dtype)
    if max(problem.d, problem.dv) > most:
        raise RuntimeError(f"head size: expected at most {most} in {problem.dtype} on {on.name}, got "
                           f"{max(problem.d, problem.dv)}")
    kernels = ("forward", "delta", "dq", "dkdv") + (("dbias",) if problem.bias is not None else ())
    return Explanation(problem, on, tuple(_line(kernel, problem, on) for kernel in kernels))


def _line(kernel, problem, on):
    if (pinned := config.pinned_config(kernel)) is not None:
        return KernelChoice(kernel, str(pinned), "pinned", None, None, {}, pinned=_compiled(kernel, problem, pinned, on))
    found = lookup.lookup_config(kernel, problem, on)
    entry = getattr(found.row, found.fill) if found.row else None
    lost = found.row.rejected if found.row else {}
    if found.record and found.record.default != found.record.config:
        lost = {str(found.record.default): "slower" if found.record.default_seconds else "it could not be timed"}
    return KernelChoice(kernel, str(found.config), found.origin, found.table, entry, lost, found.record)


def _compiled(kernel, problem, pinned, on) -> dict | None:
    """What the lens sees of a config, or why the compiler refuses it; None without Triton and where kernels are interpreted."""
    if gpu.INTERPRETED or not gpu.TRITON:
        return None
    from . import compile_report, cost_model  # they need Triton

    try:
        report = compile_report.inspect_kernel(kernel, problem, pinned, on)
    except Exception as error:  # whatever the compiler raises is told
        return {"refused": f"{type(error).__name__}: {str(error)[:200]}"}
    estimate = cost_model.estimate(report)
    return {"registers": report.registers, "shared_memory": report.shared_memory, "occupancy": report.occupancy,
            "bound": estimate and estimate.bound, "fits": report.fits, "loop_spills": report.loop_spills}
