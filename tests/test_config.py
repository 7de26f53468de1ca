"""Config: a value with rules of its own, and one place that chooses it."""

import dataclasses

import pytest
import torch

from tritonattn import Config, Problem, config, gpu

PROBLEM = Problem((2,), 8, 8, 1000, 1000, 64, 64, torch.bfloat16)
H200 = gpu.KNOWN["sm_90"]


def test_it_prints_as_it_is_read():
    assert str(Config(128, 64, 8, 3)) == "128x64w8s3" and Config.parse("128x64w8s3") == Config(128, 64, 8, 3)
    assert Config.parse("128x64w8s3e1") == Config(128, 64, 8, 3, edge_stages=1) == Config.parse(str(Config(128, 64, 8, 3, 1)))


@pytest.mark.parametrize("make, message", [
    (lambda: Config(0, 64), "block_m: expected a positive integer, got 0"),
    (lambda: Config(64, 48), "block_n: expected a power of two of at least 16, got 48"),
    (lambda: Config(64, 8), "block_n: expected a power of two of at least 16, got 8"),
    (lambda: Config(64, 64, 3), "num_warps: expected a power of two of at least 1, got 3"),
    (lambda: Config(64, 64, 4, 2, 3), "edge_stages: expected 1 or None, got 3"),
    (lambda: Config(64, 64, 4, 1.5), "num_stages: expected a positive integer, got 1.5"),
    (lambda: Config.parse("128x64"), "config: expected the form 128x64w8s3, got '128x64'"),
])
def test_misuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_innermost_pin_wins():
    outer, inner = Config(16, 16), Config(32, 32)
    with config.pinned(outer):
        with config.pinned(dq=inner):
            assert config.find("dq", PROBLEM, H200) == inner and config.find("forward", PROBLEM, H200) == outer
        assert config.find("dq", PROBLEM, H200) == outer
    assert config.find("dq", PROBLEM, H200) == config.rule("dq", PROBLEM, H200)


def test_pins_of_different_threads_may_overlap():
    one, other = config.pinned(Config(16, 16)), config.pinned(Config(32, 32))
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert config.find("forward", PROBLEM, H200) == Config(32, 32)
    other.__exit__(None, None, None)
    assert config.find("forward", PROBLEM, H200) == config.rule("forward", PROBLEM, H200)


@pytest.mark.parametrize("arguments, message", [({"backward": Config(16, 16)}, "expected kernels among .*got backward"),
                                                ({"config": "16x16w4s1"}, "expected a Config, got '16x16w4s1'")])
def test_misuse_of_pinned(arguments, message):
    with pytest.raises(TypeError, match=message), config.pinned(**arguments):
        pass


@pytest.mark.parametrize("arch", gpu.KNOWN)
@pytest.mark.parametrize("kernel", config.KERNELS)
def test_the_rule_knows_every_problem_and_asks_only_for_sizes_and_dtype(arch, kernel):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for d in (1, 64, 65, 200, 512):
            problem = dataclasses.replace(PROBLEM, d=d, dtype=dtype)
            chosen = config.rule(kernel, problem, gpu.KNOWN[arch])
            other = dataclasses.replace(problem, batch=(7, 9), heads=3, kv_heads=1, n_q=5, window=(3, 0))
            assert config.rule(kernel, other, gpu.KNOWN[arch]) == chosen


def test_a_gpu_that_is_not_known_runs_as_the_one_it_is_like():
    like = {"sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120", "gfx950": "gfx942"}
    for arch, known in like.items():
        mine = dataclasses.replace(gpu.KNOWN[known], arch=arch)
        assert config.rule("forward", PROBLEM, mine) == config.rule("forward", PROBLEM, gpu.KNOWN[known])


@pytest.mark.parametrize("arch", ["sm_75", "gfx1100"])
def test_a_gpu_that_is_not_served_is_refused_by_name(arch):
    with pytest.raises(RuntimeError, match=f"GPU: expected NVIDIA from sm_80 on or AMD CDNA 3.*{arch}"):
        config.rule("forward", PROBLEM, gpu.Gpu("old", arch, 1, 99 * 1024))


@pytest.mark.interpreted
def test_interpreted_kernels_have_a_gpu_of_their_own(device):
    assert gpu.of(device) is gpu.INTERPRETER and config.find("forward", PROBLEM, gpu.of(device)) == Config(64, 64)
