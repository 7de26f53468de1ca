"""What only a GPU can show: real sizes, real rounding, repeatability, memory. Skipped without one.

On a machine with a GPU: `python -m pytest -m gpu -n 0`. The cases of test_attention run compiled there as well.
"""

import pytest
import torch

from tests.helpers import score_functions
from tests.helpers.cases import Case, check, result_names, results
from tests.helpers.sequences import Sequences, starts_of
from tests.helpers.tolerance import agree
from tritonattn import Problem, attention, attention_varlen, block_mask, config, gpu, reference
from tritonattn.analysis import compile_report
from tritonattn.configs import lookup, shipped
from tritonattn.runtime import launch

pytestmark = pytest.mark.gpu

REAL = {
    "llama-8b": Case(heads=8, kv_heads=2, n_q=2048, n_k=2048, d=128, dv=128, causal=True),
    "vit": Case(batch=(4,), heads=4, kv_heads=4, n_q=257, n_k=257, d=64, dv=64),
    "cross": Case(heads=4, kv_heads=4, n_q=1000, n_k=77, d=40, dv=40),
    "sliding": Case(heads=4, kv_heads=1, n_q=3000, n_k=3000, d=128, dv=128, window=(511, 0)),
    "prefix": Case(heads=2, kv_heads=2, n_q=300, n_k=2000, d=96, dv=96, causal=True, align="bottom_right"),
    "mla": Case(heads=2, kv_heads=2, n_q=700, n_k=700, d=192, dv=128, causal=True),
    "wide": Case(heads=2, kv_heads=2, n_q=700, n_k=700, d=256, dv=256, causal=True),
    "widest": Case(heads=1, kv_heads=1, n_q=300, n_k=300, d=512, dv=512, causal=True),
    "sigmoid": Case(heads=4, kv_heads=2, n_q=2048, n_k=2048, d=64, dv=64, normalizer="sigmoid"),
    "relu": Case(heads=2, kv_heads=2, n_q=1500, n_k=1500, d=128, dv=128, causal=True, normalizer="relu"),
    "function": Case(heads=4, kv_heads=2, n_q=2048, n_k=2048, d=64, dv=64, causal=True, function="squares"),
    "odd": Case(heads=2, kv_heads=2, n_q=1001, n_k=777, d=72, dv=17, layout="offset"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", REAL)
def test_accuracy_at_real_sizes_with_shipped_configs(name, dtype, device):
    case, limit = REAL[name], gpu.gpu_of(device).largest_head(dtype)
    if case.d > limit:
        pytest.skip(f"this GPU's limit of the head size in {dtype} is {limit}, got {case.d}")
    check(case, dtype, device, tiles=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_mask_functions_give_what_their_booleans_give(dtype, device):
    q, k, v, do, _ = Case(heads=4, kv_heads=2, n_q=2000, n_k=2000, d=64, dv=64).tensors(dtype, device)
    mask = score_functions.mask_of_documents(2000, device)
    document = torch.arange(2000, device=device) // 100
    results = []
    for each in (mask, block_mask(document[:, None] == document)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = attention(*leaves, mask=each, causal=True)
        results.append((o, *torch.autograd.grad(o, leaves, do)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("fill", shipped.FILLS)
@pytest.mark.parametrize("mask", shipped.MASKS)
@pytest.mark.parametrize("width", shipped.WIDTHS)
def test_every_shipped_config_is_right(width, mask, fill, dtype, device):
    """Whatever a problem's size would choose: each row of this GPU's table, on a small one."""
    rows = next(lookup.table_sources(gpu.gpu_of(device)))[1].rows
    found = {kernel: rows.get((kernel, dtype.itemsize, width, mask)) for kernel in ("forward", "dq", "dkdv", "dbias")}
    if not any(found.values()):
        pytest.skip(f"the tables have no rows for {dtype} and {width} {mask}: wider ones serve")
    n = 256 if mask == "full" else 300
    case = Case(heads=2, kv_heads=1, n_q=n, n_k=n, d=width, dv=width, causal=mask != "full",
                window=(99, None) if mask == "window" else (None, None), pairs=("bias",) if mask == "pairs" else (),
                softcap=2.0 if mask == "softcap" else None)
    pins = {kernel: getattr(row, fill).config for kernel, row in found.items() if row is not None}
    with config.pinned(**pins):
        check(case, dtype, device, tiles=None)


@pytest.mark.parametrize("family", ["uniform", "mean-shifted", "saturated", "outliers"])
def test_accuracy_on_every_family_at_real_size(family, device):
    check(Case(heads=2, kv_heads=2, n_q=1024, n_k=1024, d=64, dv=64), torch.bfloat16, device, family=family, tiles=None)


@pytest.mark.parametrize("name", REAL)
def test_twice_the_same_bits(name, device):
    case = REAL[name]
    inputs = case.tensors(torch.bfloat16, device)
    for first, second in zip(*(results(attention, *inputs, **case.options) for _ in range(2))):
        assert torch.equal(first, second)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_fifty_times_the_same_bits_on_a_full_gpu(causal, device):
    """A race shows only where more programs run than fit on the GPU at once."""
    q, k, v = (torch.randn(4, 16, 4096, 128, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    do = torch.randn_like(q)

    def run():
        o = attention(q, k, v, causal=causal)
        return o, *torch.autograd.grad(o, (q, k, v), do)

    first = run()
    for i in range(50):
        assert all(map(torch.equal, run(), first)), f"call {i + 2} gave other bits than the first"


def test_a_tensor_of_more_than_2_to_the_31_elements(device):
    n = 2**31 // (64 * 128) + 300
    q = torch.randn(1, n, 64, 128, device=device, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(1, 64, 100, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    o = attention(q, k, v)
    last = slice(n - 50, n)
    for head in (0, 63):
        exact = reference.attention(*(x[:, head:head + 1].double() for x in (q[..., last, :], k, v)))
        torchs = reference.attention(*(x[:, head:head + 1] for x in (q[..., last, :], k, v)))
        agree("o", o[:, head:head + 1, last], torchs, exact, torch.bfloat16)


def test_a_million_keys(device):
    q, k, v = (torch.randn(1, 1, n, 64, device=device, dtype=torch.bfloat16) for n in (100, 10**6, 10**6))
    agree("o", attention(q, k, v), reference.attention(q, k, v),
          reference.attention(q.double(), k.double(), v.double()), torch.bfloat16)


def test_more_heads_than_a_grid_axis_holds(device):
    q, k, v = (torch.randn(65_600, 1, 20, 16, device=device, dtype=torch.float16) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v), reference.attention(q, k, v), atol=2e-3, rtol=2e-3)


def test_memory_is_linear_in_length(device):
    def peak(n):
        q, k, v = (torch.randn(1, 4, n, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        attention(q, k, v, causal=True).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(1024)
    assert peak(16384) < 2.2 * peak(8192)


def test_nothing_is_leaked(device):
    q, k, v = (torch.randn(1, 4, 1000, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    assert torch.cuda.memory_allocated() == before


def test_side_stream_and_cuda_graph_give_the_same_bits(device):
    q, k, v = (torch.randn(1, 4, 500, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    expected = attention(q, k, v, causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = attention(q, k, v, causal=True)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(q, k, v, causal=True)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama-8b", "sliding", "vit", "mla"])
def test_packed_sequences_at_real_sizes(name, dtype, device):
    """Lengths that no tile divides, an empty sequence, and spare rows; twice, with the same bits."""
    case = REAL[name]
    sequences = Sequences(case, dtype, device, (1000, 0, 17, case.n_q), (1000, 5, 33, case.n_k), spare=100)
    options = case.options | {"align": "bottom_right"}
    ours, again = sequences.results(**options), sequences.results(**options)
    exact, torchs = sequences.results(torch.float64, **options), sequences.results(dtype, **options)
    agree("lse", ours[1], sequences.results(torch.float32, **options)[1], exact[1], torch.float32)
    for tensor, *values, repeated in zip(result_names({}), ours, torchs, exact, again, strict=True):
        assert torch.equal(values[0], repeated), tensor
        if tensor != "lse":
            agree(tensor, *values, dtype)


def test_a_cuda_graph_reads_other_starts(device):
    q = torch.randn(300, 4, 64, device=device, dtype=torch.bfloat16)
    starts, others = (starts_of(lengths, device) for lengths in ((100, 150, 50), (0, 290, 10)))
    expected = [attention_varlen(q, q, q, x, x, causal=True) for x in (starts, others)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_varlen(q, q, q, starts, starts, causal=True)
    graph.replay()
    assert torch.equal(captured, expected[0])
    starts.copy_(others)
    graph.replay()
    assert torch.equal(captured, expected[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    q, k, v = (torch.randn(1, 2, 100, 64, device="cuda:1", dtype=torch.float16, requires_grad=True) for _ in range(3))
    with torch.cuda.device(0):
        ours = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v))
        exact = torch.autograd.grad(reference.attention(q, k, v).square().sum(), (q, k, v))
    torch.testing.assert_close(ours, exact, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_inspected_registers_equal_those_of_the_loaded_binary(kernel, device):
    problem, here = Problem((1,), 2, 2, 512, 512, 64, 64, torch.bfloat16), gpu.gpu_of(device)
    chosen = lookup.get_config(kernel, problem, here)
    report = compile_report.inspect_kernel(kernel, problem, chosen, here)
    binary = compile_report.compile_kernel(kernel, problem, chosen, here)
    binary._init_handles()
    assert report.fits and binary.n_regs == report.registers
    assert launch.example_launch(kernel, problem, chosen).config == chosen


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_tuned_config_is_correct_and_used(kernel, device, tmp_path, monkeypatch):
    """From the door to the cache, in a process of its own; the few configs of the tables."""
    from tritonattn.autotune import tune

    monkeypatch.setenv("TRITONATTN_CACHE_DIR", str(tmp_path))
    lookup.clear_lookup_cache()
    problem, lab = Problem((2,), 8, 2, 1000, 1000, 64, 64, torch.bfloat16, (None, 0)), tune.local_setup(device)
    with lab.compilers:
        record = tune.tune_kernel(kernel, problem, lab, "table")
    assert record.seconds <= record.default_seconds * 1.05 and all(error <= allowed for error, allowed in record.check.values())
    assert lookup.get_config(kernel, problem, gpu.gpu_of(device)) == record.config
    assert lookup.lookup_config(kernel, problem, gpu.gpu_of(device)).origin == "cache"
    lookup.clear_lookup_cache()


def test_oversized_config_is_a_launch_error_and_others_are_timed(device):
    from tritonattn.autotune.bench import IsolatedBench

    with IsolatedBench("forward", Problem((1,), 2, 2, 512, 512, 128, 128, torch.bfloat16), device) as bench:
        assert bench.check("128x128w8s8").code == "launch error"
        assert set(bench.check("64x64w4s2")) == {"o", "lse"}
        found = bench.times(["128x128w8s8", "64x64w4s2"], 3)
    assert found["128x128w8s8"].code == "launch error" and len(found["64x64w4s2"]) == 3
