"""The user cache: configs tuned on this machine, one JSON file per key, in one folder per model of GPU.

    <cache>/tuned/v2/sm_90-132sm-227k-50m-144g/forward-0123456789abcdef.json

The digits hash the key and the kernels, so an edit of the kernels hides all older records. A file is written under another
name and renamed, so readers see either all of it or nothing, on network file systems too. A file that holds no valid record
is ignored with a warning. There are no locks: shared state changes by single dictionary operations.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from ..config import Config
from ..gpu import TRITON, Gpu
from .kernel_hash import kernel_hash
from .key import Key
from .shipped import gpu_fingerprint

SCHEMA = 2
LAYOUT = Path("tuned", f"v{SCHEMA}")
MAX_BYTES = 1 << 20  # a longer file holds no record
INVALID = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)  # what reading a foreign file raises


@dataclass(frozen=True)
class Record:
    """The fastest config found for a key on a GPU, and how it was found. Times are in seconds.

    Raise ValueError, TypeError or KeyError for values that the lookup or `explain` cannot use.
    """

    key: Key
    config: Config
    seconds: float                 # the median of the samples; q20 and q80 are quantiles
    q20: float
    q80: float
    samples: int
    default: Config                # the config that a call would have used without tuning, timed in the same rounds
    default_seconds: float | None  # None: it could not be timed
    check: dict        # {tensor: [error, allowed error]}
    static: dict       # registers, stack, shared_memory, tensor_memory, occupancy, bound, cycles: properties of the binary
    gpu: dict          # name and fingerprint
    versions: dict     # tritonattn, torch, triton, cuda, driver
    kernel_hash: str   # of the kernels that were timed
    run: dict          # id, time (UTC), strategy, trials, seconds, seed, tried: the configs of this and earlier runs

    def __post_init__(self):
        times = [self.seconds, self.q20, self.q80, *([] if self.default_seconds is None else [self.default_seconds])]
        if not all(0 < time < float("inf") for time in times):
            raise ValueError(f"record: expected positive times in seconds, got {times}")
        for name, kind, value in (("shared_memory", int, self.static["shared_memory"]), ("time", str, self.run["time"]),
                                  ("tensor_memory", int, self.static["tensor_memory"]), ("samples", int, self.samples),
                                  ("triton", (str, type(None)), self.versions["triton"]), ("check", dict, self.check),
                                  ("tried", list, self.run.get("tried", []))):
            if not isinstance(value, kind):
                raise TypeError(f"record: unexpected type of {name} (got {value!r:.40})")

    def fits(self, gpu: Gpu) -> bool:
        """Return whether the GPU has the memory that the binary needs."""
        return self.static["shared_memory"] <= gpu.shared_memory and self.static["tensor_memory"] <= gpu.tensor_memory

    @property
    def stale(self) -> bool:
        """True if another or an unknown minor version of Triton compiled it, so that the binary may differ here."""
        minor = _minor(self.versions["triton"])
        return minor is None or minor != _minor(triton_version())

    @property
    def path(self) -> Path:
        """Its file, relative to the cache's folder."""
        return record_path(self.key, self.kernel_hash, self.gpu)

    def as_json(self) -> dict:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        printed = {"key": self.key.as_json(), "config": str(self.config), "default": str(self.default)}
        return {"schema": SCHEMA} | values | printed

    @staticmethod
    def from_json(content: dict) -> "Record":
        """Return the record with this `as_json`. Raise one of INVALID."""
        values = dict(content)
        if (schema := values.pop("schema")) != SCHEMA:
            raise ValueError(f"schema: expected {SCHEMA}, got {schema!r:.40}")
        return Record(**values | {"key": Key.from_json(values["key"]), "config": Config.parse(values["config"]),
                                  "default": Config.parse(values["default"])})


@functools.cache
def triton_version() -> str | None:
    """Return the version of the installed Triton, None without Triton. Several packages provide it: only the module knows."""
    if not TRITON:
        return None
    import triton

    return triton.__version__


def _minor(version: str | None) -> str | None:
    """Return "3.6" for "3.6.0+git"; None for anything else."""
    match = re.match(r"\d+\.\d+", version or "")
    return match and match[0]


def cache_folder() -> Path | None:
    """Return TRITONATTN_CACHE_DIR, else tritonattn/ in the user's cache folder, else (without a home) None."""
    if named := os.environ.get("TRITONATTN_CACHE_DIR"):
        return Path(named).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification says to ignore relative paths
    if os.path.isabs(caches):
        return Path(caches) / "tritonattn"
    try:
        return Path.home() / ".cache" / "tritonattn"
    except RuntimeError:
        return None


def gpu_dirname(gpu: dict) -> str:
    """Return the folder name of a GPU with this fingerprint: "sm_90-132sm-227k-50m-144g", with "x" for unknown sizes.

    Memory is rounded up to 16 GiB, because drivers reserve some of it.
    """
    sizes = (("shared_memory", 1 << 10, 1, "k"), ("l2", 1 << 20, 1, "m"), ("memory", 16 << 30, 16, "g"))
    parts = ["x" if gpu[name] is None else f"{-(-gpu[name] // step) * scale}{unit}" for name, step, scale, unit in sizes]
    return "-".join([gpu["arch"], f"{gpu['sms']}sm", *parts])


def record_path(key: Key, kernels: str, gpu: dict) -> Path:
    """Return the file for a key, a kernel hash and the fingerprint of a GPU, relative to the cache's folder."""
    digest = hashlib.sha256(json.dumps([key.as_json(), kernels], sort_keys=True).encode()).hexdigest()[:16]
    return LAYOUT / gpu_dirname(gpu) / f"{key.kernel}-{digest}.json"


class Cache:
    """The records under `folder`, and those that this process put. Without a folder, only the latter."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._put: dict[Path, Record] = {}
        self._warned: dict = {}

    def get(self, key: Key, gpu: Gpu) -> Record | None:
        """Return the record that a call may use: made from these kernels by this minor version of Triton, and it fits."""
        record = self.get_stale(key, gpu)
        return None if record is None or record.stale else record

    def get_stale(self, key: Key, gpu: Gpu) -> Record | None:
        """Return the record whatever version of Triton made it: a candidate for the tuner."""
        path = record_path(key, kernel_hash(), gpu_fingerprint(gpu))
        record = self._put.get(path) or self._read(path)
        return record if record and record.fits(gpu) else None

    def put(self, record: Record) -> Path | None:
        """Store a record in place of its predecessor. Return its file, or None where only memory holds it (with a warning).

        Raise one of INVALID if the record could not be read back.
        """
        text = json.dumps(record.as_json(), allow_nan=False)
        # memory holds the same types as a file: lists, not tuples
        self._put[record.path] = Record.from_json(json.loads(text))
        if self.folder is None:
            self._warn("write", "cache: no home folder for tuned configs, so they last only as long as this process; "
                                "set TRITONATTN_CACHE_DIR")
            return None
        path = self.folder / record.path
        try:
            _write(path, text)
        except OSError as error:
            self._warn("write", f"{path}: cannot write ({error}); tuned configs last only as long as this process")
            return None
        return path

    def records(self) -> Iterator[tuple[Path, Record]]:
        """Yield (file, record) for every valid file, of all GPUs, kernels and versions of Triton."""
        for path in sorted(self.folder.glob(f"{LAYOUT}/*/*.json")) if self.folder else ():
            if record := self._read(path.relative_to(self.folder)):
                yield path, record

    def clear(self) -> int:
        """Remove all files of the cache, those of older schemas and of killed processes too. Return their number.

        Raise OSError if a file cannot be removed.
        """
        self._put = {}
        paths = list(self.folder.glob("tuned/v*/*/*.json*")) if self.folder else []
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def _read(self, relative: Path) -> Record | None:
        if self.folder is None:
            return None
        path = self.folder / relative
        try:
            with open(path, "rb") as file:
                record = Record.from_json(json.loads(file.read(MAX_BYTES).decode()))
            if record.path != relative:
                raise ValueError(f"the content belongs to {record.path}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except INVALID as error:
            self._warn(path, f"{path}: not a valid tuned config, ignored ({type(error).__name__}: {error})")
            return None
        return record

    def _warn(self, topic, message):
        """Warn once per topic."""
        token = object()
        if self._warned.setdefault(topic, token) is token:
            warnings.warn(message, stacklevel=2)


def _write(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


_caches: dict[Path | None, Cache] = {}


def current_cache() -> Cache:
    """Return this process's cache for the folder that the environment names now."""
    folder = cache_folder()
    return _caches.get(folder) or _caches.setdefault(folder, Cache(folder))
