"""An archive of compiled kernels is found by Triton in another folder, and its launches compile nothing."""

import re

import pytest
import torch

from perf import cases, gpu, precompile
from tests.helpers.compile_server import compiled
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


def test_a_visit_says_whether_the_kernels_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setattr(precompile, "unpack", lambda archive, folder: {"A", "B"})
    for entry, words in (("B", "hit"), ("C", "miss: made by another Python, Triton or source, or for another GPU")):
        monkeypatch.setattr(precompile, "probe_entry", lambda on, entry=entry: entry)
        gpu.use_archive(tmp_path, gpus.named("h200"))
        assert capsys.readouterr().out == f"2 precompiled binaries: {words}\n"
    assert gpu.os.environ["TRITON_CACHE_DIR"] == str(tmp_path / precompile.FOLDER)


def test_precompiling_needs_no_gpu_and_stops_at_its_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setattr(precompile, "probe_entry", lambda on: "A")
    monkeypatch.setattr(gpu, "run_step", lambda path, arguments, seconds: steps.append((path.name, arguments, seconds)))
    monkeypatch.setattr(precompile.Workers, "map", lambda self, jobs: iter([None] * 3 + [precompile.Failure("x", "y")] * 999))
    steps, arguments = [], ["--out", str(tmp_path), "--precompile", "h200", "--minutes", "0.000001"]
    assert gpu.main(arguments) == 1
    assert re.search(r"kernels.tar.xz: 1 of \d+ jobs done, 0 failed; 0 binaries packed, 0 left out", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="2"):
        gpu.main([*arguments, "--precompile", "A100"])
    assert "tests can be compiled for sm_90 alone, not for sm_80" in capsys.readouterr().err
    (name, pytest_arguments, seconds), = steps
    assert name == "precompile-tests.log" and pytest_arguments[-3:] == list(gpu.COMPILED_TESTS[-3:]) and seconds < 1
