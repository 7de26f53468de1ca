"""What this machine has, whether the parts belong together, and what to type where they do not.

A finding is ok; or a note, good to know; or bad: kernels will not run, or not as they should, and then it says how
to mend that. Looking writes nothing and takes no memory of a GPU.
"""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils import collect_env

from .. import gpu
from ..gpu import INTERPRETED, TRITON
from .. import __version__

LEAST_TORCH, LEAST_TRITON = (2, 11), (3, 6)
LEAST_ROOM = 100 << 20  # bytes; a compiled kernel with all its intermediate forms takes about one hundredth


@dataclass(frozen=True)
class Finding:
    """One thing looked at, what was found, and its status: ok, note or bad."""

    name: str
    value: str
    status: str = "ok"
    mend: str | None = None


def findings() -> list[Finding]:
    """Everything looked at, in the order in which one part needs another."""
    return [Finding("python", platform.python_version()), Finding("tritonattn", __version__), of_torch(), of_triton(),
            of_numpy(), *of_gpus(), of_interpreter(), of_cache()]


def table(found: list[Finding]) -> str:
    """Findings in columns, each bad one with its mend below, and a verdict."""
    width = max(len(finding.name) for finding in found)
    lines = []
    for finding in found:
        lines.append(f"{finding.name:{width}}  {finding.status:4}  {finding.value}")
        if finding.mend:
            lines.append(f"{'':{width}}        mend: {finding.mend}")
    bad = [finding.name for finding in found if finding.status == "bad"]
    return "\n".join([*lines, f"will not work: {', '.join(bad)}" if bad else "all well"])


def as_json(found: list[Finding]) -> list[dict]:
    return [asdict(finding) for finding in found]


def compiles() -> bool:
    """Whether kernels are compiled here, for a GPU; else they can only be interpreted."""
    return TRITON and not INTERPRETED and torch.cuda.is_available()


def of_torch() -> Finding:
    cuda, hip = torch.version.cuda, torch.version.hip
    value = f"{torch.__version__} ({f'CUDA {cuda}' if cuda else f'ROCm {hip}' if hip else 'not built for a GPU'})"
    if _release(torch.__version__) < LEAST_TORCH:
        return Finding("torch", f"expected 2.11 or newer, got {value}", "bad", "pip install --upgrade 'torch>=2.11'")
    return Finding("torch", value)


def of_triton() -> Finding:
    """Triton: torch's builds for a GPU say which one they go with."""
    version, pin = _version("triton"), pinned_by_torch()
    mend = f"pip install '{pin or 'triton>=3.6'}'"
    if version is None:
        return Finding("triton", "missing", "bad", mend)
    if _release(version) < LEAST_TRITON:
        return Finding("triton", f"expected 3.6 or newer, got {version}", "bad", mend)
    if pin and _release(version) != _release(pin):
        return Finding("triton", f"expected {pin}, which this torch asks for, got {version}", "bad", mend)
    return Finding("triton", version)


def pinned_by_torch() -> str | None:
    """The requirement on Triton that torch declares, "triton==3.7.1"; None if there is none that can be met."""
    try:
        requirements = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        # ROCm's is called triton-rocm, or pytorch-triton-rocm; a marker says on which system it holds
        match = re.match(r"((?:pytorch-)?triton(?:-\w+)?)\s*\(?([=~]=)\s*([\w.+]+)", requirement)
        if match and _release(match[3]) >= LEAST_TRITON and platform.system() in requirement.partition(";")[2]:
            return "".join(match.groups())
    return None


def of_numpy() -> Finding:
    version = _version("numpy")
    return Finding("numpy", version) if version else Finding("numpy", "missing; only the interpreter needs it", "note")


def of_gpus() -> list[Finding]:
    """The models of GPU, and NVIDIA's driver."""
    version = collect_env.get_nvidia_driver_version(collect_env.run) if torch.version.cuda else None
    driver = [Finding("driver", version)] if version else []
    if not torch.cuda.is_available():
        return [Finding("gpu", "none that torch can use", "note"), *driver]
    count = torch.cuda.device_count()
    if INTERPRETED:
        return [Finding("gpu", f"{count} found, none used: TRITON_INTERPRET is set", "note"), *driver]
    models = Counter(gpu.of(torch.device("cuda", i)) for i in range(count))
    return [Finding("gpu", f"{many} x {model.name}, {model.arch}, {model.shared_memory >> 10} KiB of shared memory")
            for model, many in models.items()] + driver


def of_interpreter() -> Finding:
    """Whether kernels can run without a GPU; bad only where they would have to."""
    state = "on: TRITON_INTERPRET is set" if INTERPRETED else "off: TRITON_INTERPRET is not set"
    trouble, mend = _interpreter_trouble()
    if trouble:
        return Finding("interpreter", f"{state}; {trouble}", "note" if compiles() else "bad", mend)
    if compiles() or INTERPRETED:
        return Finding("interpreter", state)
    return Finding("interpreter", "off: without a GPU, set TRITON_INTERPRET=1 before tritonattn is imported", "note")


def _interpreter_trouble() -> tuple[str, str] | tuple[None, None]:
    """What keeps the interpreter from working, and its mend."""
    if _version("triton") is None:
        return "it needs triton, which is missing", of_triton().mend
    if _version("numpy") is None:
        return "it needs numpy, which is missing", "pip install numpy"
    from ..runtime.interpreter import problem

    text, _, mend = (problem() or "").partition(": ")
    return (text, mend) if text else (None, None)


def of_cache() -> Finding:
    """Where Triton keeps compiled kernels; where it only interprets, it keeps none."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache")).absolute()
    exists = next((path for path in (folder, *folder.parents) if os.path.exists(path)), None)
    if exists is None or not os.path.isdir(exists) or not os.access(exists, os.W_OK | os.X_OK):
        value = f"{folder}: expected a folder that can be written"
    elif (free := shutil.disk_usage(exists).free) < LEAST_ROOM:
        value = f"{folder}: expected room for kernels, got {free >> 20} MiB"
    else:
        return Finding("cache", f"{folder}, {'' if exists == folder else 'still to be made, '}{free >> 30} GiB free")
    return Finding("cache", value, "bad" if compiles() else "note", "set TRITON_CACHE_DIR to a folder with room, writable")


def _version(name: str) -> str | None:
    """The version of a module; None if it is missing."""
    try:
        return importlib.import_module(name).__version__
    except ImportError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The two numbers that tell releases apart: (3, 7) for "triton==3.7.1"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
