"""Kernels compiled before the visit of a GPU: an archive of Triton's cache on disk, made without a GPU.

    make     python -m perf.gpu --precompile h200 --out DIR     compiles, and writes DIR/kernels.tar.xz
    use      python -m perf.gpu --out DIR                       unpacks it, and says whether Triton finds a kernel in it

Triton finds a binary by a hash (triton/runtime/cache.py, get_cache_key) of the files of its own wheel, which differ between
versions of Python, the kernels' source, the types of the arguments, the compiler's options, the version of ptxas, and
variables such as DISABLE_LLVM_OPT. So the archive must be made by the Python and Triton that use it, from the same source.
Only binaries and their metadata are packed, not the launchers that Triton builds with the C compiler of the machine.
"""

import functools
import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tritonattn import Config, Problem
from tritonattn.analysis import compile_report
from tritonattn.autotune import bench, prune, tune
from tritonattn.autotune.worker_pool import Failure, Workers
from tritonattn.configs.key import precision
from tritonattn.gpu import Gpu
from tritonattn.runtime import launch

from .cases import Case

ARCHIVE, FOLDER = "kernels.tar.xz", "kernels"
LIMIT = 60 << 20  # bytes of the archive
# compiled first, and looked for at the start of a visit
PROBE = "forward", Problem((1,), 2, 2, 128, 128, 64, 64, torch.bfloat16), Config(64, 64)
THE_PROBLEM_ITSELF = functools.partial(bench.compile_case, case=-1)


def jobs(suite: tuple[Case, ...], sweeps: list[Problem], on: Gpu) -> Iterator[tuple]:
    """Yield the arguments of `inspect_job` for what a benchmark launches, and for all candidates of sweeps."""
    for case in suite:
        for kernel in ("forward",) if case.directions == ("forward",) else ("forward", "delta", "dq", "dkdv"):
            yield kernel, case.problem, None, on, precision(case.problem) or "ieee", THE_PROBLEM_ITSELF
    for problem in sweeps:
        for kernel in tune.kernels_of(problem):
            for config in prune.candidates(kernel, problem, on):
                if prune.check_config(kernel, problem, config, on) is None:
                    yield kernel, problem, config, on, precision(problem) or "ieee"


def compile_all(todo: list[tuple], deadline: float) -> tuple[int, int]:
    """Compile into Triton's cache until the deadline. Return how many jobs are done, and how many of them failed."""
    done = failed = 0
    with Workers() as workers:
        for result in workers.map(todo):
            done, failed = done + 1, failed + isinstance(result, Failure)
            if time.monotonic() > deadline:
                break
    return done, failed


def pack(folder: Path, archive: Path, limit: int = LIMIT) -> tuple[int, int]:
    """Write the binaries of a cache to an archive, the oldest first, until it has `limit` bytes. Return (packed, left out)."""
    # the metadata is written last
    binaries = sorted((path.with_suffix(".cubin") for path in folder.glob("*/*_kernel.json") if not path.name.startswith("_")),
                      key=lambda path: path.stat().st_mtime)
    packed = 0
    with open(archive, "wb") as file, tarfile.open(fileobj=file, mode="w:xz", format=tarfile.PAX_FORMAT) as tar:
        for path in binaries:
            # what the compressor still holds is at most the binary itself
            if file.tell() + 2 * path.stat().st_size > limit:
                break
            for each in (path, path.with_suffix(".json")):
                tar.add(each, f"{each.parent.name}/{each.name}")
            packed += 1
    return packed, len(binaries) - packed


def unpack(archive: Path, folder: Path) -> set[str]:
    """Write an archive's binaries to a cache and return the names of its entries. Triton's lists hold absolute paths."""
    entries = set()
    with tarfile.open(archive) as tar:
        for member in tar:
            path = folder.joinpath(*Path(member.name).parts[-2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())
            if path.suffix == ".json":
                files = {each.name: str(each.resolve()) for each in (path, path.with_suffix(".cubin"))}
                path.with_name(f"__grp__{path.name}").write_text(json.dumps({"child_paths": files}))
                entries.add(path.parent.name)
    return entries


def probe_entry(on: Gpu) -> str:
    """Return the name of the entry of Triton's cache that holds PROBE, compiled if it is not there."""
    compiled = compile_report.compile_launch(launch.example_launch(*PROBE), on)
    return Path(next(iter(compiled.metadata_group.values()))).parent.name
