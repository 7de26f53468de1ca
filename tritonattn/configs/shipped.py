"""Shipped tables: one JSON file per GPU in data/, one row per kernel, dtype size, head size and class of masks.

A row holds two configs: for problems whose tiles fill the GPU ("filled") and for those whose tiles do not ("underfilled").
README.md explains how to read a row; `python -m perf.config_table` makes the files.
"""

import functools
import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..config import Config
from ..gpu import Gpu

FOLDER = Path(__file__).parent / "data"
SCHEMA = 2
FILLS = ("filled", "underfilled")
SOURCES = {"static-model": "from the binaries alone", "measured": "timed on this GPU"}
MASKS = ("full", "edges", "window", "pairs", "softcap")
WIDTHS = (64, 96, 128, 192, 256, 512)  # the largest head size of a row
SIZE_TOLERANCE = 0.1  # relative; sizes this close count as equal, because drivers reserve some memory


class TableError(Exception):
    """A file that is not a table, or has a newer schema than this version reads."""


@dataclass(frozen=True)
class Entry:
    """A config of a row and the resources of its binary."""

    config: Config
    source: str               # one of SOURCES
    registers: int | None     # per thread; None: unknown
    shared_memory: int        # bytes per block
    tensor_memory: int        # columns per block
    occupancy: int | None     # blocks per SM; None: unknown
    bound: str | None         # the unit that limits the loop, according to the cost model
    accepted_fault: str = ""  # a reason against the config, accepted because every other candidate was worse

    def fits(self, gpu: Gpu) -> bool:
        return self.shared_memory <= gpu.shared_memory and self.tensor_memory <= gpu.tensor_memory

    def as_json(self) -> dict:
        content = asdict(self) | {"config": str(self.config)}
        return {name: value for name, value in content.items() if name != "accepted_fault" or value}

    @staticmethod
    def from_json(content: dict) -> "Entry":
        return Entry(**content | {"config": Config.parse(content["config"])})


@dataclass(frozen=True)
class Row:
    """The configs of one kernel for an item size, a head size and a class of masks."""

    kernel: str
    itemsize: int  # bytes
    width: int
    mask: str      # "full": none; "edges": causal or ragged; "window": bounded on the left; "pairs": values per (query, key);
                   # "softcap": scores with a softcap, none of the others
    filled: Entry
    underfilled: Entry
    rejected: dict[str, str] = field(default_factory=dict)  # {config: reason}

    @property
    def key(self) -> tuple:
        return self.kernel, self.itemsize, self.width, self.mask


@dataclass(frozen=True)
class Table:
    """The content of one file, its rows by key."""

    name: str
    gpu: dict         # name and fingerprint; None stands for an unknown size, which matches any
    provenance: dict  # versions of tritonattn and Triton, and the kernel hash
    rows: dict

    def matches(self, gpu: Gpu) -> bool:
        """Return whether the table was made for this model of GPU. The fingerprint decides, not the name."""
        other = gpu_fingerprint(gpu)
        sizes = [(self.gpu[name], other[name]) for name in ("l2", "memory")]
        return (all(self.gpu[name] == other[name] for name in ("arch", "sms", "shared_memory"))
                and all(None in pair or abs(pair[0] - pair[1]) <= SIZE_TOLERANCE * pair[0] for pair in sizes))


def gpu_fingerprint(gpu: Gpu) -> dict:
    """Return the properties that distinguish GPUs on which one config runs at different speeds; sizes in bytes.

    Sizes that no device reported come from the data sheet. AMD's cache is None: its driver reports the cache of one die,
    the data sheet that of all.
    """
    l2 = None if gpu.is_amd else gpu.l2 or (gpu.peaks and gpu.peaks.l2)
    memory = gpu.memory or (gpu.peaks and gpu.peaks.memory)
    return {"arch": gpu.arch, "sms": gpu.sms, "shared_memory": gpu.shared_memory, "l2": l2, "memory": memory}


@functools.cache
def shipped_tables() -> tuple[Table, ...]:
    """Return every table of the package."""
    return tuple(read_table(path) for path in sorted(FOLDER.glob("*.json")))


def read_table(path: Path) -> Table:
    """Return the table in a file. Raises TableError."""
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise TableError(f"{path}: expected schema {SCHEMA}, got {content['schema']}")
        rows = [Row(**row | {fill: Entry.from_json(row[fill]) for fill in FILLS}) for row in content["rows"]]
        return Table(path.stem, content["gpu"], content["provenance"], {row.key: row for row in rows})
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(f"{path}: expected a table of configs, got {type(error).__name__}: {error}") from error


def write_table(table: Table, folder: Path = FOLDER) -> Path:
    """Write a table atomically, with one row per line so that changes can be reviewed. Return its path."""
    rows = [json.dumps(asdict(row) | {fill: getattr(row, fill).as_json() for fill in FILLS}) for row in table.rows.values()]
    head = json.dumps({"schema": SCHEMA, "gpu": table.gpu, "provenance": table.provenance})[:-1]
    path = folder / f"{table.name}.json"
    replace_file(path, head + ',\n"rows": [\n' + ",\n".join(rows) + "\n]}\n")
    return path


def replace_file(path: Path, text: str) -> None:
    """Write a file under another name and rename it: readers see all of it or nothing, on network file systems too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
