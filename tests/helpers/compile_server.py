"""Programs that need compiled kernels, run outside the test process, which interprets them.

One server for each pytest worker imports torch and Triton once; every program gets an empty namespace of its own.
"""

import atexit
import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 900  # seconds: of one program


def compiled(program: str, fresh: bool = False):
    """Return what `program` prints last, parsed as JSON, from a process where kernels are compiled.

    fresh: start a new process, for a program that replaces parts of modules or measures its own process.
    """
    if fresh:
        run = subprocess.run([sys.executable, "-c", program], env=_environment(), capture_output=True, text=True, cwd=ROOT,
                             timeout=TIMEOUT)
        assert run.returncode == 0, run.stderr[-3000:]
        return json.loads(run.stdout.splitlines()[-1])
    return _server().run(program)


class CompileServer:
    """The parent's end: one line of JSON for each program, and one for its answer."""

    def __init__(self):
        self._errors = tempfile.TemporaryFile("w+")  # not a pipe, which would fill up unread
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._errors, env=_environment(), cwd=ROOT, text=True)

    def run(self, program: str):
        """Return the last line that the program prints, parsed as JSON. AssertionError: it raised; its traceback."""
        limit = threading.Timer(TIMEOUT, self._process.kill)
        limit.start()
        line = ""
        # a dead server breaks the pipe, and answers with an empty line
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(program) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        limit.cancel()
        if not line:
            _server.cache_clear()
            self._errors.seek(0)
            raise AssertionError(f"the compile server ended with {self._process.wait()}: {self._errors.read()[-3000:]}")
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return json.loads(answer["output"].splitlines()[-1])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@functools.cache
def _server() -> CompileServer:
    server = CompileServer()
    atexit.register(server.close)
    return server


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def serve() -> None:
    """Run the programs that arrive on stdin, one after the other, until it is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints must not get among the answers
    # the folder of this file has names such as "corpus"; programs find `tritonattn` and `tests` as with python -c
    path, environment = [str(ROOT), *sys.path[1:]], dict(os.environ)
    for line in sys.stdin:
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                exec(compile(json.loads(line), "<program>", "exec"), {"__name__": "__main__"})
            answer = {"output": output.getvalue()}
        except (Exception, SystemExit):
            answer = {"error": traceback.format_exc()[-3000:]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
