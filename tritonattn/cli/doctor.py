"""Versions, GPUs and folders of this machine, and a fix for everything that does not work.

A finding is "ok", "note" (worth knowing) or "bad" (kernels do not run, or may give wrong results). A bad finding has a fix.
The checks write nothing and allocate no memory on a GPU.
"""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sysconfig
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import __version__, gpu
from ..gpu import INTERPRETED, TRITON
from ..measure.environment import driver_version
from .format import columns

MIN_TORCH, MIN_TRITON = (2, 11), (3, 6)
SAFE_PTXAS, SAFE_TRITON_ON_BLACKWELL = (13, 3), (3, 7, 1)
MIN_FREE = 100 << 20  # bytes; a compiled kernel with all its intermediate forms takes about one hundredth


@dataclass(frozen=True)
class Finding:
    """The state of one component: ok, note or bad."""

    name: str
    value: str
    status: str = "ok"
    fix: str | None = None


def findings() -> list[Finding]:
    """Return all findings, each component after those it needs."""
    return [Finding("python", platform.python_version()), Finding("tritonattn", __version__), of_torch(), of_triton(),
            of_numpy(), *of_gpus(), *of_compilers(), of_interpreter(), of_cache()]


def table(results: list[Finding]) -> str:
    """Format one line per finding, with its fix below, and a verdict."""
    rows = []
    for finding in results:
        rows.append((finding.name, finding.status, finding.value))
        if finding.fix:
            rows.append(("", "", f"fix: {finding.fix}"))
    bad = [finding.name for finding in results if finding.status == "bad"]
    return "\n".join([*columns(rows, left=(0, 1, 2)), f"problems: {', '.join(bad)}" if bad else "OK"])


def compiles() -> bool:
    """Return whether kernels are compiled for a GPU here; otherwise they can only be interpreted."""
    return TRITON and not INTERPRETED and torch.cuda.is_available()


def of_torch() -> Finding:
    """Check torch's version."""
    cuda, hip = torch.version.cuda, torch.version.hip
    value = f"{torch.__version__} ({f'CUDA {cuda}' if cuda else f'ROCm {hip}' if hip else 'CPU only'})"
    if _release(torch.__version__) < MIN_TORCH:
        return Finding("torch", f"expected 2.11 or newer, got {value}", "bad", "pip install --upgrade 'torch>=2.11'")
    return Finding("torch", value)


def of_triton() -> Finding:
    """Check Triton's version against ours and against the one that torch requires."""
    version, pin = _version("triton"), pinned_by_torch()
    if version and _release(version) >= MIN_TRITON and (not pin or _release(version) == _release(pin)):
        return Finding("triton", version)
    expected = f"{pin}, which this torch requires" if pin else "3.6 or newer"
    return Finding("triton", f"expected {expected}, got {version}" if version else "missing", "bad",
                   f"pip install '{pin or 'triton>=3.6'}'")


def pinned_by_torch() -> str | None:
    """Return torch's declared requirement on Triton, such as "triton==3.7.1"; None if there is none that we support."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for requirement in importlib.metadata.requires("torch") or ():
            # ROCm's is called triton-rocm, or pytorch-triton-rocm
            match = re.match(r"((?:pytorch-)?triton(?:-\w+)?)\s*\(?([=~]=)\s*([\w.+]+)", requirement)
            if match and _release(match[3]) >= MIN_TRITON:
                return "".join(match.groups())
    return None


def of_numpy() -> Finding:
    """Return NumPy's version, or a note if it is missing."""
    version = _version("numpy")
    return Finding("numpy", version) if version else Finding("numpy", "missing; only the interpreter needs it", "note")


def of_gpus() -> list[Finding]:
    """Return the models of GPU, and NVIDIA's driver."""
    driver = [Finding("driver", version)] if torch.version.cuda and (version := driver_version()) else []
    if not torch.cuda.is_available():
        return [Finding("gpu", "none that torch can use", "note"), *driver]
    count = torch.cuda.device_count()
    if INTERPRETED:
        return [Finding("gpu", f"{count} found, none used: TRITON_INTERPRET is set", "note"), *driver]
    models = Counter(gpu.gpu_of(torch.device("cuda", i)) for i in range(count))
    return [Finding("gpu", f"{number} x {model.name}, {model.arch}, {model.shared_memory >> 10} KiB of shared memory")
            for model, number in models.items()] + driver


def of_compilers() -> list[Finding]:
    """Check what compiles kernels and their launchers, if kernels are compiled here."""
    if not compiles():
        return []
    arches = {gpu.gpu_of(torch.device("cuda", i)).arch for i in range(torch.cuda.device_count())}
    return [of_c_compiler(), *filter(None, (of_ptxas(arches), of_fences(arches)))]


def of_c_compiler() -> Finding:
    """Check the C compiler and Python's headers, with which Triton builds its launchers (triton/runtime/build.py)."""
    names = [os.environ["CC"].partition(" ")[0]] if "CC" in os.environ else ["gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    # Debian's Python has a scheme of its own, which has no headers
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    if not compiler:
        return Finding("C compiler", "none found", "bad", "install gcc or clang, or set CC")
    if not header.exists():
        return Finding("C compiler", f"{compiler}; {header} is missing", "bad", "install Python's headers, such as python3-dev")
    return Finding("C compiler", compiler)


def of_ptxas(arches: set[str]) -> Finding | None:
    """Check the assembler on Hopper: before CUDA 13.3 it may reuse the registers of a running product."""
    if "sm_90" not in arches:
        return None
    from triton.backends.nvidia.compiler import get_ptxas

    version = get_ptxas(90).version
    if _release(version) >= SAFE_PTXAS:
        return Finding("ptxas", version)
    return Finding("ptxas", f"{version}: before 13.3 it may overwrite registers of a running product (triton#11781)", "note",
                   "if results are wrong, set TRITON_PTXAS_PATH to a ptxas of CUDA 13.3 or newer")


def of_fences(arches: set[str]) -> Finding | None:
    """Check Triton on Blackwell: before 3.7.1 it omits fences between copies and products."""
    version = tuple(map(int, re.findall(r"\d+", _version("triton"))[:3]))
    if version >= SAFE_TRITON_ON_BLACKWELL or not any(arch.startswith("sm_10") for arch in arches):
        return None
    return Finding("fences", "Triton before 3.7.1 omits fences on sm_100: results may differ from call to call (triton#9610)",
                   "bad", "pip install 'triton>=3.7.1', with a torch that takes it")


def of_interpreter() -> Finding:
    """Check the interpreter; a problem is bad only where kernels cannot be compiled."""
    state = "on: TRITON_INTERPRET is set" if INTERPRETED else "off: TRITON_INTERPRET is not set"
    missing = next((name for name in ("triton", "numpy") if _version(name) is None), None)
    if missing:
        problem, fix = f"it needs {missing}, which is missing", of_triton().fix if missing == "triton" else "pip install numpy"
    else:
        from ..runtime import interpreter

        problem, _, fix = (interpreter.problem() or "").partition(": ")
    if problem:
        return Finding("interpreter", f"{state}; {problem}", "note" if compiles() else "bad", fix)
    if compiles() or INTERPRETED:
        return Finding("interpreter", state)
    return Finding("interpreter", "off: without a GPU, set TRITON_INTERPRET=1 before tritonattn is imported", "note")


def of_cache() -> Finding:
    """Check the folder where Triton keeps compiled kernels; the interpreter needs none."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache")).absolute()
    exists = next(path for path in (folder, *folder.parents) if path.exists())
    if not exists.is_dir() or not os.access(exists, os.W_OK | os.X_OK):
        value = f"{folder}: not a writable folder"
    elif (free := shutil.disk_usage(exists).free) < MIN_FREE:
        value = f"{folder}: expected {MIN_FREE >> 20} MiB of free space, got {free >> 20}"
    else:
        return Finding("cache", f"{folder}, {'' if exists == folder else 'not created yet, '}{free >> 30} GiB free")
    return Finding("cache", value, "bad" if compiles() else "note", "set TRITON_CACHE_DIR to a writable folder with free space")


def _version(name: str) -> str | None:
    """Return the version of a module; None if it is missing."""
    try:
        return importlib.import_module(name).__version__
    except ImportError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """Return the major and minor number: (3, 7) for "triton==3.7.1"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
