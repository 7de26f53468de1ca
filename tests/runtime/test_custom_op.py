"""The torch ops: schema, fake shapes, compile, export, transforms, memory, devices."""

import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.cases import LAYOUT
from tests.helpers.memory import noted
from tests.helpers.tiers import slow, slow_rows
from tritonattn import attention, block_mask, reference, scaled_dot_product_attention
from tritonattn.problem import Problem
from tritonattn.runtime import custom_op, launch, plan


def qkv(device, *, heads=2, kv_heads=2, n_q=20, n_k=20, d=16, dv=16, dtype=torch.float32, grad=False, layout="contiguous"):
    shapes = (1, heads, n_q, d), (1, kv_heads, n_k, d), (1, kv_heads, n_k, dv)
    return [LAYOUT[layout](torch.randn(shape, device=device).to(dtype)).requires_grad_(grad) for shape in shapes]


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("form, given", [
    ({}, "bias sink alibi relative mask seed lengths"), ({}, "mask map"),
    *slow_rows(({}, ""), ({"layout": "transposed"}, "mask seed"), ({"kv_heads": 1, "dv": 8}, "bias")),
], ids=str)
def test_opcheck(form, given, grad, device):
    q, k, v = qkv(device, grad=grad, dtype=torch.float16, **form)
    known = {"bias": torch.randn(1, 2, 1, 20, device=device, requires_grad=grad),
             "sink": torch.randn(1, 2, 1, 1, device=device, requires_grad=grad),
             "alibi": torch.rand(1, 2, 1, 1, device=device, requires_grad=grad),
             "relative": torch.randn(1, 2, 1, 9, device=device, requires_grad=grad),
             "mask": torch.rand(1, 1, 20, 20, device=device) > 0.3, "kv_blocks": None, "q_blocks": None,
             "q_starts": None, "k_starts": None, "payload": None, "mask_payload": None,
             "seed": torch.tensor([3], device=device),
             "lengths": torch.tensor([15], dtype=torch.int32, device=device)}
    if "map" in given:
        known |= {name: getattr(block_mask(known["mask"]), name) for name in ("kv_blocks", "q_blocks")}
    extras = [x if name in given or "blocks" in name else None for name, x in known.items()]
    options = 0.25, None, 0, True, 0.5 * ("seed" in given), 20.0 if "sink" in given else None, None, None, *[False] * 3
    options += "softmax", None, None, None
    torch.library.opcheck(custom_op.forward_op, (q, k, v, *extras, *options, True))
    with torch.no_grad():
        tensors = [x if x is None else x.detach() for x in (q, k, v, *extras)]
        o, lse, *left, _, _, _ = custom_op.forward_op(*tensors, *options, True)
    wanted = [True, False, True, *(name in given for name in ("bias", "sink", "alibi", "relative"))]
    cotangents = torch.randn_like(o), torch.randn_like(lse)
    torch.library.opcheck(custom_op.backward_op, (*cotangents, o, *left, *tensors, *options, wanted))


def test_schemas_follow_the_fields_of_attention_inputs():
    names = [argument.name for argument in custom_op.forward_op._schema.arguments]
    assert names == [*launch.AttentionInputs._fields, "keep_residual"]
    names = [argument.name for argument in custom_op.backward_op._schema.arguments]
    assert names[5:] == [*launch.AttentionInputs._fields, "wanted", "d_entropy", "d_mass", "saved_entropy"]
    kinds = [str(argument.type) for argument in custom_op.forward_op._schema.arguments]
    n = custom_op.N_TENSORS
    assert all("Tensor" in kind for kind in kinds[:n]) and not any("Tensor" in kind for kind in kinds[n:])


@pytest.mark.parametrize("layout", LAYOUT)
def test_results_have_the_layout_of_their_inputs(layout, device):
    q, k, v = qkv(device, layout=layout, dv=8, grad=True)
    o = attention(q, k, v)
    order = sorted(range(3), key=lambda i: -q.stride(i)) if layout != "expanded" else range(3)
    assert [o.stride(i) for i in order] == sorted((o.stride(i) for i in range(3)), reverse=True) and o.stride(-1) == 1
    if layout == "transposed":
        assert o.transpose(1, 2).is_contiguous()
        dq, = torch.autograd.grad(o.sum(), q)
        assert dq.stride() == q.stride()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_in_one_graph(backend, device):
    torch._dynamo.reset()

    def step(q, k, v):
        o, lse = attention(q * 2, k, v, causal=True, return_lse=True)
        return o.sin().sum() + lse.sum()

    inputs = qkv(device, grad=True, layout="transposed")
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(step(*inputs), inputs))


@pytest.mark.parametrize("mapped", [False, *slow(True)], ids=["grad", "vmap of grad"])
def test_compiled_functional_gradients(mapped, device):
    torch._dynamo.reset()
    gradients = torch.func.grad(lambda q, k, v: attention(q, k, v, causal=True).square().sum(), argnums=(0, 1, 2))
    inputs = qkv(device)
    if mapped:
        gradients, inputs = torch.vmap(gradients), [torch.stack([x, 2 * x]) for x in inputs]
    compiled = torch.compile(gradients, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), gradients(*inputs))


def test_dynamic_shapes_in_one_graph(device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True), backend=count, fullgraph=True, dynamic=True)
    for n in (10, 14, 33):
        q, k, v = qkv(device, n_q=n, n_k=n)
        torch.testing.assert_close(compiled(q, k, v), reference.attention(q, k, v, causal=True))
    assert len(graphs) == 1


def test_export(device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = qkv(device)
    length = torch.export.Dim("length", min=2, max=64)
    dynamic = tuple({2: length} for _ in inputs)
    program = torch.export.export(Module(), tuple(inputs), dynamic_shapes=(*dynamic,), strict=False)
    assert any("tritonattn" in str(node.target) for node in program.graph.nodes)
    inputs = qkv(device, n_q=11, n_k=11)
    torch.testing.assert_close(program.module()(*inputs), reference.attention(*inputs, causal=True))


class DataDependent(torch.nn.Module):
    """Attention with a mask, over as many batches or keys as `keep` has."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x, mask, keep):
        index = keep.nonzero().squeeze(1)
        if self.axis == "batch":
            return scaled_dot_product_attention(x[index], x[index], x[index], mask[index])
        if self.axis == "batch of one mask":
            return attention(x[index], x[index], x[index], mask=mask[:1])
        return attention(x, x[:, :, index], x[:, :, index], mask=mask[..., index])


@pytest.mark.parametrize("axis", ["batch", "batch of one mask", "length"])
def test_export_with_a_data_dependent_mask(axis, device):
    x, mask = torch.randn(4, 2, 4, 16, device=device), torch.rand(4, 1, 4, 4, device=device) > 0.3
    first, second = (torch.tensor(keep, device=device) for keep in ([1, 0, 1, 1], [0, 1, 0, 1]))
    module = DataDependent(axis)
    program = torch.export.export(module, (x, mask, first), strict=False).module()
    torch.testing.assert_close(program(x, mask, second), module(x, mask, second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    q, k, v = qkv(device, grad=True)
    with torch.autocast(device.type, dtype=dtype):
        o = scaled_dot_product_attention(q, k.to(dtype), v)
    assert o.dtype == dtype
    o.float().sum().backward()
    assert q.grad.dtype == torch.float32
    torch.testing.assert_close(o.float(), reference.attention(q, k, v), atol=2e-2, rtol=2e-2)


@pytest.mark.interpreted
def test_autocast_leaves_float64_alone(device):
    q, k, v = qkv(device, dtype=torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert attention(q, k, v).dtype == torch.float64


def test_vmap_forward_and_over_backward(device):
    q, k, v = (torch.randn(3, 2, 10, 8, device=device) for _ in range(3))
    shared = k[0]
    mapped = torch.vmap(lambda q, v: attention(q, shared, v, causal=True))(q, v)
    expected = torch.stack([reference.attention(q[i], shared, v[i], causal=True) for i in range(3)])
    torch.testing.assert_close(mapped, expected)

    def loss(function, q, k, v):
        return function(q, k, v, causal=True).square().sum()

    per_sample = torch.vmap(torch.func.grad(lambda q, k, v: loss(attention, q, k, v), argnums=(0, 1, 2)))(q, k, v)
    exact = torch.vmap(torch.func.grad(lambda q, k, v: loss(reference.attention, q, k, v), argnums=(0, 1, 2)))(q, k, v)
    torch.testing.assert_close(per_sample, exact, atol=1e-4, rtol=1e-4)


def test_vmap_along_another_dimension(device):
    q, k, v = (torch.randn(2, 10, 8, 3, device=device) for _ in range(3))
    mapped = torch.vmap(attention, in_dims=3, out_dims=3)(q, k, v)
    for i in range(3):
        torch.testing.assert_close(mapped[..., i], reference.attention(q[..., i], k[..., i], v[..., i]))


def test_batched_gradients(device):
    q, k, v = qkv(device, n_q=6, n_k=6, d=8, dv=8, grad=True)
    o = attention(q, k, v)
    cotangents = torch.randn(3, *o.shape, device=device)
    batched = torch.autograd.grad(o, (q, k, v), cotangents, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        single = torch.autograd.grad(o, (q, k, v), cotangents[i], retain_graph=True)
        torch.testing.assert_close([x[i] for x in batched], list(single))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, device):
    inputs = qkv(device, grad=True)

    def step(q, k, v):
        return attention(q * 2, k, v, causal=True)

    plain = torch.autograd.grad(step(*inputs).sum(), inputs)
    o = checkpoint(step, *inputs, use_reentrant=reentrant)
    o.sum().backward()
    for x, expected in zip(inputs, plain):
        assert torch.equal(x.grad, expected)


def test_flops_match_torchs_count_of_its_own_attention(device):
    q, k, v = qkv(device, heads=4, n_q=10, n_k=12, d=16, dv=8, kv_heads=2, grad=True)
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v).sum().backward()
    pairs = 4 * 10 * 12
    assert counter.get_total_flops() == 2 * pairs * (16 + 8) + 2 * pairs * (3 * 16 + 2 * 8)


@pytest.mark.parametrize("asked", ["q", "k", "v", "qk", "kv", "qv", "qkv"])
def test_only_requested_gradients_are_computed(asked, device, monkeypatch):
    launched = []
    monkeypatch.setattr(launch, "run", lambda call, where, run=launch.run: (launched.append(call), run(call, where)))
    tensors = dict(zip("qkv", qkv(device)))
    inputs = [tensors[name].requires_grad_() for name in asked]
    gradients = torch.autograd.grad(attention(**tensors, causal=True).sum(), inputs)
    exact = torch.autograd.grad(reference.attention(**tensors, causal=True).sum(), inputs)
    torch.testing.assert_close(gradients, exact, atol=1e-5, rtol=1e-4)
    kernels = [call.kernel.__name__ for call in launched]
    expected = ["forward_kernel"] + ["delta_kernel"] * (asked != "v") + ["dq_kernel"] * ("q" in asked)
    assert kernels == expected + ["dkdv_kernel"] * (asked != "q")
    if asked != "q":
        static = launched[-1].arguments[-1]
        assert static.GRADS.value == {"k": "dk", "v": "dv"}.get(asked.removeprefix("q"), "both")


@pytest.mark.interpreted
@pytest.mark.parametrize("asked", ["k", "qkv", *slow("q", "v", "qk", "kv", "qv")])
def test_gradcheck(asked, device):
    tensors = dict(zip("qkv", qkv(device, n_q=3, n_k=4, d=3, dv=2, heads=2, kv_heads=1, dtype=torch.float64)))
    for name in asked:
        tensors[name].requires_grad_()

    def function(q, k, v):
        return attention(q, k, v, causal=True, align="bottom_right", scale=-0.8, return_lse=True)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=len(asked) > 1)


def test_a_second_derivative_is_an_error(device):
    q, k, v = qkv(device, grad=True)
    first, = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="at most first derivatives"):
        first.sum().backward()


def test_a_gradient_penalty_is_an_error(device):
    q, k, v = qkv(device)
    weight = torch.randn(16, 16, device=device, requires_grad=True)
    x = q.requires_grad_()
    slope, = torch.autograd.grad(attention(x @ weight, k, v).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="at most first derivatives.*gradient penalty"):
        (slope.norm() - 1).square().backward()


def test_memory_is_linear(device, monkeypatch):
    """Forward allocates o, lse, two statistics and the residual; backward the requested gradients and delta."""
    taken = []
    for home, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty", "new_empty_strided"))):
        for name in names:
            monkeypatch.setattr(home, name, noted(getattr(home, name), taken))
    n, d, dv = 64, 16, 8
    q, k, v = qkv(device, n_q=n, n_k=n, d=d, dv=dv, dtype=torch.bfloat16)
    taken.clear()
    options = 0.25, None, 0, False, 0.0, None, None, None, False, False, False, "softmax", None, None, None
    o, _, *left, _, _, _ = custom_op._forward(q, k, v, *(None,) * 13, *options, True)
    assert sorted(taken) == sorted([2 * n * dv, 2 * n, 4 * n, 2 * n * dv])
    taken.clear()
    custom_op._forward(q, k, v, *(None,) * 13, *options, False)
    assert sorted(taken) == sorted([2 * n * dv, 2 * n, 4 * n])
    taken.clear()
    custom_op._backward(o, None, o, *left, q, k, v, *(None,) * 13, *options, [True, True, *[False] * 5])
    assert sorted(taken) == sorted([2 * n * d, 2 * n * d, 2 * n])


def test_a_bias_takes_no_memory_of_the_size_of_the_scores(device, monkeypatch):
    """A bias and a mask per key, forward and backward."""
    n = 64
    q, k, v = qkv(device, n_q=n, n_k=n, dtype=torch.float32, grad=True)
    bias = torch.randn(1, 1, 1, n, device=device, requires_grad=True)
    mask, do = torch.rand(n, device=device) > 0.2, torch.randn(1, 2, n, 16, device=device)
    taken = []
    for home, names in ((torch, ("empty", "empty_like", "empty_strided", "zeros_like")),
                        (torch.Tensor, ("new_empty", "new_empty_strided", "contiguous", "clone", "to"))):
        for name in names:
            monkeypatch.setattr(home, name, noted(getattr(home, name), taken))
    gradients = torch.autograd.grad(attention(q, k, v, bias=bias, mask=mask), (q, k, v, bias), do)
    assert gradients[3].shape == bias.shape and max(taken) <= 2 * n * 16 < n * n and n in taken


def test_relative_positions_take_no_memory_of_the_size_of_the_scores(device, monkeypatch):
    """The sums of diagonals are [..., H, L + S]; the sum to the table takes as much."""
    n_q, n_k = 64, 96
    q, k, v = qkv(device, n_q=n_q, n_k=n_k, dtype=torch.float32, grad=True)
    learned = [torch.randn(shape, device=device, requires_grad=True) for shape in ((2,), (2, 9))]
    taken, do = [], torch.randn(1, 2, n_q, 16, device=device)
    for home, names in ((torch, ("empty", "empty_like", "empty_strided", "zeros_like", "where", "arange", "cat")),
                        (torch.Tensor, ("new_empty", "new_empty_strided", "new_zeros", "contiguous", "clone", "to", "sum"))):
        for name in names:
            monkeypatch.setattr(home, name, noted(getattr(home, name), taken))
    o = attention(q, k, v, align="top_left", alibi=learned[0], relative=learned[1])
    gradients = torch.autograd.grad(o, (q, k, v, *learned), do)
    assert [x.shape for x in gradients[3:]] == [(2,), (2, 9)]
    assert max(taken) <= 2 * n_k * 16 < n_q * n_k and 2 * (n_q + n_k) in taken


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_second_derivative_is_an_error(backend, device):
    torch._dynamo.reset()
    q, k, v = qkv(device, grad=True)
    compiled = torch.compile(attention, backend=backend)
    first, = torch.autograd.grad(compiled(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="at most first derivatives|does not currently support double backward"):
        first.sum().backward()


def test_forward_mode_is_an_error(device):
    q, k, v = qkv(device)
    with pytest.raises(RuntimeError, match=r"got forward mode \(jvp\)"):
        torch.func.jvp(lambda q: attention(q, k, v), (q,), (torch.ones_like(q),))


def test_gradients_through_an_exported_program(device):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(16, device=device))

        def forward(self, q, k, v):
            return attention(q @ self.weight, k, v, causal=True)

    inputs, module = qkv(device), Module()
    loaded = torch.export.export(module, tuple(inputs), strict=False).module()
    loaded(*inputs).square().sum().backward()
    module(*inputs).square().sum().backward()
    torch.testing.assert_close(loaded.weight.grad, module.weight.grad)


def test_vmap_keeps_the_residual(device):
    q, k, v = (torch.rand(2, 64, 16, device=device).bfloat16().requires_grad_() for _ in range(3))
    mapped = torch.autograd.grad(torch.vmap(attention)(q, k, v).sum(), (q, k, v))
    plain = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    for one, other in zip(mapped, plain):
        assert torch.equal(one, other)


def test_new_scale_compiles_at_most_one_more_graph(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v, scale: attention(q, k, v, scale=scale), backend="aot_eager", fullgraph=True)
    q, k, v = qkv(device)
    for scale in (0.5, 0.25, -1.5):
        torch.testing.assert_close(compiled(q, k, v, scale), reference.attention(q, k, v, scale=scale))


def test_residual_is_kept_only_for_gradients_of_16_bit_outputs(device):
    def kept(dtype, grad, **options):
        shapes = []
        original = custom_op.Attention.apply
        plan.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(custom_op.Attention, "apply", lambda *args: (out := original(*args), shapes.append(out[3].shape))[0])
            attention(*qkv(device, dtype=dtype, grad=grad), **options)
        return shapes[0] != (0,)

    assert kept(torch.bfloat16, True)
    assert not kept(torch.bfloat16, False) and not kept(torch.float32, True)
    assert not kept(torch.bfloat16, True, precise_grad=False)
    with torch.no_grad():
        assert not kept(torch.float16, True)


def test_launches_are_on_the_tensors_device(device, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def on(where):
        entered.append(where)
        yield
        entered.append("left")

    monkeypatch.setattr(launch, "device_guard", on)
    q, k, v = qkv(device, grad=True)
    attention(q, k, v).sum().backward()
    assert entered == [q.device, "left"] * 4  # forward, delta, dq, dkdv


def test_the_device_guard_makes_the_device_current(monkeypatch):
    asked = []

    class Cuda:
        @staticmethod
        def device(device):
            asked.append(device)
            return contextlib.nullcontext()

    monkeypatch.setattr(torch, "get_device_module", lambda device: Cuda)
    with launch.device_guard(torch.device("cuda", 3)):
        assert asked == [torch.device("cuda", 3)]


def test_grid_is_one_dimensional_for_many_heads():
    problem = Problem((70_000,), 2, 1, 100, 100, 16, 16, torch.float16)
    call = launch.example_launch("forward", problem, launch.Config(64, 64))
    assert call.programs == 70_000 * 2 * 2
