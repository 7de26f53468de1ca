"""Keys of tuned configs: what falls together, and what never does."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritonattn import Problem, gpu
from tritonattn.config import KERNELS
from tritonattn.configs.key import FILL_BUCKETS, Key, key_of, waves
from tritonattn.configs.lookup import gpu_fill

H200 = gpu.KNOWN["sm_90"]
PROBLEM = Problem((4,), 32, 8, 4096, 4096, 128, 128, torch.bfloat16, (None, 0))
problems = st.builds(
    Problem, st.tuples(st.integers(1, 64)), st.sampled_from([8, 32]), st.sampled_from([1, 8]), st.integers(1, 100000),
    st.integers(1, 100000), st.integers(1, 512), st.integers(1, 512), st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([(None, None), (None, 0), (256, 0)]), bias=st.sampled_from([None, torch.float32]), masked=st.booleans(),
    dropout=st.booleans(), lengths=st.booleans())


def test_a_key_says_what_it_is_of():
    key = key_of("forward", PROBLEM, H200)
    assert str(key) == "forward bfloat16 d128 causal group 4 queries 4096 keys 4096 fill more"
    odd = dataclasses.replace(PROBLEM, n_q=5000, n_k=5000, dv=64, bias=torch.float32, dropout=True)
    assert str(key_of("dq", odd, H200)) == ("dq bfloat16 d128/64 causal bias float32 dropout ragged group 4 "
                                            "queries over 4096 keys 8192 fill more")


@pytest.mark.parametrize("change", [
    {"dtype": torch.float16}, {"d": 127}, {"dv": 64}, {"n_k": 4095},
    {"window": (None, None)}, {"window": (256, 0)}, {"window": (None, 1)},
    {"bias": torch.float32}, {"bias": torch.bfloat16}, {"masked": True}, {"mapped": True}, {"dropout": True}, {"lengths": True},
    {"kv_heads": 32}, {"n_q": 4097}, {"n_q": 1}, {"n_k": 8192}, {"batch": (1,), "heads": 8},
], ids=str)
def test_what_may_matter_has_a_key_of_its_own(change):
    assert key_of("forward", dataclasses.replace(PROBLEM, **change), H200) != key_of("forward", PROBLEM, H200)


@pytest.mark.parametrize("change", [{"n_q": 2048}, {"n_k": 2176}, {"batch": (8,)}, {"batch": (2, 2)}, {"shift": 5}], ids=str)
def test_what_hardly_matters_has_not(change):
    assert key_of("forward", dataclasses.replace(PROBLEM, **change), H200) == key_of("forward", PROBLEM, H200)


@given(st.sampled_from(KERNELS), problems)
def test_a_key_reads_back_and_goes_with_the_tables_fill(kernel, problem):
    key = key_of(kernel, problem, H200)
    assert Key.from_json(key.as_json()) == key and hash(key) == hash(Key.from_json(key.as_json()))
    assert (FILL_BUCKETS.index(key.fill) >= 2) == (gpu_fill(kernel, problem, H200) == "many") == (waves(kernel, problem, H200) >= 1)


@given(st.integers(1, 200000), st.integers(1, 200000))
def test_longer_problems_never_fall_into_an_earlier_bucket(a, b):
    def ends(n):
        key = key_of("forward", dataclasses.replace(PROBLEM, n_q=n, n_k=n), H200)
        return (key.queries or 1 << 20), key.keys, FILL_BUCKETS.index(key.fill)

    shorter, longer = ends(min(a, b)), ends(max(a, b))
    assert all(x <= y for x, y in zip(shorter, longer))


def test_windows_differ_by_their_sides_and_roughly_by_their_widths():
    windows = [(None, 100), (100, 0), (100, None), (4000, 0), (100, 100), (None, 0)]
    found = {key_of("forward", dataclasses.replace(PROBLEM, window=window), H200) for window in windows}
    assert len(found) == len(windows)
    near = [key_of("forward", dataclasses.replace(PROBLEM, window=(side, 0)), H200) for side in (513, 1000)]
    assert near[0] == near[1] and "window 1024,0" in str(near[0])


def test_what_is_no_key_is_refused():
    content = key_of("forward", PROBLEM, H200).as_json()
    with pytest.raises(KeyError):
        Key.from_json({name: value for name, value in content.items() if name != "fill"})
    with pytest.raises(TypeError, match="got color besides"):
        Key.from_json(content | {"color": "red"})
