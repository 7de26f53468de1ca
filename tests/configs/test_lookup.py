"""Config, pins, and the lookup of a kernel's config."""

import dataclasses
import itertools
import time
import timeit

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.cpu_speed import slowness
from tritonattn import Config, Problem, config, gpu
from tritonattn.configs import lookup, shipped

PROBLEM = Problem((2,), 8, 8, 1000, 1000, 64, 64, torch.bfloat16)
H200 = gpu.KNOWN["sm_90"]


def test_a_config_parses_what_it_prints():
    assert str(Config(128, 64, 8, 3)) == "128x64w8s3" and Config.parse("128x64w8s3") == Config(128, 64, 8, 3)
    assert Config.parse("128x64w8s3e1") == Config(128, 64, 8, 3, edge_stages=1) == Config.parse(str(Config(128, 64, 8, 3, 1)))
    assert str(Config(128, 64, 8, 3, 1, ahead=True, mma_sum=True)) == "128x64w8s3e1am"
    assert str(Config(32, 128, 8, 2, two_passes=True)) == "32x128w8s2p"
    for edge_stages, *flags in itertools.product((None, 1), *[(False, True)] * 3):
        each = Config(128, 64, 8, 3, edge_stages, *flags)
        assert Config.parse(str(each)) == each


@pytest.mark.parametrize("make, message", [
    (lambda: Config(0, 64), "block_m: expected a positive integer, got 0"),
    (lambda: Config(64, 48), "block_n: expected a power of two of at least 16, got 48"),
    (lambda: Config(64, 8), "block_n: expected a power of two of at least 16, got 8"),
    (lambda: Config(64, 64, 3), "num_warps: expected a power of two of at least 1, got 3"),
    (lambda: Config(64, 64, 4, 2, 3), "edge_stages: expected 1 or None, got 3"),
    (lambda: Config(64, 64, 4, 1.5), "num_stages: expected a positive integer, got 1.5"),
    (lambda: Config(64, 64, ahead=1), "ahead: expected True or False, got 1"),
    (lambda: Config(64, 64, mma_sum=None), "mma_sum: expected True or False, got None"),
    (lambda: Config(64, 64, two_passes=2), "two_passes: expected True or False, got 2"),
    (lambda: Config.parse("128x64w8s3ma"), "config: expected the form 128x64w8s3, got '128x64w8s3ma'"),
    (lambda: Config.parse("128x64"), "config: expected the form 128x64w8s3, got '128x64'"),
])
def test_invalid_configs_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_innermost_pin_wins():
    outer, inner = Config(16, 16), Config(32, 32)
    with config.pinned(outer):
        with config.pinned(dq=inner):
            assert lookup.get_config("dq", PROBLEM, H200) == inner and lookup.get_config("forward", PROBLEM, H200) == outer
        assert lookup.get_config("dq", PROBLEM, H200) == outer
    assert lookup.get_config("dq", PROBLEM, H200) == lookup.lookup_config("dq", PROBLEM, H200).config


def test_pins_of_different_threads_may_overlap():
    one, other = config.pinned(Config(16, 16)), config.pinned(Config(32, 32))
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert lookup.get_config("forward", PROBLEM, H200) == Config(32, 32)
    other.__exit__(None, None, None)
    assert lookup.get_config("forward", PROBLEM, H200) == lookup.lookup_config("forward", PROBLEM, H200).config


@pytest.mark.parametrize("arguments, message", [({"backward": Config(16, 16)}, "expected kernels among .*got backward"),
                                                ({"config": "16x16w4s1"}, "expected a Config, got '16x16w4s1'")])
def test_invalid_pins_are_rejected(arguments, message):
    with pytest.raises(TypeError, match=message), config.pinned(**arguments):
        pass


VARIANTS = {
    "full": {"n_q": 1024, "n_k": 1024}, "ragged": {}, "causal": {"window": (None, 0)}, "window": {"window": (9, 3)},
    "bias": {"bias": torch.float32}, "mask": {"masked": True}, "map": {"masked": True, "mapped": True},
    "dropout": {"dropout": True}, "lengths": {"lengths": True}, "alibi": {"alibi": True}, "relative": {"relative": True},
}


@pytest.mark.parametrize("arch", gpu.KNOWN)
@pytest.mark.parametrize("kernel", config.KERNELS)
def test_every_problem_has_a_config_in_the_table_of_its_gpu(arch, kernel):
    on = gpu.KNOWN[arch]
    for dtype, d, batch, (name, variant) in itertools.product(
            (torch.float16, torch.float32, torch.float64), (1, 64, 65, 200, 512), ((1,), (64,)), VARIANTS.items()):
        d = min(d, on.largest_head(dtype))
        problem = dataclasses.replace(PROBLEM, d=d, dtype=dtype, batch=batch, **variant)
        choice = lookup.lookup_config(kernel, problem, on)
        assert choice == lookup.lookup_config(kernel, dataclasses.replace(problem, dv=1), on)
        if kernel in lookup.SIMILAR:
            assert choice.origin == "similar"
            assert choice.config == lookup.lookup_config(lookup.SIMILAR[kernel], problem, on).config
            continue
        if kernel in lookup.UNTUNED:
            assert choice.origin == "formula"
            continue
        assert choice.origin == "table" and choice.config == getattr(choice.row, choice.fill).config
        assert choice.fill == ("filled" if batch == (64,) else "underfilled")
        assert choice.row.width >= d and choice.row.itemsize == min(dtype.itemsize, 4)
        if name == "map":
            assert max(choice.config.block_m, choice.config.block_n) <= 128


@pytest.mark.parametrize("arch", gpu.KNOWN)
def test_float32_heads_of_512_have_rows_where_they_fit(arch):
    """GPUs with the shared memory of an A100 can run the smallest tiles; the others support heads up to 256."""
    on, rows = gpu.KNOWN[arch], next(each.rows for each in shipped.shipped_tables() if each.gpu["arch"] == arch)
    widths = {width: [row for row in rows.values() if (row.itemsize, row.width) == (4, width)] for width in (256, 512)}
    assert on.largest_head(torch.bfloat16) == 512 and widths[256]
    assert on.largest_head(torch.float32) == (512 if widths[512] else 256)
    needed = max(row.filled.shared_memory for each in shipped.shipped_tables() if each.gpu["arch"] == "sm_80"
                 for row in each.rows.values() if (row.itemsize, row.width) == (4, 512))
    assert bool(widths[512]) == (on.shared_memory >= needed or on.is_amd)


@pytest.mark.parametrize("name, kernel, mask", [
    ("full", "forward", "full"), ("ragged", "forward", "edges"), ("causal", "dq", "edges"), ("window", "dkdv", "window"),
    ("bias", "forward", "pairs"), ("mask", "dq", "pairs"), ("map", "forward", "edges"), ("dropout", "dkdv", "pairs"),
    ("lengths", "forward", "edges"), ("lengths", "dkdv", "pairs"), ("full", "dbias", "pairs"),
    ("alibi", "dq", "edges"), ("relative", "forward", "pairs"),
])
def test_mask_class(name, kernel, mask):
    assert lookup.mask_class(kernel, dataclasses.replace(PROBLEM, **VARIANTS[name])) == mask


def test_a_gpu_without_a_table_uses_its_architecture_or_the_closest_one():
    problem = dataclasses.replace(PROBLEM, batch=(64,))
    small = dataclasses.replace(H200, name="H100 PCIe", sms=114)
    assert lookup.lookup_config("forward", problem, H200).origin == "table"
    assert lookup.lookup_config("forward", problem, gpu.named("h100")).origin == "architecture", "it has less memory"
    renamed = dataclasses.replace(H200, name="any")
    assert lookup.lookup_config("forward", problem, renamed).origin == "table"
    choice = lookup.lookup_config("forward", problem, small)
    assert (choice.origin, choice.table) == ("architecture", "h200")
    assert choice.config == lookup.lookup_config("forward", problem, H200).config
    like = {"sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120", "gfx950": "gfx942"}
    for arch, known in like.items():
        choice = lookup.lookup_config("forward", problem, dataclasses.replace(gpu.KNOWN[known], arch=arch))
        assert choice.origin == "closest architecture"
        assert choice.config == lookup.lookup_config("forward", problem, gpu.KNOWN[known]).config


@given(st.sampled_from(sorted(gpu.KNOWN)), st.integers(8 << 10, 228 << 10), st.integers(0, 512), st.integers(1, 200),
       st.sampled_from(config.KERNELS), st.integers(1, 512), st.sampled_from([torch.float16, torch.float32]),
       st.sampled_from(sorted(VARIANTS)))
def test_every_returned_config_fits(arch, shared_memory, tensor_memory, sms, kernel, d, dtype, name):
    on = gpu.Gpu("another", arch, sms, shared_memory, tensor_memory)
    choice = lookup.lookup_config(kernel, dataclasses.replace(PROBLEM, d=d, dtype=dtype, **VARIANTS[name]), on)
    assert choice.origin in lookup.ORIGINS
    if choice.row is not None:
        entry = getattr(choice.row, choice.fill)
        assert entry.shared_memory <= shared_memory and entry.tensor_memory <= tensor_memory
    elif kernel not in lookup.UNTUNED:
        assert choice.origin == "smallest" and choice.config == Config(16, 16, 4, 1)


def test_float32_precision_is_part_of_the_lookup(monkeypatch):
    asked, key_of, before = [], lookup.key_of, torch.get_float32_matmul_precision()
    monkeypatch.setattr(lookup, "key_of", lambda *of: (asked.append("tf32" in key_of(*of)), key_of(*of))[1])
    lookup.clear_lookup_cache()
    try:
        for dtype, expected in ((torch.float32, [False, True]), (torch.bfloat16, [False])):
            asked.clear()
            for precision in ("highest", "high", "highest"):
                torch.set_float32_matmul_precision(precision)
                lookup.lookup_config("forward", dataclasses.replace(PROBLEM, dtype=dtype), H200)
            assert asked == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_warm_lookup_takes_less_than_5_microseconds():
    lookup.get_config("forward", PROBLEM, H200)
    # the minimum, because other processes share the machine
    seconds = timeit.repeat(lambda: lookup.get_config("forward", PROBLEM, H200), number=1000, repeat=20, timer=time.thread_time)
    warm = min(seconds) / 1000
    assert warm < 5e-6 * slowness(), f"{1e6 * warm:.1f} us"


@pytest.mark.parametrize("arch", ["sm_75", "gfx1100"])
def test_an_unsupported_gpu_is_rejected_by_name(arch):
    with pytest.raises(RuntimeError, match=f"GPU: expected NVIDIA from sm_80 on or AMD CDNA 3.*{arch}"):
        lookup.get_config("forward", PROBLEM, gpu.Gpu("old", arch, 1, 99 * 1024))


@pytest.mark.interpreted
def test_interpreted_kernels_use_a_fixed_config(device):
    assert gpu.gpu_of(device) is gpu.INTERPRETER and lookup.get_config("forward", PROBLEM, gpu.gpu_of(device)) == Config(64, 64)
