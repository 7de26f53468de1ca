"""Build the shipped table of a GPU from what the compiler makes of the candidates. No GPU is needed.

    python -m perf.config_table h200 a100 [--like GPU] [--also PYTHON]    build tables; a stopped build resumes
    python -m perf.config_table h200 --from-sweeps runs/d128              replace rows by what sweeps measured
    python -m perf.config_table h200 --restamp                            accept edited kernels with the same binaries

A row gets the config with the least modelled time among those without a fault. 16-bit rows with heads of 64, 128 and 256
are searched. The other rows choose among the configs of the old table and of neighbouring head sizes; they are searched only
if each of these has a fault. `--like` starts from the table of another GPU instead, and then this holds for all rows. Configs
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean

import torch
import triton

from tritonattn import __version__
from tritonattn import gpu as gpus
from tritonattn.analysis.cost_model import estimate
from tritonattn.autotune import trials
from tritonattn.autotune.prune import candidates, check_config, check_report, time_penalty
from tritonattn.autotune.replay import comparable
from tritonattn.autotune.worker_pool import Failure, Workers
from tritonattn.block_mask import TILE
from tritonattn.config import Config
from tritonattn.configs.kernel_hash import kernel_hash
from tritonattn.configs.lookup import gpu_fill, mask_class, row_keys
from tritonattn.configs.shipped import FILLS, FOLDER, MASKS, WIDTHS, Entry, Row, Table, gpu_fingerprint, read_table, write_table
from tritonattn.gpu import Gpu
from tritonattn.measure import environment
from tritonattn.measure.journal import Journal, digest
from tritonattn.problem import Problem

KERNELS = ("forward", "dq", "dkdv", "dbias")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
CHECKED_WIDTHS = (64, 128)  # head sizes whose 16-bit rows are checked on the other problems that they serve
ATTEMPTS = 12      # configs of a row that are checked before the one with the fewest faults is accepted
LIGHT_SPILLS = 16  # spilling instructions in a loop that are tolerated with the second Triton
WORK = Path("build")  # where the journals go
REJECTED = 8       # rejected configs that a row lists, the fastest first


def row_keys_of(gpu: Gpu) -> Iterator[tuple]:
    """Yield the keys of all rows of a GPU's table. Where a row is missing, the lookup uses a wider one or one with edges.

    float32 has fewer rows. Only Hopper has rows for windows bounded on the left: there a further pipelined loop may make
    ptxas serialize all products.
    """
    for kernel, size, width, mask in itertools.product(KERNELS, DTYPES, WIDTHS, MASKS):
        windows = gpu.arch == "sm_90" and size == 2 and width <= 256
        of_kernel = mask == "pairs" or (kernel != "dbias" and (mask != "window" or windows))
        of_size = size == 2 or (width in (64, 128, 256, 512) and mask != "full" and width <= gpu.largest_head(DTYPES[size]))
        if of_kernel and of_size:
            yield kernel, size, width, mask


def example_problem(key: tuple, fill: str, gpu: Gpu) -> Problem:
    """Return the problem that represents a row: 16k tokens of 32 heads ("filled"), or half a GPU of tiles ("underfilled").

    Rows with edges are causal and end within a tile; windows are half as wide as the sequence; "pairs" have a float32 bias.
    """
    _, size, width, mask = key
    n = 4096 if fill == "filled" else TILE * max(1, gpu.sms // 16)
    n -= 0 if mask == "full" else 8
    batch, heads = ((4,), 32) if fill == "filled" else ((1,), 8)
    window = {"full": (None, None), "window": (n // 2, 0)}.get(mask, (None, 0))
    bias = torch.float32 if mask == "pairs" else None
    return Problem(batch, heads, heads, n, n, width, width, DTYPES[size], window, bias=bias)


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
    }[mask]
    # the gradient of a bias needs a bias
    bias = {"bias": torch.float32} if kernel == "dbias" else {}
    problems = {name: Problem((4,), 32, 8, 1000, 1000, width, width, torch.bfloat16, **bias, **options)
                for name, options in variants.items()}
    return {name: problem for name, problem in problems.items() if mask_class(kernel, problem) == mask}


@dataclass(frozen=True)
class Variant:
    """One way in which the configs of a row are compiled; the row's example has no name."""

    problem: Problem
    name: str = ""
    precision: str = "ieee"
    second: bool = False  # by the second Triton


@dataclass(frozen=True)
class Result:
    """One compiled config. Without cycles there is no binary, or it does not fit, or its loop was not recognised."""

    entry: Entry                                # with its fault; no registers: there is no binary
    reason: str | None = None                   # one of prune.REASONS, None without a fault
    spills: int = 0                             # instructions in the loop
    cycles: dict = field(default_factory=dict)  # {fill: modelled cycles}

    @property
    def config(self) -> Config:
        return self.entry.config


def result_of(config: Config, compiled, underfilled: Problem) -> Result:
    """Return the result for a KernelReport or a Failure."""
    if isinstance(compiled, Failure):
        fault = f"{compiled.code}: {compiled.message}"
        return Result(Entry(config, "static-model", 0, 0, 0, 0, None, fault), compiled.code)
    verdict, cycles, bound = check_report(compiled), {}, None
    if verdict.estimate is not None:
        small = estimate(replace(compiled, problem=underfilled))
        cycles, bound = {"filled": verdict.estimate.cycles, "underfilled": small.cycles}, verdict.estimate.bound
    fault = f"{verdict.reason}: {verdict.note}".rstrip(": ") if verdict.reason else ""
    entry = Entry(config, "static-model", compiled.registers, compiled.shared_memory, compiled.tensor_memory,
                  compiled.occupancy, bound, fault)
    return Result(entry, verdict.reason, compiled.loop_spills or 0, cycles)


class Builder:
    """Makes the rows of one GPU's table; `old` are the rows to start from, `second` compiles with another Triton."""

    def __init__(self, gpu: Gpu, journal: Journal, workers: Workers, second: Workers | None = None, old: dict | None = None,
                 search: bool = True):
        """search: whether the usual rows are searched even if the known configs have no fault."""
        self._gpu, self._journal, self._workers, self._second = gpu, journal, workers, second
        self._old, self._search = old or {}, search
        self._faults: dict[tuple, list[str]] = {}  # {(row, config): its faults in variants}
        self._results = {(tuple(entry["row"]), entry["variant"], entry["result"]["entry"]["config"]):
                         Result(**entry["result"] | {"entry": Entry.from_json(entry["result"]["entry"])})
                         for entry in journal.entries}

    def row(self, key: tuple, done: dict) -> Row:
        """Return the row for a key; `done` are the rows made before. Raise ValueError if no config fits."""
        configs = self.known_configs(key, done)
        row = self.choose(key, self.compile(key, configs))
        _, size, width, _ = key
        # wide heads of float32 spill with every config and take long to compile
        faulty = row and (size == 2 or width <= 128) and (row.filled.accepted_fault or row.underfilled.accepted_fault)
        if row is None or faulty or (self._search and searched(key)):
            problem = example_problem(key, "filled", self._gpu)
            configs |= {config for config in candidates(key[0], problem, self._gpu, stages_of(key, self._gpu))
                        if sensible(key, config, self._gpu) and check_config(key[0], problem, config, self._gpu) is None}
            results = self.compile(key, configs)
            row = self.choose(key, results)
            if row is None:
                faults = "; ".join(f"{result.config}: {result.entry.accepted_fault}" for result in results)
                raise ValueError(f"{self._gpu.name}, {key}: expected a config that fits, got none ({faults})")
        return row

    def known_configs(self, key: tuple, done: dict) -> set[Config]:
        """Return the configs of the old row, and for 16-bit rows those it rejected and those of neighbouring widths."""
        rows = [self._old.get(key)]
        if key[1] == 4:
            return {getattr(row, fill).config for row in rows if row for fill in FILLS}
        rejected, at = map(Config.parse, rows[0].rejected if rows[0] else ()), WIDTHS.index(key[2])
        rows += [done.get((*key[:2], width, key[3])) for width in WIDTHS[max(at - 1, 0):at + 2]]
        # only Hopper leaves the edges out of its pipeline
        edge_stages = 1 if self._gpu.arch == "sm_90" else None
        return {replace(config, edge_stages=edge_stages if config.num_stages > 1 else None)
                for config in (*rejected, *(getattr(row, fill).config for row in rows if row for fill in FILLS))}

    def compile(self, key: tuple, configs: Iterable[Config], variants: Iterable[Variant] = ()) -> list[Result]:
        """Return the results of every config in every variant (default: the row's example), from the journal if possible."""
        variants = tuple(variants) or (Variant(example_problem(key, "filled", self._gpu)),)
        jobs = [(variant, config) for variant in variants for config in sorted(configs, key=str)]
        underfilled = example_problem(key, "underfilled", self._gpu)
        for second, workers in ((False, self._workers), (True, self._second)):
            missing = [(variant, config) for variant, config in jobs
                       if variant.second == second and (key, variant.name, str(config)) not in self._results]
            todo = [(key[0], variant.problem, config, self._gpu, variant.precision) for variant, config in missing]
            for compiled, (variant, config) in zip(workers.map(todo) if todo else (), missing):
                result = result_of(config, compiled, underfilled)
                self._results[key, variant.name, str(config)] = result
                if not isinstance(compiled, Failure) or compiled.lasting:
                    content = vars(result) | {"entry": result.entry.as_json()}
                    self._journal.append({"row": list(key), "variant": variant.name, "result": content})
        return [self._results[key, variant.name, str(config)] for variant, config in jobs]

    def order(self, results: list[Result], fill: str) -> list[Result]:
        """Return the results with cycles, the fastest first; those with a fault come last."""
        def sort_key(result):
            cycles = result.cycles[fill] * time_penalty(result.reason, result.spills)
            return result.reason is not None, cycles, result.entry.shared_memory, str(result.config)

        return sorted((result for result in results if result.cycles), key=sort_key)

    def choose(self, key: tuple, results: list[Result]) -> Row | None:
        """Return the row made of the best of these results, or None if none fits."""
        orders = {fill: self.order(results, fill) for fill in FILLS}
        pick = self._pick_float32 if key[1] == 4 else self._pick
        entries = {fill: pick(key, order) for fill, order in orders.items()}
        if None in entries.values():
            return None
        chosen = {entry.config for entry in entries.values()}
        others = [result for result in orders["filled"] if result.config not in chosen]
        others += [result for result in results if not result.cycles]
        return Row(*key, **entries, rejected={str(result.config): self._reason(key, result) for result in others[:REJECTED]})

    def _pick_float32(self, key, order) -> Entry | None:
        """Return the first config that fits with TF32 too, with the larger of both binaries' resources."""
        variant = Variant(example_problem(key, "filled", self._gpu), "tf32", "tf32")
        for result in order:
            entry, tf32 = result.entry, self.compile(key, [result.config], [variant])[0].entry
            if tf32.registers and tf32.fits(self._gpu):
                return replace(entry, shared_memory=max(entry.shared_memory, tf32.shared_memory),
                               tensor_memory=max(entry.tensor_memory, tf32.tensor_memory),
                               occupancy=min(entry.occupancy, tf32.occupancy))
            self._faults[key, result.config] = [tf32.accepted_fault]
        return None

    def _pick(self, key, order) -> Entry | None:
        """Return the first config without a fault in any variant, else the one with the fewest."""
        least = None
        for result in [result for result in order[:ATTEMPTS] if result.reason is None]:
            faults = self.faults(key, result.config)
            if not faults:
                return result.entry
            if least is None or len(faults) < len(least[1]):
                least = result, faults
        if least is None:
            return order[0].entry if order else None
        return replace(least[0].entry, accepted_fault="; ".join(least[1]))

    def faults(self, key: tuple, config: Config) -> list[str]:
        """Return the faults of a config on the other problems of its row and with the second Triton."""
        variants = [Variant(problem, f"with {name}") for name, problem in other_problems(key).items()]
        if self._second and key[1] == 2 and key[2] in CHECKED_WIDTHS:
            variants += [Variant(each.problem, f"{each.name} by another Triton", second=True) for each in variants]
            variants.append(Variant(example_problem(key, "filled", self._gpu), "by another Triton", second=True))
        results = self.compile(key, [config], variants) if variants else []
        self._faults[key, config] = [
            f"{result.entry.accepted_fault}, {variant.name}" for result, variant in zip(results, variants)
            if result.reason and not (variant.second and result.reason == "spill" and result.spills <= LIGHT_SPILLS)]
        return self._faults[key, config]

    def _reason(self, key, result) -> str:
        """Return why a config was rejected: its own fault, else its first fault in another variant, else "slower"."""
        faults = self._faults.get((key, result.config)) or ["slower"]
        return result.reason or re.split("[:,]", faults[0])[0]


def searched(key: tuple) -> bool:
    """Return whether a build looks for new configs even if the known ones have no fault."""
    return key[1] == 2 and key[2] in (64, 128, 256)


def stages_of(key: tuple, gpu: Gpu) -> tuple[int, ...]:
    """Return the numbers of stages that a search tries."""
    if key[1] == 4 or gpu.is_amd:
        # without tensor cores, and with AMD's pipeline through registers, more stages are hardly worth their memory
        return 1, 2
    # two stages of wide heads often do not fit
    return (1, 2, 3) if key[2] > 256 else (2, 3)


def sensible(key: tuple, config: Config, gpu: Gpu) -> bool:
    """Return whether a tile is worth compiling. Fewer than 64 owner rows: for float32, heads over 128 and "pairs" alone.

    Heads of 512, float32, and pairwise values beyond heads of 128 have tiles of at most 64. In NVIDIA's float32 a thread
    holds whole rows: beyond heads of 64, tiles larger than 32 spill hundreds of registers.
    """
    kernel, size, width, mask = key
    owner = config.block_n if kernel == "dkdv" else config.block_m
    if size == 2 and width <= 128 and owner < 64 and mask != "pairs":
        return False
    if size == 4:
        least, largest = 16, 32 if width > 64 and not gpu.is_amd else 64
    else:
        least, largest = 16 if width > 128 else 32, 64 if width > (128 if mask == "pairs" else 256) else TILE
    return least <= min(config.block_m, config.block_n) and max(config.block_m, config.block_n) <= largest


def path_of(gpu: Gpu, folder: Path = FOLDER) -> Path:
    """Return the file of a GPU's table."""
    return folder / f"{environment.slug(gpu.name)}.json"


def build(gpu: Gpu, like: Gpu | None = None, also: str | None = None, folder: Path = FOLDER, work: Path = WORK) -> Path:
    """Build all rows of a GPU's table, then write the file and return its path.

    like: another GPU, whose table to start from. also: a Python with another Triton. Results are kept in a journal in `work`.
    """
    path, start = path_of(gpu, folder), path_of(like or gpu, folder)
    old = read_table(start).rows if like or start.exists() else {}
    tritons = {"triton": triton.__version__} | ({"second_triton": triton_of(also)} if also else {})
    # an edit of the package begins a new journal
    plan = {"gpu": gpu.name, "source": environment.source_digest(Path(__file__), patterns=("**/*.py",))} | tritons
    second_workers = Workers(python=also) if also else contextlib.nullcontext()
    with Journal(work / f"table-{path.stem}-{digest(plan)}.jsonl", plan) as journal, Workers() as workers, \
            second_workers as second:
        builder, rows = Builder(gpu, journal, workers, second, old, search=like is None), {}
        # searched rows come first, because the others look at them
        for key in sorted(row_keys_of(gpu), key=lambda key: not searched(key)):
            rows[key] = row = builder.row(key, rows)
            print(f"{gpu.name}  {key[0]:8} {8 * key[1]:2} bits  {key[2]:3}  {key[3]:6} {row.filled.config!s:14} "
                  f"{row.underfilled.config!s:14} {row.filled.accepted_fault}", flush=True)
    provenance = {"tritonattn": __version__, "kernel_hash": kernel_hash()} | tritons
    rows = {key: rows[key] for key in row_keys_of(gpu)}
    return write_table(Table(path.stem, {"name": gpu.name} | gpu_fingerprint(gpu), provenance, rows), folder)


def triton_of(python: str) -> str:
    """Return the version of Triton in another Python. Raise ValueError if it has none."""
    run = subprocess.run([python, "-c", "import triton; print(triton.__version__)"], capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"{python}: expected a Python with Triton, got {run.stderr.strip().splitlines()[-1:]}")
    return run.stdout.strip()


def build_from_sweeps(gpu: Gpu, runs: list[trials.Run], folder: Path = FOLDER) -> Path:
    """Replace the entries of a GPU's shipped table that sweeps measured, write the table to `folder` and return its path.

    An entry gets the config with the least geometric mean of its times, as multiples of the incumbent's, over all problems
    of the entry. Raise ValueError for a synthetic sweep, and for one of another GPU or of other kernels than the table.
    """
    path = path_of(gpu)
    table, timed = read_table(path), defaultdict(lambda: defaultdict(list))  # {(row key, fill): {config: a trial per problem}}
    for run in runs:
        if run.synthetic:
            raise ValueError("config_table: expected measured sweeps, got a synthetic one")
        if run.plan["source"] != table.provenance["kernel_hash"] or not table.matches(Gpu(tensor_memory=0, **run.plan["gpu"])):
            raise ValueError(f"{path}: expected a sweep of the GPU and the kernels of this table, got one of {run.plan['gpu']}")
        for job in run.jobs:
            at = next(row_keys(job.kernel, job.problem)), gpu_fill(job.kernel, job.problem, gpu)
            for name, trial in comparable(run.of(job)).items():
                config = Config.parse(name)
                # a table holds no tile larger than a block mask's
                if (trial.status == "ok" or name == job.incumbent) and max(config.block_m, config.block_n) <= TILE:
                    timed[at][config].append(trial)
    for (key, fill), by_config in timed.items():
        config = fastest(by_config)
        # of the binaries for several problems, the one with the most shared memory
        static = max((trial.static for trial in by_config[config]), key=lambda static: static.get("shared_memory", 0))
        entry = Entry(config, "measured", static.get("registers"), static.get("shared_memory", 0),
                      static.get("tensor_memory", 0), static.get("occupancy"), static.get("bound"))
        row = table.rows.get(key) or Row(*key, filled=entry, underfilled=entry)
        rejected = {name: reason for name, reason in row.rejected.items() if name != str(config)}
        table.rows[key] = replace(row, **{fill: entry}, rejected=rejected)
    return write_table(table, folder)


def fastest(by_config: dict[Config, list[trials.Trial]]) -> Config:
    """Return the config with the least geometric mean, out of those that were timed on the most problems."""
    most = max(map(len, by_config.values()))
    return min((config for config, group in by_config.items() if len(group) == most),
               key=lambda config: (geometric_mean(trial.ratio for trial in by_config[config]), str(config)))


def restamp(gpu: Gpu, workers: Workers, folder: Path = FOLDER) -> Path:
    """Write the current kernel hash into a GPU's table and return its path.

    Raise ValueError unless the configs of all checked rows compile to the recorded registers and memory, with the recorded
    version of Triton.
    """
    table = read_table(path_of(gpu, folder))
    if table.provenance["triton"] != triton.__version__:
        raise ValueError(f"{table.name}: made with Triton {table.provenance['triton']}, got {triton.__version__}")
    entries = [(row.key, entry) for row in table.rows.values() if row.itemsize == 2 and row.width in CHECKED_WIDTHS
               for entry in (row.filled, row.underfilled) if entry.registers is not None]
    jobs = [(key[0], example_problem(key, "filled", gpu), entry.config, gpu) for key, entry in entries]
    for compiled, (key, entry) in zip(workers.map(jobs), entries):
        resources = None if isinstance(compiled, Failure) else (
            compiled.registers, compiled.shared_memory, compiled.tensor_memory)
        if resources != (recorded := (entry.registers, entry.shared_memory, entry.tensor_memory)):
            raise ValueError(f"{table.name}, {key}: {entry.config} compiles to another binary: registers, shared and tensor "
                             f"memory are {resources}, recorded are {recorded}; rebuild the table")
    return write_table(replace(table, provenance=table.provenance | {"kernel_hash": kernel_hash()}), folder)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    top = argparse.ArgumentParser(prog="python -m perf.config_table", description="Build the shipped tables of configs.")
    top.add_argument("gpus", nargs="+", metavar="GPU", help="model: h200, a100")
    mode = top.add_mutually_exclusive_group()
    mode.add_argument("--from-sweeps", type=Path, nargs="+", metavar="FOLDER", help="replace rows by what sweeps measured")
    mode.add_argument("--restamp", action="store_true", help="accept edited kernels if the binaries are the same")
    mode.add_argument("--like", metavar="GPU", help="start from this GPU's table and search only rows with a fault: faster")
    top.add_argument("--also", metavar="PYTHON", help="a Python with another Triton that must compile the configs well too")
    arguments = top.parse_args(argv)
    try:
        like = gpus.named(arguments.like) if arguments.like else None
        for gpu in map(gpus.named, arguments.gpus):
            if arguments.restamp:
                with Workers() as workers:
                    path = restamp(gpu, workers)
            elif arguments.from_sweeps:
                path = build_from_sweeps(gpu, [trials.read(folder) for folder in arguments.from_sweeps])
            else:
                path = build(gpu, like, arguments.also)
            print(f"wrote {path}")
    except ValueError as error:
        top.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
