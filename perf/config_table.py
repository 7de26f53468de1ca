"""Build the shipped table of a GPU from compiled candidates. No GPU is needed.

    python -m perf.config_table h200 a100 [--like GPU] [--also PYTHON]    build tables; a stopped build resumes
    python -m perf.config_table h200 --search dq/128/full ...             build a table, but search these rows only
    python -m perf.config_table h200 --from-sweeps runs/d128              replace rows by what sweeps measured
    python -m perf.config_table h200 --restamp                            accept edited kernels with the same binaries
    python -m perf.config_table h200 --restamp --update                   record what edited kernels compile to

A row gets the config with the least modelled time among those without a fault. 16-bit rows with heads of 64, 128 and 256
are searched. The other rows choose among the configs of the old table and of neighbouring head sizes; they are searched only
if each of these has a fault. `--like` starts from the table of another GPU instead, and then this holds for all rows. With
`--search` only the named rows are searched, and checked rows without a fault that now get one; the others choose among the
configs of their old row and of searched rows of their head size. Configs
of 16-bit rows with heads of 64 and 128 must also do well on the other problems that use the row, and with the Triton of
another Python (`--also`). Configs of float32 rows must fit with IEEE and with TF32 products.
"""

import argparse
import contextlib
import itertools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

import torch
import triton

from tritonattn import __version__
from tritonattn import gpu as gpus
from tritonattn.analysis.cost_model import estimate
from tritonattn.autotune import trials
from tritonattn.autotune.prune import Verdict, candidates, check_config, check_report, forms, ranked
from tritonattn.autotune.replay import comparable
from tritonattn.autotune.trials import sustained_times
from tritonattn.autotune.worker_pool import Failure, Workers
from tritonattn.block_mask import TILE
from tritonattn.config import Config
from tritonattn.configs.kernel_hash import kernel_hash
from tritonattn.configs.lookup import gpu_fill, row_keys
from tritonattn.configs.shipped import (
    FILLS,
    FOLDER,
    MASKS,
    WIDTHS,
    Entry,
    Row,
    Table,
    TableError,
    gpu_fingerprint,
    read_table,
    write_table,
)
from tritonattn.gpu import Gpu
from tritonattn.measure import environment
from tritonattn.measure.journal import JournalError, digest
from tritonattn.problem import Problem

KERNELS = ("forward", "dq", "dkdv", "dbias")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
CHECKED_WIDTHS = (64, 128)  # head sizes whose 16-bit rows are checked on the other problems that they serve
ATTEMPTS = 12      # configs of a row that are checked before the one with the fewest faults is accepted
LIGHT_SPILLS = 16  # spilling instructions in a loop that are tolerated with the second Triton
WORK = Path("build")  # where the rows of unfinished tables are
REJECTED = 8       # rejected configs that a row lists, the fastest first


def row_keys_of(gpu: Gpu) -> Iterator[tuple]:
    """Yield the keys of all rows of a GPU's table. Where a row is missing, the lookup uses a wider one or one with edges.

    float32 has fewer rows. Only Hopper has rows for windows bounded on the left, where a further pipelined loop may make
    ptxas serialize all products, and for dK/dV of wide heads with a softcap, where the usual configs spill.
    """
    for kernel, size, width, mask in itertools.product(KERNELS, DTYPES, WIDTHS, MASKS):
        windows = gpu.arch == "sm_90" and size == 2 and width <= 256
        capped = windows and kernel == "dkdv" and width >= 128
        of_kernel = mask == "pairs" or (kernel != "dbias" and {"window": windows, "softcap": capped}.get(mask, True))
        of_size = size == 2 or (width in (64, 128, 256, 512) and mask != "full" and width <= gpu.largest_head(DTYPES[size]))
        if of_kernel and of_size:
            yield kernel, size, width, mask


def example_problem(key: tuple, fill: str, gpu: Gpu) -> Problem:
    """Return the problem that represents a row: 16k tokens of 32 heads ("filled"), or half a GPU of tiles ("underfilled").

    Rows with edges or a softcap are causal and end within a tile; windows are half as wide as the sequence; "pairs" have a
    float32 bias.
    """
    _, size, width, mask = key
    n = 4096 if fill == "filled" else TILE * max(1, gpu.sms // 16)
    n -= 0 if mask == "full" else 8
    batch, heads = ((4,), 32) if fill == "filled" else ((1,), 8)
    window = {"full": (None, None), "window": (n // 2, 0)}.get(mask, (None, 0))
    bias = torch.float32 if mask == "pairs" else None
    return Problem(batch, heads, heads, n, n, width, width, DTYPES[size], window, bias=bias, softcap=mask == "softcap")


def other_problems(key: tuple) -> dict[str, Problem]:
    """Return, by name, the other problems of a checked row that need more registers than its example."""
    kernel, size, width, mask = key
    if size != 2 or width not in CHECKED_WIDTHS or mask == "full":
        return {}
    causal, mapped = {"window": (None, 0)}, {"masked": True, "mapped": True}
    variants = {
        "pairs": {"a mask": causal | {"masked": True}, "dropout": causal | {"dropout": True}, "a map": mapped},
        "edges": {"lengths": causal | {"lengths": True}, "a map": mapped},
        "window": {"a map": mapped | {"window": (100, 0)}},
        "softcap": {"no mask": {"softcap": True}, "a map": mapped | {"softcap": True}},
    }[mask]
    # the gradient of a bias needs a bias
    bias = {"bias": torch.float32} if kernel == "dbias" else {}
    problems = {name: Problem((4,), 32, 8, 1000, 1000, width, width, torch.bfloat16, **bias, **options)
                for name, options in variants.items()}
    return {name: problem for name, problem in problems.items() if next(row_keys(kernel, problem)) == key}


def whole_tiles(problem: Problem) -> Problem:
    """Return a problem with lengths rounded up to whole tiles."""
    return replace(problem, n_q=-(-problem.n_q // TILE) * TILE, n_k=-(-problem.n_k // TILE) * TILE)


class Variant(NamedTuple):
    """One way in which the configs of a row are compiled; the row's example has no name."""

    problem: Problem
    name: str = ""
    precision: str = "ieee"
    second: bool = False  # by the second Triton


def fault_of(verdict: Verdict) -> str:
    """Return the reason against a config, with its note."""
    return f"{verdict.reason}: {verdict.note}".rstrip(": ") if verdict.reason else ""


def mean_verdict(verdict: Verdict, whole: Verdict, problem: Problem) -> Verdict:
    """Return a verdict with the mean time of two binaries of a config on this problem: its own, and the one for whole tiles.

    A fault of that one counts too.
    """
    reason, note = verdict.reason, verdict.note
    if reason is None and whole.reason:
        reason, note = whole.reason, f"{whole.note or 'in a loop'}, with whole tiles"
    if whole.estimate:
        cycles = (verdict.estimate.cycles + estimate(replace(whole.report, problem=problem)).cycles) / 2
        verdict = replace(verdict, estimate=replace(verdict.estimate, cycles=cycles))
    return replace(verdict, reason=reason, note=note)


def entry_of(verdict: Verdict) -> Entry:
    """Return the entry of a config that fits."""
    report = verdict.report
    return Entry(verdict.config, "static-model", report.registers, report.shared_memory, report.tensor_memory,
                 report.occupancy, verdict.estimate.bound, fault_of(verdict))


class RowBuilder:
    """Compiles configs for one row of a GPU's table and chooses among them; `second` compiles with another Triton."""

    def __init__(self, key: tuple, gpu: Gpu, workers: Workers, second: Workers | None = None):
        self.key, self._gpu, self._workers, self._second = key, gpu, workers, second
        self._examples = {fill: example_problem(key, fill, gpu) for fill in FILLS}
        self._verdicts: dict[tuple[Variant, Config], Verdict] = {}
        self._faults: dict[Config, list[str]] = {}  # in variants

    def build(self, configs: set[Config], search: bool, repair: bool = True) -> Row:
        """Return the row with the best of these configs, or of all candidates if each of these has a fault.

        search: whether to compile all candidates in any case. repair: whether to do so where each of the configs has a
        fault. Raises ValueError if no config fits.
        """
        row = self.choose(configs)
        kernel, size, width, _ = self.key
        # wide heads of float32 spill with every config and take long to compile
        faulty = row and (size == 2 or width <= 128) and (row.filled.accepted_fault or row.underfilled.accepted_fault)
        if row is None or (faulty and repair) or search:
            example = self._examples["filled"]
            tiles = {config for config in candidates(kernel, example, self._gpu, stages_of(self.key, self._gpu))
                     if sensible(self.key, config, self._gpu) and check_config(kernel, example, config, self._gpu) is None}
            row = self.choose(configs | tiles)
            if row is None:
                faults = "; ".join(f"{verdict.config}: {fault_of(verdict)}" for verdict in self.compile(configs | tiles))
                raise ValueError(f"{self._gpu.name}, {self.key}: expected a config that fits, got none ({faults})")
        return row

    def compile(self, configs: Iterable[Config], variants: Iterable[Variant] = ()) -> list[Verdict]:
        """Return the verdicts on every config in every variant (default: the row's example)."""
        variants = tuple(variants) or (Variant(self._examples["filled"]),)
        jobs = [(variant, config) for variant in variants for config in sorted(configs, key=str)]
        for second, workers in ((False, self._workers), (True, self._second)):
            missing = [job for job in jobs if job[0].second == second and job not in self._verdicts]
            todo = [(self.key[0], variant.problem, config, self._gpu, variant.precision) for variant, config in missing]
            for result, job in zip(workers.map(todo) if todo else (), missing):
                failed = isinstance(result, Failure)
                self._verdicts[job] = Verdict(job[1], result.code, result.message) if failed else check_report(result)
        return [self._verdicts[job] for job in jobs]

    def choose(self, configs: set[Config]) -> Row | None:
        """Return the row made of the best of these configs, or None if none fits."""
        verdicts = self.compile(configs)
        orders = {fill: self._order(verdicts, problem) for fill, problem in self._examples.items()}
        pick = self._pick_float32 if self.key[1] == 4 else self._pick
        entries = {fill: pick(order) for fill, order in orders.items()}
        if None in entries.values():
            return None
        chosen = {entry.config for entry in entries.values()}
        others = [verdict for verdict in orders["filled"] if verdict.config not in chosen]
        others += [verdict for verdict in verdicts if not verdict.estimate]
        return Row(*self.key, **entries, rejected={str(verdict.config): self._reason(verdict) for verdict in others[:REJECTED]})

    def _order(self, verdicts: list[Verdict], problem: Problem) -> list[Verdict]:
        """Return the verdicts that have an estimate and no race, which no row may ship, the fastest first.

        Hopper's row with edges also serves lengths of whole tiles. These run another binary, in which ptxas may place the
        instructions differently beside the products. So the fastest configs are ordered by their mean time over both.
        """
        order = ranked(replace(verdict, estimate=estimate(replace(verdict.report, problem=problem)))
                       for verdict in verdicts if verdict.estimate and verdict.reason != "race")
        _, size, width, mask = self.key
        if self._gpu.arch != "sm_90" or mask != "edges" or size != 2 or width not in CHECKED_WIDTHS:
            return order
        variant = Variant(whole_tiles(self._examples["filled"]))
        whole = {verdict.config: verdict for verdict in self.compile([each.config for each in order[:ATTEMPTS]], [variant])}
        mean = [mean_verdict(verdict, whole[verdict.config], whole_tiles(problem)) for verdict in order[:ATTEMPTS]]
        return ranked(mean) + order[ATTEMPTS:]

    def _pick_float32(self, order) -> Entry | None:
        """Return the first config that fits with TF32 too, with the larger of both binaries' resources."""
        variant = Variant(self._examples["filled"], "tf32", "tf32")
        for verdict in order:
            entry, (tf32,) = entry_of(verdict), self.compile([verdict.config], [variant])
            if tf32.report and tf32.report.fits:
                return replace(entry, shared_memory=max(entry.shared_memory, tf32.report.shared_memory),
                               tensor_memory=max(entry.tensor_memory, tf32.report.tensor_memory),
                               occupancy=min(entry.occupancy, tf32.report.occupancy))
            self._faults[verdict.config] = [fault_of(tf32)]
        return None

    def _pick(self, order) -> Entry | None:
        """Return the first config without a fault in any variant, else the one with the fewest, else one with few spills."""
        least = None
        for verdict in [verdict for verdict in order[:ATTEMPTS] if verdict.reason is None]:
            faults = self.faults(verdict.config)
            if not faults:
                return entry_of(verdict)
            if least is None or len(faults) < len(least[1]):
                least = verdict, faults
        if least is None:
            light = (verdict for verdict in order[:ATTEMPTS]
                     if verdict.reason == "spill" and verdict.report.loop_spills <= LIGHT_SPILLS)
            best = next(light, order[0] if order else None)
            return best and entry_of(best)
        return replace(entry_of(least[0]), accepted_fault="; ".join(least[1]))

    def faults(self, config: Config) -> list[str]:
        """Return the faults of a config on the other problems of its row and with the second Triton."""
        _, size, width, _ = self.key
        variants = [Variant(problem, f"with {name}") for name, problem in other_problems(self.key).items()]
        if self._second and size == 2 and width in CHECKED_WIDTHS:
            variants += [variant._replace(name=f"{variant.name} by another Triton", second=True) for variant in variants]
            variants.append(Variant(self._examples["filled"], "by another Triton", second=True))
        verdicts = self.compile([config], variants) if variants else []
        self._faults[config] = [
            f"{fault_of(verdict)}, {variant.name}" for verdict, variant in zip(verdicts, variants) if verdict.reason
            and not (variant.second and verdict.reason == "spill" and verdict.report.loop_spills <= LIGHT_SPILLS)]
        return self._faults[config]

    def _reason(self, verdict) -> str:
        """Return why a config was rejected: its own fault, else its first fault in another variant, else "slower"."""
        faults = self._faults.get(verdict.config) or ["slower"]
        return verdict.reason or re.split("[:,]", faults[0])[0]


def known_configs(key: tuple, gpu: Gpu, old: dict, done: dict, search: list[str] | None) -> set[Config]:
    """Return the configs of the old row, and for 16-bit rows those of finished neighbours.

    Where all rows are searched, neighbours are the rows of neighbouring widths, and the configs that the old row rejected
    count too. Where `search` names rows, neighbours are those of the same width.
    """
    kernel, size, width, mask = key
    rows, rejected = [old.get(key)], ()
    if size == 2 and search is None:
        at, rejected = WIDTHS.index(width), map(Config.parse, rows[0].rejected if rows[0] else ())
        rows += [done.get((kernel, size, near, mask)) for near in WIDTHS[max(at - 1, 0):at + 2]]
    elif size == 2:
        rows += [done.get((kernel, size, width, other)) for other in MASKS if searched((kernel, size, width, other), search)]
    configs = (*rejected, *(getattr(row, fill).config for row in rows if row for fill in FILLS))
    if size == 4:
        return set(configs)
    example = example_problem(key, "filled", gpu)
    return {form for config in configs for form in forms(kernel, example, config, gpu) if model_knows(form, gpu)}


def present_form(key: tuple, config: Config, gpu: Gpu) -> Config:
    """Return a config of a row with the fields that its GPU always sets."""
    of_16_bits = forms(key[0], example_problem(key, "filled", gpu), config, gpu) if key[1] == 2 else [config]
    return next(form for form in of_16_bits if (form.ahead, form.two_passes) == (config.ahead, config.two_passes))


def sound(row: Row | None) -> bool:
    """Return whether a checked row has no fault. Where it has one, an earlier search has found nothing better."""
    return row is not None and row.itemsize == 2 and row.width in CHECKED_WIDTHS and not (
        row.filled.accepted_fault or row.underfilled.accepted_fault)


def model_knows(config: Config, gpu: Gpu) -> bool:
    """Return whether the cost model can judge a config: it reads what `ahead` gains from the machine code of Hopper only."""
    return gpu.arch == "sm_90" or not config.ahead


def searched(key: tuple, search: list[str] | None) -> bool:
    """Return whether a build looks for new configs even if the known ones have no fault. `search` names rows, if given."""
    kernel, size, width, mask = key
    return size == 2 and (width in (64, 128, 256) if search is None else f"{kernel}/{width}/{mask}" in search)


def stages_of(key: tuple, gpu: Gpu) -> tuple[int, ...]:
    """Return the numbers of stages that a search tries."""
    if key[1] == 4 or gpu.is_amd:
        # without tensor cores, and with AMD's pipeline through registers, more stages are hardly worth their memory
        return 1, 2
    if key[2] > 256:
        # two stages of wide heads often do not fit
        return 1, 2, 3
    return (2, 3, 4) if gpu.arch == "sm_90" and key[2] <= 64 else (2, 3)


def sensible(key: tuple, config: Config, gpu: Gpu) -> bool:
    """Return whether a tile is worth compiling.

    Fewer than 64 rows of the kernel's own output: only for float32, for heads over 128 and for "pairs". More than 64 rows or
    columns: not for float32, not for heads of 512, and not for "pairs" with heads over 128. In NVIDIA's float32 a thread
    holds whole rows: with heads over 64, tiles larger than 32 spill hundreds of registers.
    """
    kernel, size, width, mask = key
    owner = config.block_n if kernel == "dkdv" else config.block_m
    if not model_knows(config, gpu) or (size == 2 and width <= 128 and owner < 64 and mask != "pairs"):
        return False
    if size == 4:
        least, largest = 16, 32 if width > 64 and not gpu.is_amd else 64
    else:
        least, largest = 16 if width > 128 else 32, 64 if width > (128 if mask == "pairs" else 256) else TILE
    return least <= min(config.block_m, config.block_n) and max(config.block_m, config.block_n) <= largest


def path_of(gpu: Gpu, folder: Path = FOLDER) -> Path:
    """Return the file of a GPU's table."""
    return folder / f"{environment.slug(gpu.name)}.json"


def build(gpu: Gpu, like: Gpu | None = None, also: str | None = None, search: list[str] | None = None,
          folder: Path = FOLDER, work: Path = WORK) -> Path:
    """Build all rows of a GPU's table, then write the file and return its path.

    like: another GPU, whose table to start from. also: a Python with another Triton. search: the rows to search, such as
    "dq/128/full"; None for those of common head sizes. Rows are kept in `work` until the table is complete; after an edit of
    the package the build starts from the beginning.
    """
    names = {f"{kernel}/{width}/{mask}" for kernel, size, width, mask in row_keys_of(gpu) if size == 2}
    if unknown := set(search or ()) - names:
        raise ValueError(f"search: expected rows such as dq/128/full, got {', '.join(sorted(unknown))}")
    path, start = path_of(gpu, folder), path_of(like or gpu, folder)
    old = read_table(start).rows if like or start.exists() else {}
    tritons = {"triton": triton.__version__} | ({"second_triton": triton_of(also)} if also else {})
    source = environment.source_digest(Path(__file__), patterns=("**/*.py",))
    plan = {"gpu": gpu.name, "like": like and like.name, "search": search, "source": source} | tritons
    work.mkdir(parents=True, exist_ok=True)
    provenance = {"tritonattn": __version__, "kernel_hash": kernel_hash()} | tritons
    table = Table(path.stem, {"name": gpu.name} | gpu_fingerprint(gpu), provenance, {})
    partial = replace(table, name=f"{path.stem}-{digest(plan)}")
    if (work / f"{partial.name}.json").exists():
        partial.rows.update(read_table(work / f"{partial.name}.json").rows)
    with Workers() as workers, Workers(python=also) if also else contextlib.nullcontext() as second:
        # searched rows come first, because the others choose among their configs
        for key in sorted(row_keys_of(gpu), key=lambda key: not searched(key, search)):
            if key not in partial.rows:
                builder = RowBuilder(key, gpu, workers, second)
                row = builder.build(known_configs(key, gpu, old, partial.rows, search),
                                    search=like is None and searched(key, search),
                                    repair=search is None or sound(old.get(key)))
                partial.rows[key] = row
                write_table(partial, work)
                print(f"{gpu.name}  {key[0]:8} {8 * key[1]:2} bits  {key[2]:3}  {key[3]:6} {row.filled.config!s:14} "
                      f"{row.underfilled.config!s:14} {row.filled.accepted_fault}", flush=True)
    return write_table(replace(table, rows={key: partial.rows[key] for key in row_keys_of(gpu)}), folder)


def triton_of(python: str) -> str:
    """Return the version of Triton in another Python. Raises ValueError if it has none."""
    run = subprocess.run([python, "-c", "import triton; print(triton.__version__)"], capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"{python}: expected a Python with Triton, got {run.stderr.strip().splitlines()[-1:]}")
    return run.stdout.strip()


def build_from_sweeps(gpu: Gpu, runs: list[trials.Run], folder: Path = FOLDER) -> Path:
    """Replace the entries of a GPU's shipped table that sweeps measured, write the table to `folder` and return its path.

    An entry gets the config with the least geometric mean of its times, as multiples of the incumbent's, over all problems
    of the entry. Raises ValueError for a synthetic sweep, and for one of another GPU or of other kernels than the table.
    """
    path = path_of(gpu)
    # {(row key, fill): {config: (its time as a multiple of the incumbent's, its binary's properties) for each problem}}
    table, timed = read_table(path), defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.synthetic:
            raise ValueError("config_table: expected measured sweeps, got a synthetic one")
        if run.plan["source"] != table.provenance["kernel_hash"] or not table.matches(Gpu(tensor_memory=0, **run.plan["gpu"])):
            raise ValueError(f"{path}: expected a sweep of the GPU and the kernels of this table, got one of {run.plan['gpu']}")
        for job in run.jobs:
            at = next(row_keys(job.kernel, job.problem)), gpu_fill(job.kernel, job.problem, gpu)
            job_trials = comparable(run.of(job))
            for name, time in sustained_times(job_trials).items():
                config, trial = Config.parse(name), job_trials[name]
                # a table holds no tile larger than a block mask's
                if (trial.status == "ok" or name == job.incumbent) and max(config.block_m, config.block_n) <= TILE:
                    timed[at][config].append((time, trial.static))
    for (key, fill), by_config in timed.items():
        config = fastest(by_config)
        # of the binaries for several problems, the one with the most shared memory
        static = max((static for _, static in by_config[config]), key=lambda static: static.get("shared_memory", 0))
        entry = Entry(config, "measured", static.get("registers"), static.get("shared_memory", 0),
                      static.get("tensor_memory", 0), static.get("occupancy"), static.get("bound"))
        row = table.rows.get(key) or Row(*key, filled=entry, underfilled=entry)
        rejected = {name: reason for name, reason in row.rejected.items() if name != str(config)}
        table.rows[key] = replace(row, **{fill: entry}, rejected=rejected)
    return write_table(table, folder)


def fastest(by_config: dict[Config, list[tuple[float, dict]]]) -> Config:
    """Return the config with the least geometric mean, out of those that were timed on the most problems."""
    most = max(map(len, by_config.values()))
    return min((config for config, group in by_config.items() if len(group) == most),
               key=lambda config: (geometric_mean(time for time, _ in by_config[config]), str(config)))


def restamp(gpu: Gpu, workers: Workers, folder: Path = FOLDER, update: bool = False) -> Path:
    """Write the current kernel hash into a GPU's table and return its path.

    update: record what the configs of checked rows compile to for the example of their row, and search the rows that have a
    new fault. Raises ValueError for another version of Triton, or, without `update`, for a checked row that compiles to other
    registers or memory than recorded.
    """
    table = read_table(path_of(gpu, folder))
    if table.provenance["triton"] != triton.__version__:
        raise ValueError(f"{table.name}: made with Triton {table.provenance['triton']}, got {triton.__version__}")
    if update:
        # what is not compiled below is unknown from now on
        for key, row in table.rows.items():
            entries = {fill: getattr(row, fill) for fill in FILLS}
            entries = {fill: replace(entry, config=present_form(key, entry.config, gpu), registers=None)
                       for fill, entry in entries.items()}
            table.rows[key] = replace(row, **entries)
    checked = {row.key for row in table.rows.values() if row.itemsize == 2 and row.width in CHECKED_WIDTHS}
    entries = [(key, fill, getattr(table.rows[key], fill)) for key in checked for fill in FILLS]
    entries = [(key, fill, entry) for key, fill, entry in entries if update or entry.registers is not None]
    jobs = [(key[0], example_problem(key, "filled", gpu), entry.config, gpu) for key, _, entry in entries]
    searching = []
    for compiled, (key, fill, entry) in zip(workers.map(jobs), entries):
        resources = None if isinstance(compiled, Failure) else (
            compiled.registers, compiled.shared_memory, compiled.tensor_memory)
        if update:
            found = Verdict(entry.config, compiled.code, compiled.message) if resources is None else check_report(compiled)
            if found.reason and (not entry.accepted_fault or not found.estimate):
                print(f"{gpu.name}  {key}: {entry.config}: {fault_of(found)}; searching", flush=True)
                searching.append(key)
            else:
                entry = replace(entry_of(found), source=entry.source, accepted_fault=fault_of(found) or entry.accepted_fault)
                table.rows[key] = replace(table.rows[key], **{fill: entry})
        elif resources != (recorded := (entry.registers, entry.shared_memory, entry.tensor_memory)):
            raise ValueError(f"{table.name}, {key}: {entry.config} compiles to another binary: registers, shared and tensor "
                             f"memory are {resources}, recorded are {recorded}; rebuild the table")
    for key in dict.fromkeys(searching):
        known = {getattr(table.rows[key], fill).config for fill in FILLS}
        table.rows[key] = RowBuilder(key, gpu, workers).build(known, search=True)
    provenance = table.provenance | {"kernel_hash": kernel_hash()}
    if update:
        provenance.pop("second_triton", None)  # it has not compiled these kernels
    return write_table(replace(table, provenance=provenance), folder)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    top = argparse.ArgumentParser(prog="python -m perf.config_table", description="Build the shipped tables of configs.")
    top.add_argument("gpus", nargs="+", metavar="GPU", help="model: h200, a100")
    mode = top.add_mutually_exclusive_group()
    mode.add_argument("--from-sweeps", type=Path, nargs="+", metavar="FOLDER", help="replace rows by what sweeps measured")
    mode.add_argument("--restamp", action="store_true", help="accept edited kernels if the binaries are the same")
    mode.add_argument("--search", nargs="*", metavar="KERNEL/WIDTH/MASK", help="search these rows only: dq/128/full")
    mode.add_argument("--like", metavar="GPU", help="start from this GPU's table and search only rows with a fault: faster")
    top.add_argument("--update", action="store_true", help="with --restamp: record what the checked rows compile to now")
    top.add_argument("--also", metavar="PYTHON", help="a Python with another Triton that must compile the configs well too")
    arguments = top.parse_args(argv)
    if arguments.update and not arguments.restamp:
        top.error("--update: expected --restamp with it")
    try:
        like = gpus.named(arguments.like) if arguments.like else None
        for gpu in map(gpus.named, arguments.gpus):
            if arguments.restamp:
                with Workers() as workers:
                    path = restamp(gpu, workers, update=arguments.update)
            elif arguments.from_sweeps:
                path = build_from_sweeps(gpu, [trials.read(folder) for folder in arguments.from_sweeps])
            else:
                path = build(gpu, like, arguments.also, arguments.search)
            print(f"wrote {path}")
    except (ValueError, OSError, TableError, JournalError) as error:
        top.error(f"{error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
