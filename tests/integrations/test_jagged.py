"""Nested tensors of layout torch.jagged at torch's attention function while the patch is on."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import tritonattn
from tritonattn.integrations import jagged
from tritonattn.integrations.sdpa_patch import TORCH_SDPA

LENGTHS = (3, 5, 1)
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.fixture(autouse=True)
def no_earlier_calls():
    tritonattn.fallback_report(clear=True)


def base(device, heads=2, d=8, lengths=LENGTHS, seed=0):
    """Return a leaf [B, lengths, heads, d]."""
    rng = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, heads, d, generator=rng).to(device) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


def like(x, heads, d, seed):
    """Return a leaf with the sequences of x, so that torch sees that the lengths are the same."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(x.values()), heads, d, generator=rng).to(x.device)
    return torch.nested.nested_tensor_from_jagged(rows, x.offsets()).detach().requires_grad_()


def outcome(function, tensors, **options):
    """Return each sequence of the output, and the rows of the gradients."""
    out = function(*(x.transpose(1, 2) for x in tensors), **options).transpose(1, 2)
    gradients = torch.autograd.grad(sum(x.square().sum() for x in out.unbind()), tensors)
    return [*out.unbind(), *(x.values() for x in gradients)]


def alone(tensors, **options):
    """Return the same, with torch's function on one sequence after the other."""
    leaves = [[x.detach().transpose(0, 1).requires_grad_() for x in each.unbind()] for each in tensors]
    outs = [TORCH_SDPA(*qkv, **options) for qkv in zip(*leaves)]
    gradients = torch.autograd.grad(sum(x.square().sum() for x in outs), [x for each in leaves for x in each])
    rows = [torch.cat([x.transpose(0, 1) for x in gradients[i:i + len(outs)]]) for i in range(0, len(gradients), len(outs))]
    return [*(x.transpose(0, 1) for x in outs), *rows]


@pytest.mark.parametrize("options, kv_heads", [
    ({}, 2), ({"scale": -0.3}, 2), ({"is_causal": True}, 2), ({"enable_gqa": True}, 1),
], ids=["plain", "scale", "causal", "grouped"])
def test_each_sequence_by_itself(options, kv_heads, device):
    q = base(device)
    tensors = q, like(q, kv_heads, 8, 1), like(q, kv_heads, 4, 2)
    with tritonattn.swapped():
        ours = outcome(F.scaled_dot_product_attention, tensors, **options)
    report = tritonattn.fallback_report()
    assert report.handled == 1 and not report.fallbacks
    torch.testing.assert_close(ours, alone(tensors, **options), atol=1e-5, rtol=1e-4)


def test_queries_and_keys_of_other_lengths(device):
    q, k = base(device), base(device, lengths=(4, 1, 6), seed=1)
    tensors = q, k, like(k, 2, 8, 2)
    with tritonattn.swapped():
        ours = outcome(F.scaled_dot_product_attention, tensors)
        assert tritonattn.fallback_report().handled == 1
        # aligned in which way?
        reason = jagged.unsupported_reason(*(x.transpose(1, 2) for x in tensors), None, 0.0, True, None, False)
        assert reason == "nested"
    torch.testing.assert_close(ours, alone(tensors), atol=1e-5, rtol=1e-4)


def test_the_output_has_the_sequences_of_the_queries(device):
    q = base(device)
    with tritonattn.swapped(), torch.no_grad():
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, q, q))).transpose(1, 2)
    total = out + q
    assert total.shape == q.shape and out.is_contiguous() and out.offsets() is q.offsets()
    assert (out._maybe_min_seqlen, out._maybe_max_seqlen) == (1, 5)


def test_dropout(device):
    q = base(device)
    rows = [x.transpose(1, 2) for x in (q, q, q)]
    with tritonattn.swapped(), torch.no_grad():
        torch.manual_seed(0)
        first = F.scaled_dot_product_attention(*rows, dropout_p=0.5)
        torch.manual_seed(0)
        second = F.scaled_dot_product_attention(*rows, dropout_p=0.5)
        none = F.scaled_dot_product_attention(*rows)
    assert torch.equal(first.values(), second.values()) and not torch.equal(first.values(), none.values())


@pytest.mark.parametrize("change", ["mask", "heads", "other offsets", "ragged heads", "narrowed", "three dimensions", "dtype",
                                    "a dense tensor", "setting"])
def test_what_stays_with_torch(change, device):
    q = base(device)
    rows = [x.transpose(1, 2) for x in (q, like(q, 2, 8, 1), like(q, 2, 8, 2))]
    mask, expected = None, "nested"
    if change == "mask":
        mask = rows[0]
    elif change == "heads":
        rows[1:] = [like(q, 1, 8, 1).transpose(1, 2)] * 2
    elif change == "other offsets":
        rows[2] = base(device).transpose(1, 2)
    elif change == "ragged heads":
        rows = [x.transpose(1, 2) for x in rows]
    elif change == "narrowed":
        rows = [torch.nested.narrow(torch.randn(3, 5, 2, 8, device=device), 1, 0, torch.tensor(LENGTHS, device=device),
                                    layout=torch.jagged).transpose(1, 2)] * 3
    elif change == "three dimensions":
        rows = [torch.nested.nested_tensor([torch.randn(n, 8) for n in LENGTHS], layout=torch.jagged)] * 3
    elif change == "a dense tensor":
        rows[1] = torch.randn(3, 2, 5, 8, device=device)
    elif change == "setting":
        expected = "sdpa_kernel"
    else:
        rows, expected = [x.to(torch.int32) for x in rows], "dtype torch.int32"
    with sdpa_kernel(SDPBackend.MATH) if change == "setting" else contextlib.nullcontext():
        assert jagged.unsupported_reason(*rows, mask, 0.0, False, None, False) == expected


def test_a_fallback_says_what_would_be_supported(device, monkeypatch):
    monkeypatch.setenv("TRITONATTN_STRICT", "1")
    rows = [base(device).transpose(1, 2) for _ in range(3)]
    with tritonattn.swapped(), pytest.raises(RuntimeError, match="nested: jagged keys and values must share their offsets"):
        F.scaled_dot_product_attention(*rows)
