"""Static pruning: every reason is found where it was planted, and the ranking is reproducible."""

import dataclasses
import itertools

import pytest
import torch

from tests.helpers.compile_server import compiled
from tritonattn import Config, Problem, gpu
from tritonattn.analysis.compile_report import KernelReport
from tritonattn.analysis.sass import Loop
from tritonattn.autotune import prune

H200, MI300X = gpu.KNOWN["sm_90"], gpu.KNOWN["gfx942"]
PROBLEM = Problem((2,), 8, 8, 4096, 4096, 128, 128, torch.bfloat16)
EXACT = dataclasses.replace(PROBLEM, dtype=torch.float32)
LOOP = Loop(("HGMMA.64x128x16",) * 16 + ("MUFU.EX2",) * 64 + ("WARPGROUP.DEPBAR",))
GOOD = KernelReport("forward", PROBLEM, H200, Config(128, 128, 8, 2), 240, 0, 160 << 10, 0, loops=(LOOP,))


SUMMED = Loop(LOOP.instructions + ("HMMA.16816",) * 8)  # the sum of 128 weights of 16 rows, by each of eight warps


def test_sums_by_tensor_cores_are_not_a_wrong_path():
    summing = dataclasses.replace(GOOD, config=Config(128, 128, 8, 2, mma_sum=True), loops=(SUMMED,))
    assert prune.check_report(summing).reason is None and summing.duplicated == 1.0
    assert prune.check_report(dataclasses.replace(GOOD, loops=(SUMMED,))).reason == "wrong tensor path"
    of_hmma = Loop(("HMMA.16816",) * (1024 + 8) + ("MUFU.EX2",) * 64)
    assert prune.check_report(dataclasses.replace(summing, loops=(of_hmma,))).reason == "wrong tensor path"


def with_loop(*instructions):
    return {"loops": (Loop(instructions),)}


@pytest.mark.parametrize("change, reason", [
    ({}, None), ({"shared_memory": 228 << 10}, "shared memory"), ({"tensor_memory": 1}, "tensor memory"),
    ({"race": "R152 of the product at 0140 is written at 0148"}, "race"),
    ({"registers": 32, "stack": 5000}, "register collapse"), ({"loops": ()}, "unclear"),
    (with_loop(*("HGMMA.64x128x16",) * 8, *("MUFU.EX2",) * 64), "unclear"),
    (with_loop(*LOOP.instructions, "STL"), "spill"),
    (with_loop(*("HMMA.16816",) * 128, *("MUFU.EX2",) * 64), "wrong tensor path"),
    (with_loop(*LOOP.instructions, "HMMA.16816"), "wrong tensor path"),
    (with_loop(*("HMMA.16816",) * 128, *("MUFU.EX2",) * 64, "STL"), "wrong tensor path"),
    (with_loop(*("HGMMA.64x128x16",) * 24, *("MUFU.EX2",) * 64, "STL"), "duplicate work"),
    (with_loop(*("HGMMA.64x128x16", "WARPGROUP.DEPBAR") * 16, *("MUFU.EX2",) * 64, "STL"), "serialized"),
    (with_loop(*("HGMMA.64x128x16",) * 24, *("MUFU.EX2",) * 64), "duplicate work"),
    (with_loop(*("HGMMA.64x128x16",) * 16, *("MUFU.EX2",) * 128), "duplicate work"),
    (with_loop(*("HGMMA.64x128x16", "WARPGROUP.DEPBAR") * 16, *("MUFU.EX2",) * 64), "serialized"),
], ids=str)
def test_each_reason(change, reason):
    verdict = prune.check_report(dataclasses.replace(GOOD, **change))
    assert verdict.reason == reason and (reason is None or reason in prune.REASONS)
    assert (verdict.estimate is None) == (reason in ("shared memory", "tensor memory") or not change.get("loops", True))


@pytest.mark.parametrize("kernel, text, problem, reason", [
    ("forward", "32x32w8s2", PROBLEM, "constraint"), ("forward", "128x128w4s2", PROBLEM, "prefilter"),
    ("dkdv", "128x16w4s2", PROBLEM, "constraint"), ("dkdv", "64x128w4s2", PROBLEM, "prefilter"),
    ("dkdv", "64x128w8s2", PROBLEM, None), ("dq", "128x64w8s2", PROBLEM, None),
    ("forward", "256x32w8s2", dataclasses.replace(PROBLEM, masked=True, mapped=True), "constraint"),
    ("forward", "128x128w8s2", PROBLEM, None), ("dkdv", "32x64w4s2", PROBLEM, None),
    # without tensor cores warps also split the columns
    ("forward", "32x32w8s1", EXACT, None), ("forward", "16x32w4s1", EXACT, None), ("forward", "16x16w8s1", EXACT, "constraint"),
])
def test_configs_excluded_before_compiling(kernel, text, problem, reason):
    verdict = prune.check_config(kernel, problem, Config.parse(text), H200)
    assert (verdict and verdict.reason) == reason


@pytest.mark.parametrize("loop", [LOOP.instructions, ("HMMA.16816",) * 128 + ("MUFU.EX2",) * 64,
                                  ("HGMMA.64x128x16",) * 24 + ("MUFU.EX2",) * 64,
                                  ("HGMMA.64x128x16", "WARPGROUP.DEPBAR") * 16 + ("MUFU.EX2",) * 64],
                         ids=["good", "wrong path", "duplicate", "serialized"])
def test_more_spills_never_improve_the_rank(loop):
    def expected(spills):
        verdict = prune.check_report(dataclasses.replace(GOOD, **with_loop(*loop, *("STL",) * spills)))
        assert ("spills" in verdict.note) == (spills > 0 and verdict.reason != "spill")
        return verdict.estimate.cycles * prune.time_penalty(verdict.reason, spills)

    found = [expected(spills) for spills in (0, 1, 2, 8, 64, 512)]
    assert found == sorted(found) and found[0] < found[-1]


def test_the_ranking_is_by_time_memory_and_name_with_excluded_configs_last():
    fast = prune.check_report(GOOD)
    slow = prune.check_report(dataclasses.replace(GOOD, **with_loop(*LOOP.instructions, *("FFMA",) * 4000)))
    larger = prune.check_report(dataclasses.replace(GOOD, shared_memory=161 << 10))
    spilling = prune.check_report(dataclasses.replace(GOOD, **with_loop(*LOOP.instructions, "STL")))
    out = prune.Verdict(Config(16, 16), "compile error", "it said so")
    # the model gives it the time of the fastest one, but spills are penalized
    twice = prune.check_report(dataclasses.replace(GOOD, **with_loop(*LOOP.instructions, *("STL",) * 2)))
    collapsed = prune.check_report(dataclasses.replace(GOOD, registers=32, stack=5000))
    assert twice.estimate.cycles == spilling.estimate.cycles and collapsed.estimate.cycles <= spilling.estimate.cycles
    assert prune.ranked([out, collapsed, twice, spilling, slow, larger, fast]) == [
        fast, larger, slow, spilling, twice, collapsed, out]


def test_the_candidates_are_distinct_and_only_hopper_has_edge_stages():
    for kernel in ("forward", "dq", "dkdv", "dbias"):
        for arch in gpu.KNOWN:
            found = prune.candidates(kernel, PROBLEM, gpu.KNOWN[arch])
            assert len(found) == len(set(found)) > 60
            assert {each.edge_stages for each in found if each.num_stages > 1} == ({1} if arch == "sm_90" else {None})
            nvidia = arch != "gfx942"
            assert {each.mma_sum for each in found} == {kernel == "forward" and nvidia}
            assert {each.ahead for each in found} == ({False, True} if kernel in ("forward", "dkdv") and nvidia else {False})
            exact = prune.candidates(kernel, EXACT, gpu.KNOWN[arch])
            assert not any(each.mma_sum or each.ahead for each in exact)
            assert not any(each.two_passes for each in (*found, *exact)), "heads of 128 have room for both accumulators"


def test_two_passes_are_tried_for_wide_heads_and_need_fewer_registers():
    wide, both = dataclasses.replace(PROBLEM, d=192, dv=128), Config(64, 128, 8, 2)
    for kernel, arch in itertools.product(("forward", "dq", "dkdv"), ("sm_80", "sm_90", "gfx942")):
        found = [each for each in prune.candidates(kernel, wide, gpu.KNOWN[arch]) if each.two_passes]
        assert bool(found) == (kernel == "dkdv") and all(each.block_n >= 64 for each in found)
    assert prune.check_config("dkdv", wide, both, H200).reason == "prefilter"
    assert prune.check_config("dkdv", wide, dataclasses.replace(both, two_passes=True), H200) is None


PLANTED = """
import json, torch
from tritonattn import Config, Problem, config, gpu
from tritonattn.autotune import prune
from tritonattn.autotune.worker_pool import Workers
found = []
with Workers(2) as workers:
    for kernel, window, arch, text in {planted}:
        problem = Problem((2,), 8, 8, 4096, 4096, 128, 128, torch.bfloat16, window)
        config, on = Config.parse(text), gpu.KNOWN[arch]
        verdict = prune.check_report(*workers.map([(kernel, problem, config, on)]))
        found.append([verdict.reason, verdict.note])
print(json.dumps(found))
"""
FULL, CAUSAL = (None, None), (None, 0)


def test_planted_faults_are_caught_in_real_binaries():
    planted = {
        ("forward", FULL, "sm_90", "128x128w8s2e1"): None,
        ("forward", FULL, "sm_90", "128x64w4s3e1"): "spill",
        ("forward", FULL, "sm_90", "128x128w8s4e1"): "shared memory",
        ("forward", CAUSAL, "sm_90", "64x64w4s2"): "serialized",
        ("forward", FULL, "sm_90", "64x64w8s2e1"): "duplicate work",
        ("forward", FULL, "sm_90", "32x64w4s2e1"): "wrong tensor path",
        ("forward", FULL, "gfx942", "128x64w8s2"): "duplicate work",
    }
    for (cell, reason), (found, note) in zip(planted.items(), compiled(PLANTED.format(planted=list(planted)))):
        assert found == reason, (cell, found, note)







