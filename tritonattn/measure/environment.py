"""Where a measurement was made: the GPU, the versions, the state of this source. What a number needs to be believed."""

import hashlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch
from torch.utils import collect_env

from .. import gpu
from .. import __version__
from . import device_timer

PACKAGE = Path(__file__).parents[1]
# what a measurement runs: an edit elsewhere changes no number
RUNS = ("kernels/**/*.py", "runtime/*.py", "attention.py", "config.py", "configs/shipped.py", "configs/data/*.json",
        "measure/timing.py", "measure/device_timer.py")


def environment_of(device: torch.device) -> dict:
    """What identifies a machine and its software, as JSON knows it; what cannot be known is None."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    here = gpu.of(device) if on_gpu else gpu.INTERPRETER
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "gpu": here.name if on_gpu else "CPU, interpreted",
        "arch": here.arch,
        "sms": here.sms if on_gpu else None,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": getattr(properties, "total_memory", None),
        "sensors": (device_timer.missing_sensors(device) or "NVML") if on_gpu else None,
        "driver": collect_env.get_nvidia_driver_version(collect_env.run) if on_gpu else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "tritonattn": __version__,
        "source": source_digest(),
        "commit": commit(),
    }


def slug(name: str) -> str:
    """A name as a folder: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def source_digest(*beside: Path, patterns: tuple[str, ...] = RUNS) -> str:
    """Twelve hexadecimal digits of what runs in a measurement: the same for the same code, wherever it lies.

    `beside` are files outside the package that run too; `patterns` say which of the package's do.
    """
    digest = hashlib.sha256()
    named = {path.relative_to(PACKAGE).as_posix(): path for pattern in patterns for path in PACKAGE.glob(pattern)}
    for name, path in sorted(named.items()) + sorted((f"../{path.name}", path) for path in beside):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """The commit that is checked out, with "-dirty" where tracked files differ from it; None outside a repository."""
    def git(*arguments):
        return subprocess.run(["git", "-C", PACKAGE.parent, *arguments], capture_output=True, text=True, timeout=20)

    try:
        top = git("rev-parse", "--show-toplevel", "HEAD")
        if top.returncode or Path(top.stdout.split("\n")[0]) != PACKAGE.parent.resolve():
            return None
        changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return top.stdout.split("\n")[1][:12] + ("-dirty" if changed else "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
