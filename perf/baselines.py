"""Who is measured: a name, a function of q, k and v, and the reason where there is none.

Inputs are [batch, heads, length, head size], contiguous; who wants another order gets a view of it. Masks are built
once, before any clock runs, in the form that costs a call least.
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
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right

import tritonattn
from tritonattn import Problem, reference

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


class Refused(Exception):
    """A rival does not serve this problem; the text says why."""


class Rival(NamedTuple):
    """`build(problem, device)` gives the function, or raises Refused; it is used inside `around()`."""

    name: str
    build: Callable[[Problem, torch.device], Attention]
    missing: str | None = None  # why it cannot run on this machine at all
    version: str = torch.__version__
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext

    @property
    def identity(self) -> str:
        """Its version, or "missing": another one gives other numbers."""
        return "missing" if self.missing else self.version


def bottom_right(problem: Problem) -> bool:
    return problem.shift != 0


def _align(problem):
    return "bottom_right" if bottom_right(problem) else "top_left"


def _mask(problem, device):
    """Booleans [n_q, n_k]."""
    return reference.visible(problem.n_q, problem.n_k, window=problem.window, align=_align(problem), device=device)


def _bounds(problem):
    """(left, right) as FlashAttention writes them, always aligned bottom-right: -1 is unbounded."""
    if problem.mask != "full" and problem.shift != problem.n_k - problem.n_q:
        raise Refused("its masks are aligned bottom-right, the problem's top-left")
    return tuple(-1 if side is None else side for side in problem.window)


def _room(problem, device, matrices, dtype):
    """Refuse what would hold so many n_q x n_k matrices of every head at once, in this dtype, and not fit.

    Keys and values count too where they are copied: to every query head of a group, or to another dtype.
    """
    numbers = matrices * problem.n_q * problem.n_k
    if problem.group > 1 or dtype != problem.dtype:
        numbers += problem.n_k * (problem.d + problem.dv)
    needed = math.prod(problem.batch) * problem.heads * numbers * dtype.itemsize
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 8 << 30
    if needed > 0.35 * total:
        raise Refused(f"{matrices} matrices of scores, and copies, are {needed / 2**30:.0f} GiB, of {total / 2**30:.0f} GiB")


def ours(problem, device, **options):
    """This library, with the engine and config it would choose."""
    return functools.partial(tritonattn.attention, window=problem.window, align=_align(problem), **options)


def _attn_mask(problem, device, backend=None):
    """(is_causal, attn_mask) of torch's attention: torch's own word for the mask where it has one, else numbers to add."""
    if problem.mask == "full" or (problem.mask == "causal" and problem.shift == 0):
        return problem.mask == "causal", None
    if problem.mask == "causal" and problem.shift > 0 and backend in (None, "flash", "efficient"):
        # these backends align a causal mask bottom-right themselves, and this is how one asks them
        return False, causal_lower_right(problem.n_q, problem.n_k)
    # booleans would be made into numbers within each call, and rows that begin elsewhere would be copied
    addend = torch.zeros(problem.n_q, -(-problem.n_k // 16) * 16, dtype=problem.dtype, device=device)[:, :problem.n_k]
    return False, addend.masked_fill_(~_mask(problem, device), -torch.inf)


def sdpa(problem, device, backend=None):
    """torch's attention; `backend` names the one that it is held to, if it is."""
    if backend == "math":
        # 16-bit numbers are computed in float32
        _room(problem, device, 6, torch.promote_types(problem.dtype, torch.float32))
    causal, mask = _attn_mask(problem, device, backend)

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=problem.group > 1)

    return attention


def sdpa_choice(problem: Problem, q, k, v) -> str:
    """The backend that torch's attention picks for such tensors, by the functions that decide it."""
    grouped = problem.group > 1
    causal, mask = _attn_mask(problem, q.device)
    if isinstance(mask, CausalBias):
        asked = SDPAParams(q, k, v, None, 0.0, False, grouped)
        if can_use_flash_attention(asked):
            return "flash"
        if can_use_efficient_attention(asked):
            return "efficient"
        mask = _mask(problem, q.device)
    choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, enable_gqa=grouped)
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


def flex(problem, device):
    """FlexAttention, compiled for this problem alone; windows are a block mask."""
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # one graph per problem, or the limit of recompilations would send later ones to the uncompiled function
    torch._dynamo.reset()
    # a backward pass that is timed alone is run many times on what its forward pass left
    functorch.donated_buffer = False
    compiled, block_mask = torch.compile(flex_attention, dynamic=False), None
    if problem.mask != "full":
        (left, right), shift = problem.window, problem.shift

        def sees(batch, head, query, key):
            distance = key - query - shift
            seen = distance <= right if right is not None else distance >= -left
            return seen & (distance >= -left) if left is not None else seen

        block_mask = create_block_mask(sees, None, None, problem.n_q, problem.n_k, device=device)
    return functools.partial(compiled, block_mask=block_mask, enable_gqa=problem.group > 1)


def eager(problem, device):
    """softmax(Q K^T) V, one torch function after the other."""
    _room(problem, device, 4, problem.dtype)
    hidden = None if problem.mask == "full" else ~_mask(problem, device)
    scale, group = problem.d**-0.5, problem.group

    def attention(q, k, v):
        k, v = (x.repeat_interleave(group, -3) if group > 1 else x for x in (k, v))
        s = q @ k.mT * scale
        s = s if hidden is None else s.masked_fill(hidden, -torch.inf)
        return s.softmax(-1) @ v

    return attention


def _by_length(function):
    """A function of [batch, length, heads, size], called with [batch, heads, length, size] as it lies."""
    def attention(q, k, v):
        o = function(q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2))
        return (o[0] if isinstance(o, tuple) else o).transpose(-3, -2)

    return attention


def flash_attn(problem, device, module):
    """FlashAttention's own package; versions 2, 3 and 4 share the signature."""
    bounds, function = _bounds(problem), importlib.import_module(module).flash_attn_func
    causal = problem.mask == "causal"
    window = {} if problem.mask != "window" else {"window_size": bounds}
    return _by_length(functools.partial(function, causal=causal, **window))


def xformers(problem, device):
    """xFormers' memory-efficient attention."""
    import xformers.ops as ops
    from xformers.ops import fmha

    if problem.mask == "full":
        bias = None
    elif problem.mask == "window":
        raise Refused("a window bounded on the left is not asked of it here")
    else:
        bias = fmha.attn_bias.LowerTriangularFromBottomRightMask() if bottom_right(problem) else ops.LowerTriangularMask()
    group = problem.group

    def attention(q, k, v):
        if group > 1:
            q = q.unflatten(2, (-1, group))
            k, v = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k, v))
        o = ops.memory_efficient_attention(q, k, v, attn_bias=bias)
        return o.flatten(2, 3) if group > 1 else o

    return _by_length(attention)


def _imported(module) -> str | None:
    """Why a module cannot be used here; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # compiled packages for another torch fail in many ways, and the reason is kept
        return f"{type(error).__name__}: {error}"
    return None


def _version(module) -> str:
    """The packages that provide a module, with their versions."""
    found = importlib.metadata.packages_distributions().get(module.split(".")[0], [])
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(found))) or "unknown"


def _package(name, build, module, missing) -> Rival:
    """A rival that is a package of its own; `missing` says why it cannot run even if it is there."""
    missing = missing or _imported(module)
    return Rival(name, build, missing, "" if missing else _version(module))


@functools.cache
def everyone(device_type: str) -> dict[str, Rival]:
    """All contenders by name, in the order of tables; those that cannot run here say why."""
    no_gpu = None if device_type == "cuda" else "needs a GPU"
    mine = [Rival(name, functools.partial(ours, **options), version=tritonattn.__version__)
            for name, options in (("tritonattn", {}), ("tritonattn-plain-grad", {"precise_grad": False}))]
    forced = [Rival(name, functools.partial(sdpa, backend=name), no_gpu if name != "math" else None,
                    around=functools.partial(sdpa_kernel, backend)) for name, backend in BACKENDS.items()]
    modules = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute"}
    published = [_package(name, functools.partial(flash_attn, module=module), module, no_gpu)
                 for name, module in modules.items()]
    found = [*mine, Rival("torch", sdpa), *forced, Rival("flex", flex, no_gpu), Rival("eager", eager), *published,
             _package("xformers", xformers, "xformers.ops", no_gpu)]
    return {rival.name: rival for rival in found}


def chosen(names: str, device_type: str) -> list[Rival]:
    """Rivals named "all", or some after one another with commas; ours is always among them."""
    known = everyone(device_type)
    wanted = list(known) if names == "all" else ["tritonattn", *(name for name in names.split(",") if name != "tritonattn")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"rivals: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return [known[name] for name in wanted]
