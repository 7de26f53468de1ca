"""Kernels compiled before a GPU session: an archive of Triton's cache on disk, made without a GPU.

    make     python -m perf.gpu --precompile h200 --out DIR     compiles, and writes DIR/kernels.tar.xz
    use      python -m perf.gpu --out DIR                       unpacks it, and says whether Triton finds a kernel in it
    probe    python -m perf.precompile                          prints the entry of one kernel for this GPU in Triton's cache

Triton finds a binary by a hash (triton/runtime/cache.py, get_cache_key) of the files of its own wheel, which differ between
versions of Python, the kernels' source, the types of the arguments, the compiler's options, the version of ptxas, and
variables such as DISABLE_LLVM_OPT. So the archive must be made by the Python and Triton that use it, from the same source.
Only binaries and their metadata are packed, not the launchers that Triton builds with the C compiler of the machine.

Of a sweep, the archive holds what its survey inspects: one binary for each candidate that is not excluded before compiling.
The few of those that the sweep draws as a sample are compiled during the sweep, and so is what the check of a surviving
candidate launches, such as inference and inputs of other lengths.
"""

import functools
import json
import lzma
import os
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
from tritonattn.gpu import Gpu, gpu_of
from tritonattn.runtime import launch

from .cases import Case

ARCHIVE, FOLDER = "kernels.tar.xz", "kernels"
LIMIT = 60 << 20  # bytes of the archive
HELD_BACK = 128 << 10  # bytes of output: what LZMA has not written yet, one block of 64 KiB at most, and tar's headers
PACKED = (".cubin", ".hsaco", ".amdgcn", ".json")  # what launches and KernelReport read; the metadata last, as Triton does
# compiled first, and looked for at the start of a session
PROBE = "forward", Problem((1,), 2, 2, 128, 128, 64, 64, torch.bfloat16), Config(64, 64)
UNREADABLE = tarfile.TarError, lzma.LZMAError, EOFError, OSError
THE_PROBLEM_ITSELF = functools.partial(bench.compile_case, case=-1)


def jobs(suite: tuple[Case, ...], sweeps: list[Problem], on: Gpu) -> Iterator[tuple]:
    """Yield the arguments of `inspect_job` for what a benchmark launches, and for all candidates of sweeps.

    A benchmark's jobs have no config.
    """
    for case in suite:
        for kernel in ("forward",) if case.directions == ("forward",) else ("forward", "delta", "dq", "dkdv"):
            yield kernel, case.problem, None, on, precision(case.problem) or "ieee", THE_PROBLEM_ITSELF
    for problem in sweeps:
        for kernel in tune.kernels_of(problem):
            for config in prune.candidates(kernel, problem, on):
                if prune.check_config(kernel, problem, config, on) is None:
                    yield kernel, problem, config, on, precision(problem) or "ieee"


def compile_all(todo: list[tuple], deadline: float) -> Iterator[Failure | None]:
    """Compile into Triton's cache until the deadline. Yield None for each job that is done, or its Failure, in order."""
    with Workers() as workers:
        for result in workers.map(todo):
            yield result if isinstance(result, Failure) else None
            if time.monotonic() > deadline:
                break


def pack(folder: Path, archive: Path, limit: int = LIMIT) -> tuple[int, int]:
    """Write the binaries of a cache to an archive, the oldest first, until it has `limit` bytes. Return (packed, left out).

    An archive that is there stays as it is until the new one is complete.
    """
    # Triton writes the metadata last
    entries = sorted((path for path in folder.glob("*/*_kernel.json") if not path.name.startswith("_")),
                     key=lambda path: path.stat().st_mtime)
    packed, unfinished = 0, archive.with_name(f"{archive.name}.part")
    with open(unfinished, "wb") as file, tarfile.open(fileobj=file, mode="w:xz", format=tarfile.PAX_FORMAT) as tar:
        for path in entries:
            files = _files_of(path)
            if file.tell() + HELD_BACK + sum(each.stat().st_size for each in files) > limit:
                break
            for each in files:
                tar.add(each, f"{each.parent.name}/{each.name}")
            packed += 1
    os.replace(unfinished, archive)
    return packed, len(entries) - packed


def unpack(archive: Path, folder: Path) -> set[str]:
    """Write an archive's binaries to a cache and return the names of its entries. Triton's lists hold absolute paths.

    Raises UNREADABLE if the archive is broken; the binaries before the fault can be used.
    """
    entries = set()
    with tarfile.open(archive, "r:xz") as tar:
        for member in tar:
            path = folder.joinpath(*Path(member.name).parts[-2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())
            if path.suffix == ".json":
                files = {each.name: str(each.resolve()) for each in _files_of(path)}
                path.with_name(f"__grp__{path.name}").write_text(json.dumps({"child_paths": files}))
                entries.add(path.parent.name)
    return entries


def _files_of(metadata: Path) -> list[Path]:
    """Return the files of a cache's entry that are packed."""
    return [path for suffix in PACKED if (path := metadata.with_suffix(suffix)).exists()]


def probe_entry(on: Gpu) -> str:
    """Return the name of the entry of Triton's cache that holds PROBE, compiled if it is not there."""
    compiled = compile_report.compile_launch(launch.example_launch(*PROBE), on)
    return Path(next(iter(compiled.metadata_group.values()))).parent.name


if __name__ == "__main__":
    print(probe_entry(gpu_of(torch.device("cuda", 0))))
