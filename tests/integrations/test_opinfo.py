"""torch's OpInfo samples of its attention function: results and gradients of tritonattn in every dtype."""

import pytest
import torch
import torch.nn.functional as F

from tritonattn import reference, scaled_dot_product_attention
from tritonattn.attention import dropout_mask
from tritonattn.measure import accuracy

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")

OPINFO, = (op for op in invocations.op_db if op.name == "nn.functional.scaled_dot_product_attention")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def gradients(o, leaves):
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
    return torch.autograd.grad(o, leaves, do, allow_unused=True, materialize_grads=True)


def exactly(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, seed=None, **options):
    """Compute the definition in float64 with torch's arguments; dropout follows the seed."""
    if dropout_p == 0:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, **options)
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    q, k, v = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
    s = q @ k.mT * (options.get("scale") or q.shape[-1] ** -0.5)
    if is_causal:
        seen = reference.visible(*s.shape[-2:], causal=True, align="top_left", device=s.device)
        s = s.masked_fill(~seen, -torch.inf)
    s = s if attn_mask is None else s + attn_mask
    heads = s.shape[-3] if s.dim() > 2 else 1
    keep = dropout_mask((s[..., 0, 0].numel() // heads, heads, *s.shape[-2:]), dropout_p, seed).view(s.shape)
    return s.softmax(-1) * keep / (1 - dropout_p) @ v


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opinfo_samples(dtype, device):
    if dtype == torch.float64 and device.type != "cpu":
        pytest.skip("the kernels run in float64 in the interpreter alone")
    samples = list(OPINFO.sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) >= 20
    for sample in samples:
        arguments = dict(zip(("key", "value", "attn_mask", "dropout_p", "is_causal"), sample.args)) | sample.kwargs
        tensors = {"query": sample.input} | {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        options = {name: x for name, x in arguments.items() if name not in tensors}
        leaves = {name: x for name, x in tensors.items() if x.requires_grad}
        torch.manual_seed(42)
        ours = scaled_dot_product_attention(**tensors, **options)
        torch.manual_seed(42)
        seed = torch.randint(2**62, (1,), device=device)
        results = {"o": [ours], **{name: [x] for name, x in zip(leaves, gradients(ours, list(leaves.values())))}}
        for wide in (dtype, torch.float64):
            inputs = {name: x.detach().to(wide).requires_grad_(x.requires_grad) if x.is_floating_point() else x
                      for name, x in tensors.items()}
            o = exactly(**inputs, **options, seed=seed)
            for name, x in zip(results, (o, *gradients(o, [inputs[name] for name in leaves]))):
                results[name].append(x)
        # the samples are of size 9; with few keys, dS is a difference of large numbers
        lost = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 9 * 9 * 8 * 4
        for name, (mine, torchs, exact) in results.items():
            allowed = accuracy.tolerance(torchs, exact, dtype) + lost
            shapes = [tuple(x.shape) for x in tensors.values()]
            assert accuracy.max_error(mine, exact) <= allowed, (name, shapes, options)
