"""Compiling in processes of their own: side by side, stopped when the compiler hangs, and never interpreted.

A child reads pickled jobs (kernel, problem, config, gpu) from its standard input and answers each with a Report or a Failure.
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
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

HEAD = struct.Struct("<Q")  # the length of what follows
TIMEOUT = 120.0  # seconds: the slowest compilation that came to anything took 10


@dataclass(frozen=True)
class Failure:
    """A config that came to no binary; `code` is one of survey.REASONS."""

    code: str
    message: str
    lasting: bool = True  # not so where the process died or took too long: it may do better another time


class Workers:
    """`count` children, started when they are needed. A context manager: at its end they are gone."""

    def __init__(self, count: int | None = None, timeout: float = TIMEOUT, command: tuple[str, ...] | None = None):
        """command: how a child is started, in tests."""
        self._count = count or os.cpu_count() or 1
        self._timeout = timeout
        self._command = command or (sys.executable, "-m", __name__)
        self._idle = queue.SimpleQueue()
        self._all, self._lock = [], threading.Lock()

    def map(self, jobs: Iterable[tuple]) -> Iterator:
        """A Report or a Failure for each job, in order. Leaving off before the end ends the children."""
        pool = ThreadPoolExecutor(self._count)
        try:
            yield from pool.map(self._run, jobs)
        except BaseException:
            # an interrupt, or nobody wants the rest: what is being compiled is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            self.__exit__()
            raise
        pool.shutdown()

    def _run(self, job):
        child = self._take()
        try:
            found = ask(child, job, self._timeout)
        except TimeoutError:
            stop(child)
            return Failure("compile timeout", f"no answer in {self._timeout:g} s", lasting=False)
        except EOFError:
            stop(child)
            return Failure("compile error", f"the compiler's process ended with {child.returncode}", lasting=False)
        except BaseException:
            stop(child)
            raise
        self._idle.put(child)
        return found

    def _take(self):
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            child = self._start()
        with self._lock:
            self._all.append(child)
        return child

    def _start(self):
        # a process group of its own, so that ptxas goes with it; no GPU, so that it takes none of its memory
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["CUDA_VISIBLE_DEVICES"] = environment["HIP_VISIBLE_DEVICES"] = ""
        # what the compiler prints of a refusal, kernels and all, is told by its exception as well
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                env=environment, start_new_session=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._lock:
            children, self._all, self._idle = self._all, [], queue.SimpleQueue()
        for child in children:
            stop(child)


def ask(child: subprocess.Popen, job, timeout: float):
    """Send a job and wait for its answer. TimeoutError; EOFError if the child has ended."""
    try:
        _write(child.stdin, job)
    except BrokenPipeError:
        raise EOFError from None
    deadline, content, needed = time.monotonic() + timeout, b"", HEAD.size
    while len(content) < needed:
        ready, _, _ = select.select([child.stdout], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError
        if not (more := os.read(child.stdout.fileno(), 1 << 20)):
            raise EOFError
        content += more
        needed = HEAD.size + (HEAD.unpack_from(content)[0] if len(content) >= HEAD.size else 0)
    return pickle.loads(content[HEAD.size:])


def stop(child: subprocess.Popen) -> None:
    """It and whatever it has started have ended."""
    with contextlib.suppress(ProcessLookupError):
        # also where it has ended by itself, but ptxas has not
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    child.stdout.close()


def _write(file, value):
    content = pickle.dumps(value)
    file.write(HEAD.pack(len(content)) + content)
    file.flush()


def _read(file):
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        raise EOFError
    return pickle.loads(file.read(HEAD.unpack(head)[0]))


def serve() -> None:
    """What a child does until its standard input ends."""
    # what the compiler prints must not get among the answers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from .. import lens

    while True:
        try:
            job = _read(sys.stdin.buffer)
        except EOFError:
            return
        try:
            found = lens.inspect(*job)
        except Exception as error:  # whatever the compiler raises is this config's fault, and is told
            found = Failure("compile error", f"{type(error).__name__}: {str(error)[:300]}")
        try:
            _write(answers, found)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    # under its real name, so that the parent knows the classes of the answers
    from tritonattn.tuning.workers import serve as serve_by_name

    serve_by_name()
