"""The explanation of a call: configs, origins, rejected configs, errors."""

import dataclasses
import json

import pytest
import torch

import tritonattn
from tests.helpers.kernel_reports import A100, H200
from tritonattn import Config, Problem, attention, block_mask, config, gpu
from tritonattn.analysis import explain
from tritonattn.cli import main
from tritonattn.configs import lookup, shipped


def tensors(device, *shapes, dtype=torch.float32):
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


CALLS = {
    "plain": ([(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)], {}),
    "without heads": ([(5, 8), (7, 8), (7, 8)], {"scale": -0.1}),
    "causal": ([(2, 5, 8)] * 3, {"causal": True}),
    "window": ([(1, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8)], {"window": (2, 1), "align": "bottom_right"}),
    "bias": ([(2, 2, 5, 8)] * 3, {"bias": torch.zeros(5)}),
    "mask": ([(2, 2, 5, 8)] * 3, {"mask": torch.ones(5, 5, dtype=torch.bool)}),
    "map": ([(2, 2, 5, 8)] * 3, {"mask": block_mask(torch.ones(5, 5, dtype=torch.bool))}),
    "lengths": ([(2, 2, 5, 8)] * 3, {"key_lengths": torch.tensor([3, 5])}),
    "dropout": ([(2, 2, 5, 8)] * 3, {"dropout_p": 0.5}),
    "alibi": ([(2, 2, 5, 8)] * 3, {"alibi": torch.ones(2)}),
    "relative": ([(2, 2, 5, 8)] * 3, {"relative": torch.ones(2, 3)}),
    "no columns": ([(2, 2, 5, 0), (2, 2, 5, 0), (2, 2, 5, 3)], {}),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("name", CALLS)
def test_explained_problem_is_the_one_that_runs(name, device, monkeypatch):
    shapes, options = CALLS[name]
    given, asked = tensors(device, *shapes), []
    find = lookup.get_config
    monkeypatch.setattr(lookup, "get_config", lambda kernel, problem, on: asked.append(problem) or find(kernel, problem, on))
    attention(*given, **options)
    state = torch.get_rng_state()
    explained = tritonattn.explain(*given, **options)
    assert explained.problem == asked[0] and torch.equal(torch.get_rng_state(), state)
    assert explained.gpu is gpu.INTERPRETER and str(explained.problem) in str(explained)


def test_errors_are_those_of_the_call(device):
    q, k = tensors(device, (2, 4, 5, 8), (2, 3, 5, 8))
    with pytest.raises(RuntimeError, match="dividing"):
        tritonattn.explain(q, k, k)
    with pytest.raises(ValueError, match="softcap"):
        tritonattn.explain(q, q, q, softcap=-2.0)
    with pytest.raises(TypeError, match="q: expected a torch.Tensor"):
        tritonattn.explain(None, q, q, dropout_p=0.5)


def test_explanation_has_config_origin_figures_and_rejected_configs():
    problem = Problem.parse("4x32x8x4096x128", torch.bfloat16, True)
    assert problem == Problem((4,), 32, 8, 4096, 4096, 128, 128, torch.bfloat16, (None, 0))
    found = explain.explain_problem(problem, H200)
    assert [line.kernel for line in found.lines] == ["forward", "delta", "dq", "dkdv"]
    line, text = found.lines[0], str(found)
    chosen = lookup.lookup_config("forward", problem, H200)
    assert (line.config, line.origin, line.table, line.entry) == (str(chosen.config), "table", "h200", chosen.row.filled)
    assert line.lost == chosen.row.rejected and line.lost
    for word in (line.config, "this GPU (h200.json)", f"bound by {line.entry.bound}", "static-model", *line.lost,
                 f"{line.entry.registers} registers"):
        assert word in text
    plain = json.loads(json.dumps(found.as_json()))
    assert plain["kernels"][0]["entry"]["config"] == line.config and plain["arch"] == "sm_90"


def test_the_sums_of_diagonals_have_a_line_of_their_own():
    problem = Problem.parse("4x32x8x4096x128", torch.bfloat16, True)
    for name in ("alibi", "relative"):
        found = explain.explain_problem(dataclasses.replace(problem, **{name: True}), H200)
        assert [line.kernel for line in found.lines] == ["forward", "delta", "dq", "dkdv", "diagonals"]
        assert "diagonals  32x64w4s1 " in str(found) and name in str(found).splitlines()[0]


def test_the_kernels_of_the_key_mass_have_the_configs_of_others():
    problem = dataclasses.replace(Problem.parse("4x32x8x4096x128", torch.bfloat16, True), key_mass=True)
    found = explain.explain_problem(problem, H200)
    *_, dq, dkdv, key_mass, mass_delta = found.lines
    assert (key_mass.kernel, mass_delta.kernel) == ("key_mass", "mass_delta")
    assert (key_mass.config, mass_delta.config) == (dkdv.config, dq.config)
    # no figures of the other kernel's binary
    assert str(found).endswith(f"\nmass_delta {dq.config:16}that of dK/dV or dQ, whose loop is similar")


def test_pinned_config_exception_and_another_gpu():
    problem = Problem.parse("4x32x8x4096x128", torch.bfloat16, False)
    with config.pinned(dq=Config(32, 32)):
        lines = {line.kernel: line for line in explain.explain_problem(problem, A100).lines}
    assert (lines["dq"].config, lines["dq"].origin, lines["dq"].entry) == ("32x32w4s2", "pinned", None)
    assert lines["forward"].origin == "table"
    other = dataclasses.replace(H200, name="H20", sms=78)
    assert "a GPU of the same architecture (h200.json)" in str(explain.explain_problem(problem, other))
    odd = dataclasses.replace(problem, bias=torch.float32)
    assert [line.kernel for line in explain.explain_problem(odd, A100).lines][-1] == "dbias"
    wide = explain.explain_problem(Problem.parse("4x8x8x4096x512", torch.bfloat16, True), H200)
    exceptions = [line.entry.accepted_fault for line in wide.lines if line.entry and line.entry.accepted_fault]
    assert exceptions and all(f"despite {exception}" in str(wide) for exception in exceptions)


def test_unknown_figures_are_left_out():
    assert explain._describe_figures({"registers": None, "shared_memory": 64}) == []
    assert explain._describe_figures({"registers": 8, "shared_memory": 64}) == ["8 registers, 64 bytes of shared memory"]
    assert explain._describe_figures({"registers": 8, "shared_memory": 64, "occupancy": 1, "bound": "tensor"}) == [
        "bound by tensor; 8 registers, 64 bytes of shared memory, 1 block per SM"]


def test_unsupported_head_size_is_one_line(capsys):
    wide = Problem.parse("1x8x8x64x512", torch.float32, False)
    with pytest.raises(RuntimeError, match=r"head size: expected at most 256 in torch.float32 on A10, got 512"):
        explain.explain_problem(wide, gpu.KNOWN["sm_86"])
    assert main.main(["explain", "--shape", "1x8x8x64x512", "--dtype", "fp32", "--gpu", "a100,a10"]) == 2
    assert capsys.readouterr().err == "head size: expected at most 256 in torch.float32 on A10, got 512\n"
    assert explain.explain_problem(wide, A100).lines


@pytest.mark.parametrize("table", shipped.shipped_tables(), ids=lambda each: each.name)
def test_usual_rows_list_rejected_configs(table):
    """The usual rows are those of 16-bit numbers and heads of 64, 128 and 256."""
    rows = [row for row in table.rows.values() if row.itemsize == 2 and row.width in (64, 128, 256)]
    assert all(row.rejected for row in rows), [row.key for row in rows if not row.rejected]
    assert sum(len(row.rejected) for row in rows) >= 4 * len(rows)


@pytest.mark.parametrize("shape", ["", "2x3", "2x8x3x64x64", "0x8x8x64x64", "2x8x8x64x513", "axbxcxdxe", "2x8x8x64x64x2"])
def test_malformed_shape_is_an_error(shape):
    with pytest.raises(ValueError, match="shape: expected"):
        Problem.parse(shape, torch.bfloat16, False)
