"""Child processes for compiling and timing, and a pool of compilers.

    parent  --job-->  pipe  --job-->  child          a child that hangs is killed with everything that it started
            <-result-       <-result-                a child that dies is replaced, and the other jobs continue

Children are started with `subprocess`, not with `multiprocessing`, whose "spawn" would run the user's main script again.
Compilers see no GPU and never interpret, even where the parent does.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST = 32        # compilers: each takes about 1 GB of memory
TIMEOUT = 120.0  # seconds for a compilation: the slowest one that succeeded took 10


@dataclass(frozen=True)
class Failure:
    """A config without a result; `code` is one of prune.REASONS or search.FAILURES."""

    code: str
    message: str
    lasting: bool = True  # False where the process died or took too long: another attempt may succeed


class Child:
    """A Python process that runs `code`, and a pipe to it."""

    def __init__(self, code: str, uses_gpu: bool = False, python: str = sys.executable):
        environment = dict(os.environ)
        # a child must not tune the calls that it makes itself
        environment.pop("TRITONATTN_AUTOTUNE", None)
        if not uses_gpu:
            environment.pop("TRITON_INTERPRET", None)
            environment["CUDA_VISIBLE_DEVICES"] = environment["HIP_VISIBLE_DEVICES"] = ""
        self.pipe, other_end = Pipe()
        # the package goes to the end of the path: another Python has its own torch and Triton
        code = f"import sys; sys.path.append({str(ROOT)!r})\n{code}"
        with other_end:
            # a session of its own, so that stop() also kills ptxas; compilers print whole kernels when they fail
            self.process = subprocess.Popen(
                [python, "-c", code, str(other_end.fileno())], pass_fds=[other_end.fileno()], env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def send(self, job: tuple) -> None:
        """Send a job. A dead child shows at `receive`."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(job)

    def receive(self, timeout: float):
        """Return the child's result. Raises TimeoutError, or EOFError if the child has ended."""
        if not self.pipe.poll(timeout):
            raise TimeoutError
        try:
            return self.pipe.recv()
        except OSError as error:
            # it ended in the middle of a result, or before it read its job
            raise EOFError from error

    def stop(self) -> None:
        """Kill the process and everything that it started, and wait for its end."""
        if self.process.returncode is None:
            # a compiler that it started may still run, even if the process itself has ended
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.pipe.close()


def serve(answer: Callable, code: str) -> None:
    """Answer jobs in a child until the parent closes the pipe; an exception becomes a Failure with this code."""
    pipe = Connection(int(sys.argv[1]))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            result = answer(*job)
        except Exception as error:  # any error of a config is its result
            result = Failure(code, f"{type(error).__name__}: {str(error)[:300]}")
        pipe.send(result)


def inspect_job(kernel: str, problem, config, gpu, precision: str = "ieee"):
    """Return the KernelReport, with float32 dots of this precision ("ieee" or "tf32")."""
    import torch

    from ..analysis import compile_report

    torch.backends.cuda.matmul.fp32_precision = precision
    return compile_report.inspect_kernel(kernel, problem, config, gpu)


class Workers:
    """Up to `count` compilers, started on demand and reused. A context manager: on exit all are gone."""

    CODE = f"from {__name__} import inspect_job, serve; serve(inspect_job, 'compile error')"

    def __init__(self, count: int | None = None, timeout: float = TIMEOUT, python: str = sys.executable, code: str = CODE):
        """python: an interpreter with another torch and Triton. code: what a child runs, for tests."""
        self._count = count or min(len(os.sched_getaffinity(0)), MOST)
        self._timeout, self._python, self._code = timeout, python, code
        self._children: list[Child] = []
        self._idle: list[Child] = []

    def map(self, jobs: Sequence[tuple]) -> Iterator:
        """Yield the result of each job, arguments of `inspect_job`, in order: a KernelReport or a Failure."""
        waiting, busy, results = deque(enumerate(jobs)), {}, {}  # busy: {pipe: (child, number of its job, deadline)}
        try:
            for number in range(len(waiting)):
                while number not in results:
                    while waiting and len(busy) < self._count:
                        child = self._idle.pop() if self._idle else self._start()
                        busy[child.pipe] = child, waiting[0][0], time.monotonic() + self._timeout
                        child.send(waiting.popleft()[1])
                    results |= self._collect(busy)
                yield results.pop(number)
        finally:
            # not empty only after an error, or when the caller stops early
            for child, *_ in busy.values():
                self._stop(child)

    def _collect(self, busy) -> dict:
        """Wait for at least one child. Return {number of a job: its result} of all that have answered, ended or timed out."""
        first = min(deadline for _, _, deadline in busy.values())
        ready = wait(list(busy), max(first - time.monotonic(), 0))
        expired = [pipe for pipe, (_, _, deadline) in busy.items() if deadline <= time.monotonic()]
        results = {}
        for pipe in ready or expired:
            child, number, _ = busy[pipe]
            try:
                results[number] = child.receive(0)
                self._idle.append(child)
            except TimeoutError:
                results[number] = Failure("compile timeout", f"no result in {self._timeout:g} s", lasting=False)
                self._stop(child)
            except EOFError:
                results[number] = Failure("compile error", "the compiler's process ended", lasting=False)
                self._stop(child)
            del busy[pipe]
        return results

    def _start(self) -> Child:
        self._children.append(Child(self._code, python=self._python))
        return self._children[-1]

    def _stop(self, child) -> None:
        child.stop()
        if child in self._children:
            self._children.remove(child)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._idle.clear()
        while self._children:
            self._children.pop().stop()
