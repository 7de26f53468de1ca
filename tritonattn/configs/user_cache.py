"""The user's own tuned configs, read at a first call: one small JSON file for each key, in a folder for each kind of GPU.

    <folder>/tuned/v1/sm_90-132sm-227k-50m-144g/forward-0123456789abcdef.json

The digits are of the key and of the kernels' source: after an edit of the kernels nothing old is found. A file is written
beside its place and then renamed, so readers see all of it or nothing, and nobody waits for anybody; on network file systems
too. What is in a file is proved by its digest; what is not, is set aside. Reading raises nothing.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from ..gpu import TRITON, Gpu
from .kernel_hash import kernel_hash
from .key import Key
from .shipped import gpu_fingerprint

SCHEMA = 1
LAYOUT = ("tuned", f"v{SCHEMA}")
LIMIT = 1 << 20                              # bytes: of a longer file no more is read, and it holds no record
LONGEST = 1e6                                # seconds: no kernel takes so long

_NUMBER, _TEXT = (int, float), (str,)
_FILE = {"schema": (int,), "digest": _TEXT, "key": (dict,), "config": _TEXT, "seconds": _NUMBER, "q20": _NUMBER, "q80": _NUMBER,
         "samples": (int,), "default": _TEXT, "default_seconds": (*_NUMBER, type(None)), "check": (dict,), "static": (dict,),
         "gpu": (dict,), "versions": (dict,), "source": _TEXT, "run": (dict,)}
_KEY = {"kernel": _TEXT, "dtype": _TEXT, "d": (int,), "dv": (int,), "precision": (str, type(None)), "mask": _TEXT,
        "window": (list,), "ragged": (bool,), "features": (list,),
        "group": (int,), "queries": (int, type(None)), "keys": (int,), "fill": _TEXT}
_GPU = {"name": _TEXT, "arch": _TEXT, "sms": (int,), "shared_memory": (int,), "l2": (int, type(None)),
        "memory": (int, type(None))}
_STATIC = {"shared_memory": (int,), "tensor_memory": (int,)}
_BLOCK = "(16|32|64|128|256|512|1024)"
# config.py, which reads them, is a floor above; names of kernels and architectures become names of files
_PATTERNS = {"config": f"{_BLOCK}x{_BLOCK}w(1|2|4|8|16|32)s[1-9][0-9]?(e1)?", "kernel": "[a-z0-9_]{1,40}",
             "arch": "[a-z0-9_]{1,40}", "source": "[0-9a-f]{12}", "time": "[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z"}

_lock = threading.Lock()  # of what all caches hold in memory


class NewerSchema(ValueError):
    """A record that a later tritonattn wrote: nothing is wrong with it, but this one cannot read it."""


@dataclass(frozen=True)
class Record:
    """The fastest config that was found for a key on a GPU, and all that is needed to believe it. Times in seconds."""

    key: Key
    config: str      # as it prints
    seconds: float   # the median of the samples, and their quantiles
    q20: float
    q80: float
    samples: int
    default: str     # what a call would have used, timed in the same rounds
    default_seconds: float | None
    check: dict      # {tensor: [error, allowed]}
    static: dict     # registers, stack, shared_memory, tensor_memory, occupancy, bound, cycles: what the lens saw
    gpu: dict        # its fingerprint and name
    versions: dict   # tritonattn, torch, triton, cuda, and driver if known
    source: str      # `source()` when it was made
    run: dict        # id, time (UTC, as the journal has it), strategy, trials, seconds, seed, tried: all configs, ever

    def fits(self, gpu: Gpu) -> bool:
        """Whether this GPU has the memory that the binary takes."""
        return self.static["shared_memory"] <= gpu.shared_memory and self.static["tensor_memory"] <= gpu.tensor_memory

    @property
    def stale(self) -> bool:
        """Whether another minor version of Triton made it, or nobody knows which: the same config may be another binary here,
        and take other memory. A hint for a tuner, nothing for a call."""
        made = _minor(self.versions["triton"])
        return not made or made != _minor(triton_version())

    def as_json(self) -> dict:
        """What its file holds; `from_json` reads it back. ValueError, TypeError: JSON has no word for something in it."""
        content = {field.name: getattr(self, field.name) for field in fields(self)} | {"key": self.key.as_json()}
        content = {"schema": SCHEMA} | json.loads(_dump(content))
        return content | {"digest": _digest(_dump(content))}

    @staticmethod
    def from_json(content: dict) -> "Record":
        """The record whose `as_json` this is.

        TypeError, KeyError, ValueError: it is of no record, or was changed since. NewerSchema, a ValueError: of a later one.
        """
        _of_this_schema("record", content)
        _expect("record", content, _FILE)
        bare = {name: value for name, value in content.items() if name != "digest"}
        if (digest := _digest(_dump(bare))) != content["digest"]:
            raise ValueError(f"digest: expected {digest}, got {content['digest'][:40]!r}; the record was changed or damaged")
        _examine(content)
        del bare["schema"]
        return Record(**bare | {"key": Key.from_json(content["key"])})


def _examine(content: dict) -> None:
    """TypeError, KeyError, ValueError: something that is relied on has the wrong type or form."""
    _expect("key", content["key"], _KEY)
    _expect("gpu", content["gpu"], _GPU)
    _expect("static", content["static"], _STATIC, more=True)
    _expect("versions", content["versions"], {"triton": (str, type(None))}, more=True)
    _expect("run", content["run"], {"time": _TEXT}, more=True)
    if not all(type(feature) is str for feature in content["key"]["features"]):
        raise TypeError("features: expected strings, got something else among them")
    if [type(side) in (int, type(None)) for side in content["key"]["window"]] != [True, True]:
        raise TypeError("window: expected two integers or None, got something else")
    for tensor, bounds in content["check"].items():
        if type(bounds) is not list or [type(bound) in _NUMBER for bound in bounds] != [True, True]:
            raise TypeError(f"check: expected an error and what is allowed, got another value for {tensor[:40]!r}")
    for name in ("seconds", "q20", "q80", "default_seconds"):
        value = content[name]
        if value is not None and not 0 < value < LONGEST:
            raise ValueError(f"{name}: expected a time from 0 to {LONGEST:g} s, got another")
    values = content | {"kernel": content["key"]["kernel"], "arch": content["gpu"]["arch"], "time": content["run"]["time"]}
    for name, pattern in _PATTERNS.items():
        if not re.fullmatch(pattern, values[name]):
            raise ValueError(f"{name}: expected the form {pattern}, got {values[name][:40]!r}")


def _of_this_schema(what: str, content) -> None:
    """ValueError, TypeError, KeyError, NewerSchema: it is of another."""
    _expect(what, content, {"schema": (int,)}, more=True)
    if (schema := content["schema"]) != SCHEMA:
        text = f"schema: expected {SCHEMA}, got {schema}"
        raise NewerSchema(f"{text}; a newer tritonattn wrote it") if schema > SCHEMA else ValueError(text)


def _expect(what: str, content, kinds: dict, more: bool = False) -> None:
    """TypeError, KeyError: it is no dict with these names, and no others unless there may be `more`, of these types."""
    if type(content) is not dict:
        raise TypeError(f"{what}: expected an object, got {type(content).__name__}")
    if besides := not more and set(content) - set(kinds):
        raise TypeError(f"{what}: expected the names {', '.join(kinds)}; got {', '.join(sorted(besides))[:40]!r} besides")
    for name, allowed in kinds.items():
        if type(content[name]) not in allowed:
            names = " or ".join(kind.__name__ for kind in allowed)
            raise TypeError(f"{what}, {name}: expected {names}, got {type(content[name]).__name__}")


def _dump(content) -> str:
    return json.dumps(content, sort_keys=True, allow_nan=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def triton_version() -> str | None:
    """The version of Triton that compiles here. Its packages have several names, so it is asked itself."""
    if not TRITON:
        return None
    import triton

    return triton.__version__


def _minor(version: str | None) -> tuple[int, ...]:
    """(3, 6) for "3.6.0+git"; () where that is not known, which is before all others."""
    found = re.match(r"([0-9]{1,9})\.([0-9]{1,9})", version or "")
    return tuple(map(int, found.groups())) if found else ()


def cache_folder() -> Path | None:
    """Where this user's cache is: TRITONATTN_CACHE_DIR, or beside other caches; None if no home can be found."""
    if named := os.environ.get("TRITONATTN_CACHE_DIR"):
        return Path(named).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # by its specification a relative one is to be ignored
    if os.path.isabs(caches):
        return Path(caches) / "tritonattn"
    try:
        return Path.home() / ".cache" / "tritonattn"
    except RuntimeError:
        return None


def gpu_dirname(gpu: dict) -> str:
    """The folder of a GPU with this fingerprint: "sm_90-132sm-227k-50m-144g"; what is not known is "x".

    Memory is in steps of 16 GiB, upwards: drivers keep some for themselves.
    """
    sizes = (("shared_memory", 1 << 10, 1, "k"), ("l2", 1 << 20, 1, "m"), ("memory", 16 << 30, 16, "g"))
    parts = ["x" if gpu[name] is None else f"{-(-gpu[name] // step) * each}{letter}" for name, step, each, letter in sizes]
    return "-".join([gpu["arch"], f"{gpu['sms']}sm", *parts])


def record_path(key: Key, made_from: str, gpu: dict) -> Path:
    """The file of a key, of the kernels with this source, on a GPU with this fingerprint, within the cache's folder."""
    name = f"{key.kernel}-{_digest(_dump([key.as_json(), made_from]))}.json"
    return Path(*LAYOUT, gpu_dirname(gpu), name)


def read_record(path: Path) -> Record:
    """The record in a file of a cache. OSError; TypeError, KeyError, ValueError, RecursionError: none that belongs there."""
    with open(path, "rb") as file:
        content = file.read(LIMIT)
    record = Record.from_json(json.loads(content.decode()))
    at = record_path(record.key, record.source, record.gpu)
    if at.parts[-2:] != path.parts[-2:]:
        raise ValueError(f"expected what belongs there, got the record of {'/'.join(at.parts[-2:])}")
    return record


def _attempt(path: Path) -> Record | Exception:
    """The record in a file, or what is wrong with it."""
    try:
        return read_record(path)
    except (OSError, TypeError, KeyError, ValueError, RecursionError) as error:
        return error


def _all(within: Path | None) -> Iterator[tuple[Path, Record | Exception]]:
    """Every file of a cache, and what came of reading it."""
    for path in sorted(within.joinpath(*LAYOUT).glob("*/*.json")) if within else ():
        found = _attempt(path)
        # what was there a moment ago may have been removed
        if not isinstance(found, FileNotFoundError):
            yield path, found


def _write(path: Path, content: dict) -> None:
    """The file, whole or not at all. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # machines share file systems, but hardly the same bytes of chance
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}-{os.urandom(8).hex()}")
    try:
        with open(beside, "xb") as file:
            file.write(_dump(content).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


class Cache:
    """The records under `folder`, and what this process knows of them; without a folder only the latter.

    What is not there is remembered too: what another process adds later is not seen before `forget`. Serves many threads.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._memory = {}  # {(key, gpu): what get returns, what hint returns}
        self._told = set()

    def get(self, key: Key, gpu: Gpu) -> Record | None:
        """The record that a call may use: made from these kernels by this Triton, and it fits."""
        return self._find(key, gpu)[0]

    def hint(self, key: Key, gpu: Gpu) -> Record | None:
        """The record for a tuner to begin with: it fits, but it may be stale."""
        return self._find(key, gpu)[1]

    def _find(self, key, gpu):
        # what forgets puts another dict in its place, so nothing is remembered that was read before
        memory, at = self._memory, (key, gpu)
        with _lock:
            found = memory.get(at)
        if found is None:
            found = _judged(self._look(key, gpu), gpu)
            with _lock:
                found = memory.setdefault(at, found)
        return found

    def _look(self, key, gpu):
        if self.folder is None:
            return None
        path = self.folder / record_path(key, kernel_hash(), gpu_fingerprint(gpu))
        found = _attempt(path)
        if isinstance(found, Record):
            return found
        # where a folder should be there may be a file: nothing is there either
        if not isinstance(found, (FileNotFoundError, NotADirectoryError)):
            self._pass_over(path, found)
        return None

    def put(self, record: Record, gpu: Gpu) -> Path | None:
        """Keep a record, in place of its key's last; the file, or None where only memory holds it, which is warned of once.

        ValueError, TypeError, KeyError: it is of another GPU, or could not be read back.
        """
        content = record.as_json()
        # as it will be read
        record = Record.from_json(content)
        if gpu_dirname(record.gpu) != gpu_dirname(gpu_fingerprint(gpu)):
            raise ValueError(f"record: expected one of {gpu_dirname(gpu_fingerprint(gpu))}, got one of {gpu_dirname(record.gpu)}")
        if record.source == kernel_hash():
            with _lock:
                self._memory[record.key, gpu] = _judged(record, gpu)
        if self.folder is None:
            self._tell("writing", "cache: expected a home for tuned configs, found none; they last as long as this process. "
                                  "TRITONATTN_CACHE_DIR names a folder")
            return None
        path = self.folder / record_path(record.key, record.source, record.gpu)
        try:
            _write(path, content)
        except OSError as error:
            self._tell("writing", f"{path}: expected to write a tuned config, got {_said(error)}; "
                                  "tuned configs last as long as this process")
            return None
        return path

    def records(self) -> Iterator[tuple[Path, Record]]:
        """Every record, of all GPUs, stale ones and those of other kernels included; what is none is set aside."""
        for path, found in _all(self.folder):
            if isinstance(found, Record):
                yield path, found
            else:
                self._pass_over(path, found)

    def verify(self) -> list[str]:
        """A line for each file that no call will use, with the reason. Changes nothing."""
        lines = []
        for path, found in _all(self.folder):
            if not isinstance(found, Record):
                lines.append(f"{path}: expected a tuned config, got {_said(found)}")
            elif found.source != kernel_hash():
                lines.append(f"{path}: expected to be made from the kernels {kernel_hash()}, got {found.source}")
            elif found.stale:
                made = found.versions["triton"]
                lines.append(f"{path}: expected to be made by Triton {triton_version()}, got {made}: a hint for a tuner only")
        aside = sorted(self.folder.joinpath(*LAYOUT).glob("*/*.json.bad")) if self.folder else ()
        return lines + [f"{path}: expected nothing, got a file that was set aside" for path in aside]

    def merge(self, other: Path) -> tuple[int, int]:
        """Take over what another cache's folder, or an exported file, holds; how many were taken, and how many of ours kept.

        Of two for one key that wins whose run is later, if its Triton is of the same minor version or a later one.
        OSError, ValueError: nothing can be read there, or nothing written here.
        """
        if self.folder is None:
            raise FileNotFoundError("cache: expected a folder to merge into, found no home; TRITONATTN_CACHE_DIR names one")
        if other.is_dir() and not other.joinpath(*LAYOUT).is_dir():
            raise ValueError(f"{other}: expected a cache, with {'/'.join(LAYOUT)} in it, got another folder")
        taken = kept = 0
        for record in self._of_folder(other) if other.is_dir() else _exported(other):
            path = self.folder / record_path(record.key, record.source, record.gpu)
            mine = _attempt(path)
            if isinstance(mine, Record) and not _supersedes(record, mine):
                kept += 1
            else:
                _write(path, record.as_json())
                taken += 1
        self.forget()
        return taken, kept

    def _of_folder(self, other):
        """The records of another cache, in which nothing is changed."""
        for path, found in _all(other):
            if isinstance(found, Record):
                yield found
            else:
                self._tell(path, f"{path}: expected a tuned config, got {_said(found)}; it is passed over")

    def export(self, path: Path) -> None:
        """All records in one file, which `merge` reads. OSError."""
        _write(path, {"schema": SCHEMA, "records": [record.as_json() for _, record in self.records()]})

    def clear(self, gpu: Gpu | None = None) -> int:
        """Remove the records of one GPU, or of all, with what was set aside and what killed processes left; how many records.

        OSError: one cannot be removed.
        """
        boards = "*" if gpu is None else gpu_dirname(gpu_fingerprint(gpu))
        found = list(self.folder.joinpath(*LAYOUT).glob(f"{boards}/*.json*")) if self.folder else []
        for path in found:
            path.unlink(missing_ok=True)
        self.forget()
        return sum(path.suffix == ".json" for path in found)

    def forget(self) -> None:
        """Drop what is in memory: the next look is at the files."""
        with _lock:
            self._memory = {}

    def _pass_over(self, path, error):
        """Set aside a file that holds no record. What cannot be read, or only by a later version, stays."""
        wrong = f"{path}: expected a tuned config, got {_said(error)}"
        if isinstance(error, OSError):
            self._tell("reading", f"{wrong}; nothing that cannot be read is used")
        elif isinstance(error, NewerSchema):
            self._tell(path, f"{wrong}; it is passed over")
        else:
            try:
                os.replace(path, f"{path}.bad")
                then = "it was set aside, with .bad after its name"
            except OSError as refusal:
                then = f"it is passed over, since it cannot be set aside: {_said(refusal)}"
            self._tell(path, f"{wrong}; {then}")

    def _tell(self, about, text):
        """Warn, of each matter once."""
        with _lock:
            first = about not in self._told
            self._told.add(about)
        if first:
            warnings.warn(text, stacklevel=2)


def _judged(record, gpu):
    """What `get` and what `hint` return for this GPU of what was found, if anything was."""
    hint = record if record and record.fits(gpu) else None
    return None if hint and hint.stale else hint, hint


def _supersedes(theirs: Record, ours: Record) -> bool:
    later = theirs.run["time"] > ours.run["time"]
    return later and _minor(theirs.versions["triton"]) >= _minor(ours.versions["triton"])


def _exported(path: Path) -> list[Record]:
    """The records of an exported file, of which each must be whole. OSError, ValueError."""
    try:
        content = json.loads(path.read_bytes().decode())
        _of_this_schema("export", content)
        _expect("export", content, {"schema": (int,), "records": (list,)})
        return [Record.from_json(record) for record in content["records"]]
    except NewerSchema as error:
        raise NewerSchema(f"{path}: {error}") from None
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected an exported cache, got {_said(error)}") from error


def _said(error):
    return f"{type(error).__name__}: {error}"


_current: Cache | None = None


def current_cache() -> Cache:
    """The cache of this process, at `folder()` as it is now."""
    global _current
    at = cache_folder()
    with _lock:
        if _current is None or _current.folder != at:
            _current = Cache(at)
        return _current


def _renew_lock():
    global _lock
    _lock = threading.Lock()


# the thread that held it does not live in the child, and would never give it back
os.register_at_fork(after_in_child=_renew_lock)
