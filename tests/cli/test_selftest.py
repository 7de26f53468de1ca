"""The self-test passes on correct kernels, and names the wrong tensors of a wrong kernel."""

import json
import math

import pytest
import torch

from tritonattn.cli import selftest
from tritonattn.kernels import backward, forward, mass
from tritonattn.runtime import launch

SMALL = selftest.Case("small", (torch.float32,), (2, 1, 20, 20, 16, 16), selftest.CAUSAL)


@pytest.fixture
def small(monkeypatch):
    """Replace the problems by one small one, which also runs twice."""
    monkeypatch.setattr(selftest, "CASES", (SMALL, SMALL._replace(name="twice", repeated=True)))


@pytest.fixture
def plant(monkeypatch, small):
    """plant(kernel, output, change): after each run of the kernel, apply change(tensor) in place to one of its outputs."""
    run = launch.run

    def planted(kernel, output, change):
        def run_and_change(call, device):
            run(call, device)
            if call.kernel is kernel:
                change(output(call.arguments))

        monkeypatch.setattr(launch, "run", run_and_change)

    return planted


def wrong(results, problem="small"):
    return {result.tensor for result in results if result.problem == problem and not result.agrees}


def test_every_kernel_agrees(device):
    results = selftest.run(device)
    table = selftest.table(results)
    assert all(result.agrees for result in results), table
    assert {(result.problem, result.tensor) for result in results} == {
        (case.name, tensor) for case in selftest.CASES for tensor in (*selftest.TENSORS, *selftest.STATISTICS * case.statistics)
        if (case.placed or tensor != "drelative") and (case.normalizer == "softmax" or tensor != "lse")}
    assert sum(case.placed for case in selftest.CASES) == sum(case.statistics for case in selftest.CASES) == 1
    assert table.endswith(f"all {len(results)} tensors agree")


def test_problems_cover_ragged_tiles_grouped_heads_and_dtypes():
    sizes = [case.sizes for case in selftest.CASES]
    assert all(n % 16 for case in sizes for n in case[2:4]), "a length that tiles divide"
    assert all(n % 16 for case in selftest.CASES for n in selftest._longer(case).sizes[2:4]), "on a GPU"
    assert any(heads != kv_heads for heads, kv_heads, *_ in sizes) and any(d != dv for *_, d, dv in sizes)
    assert {dtype for case in selftest.CASES for dtype in case.dtypes} == {torch.float32, torch.float16, torch.bfloat16}


@pytest.mark.parametrize("kernel, output, tensors", [
    (forward.forward_kernel, lambda arguments: arguments[2].o.ptr, {"o", "dq", "dk"}),  # dq and dk by way of delta
    (forward.forward_kernel, lambda arguments: arguments[2].lse, {"lse"}),
    (forward.forward_kernel, lambda arguments: arguments[2].statistics, {"dq", "dk", "dv"}),
    (backward.delta_kernel, lambda arguments: arguments[4], {"dq", "dk"}),
    (backward.dq_kernel, lambda arguments: arguments[2].ptr, {"dq"}),
    (backward.dkdv_kernel, lambda arguments: arguments[2].k.ptr, {"dk"}),
    (backward.dkdv_kernel, lambda arguments: arguments[2].v.ptr, {"dv"}),
])
def test_error_of_one_percent_is_found(plant, device, kernel, output, tensors):
    plant(kernel, output, lambda x: x.mul_(1.01))
    results = selftest.run(device)
    assert wrong(results) == tensors
    assert not wrong(results, "twice"), "wrong in the same way twice"
    names = ", ".join(tensor for tensor in selftest.TENSORS if tensor in tensors)
    assert selftest.table(results).endswith(f"{len(tensors)} of 10 tensors are wrong: {names}")


@pytest.mark.parametrize("kernel, output, tensors", [
    (forward.forward_kernel, lambda arguments: arguments[2].row_max[0], {"max"}),
    (forward.forward_kernel, lambda arguments: arguments[2].entropy[0], {"entropy", "dq", "dk"}),  # by way of delta
    (mass.key_mass_kernel, lambda arguments: arguments[3], {"key_mass"}),
    (mass.mass_delta_kernel, lambda arguments: arguments[4], {"dq", "dk"}),
])
def test_an_error_of_a_statistic_is_found(plant, monkeypatch, device, kernel, output, tensors):
    plant(kernel, output, lambda x: x.mul_(1.01))
    monkeypatch.setattr(selftest, "CASES", (SMALL._replace(statistics=True),))
    assert wrong(selftest.run(device)) == tensors


def test_table_names_the_worst_tensor(plant, device):
    plant(backward.dkdv_kernel, lambda arguments: arguments[2].k.ptr, lambda x: x.mul_(1.01))
    line = selftest.table(selftest.run(device)).splitlines()[1].split()
    assert line[:3] == ["small", "float32", "dk"] and line[-1] == "WRONG"


def test_nan_is_wrong_and_null_in_json(plant, device):
    plant(backward.dq_kernel, lambda arguments: arguments[2].ptr, lambda x: x[..., 0, 0].fill_(math.nan))
    results = selftest.run(device)
    assert wrong(results) == {"dq"}
    listed = json.loads(json.dumps(selftest.as_json(results), allow_nan=False))
    assert [set(entry) for entry in listed] == [{"problem", "dtype", "tensor", "error", "allowed", "agrees"}] * 10
    assert [entry["tensor"] for entry in listed if entry["error"] is None] == ["dq"]


def test_bit_that_changes_between_runs_is_found(plant, device):
    runs = []

    def flip_last_bit(dk):
        runs.append(dk)
        dk.view(-1)[:1].view(torch.int16)[0] ^= len(runs) % 2

    plant(backward.dkdv_kernel, lambda arguments: arguments[2].k.ptr, flip_last_bit)
    results = selftest.run(device)
    assert not wrong(results) and wrong(results, "twice") == {"dk"}


def test_infinite_error_does_not_agree():
    assert not selftest.Result("", "", "", math.inf, math.inf).agrees, "torch may overflow, our kernels may not"
