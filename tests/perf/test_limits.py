"""Least times computed by hand, peak rates against datasheets, and the published numbers."""

import csv
import dataclasses
import re

import pytest
import torch
from pytest import approx

from perf import cases, limits
from tests.helpers import kernel_reports
from tritonattn import Problem, gpu
from tritonattn.analysis import cost_model
from tritonattn.autotune.worker_pool import Failure

H200 = gpu.named("H200")
NAMES = ("A100", "RTX 3090", "A10", "RTX 4090", "L40S", "H100", "H200", "B200", "RTX 5090", "MI300X")

# TFLOP/s of dense 16-bit products summed in float32, and of float32; GB/s. L40S: half of what is quoted with sparsity
DATASHEETS = {
    "A100": (312, 19.5, 2039), "RTX 3090": (71, 35.6, 936), "A10": (125, 31.2, 600), "RTX 4090": (165.2, 82.6, 1008),
    "L40S": (366.5, 91.6, 864), "H100": (989.4, 66.9, 3350), "H200": (989.4, 66.9, 4800), "B200": (2250, 75, 7700),
    "RTX 5090": (209.5, 104.8, 1792), "MI300X": (1307.4, 163.4, 5300),
}


def problem(d=128, mask="full", n=16384, dtype=torch.bfloat16, **changed):
    """A case of the papers' grid, with some fields changed."""
    made = Problem((16384 // n,), 2048 // d, 2048 // d, n, n, d, d, dtype, cases.MASKS[mask])
    return dataclasses.replace(made, **changed)


def floor(direction="forward", device=H200, **sizes):
    return limits.floor(problem(**sizes), direction, device)


@pytest.mark.parametrize("name", NAMES)
def test_peaks_match_the_datasheet(name):
    device = gpu.named(name)
    peaks, (tensor, fp32, bandwidth) = device.peaks, DATASHEETS[name]
    assert device.sms * peaks.clock * peaks.tensor / 1e12 == approx(tensor, rel=5e-3)
    assert device.sms * (peaks.fp32_clock or peaks.clock) * 2 * peaks.fp32 / 1e12 == approx(fp32, rel=5e-3)
    assert peaks.bandwidth / 1e9 == approx(bandwidth, rel=1e-3)
    assert peaks.tensor & (peaks.tensor - 1) == 0 and peaks.exponentials == 16
    assert 1e6 < peaks.l2 < 2e8 < 2e10 < peaks.memory < 3e11


def test_each_architecture_has_one_gpu():
    assert [(arch, known.name) for arch, known in gpu.KNOWN.items()] == [
        ("sm_80", "A100"), ("sm_86", "A10"), ("sm_89", "L40S"), ("sm_90", "H200"), ("sm_100", "B200"),
        ("sm_120", "RTX 5090"), ("gfx942", "MI300X")]
    assert all(known.arch == arch and known.peaks for arch, known in gpu.KNOWN.items())


@pytest.mark.parametrize("name, known", [
    ("h200", "H200"), ("rtx5090", "RTX 5090"), ("Rtx-4090", "RTX 4090"), ("NVIDIA H200", "H200"),
    ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GeForce RTX 3090", "RTX 3090"),
    ("NVIDIA A10", "A10"), ("AMD Instinct MI300X", "MI300X"), ("AMD Instinct MI300X VF", "MI300X"),
])
def test_known_gpu_by_name(name, known):
    assert gpu.named(name).name == known


@pytest.mark.parametrize("name", [
    "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA A10G", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA L40",
    "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe", "NVIDIA H100 NVL",
    "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA H200 MIG 1g.18gb", "NVIDIA GB200", "NVIDIA B300 SXM6 AC",
    "AMD Instinct MI300A", "AMD Instinct MI325X", "", "NVIDIA",
])
def test_similar_names_are_not_known(name):
    assert gpu.find_gpu(name) is None
    with pytest.raises(ValueError) as error:
        gpu.named(name)
    assert repr(name) in str(error.value) and all(known in str(error.value) for known in NAMES)


def test_device_has_the_peaks_of_its_model():
    live = gpu.Gpu("NVIDIA A100-SXM4-80GB", "sm_80", 108, 166912)
    assert live.peaks == gpu.named("a100").peaks != gpu.named("h100").peaks
    assert dataclasses.replace(live, sms=14).peaks is None
    assert dataclasses.replace(live, arch="sm_90").peaks is None
    assert dataclasses.replace(live, name="NVIDIA A100-PCIE-40GB").peaks is None


def test_interpreter_has_no_peaks():
    assert gpu.INTERPRETER.peaks is None
    with pytest.raises(ValueError, match="interpreter"):
        floor(device=gpu.INTERPRETER)


def test_tensor_cores_bind_wide_heads():
    wide = floor(d=128)
    assert wide.flops == 4 * 16 * 16384**2 * 128
    assert wide.bound == "tensor" and wide.seconds == wide.tensor == max(wide.units.values())
    assert wide.tflops == approx(989, rel=5e-3)
    assert wide.special == approx(wide.tensor / 2)


def test_exponentials_bind_narrow_heads():
    assert floor(d=64).special == approx(floor(d=64).tensor, rel=0.02)
    assert floor(d=32).bound == "special" and floor(d=32).tflops == approx(989 / 2, rel=5e-3)
    # per clock: 16 exponentials, and 4096 flop on an H200 or 8192 on a B200
    assert floor(d=128, device=gpu.named("b200")).special == approx(floor(d=128, device=gpu.named("b200")).tensor)


@pytest.mark.parametrize("d, tflops", [(64, 495), (96, 594), (128, 660), (192, 742), (256, 792)])
def test_products_and_exponentials_in_turn(d, tflops):
    bound = floor(d=d, heads=1, kv_heads=1)
    assert bound.serial == approx(bound.tensor + bound.special) and bound.serial_tflops == approx(tflops, rel=0.01)


@pytest.mark.parametrize("d, special, fp32", [(64, 0.4, 0.2), (128, 0.2, 0.1), (256, 0.1, 0.05)])
def test_backward_relative_to_the_tensor_core_time(d, special, fp32):
    bound = floor("backward", d=d)
    assert bound.flops == 2.5 * floor(d=d).flops and bound.tflops == approx(989, rel=5e-3)
    assert (bound.special / bound.tensor, bound.fp32 / bound.tensor) == (approx(special), approx(fp32))
    assert bound.special == floor(d=d).special


def test_units_by_hand():
    tiny = limits.floor(Problem((1,), 1, 1, 2, 3, 64, 64, torch.float16), "forward", gpu.named("a100"))
    cycles = 108 * 1.41e9
    assert tiny.flops == 4 * 6 * 64
    assert tiny.tensor == approx(4 * 6 * 64 / 2048 / cycles) and tiny.special == approx(6 / 16 / cycles)
    assert tiny.fp32 == approx(3.5 * 6 / 64 / cycles) and tiny.memory == approx((2 * (2 + 3 + 3 + 2) * 64 + 4 * 2) / 2.039e12)
    assert tiny.bound == "memory" and tiny.serial == tiny.seconds == tiny.memory


def test_other_normalizers_need_other_instructions():
    softmax, sigmoid, relu = (floor(d=64, normalizer=name) for name in ("softmax", "sigmoid", "relu"))
    assert sigmoid.special == softmax.special > relu.special == 0 and sigmoid.fp32 == softmax.fp32
    assert relu.fp32 / softmax.fp32 == approx(2.5 / 3.5), "two instead of three, and half a conversion"
    assert floor(d=64, normalizer="relu", softcap=True).special == softmax.special


def test_float32_does_not_use_tensor_cores():
    """IEEE products run on the fp32 lanes, two flop per instruction, at the fp32 clock, without conversions."""
    single = floor(d=64, dtype=torch.float32)
    assert single.tensor == 0 and single.bound == "fp32"
    assert single.fp32 * 132 * 1.98e9 * 128 == approx((2 * 64 + 3) * single.flops / (4 * 64))
    assert single.tflops == approx(66.9 * 128 / 131, rel=1e-3)
    assert single.serial == approx(single.fp32 + single.special)
    assert single.memory == approx(2 * floor(d=64).memory, rel=0.02)
    with pytest.raises(ValueError, match="float64"):
        floor(dtype=torch.float64)


def test_decode_is_bound_by_memory():
    decode = floor(n_q=1, heads=32, kv_heads=4, batch=(16,), n_k=8192)
    assert decode.bound == "memory" and decode.serial == decode.seconds
    # 16 x 4 x 8192 x 128 keys and as many values, in two bytes
    assert decode.seconds == approx(2 * 16 * 4 * 8192 * 128 * 2 / 4.8e12, rel=0.01)
    assert decode.tflops < 50


@pytest.mark.parametrize("direction", limits.DIRECTIONS)
def test_causal_mask_halves_all_but_memory(direction):
    full, causal = floor(direction), floor(direction, mask="causal")
    for unit in ("tensor", "special", "fp32"):
        assert full.units[unit] / causal.units[unit] == approx(2, rel=1e-3) and full.units[unit] > causal.units[unit]
    assert full.memory == causal.memory and full.tflops == approx(causal.tflops)


def test_window_costs_its_unmasked_pairs():
    causal, window = floor(mask="causal"), floor(mask="causal", window=(1023, 0))
    # 1024 keys per query, fewer at the start; causal has 8192.5 on average
    assert window.tensor / causal.tensor == approx((1024 - 1024 * 1023 / 2 / 16384) / 8192.5, rel=1e-6)
    assert window.memory == causal.memory


def test_empty_batch_takes_no_time():
    nothing = floor(batch=(0,))
    assert nothing.seconds == nothing.tflops == nothing.serial_tflops == 0


def test_published_numbers_are_well_formed():
    with limits.PUBLISHED.open(newline="") as file:
        assert tuple(next(csv.reader(file))) == limits.Published._fields
    rows = limits.published()
    assert len(rows) > 500
    for row in rows:
        peaks, sms = gpu.named(row.gpu).peaks, gpu.named(row.gpu).sms
        assert gpu.named(row.gpu).name == row.gpu and row.implementation
        assert row.source and "/work" not in row.source and row.source == row.source.strip()
        assert row.evidence in ("published", "computed", "transcribed") and row.dtype in ("fp16", "bf16", "16-bit")
        assert row.direction in ("forward", "backward", "both") and row.mask in ("full", "causal", "window")
        assert (row.mask == "window") == row.window.isdigit() and (row.window == "") == (row.mask != "window")
        assert min(row.d, row.dv, row.kv_heads, row.batch, row.n, row.n_k) > 0 and row.heads % row.kv_heads == 0
        usual = row.mask != "window"
        assert (100 if usual else 9) < row.tflops < sms * peaks.clock * peaks.tensor / 1e12, row


def test_published_rows_are_unique():
    seen = [row._replace(tflops=0, evidence="") for row in limits.published()]
    assert len(seen) == len(set(seen))


def test_published_numbers_cover_the_paper_grid():
    """Forward at three head sizes with both masks, backward at two without one; each at six lengths."""
    grid = [row for row in limits.published() if row.implementation == "FA3" and row.dtype == "fp16"]
    assert all((row.batch * row.n, row.heads * row.d) == (16384, 2048) for row in grid)
    cells = {(row.direction, row.d, row.mask, row.n) for row in grid}
    masks = [("forward", d, mask) for d in (64, 128, 256) for mask in ("full", "causal")]
    masks += [("backward", d, "full") for d in (64, 128)]
    assert cells == {(*cell, n) for cell in masks for n in (512, 1024, 2048, 4096, 8192, 16384)}


def best(direction="forward", gpu_name="H100", **sizes):
    return limits.best_published(problem(**sizes), direction, gpu_name)


def test_best_published():
    row = best(d=128, n=16384)
    assert (row.implementation, row.tflops, row.gpu) == ("FA3", 648, "H100") and str(row) == "648 FA3 on H100"
    assert best(d=128, n=512).implementation == "cuDNN 9" and best(d=64, mask="causal", n=1024).tflops == 291
    assert str(best("backward", n=16384)) == "561 FA3 on H100, transcribed"
    assert best("both", d=64, n=512).tflops == 215


def test_best_published_needs_the_same_problem():
    assert best(n=16384, dtype=torch.float16) == best(n=16384, dtype=torch.bfloat16) != best(n=8192)
    assert best(n=1024, batch=(2, 8)) == best(n=1024)  # only the product of batch sizes matters
    for changed in ({"dtype": torch.float32}, {"batch": (2,)}, {"heads": 32, "kv_heads": 32}, {"kv_heads": 4}, {"dv": 64},
                    {"n_k": 8192}, {"window": (128, 0)}, {"n": 4097}, {"shift": 1}):
        assert best(**changed) is None, changed
    assert best("backward", mask="causal") is None


@pytest.mark.parametrize("name, direction, published", [
    ("llama-3.1 full 8k", "forward", "756 FA4 on H200"), ("gpt-oss window 16k", "forward", "135 cuDNN 9.27 on H200"),
    ("gpt-oss window 2k", "backward", "108 FA4 on H200"), ("deepseek-v3 full 4k", "backward", "515 FA4 on H200"),
    ("deepseek-v4 window 2k", "forward", "57 cuDNN 9.27 on H200"), ("qwen-3.5 causal 8k", "backward", "393 cuDNN 9.27 on H200"),
    ("video transformer 985 on 62208", "forward", "440 FA4 on H200"),
])
def test_published_rates_of_windows_groups_and_wide_heads(name, direction, published):
    found = {case.name: case for case in cases.SUITES["cudnn"]}[name].problem
    assert str(limits.best_published(found, direction, "H200")) == published
    assert limits.best_published(found, direction, "A100") is None
    if found.mask == "window":
        for window in ((found.window[0] + 1, 0), (found.window[0], 1)):
            assert limits.best_published(dataclasses.replace(found, window=window), direction, "H200") is None


def test_every_case_of_cudnns_benchmark_has_a_published_rate():
    missing = [case.name for case in cases.SUITES["cudnn"] for direction in case.directions
               if limits.best_published(case.problem, direction, "H200") is None]
    # cuDNN has no backward pass for heads of 512
    assert missing == [f"deepseek-v4 window {n}k" for n in (2, 4, 8, 16)]


def test_h200_includes_h100_numbers():
    assert best(gpu_name="NVIDIA H200") == best(gpu_name="h100") and best(gpu_name="H200").gpu == "H100"
    on_both = {"d": 64, "n": 32768, "batch": (1,), "heads": 8, "kv_heads": 8}
    alike = [row for row in limits.published() if (row.n, row.d, row.heads) == (32768, 64, 8)]
    assert {row.gpu: row.tflops for row in alike} == {"H100": 514, "H200": 487}
    assert best(gpu_name="H200", **on_both) == best(gpu_name="H100", **on_both)
    long = {"mask": "causal", "n": 86000, "batch": (1,), "heads": 32, "kv_heads": 32}
    assert str(best(gpu_name="H200", **long)) == "682 FA4 on H200, computed" and best(gpu_name="H100", **long) is None
    assert best(gpu_name="A100") is None and best(gpu_name="some other GPU") is None


@pytest.fixture
def suite(monkeypatch):
    """Two cases, one of them with the directions forward and both."""
    made = (cases.Case("square", problem(n=1024), ("forward", "backward")),
            cases.Case("one query", problem(n=1024, n_q=1), ("forward", "both")))
    monkeypatch.setattr(cases, "SUITES", {"paper": made})


def test_table(suite, capsys):
    assert limits.main(["--gpu", "h200", "--suite", "paper"]) == 0
    title, _, _, heads, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("H200, paper") and heads.split() == list(limits.HEADS)
    assert [line.split() for line in rows] == [
        ["square", "forward", "139", "69.5", "30.4", "56.1", "tensor", "989", "660", *"574 cuDNN 9 on H100".split()],
        ["square", "backward", "347", "69.5", "34.7", "112", "tensor", "989", "825", *"424 FA3 on H100, transcribed".split()],
        ["one", "query", "forward", "0.136", "0.0678", "0.0297", "28", "memory", "4.8", "4.8"],
    ]


class FakeWorkers:
    """Compilers that return `result`, or a made-up report of each job."""

    result = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def map(self, jobs):
        assert len(jobs) == len(set(jobs)), "nothing is compiled twice"
        for kernel, problem, config, device in jobs:
            if self.result is not None:
                yield self.result
            else:
                made = kernel_reports.report(device, config, (kernel_reports.LOOP,), problem=problem)
                yield dataclasses.replace(made, kernel=kernel)


def test_rates_by_the_model_are_ranges_below_the_ceiling(suite, monkeypatch, capsys):
    monkeypatch.setattr(limits, "Workers", FakeWorkers)
    assert limits.main(["--gpu", "h200", "--suite", "paper", "--model"]) == 0
    title, _, _, heads, *rows = capsys.readouterr().out.splitlines()
    assert "inferred" in title and heads.split() == list(limits.MODEL_HEADS) and len(rows) == 3
    forward, backward, query = limits.model_lines("paper", H200)
    on, large = forward.line.case.problem, kernel_reports.report(H200, forward.configs[0], (kernel_reports.LOOP,))
    low, high = cost_model.estimate(dataclasses.replace(large, problem=on)).likely
    peak = H200.sms * H200.peaks.tensor * H200.peaks.clock / 1e12
    assert (forward.least, forward.most) == (approx(low * peak), approx(high * peak)) and high > low
    assert len(backward.configs) == len(backward.bounds) == 2 and backward.least < backward.most
    assert f"{forward.least:.0f}-{forward.most:.0f}" in rows[0] and query.most < query.line.floor.tflops
    # the model leaves out the bandwidth of memory
    slow = query.line._replace(floor=dataclasses.replace(query.line.floor, memory=1.0))
    capped = limits.expected(slow, [dataclasses.replace(large, problem=query.line.case.problem)], H200)
    assert capped.least == capped.most == slow.floor.tflops and f"model {capped.most:.3g}" in capped.cells()


def test_kernels_of_a_pass_add_up():
    """With two equal kernels the backward pass takes twice as long as one, and the time of delta."""
    line = limits.Line(cases.Case("square", problem(), ("backward",)), "backward", floor("backward"), None)
    config = kernel_reports.SQUARE
    reports = [dataclasses.replace(kernel_reports.report(H200, config, (kernel_reports.LOOP,)), kernel="dq")] * 2
    found = limits.expected(line, reports, H200)
    cycles = cost_model.estimate(dataclasses.replace(reports[0], problem=problem())).cycles
    delta = 3 * 16 * 16384 * 128 * 2 / 4.8e12
    assert found.most == approx(line.floor.flops / (2 * cycles / 1.83e9 / 0.8 + delta) / 1e12)
    with pytest.raises(ValueError, match=r"square: expected kernels with a loop"):
        limits.expected(line, [dataclasses.replace(reports[0], loops=())] * 2, H200)


def test_a_kernel_that_does_not_compile_is_named(suite, monkeypatch, capsys):
    monkeypatch.setattr(limits, "Workers", FakeWorkers)
    monkeypatch.setattr(FakeWorkers, "result", Failure("compile error", "refused"))
    with pytest.raises(SystemExit):
        limits.main(["--gpu", "h200", "--suite", "paper", "--model"])
    assert re.search(r"forward 128x64w8s\S*: refused", capsys.readouterr().err)


def test_lengths_of_whole_tiles_share_a_binary():
    jobs = {limits.job_of("forward", problem(n=n, mask=mask), H200)[1] for n in (512, 16384) for mask in ("full", "causal")}
    assert len(jobs) == 2 and {job.n_q for job in jobs} == {4096}
    partial = problem(n=1000)
    assert limits.job_of("forward", partial, H200)[1] == partial


@pytest.mark.parametrize("arguments, named", [
    (["--gpu", "h300", "--suite", "paper"], ["--gpu", "'h300'", *NAMES]),
    (["--gpu", "h200", "--suite", "papers"], ["--suite", "'papers'", *cases.SUITES]),
    (["--suite", "paper"], ["--gpu"]),
    (["--gpu", "h200"], ["--suite"]),
])
def test_wrong_arguments_are_named_in_the_error(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        limits.main(arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and all(name in error for name in named), error


@pytest.mark.parametrize("name", cases.SUITES)
def test_every_suite_has_limits(name, capsys):
    assert limits.main(["--gpu", "mi300x", "--suite", name]) == 0
    wanted = sum(direction in case.directions for case in cases.SUITES[name] for direction in limits.DIRECTIONS)
    assert len(capsys.readouterr().out.splitlines()) == wanted + 4
