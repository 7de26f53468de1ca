"""Implementations of attention to benchmark: tritonattn and its baselines.

Inputs are contiguous [batch, heads, length, head size]. An implementation with another layout gets a transposed view. Packed
sequences are [1, heads, all rows, head size], a view of rows of all heads.
Masks are built before timing, in the form that costs each call least.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right

import tritonattn
from tritonattn import Problem, reference

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
SOFTCAP = 50.0
SLOPE = 2.0**-4
RELATIVE_ENTRIES = 257  # of T5
FLASH_ATTN = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute"}  # modules


class Unsupported(Exception):
    """An implementation does not support a problem; the text names the reason."""


class Implementation(NamedTuple):
    """`build(problem, device)` returns the function or raises Unsupported. Build and calls run inside `context()`."""

    name: str
    build: Callable[[Problem, torch.device], Attention]
    missing: str | None = None  # reason why it cannot run on this machine
    version: str = torch.__version__
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext

    @property
    def identity(self) -> str:
        """The version, or "missing". Results of different identities are kept in different files."""
        return "missing" if self.missing else self.version


def align(problem: Problem) -> str:
    """Return the alignment of the problem's window, as `tritonattn.attention` names it."""
    return "bottom_right" if problem.shift else "top_left"


def boolean_mask(problem: Problem, device) -> torch.Tensor:
    """Return the mask as booleans [n_q, n_k], True where a query attends to a key."""
    return reference.visible(problem.n_q, problem.n_k, window=problem.window, align=align(problem), device=device)


def variants(problem: Problem, heads: int, device) -> dict:
    """Return the options of `tritonattn.attention` for the variants of a problem, the same for every head."""
    options = {"softcap": SOFTCAP} if problem.softcap else {}
    if problem.normalizer != "softmax":
        options["normalizer"] = problem.normalizer
    if problem.sink:
        options["sink"] = torch.zeros(heads, device=device)
    if problem.alibi:
        options["alibi"] = torch.full((heads,), SLOPE, device=device)
    if problem.relative:
        options["relative"] = torch.linspace(-1, 1, RELATIVE_ENTRIES, device=device).repeat(heads, 1)
    return options


def formed_bias(problem: Problem, device) -> torch.Tensor | None:
    """Return the bias [heads, n_q, n_k] that slopes and table stand for, in the problem's dtype; None without them."""
    if not (problem.alibi or problem.relative):
        return None
    offsets = reference.offsets(problem.n_q, problem.n_k, align=align(problem), device=device)
    bias = -SLOPE * offsets.abs() if problem.alibi else torch.zeros(offsets.shape, device=device)
    if problem.relative:
        table, radius = variants(problem, 1, device)["relative"][0], RELATIVE_ENTRIES // 2
        bias = bias + table[offsets.clamp(-radius, radius) + radius]
    # models have another one for each head
    return bias.to(problem.dtype).repeat(problem.heads, 1, 1)


def ours(problem, device, **options):
    """Return tritonattn.attention for this problem, with the config that the library chooses. Statistics are not returned."""
    options |= variants(problem, problem.heads, device) | {"window": problem.window, "align": align(problem)}
    if statistics := [name for name in ("entropy", "key_mass") if getattr(problem, name)]:
        options["return_stats"] = statistics
    if problem.packed:
        return packed(problem, device, tritonattn.attention_varlen, **options)
    if statistics:
        return lambda q, k, v: tritonattn.attention(q, k, v, **options)[0]
    return functools.partial(tritonattn.attention, **options)


def packed(problem, device, function, names=("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), **options):
    """Return a function of packed sequences, all of which are as long as the longest, for tensors [1, heads, rows, size]."""
    starts = (torch.arange(problem.batch[0] + 1, dtype=torch.int32, device=device) * n for n in (problem.n_q, problem.n_k))
    options |= dict(zip(names, (*starts, problem.n_q, problem.n_k)))

    def attention(q, k, v):
        o = function(*(x[0].transpose(0, 1) for x in (q, k, v)), **options)
        return (o[0] if isinstance(o, tuple) else o).transpose(0, 1)[None]

    return attention


def varlen(problem, device):
    """Return torch's varlen_attn."""
    from torch.nn.attention.varlen import varlen_attn

    refuse_beyond_softmax(problem)
    if not problem.packed:
        raise Unsupported("varlen_attn takes packed sequences only")
    if problem.softcap or problem.sink or problem.alibi or problem.relative:
        raise Unsupported("varlen_attn has no softcap, no sinks and no biases")
    if problem.mask != "full" and problem.shift != problem.n_k - problem.n_q:
        raise Unsupported("varlen_attn aligns masks bottom-right, the problem is top-left")
    window = tuple(-1 if side is None else side for side in problem.window)
    return packed(problem, device, varlen_attn, ("cu_seq_q", "cu_seq_k", "max_q", "max_k"), window_size=window,
                  enable_gqa=problem.group > 1)


def refuse_beyond_softmax(problem):
    """Raise Unsupported for other normalizers, and for statistics of the weights."""
    if problem.normalizer != "softmax":
        raise Unsupported("computes a softmax only")
    if problem.entropy or problem.key_mass:
        raise Unsupported("returns no statistics of the weights")


def refuse_packed(problem):
    """Raise Unsupported for packed sequences."""
    if problem.packed:
        raise Unsupported("takes no packed sequences, or only as nested tensors or masks")


def sdpa_mask(problem, device, backend=None):
    """Return (is_causal, attn_mask) for torch's SDPA: its own flag or CausalBias where there is one, else an additive mask."""
    if (bias := formed_bias(problem, device)) is not None:
        return False, bias.masked_fill_(~boolean_mask(problem, device), -torch.inf)
    if problem.mask == "full" or (problem.mask == "causal" and problem.shift == 0):
        return problem.mask == "causal", None
    if problem.mask == "causal" and problem.shift > 0 and backend in (None, "flash", "efficient"):
        # these backends align a causal mask bottom-right when the mask is a CausalBias
        return False, causal_lower_right(problem.n_q, problem.n_k)
    # SDPA converts booleans and copies misaligned rows in every call: build an additive mask with rows of 16 entries
    additive = torch.zeros(problem.n_q, -(-problem.n_k // 16) * 16, dtype=problem.dtype, device=device)[:, :problem.n_k]
    return False, additive.masked_fill_(~boolean_mask(problem, device), -torch.inf)


def sdpa(problem, device, backend=None):
    """Return torch's SDPA. `backend` names the backend that the caller's context forces, if any."""
    refuse_packed(problem)
    refuse_beyond_softmax(problem)
    if problem.softcap or problem.sink:
        raise Unsupported("torch's SDPA has no softcap and no sinks")
    causal, mask = sdpa_mask(problem, device, backend)

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=problem.group > 1)

    return attention


def sdpa_choice(problem: Problem, q, k, v) -> str | None:
    """Return the backend that torch's SDPA selects for these tensors; None where a CausalBias selects it."""
    causal, mask = sdpa_mask(problem, q.device)
    if isinstance(mask, CausalBias):
        return None
    choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, enable_gqa=problem.group > 1)
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


def flex(problem, device):
    """Return FlexAttention, compiled for this problem alone, with a block mask for causal and windowed problems."""
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # without a reset the recompilation limit makes later problems fall back to the uncompiled function
    torch._dynamo.reset()
    # the backward pass alone is timed by running it many times on one graph
    functorch.donated_buffer = False
    refuse_packed(problem)
    refuse_beyond_softmax(problem)
    if problem.sink:
        raise Unsupported("a score function of FlexAttention adds no key")
    compiled, block_mask = torch.compile(flex_attention, dynamic=False), None
    options, radius = variants(problem, problem.heads, device), RELATIVE_ENTRIES // 2

    def score_mod(score, batch, head, query, key):
        if problem.softcap:
            score = SOFTCAP * torch.tanh(score / SOFTCAP)
        offset = key - query - problem.shift
        if problem.alibi:
            score = score - options["alibi"][head] * offset.abs()
        if problem.relative:
            score = score + options["relative"][head, offset.clamp(-radius, radius) + radius]
        return score

    if problem.mask != "full":
        (left, right), shift = problem.window, problem.shift

        def mask_mod(batch, head, query, key):
            distance = key - query - shift
            inside = distance <= right if right is not None else distance >= -left
            return inside & (distance >= -left) if left is not None else inside

        block_mask = create_block_mask(mask_mod, None, None, problem.n_q, problem.n_k, device=device)
    return functools.partial(compiled, score_mod=score_mod if options else None, block_mask=block_mask,
                             enable_gqa=problem.group > 1)


def eager(problem, device):
    """Return softmax(Q K^T) V as separate torch operations, or another normalizer's; those of statistics among them."""
    refuse_packed(problem)
    hidden = None if problem.mask == "full" else ~boolean_mask(problem, device)
    bias = formed_bias(problem, device)
    scale, group = problem.d**-0.5, problem.group

    def attention(q, k, v):
        k, v = (x.repeat_interleave(group, -3) if group > 1 else x for x in (k, v))
        s = q @ k.mT * scale
        s = SOFTCAP * torch.tanh(s / SOFTCAP) if problem.softcap else s
        s = s if bias is None else s + bias
        s = s if hidden is None else s.masked_fill(hidden, -torch.inf)
        if problem.normalizer != "softmax":
            return (s.relu() / problem.n_k if problem.normalizer == "relu" else (s - math.log(problem.n_k)).sigmoid()) @ v
        # a sink of 0 is one more score
        p = F.pad(s, (0, 1)).softmax(-1)[..., :-1] if problem.sink else s.softmax(-1)
        if problem.entropy:
            torch.special.entr(p).sum(-1)
        if problem.key_mass:
            p.sum(-2)
        return p @ v

    return attention


def flash_attn(problem, device, module):
    """Return the function of a flash-attn package; versions 2, 3 and 4 share the signature."""
    refuse_beyond_softmax(problem)
    if (problem.mask != "full" or problem.alibi) and problem.shift != problem.n_k - problem.n_q:
        raise Unsupported("flash-attn aligns masks bottom-right, the problem is top-left")
    if problem.sink:
        raise Unsupported("flash-attn has sinks in few of its versions")
    if problem.relative or (problem.alibi and module != "flash_attn"):
        raise Unsupported("flash-attn has ALiBi in version 2 alone, and no table of relative positions")
    options = {"causal": problem.mask == "causal"} | variants(problem, problem.heads, device)
    if problem.alibi:
        options["alibi_slopes"] = options.pop("alibi")
    if problem.mask == "window":
        options["window_size"] = tuple(-1 if side is None else side for side in problem.window)
    if problem.packed:
        return packed(problem, device, importlib.import_module(module).flash_attn_varlen_func, **options)
    function = importlib.import_module(module).flash_attn_func

    def attention(q, k, v):
        # [batch, length, heads, size]
        o = function(q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2), **options)
        return (o[0] if isinstance(o, tuple) else o).transpose(-3, -2)

    return attention


def import_error(module: str) -> str | None:
    """Return the reason why a module cannot be imported, or None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # packages compiled for another torch fail in many ways
        return f"{type(error).__name__}: {error}"
    return None


def package_version(module: str) -> str:
    """Return the distributions that provide a module, with their versions."""
    names = importlib.metadata.packages_distributions().get(module.split(".")[0], [])
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names))) or "unknown"


@functools.cache
def implementations(device_type: str) -> dict[str, Implementation]:
    """Return all implementations by name, ours first; `missing` is set for those that cannot run here."""
    no_gpu = None if device_type == "cuda" else "needs a GPU"
    everything = [
        Implementation("tritonattn", ours, version=tritonattn.__version__),
        Implementation("tritonattn-plain-grad", functools.partial(ours, precise_grad=False), version=tritonattn.__version__),
        Implementation("torch", sdpa),
        *(Implementation(name, functools.partial(sdpa, backend=name), no_gpu if name != "math" else None,
                         context=functools.partial(sdpa_kernel, backend)) for name, backend in BACKENDS.items()),
        Implementation("varlen", varlen, no_gpu),
        Implementation("flex", flex, no_gpu),
        Implementation("eager", eager),
        *(Implementation(name, functools.partial(flash_attn, module=module), no_gpu or import_error(module),
                         package_version(module)) for name, module in FLASH_ATTN.items())]
    return {implementation.name: implementation for implementation in everything}


def select(names: str, device_type: str) -> list[Implementation]:
    """Return ours and the baselines of a comma-separated list, or everything for "all". Raises ValueError."""
    known = implementations(device_type)
    wanted = list(known) if names == "all" else ["tritonattn", *(name for name in names.split(",") if name != "tritonattn")]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--baselines: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return [known[name] for name in wanted]
