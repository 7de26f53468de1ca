"""Which config each kernel of a call would use, where it comes from, why others lost, and what bounds it."""

from dataclasses import asdict, dataclass

from . import config, gpu
from .attention import posed
from .cache import Record
from .gpu import Gpu
from .problem import Problem
from .tables import SOURCES, Entry


@dataclass(frozen=True)
class Line:
    """One kernel of a call."""

    kernel: str
    config: str
    origin: str                # "pinned", or one of config.ORIGINS
    table: str | None          # the file in configs/
    entry: Entry | None        # what is known of the config's binary
    lost: dict[str, str]       # {config: reason}, of those that were out or slower
    record: Record | None = None  # of the user's cache


@dataclass(frozen=True)
class Explanation:
    """What would run, kernel by kernel. `str` prints it; `as_json` gives plain data."""

    problem: Problem
    gpu: Gpu
    lines: tuple[Line, ...]

    def as_json(self) -> dict:
        return {"problem": self.problem.as_json(), "gpu": self.gpu.name, "arch": self.gpu.arch,
                "kernels": [asdict(line) | {"record": line.record and line.record.as_json()} for line in self.lines]}

    def __str__(self):
        text = [f"{self.problem}", f"on {self.gpu.name} ({self.gpu.arch}); engine: the portable Triton kernels"]
        for line in self.lines:
            origin = "pinned" if line.origin == "pinned" else config.ORIGINS[line.origin]
            text.append(f"\n{line.kernel:9}{line.config:16}{origin}" + (f" ({line.table}.json)" if line.table else ""))
            if line.record:
                text += [f"{'':9}{told}" for told in _told(line.record)]
            if line.entry:
                e = line.entry
                seen = "" if e.registers is None else (
                    f"; bound by {e.bound}; {e.registers} registers, {e.shared_memory} bytes of shared memory, "
                    f"{e.occupancy} block{'s' * (e.occupancy > 1)} per SM")
                text.append(f"{'':9}{e.source}, {SOURCES[e.source]}{seen}")
                if e.exception:
                    text.append(f"{'':9}in spite of {e.exception}: nothing better was found")
            for reason in dict.fromkeys(line.lost.values()):
                names = ", ".join(name for name, why in line.lost.items() if why == reason)
                text.append(f"{'':9}{reason}: {names}")
        return "\n".join(text)


def _told(record: Record) -> list[str]:
    """A record in a few lines."""
    run, default = record.run, record.default_seconds
    than = f"; {record.default}, which a call would have used, took {default * 1e6:.0f}" if default else ""
    return [f"measured: {record.seconds * 1e6:.0f} us, the median of {record.samples}{than}",
            f"by {run.get('strategy')} on {run['time']}, with Triton {record.versions['triton']}; "
            f"{run.get('trials')} configs tried"]


def explain(q, k, v, **options) -> Explanation:
    """What `attention(q, k, v, **options)` would run, and why; nothing runs. The same options, and the same errors."""
    return of_problem(posed(q, k, v, **options), gpu.of(q.device))


def of_problem(problem: Problem, on: Gpu) -> Explanation:
    """The same for a problem without tensors. RuntimeError for a GPU that the kernels do not run on."""
    kernels = ("forward", "delta", "dq", "dkdv") + (("dbias",) if problem.bias is not None else ())
    return Explanation(problem, on, tuple(_line(kernel, problem, on) for kernel in kernels))


def _line(kernel, problem, on):
    if (pinned := config.pin(kernel)) is not None:
        return Line(kernel, str(pinned), "pinned", None, None, {})
    found = config.choose(kernel, problem, on)
    entry = getattr(found.row, found.fill) if found.row else None
    return Line(kernel, str(found.config), found.origin, found.table, entry, found.row.lost if found.row else {}, found.record)
