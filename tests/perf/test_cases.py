"""Contents of the benchmark suites."""

from dataclasses import replace

import pytest
import torch

from perf import cases
from tritonattn import Problem


def by_name(suite):
    return {case.name: case for case in cases.SUITES[suite]}


VARIANTS = "softcap", "sink", "alibi", "relative", "entropy", "key_mass", "normalizer"


@pytest.mark.parametrize("suite", cases.SUITES)
def test_names_are_unique_and_problems_match_their_tensors(suite):
    members = cases.SUITES[suite]
    assert members and len({case.name for case in members}) == len(members)
    for case in members:
        problem = case.problem
        assert problem.heads % problem.kv_heads == 0 and set(case.directions) <= set(cases.DIRECTIONS) and case.directions
        q, k, v = problem.tensors("meta")
        plain = Problem.of(q, k, v, problem.window, bottom_right=problem.shift != 0)
        if problem.packed:
            assert problem.packed == (q.shape[-2], k.shape[-2])
            assert problem.packed == (problem.batch[0] * problem.n_q, problem.batch[0] * problem.n_k)
            assert replace(problem.padded(), lengths=False, packed=problem.packed) == problem
            assert q.transpose(1, 2).is_contiguous()
        else:
            given = {name: getattr(problem, name) for name in VARIANTS}
            assert replace(plain, **given) == problem, case.name
        assert (suite == "variants") == any(getattr(problem, name) != getattr(plain, name) for name in VARIANTS)
        assert (suite == "packed") == (problem.packed is not None)
        assert "/".join((suite, case.name)).count("/") <= 2 and problem.pairs() > 0


def test_paper_grid():
    paper = cases.SUITES["paper"]
    assert len(paper) == 3 * 2 * 6
    for case in paper:
        problem = case.problem
        assert problem.batch[0] * problem.n_q == 16384 and problem.heads * problem.d == 2048
        assert case.name == f"d{problem.d} {problem.mask} {problem.n_k}" and case.directions == ("forward", "backward")
        assert cases.in_paper_grid(problem)
    others = (case for suite in ("models", "decode", "odd", "small", "variants", "packed") for case in cases.SUITES[suite])
    assert not any(cases.in_paper_grid(case.problem) for case in others)


@pytest.mark.parametrize(("name", "heads", "kv_heads", "d", "mask"), [
    ("llama-3-8b training 8k", 32, 8, 128, "causal"), ("llama-3-70b prefill 8k", 64, 8, 128, "causal"),
    ("gpt-2 training 1k", 12, 12, 64, "causal"), ("bert-base training 512", 12, 12, 64, "full"),
    ("vit-l/16 training 197", 16, 16, 64, "full"), ("whisper-large encoder 1500", 20, 20, 64, "full"),
    ("dit-xl/2 training 4k", 16, 16, 72, "full"), ("sdxl cross 4k on 77", 10, 10, 64, "full"),
    ("gemma-7b training 8k", 16, 16, 256, "causal"), ("mistral-7b window 4k of 16k", 32, 8, 128, "window"),
    ("qwen2.5-7b training 8k", 28, 4, 128, "causal"),
])
def test_models_have_their_published_sizes(name, heads, kv_heads, d, mask):
    problem = by_name("models")[name].problem
    assert (problem.heads, problem.kv_heads, problem.d, problem.mask) == (heads, kv_heads, d, mask)


def test_window_of_4k_has_4096_keys():
    problem = by_name("models")["mistral-7b window 4k of 16k"].problem
    assert problem.pairs() == sum(min(i + 1, 4096) for i in range(16384))


def test_chunk_attends_to_all_earlier_tokens():
    problem = by_name("models")["llama-3-8b chunk of 1k after 15k"].problem
    assert problem.pairs() == sum(15 * 1024 + i + 1 for i in range(1024))


def test_decode_and_odd_sizes():
    decode = cases.SUITES["decode"]
    assert {case.problem.n_q for case in decode} == {1} and {case.problem.group for case in decode} == {1, 4, 8}
    assert {case.problem.batch[0] for case in decode} >= {1, 128} and {case.problem.n_k for case in decode} >= {1024, 131072}
    assert all(case.problem.n_k % 64 or case.problem.n_q % 64 or case.problem.d not in (64, 128, 256)
               for case in cases.SUITES["odd"])


def test_suite_in_another_dtype():
    assert {case.problem.dtype for case in cases.suite("paper", torch.float16)} == {torch.float16}
    assert {case.problem.dtype for case in cases.suite("paper")} == {torch.bfloat16}
