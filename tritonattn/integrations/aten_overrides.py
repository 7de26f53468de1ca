"""The deeper route: ours in the place of torch's operators, where C++ comes by as well.

    torch._C._nn.scaled_dot_product_attention, from Python or C++
      CUDA   aten::_scaled_dot_product_flash_attention, _efficient_attention, _cudnn_attention, each with its _backward
      CPU    aten::_scaled_dot_product_flash_attention_for_cpu with its _backward (in Triton's interpreter)
    the C++ fast path of torch's multi-head attention
             aten::_native_multi_head_attention

torch chooses among its kernels first, so the route serves what torch has a fused kernel for, and sdpa_kernel allows. What
torch gives to its "math" kernel never comes here: float64 on a GPU, dropout and masks with gradients on the CPU, and sizes
that no fused kernel takes. Left alone as well:

    aten::_flash_attention_forward, _efficient_attention_forward   sequences packed into one (varlen_attn), and nested tensors,
                                                                   which have no kernel of ours; CausalBias, bottom-right, comes
                                                                   by the former only in the head sizes of efficient attention
    the NestedTensor kernels of all these operators                for the same reason
    aten::scaled_dot_product_attention                             it is a composite: Inductor decomposes it, override or not
    aten::_fused_sdp_choice                                        C++ asks the device's stub, not the dispatcher

An operator returns no more than its schema has. What our backward pass wants besides (the residual of a 16-bit output, the
excess of lse with a bias, the seed of dropout) lies in the memory behind lse, out of its bounds. Where that has been copied
alone, to the CPU and back say, gradients are as exact as without, and the seed is found where torch keeps its own. Compiled
flash attention is not told whether a gradient will be taken, and keeps the seed alone.
"""

import collections
import math
import time
import warnings

import torch
import torch.nn.functional as F

from ..attention import scaled_dot_product_attention as serve
from ..runtime.arguments import AttentionInputs
from ..runtime.custom_op import backward_op, forward_op

DEFAULTS = None, True, True, None  # mask, need_weights, average_attn_weights and mask_type of _native_multi_head_attention
MARK = 0x7472_6974_6F6E            # torch has the offset of its random numbers here, which is smaller
ALIGNED = 16                       # bytes
GRACE = 60.0                       # seconds
# the dispatcher does not wait for threads that are about to call a kernel when it drops it: (when, kernels) dropped lately
_retired = collections.deque()


class Overrides:
    """Python functions in the place of torch's kernels for some operators, until `remove`.

    Each is called as function(original, *arguments) and may call `original`, torch's kernel, with the same arguments.
    """

    def __init__(self, functions, devices):
        """functions: by the operator's name; devices: the types of devices whose kernels they replace."""
        self._library, self._kernels = torch.library.Library("aten", "IMPL"), []
        for device in devices:
            for name, function in functions.items():
                theirs = None
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", device.upper()):
                    theirs = torch.library.get_kernel(f"aten::{name}", device.upper())
                # in the interpreter, the operators of GPUs are on the CPU too
                if theirs is not None or device == "cpu":
                    self._replace(name, theirs, function, device.upper())

    def _replace(self, name, theirs, function, key):
        def ours(keys, *arguments, **options):
            def original():
                if theirs is None:
                    raise NotImplementedError(f"aten::{name}: torch has no kernel of it for {key}")
                return theirs.call_boxed(keys, *arguments, **options)

            return function(original, *arguments, **options)

        with warnings.catch_warnings():
            # this is what is meant
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            self._library.impl(name, ours, key, with_keyset=True)
        self._kernels.append(torch.library.get_kernel(f"aten::{name}", key))

    def remove(self):
        """Torch's kernels are back. Calling it again does nothing."""
        now = time.monotonic()
        _retired.append((now, self._kernels))
        while _retired[0][0] < now - GRACE:
            _retired.popleft()
        self._library._destroy()


def fast_path(devices, settled) -> Overrides:
    """Let the C++ fast path of nn.MultiheadAttention and nn.TransformerEncoderLayer attend with ours.

    Both come to one operator, self-attention [B, L, E] with its projections. settled(q, k, v, mask) tells whether ours serves
    a call. Dense tensors only: nested ones have kernels of their own, and keep them. So does what wants the weights, which
    exist in no fused kernel.
    """
    def attention(original, query, key, value, width, heads, *rest):
        in_weight, in_bias, out_weight, out_bias, mask, need_weights, _, mask_type = (*rest, *DEFAULTS[len(rest) - 4:])
        if need_weights or query is not key or query is not value:
            return original()
        q, k, v = F.linear(query, in_weight, in_bias).unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else ~mask.to(torch.bool)
        if mask_type == 1:
            seen = seen[:, None, None, :]  # a key is hidden from all; 0 is one mask [L, L], 2 one [B, H, L, L]
        if not settled(q, k, v, seen):
            return original()
        out = serve(q, k, v, seen).transpose(1, 2).flatten(-2)
        return F.linear(out, out_weight, out_bias), query.new_empty(0)

    return Overrides({"_native_multi_head_attention": attention}, devices)


class Fused:
    """Torch's fused kernels are ours, until `remove`.

    settled(q, k, v, bias, dropout_p, is_causal, scale=scale, possible=possible) tells whether ours serves a call, and counts
    it; fits(q, k, v, bias) why it could not, or None. `remove` puts torch's back; but the backward passes only if none of
    ours may come that dropped weights: torch's would drop others.
    """

    _backward = None  # the overrides of the backward passes, while a pass of ours may come that dropped weights
    _dropped = False
    _on = False       # whether the forward passes are ours; where not, of backward passes only those that ours has begun

    def __init__(self, devices, settled, fits):
        kinds = {"_scaled_dot_product_flash_attention": Flash, "_scaled_dot_product_efficient_attention": Efficient,
                 "_scaled_dot_product_cudnn_attention": Cudnn, "_scaled_dot_product_flash_attention_for_cpu": Cpu}
        kinds = {name: kind(settled, fits) for name, kind in kinds.items()}
        if Fused._backward is None:
            Fused._backward = Overrides({f"{name}_backward": kind.backward for name, kind in kinds.items()}, devices)
        self._forward = Overrides({name: kind.forward for name, kind in kinds.items()}, devices)
        Fused._on = True

    def remove(self):
        self._forward.remove()
        Fused._on = False
        if Fused._backward is not None and not Fused._dropped:
            Fused._backward.remove()
            Fused._backward = None


class Kernel:
    """One of torch's operators and its backward pass, as ours: what their signatures and their results have in common."""

    bottom_right = False  # where is_causal has the last query and the last key coincide
    blind = math.inf      # lse of a row that sees nothing, from which torch's backward pass makes gradients of 0, as does ours
    drops = True

    def __init__(self, settled, fits):
        self._settled, self._fits = settled, fits

    def _possible(self, q, k, v, bias, dropout_p, causal):
        """Whether ours has such a call at all; it depends on nothing but the arguments, which the backward pass has too."""
        if any((x.dtype, x.device) != (q.dtype, q.device) for x in (k, v)) or (bias is not None and bias.device != q.device):
            return False
        if any(x.dim() != 4 or x.numel() == 0 for x in (q, k, v)) or not q.shape[0] == k.shape[0] == v.shape[0]:
            return False
        if k.shape[:3] != v.shape[:3] or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3] or (bias is not None and causal):
            return False
        if bias is not None and (bias.dtype not in (torch.float32, q.dtype) or bias.dim() not in (2, 4)):
            return False
        if torch.version.hip and self.bottom_right and causal and q.shape[2] != k.shape[2]:
            return False  # AMD's kernel has its own mind about it
        return (self.drops or not dropout_p) and self._fits(q, k, v, bias) is None

    def _inputs(self, tensors, seed, dropout_p, causal, scale):
        q, k, v, bias = tensors
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        return AttentionInputs(q, k, v, _in_pairs(bias), seed=seed, scale=scale, right=0 if causal else None,
                               bottom_right=self.bottom_right, dropout_p=dropout_p)

    def attend(self, tensors, dropout_p, causal, scale, graded):
        """o, lse [B, H, L], the seed and what belongs behind lse; None where the call is torch's.

        tensors: q, k, v, bias; graded: whether a gradient is certain to be taken.
        """
        q, *_, bias = tensors
        if not self._settled(*tensors, dropout_p, causal, scale=scale, possible=self._possible(*tensors, dropout_p, causal)):
            return None
        seed = torch.randint(2**62, (1,), device=q.device) if dropout_p else None
        Fused._dropped |= bool(dropout_p)
        inputs = self._inputs(tensors, seed, dropout_p, causal, scale)
        o, lse, residual, excess = forward_op(*inputs, graded and q.dtype.itemsize == 2)
        if bias is not None or (causal and self.bottom_right and q.shape[2] > inputs.k.shape[2]):
            # rows that see nothing; the backward pass may be torch's
            lse = lse.masked_fill(lse == -math.inf, self.blind)
        others = [x for x in (excess, residual) if x.numel()] if graded else []
        return o, lse, seed, others + ([seed] if dropout_p else [])

    def gradients(self, do, tensors, results, random, dropout_p, causal, scale, wanted=(True, True, True, False)):
        """dq, dk, dv, dbias; None where the backward pass is torch's.

        results: o, and lse [B, H, L] with whatever torch's operator has besides; random: torch's two, or None.
        """
        (q, *_, bias), (o, lse) = tensors, results
        if not (Fused._on or dropout_p) or not self._possible(*tensors, dropout_p, causal):
            return None
        excess, residual, seed = self._left(tensors, lse, dropout_p)
        if dropout_p and seed is None and (seed := _seed_of(*random)) is None:
            return None
        if bias is not None and excess is None:
            excess = q.new_zeros(q.shape[:3], dtype=lse.dtype)
        excess, residual = (q.new_empty(0) if x is None else x for x in (excess, residual))
        lse = lse.reshape(*lse.shape[:3])[..., :q.shape[2]]
        inputs = self._inputs(tensors, seed, dropout_p, causal, scale)
        return backward_op(do, None, o, lse, residual, excess, *inputs, list(wanted))

    def _left(self, tensors, lse, dropout_p):
        """excess, residual and seed from behind lse, each of them None where it is not there."""
        q, _, v, bias = tensors
        kinds = {}
        if bias is not None:
            kinds["excess"] = q.shape[:3], lse.dtype
        if q.dtype.itemsize == 2:
            kinds["residual"] = (*q.shape[:3], v.shape[3]), q.dtype
        if dropout_p:
            kinds["seed"] = (1,), torch.int64
        # all of it, or where no gradient was certain the seed alone
        for names in (list(kinds), ["seed"] if dropout_p else []):
            if names and (found := _behind(lse, [kinds[name] for name in names])):
                return tuple(dict(zip(names, found)).get(name) for name in ("excess", "residual", "seed"))
        return None, None, None


def _in_pairs(bias):
    return None if bias is None else bias[(None,) * (4 - bias.dim())]


def _sizes(tensors):
    """Bytes of each of these (shape, dtype), and of the gap behind it."""
    return [-(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED for shape, dtype in tensors]


def _before(lse, others):
    """lse, with the others in the memory behind it; in lse's order of dimensions, the others contiguous."""
    if not others:
        return lse
    places = [((lse.numel(),), lse.dtype), *((x.shape, x.dtype) for x in others)]
    sizes = _sizes(places)
    # one gap more than torch would have, so that it is seen to be ours
    memory = torch.empty(sum(sizes) + ALIGNED, dtype=torch.uint8, device=lse.device)
    for (shape, dtype), x, start in zip(places[1:], others, [sum(sizes[:n]) for n in range(1, len(sizes))]):
        memory[start:start + x.nbytes].view(dtype).view(shape).copy_(x)
    front = lse.new_empty(0).set_(memory.untyped_storage(), 0, lse.shape, lse.stride())
    return front.copy_(lse)


def _behind(lse, places):
    """The tensors of these (shape, dtype) that `_before` put behind lse, or [] where lse is torch's or a copy."""
    sizes = _sizes([((lse.numel(),), lse.dtype), *places])
    if lse.untyped_storage().nbytes() != sum(sizes) + ALIGNED or lse.storage_offset():
        return []
    memory = torch.empty(0, dtype=torch.uint8, device=lse.device).set_(lse.untyped_storage())
    starts = [sum(sizes[:n]) for n in range(1, len(sizes))]
    return [memory[start:start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for (shape, dtype), start in zip(places, starts)]


def _graded(*tensors):
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _by_rows(x):
    """[B, H, L, D] as [B, L, H, D] lies in memory."""
    return None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2)


def _random_state(like, seed, first, second, dtype):
    """The seed and the mark where torch's operator has its random state, of these shapes; nothing where nothing is dropped."""
    if seed is None:
        return like.new_empty(first, dtype=dtype), like.new_empty(second, dtype=dtype)
    state = torch.full((math.prod(first),), MARK, dtype=torch.int64, device=like.device)
    state[:1] = seed
    return state.view(dtype).view(first), torch.full(second, MARK, dtype=torch.int64, device=like.device).view(dtype)


def _seed_of(first, second):
    """The seed, if `_random_state` made these; None if torch did. It waits for the device."""
    return first.view(torch.int64).reshape(-1)[:1] if second.view(torch.int64).item() == MARK else None


class Cpu(Kernel):
    """aten::_scaled_dot_product_flash_attention_for_cpu; lse is [B, H, L] as [B, L, H] lies in memory."""

    drops = False
    blind = 0.0

    def forward(self, original, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        found = self.attend((q, k, v, attn_mask), dropout_p, is_causal, scale, _graded(q, k, v))
        if found is None:
            return original()
        o, lse, _, others = found
        return o, _before(lse.transpose(1, 2).contiguous().transpose(1, 2), others)

    def backward(self, original, do, q, k, v, o, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
        found = self.gradients(do, (q, k, v, attn_mask), (o, lse), None, dropout_p, is_causal, scale)
        return original() if found is None else tuple(map(_by_rows, found[:3]))


class Flash(Kernel):
    """aten::_scaled_dot_product_flash_attention; lse is [B, H, L], is_causal aligned bottom-right."""

    bottom_right = True

    def forward(self, original, q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        found = None if return_debug_mask else self.attend((q, k, v, None), dropout_p, is_causal, scale, _graded(q, k, v))
        if found is None:
            return original()
        o, lse, seed, others = found
        shapes = ((), (), torch.int64) if torch.version.hip else ((2,), (), torch.uint64)
        state = _random_state(q, seed, *shapes)
        return o, _before(lse, others), None, None, q.shape[2], k.shape[2], *state, q.new_empty(0)

    def backward(self, original, do, q, k, v, o, lse, *rest, scale=None):
        dropout_p, is_causal, *random = rest[4:]  # after cum_seq_q, cum_seq_k, max_q and max_k
        found = self.gradients(do, (q, k, v, None), (o, lse), random, dropout_p, is_causal, scale)
        return original() if found is None else tuple(found[:3])


class Efficient(Kernel):
    """aten::_scaled_dot_product_efficient_attention; lse is [B, H, L up to the next multiple of 32], or [B, H, 0]."""

    def forward(self, original, q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        found = self.attend((q, k, v, attn_bias), dropout_p, is_causal, scale, compute_log_sumexp)
        if found is None:
            return original()
        o, lse, seed, others = found
        missing = 0 if torch.version.hip else -lse.shape[2] % 32
        lse = _before(F.pad(lse, (0, missing), value=math.inf), others) if compute_log_sumexp else lse[..., :0]
        return _by_rows(o), lse, *_random_state(q, seed, (), (), torch.int64)

    def backward(self, original, do, q, k, v, attn_bias, o, lse, *rest, scale=None):
        *random, dropout_p, wanted, is_causal = (*rest, False)[:5]
        found = self.gradients(do, (q, k, v, attn_bias), (o, lse), random, dropout_p, is_causal, scale,
                               [want and (x is not None) for want, x in zip(wanted, (q, k, v, attn_bias))])
        if found is None:
            return original()
        *found, dbias = (x if want and x.numel() else None for x, want in zip(found, wanted))
        if dbias is not None and dbias.shape[-1] % 16:
            # where torch has it: in rows of whole groups of sixteen
            wide = dbias.new_empty(*dbias.shape[:-1], dbias.shape[-1] + -dbias.shape[-1] % 16)
            dbias = wide[..., :dbias.shape[-1]].copy_(dbias)
        return *map(_by_rows, found), dbias


class Cudnn(Kernel):
    """aten::_scaled_dot_product_cudnn_attention; lse is [B, H, L, 1]."""

    def forward(self, original, q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
                return_debug_mask=False, *, scale=None):
        found = None
        if not return_debug_mask:
            found = self.attend((q, k, v, attn_bias), dropout_p, is_causal, scale, compute_log_sumexp)
        if found is None:
            return original()
        o, lse, seed, others = found
        state = _random_state(q, seed, (), (), torch.int64)
        return o, _before(lse.unsqueeze(-1), others), None, None, q.shape[2], k.shape[2], *state, None

    def backward(self, original, do, q, k, v, o, lse, *rest, scale=None):
        first, second, attn_bias, _, _, _, _, dropout_p, is_causal = rest
        found = self.gradients(do, (q, k, v, attn_bias), (o, lse), (first, second), dropout_p, is_causal, scale)
        return original() if found is None else tuple(found[:3])
