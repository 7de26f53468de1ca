"""Make the shipped table of a GPU from what the compiler makes of the candidates: no GPU is needed.

    for each kernel, dtype, head size and class of masks:
        all tiles, mostly with two stages -> the best few with another number of stages -> the fastest expected one

What stood in the table before is a candidate like the others, and for 16-bit numbers so are what it tells of as lost and what
the nearest head sizes have. Where few would notice (float32, heads of 96, 192 and 512) there are no others, unless everything
is asked for, none of these fits, or something speaks against each (for float32: at heads up to 128). A build that looks at
another GPU's table has no others anywhere but in these cases, which is faster. What is chosen for heads of 64 and 128 is
compiled for the other problems that use its row as well, and by another version of Triton if there is one: what spills there
is passed over. What is chosen for float32 fits with IEEE products and with TF32.

Everything compiled is kept in a journal: a build that is stopped goes on where it was, and a build after an edit of the
kernels begins anew.
"""

import contextlib
import dataclasses
import itertools
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import triton

from ..analysis.cost_model import estimate
from ..block_mask import TILE
from ..config import Config
from ..configs.kernel_hash import SOURCES, kernel_hash
from ..configs.lookup import mask_class
from ..configs.shipped import (
    FILLS,
    FOLDER,
    MASKS,
    WIDTHS,
    Entry,
    Row,
    Table,
    gpu_fingerprint,
    read_table,
    shipped_tables,
    write_table,
)
from ..gpu import Gpu
from ..measure import environment
from ..measure.journal import Journal, digest
from ..problem import Problem
from .. import __version__
from .prune import candidates, check_config, check_report, time_penalty
from .worker_pool import Failure, Workers

KERNELS = ("forward", "dq", "dkdv", "dbias")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
# what decides about the binaries, and what about all that a journal holds: after an edit of these it begins anew
SEEN = (*SOURCES, "analysis/compile_report.py", "analysis/sass.py", "analysis/cost_model.py", "gpu.py", "configs/key.py",
        "problem.py", "autotune/prune.py", "autotune/config_table.py", "autotune/worker_pool.py")
PROVED = (64, 128)  # head sizes whose rows are proved on other problems
ATTEMPTS = 12       # of the best configs of a row, how many are proved until one holds
LIGHT = 16          # instructions that spill in a loop: so many are few, and may be what another version of Triton costs
BEST = 2  # configs whose other numbers of stages are tried as well
ROOMY = (0, 0)  # what fits anywhere
LOST = 8  # of those that are out, how many a row tells of: the ones that would have been the fastest


def cells(gpu: Gpu) -> Iterator[tuple]:
    """The keys of all rows of a GPU's table. Where a table has none, a wider one serves, or one with edges.

    float32 has fewer. Windows bounded on the left have rows on Hopper alone, where one pipelined loop more may make ptxas
    serialize all products.
    """
    for kernel, size, width, mask in itertools.product(KERNELS, DTYPES, WIDTHS, MASKS):
        windows = gpu.arch == "sm_90" and size == 2 and width <= 256
        of_kernel = mask == "pairs" or (kernel != "dbias" and (mask != "window" or windows))
        served = size == 2 or (width in (64, 128, 256, 512) and mask != "full" and width <= gpu.largest_head(DTYPES[size]))
        if of_kernel and served:
            yield kernel, size, width, mask


def example(cell: tuple, many: bool, gpu: Gpu) -> Problem:
    """The problem that stands for a cell: 16k tokens of 32 heads, or half a GPU full of tiles.

    With edges it is causal and ends within a tile; a window is as wide as half of it; with something for each pair it has a
    float32 bias besides.
    """
    _, size, width, mask = cell
    n = 4096 if many else TILE * max(1, gpu.sms // 16)
    n -= 0 if mask == "full" else 8
    batch, heads = ((4,), 32) if many else ((1,), 8)
    window = {"full": (None, None), "window": (n // 2, 0)}.get(mask, (None, 0))
    bias = torch.float32 if mask == "pairs" else None
    return Problem(batch, heads, heads, n, n, width, width, DTYPES[size], window, bias=bias)


def others(cell: tuple) -> dict[str, Problem]:
    """The other problems that a row of PROVED serves and that take more registers than its example, by name."""
    kernel, size, width, mask = cell
    if size != 2 or width not in PROVED or mask == "full":
        return {}
    causal, mapped = {"window": (None, 0)}, {"masked": True, "mapped": True}
    given = {
        "pairs": {"a mask": causal | {"masked": True}, "dropout": causal | {"dropout": True}, "a map": mapped},
        "edges": {"lengths": causal | {"lengths": True}, "a map": mapped},
        "window": {"a map": mapped | {"window": (100, 0)}},
    }[mask]
    # a gradient of a bias needs a bias
    bias = {"bias": torch.float32} if kernel == "dbias" else {}
    found = {name: Problem((4,), 32, 8, 1000, 1000, width, width, torch.bfloat16, **bias, **options)
             for name, options in given.items()}
    return {name: problem for name, problem in found.items() if mask_class(kernel, problem) == mask}


class NothingFits(RuntimeError):
    """A row cannot be made of these configs."""


@dataclasses.dataclass(frozen=True)
class Look:
    """Where a build looks for candidates: at the cells for which `searched` holds, and at the rows of another GPU."""

    searched: Callable[[tuple], bool]
    rows: dict = dataclasses.field(default_factory=dict)


def usual(cell: tuple) -> bool:
    """Whether a build looks for something better than what the cell has."""
    return cell[1] == 2 and cell[2] in (64, 128, 256)


USUAL, EVERYTHING = Look(usual), Look(lambda cell: True)


def shipped_like(gpu: Gpu) -> Look:
    """At the rows of this GPU's table, and at more only where these do not do. ValueError: it has none."""
    for table in shipped_tables():
        if table.is_of(gpu):
            return Look(lambda cell: False, table.rows)
    raise ValueError(f"expected a GPU with a table out of {', '.join(table.name for table in shipped_tables())}; got {gpu.name}")


class Builder:
    """Makes the rows of one GPU's table."""

    def __init__(self, gpu: Gpu, journal: Journal, workers: Workers, incumbents: Table | None = None, look: Look = USUAL,
                 also: Workers | None = None):
        """also: compilers of another Triton."""
        self._gpu, self._journal, self._workers, self._look, self._also = gpu, journal, workers, look, also
        self._incumbents = incumbents.rows if incumbents else {}
        entries = [((*entry["cell"], entry["config"]), entry) for entry in journal.entries]
        self._proved = {key: entry["against"] for key, entry in entries if "against" in entry}
        self._tf32 = {key: entry["tf32"] for key, entry in entries if "tf32" in entry}
        self._seen = {key: entry for key, entry in entries if not entry.keys() & {"against", "tf32"}}

    def row(self, cell: tuple, made: dict) -> Row:
        """The best configs of a cell; `made` are the rows that are made already. NothingFits."""
        tried, row = self._before(cell, made), None
        with contextlib.suppress(NothingFits):
            # also where arithmetic says something against them: they were there
            row = self._chosen(cell, self._survey(cell, tried, whatever=True))
        # what stood here does not do for all that the row serves: others are looked for as well
        lacks = row and (cell[1] == 2 or cell[2] <= max(PROVED)) and (row.many.exception or row.few.exception)
        return self._searched(cell, tried) if row is None or lacks or self._look.searched(cell) else row

    def _searched(self, cell, tried) -> Row:
        """The best of these and of all candidates."""
        problem = example(cell, True, self._gpu)
        stages, other = stages_of(cell, self._gpu)
        tried |= {config for config in candidates(cell[0], problem, self._gpu, stages) if sensible(cell, config, self._gpu)}
        found = self._survey(cell, tried)
        best = {entry["config"] for fill in FILLS for entry in self._order(found, fill)[:BEST]}
        tried |= {self._here(dataclasses.replace(Config.parse(text), num_stages=other)) for text in best}
        return self._chosen(cell, self._survey(cell, tried))

    def reread(self, cells: Iterable[tuple]) -> None:
        """Compile what stood in these cells, all side by side."""
        jobs = [(cell, config) for cell in cells for config in sorted(self._before(cell, {}), key=str)
                if (*cell, str(config)) not in self._seen]
        asked = [(cell[0], example(cell, True, self._gpu), config, self._gpu) for cell, config in jobs]
        for found, (cell, config) in zip(self._workers.map(asked), jobs):
            self._learn(cell, config, found)

    def _before(self, cell, rows) -> set[Config]:
        """What stood here; and but for float32, which takes long to compile, what lost here, and what others have.

        Others are the nearest head sizes, and the GPU that this one is to be like.
        """
        at = WIDTHS.index(cell[2])
        near = [(*cell[:2], width, cell[3]) for width in WIDTHS[max(at - 1, 0):at + 2] if cell[1] == 2]
        mine, like = self._incumbents.get(cell), self._look.rows.get(cell) if cell[1] == 2 else None
        found = [mine, *(rows.get(other) for other in near)]
        texts = {getattr(row, fill).config for row in found if row is not None for fill in FILLS}
        if mine is not None and cell[1] == 2:
            texts |= set(mine.lost)
        theirs = {*(getattr(like, fill).config for fill in FILLS), *like.lost} if like else set()
        return {Config.parse(text) for text in texts} | {self._here(Config.parse(text)) for text in theirs}

    def _here(self, config):
        """A config as this GPU would have it: only Hopper leaves the edges out of the pipeline, where there is one."""
        return dataclasses.replace(config, edge_stages=1 if self._gpu.arch == "sm_90" and config.num_stages > 1 else None)

    def _survey(self, cell, configs, whatever=False) -> list[dict]:
        """What is known of these configs, compiled where it was not known yet; `whatever` arithmetic says against them."""
        problem = example(cell, True, self._gpu)
        todo = []
        for config in sorted(configs, key=str):
            if (*cell, str(config)) in self._seen:
                continue
            out = check_config(cell[0], problem, config, self._gpu)
            if out is not None and not whatever:
                self._keep(cell, {"config": str(config), "reason": out.reason, "note": out.note})
            else:
                todo.append((cell[0], problem, config, self._gpu))
        for found, job in zip(self._workers.map(todo), todo):
            self._learn(cell, job[2], found)
        return [self._seen[(*cell, str(config))] for config in sorted(configs, key=str)]

    def _learn(self, cell, config, found):
        lasting = not isinstance(found, Failure) or found.lasting
        self._keep(cell, _entry(config, found, example(cell, False, self._gpu)), lasting)

    def _keep(self, cell, entry, lasting=True):
        entry = {"cell": list(cell)} | entry
        if lasting:
            self._journal.append(entry)
        self._seen[(*cell, entry["config"])] = entry

    def _order(self, found, fill):
        """Those that fit, by the expected time; what something speaks against stands behind."""
        def key(entry):
            cycles = entry[fill] * time_penalty(entry["reason"], entry["spills"])
            return entry["reason"] is not None, cycles, entry["shared_memory"], entry["config"]

        return sorted((entry for entry in found if entry.get(fill)), key=key)

    def _chosen(self, cell, found) -> Row:
        orders = {fill: self._order(found, fill) for fill in FILLS}
        if not orders["many"]:
            said = "; ".join(f"{entry['config']}: {entry['reason']} {entry['note']}".strip() for entry in found)
            raise NothingFits(f"{self._gpu.name}, {cell}: expected a config that fits, got none ({said})")
        if cell[1] == 4:
            winners = {fill: self._in_both(cell, order) for fill, order in orders.items()}
        else:
            winners = {fill: self._proven(cell, order) for fill, order in orders.items()}
        names = {entry.config for entry in winners.values()}
        others = [entry for entry in orders["many"] if entry["config"] not in names]
        others += [entry for entry in found if not entry.get("many") and entry["reason"] not in ("constraint", "prefilter")]
        return Row(*cell, **winners, lost={entry["config"]: self._why_lost(cell, entry) for entry in others[:LOST]})

    def _why_lost(self, cell, entry) -> str:
        """A reason code: of what speaks against it, here or where it was proved; else the model's."""
        key = *cell, entry["config"]
        against, taken = self._proved.get(key), self._tf32.get(key, ROOMY)
        if entry["reason"] or against:
            return entry["reason"] or re.split("[:,]", against[0])[0]
        if taken is None:
            return "compile error"
        if self._fits(taken):
            return "slower"
        return "shared memory" if taken[0] > self._gpu.shared_memory else "tensor memory"

    def _fits(self, taken) -> bool:
        return taken[0] <= self._gpu.shared_memory and taken[1] <= self._gpu.tensor_memory

    def _in_both(self, cell, order) -> Entry:
        """The first that fits with TF32 as well, and what the binary takes that takes more. NothingFits: none does."""
        for entry in order:
            taken = self._with_tf32(cell, entry["config"])
            if taken is not None and self._fits(taken):
                shared, tensor = map(max, taken, (entry["shared_memory"], entry["tensor_memory"]))
                return dataclasses.replace(_as_entry(entry), shared_memory=shared, tensor_memory=tensor,
                                           occupancy=min(entry["occupancy"], taken[2]))
        raise NothingFits(f"{self._gpu.name}, {cell}: expected a config that fits with TF32, got {len(order)} that do not")

    def _with_tf32(self, cell, text) -> list | None:
        """Shared memory, tensor memory and occupancy of a config whose products are TF32's; None: it does not compile."""
        if (*cell, text) not in self._tf32:
            found, = self._workers.map([(cell[0], example(cell, True, self._gpu), Config.parse(text), self._gpu, "tf32")])
            failed = isinstance(found, Failure)
            self._tf32[(*cell, text)] = taken = None if failed else [found.shared_memory, found.tensor_memory, found.occupancy]
            if not failed or found.lasting:
                self._journal.append({"cell": list(cell), "config": text, "tf32": taken})
        return self._tf32[(*cell, text)]

    def _proven(self, cell, order) -> Entry:
        """The first of the best that does as well on the other problems of its row, or the one that does so on most."""
        clean = [entry for entry in order[:ATTEMPTS] if entry["reason"] is None]
        least = None
        for entry in clean:
            against = self._against(cell, entry["config"])
            if not against:
                return _as_entry(entry)
            if least is None or len(against) < len(least[1]):
                least = entry, against
        if least is None:
            return _as_entry(order[0])
        return dataclasses.replace(_as_entry(least[0]), exception="; ".join(least[1]))

    def _against(self, cell, text) -> list[str]:
        """What speaks against a config on the other problems of its row, and when another Triton compiles it."""
        if (*cell, text) not in self._proved:
            found = self._proofs(cell, Config.parse(text))
            against = [(place, complaint(report, spills)) for place, report, spills in found]
            self._proved[(*cell, text)] = said = [f"{what}, {place}" for place, what in against if what]
            if found and not any(isinstance(report, Failure) and not report.lasting for _, report, _ in found):
                self._journal.append({"cell": list(cell), "config": text, "against": said})
        return self._proved[(*cell, text)]

    def _proofs(self, cell, config) -> list[tuple]:
        """(where, what was compiled, how much it may spill) for each other problem and each other compiler."""
        problems = others(cell)
        jobs = [(cell[0], problem, config, self._gpu) for problem in problems.values()]
        found = [(f"with {name}", report, 0) for report, name in zip(self._workers.map(jobs), problems)] if jobs else []
        if self._also and cell[1] == 2 and cell[2] in PROVED:
            jobs.append((cell[0], example(cell, True, self._gpu), config, self._gpu))
            names = [*(f"with {name} by another Triton" for name in problems), "by another Triton"]
            found += [(name, report, LIGHT) for report, name in zip(self._also.map(jobs), names)]
        return found


def complaint(found, spills: int) -> str:
    """What speaks against a compiled config, but for so many spills in its loop; "" if nothing does."""
    if isinstance(found, Failure):
        return f"{found.code}: {found.message}"
    verdict = check_report(found)
    light = verdict.reason == "spill" and found.loop_spills <= spills
    return "" if verdict.reason is None or light else f"{verdict.reason}: {verdict.note}".rstrip(": ")


def stages_of(cell: tuple, gpu: Gpu) -> tuple[tuple[int, ...], int]:
    """The stages with which all tiles are tried, and those with which the best few are tried as well."""
    if cell[1] == 4 and not gpu.is_amd:
        # without tensor cores a second stage is hardly worth its memory
        return (1,), 2
    if cell[2] > 256:
        # two of such heads often do not fit
        return (1, 2), 3
    # AMD's pipeline of two stages loads into registers, and often does better without
    return (2,), 1 if gpu.is_amd else 3


def allowed(config: Config) -> bool:
    """What a table may hold: no tile larger than a map's."""
    return max(config.block_m, config.block_n) <= TILE


def sensible(cell: tuple, config: Config, gpu: Gpu) -> bool:
    """What is worth compiling for a table: small tiles without tensor cores and for wide heads alone.

    Heads of 512 and float32 have tiles of 64 at most, and so has what is given for each pair beyond heads of 128. Without
    tensor cores, for NVIDIA's float32, a thread holds whole rows of what it multiplies: beyond heads of 64 tiles larger than 32
    spill by hundreds.
    """
    kernel, size, width, mask = cell
    owner = config.block_n if kernel == "dkdv" else config.block_m
    if size == 2 and width <= 128 and owner < 64 and mask != "pairs":
        return False
    if size == 4:
        least, largest = 16, 32 if width > 64 and not gpu.is_amd else 64
    else:
        least, largest = 16 if width > 128 else 32, 64 if width > (128 if mask == "pairs" else 256) else TILE
    return least <= min(config.block_m, config.block_n) and max(config.block_m, config.block_n) <= largest


def _entry(config, found, few: Problem) -> dict:
    """What the journal keeps of one compiled config."""
    if isinstance(found, Failure):
        return {"config": str(config), "reason": found.code, "note": found.message}
    verdict = check_report(found)
    entry = {"config": str(config), "reason": verdict.reason, "note": verdict.note, "registers": found.registers,
             "spills": found.loop_spills, "shared_memory": found.shared_memory,
             "tensor_memory": found.tensor_memory, "occupancy": found.occupancy}
    if verdict.estimate is not None:
        other = estimate(dataclasses.replace(found, problem=few))
        entry |= {"many": verdict.estimate.cycles, "few": other.cycles, "bound": verdict.estimate.bound}
    return entry


def _as_entry(found: dict) -> Entry:
    note = f"{found['reason']}: {found['note']}" if found["reason"] else ""
    return Entry(found["config"], "static-model", found["registers"], found["shared_memory"], found["tensor_memory"],
                 found["occupancy"], found["bound"], note.rstrip(": "))


def build(gpu: Gpu, chosen: Iterable[tuple], folder: Path = FOLDER, work: Path = Path("build"), jobs: int | None = None,
          look: Look = USUAL, also: str | None = None, say: Callable = print) -> Path:
    """Make these rows of a GPU's table anew, and keep its other rows. Returns the file, which is written once all is done.

    also: a Python with another Triton, with which the rows of PROVED must do as well.
    Raises ValueError where the other rows are of other kernels: then all must be made.
    """
    name = environment.slug(gpu.name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    old = read_table(path) if path.exists() else None
    tritons = {"triton": triton.__version__} | ({"also": version_in(also)} if also else {})
    plan = {"gpu": gpu.name, "source": environment.source_digest(patterns=SEEN)} | tritons
    rows, done, chosen = dict(old.rows) if old else {}, {}, list(chosen)
    source = kernel_hash()
    if old and old.made["source"] != source and not rows.keys() & set(cells(gpu)) <= set(chosen):
        raise ValueError(f"{path}: expected all cells to be chosen, since the kernels have changed; got {len(chosen)}")
    compilers = Workers(jobs, python=also) if also else contextlib.nullcontext()
    with Journal(work / f"table-{name}-{digest(plan)}.jsonl", plan) as journal, Workers(jobs) as usual, compilers as others_too:
        builder = Builder(gpu, journal, usual, old, look, others_too)
        # those that are searched come first, since the others look at them
        chosen = sorted(chosen, key=lambda cell: not look.searched(cell))
        builder.reread(chosen)
        for cell in chosen:
            rows[cell] = done[cell] = row = builder.row(cell, done)
            say(f"{gpu.name}  {cell[0]:8} {8 * cell[1]:2} bits  {cell[2]:3}  {cell[3]:5}  many {row.many.config:14} "
                f"few {row.few.config:14} {row.many.exception}", flush=True)
    made = {"tritonattn": __version__, "source": source} | tritons
    ordered = {cell: rows[cell] for cell in cells(gpu) if cell in rows}
    return write_table(Table(name, {"name": gpu.name} | gpu_fingerprint(gpu), made, ordered), folder)


def version_in(python: str) -> str:
    """The version of Triton that this Python imports. ValueError: none."""
    found = subprocess.run([python, "-c", "import triton; print(triton.__version__)"], capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"{python}: expected a Python with Triton, got {found.stderr.strip().splitlines()[-1:]}")
    return found.stdout.strip()
