"""Keys of tuned configs: problems that share a key, and problems that never do."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritonattn import Problem, gpu
from tritonattn.config import KERNELS
from tritonattn.configs.key import FILL_BUCKETS, key_of, waves
from tritonattn.configs.lookup import gpu_fill
from tritonattn.problem import UserFunction

H200 = gpu.KNOWN["sm_90"]
PROBLEM = Problem((4,), 32, 8, 4096, 4096, 128, 128, torch.bfloat16, (None, 0))
problems = st.builds(
    Problem, st.tuples(st.integers(1, 64)), st.sampled_from([8, 32]), st.sampled_from([1, 8]), st.integers(1, 100000),
    st.integers(1, 100000), st.integers(1, 512), st.integers(1, 512), st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([(None, None), (None, 0), (256, 0)]), bias=st.sampled_from([None, torch.float32]), masked=st.booleans(),
    dropout=st.booleans(), lengths=st.booleans())


def test_a_key_names_all_properties():
    assert key_of("forward", PROBLEM, H200) == "forward bfloat16 d128 causal group 4 queries 4096 keys 4096 fill more"
    odd = dataclasses.replace(PROBLEM, n_q=5000, n_k=5000, dv=64, bias=torch.float32, dropout=True)
    assert key_of("dq", odd, H200) == ("dq bfloat16 d128/64 causal bias float32 dropout ragged group 4 "
                                       "queries over 4096 keys 8192 fill more")


@pytest.mark.parametrize("change", [
    {"dtype": torch.float16}, {"d": 127}, {"dv": 64}, {"n_k": 4095},
    {"window": (None, None)}, {"window": (256, 0)}, {"window": (None, 1)},
    {"bias": torch.float32}, {"bias": torch.bfloat16}, {"masked": True}, {"mapped": True}, {"dropout": True}, {"lengths": True},
    {"score_function": UserFunction("a:f#1")}, {"mask_function": UserFunction("a:g#1")},
    {"kv_heads": 32}, {"n_q": 4097}, {"n_q": 1}, {"n_k": 8192}, {"batch": (1,), "heads": 8},
], ids=str)
def test_a_property_that_may_matter_changes_the_key(change):
    assert key_of("forward", dataclasses.replace(PROBLEM, **change), H200) != key_of("forward", PROBLEM, H200)


@pytest.mark.parametrize("change", [{"n_q": 2048}, {"n_k": 2176}, {"batch": (8,)}, {"batch": (2, 2)}, {"shift": 5}], ids=str)
def test_small_changes_of_lengths_keep_the_key(change):
    assert key_of("forward", dataclasses.replace(PROBLEM, **change), H200) == key_of("forward", PROBLEM, H200)


def parts(key):
    """Return the buckets of a key: queries, keys, and the number of the fill."""
    queries, keys, fill = re.search(r"queries (over )?(\d+) keys (\d+) fill (.+)", key).groups()[1:]
    return int(queries) + ("over" in key), int(keys), FILL_BUCKETS.index(fill)


@given(st.sampled_from(KERNELS), problems)
def test_the_fill_of_a_key_agrees_with_the_tables(kernel, problem):
    key = key_of(kernel, problem, H200)
    filled = waves(kernel, problem, H200) >= 1
    assert filled == (parts(key)[2] >= 2) == (gpu_fill(kernel, problem, H200) == "filled")


@given(st.integers(1, 200000), st.integers(1, 200000))
def test_buckets_grow_with_length(a, b):
    shorter, longer = (parts(key_of("forward", dataclasses.replace(PROBLEM, n_q=n, n_k=n), H200)) for n in sorted((a, b)))
    assert all(x <= y for x, y in zip(shorter, longer))


def test_windows_have_keys_by_side_and_width_bucket():
    windows = [(None, 100), (100, 0), (100, None), (4000, 0), (100, 100), (None, 0)]
    distinct = {key_of("forward", dataclasses.replace(PROBLEM, window=window), H200) for window in windows}
    assert len(distinct) == len(windows)
    near = [key_of("forward", dataclasses.replace(PROBLEM, window=(side, 0)), H200) for side in (513, 1000)]
    assert near[0] == near[1] and "window 1024,0" in near[0]
