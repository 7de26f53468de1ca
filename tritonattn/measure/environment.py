"""The GPU, the versions and the state of the source with which a measurement was made."""

import functools
import hashlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

from .. import __version__, gpu
from . import device_timer

PACKAGE = Path(__file__).parents[1]
# the files that a measurement runs: an edit elsewhere changes no number
RUNS = ("kernels/**/*.py", "runtime/*.py", "attention.py", "reference.py", "problem.py", "config.py", "gpu.py", "block_mask.py",
        "configs/lookup.py", "configs/key.py", "configs/shipped.py", "configs/data/*.json", "measure/accuracy.py",
        "measure/timing.py", "measure/device_timer.py")


def environment_of(device: torch.device) -> dict:
    """Return what identifies a machine and its software, as plain data; unknown values are None."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    model = gpu.gpu_of(device) if on_gpu else gpu.INTERPRETER
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "gpu": model.name if on_gpu else "CPU, interpreted",
        "arch": model.arch,
        "sms": model.sms if on_gpu else None,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": getattr(properties, "total_memory", None),
        "sensors": (device_timer.Sensors(device).missing or "NVML") if on_gpu else None,
        "driver": driver_version() if on_gpu else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "tritonattn": __version__,
        "source": source_digest(),
        "commit": commit(),
    }


@functools.cache
def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, by nvidia-smi; it takes a second."""
    from torch.utils import collect_env

    return collect_env.get_nvidia_driver_version(collect_env.run)


def slug(name: str) -> str:
    """Return a name in the form of a folder's: "NVIDIA H200" becomes nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def source_digest(*extra: Path, patterns: tuple[str, ...] = RUNS) -> str:
    """Return twelve hexadecimal digits that identify the code of a measurement, wherever it is installed.

    `patterns` are globs inside the package; `extra` are files outside it.
    """
    digest = hashlib.sha256()
    files = {path.relative_to(PACKAGE).as_posix(): path for pattern in patterns for path in PACKAGE.glob(pattern)}
    for name, path in sorted(files.items()) + sorted((f"../{path.name}", path) for path in extra):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """Return the commit that is checked out, with "-dirty" if tracked files differ; None outside the package's repository."""
    def git(*arguments):
        return subprocess.run(["git", "-C", PACKAGE.parent, *arguments], capture_output=True, check=True, text=True,
                              timeout=20).stdout.strip()

    try:
        inside = Path(git("rev-parse", "--show-toplevel")) == PACKAGE.parent.resolve()
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if inside else None
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
