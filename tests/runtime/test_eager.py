"""Repeated calls: they skip checks and dispatcher, and give the bits of a call that skips nothing."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tritonattn
from tests.helpers.cases import LAYOUT
from tritonattn import Config, attention, block_mask, scaled_dot_product_attention
from tritonattn.configs import lookup
from tritonattn.runtime import arguments, eager, launch, plan


def draw(device, seed=0, *, batch=(2,), heads=2, kv_heads=1, n_q=20, n_k=20, d=16, dv=8, dtype=torch.float32, grad="qkv",
         layout="contiguous"):
    """Return q, k and v; those named in `grad` require one."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"q": (*batch, heads, n_q, d), "k": (*batch, kv_heads, n_k, d), "v": (*batch, kv_heads, n_k, dv)}
    return [LAYOUT[layout](torch.randn(shape, generator=rng).to(device, dtype)).detach().requires_grad_(name in grad)
            for name, shape in shapes.items()]


def random(device, *shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


# sizes and options of one kind of call, and what else it takes, drawn anew for each call
KINDS = {
    "plain": ({}, lambda device, seed: {}),
    "causal": ({}, lambda device, seed: {"causal": True}),
    "bottom right": ({"n_q": 12}, lambda device, seed: {"causal": True, "align": "bottom_right"}),
    "window and scale": ({}, lambda device, seed: {"window": (5, 2), "scale": 0.3}),
    "transposed": ({"layout": "transposed"}, lambda device, seed: {}),
    "two batch dimensions": ({"batch": (2, 2)}, lambda device, seed: {}),
    "no batch dimension": ({"batch": ()}, lambda device, seed: {}),
    "bias": ({}, lambda device, seed: {"bias": random(device, 2, 20, 20, seed=seed).requires_grad_()}),
    "bias of a row": ({}, lambda device, seed: {"bias": random(device, 2, 20, 1, seed=seed).requires_grad_()}),
    "softcap": ({}, lambda device, seed: {"softcap": 2.0}),
    "sink": ({}, lambda device, seed: {"sink": random(device, 2, seed=seed).requires_grad_()}),
    "sinks, bias of a row": ({}, lambda device, seed: {"sink": random(device, 2, 3, seed=seed).requires_grad_(),
                                                       "bias": random(device, 2, 20, 1, seed=seed).requires_grad_()}),
    "mask of a key": ({}, lambda device, seed: {"mask": random(device, 20, seed=seed) > -1}),
    "block mask": ({}, lambda device, seed: {"mask": block_mask(random(device, 20, 20, seed=seed) > -1)}),
    "key lengths": ({}, lambda device, seed: {"key_lengths": torch.tensor([seed, 30], device=device)}),
    "dropout": ({}, lambda device, seed: {"dropout_p": 0.3, "dropout_seed": torch.tensor([seed], device=device)}),
    "bfloat16": ({"dtype": torch.bfloat16}, lambda device, seed: {}),
    "bfloat16, not precise": ({"dtype": torch.bfloat16}, lambda device, seed: {"precise_grad": False}),
    "gradient of v alone": ({"grad": "v"}, lambda device, seed: {}),
    "no gradient": ({"grad": ""}, lambda device, seed: {}),
}


def run(q, k, v, options):
    """Return o, lse and the gradients."""
    o, lse = attention(q, k, v, return_lse=True, **options)
    inputs = [x for x in (q, k, v, options.get("bias"), options.get("sink")) if x is not None and x.requires_grad]
    if not inputs or not o.requires_grad:
        return o, lse
    return o.detach(), lse.detach(), *torch.autograd.grad((o, lse), inputs, (torch.ones_like(o), torch.ones_like(lse)))


@contextlib.contextmanager
def no_checks():
    """Fail where a call checks its arguments."""
    def fail(*_, **options):
        raise AssertionError("the call was not known")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "prepare", fail)
        patch.setattr(arguments, "prepare_sdpa", fail)
        yield


@contextlib.contextmanager
def every_check():
    """Make every call as if it were the first of its kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "call_key", lambda *_: None)
        patch.setattr(plan, "find", lambda key: None)
        yield


def same(results, others):
    return len(results) == len(others) and all(torch.equal(a, b) for a, b in zip(results, others))


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_call_gives_the_bits_of_a_checked_one(kind, device):
    sizes, options = KINDS[kind]
    run(*draw(device, 1, **sizes), options(device, 5))
    q, k, v = draw(device, 2, **sizes)
    with no_checks():
        repeated = run(q, k, v, options(device, 7))
    with every_check():
        assert same(repeated, run(q, k, v, options(device, 7)))


def test_calls_of_all_kinds_in_turn_are_not_mixed_up(device):
    """Without gradients, since each call takes place three times."""
    calls = [(draw(device, i, **sizes | {"grad": ""}), options(device, 9)) for i, (sizes, options) in enumerate(KINDS.values())]
    with torch.no_grad():
        with every_check():
            expected = [run(*tensors, options) for tensors, options in calls]
        for tensors, options in calls:
            run(*tensors, options)
        for (tensors, options), results in zip(reversed(calls), reversed(expected)):
            assert same(run(*tensors, options), results)


def test_torchs_signature(device):
    q, k, v = draw(device, grad="")
    bias, mask = random(device, 20, 20), random(device, 20, 20) > 0
    for attn_mask in (None, bias, mask):
        first = scaled_dot_product_attention(q, k, v, attn_mask, enable_gqa=True)
        with no_checks():
            assert torch.equal(scaled_dot_product_attention(q, k, v, attn_mask, enable_gqa=True), first)
    with pytest.raises(RuntimeError, match="enable_gqa=True"):
        scaled_dot_product_attention(*draw(device, heads=3, kv_heads=2, grad=""))


@pytest.mark.parametrize("options, error", [
    ({"causal": 1}, TypeError), ({"scale": "0.25"}, TypeError), ({"window": (True, 0)}, TypeError),
    ({"window": (1.0, 0)}, TypeError), ({"window": (1, 0, 0)}, TypeError), ({"align": 0}, ValueError),
    ({"dropout_seed": 3}, RuntimeError), ({"key_lengths": [3]}, TypeError), ({"softcap": -1.0}, ValueError),
    ({"bias": 1.0}, TypeError), ({"dropout_p": 2.0}, ValueError), ({"dropout_p": float("nan")}, ValueError),
    ({"sink": 1.0}, TypeError),
], ids=str)
def test_bad_arguments_raise_although_equal_ones_are_known(options, error, device):
    q, k, v = draw(device)
    attention(q, k, v, causal=True)
    attention(q, k, v, window=(1, 0), scale=0.25)
    for _ in range(2):
        with pytest.raises(error):
            attention(q, k, v, **options)


def test_changed_block_mask_raises(device):
    q, k, v = draw(device)
    mask = block_mask(random(device, 20, 20) > 0)
    for _ in range(2):
        attention(q, k, v, mask=mask)
    mask.mask[0, 0] ^= True
    with pytest.raises(RuntimeError, match="changed since"):
        attention(q, k, v, mask=mask)


@contextlib.contextmanager
def launched():
    """Yield the list of the configs of the launches in the block."""
    configs, original = [], launch.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", lambda call, device: (configs.append(call.config), original(call, device))[1])
        yield configs


@pytest.mark.interpreted
def test_pinned_configs_are_used_at_once_and_no_longer_than_pinned(device):
    q, k, v = draw(device, grad="")
    attention(q, k, v)
    with launched() as configs:
        attention(q, k, v)
        with tritonattn.pinned(Config(16, 16)):
            attention(q, k, v)
            with tritonattn.pinned(forward=Config(32, 16)):
                attention(q, k, v)
        attention(q, k, v)
    usual = configs[0]
    assert configs == [usual, Config(16, 16), Config(32, 16), usual]


@pytest.mark.interpreted
def test_tuned_config_is_used_from_the_next_call_on(device, monkeypatch):
    q, k, v = draw(device, grad="")
    attention(q, k, v)
    monkeypatch.setattr(lookup, "get_config", lambda *_: Config(16, 32))
    with launched() as configs:
        attention(q, k, v)
        lookup.clear_lookup_cache()
        attention(q, k, v)
    assert configs[0] != configs[1] == Config(16, 32)


def test_precision_of_float32_products_follows_the_setting(device):
    q, k, v = draw(device, grad="", n_k=64, d=32)
    before = torch.get_float32_matmul_precision()
    try:
        exact = attention(q, k, v)
        torch.set_float32_matmul_precision("high")
        rounded = attention(q, k, v)
        torch.set_float32_matmul_precision("highest")
        assert torch.equal(attention(q, k, v), exact) and not torch.equal(rounded, exact)
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_casts_known_calls_too(device):
    q, k, v = draw(device, grad="")
    for _ in range(2):
        assert attention(q, k, v).dtype == torch.float32
        with torch.autocast(device.type, torch.bfloat16):
            assert attention(q, k, v).dtype == torch.bfloat16


def test_gradient_mode_decides_in_each_call(device):
    q, k, v = draw(device)
    for _ in range(2):
        assert attention(q, k, v).requires_grad
        with torch.no_grad():
            assert not attention(q, k, v).requires_grad
        with torch.inference_mode():
            assert attention(q, k, v).is_inference()
    assert not attention(*draw(device, grad="")).requires_grad


def test_modes_and_transforms_still_see_known_calls(device):
    q, k, v = draw(device, grad="")
    flops = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            attention(q, k, v)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    mapped = torch.func.vmap(attention)(*(x.unsqueeze(0) for x in (q, k, v)))
    assert torch.equal(mapped[0], attention(q, k, v))
    with pytest.raises(RuntimeError, match="reverse-mode"), torch.autograd.forward_ad.dual_level():
        attention(torch.autograd.forward_ad.make_dual(q, q), k, v)
    assert torch.equal(torch.compile(attention, backend="eager", fullgraph=True)(q, k, v), attention(q, k, v))


def test_profiler_shows_known_calls_by_name(device):
    q, k, v = draw(device)
    attention(q, k, v)
    with torch.profiler.profile() as profiler:
        attention(q, k, v)
        with torch.no_grad():
            attention(q, k, v)
            attention(q, k, v)
    names = [event.name for event in profiler.events()]
    assert "PlannedAttention" in names and names.count("tritonattn::forward") == 2


def test_negated_view_is_negated(device):
    _, k, v = draw(device, grad="")
    q = torch.complex(random(device, 2, 2, 20, 16), random(device, 2, 2, 20, 16)).conj().imag
    assert q.is_neg()
    plain = q.clone()
    attention(plain, k, v)
    for _ in range(2):
        assert torch.equal(attention(q, k, v), attention(plain, k, v))


def negated(x):
    """Return a view of other memory that equals x, with its sign bit to be resolved."""
    y = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert y.is_neg() and torch.equal(y, x)
    return y


@pytest.mark.parametrize("which", ["do", "dlse", "saved"])
def test_negated_views_are_resolved_in_the_backward_pass(which, device):
    q, k, v = draw(device)

    def gradients(change):
        unpack = change if which == "saved" else lambda x: x
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: unpack(x) if x.is_floating_point() else x):
            o, lse = attention(q, k, v, return_lse=True)
        do, dlse = random(device, *o.shape), random(device, *lse.shape)
        return torch.autograd.grad((o, lse), (q, k, v), (change(do) if which == "do" else do,
                                                         change(dlse) if which == "dlse" else dlse))

    expected = gradients(lambda x: x)
    assert same(gradients(negated), expected)


def test_meta_tensors_have_no_plan():
    q, k, v = (torch.empty(1, 2, 20, 16, device="meta") for _ in range(3))
    for _ in range(2):
        assert attention(q, k, v).shape == (1, 2, 20, 16)


class Wrapped(torch.Tensor):
    """A subclass whose operations are recorded."""

    operations = set()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.operations.add(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["q", "key_lengths", "dropout_seed"])
def test_subclasses_in_any_argument_are_seen(name, device):
    q, k, v = draw(device, grad="")
    options = {"key_lengths": torch.tensor([9, 20], device=device), "dropout_p": 0.5,
               "dropout_seed": torch.tensor([3], device=device)}
    attention(q, k, v, **options)
    if name == "q":
        q = q.as_subclass(Wrapped)
    else:
        options[name] = options[name].as_subclass(Wrapped)
    Wrapped.operations.clear()
    attention(q, k, v, **options)
    assert any("forward" in operation for operation in Wrapped.operations)


def test_results_are_laid_out_as_torchs(device):
    for q_shape, k_shape in (((2, 4, 5, 8), (2, 4, 7, 8)), ((4, 5, 8), (2, 4, 7, 8)), ((4, 5, 8), (4, 7, 8))):
        q, k, v = (torch.randn(*shape[:-3], shape[-2], shape[-3], shape[-1]).transpose(-3, -2).to(device)
                   for shape in (q_shape, k_shape, k_shape))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            contiguous = F.scaled_dot_product_attention(q, k, v).stride()
        for _ in range(2):
            strides = scaled_dot_product_attention(q, k, v).stride()
            assert strides == (q.stride() if q.dim() == k.dim() == 4 else contiguous)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_whose_second_pass_is_a_repeated_call(reentrant, device):
    q, k, v = draw(device)
    expected = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    plan.clear()
    o = checkpoint(attention, q, k, v, use_reentrant=reentrant)
    o.sum().backward()
    assert same([q.grad, k.grad, v.grad], expected)


def test_saved_tensors_may_be_moved_by_hooks(device):
    """The tensors come back with other strides than those of the forward pass."""
    q, k, v = draw(device, layout="transposed")
    expected = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        gradients = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    assert same(gradients, expected)


def test_second_derivatives_raise_and_batched_gradients_work(device):
    q, k, v = draw(device)
    attention(q, k, v)
    gradient, = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        gradient.sum().backward()
    for output in attention(q, k, v, return_lse=True):
        cotangents = torch.stack([torch.ones_like(output), 2 * torch.ones_like(output)])
        batched, = torch.autograd.grad(output, q, cotangents, is_grads_batched=True, retain_graph=True)
        single, = torch.autograd.grad(output, q, cotangents[1], retain_graph=True)
        torch.testing.assert_close(batched[1], single)


def test_unused_output_needs_no_cotangent(device):
    q, k, v = draw(device)
    for _ in range(2):
        _, lse = attention(q, k, v, return_lse=True)
        gradient, = torch.autograd.grad(lse.sum(), q)
    with every_check():
        _, lse = attention(q, k, v, return_lse=True)
        assert torch.equal(torch.autograd.grad(lse.sum(), q)[0], gradient)


@pytest.mark.slow  # Dynamo traces the backward pass
def test_compiled_autograd_of_a_repeated_call(device):
    def gradients(context):
        leaves = draw(device)
        loss = attention(*leaves)
        assert "PlannedAttention" in loss.grad_fn.name()
        with context:
            loss.square().sum().backward()
        return [x.grad for x in leaves]

    attention(*draw(device))
    expected = gradients(contextlib.nullcontext())
    ours = gradients(compiled_autograd._enable(torch.compile(backend="aot_eager")))
    assert all(map(torch.equal, ours, expected))


def test_plans_hold_no_tensors_and_are_bounded(device, monkeypatch):
    monkeypatch.setattr(plan, "LARGEST_CACHE", 5)
    for n in range(8, 16):
        q, k, v = draw(device, n_q=n)
        attention(q, k, v).sum().backward()
        assert len(plan._entries) <= 5
    last = weakref.ref(q)
    del q, k, v
    gc.collect()
    assert last() is None


def test_warm_leaves_no_trace(device):
    q, k, v = draw(device)
    bias = random(device, 20, 20).requires_grad_()
    state = torch.get_rng_state()
    tritonattn.warm(q, k, v, bias=bias, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state) and not any(x.grad is not None for x in (q, k, v, bias))
    for options in ({"causal": True}, {"return_lse": True}):
        plan.clear()
        tritonattn.warm(q, k, v, **options)
        kept = len(plan._entries)
        with no_checks():
            outputs = attention(q, k, v, **options)
        outputs = outputs if "return_lse" in options else (outputs,)
        torch.autograd.grad(outputs, (q, k, v), [torch.ones_like(x) for x in outputs])
        assert len(plan._entries) == kept
    with torch.no_grad(), pytest.raises(RuntimeError, match="head size"):
        tritonattn.warm(q, k[..., :8], v)
    with pytest.raises(TypeError, match="q: expected a torch.Tensor"):
        tritonattn.warm(None, k, v)


def test_threads_share_plans(device):
    calls = [draw(device, i) for i in range(3)]
    expected = [run(*tensors, {}) for tensors in calls]
    plan.clear()
    results = [None] * len(calls)

    def work(i):
        results[i] = [run(*calls[i], {}) for _ in range(2)][-1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(a, b) for a, b in zip(results, expected))


@pytest.mark.interpreted
def test_patched_function_repeats_known_calls(patch_off, device):
    q, k, v = draw(device, grad="", kv_heads=2)
    with tritonattn.swapped():
        first = F.scaled_dot_product_attention(q, k, v)
        with no_checks():
            assert torch.equal(F.scaled_dot_product_attention(q, k, v), first)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            F.scaled_dot_product_attention(q, k, v)
    report = tritonattn.fallback_report()
    assert report.handled == 2 and report.fallbacks == {"sdpa_kernel": 1}
