"""The command line: what it accepts, what it returns, and that it finds its way into the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritonattn import __main__ as cli
from tritonattn import demo, doctor, selftest

ROOT = Path(__file__).parents[1]
GOOD = selftest.Result("causal", "float32", "dq", 1e-7, 1e-6)
WRONG = selftest.Result("causal", "float32", "dk", 1e-2, 1e-6)


def run(*command, **environment):
    """A new Python that was told nothing of the interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=inherited | environment, capture_output=True, text=True,
                          timeout=100)


@pytest.fixture
def compiled_without_a_gpu(monkeypatch):
    """A process whose kernels are compiled, on a machine that cannot run them."""
    monkeypatch.setattr(cli, "INTERPRETED", False)
    monkeypatch.setattr(doctor, "INTERPRETED", False)
    monkeypatch.setattr(doctor, "compiles", lambda: False)


@pytest.mark.parametrize("argv", [[], ["dmeo"], ["demo", "--speed"], ["demo", "--steps", "many"],
                                  ["selftest", "--device", "tpu"], ["doctor", "--device", "cpu"]])
def test_wrong_usage_is_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2 and "usage: tritonattn" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_wrong_usage(compiled_without_a_gpu, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["selftest", "--device", "cuda"])
    assert exit.value.code == 2 and "--device: expected cpu" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    (["--help"], ["demo", "selftest", "doctor", "--version"]),
    (["demo", "--help"], ["--text", "--steps", "--out", "demo.png"]),
    (["selftest", "--help"], ["--json", "--device"]),
    (["doctor", "--help"], ["--json"]),
    (["--version"], ["tritonattn", cli.VERSION]),
])
def test_help_and_version(argv, words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    out = capsys.readouterr().out
    assert exit.value.code == 0 and all(word in out for word in words)


def test_the_demo_gets_its_options(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run", lambda *options: asked.append(options) or 1)
    assert cli.main(["demo"]) == 1, "the exit code is the demo's"
    cli.main(["demo", "--text", "a.txt", "--steps", "3", "--out", "b.png"])
    assert asked == [(None, None, "demo.png"), ("a.txt", 3, "b.png")]


def test_wrong_input_is_one_line_and_2(monkeypatch, capsys):
    def refuse(*options):
        raise demo.InputError("text: expected at least 66 characters, got 3")

    monkeypatch.setattr(demo, "run", refuse)
    assert cli.main(["demo", "--text", "a.txt"]) == 2
    assert capsys.readouterr().err == "text: expected at least 66 characters, got 3\n"


@pytest.mark.parametrize("results, code", [([GOOD], 0), ([GOOD, WRONG], 1)])
def test_the_exit_code_of_the_selftest(monkeypatch, capsys, results, code):
    monkeypatch.setattr(selftest, "run", lambda device: results)
    assert cli.main(["selftest"]) == code
    out = capsys.readouterr().out
    assert out.startswith(f"tritonattn {cli.VERSION} on ") and ("WRONG" in out) == bool(code)
    assert cli.main(["selftest", "--json"]) == code
    assert [entry["agrees"] for entry in json.loads(capsys.readouterr().out)] == [result.agrees for result in results]


@pytest.mark.parametrize("argv", [["demo", "--steps", "3"], ["selftest", "--json"], ["selftest", "--device", "cpu"]])
def test_kernels_without_a_gpu_go_to_an_interpreted_process(monkeypatch, compiled_without_a_gpu, argv):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command, env: calls.append((command, env["TRITON_INTERPRET"])) or 7)
    assert cli.main(argv) == 7, "the exit code is the child's"
    assert calls == [([sys.executable, "-m", "tritonattn", *argv], "1")]


def test_an_interpreter_that_cannot_work_is_not_started(monkeypatch, compiled_without_a_gpu, capsys):
    monkeypatch.setattr(doctor, "of_interpreter", lambda: doctor.Finding("interpreter", "on; old", "bad", "pip install it"))
    monkeypatch.setattr(subprocess, "call", pytest.fail)
    assert cli.main(["selftest"]) == 1
    assert capsys.readouterr().err == "interpreter: on; old; mend: pip install it\n"


def test_ctrl_c_has_no_traceback(monkeypatch):
    def interrupt(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(selftest, "run", interrupt)
    assert cli.main(["selftest"]) == 130


def test_a_new_process_finds_its_way_into_the_interpreter():
    done = run("-m", "tritonattn", "demo", "--text", "no such file")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and "no such file" in done.stderr, done.stderr


def test_doctor_in_a_new_process():
    done = run("-m", "tritonattn", "doctor", "--json")
    assert done.returncode == (1 if '"bad"' in done.stdout else 0), done.stderr
    assert {"torch", "triton", "interpreter"} <= {entry["name"] for entry in json.loads(done.stdout)}


@pytest.mark.parametrize("argv, code, words", [
    (["--help"], 0, "selftest"), (["doctor"], 1, "mend: pip install 'triton"), (["selftest"], 1, "it needs triton")])
def test_without_triton(argv, code, words):
    hide = "import sys; sys.modules['triton'] = None; from tritonattn.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = run("-c", hide, *argv)
    assert done.returncode == code and words in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
