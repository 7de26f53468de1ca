"""Eager calls on plain tensors: a call like an earlier one goes from its arguments straight to its plan.

    call_key(tensors, options) -> repeat(key, ...) -> a known call: its plan, without checks, records and torch's dispatcher
                                                   -> None: every check, then first_call(key, ...): the op, and its plan is kept

Tracing, export, functorch, dispatch and function modes, forward-mode derivatives and subclasses of Tensor have no key.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..block_mask import BlockMask
from ..score_function import arguments_of
from . import plan
from .arguments import (
    AUTOCAST_DEVICES,
    N_TENSORS,
    N_WITH_GRADIENTS,
    AttentionInputs,
    lengths_argument,
    restore_shape,
    row_of_heads,
    seed_argument,
    sink_column,
    with_rank,
)
from .custom_op import AttentionBackward, attention_op, keeps_residual, zeros_unless_given

PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
COPIED_TYPES = PLAIN_TYPES | {type(None)}
# a key compares values, so its options must be immutable
OPTION_TYPES = frozenset((type(None), bool, int, float, str))
SETTINGS = 0  # index of the settings of the process in a key
SINK = AttentionInputs._fields.index("sink")
# in the numbers of AttentionInputs
DROPOUT_P, LONGEST_K = (AttentionInputs._fields.index(name) - N_TENSORS for name in ("dropout_p", "longest_k"))


class Call(NamedTuple):
    """A known call: its plan, the numbers of its AttentionInputs, and whether a gradient may be asked for."""

    forward: plan.ForwardPlan
    numbers: tuple
    differentiable: bool


def call_tensors(qkv, bias, of_heads, mask, starts, score_function, dropout_seed, key_lengths) -> tuple[tuple, tuple]:
    """Return the tensor arguments of a call in the order of AttentionInputs, and what names its functions in its key.

    `of_heads` are sink, alibi and relative. A BlockMask stays whole if it was changed.
    """
    masks, mask_payload, of_mask = (mask, None, None), None, ()
    if type(mask) is BlockMask and mask.is_current():
        masks, mask_payload = (mask.mask, mask.kv_blocks, mask.q_blocks), mask.payload
        of_mask = (mask.function, *mask.shape[-2:]) if mask.function is not None else ()
    name, payload = arguments_of(score_function)
    tensors = *qkv, bias, *of_heads, *masks, *starts, payload, mask_payload, dropout_seed, key_lengths
    return tensors, (name, *of_mask)


def sdpa_tensors(query, key, value, attn_mask) -> tuple:
    """Return the same for the arguments of torch's function."""
    additive = isinstance(attn_mask, Tensor) and attn_mask.dtype != torch.bool
    bias, mask = (attn_mask, None) if additive else (None, attn_mask)
    return query, key, value, bias, None, None, None, mask, *(None,) * (N_TENSORS - 8)


def call_key(tensors: tuple, options: tuple) -> tuple | None:
    """Return a key that a call shares with all calls of the same kind, or None where it needs the dispatcher or the checks.

    `tensors` are those of `call_tensors`; `options` everything else that decides what is computed, the function included.
    """
    if not _plain_process():
        return None
    types = tuple(map(type, options))
    *read, seed, key_lengths = tensors
    if not OPTION_TYPES.issuperset(types) or not COPIED_TYPES.issuperset((type(seed), type(key_lengths))):
        return None
    if (signatures := plain_signatures(read)) is None:
        return None
    q = tensors[0]
    if None in signatures[:3] or (settings := plan.settings(q.dtype)) is None:
        return None
    gradients = torch.is_grad_enabled() and [x is not None and x.requires_grad for x in tensors[:N_WITH_GRADIENTS]]
    device = q.device.type
    autocast = (device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)) and torch.get_autocast_dtype(device)
    return settings, options, types, key_lengths is None, gradients and tuple(gradients), autocast, signatures


def plain_signatures(tensors) -> tuple | None:
    """Return the `plan.signature` of tensors that a kernel can read by their pointers, or None if one cannot be read so."""
    signatures = []
    try:
        for x in tensors:
            if x is None:
                signatures.append(None)
            elif type(x) in PLAIN_TYPES and not x.is_neg() and (pointer := x.data_ptr()):
                # plan.signature, inlined, because every microsecond counts here
                signatures.append((x.shape, x.stride(), x.dtype, x.device, pointer % 16))
            else:
                return None
    except RuntimeError:
        # no strides or no storage: sparse, batched by is_grads_batched, all zeros
        return None
    return tuple(signatures)


def _plain_process() -> bool:
    """Return whether nothing in this thread records, transforms or replaces torch's operations."""
    # compilation first: Dynamo cannot trace the others
    return not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
                or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
                or forward_ad._current_level >= 0)


def repeat(key: tuple | None, tensors: tuple) -> tuple | None:
    """Return o, lse, row_max, entropy and key_mass of a call like an earlier one, or None."""
    if key is None or (call := plan.find(key)) is None:
        return None
    q, k, v, bias, sink, alibi, relative, mask, *lists, q_starts, k_starts, payload, mask_payload, seed, key_lengths = tensors
    # every call has its own seed and lengths, to be checked and copied
    seed = seed_argument(call.numbers[DROPOUT_P], seed, q.device)
    if key_lengths is not None:
        batch, n_k = q.shape[:-3], k.shape[-2]
        if q_starts is not None:
            batch, n_k = (q_starts.shape[0] - 1,), call.numbers[LONGEST_K]
        key_lengths = lengths_argument(key_lengths, q, batch, n_k)
    bias, *masks = [x if x is None or x.dim() == q.dim() else with_rank(x, q.dim()) for x in (bias, mask, *lists)]
    sink = None if sink is None else sink_column(sink, q.dim())
    alibi, relative = (None if x is None else row_of_heads(x, q.dim()) for x in (alibi, relative))
    inputs = q, k, v, bias, sink, alibi, relative, *masks, q_starts, k_starts, payload, mask_payload, seed, key_lengths
    if call.differentiable:
        return PlannedAttention.apply(call, *inputs)
    if torch.autograd._profiler_enabled():
        with torch.autograd.profiler.record_function("tritonattn::forward"):
            o, lse, _, _, *computed = call.forward.run(inputs)
    else:
        o, lse, _, _, *computed = call.forward.run(inputs)
    return o, lse, *computed


def first_call(key: tuple | None, tensors: tuple, inputs: AttentionInputs, precise_grad: bool) -> tuple:
    """Return the same of a call whose arguments were checked, by torch's dispatcher, and keep its plan for later ones."""
    o, *rows = attention_op(*inputs, precise_grad=precise_grad)
    outputs = restore_shape(o, rows, *tensors[:3])
    _remember(key, tensors, inputs, precise_grad)
    return outputs


def _remember(key, tensors, inputs, precise_grad):
    """Keep the plan if the kernels read the caller's own tensors."""
    if key is None or plan.find(key) is not None or not _reads_own_tensors(tensors, inputs):
        return
    forward = plan.forward_plan(inputs, keeps_residual(inputs, precise_grad))
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:N_WITH_GRADIENTS])
    # a config may have been pinned or tuned meanwhile
    if plan.settings(inputs.q.dtype) == key[SETTINGS]:
        plan.keep(key, Call(forward, inputs[N_TENSORS:], differentiable))


def _reads_own_tensors(tensors: tuple, inputs: AttentionInputs) -> bool:
    """Return whether the checks left q, k and v as they were, and changed at most the rank of bias, sink and masks."""
    same_layouts = all(x.shape == y.shape and x.stride() == y.stride() for x, y in zip(tensors[:3], inputs))
    # `repeat` treats the sink as the checks do
    others = [x for i, x in enumerate(zip(tensors[:-2], inputs)) if i != SINK]
    return same_layouts and all(x is None or x.data_ptr() == y.data_ptr() for x, y in others)


class PlannedAttention(torch.autograd.Function):
    """custom_op.Attention for a known call. As `forward` takes the context, torch does not inspect its signature per call."""

    @staticmethod
    def forward(ctx, call, *inputs):
        outputs = call.forward.run(inputs)
        ctx.numbers = call.numbers
        ctx.set_materialize_grads(False)
        # as Attention does: a checkpoint compares what the two passes save
        o, lse, statistics, o_residual, row_max, entropy, key_mass = outputs
        ctx.save_for_backward(o if statistics is not None else None, statistics, o_residual, *inputs, entropy)
        if row_max is not None:
            ctx.mark_non_differentiable(row_max)
        return o, lse, row_max, entropy, key_mass

    @staticmethod
    def backward(ctx, do, dlse, _, d_entropy, d_mass):
        o, statistics, *others, entropy = ctx.saved_tensors
        if o is None and do is None:
            # as Attention does
            return (None,) * (1 + N_TENSORS)
        o = do if o is None else o
        dlse, statistics, *cotangents = plan.dense(dlse, statistics, d_entropy, d_mass, entropy)
        tensors = zeros_unless_given(do, o), dlse, o, statistics, *others, *cotangents
        wanted = ctx.needs_input_grad[1:1 + N_WITH_GRADIENTS]
        # hooks may have replaced saved tensors; a gradient of the gradient needs the dispatcher, which raises
        signatures = plain_signatures(tensors) if _plain_process() and not torch.is_grad_enabled() else None
        if signatures is None:
            gradients = AttentionBackward.apply_to(tensors, ctx.numbers, wanted)
        else:
            gradients = plan.backward_plan(tensors, ctx.numbers, wanted, signatures).run(tensors)
        others = (None,) * (N_TENSORS - N_WITH_GRADIENTS)
        return None, *(gradient if want else None for gradient, want in zip(gradients, wanted)), *others
