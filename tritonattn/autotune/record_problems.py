"""What a model asks for: every problem that comes by while a block runs, to be tuned for later.

    one JSON line each: {"problem": {...}, "kernels": {"forward": 96, "dq": 96, "dkdv": 96}}     kernels and how often
"""

import contextlib
import json
import os
import threading
import warnings
from pathlib import Path

import torch

from ..configs import lookup
from ..problem import Problem


class RecordingError(Exception):
    """A file that holds no problems."""


@contextlib.contextmanager
def record_problems(path):
    """Write to `path` which problems attention is given inside the block, one line for each: for `tritonattn tune --from`.

    In all threads of this process; of several under torch.distributed the others add their rank to the name. The file is
    whole at any moment: it is replaced when a problem comes for the first time, and at the end, when the counts are known.
    Raises OSError where it cannot be written, before anything runs; what fails later is warned of.
    """
    dist = torch.distributed
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    seen, lock, path = {}, threading.Lock(), Path(f"{path}.rank{rank}" if rank else path)

    def write():
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        beside.write_text("".join(json.dumps({"problem": problem.as_json(), "kernels": kernels}) + "\n"
                                  for problem, kernels in seen.items()))
        beside.replace(path)

    def try_to_write():
        try:
            write()
        except OSError as error:
            warnings.warn(f"{path}: expected to write problems, got {type(error).__name__}: {error}", stacklevel=2)

    def watch(kernel, problem, gpu):
        with lock:
            kernels = seen.setdefault(problem, {})
            kernels[kernel] = kernels.get(kernel, 0) + 1
            if kernels[kernel] == 1:
                try_to_write()

    write()
    with lookup.observed(watch):
        try:
            yield
        finally:
            with lock:
                try_to_write()


def read(path) -> list[tuple[Problem, dict[str, int]]]:
    """The problems in a file, with their kernels and how often each ran. Raises RecordingError."""
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            content = json.loads(line)
            problem, kernels = Problem.from_json(content["problem"]), dict(content["kernels"])
            if not isinstance(problem.dtype, torch.dtype) or any(type(times) is not int for times in kernels.values()):
                raise TypeError("no dtype, or no counts")
            found.append((problem, kernels))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordingError(f"{path}, line {number}: expected a problem and its kernels, got {line[:60]!r}") from error
    return found
