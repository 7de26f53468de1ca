"""Problems recorded while a model runs."""

import json
import threading

import pytest
import torch

import tritonattn
from tritonattn import Config, Problem, config, gpu
from tritonattn.autotune import record_problems
from tritonattn.configs import lookup

H200 = gpu.KNOWN["sm_90"]
A = Problem((1,), 2, 2, 64, 64, 32, 32, torch.float16)
B = Problem((2,), 2, 2, 64, 64, 32, 32, torch.float16, (None, 0))


def test_problems_and_the_calls_of_their_kernels_are_recorded(tmp_path):
    path = tmp_path / "shapes.jsonl"
    with tritonattn.record_problems(path):
        for kernel, problem in (("forward", A), ("forward", B), ("forward", A), ("dq", A)):
            lookup.get_config(kernel, problem, H200)
        assert len(record_problems.read(path)) == 2, "a new problem is written at once"
    lookup.get_config("forward", shorter(A), H200)
    assert record_problems.read(path) == [(A, {"forward": 2, "dq": 1}), (B, {"forward": 1})]
    assert [each.name for each in tmp_path.iterdir()] == ["shapes.jsonl"]


def shorter(problem):
    return Problem.from_json(problem.as_json() | {"n_q": 7})


@pytest.mark.interpreted
def test_a_real_call_forward_and_backward(device, tmp_path):
    q, k, v = (torch.randn(1, 2, 16, 16, requires_grad=True) for _ in range(3))
    with tritonattn.record_problems(tmp_path / "x"), config.pinned(Config(16, 16)):
        tritonattn.attention(q, k, v, causal=True).sum().backward()
    (problem, kernels), = record_problems.read(tmp_path / "x")
    assert problem.mask == "causal" and kernels == {"forward": 1, "delta": 1, "dq": 1, "dkdv": 1}, "also with a pinned config"


def test_an_error_in_the_block_loses_nothing_and_blocks_may_nest(tmp_path):
    with pytest.raises(KeyError), tritonattn.record_problems(tmp_path / "outer"):
        with tritonattn.record_problems(tmp_path / "inner"):
            lookup.get_config("forward", A, H200)
        lookup.get_config("forward", B, H200)
        raise KeyError
    assert [problem for problem, _ in record_problems.read(tmp_path / "outer")] == [A, B]
    assert [problem for problem, _ in record_problems.read(tmp_path / "inner")] == [A] and not lookup.observers


def test_threads_are_all_counted(tmp_path):
    with tritonattn.record_problems(tmp_path / "x"):
        threads = [threading.Thread(target=lambda: [lookup.get_config("forward", A, H200) for _ in range(50)])
                   for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert record_problems.read(tmp_path / "x") == [(A, {"forward": 400})]


def test_a_file_that_cannot_be_written_raises_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), tritonattn.record_problems(tmp_path / "file" / "x"):
        raise AssertionError("it ran")


def test_a_later_write_error_is_a_warning(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.warns(UserWarning, match="problems cannot be written: FileExistsError"):
        with tritonattn.record_problems(tmp_path / "folder" / "x"):
            (tmp_path / "folder" / "x").unlink()
            (tmp_path / "folder").rmdir()
            (tmp_path / "folder").write_text("")
            assert lookup.get_config("forward", A, H200)


@pytest.mark.parametrize("line", [json.dumps({"problem": A.as_json(), "kernels": {"forward": "many"}}),
                                  json.dumps({"problem": A.as_json() | {"dtype": "nn"}, "kernels": {}}),
                                  "", "{}", "[1]", json.dumps({"problem": {"batch": 1}, "kernels": {}}), "nothing"])
def test_a_file_without_problems_raises(line, tmp_path):
    (tmp_path / "x").write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1: expected a problem"):
        record_problems.read(tmp_path / "x")
