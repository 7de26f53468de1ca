"""Problem: its window, its counts and its text."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonattn import Problem, reference
from tritonattn.problem import UserFunction

sides = st.none() | st.integers(0, 12)


@settings(max_examples=300)
@given(n_q=st.integers(0, 9), n_k=st.integers(0, 9), left=sides, right=sides, bottom_right=st.booleans())
def test_pairs_are_those_of_the_definition(n_q, n_k, left, right, bottom_right):
    q, k = torch.empty(2, 1, n_q, 4), torch.empty(2, 1, n_k, 4)
    problem = Problem.of(q, k, k, (left, right), bottom_right)
    seen = reference.visible(n_q, n_k, window=(left, right), align="bottom_right" if bottom_right else "top_left")
    assert problem.pairs() == seen.sum()
    still = reference.visible(n_q, n_k, window=problem.window, align="bottom_right" if bottom_right else "top_left")
    assert torch.equal(seen, still), "a side that excludes keys was dropped"


def test_a_side_that_excludes_nothing_is_dropped():
    q, k = torch.empty(1, 1, 1, 4), torch.empty(1, 1, 9, 4)
    assert Problem.of(q, k, k, (None, 0), True).mask == "full"
    assert Problem.of(k, k, k, (8, 8)).mask == "full"
    assert Problem.of(k, k, k, (7, 8)).window == (7, None)


def test_flops():
    problem = Problem((2, 3), 4, 2, 10, 20, 16, 8, torch.float16)
    assert problem.flops() == 2 * 6 * 4 * 10 * 20 * (16 + 8)
    assert problem.flops("backward") == 2 * 6 * 4 * 10 * 20 * (3 * 16 + 2 * 8)


@pytest.mark.parametrize("problem, text", [
    (Problem((2,), 8, 8, 1024, 1024, 64, 64, torch.bfloat16), "2x8x1024x64 bfloat16 full"),
    (Problem((2,), 8, 2, 10, 20, 64, 32, torch.float16, (None, 0), 10), "2x8/2x10/20x64/32 float16 causal shift 10"),
    (Problem((), 8, 8, 10, 10, 64, 64, torch.float32, (5, None)), "8x10x64 float32 window5,None"),
])
def test_str(problem, text):
    assert str(problem) == text


def test_sample_tensors_have_the_problem():
    problem = Problem((2,), 4, 2, 10, 20, 16, 8, torch.float16, (None, 0), 10)
    q, k, v = problem.tensors()
    assert Problem.of(q, k, v, (None, 0), True) == problem
    assert torch.equal(q, problem.tensors()[0]) and not torch.equal(q, problem.tensors(seed=1)[0])
    assert problem.tensors("meta")[0].device.type == "meta"


def test_bytes_are_those_of_the_tensors():
    problem = Problem((2,), 4, 2, 5, 7, 3, 6, torch.float16)
    q, k, v = (x.nbytes for x in problem.tensors())
    o, lse = 2 * 4 * 5 * 6 * 2, 2 * 4 * 5 * 4
    assert problem.bytes() == q + k + v + o + lse and problem.bytes("backward") == 2 * (q + k + v + o) + lse
    relu = dataclasses.replace(problem, normalizer="relu")
    assert relu.bytes() == q + k + v + o and relu.bytes("backward") == 2 * (q + k + v) + o, "no lse, and o is not read again"


@pytest.mark.parametrize("problem", [
    Problem((), 1, 1, 1, 1, 1, 1, torch.float64),
    Problem((2,), 1, 1, 1, 1, 1, 1, torch.float16, score_function=UserFunction("a:f,a:g#1", ("int32", 5)),
            mask_function=UserFunction("a:h#2")),
    Problem((2, 3), 4, 2, 5, 7, 3, 6, torch.bfloat16, (None, 0), 2)])
def test_as_json_and_back(problem):
    assert Problem.from_json(json.loads(json.dumps(problem.as_json()))) == problem


def test_reads_records_from_before_variants_existed():
    problem = Problem((2,), 8, 2, 100, 100, 64, 64, torch.bfloat16, (None, 0))
    fields = {name: x for name, x in problem.as_json().items()
              if name not in ("bias", "masked", "mapped", "dropout", "lengths")}
    assert Problem.from_json(fields) == problem
