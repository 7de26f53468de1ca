"""The user cache: configs tuned on this machine, one JSON file per key, in one folder per model of GPU.

    <cache>/tuned/v4/sm_90-132sm-227k-60m-144g/forward-0123456789abcdef.json

The digits hash the key, the kernels and the minor version of Triton: other kernels and binaries need other configs. A file
that holds no valid record is ignored with a warning. There are no locks: files are replaced as a whole.
"""

import functools
import hashlib
import importlib
import json
import math
import os
import typing
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..config import Config
from ..gpu import TRITON, Gpu
from .kernel_hash import kernel_hash
from .shipped import gpu_fingerprint, replace_file

LAYOUT = Path("tuned", "v4")  # another number for another schema
INVALID = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)  # errors of reading an invalid file


@dataclass(frozen=True)
class Record:
    """The fastest config found for a key on a GPU, and how it was found. Times are in seconds.

    Raises TypeError for a value of another type, ValueError for a time that is not positive and finite.
    """

    key: str
    config: Config
    seconds: float                 # the median of the samples
    samples: int
    sustained: bool                # each sample is a window of continuous load; otherwise one launch after a pause
    clock: float | None            # MHz during the windows; None: unknown
    default: Config                # the config that a call would have used without tuning, timed in the same rounds
    default_seconds: float | None  # None: it could not be timed
    check: dict        # {tensor: [error, allowed error]}
    static: dict       # registers, stack, shared_memory, tensor_memory, occupancy, bound, cycles: properties of the binary
    gpu: dict          # name and fingerprint
    versions: dict     # and other facts of the machine: tritonattn, torch, triton, cuda, driver, ...
    kernel_hash: str   # of the kernels that were timed
    run: dict          # time (UTC), strategy, trials, seconds, seed; tried: the configs of this and earlier runs;
                       # together: the keys that share this config; calls: the weight of each of their problems

    def __post_init__(self):
        for name, kind in typing.get_type_hints(Record).items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"record: expected {kind} for {name}, got {getattr(self, name)!r:.40}")
        for name in ("seconds", "default_seconds"):
            if (time := getattr(self, name)) is not None and not 0 < time < math.inf:
                raise ValueError(f"record: expected a positive time for {name}, got {time}")
        inner = [("run.time", str, self.run.get("time")), ("run.tried", list, self.run.get("tried", []))]
        inner += [("static.shared_memory", int, self.static.get("shared_memory"))] if self.static else []
        for name, kind, value in inner:
            if not isinstance(value, kind):
                raise TypeError(f"record: expected {kind} for {name}, got {value!r:.40}")

    @property
    def path(self) -> Path:
        """Its file, relative to the cache's folder."""
        return record_path(self.key, self.gpu, self.kernel_hash, self.versions["triton"])

    @property
    def is_current(self) -> bool:
        """True if it was made from the current kernels by the current minor version of Triton."""
        return self.path == record_path(self.key, self.gpu)

    def as_json(self) -> dict:
        return vars(self) | {"config": str(self.config), "default": str(self.default)}

    @staticmethod
    def from_json(content: dict) -> "Record":
        """Return the record with this `as_json`. Raises one of INVALID."""
        return Record(**content | {name: Config.parse(content[name]) for name in ("config", "default")})


@functools.cache
def triton_version() -> str:
    """Return the version of the installed Triton, or "". Read from the module, since several packages provide it."""
    return importlib.import_module("triton").__version__ if TRITON else ""


def cache_folder() -> Path | None:
    """Return TRITONATTN_CACHE_DIR, else tritonattn/ in the user's cache folder, else (without a home) None."""
    if named := os.environ.get("TRITONATTN_CACHE_DIR"):
        return Path(named).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # the XDG specification says to ignore relative paths
        return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "tritonattn"
    except RuntimeError:
        return None


def gpu_dirname(gpu: dict) -> str:
    """Return the folder name of a GPU with this fingerprint: "sm_90-132sm-227k-60m-144g", with 0 for unknown sizes.

    Memory is rounded up to 16 GiB, because drivers reserve some of it.
    """
    shared_memory, l2, memory = (gpu[name] or 0 for name in ("shared_memory", "l2", "memory"))
    return f"{gpu['arch']}-{gpu['sms']}sm-{shared_memory >> 10}k-{l2 >> 20}m-{-(-memory // (16 << 30)) * 16}g"


def record_path(key: str, gpu: dict, kernels: str | None = None, triton: str | None = None) -> Path:
    """Return the file for a key and a GPU's fingerprint, relative to the cache; by default for the current versions."""
    minor = (triton or triton_version()).split(".")[:2]
    digest = hashlib.sha256(json.dumps([key, kernels or kernel_hash(), minor]).encode()).hexdigest()[:16]
    return LAYOUT / gpu_dirname(gpu) / f"{key.split()[0]}-{digest}.json"


@dataclass
class Cache:
    """The records under `folder`, and those of this process that could not be written: without a folder, all of them."""

    folder: Path | None
    unwritten: dict[Path, Record] = field(default_factory=dict)

    def get(self, key: str, gpu: Gpu) -> Record | None:
        """Return the record for a key on a GPU, made from the current kernels by the current minor version of Triton."""
        path = record_path(key, gpu_fingerprint(gpu))
        return self.unwritten.get(path) or self._read(path)

    def put(self, record: Record) -> Path | None:
        """Store a record in place of its predecessor. Return its file, or None where only memory holds it (with a warning)."""
        text = json.dumps(record.as_json(), allow_nan=False)
        try:
            if self.folder is None:
                raise FileNotFoundError("no home folder; set TRITONATTN_CACHE_DIR")
            replace_file(self.folder / record.path, text + "\n")
        except OSError as error:
            warnings.warn(f"cache: cannot write {record.path} ({error}); tuned configs last only as long as this process",
                          stacklevel=2)
            self.unwritten[record.path] = record
            return None
        self.unwritten.pop(record.path, None)
        return self.folder / record.path

    def records(self) -> Iterator[tuple[Path, Record]]:
        """Yield (file, record) for every valid file, of all GPUs, kernels and versions of Triton."""
        for path in sorted(self.folder.glob(f"{LAYOUT}/*/*.json")) if self.folder else ():
            if record := self._read(path.relative_to(self.folder)):
                yield path, record

    def clear(self) -> int:
        """Remove all files of the cache, those of older schemas and of killed processes too. Return their number.

        Raises OSError if a file cannot be removed.
        """
        self.unwritten.clear()
        paths = list(self.folder.glob("tuned/v*/*/*.json*")) if self.folder else []
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def _read(self, relative: Path) -> Record | None:
        if self.folder is None:
            return None
        path = self.folder / relative
        try:
            record = Record.from_json(json.loads(path.read_text(encoding="utf-8")))
            if record.path != relative:
                raise ValueError(f"the content belongs to {record.path}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except INVALID as error:
            warnings.warn(f"{path}: not a valid tuned config, ignored ({type(error).__name__}: {error})", stacklevel=2)
            return None
        return record


@functools.cache
def cache_at(folder: Path | None) -> Cache:
    """Return the one Cache of this process for a folder."""
    return Cache(folder)


def current_cache() -> Cache:
    """Return this process's cache for the folder that the environment names now."""
    return cache_at(cache_folder())
