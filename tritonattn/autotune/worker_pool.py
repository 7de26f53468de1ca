"""Child processes for compiling and timing, and a pool of compilers.

    parent  --job-->  pipe  --job-->  child          a child that hangs is killed with everything that it started
            <-result-       <-result-                a child that dies is replaced, and the other jobs continue

Children are started with `subprocess`, not with `multiprocessing`, whose "spawn" would run the user's main script again.
Compilers see no GPU and never interpret, even where the parent does.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_COMPILERS = 32  # each takes about 1 GB of memory
TIMEOUT = 120.0  # seconds for a compilation: the slowest one that succeeded took 10


@dataclass(frozen=True)
class Failure:
    """A config without a result; `code` is one of prune.REASONS or search.FAILURES."""

    code: str
    message: str


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
        # the package goes to the end of the path: another Python has its own torch and Triton; so does the directory of the
        # program, for the modules of its score functions
        code = f"import sys; sys.path += {[str(ROOT), sys.path[0]]!r}\n{code}"
        with other_end:
            # a session of its own, so that kill() also ends ptxas; compilers print whole kernels when they fail
            self.process = subprocess.Popen(
                [python, "-c", code, str(other_end.fileno())], pass_fds=[other_end.fileno()], env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def ask(self, job: tuple, timeout: float, codes: tuple[str, str], announce: Callable[[str], object] = lambda text: None):
        """Send a job and return its result. Strings that come before it go to `announce`.

        If a message takes longer than `timeout`, or the child ends, the result is a Failure with the first or the second code.
        The child is stopped then.
        """
        try:
            self.pipe.send(job)
            while isinstance(message := self._receive(timeout), str):
                announce(message)
            return message
        except TimeoutError:
            failure = Failure(codes[0], f"no result in {timeout:g} s")
        except (EOFError, OSError):
            failure = Failure(codes[1], "its process ended")
        self.stop()
        return failure

    def _receive(self, timeout):
        start = time.monotonic()
        # a child that hangs, even in the middle of a message, is killed: that ends `recv`
        watchdog = threading.Timer(timeout, self.kill)
        watchdog.start()
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise (TimeoutError if time.monotonic() >= start + timeout else EOFError) from error
        finally:
            watchdog.cancel()

    @property
    def is_running(self) -> bool:
        """True until `stop` is called."""
        return self.process.returncode is None

    def kill(self) -> None:
        """Kill the process and everything that it started."""
        if self.is_running:
            # a compiler that it started may still run, even if the process itself has ended
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Kill the process and wait for its end."""
        self.kill()
        self.process.wait()
        self.pipe.close()


@functools.cache
def parent_pipe() -> Connection:
    """Return the pipe from a child to its parent."""
    return Connection(int(sys.argv[1]))


def serve(answer: Callable, code: str) -> None:
    """Answer jobs in a child until the parent closes the pipe; an exception becomes a Failure with this code."""
    with contextlib.suppress(EOFError):
        while True:
            job = parent_pipe().recv()
            try:
                result = answer(*job)
            except Exception as error:  # any error of a config is its result
                result = Failure(code, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            parent_pipe().send(result)


def inspect_job(kernel: str, problem, config, gpu, precision: str = "ieee",
                compile_only: Callable | None = None):
    """Return the KernelReport, with float32 dots of this precision ("ieee" or "tf32").

    Or call `compile_only`, such as bench.compile_case, with the same kernel, problem, config and GPU.
    """
    import torch

    from ..analysis import compile_report

    torch.backends.cuda.matmul.fp32_precision = precision
    return (compile_only or compile_report.inspect_kernel)(kernel, problem, config, gpu)


class Workers:
    """Up to `count` compilers, started on demand and reused. A context manager: on exit all are gone."""

    CODE = f"from {__name__} import inspect_job, serve; serve(inspect_job, 'compile error')"

    def __init__(self, count: int | None = None, timeout: float = TIMEOUT, python: str = sys.executable, code: str = CODE):
        """python: an interpreter with another torch and Triton. code: what a child runs, for tests."""
        self._count = count or min(len(os.sched_getaffinity(0)), MAX_COMPILERS)
        self._timeout, self._python, self._code = timeout, python, code

    def __enter__(self):
        self._children, self._idle = [], []
        # one thread for each compiler, to wait for its results
        self._threads = ThreadPoolExecutor(self._count)
        return self

    def __exit__(self, *_):
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            # ends the wait of its thread
            child.kill()
        self._threads.shutdown()
        for child in self._children:
            child.stop()

    def submit(self, jobs: Iterable[tuple]) -> list[Future]:
        """Queue jobs, each the arguments of `inspect_job`. The result of a future is what it returns, or a Failure.

        A future can be cancelled until a compiler takes its job.
        """
        return [self._threads.submit(self._compile, job) for job in jobs]

    def map(self, jobs: Iterable[tuple]) -> Iterator:
        """Queue jobs as `submit` does, and return an iterator over their results, in order."""
        return (future.result() for future in self.submit(jobs))

    def _compile(self, job):
        try:
            child = self._idle.pop()
        except IndexError:
            child = Child(self._code, python=self._python)
            self._children.append(child)
        result = child.ask(job, self._timeout, ("compile timeout", "compile error"))
        if child.is_running:
            self._idle.append(child)
        return result
