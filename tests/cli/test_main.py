"""The command line: arguments, exit codes, output, and the processes that it starts."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tritonattn
from tests.helpers import score_functions
from tests.helpers.kernel_reports import LOOP, report
from tritonattn.analysis import compile_report
from tritonattn.cli import demo, doctor, main, selftest
from tritonattn.cli.format import CommandError

ROOT = Path(__file__).parents[2]
GOOD = selftest.Result("causal", "float32", "dq", 1e-7, 1e-6)
WRONG = selftest.Result("causal", "float32", "dk", 1e-2, 1e-6)


def run(*command, **environment):
    """Run Python without TRITON_INTERPRET."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=inherited | environment, capture_output=True, text=True,
                          timeout=300)


@pytest.fixture
def compiled_without_a_gpu(monkeypatch):
    """A process whose kernels are compiled, on a machine that cannot run them."""
    monkeypatch.setattr(main, "INTERPRETED", False)
    monkeypatch.setattr(doctor, "INTERPRETED", False)
    monkeypatch.setattr(doctor, "compiles", lambda: False)


@pytest.mark.parametrize("argv", [[], ["dmeo"], ["demo", "--speed"], ["demo", "--steps", "many"],
                                  ["selftest", "--device", "tpu"], ["doctor", "--device", "cpu"],
                                  ["inspect", "--target", "gtx"],
                                  ["explain", "--gpu", "h200"], ["explain", "--shape", "1x1x1x1x1", "--gpu", "sm_1"],
                                  ["tune"],
                                  ["tune", "--shape", "1x1x1x1x1", "--trials", "0"],
                                  ["sweep"], ["replay"], ["cache"], ["cache", "clear"]])
def test_wrong_usage_is_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main.main(argv)
    assert exit.value.code == 2 and "usage: tritonattn" in capsys.readouterr().err


def test_device_cuda_without_a_gpu_is_wrong_usage(compiled_without_a_gpu, capsys):
    assert main.main(["selftest", "--device", "cuda"]) == 2 and "--device: expected cpu" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    (["--help"], ["demo", "selftest", "doctor", "--version"]),
    (["demo", "--help"], ["--steps", "--out", "demo.png"]),
    (["selftest", "--help"], ["--json", "--device"]),
    (["doctor", "--help"], ["--json"]),
    (["inspect", "--help"], ["--target", "--config", "--compare", "--sass", "--json", "sm_90"]),
    (["explain", "--help"], ["--shape", "--gpu", "--causal"]),
    (["tune", "--help"], ["--shape", "--from", "--strategy", "--trials"]), (["cache", "--help"], ["path", "ls", "clear"]),
    (["--version"], ["tritonattn", tritonattn.__version__]),
])
def test_help_and_version(argv, words, capsys):
    with pytest.raises(SystemExit) as exit:
        main.main(argv)
    out = capsys.readouterr().out
    assert exit.value.code == 0 and all(word in out for word in words)


def test_demo_receives_its_options(monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "run", lambda *options: calls.append(options) or 1)
    assert main.main(["demo"]) == 1, "the exit code is the demo's"
    main.main(["demo", "--steps", "3", "--out", "b.png"])
    assert calls == [(None, "demo.png"), (3, "b.png")]


def test_input_error_is_one_line_and_2(monkeypatch, capsys):
    def refuse(*options):
        raise CommandError("steps: expected at least 2, got 1")

    monkeypatch.setattr(demo, "run", refuse)
    assert main.main(["demo", "--steps", "1"]) == 2
    assert capsys.readouterr().err == "steps: expected at least 2, got 1\n"


@pytest.mark.parametrize("results, code", [([GOOD], 0), ([GOOD, WRONG], 1)])
def test_exit_code_of_selftest(monkeypatch, capsys, results, code):
    monkeypatch.setattr(selftest, "run", lambda device: results)
    assert main.main(["selftest"]) == code
    output = capsys.readouterr().out
    assert output.startswith(f"tritonattn {tritonattn.__version__} on ") and ("WRONG" in output) == bool(code)
    assert main.main(["selftest", "--json"]) == code
    assert [entry["agrees"] for entry in json.loads(capsys.readouterr().out)] == [result.agrees for result in results]


@pytest.mark.parametrize("argv", [["demo", "--steps", "3"], ["selftest", "--json"], ["selftest", "--device", "cpu"]])
def test_commands_without_a_gpu_start_an_interpreted_process(monkeypatch, compiled_without_a_gpu, argv):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command, env: calls.append((command, env["TRITON_INTERPRET"])) or 7)
    assert main.main(argv) == 7, "the exit code is the child's"
    assert calls == [([sys.executable, "-m", "tritonattn", *argv], "1")]


def test_unusable_interpreter_is_not_started(monkeypatch, compiled_without_a_gpu, capsys):
    monkeypatch.setattr(doctor, "of_interpreter", lambda: doctor.Finding("interpreter", "on; old", "bad", "pip install it"))
    monkeypatch.setattr(subprocess, "call", pytest.fail)
    assert main.main(["selftest"]) == 1
    assert capsys.readouterr().err == "interpreter: on; old; fix: pip install it\n"


INSPECT = "-m", "tritonattn", "inspect", "--head-dim", "64"


@pytest.mark.slow
def test_inspect_in_a_new_process():
    done = run(*INSPECT, "--target", "sm_90,mi300x", "--direction", "backward", "--causal")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0].startswith("GPU") and len(lines) >= 7, done.stderr
    assert [line.split()[2] for line in lines[1:7]] == ["delta", "dq", "dkdv"] * 2
    done = run(*INSPECT, "--direction", "forward", "--config", "64x64w4s2", "--json", TRITON_INTERPRET="1")
    found, = json.loads(done.stdout)
    assert (found["config"], found["kernel"], found["mma_instruction"], found["ptxas"]) == ("64x64w4s2", "forward", "HGMMA", [])
    done = run(*INSPECT, "--direction", "forward", "--compare", "64x64w4s2", "128x64w8s2", "--sass")
    assert re.search("64x64w4s2 +128x64w8s2\n", done.stdout) and done.stdout.count("HGMMA.64x64x16.F32") > 8


@pytest.mark.parametrize("options, words", [
    (["--config", "64x64"], "config: expected the form"), (["--head-dim", "600"], "head size from 1 to 512"),
])
def test_input_error_of_inspect_is_found_before_compiling(options, words, monkeypatch, compiled_without_a_gpu, capsys):
    monkeypatch.setattr(compile_report, "inspect_kernel", lambda *_: pytest.fail("compiling has started"))
    assert main.main(["inspect", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_compiler_error_is_one_line_and_1(monkeypatch, compiled_without_a_gpu, capsys):
    def fail(*_):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(compile_report, "inspect_kernel", fail)
    assert main.main(["inspect"]) == 1
    assert capsys.readouterr().err == "compilation failed: RuntimeError: 'PassManager::run failed'\n"


@pytest.mark.parametrize("options", [[], ["--compare", "64x64w4s2", "128x64w8s2"]])
def test_remarks_of_ptxas_are_printed_below_the_reports(options, monkeypatch, compiled_without_a_gpu, capsys):
    def remarks(kernel, problem, chosen, target):
        return ["C7510: Potential Performance Loss"] if target.arch == "sm_90" else []

    monkeypatch.setattr(compile_report, "inspect_kernel", lambda _, problem, config, target: report(target, config, (LOOP,)))
    monkeypatch.setattr(compile_report, "ptxas_remarks", remarks)
    assert main.main(["inspect", "--target", "h200,a100", "--direction", "forward", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = max(1, len(options) - 1)
    assert all(line.startswith("ptxas on sm_90 forward ") and line.endswith("Loss") for line in lines[-count:])
    assert len(lines) > 2 * count and "ptxas" not in lines[-count - 1], "the reports come first"


@pytest.mark.parametrize("direction, kernels", [
    ("forward", ["forward", "key_mass"]), ("backward", ["delta", "dq", "dkdv", "mass_delta"]),
    (None, ["forward", "delta", "dq", "dkdv", "key_mass", "mass_delta"]),
])
def test_inspect_shows_the_kernels_of_the_key_mass(direction, kernels, monkeypatch, compiled_without_a_gpu, capsys):
    seen = []

    def inspected(kernel, problem, config, target):
        seen.append((kernel, problem.entropy, problem.key_mass))
        return report(target, config, (LOOP,))

    monkeypatch.setattr(compile_report, "inspect_kernel", inspected)
    monkeypatch.setattr(compile_report, "ptxas_remarks", lambda *_: [])
    options = ["--direction", direction] if direction else []
    assert main.main(["inspect", "--target", "h200", "--entropy", "--key-mass", *options]) == 0
    assert sorted(seen) == sorted((kernel, True, True) for kernel in kernels) and capsys.readouterr().out


@pytest.mark.parametrize("options, kernels", [
    ([], ["forward", "dq", "dkdv"]), (["--direction", "backward"], ["dq", "dkdv"]), (["--direction", "forward"], ["forward"]),
], ids=str)
def test_inspect_shows_the_kernels_of_other_normalizers(options, kernels, monkeypatch, compiled_without_a_gpu, capsys):
    seen = []

    def inspected(kernel, problem, config, target):
        seen.append((kernel, problem.normalizer))
        return report(target, config, (LOOP,))

    monkeypatch.setattr(compile_report, "inspect_kernel", inspected)
    monkeypatch.setattr(compile_report, "ptxas_remarks", lambda *_: [])
    assert main.main(["inspect", "--target", "h200", "--normalizer", "relu", *options]) == 0
    assert sorted(seen) == sorted((kernel, "relu") for kernel in kernels) and capsys.readouterr().out


SHAPE = 3
PENALTY = score_functions.Both("penalty").of(tritonattn.attention)


def test_explain_on_the_command_line(capsys):
    assert main.main(["explain", "--shape", "2x32x8x4096x128", "--causal", "--gpu", "h200,sm_80"]) == 0
    out = capsys.readouterr().out
    assert "on H200 (sm_90)" in out and "on A100 (sm_80)" in out and out.count("forward") == 2
    assert main.main(["explain", "--shape", "2x32x8x4096x128", "--gpu", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["kernels"][0]["origin"] == "table"
    for flag in ("--alibi", "--relative", "--softcap"):
        assert main.main(["explain", "--shape", "2x32x8x4096x128", "--gpu", "h200", flag]) == 0
        output = capsys.readouterr().out
        assert flag[2:] in output.splitlines()[0] and ("\ndiagonals " in output) == (flag != "--softcap")
    assert main.main(["explain", "--shape", "2x32x8x4096x128", "--gpu", "h200", "--entropy", "--key-mass"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0].endswith("entropy key_mass") and "\nmass_delta " in output
    assert main.main(["explain", "--shape", "2x32x8x4096x128", "--gpu", "h200", "--normalizer", "sigmoid"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0].endswith(" sigmoid") and "\ndelta " not in output and "\ndq " in output
    assert main.main(["explain", "--shape", "2x32x8x4096x128", "--gpu", "h200", "--normalizer", "relu", "--entropy"]) == 2
    assert "only a softmax has statistics" in capsys.readouterr().err
    assert main.main(["explain", "--shape", "2x32x8x4096x128", "--gpu", "h200", "--score-function", f"{__name__}:PENALTY"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f" score_function {PENALTY.name}")
    for name, message in ((f"{__name__}:SHAPE", "expected a tritonattn.ScoreFunction"), ("no_such:x", "ModuleNotFoundError")):
        assert main.main(["explain", "--shape", "2x32x8x4096x128", "--gpu", "h200", "--score-function", name]) == 2
        assert f"--score-function {name}: " in (error := capsys.readouterr().err) and message in error
    assert main.main(["explain", "--shape", "2x32", "--gpu", "h200"]) == 2
    assert capsys.readouterr().err.startswith("shape: expected")


def test_ctrl_c_has_no_traceback(monkeypatch):
    def interrupt(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(selftest, "run", interrupt)
    assert main.main(["selftest"]) == 130


@pytest.mark.slow
def test_demo_starts_in_the_interpreter():
    done = run("-m", "tritonattn", "demo", "--out", "no such folder/a.png")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and "no such folder" in done.stderr, done.stderr


@pytest.mark.slow
def test_doctor_in_a_new_process():
    done = run("-m", "tritonattn", "doctor", "--json")
    assert done.returncode == (1 if '"bad"' in done.stdout else 0), done.stderr
    assert {"torch", "triton", "interpreter"} <= {entry["name"] for entry in json.loads(done.stdout)}


@pytest.mark.slow
@pytest.mark.parametrize("argv, code, words", [
    (["--help"], 0, "selftest"), (["doctor"], 1, "fix: pip install 'triton"), (["selftest"], 1, "it needs triton"),
    (["inspect"], 1, "triton: missing; fix: pip install 'triton"),
    (["explain", "--gpu", "h200", "--shape", "1x1x1x64x64"], 0, "h200.json")])
def test_without_triton(argv, code, words):
    hide = "import sys; sys.modules['triton'] = None; from tritonattn.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = run("-c", hide, *argv)
    assert done.returncode == code and words in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr


# --- tuning


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache with one record in it, and a virtual GPU to tune for."""
    from tests.autotune.test_tune import H200, PROBLEM, Compilers, Surface
    from tests.helpers.fake_bench import FakeBench, bench_of
    from tritonattn.autotune import tune
    from tritonattn.configs import lookup, user_cache

    monkeypatch.setenv("TRITONATTN_CACHE_DIR", str(tmp_path / "cache"))
    lookup.clear_lookup_cache()
    bench = bench_of(FakeBench(Surface("64x128w4s2e1m")))
    setup = tune.TuningSetup(H200, bench, Compilers(), user_cache.current_cache())
    monkeypatch.setattr(tune, "local_setup", lambda *_, **__: setup)
    tune.tune_kernel("forward", PROBLEM, setup)
    yield setup
    lookup.clear_lookup_cache()


def said(capsys, *argv, code=0):
    assert main.main(list(argv)) == code
    return capsys.readouterr().out


def test_the_cache_is_listed_and_cleared(kept, capsys, tmp_path):
    assert said(capsys, "cache", "path").strip() == str(tmp_path / "cache")
    line, = said(capsys, "cache", "ls").splitlines()
    assert "H200" in line and "64x128w4s2e1m" in line and line.startswith("forward-") and line.endswith(" us")
    (_, record), = kept.store.records()
    kept.store.put(replace(record, versions={"triton": "1.0.0"}))
    kept.store.put(replace(record, kernel_hash="0" * 12))
    states = [line.rpartition(" us")[2].strip() for line in said(capsys, "cache", "ls").splitlines()]
    assert sorted(states) == ["", *["stale: other kernels or another Triton"] * 2]
    assert said(capsys, "cache", "clear", "--yes") == "removed 3 files\n" and said(capsys, "cache", "ls") == ""


def test_tune_takes_shapes_and_files(kept, capsys, tmp_path, compiled_without_a_gpu):
    from tritonattn import Problem, record_problems
    from tritonattn.configs.lookup import get_config

    out = said(capsys, "tune", "--shape", "4x32x32x4096x64,1x8x8x512x64", "--causal", "--strategy", "static")
    assert out.count("times as fast as") == 6 and f"stored in {tmp_path / 'cache'}" in out
    with record_problems(tmp_path / "shapes"):
        get_config("forward", Problem.parse("1x8x8x2048x96", torch.float16), kept.gpu)
    lines = said(capsys, "tune", "--from", str(tmp_path / "shapes"), "--trials", "4").splitlines()
    assert len(lines) == 2 and lines[0].startswith("forward  1x8x2048x96 float16 full: ") and "4 tried" in lines[0]
    out = said(capsys, "tune", "--shape", "4x32x32x4096x64,1x8x8x512x64", "--forward", "--again", "--together")
    assert "forward  4x32x4096x64 bfloat16 full and 1 more: 64x128w4s2e1m, " in out
    assert main.main(["tune", "--shape", "4x32x32x4096x64", "--together"]) == 2
    assert capsys.readouterr().err == "--together: expected at least two shapes, got 1\n"
    assert main.main(["tune", "--shape", "4x32"]) == 2 and "shape: expected BATCH" in capsys.readouterr().err
    assert main.main(["tune", "--from", str(tmp_path / "none")]) == 2


def test_a_sweep_from_the_plan_to_the_report_and_replays(kept, capsys, tmp_path, compiled_without_a_gpu):
    folder = str(tmp_path / "sweep")
    assert main.main(["sweep", folder]) == 2 and "has no sweep to resume; to begin one, add --shape" in capsys.readouterr().err
    argv = ["sweep", folder, "--shape", "4x32x32x4096x128", "--forward", "--rounds", "3"]
    out = said(capsys, *argv)
    assert out.endswith("done\n") and "Sweep of 1 jobs" in out and "64x128w4s2e1m" in out
    assert main.main(argv) == 2 and "already has a sweep" in capsys.readouterr().err
    assert said(capsys, "sweep", folder).endswith("done\n")
    out = said(capsys, "replay", folder, "--seeds", "2")
    assert [line.split()[0] for line in out.splitlines()] == ["strategy", "halving", "static", "random", "exhaustive"]
    assert "halving 0.00% 0.00% 0.00%" in " ".join(out.split())
    assert main.main(["replay", str(tmp_path)]) == 2 and "no sweep can be read" in capsys.readouterr().err
    out = said(capsys, "report", folder, "--out", str(tmp_path / "report"), "--plot")
    assert "Sweep of 1 jobs" in out and out.count("wrote ") == 2
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"t4.json", "heat.png"}


@pytest.mark.parametrize("command", [["tune"], ["sweep", "new"]])
def test_without_a_gpu_the_error_names_the_command(command, monkeypatch, compiled_without_a_gpu, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tritonattn.gpu.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main([*command, "--shape", "1x1x1x128x64"]) == 2
    assert capsys.readouterr().err == f"{command[0]} needs a GPU, but torch finds no GPU\n"
    assert not list(tmp_path.iterdir())


def test_the_synthetic_sweep_of_the_repository_is_reported_and_replayed(capsys, tmp_path):
    folder = str(ROOT / "notebooks/data/synthetic_sweep")
    out = said(capsys, "report", folder, "--out", str(tmp_path))
    assert out.startswith("Sweep of 4 jobs; synthetic: no GPU was timed") and out.count("wrote ") == 1
    assert said(capsys, "replay", folder, "--seeds", "1").startswith("synthetic: no GPU was timed\n")


def test_report_checks_for_matplotlib_before_it_reads(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main.main(["report", str(tmp_path / "none"), "--plot"]) == 2
    assert capsys.readouterr().err == "matplotlib is not installed; fix: pip install 'tritonattn[demo]'\n"
