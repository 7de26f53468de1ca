"""An archive of compiled kernels is found by Triton in another folder, and its launches compile nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from perf import cases, gpu, precompile
from tests.helpers.compile_server import ROOT, compiled
from tests.perf.test_gpu import alive, shell  # noqa: F401 (a fixture)
from tritonattn import gpu as gpus

CARRIED = """
import json, os, shutil, torch
from pathlib import Path
from perf import null_driver
null = null_driver.install()
from triton import knobs
from perf import cases, precompile
from tritonattn import attention, gpu
from tritonattn.autotune import worker_pool
on = gpu.KNOWN["sm_90"]
folder = Path({folder!r})
os.environ["TRITON_CACHE_DIR"] = str(folder / "made")
problem = cases.problem(2, (4, 2), 200, 40, {window}, dtype=torch.bfloat16)
precompile.probe_entry(on)
for job in precompile.jobs((cases.Case("", problem, {directions}),), [], on):
    worker_pool.inspect_job(*job)
packed = precompile.pack(folder / "made", folder / "kernels.tar.xz")
least = precompile.pack(folder / "made", folder / "small.tar.xz", 0)
shutil.rmtree(folder / "made")
os.environ["TRITON_CACHE_DIR"] = str(folder / "used")
entries, hits = precompile.unpack(folder / "kernels.tar.xz", folder / "used"), []
knobs.compilation.listener = lambda src, cache_hit, **_: hits.append((src.name, cache_hit))
probe = precompile.probe_entry(on) in entries
q, k, v = problem.tensors("cpu")
attention(q, k, v, window={window})
if "backward" in {directions}:
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(attention(*leaves, window={window}), leaves, torch.randn_like(q))
print(json.dumps(dict(packed=packed, least=least, count=len(entries), probe=probe, hits=hits, launches=null.launches)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("directions", [cases.FORWARD, cases.TRAINING])
def test_launches_find_the_carried_binaries(directions, tmp_path):
    """Slow: compiles in a new process."""
    result = compiled(CARRIED.format(folder=str(tmp_path), directions=directions, window=cases.CAUSAL), fresh=True)
    kernels = ["forward_kernel"] * 2 + (["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"]
                                    if directions == cases.TRAINING else [])
    assert result["probe"] and result["hits"] == [[name, True] for name in kernels]
    # the probe, inference, a forward pass with a gradient, and the backward pass
    assert result["packed"] == [result["count"], 0] and result["count"] == (3 if directions == cases.FORWARD else 6)
    assert result["least"] == [0, result["count"]] and result["launches"] == len(kernels) - 1


def test_jobs_are_those_of_the_stages():
    on = gpus.named("h200")
    others = list(precompile.jobs(cases.SHORT, [], on))
    assert {kernel for kernel, *_ in others} == {"forward", "delta", "dq", "dkdv"}
    assert sum(kernel == "forward" for kernel, *_ in others) == len(cases.SHORT)
    others = list(precompile.jobs((), [cases.problem(4, 32, 4096, 128)], on))
    assert len(others) > 100 and all(problem.dtype == torch.bfloat16 and config for _, problem, config, *_ in others)


def entry(folder, name, **contents):
    """Write an entry of Triton's cache: files by suffix, the metadata last."""
    (folder / name).mkdir(parents=True)
    for suffix, content in (contents | {"json": b"{}"}).items():
        (folder / name / f"some_kernel.{suffix}").write_bytes(content)


@pytest.mark.parametrize("kept", [{"cubin": b"a"}, {"hsaco": b"a", "amdgcn": b"b"}], ids=["NVIDIA", "AMD"])
def test_packed_files_are_those_that_are_read(kept, tmp_path):
    entry(tmp_path / "made", "A", **kept, ttir=b"c", source=b"d")
    assert precompile.pack(tmp_path / "made", tmp_path / "kernels.tar.xz") == (1, 0)
    assert precompile.unpack(tmp_path / "kernels.tar.xz", tmp_path / "used") == {"A"}
    files = {f"some_kernel.{suffix}": content for suffix, content in (kept | {"json": b"{}"}).items()}
    listed = json.loads((tmp_path / "used/A/__grp__some_kernel.json").read_text())["child_paths"]
    assert {name: Path(path).read_bytes() for name, path in listed.items()} == files


def test_an_archive_never_exceeds_its_limit(tmp_path):
    for name in "ABCDEFGH":
        entry(tmp_path / "made", name, cubin=os.urandom(200_000))
    assert precompile.pack(tmp_path / "made", tmp_path / "kernels.tar.xz", 1 << 20) == (4, 4)
    assert 800_000 < (tmp_path / "kernels.tar.xz").stat().st_size <= 1 << 20


def test_an_interrupted_pack_keeps_the_old_archive(tmp_path, monkeypatch):
    entry(tmp_path / "made", "A", cubin=b"a")
    precompile.pack(tmp_path / "made", tmp_path / "kernels.tar.xz")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(precompile.tarfile.TarFile, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        precompile.pack(tmp_path / "made", tmp_path / "kernels.tar.xz")
    assert precompile.unpack(tmp_path / "kernels.tar.xz", tmp_path / "used") == {"A"}


@pytest.mark.parametrize("script, words", [
    ("echo B", "2 precompiled binaries: hit"),
    ("echo C", "2 precompiled binaries: miss: made by another Python, Triton or source, or for another GPU"),
    ("exit 3", "precompiled binaries: miss: {archive}: CalledProcessError: Command '['{python}', '-m', 'perf.precompile']' "
               "returned non-zero exit status 3."),
])
def test_a_session_says_whether_the_kernels_are_found(script, words, shell, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    for name in "AB":
        entry(tmp_path / "made", name, cubin=b"a")
    precompile.pack(tmp_path / "made", tmp_path / precompile.ARCHIVE)
    shell(script)
    gpu.use_archive(tmp_path)
    expected = words.format(archive=tmp_path / precompile.ARCHIVE, python=gpu.sys.executable)
    assert capsys.readouterr().out == f"{expected}\n"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / precompile.FOLDER)


@pytest.mark.parametrize("damage", [
    lambda x: b"", lambda x: x[:20], lambda x: x[:500], lambda x: x[:-500], lambda x: x[:4000] + b"other" + x[4005:],
    lambda x: b"other" * 1000,
], ids=["empty", "header", "start", "all but the end", "changed", "other"])
def test_a_broken_archive_is_a_miss_and_the_session_goes_on(damage, shell, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    entry(tmp_path / "made", "A", cubin=os.urandom(5000))
    archive = tmp_path / precompile.ARCHIVE
    precompile.pack(tmp_path / "made", archive)
    archive.write_bytes(damage(archive.read_bytes()))
    shell("echo ran")
    assert gpu.main(["--out", str(tmp_path), "--stages", "peaks"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"precompiled binaries: miss: {archive}: ") and others == ["peaks: ran"]


@pytest.fixture
def precompiling(tmp_path, monkeypatch):
    """Run --precompile with prepared results: of the tests, and of the jobs by their place. Returns (exit code, steps)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setattr(precompile, "probe_entry", lambda on: entry(tmp_path / precompile.FOLDER, "A", cubin=b"a"))

    def go(*options, tests=0, failing=None):
        steps = []
        monkeypatch.setattr(gpu, "run_step", lambda path, *rest: steps.append((path.name, *rest)) or tests)
        monkeypatch.setattr(precompile.Workers, "map", lambda self, jobs: (
            precompile.Failure("compile error", "no room") if i == failing else None for i, _ in enumerate(jobs)))
        shutil.rmtree(tmp_path / precompile.FOLDER, ignore_errors=True)
        return gpu.main(["--out", str(tmp_path), "--precompile", "h200", *options]), steps

    return go


def test_precompiling_needs_no_gpu(precompiling, tmp_path, capsys):
    code, ((name, arguments, seconds),) = precompiling("--stages", "tests", "benchmark", "--suite", "tiny")
    assert code == 0 and name == "precompile-tests.log" and seconds == pytest.approx(270, abs=5)
    assert arguments[:2] == ["pytest", "-n"] and arguments[3:] == list(gpu.COMPILED_TESTS)
    assert capsys.readouterr().out == (f"{tmp_path / precompile.ARCHIVE}: 8 of 8 jobs done, 0 failed; 1 binaries packed, "
                                       "0 left out for the limit of 60 MiB\n")
    assert precompile.unpack(tmp_path / precompile.ARCHIVE, tmp_path / "used") == {"A"}
    # again, with the archive that is there
    assert precompiling("--stages", "benchmark", "--suite", "tiny") == (0, [])


@pytest.mark.parametrize("options, results, message", [
    (["--stages", "tests"], {"tests": 1}, "0 of 0 jobs done"),
    (["--stages", "tests"], {"tests": None}, "0 of 0 jobs done"),
    (["--stages", "benchmark", "--minutes", "0.000001"], {}, ": 1 of "),
    (["--stages", "benchmark"], {"failing": 1}, "\ndelta of "),
])
def test_what_is_not_compiled_is_no_success(options, results, message, precompiling, capsys):
    code, _ = precompiling(*options, "--suite", "tiny", **results)
    assert code == 1 and message in capsys.readouterr().out


def test_a_candidate_of_a_sweep_may_fail(precompiling, capsys):
    assert precompiling("--stages", "tuning", failing=7)[0] == 0
    assert " jobs done, 1 failed; " in capsys.readouterr().out


def test_what_the_limit_leaves_out_is_no_success(precompiling, monkeypatch, capsys):
    monkeypatch.setattr(precompile.pack, "__defaults__", (0,))
    assert precompiling("--stages", "benchmark", "--suite", "tiny")[0] == 1
    assert "0 binaries packed, 1 left out" in capsys.readouterr().out


def test_tests_are_compiled_for_hopper_alone(precompiling, capsys):
    with pytest.raises(SystemExit, match="2"):
        precompiling("--precompile", "A100")
    assert "tests can be compiled for sm_90 alone, not for sm_80" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_benchmark_is_compiled_in_the_dtype_in_which_it_runs(dtype):
    options = gpu.run.parser().parse_args(["--suite", "odd", "--dtype", dtype])
    found = gpu.jobs_of(["benchmark"], options, gpus.named("h200"))
    assert {problem for _, problem, *_ in found} == {case.problem for case in cases.suite("odd", getattr(torch, dtype))}
    assert {problem.dtype for _, problem, *_ in found} == {getattr(torch, dtype)}


def test_compiled_tests_are_selected_by_the_marks_of_the_steps(tmp_path):
    """Whatever marks a test has: it is compiled if one of the steps runs it beside others."""
    marks = [arguments[arguments.index("-m") + 1] for _, name, _, arguments in gpu.steps(tmp_path, [])
             if name in ("tests-gpu", "tests-float32", "tests-cases")]
    ours = gpu.COMPILED_TESTS[gpu.COMPILED_TESTS.index("-m") + 1]
    for given in range(8):
        names = {name: bool(given >> i & 1) for i, name in enumerate(("gpu", "slow", "alone"))}
        assert eval(ours, {}, names) == any(eval(each, {}, names) for each in marks), names


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes from /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_tests_and_packs(number, shell, tmp_path, monkeypatch, capsys):  # noqa: F811
    shell("trap '' INT; sleep 60 & echo $!; wait; wait")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setattr(precompile, "probe_entry", lambda on: entry(tmp_path / precompile.FOLDER, "A", cubin=b"a"))
    threading.Timer(1.0, lambda: os.kill(os.getpid(), number)).start()
    assert gpu.main(["--out", str(tmp_path), "--precompile", "h200", "--stages", "tests"]) == 130
    packed, last = capsys.readouterr().out.splitlines()
    assert "1 binaries packed" in packed and last == "interrupted; run the same command to continue"
    child = int((tmp_path / "precompile-tests.log").read_text())
    deadline = time.monotonic() + 20
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


CHECKED = """
import json, torch
from perf import null_driver
null = null_driver.install()
from triton import knobs
from tests.helpers import cases
hits = []
knobs.compilation.listener = lambda src, cache_hit, **_: hits.append((src.name, cache_hit))
# results without a device are wrong
cases.agree = lambda *_: None
cases.check(cases.SINGLE["causal"], torch.float16, torch.device("cpu"), tiles=cases.LARGE_TILES)
print(json.dumps(hits))
"""


@pytest.mark.slow
def test_a_check_finds_what_the_plugin_compiled(tmp_path, monkeypatch):
    """Slow: compiles in new processes. The test is itself a slow one, which the default selection leaves out."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-n", "1", *gpu.COMPILED_TESTS, "-k",
                           "test_low_precision and causal-float16"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]
    hits = compiled(CHECKED, fresh=True)
    assert [name for name, _ in hits] == ["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"]
    assert all(hit for _, hit in hits), hits
    assert not list(tmp_path.glob("null-cuda-*"))
