"""Configs that were chosen beforehand: one JSON file per GPU in configs/, one row per kernel, dtype, head size and mask.

A row holds two configs: for problems whose tiles fill the GPU ("many"), and for those whose do not ("few"). Each says where
it comes from and what its binary takes; `lost` says why others are out.
`python -m tritonattn table build` makes these files (tuning/table.py).
"""

import functools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..gpu import Gpu

FOLDER = Path(__file__).parent / "data"
SCHEMA = 1
FILLS = ("many", "few")
SOURCES = {
    "static-model": "from the binaries alone",
    "measured": "timed on this GPU",
}
MASKS = ("full", "edges", "window", "pairs")
SIZE_TOLERANCE = 0.1  # sizes of memory and cache that differ by less are the same: drivers keep some for themselves
# a row serves head sizes up to its own
WIDTHS = (64, 96, 128, 192, 256, 512)


class TableError(Exception):
    """A file that is no table, or of a later version than this one reads."""


@dataclass(frozen=True)
class Entry:
    """A config of a row, and what its binary takes."""

    config: str
    source: str               # one of SOURCES
    registers: int | None     # None: not looked at
    shared_memory: int        # bytes per block, at the most
    tensor_memory: int        # columns per block, at the most
    occupancy: int | None     # blocks per SM
    bound: str | None         # the unit that the loop keeps busy longest, as far as the model sees
    exception: str = ""       # what speaks against it, where nothing better was found

    def fits(self, gpu: Gpu) -> bool:
        return self.shared_memory <= gpu.shared_memory and self.tensor_memory <= gpu.tensor_memory


@dataclass(frozen=True)
class Row:
    """The configs of one kernel for a size of numbers, a width of heads and a class of masks."""

    kernel: str
    itemsize: int  # bytes
    width: int
    mask: str      # one of MASKS: none; causal or ragged lengths; bounded on the left; something for each pair
    many: Entry
    few: Entry
    lost: dict[str, str] = field(default_factory=dict)  # {config: reason}

    @property
    def key(self) -> tuple:
        return self.kernel, self.itemsize, self.width, self.mask


@dataclass(frozen=True)
class Table:
    """One file: whose it is, how it was made, and its rows by key."""

    name: str
    gpu: dict       # name, arch, sms, shared_memory, l2, memory; None stands for any
    made: dict      # versions, and a digest of the kernels' source
    rows: dict

    def is_of(self, gpu: Gpu) -> bool:
        """Whether it was made for just this GPU: its fingerprint, not its name."""
        mine = gpu_fingerprint(gpu)
        sizes = [(self.gpu[name], mine[name]) for name in ("l2", "memory")]
        return (all(self.gpu[name] == mine[name] for name in ("arch", "sms", "shared_memory"))
                and all(None in pair or abs(pair[0] - pair[1]) <= SIZE_TOLERANCE * pair[0] for pair in sizes))


def gpu_fingerprint(gpu: Gpu) -> dict:
    """What tells GPUs apart that run the same config at another speed; as its vendor says where no device was asked.

    AMD's drivers tell of one die's cache, its vendor of all: there it is left out.
    """
    l2, memory = (mine or (gpu.peaks and theirs(gpu.peaks)) for mine, theirs in (
        (gpu.l2, lambda peaks: peaks.l2), (gpu.memory, lambda peaks: peaks.memory)))
    l2 = None if gpu.is_amd else l2
    return {"arch": gpu.arch, "sms": gpu.sms, "shared_memory": gpu.shared_memory, "l2": l2, "memory": memory}


@functools.cache
def shipped_tables() -> tuple[Table, ...]:
    """Every table that comes with the package."""
    return tuple(read_table(path) for path in sorted(FOLDER.glob("*.json")))


def read_table(path: Path) -> Table:
    """The table in a file. Raises TableError."""
    try:
        content = json.loads(path.read_text())
        if content["schema"] > SCHEMA:
            raise TableError(f"{path}: expected schema {SCHEMA}, got {content['schema']}; a newer tritonattn wrote it")
        rows = [Row(**row | {fill: Entry(**row[fill]) for fill in FILLS}) for row in content["rows"]]
        return Table(path.stem, content["gpu"], content["made"], {row.key: row for row in rows})
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(f"{path}: expected a table of configs, got {type(error).__name__}: {error}") from error


def write_table(table: Table, folder: Path = FOLDER) -> Path:
    """The file of a table, whole or not at all; a row a line, so that a change can be read."""
    rows = [json.dumps(asdict(row) | {fill: _as_json(getattr(row, fill)) for fill in FILLS}) for row in table.rows.values()]
    head = json.dumps({"schema": SCHEMA, "gpu": table.gpu, "made": table.made})[:-1]
    path = folder / f"{table.name}.json"
    beside = path.with_suffix(".part")
    beside.write_text(head + ',\n"rows": [\n' + ",\n".join(rows) + "\n]}\n")
    beside.replace(path)
    return path


def _as_json(entry):
    return {name: value for name, value in asdict(entry).items() if (name, value) != ("exception", "")}
