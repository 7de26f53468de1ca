"""The definition, against torch's own attention and against a sum written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from tritonattn import reference


def test_a_sum_written_out():
    q, k, v = (torch.randn(1, 1, n, 3, dtype=torch.float64) for n in (4, 5, 5))
    o, lse = reference.attention(q, k, v, scale=0.3, window=(1, 2), align="bottom_right", return_lse=True)
    for i in range(4):
        seen = [j for j in range(5) if -1 <= j - (i + 1) <= 2]
        weights = [math.exp(0.3 * (q[0, 0, i] @ k[0, 0, j]).item()) for j in seen]
        exact = sum(w * v[0, 0, j] for w, j in zip(weights, seen)) / sum(weights)
        torch.testing.assert_close(o[0, 0, i], exact)
        assert lse[0, 0, i].item() == pytest.approx(math.log(sum(weights)))


@pytest.mark.parametrize("causal", [False, True])
def test_matches_torch(causal):
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    torch.testing.assert_close(reference.attention(q, k, v, causal=causal, align="top_left"),
                               F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True))


def test_packed_sequences_are_computed_one_by_one():
    q, k, v = torch.randn(9, 2, 8), torch.randn(8, 1, 8), torch.randn(8, 1, 4)
    bias = torch.randn(2, 1, 5, 6)
    q_starts, k_starts = torch.tensor([0, 5, 8]), torch.tensor([0, 2, 8])
    o, lse = reference.attention_varlen(q, k, v, q_starts, k_starts, bias=bias, return_lse=True)
    for i, (rows, keys) in enumerate(((slice(0, 5), slice(0, 2)), (slice(5, 8), slice(2, 8)))):
        part = [x.transpose(0, 1) for x in (q[rows], k[keys], v[keys])]
        expected = F.scaled_dot_product_attention(*part, bias[i, :, :rows.stop - rows.start, :keys.stop - keys.start],
                                                  enable_gqa=True)
        torch.testing.assert_close(o[rows], expected.transpose(0, 1))
    assert o.shape == (9, 2, 4) and (o[8:] == 0).all() and (lse[:, 8:] == -torch.inf).all()


def test_fully_masked_rows_have_finite_gradients():
    q, k, v = (torch.randn(1, 1, n, 4, requires_grad=True) for n in (6, 2, 2))
    o, lse = reference.attention(q, k, v, causal=True, align="bottom_right", return_lse=True)
    assert (o[..., :4, :] == 0).all() and (lse[..., :4] == -torch.inf).all()
    for x in torch.autograd.grad(o.sum() + lse[..., 4:].sum(), (q, k, v)):
        assert x.isfinite().all()


@pytest.mark.parametrize("align, expected", [("top_left", [[1, 0, 0, 0], [1, 1, 0, 0]]),
                                             ("bottom_right", [[1, 1, 1, 0], [1, 1, 1, 1]])])
def test_pictures_of_the_docstring(align, expected):
    assert reference.visible(2, 4, causal=True, align=align).int().tolist() == expected


@pytest.mark.parametrize("scores", [1, 150, 10**9])
@pytest.mark.parametrize("options", [{}, {"window": (2, 0), "align": "bottom_right"}, {"causal": True, "align": "top_left"}])
def test_by_heads_does_not_depend_on_the_chunk(scores, options):
    q, k, v, do = (torch.randn(2, 3, heads, n, d) for heads, n, d in ((4, 7, 5), (2, 9, 5), (2, 9, 6), (4, 7, 6)))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    o = reference.attention(*leaves, **options)
    expected = (o, *torch.autograd.grad(o, leaves, do.double()))
    torch.testing.assert_close(reference.by_heads(q, k, v, do, scores=scores, **options), expected)
    torch.testing.assert_close(reference.by_heads(q, k, v, scores=scores, **options), expected[0].detach())


def test_by_heads_in_another_dtype():
    q, k, v, do = (torch.randn(1, 2, 8, 4, dtype=torch.bfloat16) for _ in range(4))
    o, *gradients = reference.by_heads(q, k, v, do, dtype=torch.bfloat16)
    torch.testing.assert_close(o, reference.attention(q, k, v))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize(("n_q", "n_k", "heads", "at_once"), [(1, 64, 32, 2), (64, 64, 16, 1), (8, 64, 32, 2), (1, 8, 7, 7)])
def test_by_heads_copies_no_more_keys_and_values_than_scores(n_q, n_k, heads, at_once, monkeypatch):
    taken, attention = [], reference.attention

    def watched(q, k, v, **options):
        taken.append(len(k))
        assert max(n_q * n_k * len(q), k.numel() + v.numel()) <= 4096
        return attention(q, k, v, **options)

    monkeypatch.setattr(reference, "attention", watched)
    q, k, v = (torch.randn(heads, 1, n, 16) for n in (n_q, n_k, n_k))
    reference.by_heads(q, k, v, scores=4096)
    assert max(taken) == at_once and sum(taken) == heads


def test_keys_are_not_copied_where_every_query_head_has_its_own(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", None)
    assert reference.attention(*(torch.randn(2, 3, 4) for _ in range(3))).shape == (2, 3, 4)
