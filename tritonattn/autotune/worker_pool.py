"""Compiling in processes of their own: side by side, stopped when the compiler hangs, and never interpreted.

A child reads pickled jobs, the arguments of `look`, from its standard input and answers each with a Report or a Failure.
"""

import contextlib
import os
import pickle
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
HEAD = struct.Struct("<Q")  # the length of what follows
MOST = 32
TIMEOUT = 120.0  # seconds: the slowest compilation that came to anything took 10


@dataclass(frozen=True)
class Failure:
    """A config that came to no binary; `code` is one of survey.REASONS."""

    code: str
    message: str
    lasting: bool = True  # not so where the process died or took too long: it may do better another time


class Workers:
    """`count` children, started when they are needed. A context manager: at its end they are gone."""

    def __init__(self, count: int | None = None, timeout: float = TIMEOUT, command: tuple[str, ...] | None = None,
                 python: str = sys.executable):
        """command: how a child is started, in tests. python: another one, with another Triton."""
        # those this process may use, and no more than have room in memory
        self._count = count or min(len(os.sched_getaffinity(0)), MOST)
        self._timeout = timeout
        self._command, self._python = command or __name__, python
        self._idle = queue.SimpleQueue()
        self._all, self._lock = [], threading.Lock()

    def map(self, jobs: Iterable[tuple]) -> Iterator:
        """A Report or a Failure for each job, in order. Leaving off before the end ends the children.

        RuntimeError: somebody else ended them meanwhile.
        """
        pool = ThreadPoolExecutor(self._count)
        with self._lock:
            # once these children are ended, nothing is begun any more for these jobs
            idle, everyone = self._idle, self._all
        try:
            yield from pool.map(lambda job: self._run(job, idle, everyone), jobs)
        except BaseException:
            # an interrupt, or nobody wants the rest: what is being compiled is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            self.__exit__()
            raise
        pool.shutdown()

    def _run(self, job, idle, everyone):
        child = self._take(idle, everyone)
        try:
            found = ask(child, job, self._timeout)
        except TimeoutError:
            self._drop(child)
            return Failure("compile timeout", f"no answer in {self._timeout:g} s", lasting=False)
        except EOFError:
            self._drop(child)
            return Failure("compile error", f"the compiler's process ended with {child.returncode}", lasting=False)
        except BaseException:
            self._drop(child)
            raise
        idle.put(child)
        return found

    def _drop(self, child):
        """Forget a child and end it. Who ended it already must not do so again: its number may be another process's by then."""
        with self._lock:
            mine = child in self._all
            if mine:
                self._all.remove(child)
        if mine:
            stop(child)

    def _take(self, idle, everyone):
        """A child out of the idle ones, or a new one. RuntimeError: all were ended meanwhile, and nobody waits for this one."""
        with self._lock:
            if everyone is self._all and not idle.empty():
                return idle.get_nowait()
        child = start(self._command, self._python) if everyone is self._all else None
        with self._lock:
            if child is not None and everyone is self._all:
                everyone.append(child)
                return child
        if child is not None:
            stop(child)
        raise RuntimeError("workers: expected to run until the last job is done, got an end before")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._lock:
            children, self._all, self._idle = self._all, [], queue.SimpleQueue()
        for child in children:
            stop(child)


def start(command: str | tuple[str, ...], python: str = sys.executable, visible: bool = False) -> subprocess.Popen:
    """A child: a module of this package, or a whole command. It sees GPUs, and may interpret, if `visible`."""
    environment = dict(os.environ)
    # what times a child is asked for
    environment.pop("TRITONATTN_AUTOTUNE", None)
    if not visible:
        # compilers need no GPU, and should take none of its memory
        environment.pop("TRITON_INTERPRET", None)
        environment["CUDA_VISIBLE_DEVICES"] = environment["HIP_VISIBLE_DEVICES"] = ""
    if isinstance(command, str):
        # this package, last: another Python has its own torch and Triton
        found = f"import runpy, sys; sys.path.append({str(PACKAGE.parent)!r}); "
        command = python, "-c", f"{found}runpy.run_module({command!r}, run_name='__main__')"
    # a process group of its own, so that ptxas goes with it; what a compiler prints of a refusal, kernels and all, is told
    # by its exception as well
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            env=environment, start_new_session=True)


def ask(child: subprocess.Popen, job, timeout: float):
    """Send a job and wait for its answer. TimeoutError; EOFError if the child has ended, or another thread has ended it."""
    question = _packed(job)
    try:
        child.stdin.write(question)
        child.stdin.flush()
        content = _answer(child, timeout)
    except BrokenPipeError:
        raise EOFError from None
    except (OSError, ValueError):
        if not child.stdin.closed and not child.stdout.closed:
            raise
        # who ended the child has closed its pipes
        raise EOFError from None
    return pickle.loads(content)


def _answer(child, timeout):
    deadline, content, needed = time.monotonic() + timeout, b"", HEAD.size
    # a descriptor of its own: another thread may end the child and close its pipe, whose number may be another file's then
    pipe = os.dup(child.stdout.fileno())
    try:
        waiting = select.poll()
        waiting.register(pipe, select.POLLIN)
        while len(content) < needed:
            if not waiting.poll(1000 * max(deadline - time.monotonic(), 0)):
                raise TimeoutError
            if not (more := os.read(pipe, 1 << 20)):
                raise EOFError
            content += more
            needed = HEAD.size + (HEAD.unpack_from(content)[0] if len(content) >= HEAD.size else 0)
    finally:
        os.close(pipe)
    return content[HEAD.size:]


def stop(child: subprocess.Popen) -> None:
    """It and whatever it has started have ended."""
    with contextlib.suppress(ProcessLookupError):
        # also where it has ended by itself, but ptxas has not
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    child.stdout.close()


def _packed(value):
    content = pickle.dumps(value)
    return HEAD.pack(len(content)) + content


def _write(file, value):
    file.write(_packed(value))
    file.flush()


def _read(file):
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        raise EOFError
    return pickle.loads(file.read(HEAD.unpack(head)[0]))


def serve(answer: Callable, code: str) -> None:
    """What a child does until its standard input ends: `answer` each job; what that raises is a Failure with this code."""
    # what a compiler prints must not get among the answers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            job = _read(sys.stdin.buffer)
        except EOFError:
            return
        try:
            found = answer(*job)
        except Exception as error:  # whatever is raised is the fault of this job's config, and is told
            found = Failure(code, f"{type(error).__name__}: {str(error)[:300]}")
        try:
            _write(answers, found)
        except BrokenPipeError:
            return


def look(kernel: str, problem, config, gpu, precision: str = "ieee"):
    """lens.inspect with float32 products of this precision, "ieee" or "tf32", whatever the parent has set."""
    import torch

    from ..analysis import compile_report

    torch.backends.cuda.matmul.fp32_precision = precision
    return compile_report.inspect_kernel(kernel, problem, config, gpu)


def compile_jobs() -> None:
    """What a child of Workers does."""
    serve(look, "compile error")


if __name__ == "__main__":
    # under its real name, so that the parent knows the classes of the answers
    from .worker_pool import compile_jobs as compile_by_name

    compile_by_name()
