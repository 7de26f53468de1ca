"""Record the problems that a model poses, to tune them later.

    one JSON line each: {"problem": {...}, "kernels": {"forward": 96, "dq": 96, "dkdv": 96}}     kernels and their calls
"""

import collections
import contextlib
import json
import threading
import warnings
from pathlib import Path

import torch

from ..configs import lookup
from ..configs.shipped import replace_file
from ..problem import Problem


@contextlib.contextmanager
def record_problems(path):
    """Write the problems of all attention calls inside the block to `path`, for `tritonattn tune --from`.

    All threads of this process are recorded. Under torch.distributed the ranks after the first add their rank to the name.
    The file is replaced as a whole when a new problem comes, and at the end with the final counts. Raises OSError if the
    file cannot be written at the start; later failures are warnings.
    """
    dist = torch.distributed
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    path = Path(f"{path}.rank{rank}" if rank else path)
    counts, lock = collections.defaultdict(collections.Counter), threading.Lock()

    def write():
        lines = [json.dumps({"problem": problem.as_json(), "kernels": kernels}) for problem, kernels in counts.items()]
        replace_file(path, "".join(f"{line}\n" for line in lines))

    def try_to_write():
        try:
            write()
        except OSError as error:
            warnings.warn(f"{path}: problems cannot be written: {type(error).__name__}: {error}", stacklevel=2)

    def count(kernel, problem, gpu):
        with lock:
            counts[problem][kernel] += 1
            if counts[problem][kernel] == 1:
                try_to_write()

    write()
    with lookup.observed(count):
        try:
            yield
        finally:
            with lock:
                try_to_write()


def read(path) -> list[tuple[Problem, dict[str, int]]]:
    """Return the problems in a file, each with its kernels and their calls. Raises ValueError."""
    problems = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            content = json.loads(line)
            problem, kernels = Problem.from_json(content["problem"]), dict(content["kernels"])
            if not isinstance(problem.dtype, torch.dtype) or any(type(times) is not int for times in kernels.values()):
                raise TypeError("the dtype or a count is invalid")
            problems.append((problem, kernels))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: expected a problem and its kernels, got {line[:60]!r}") from error
    return problems
