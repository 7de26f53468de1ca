"""Attention as torch ops, and the only autograd.

    tritonattn::forward   q, k, v -> o, lse, residual          tritonattn::backward  -> dq, dk, dv

The ops are what torch.compile, export and the FLOP counter see; Problem and Config live inside them. Batch
dimensions agree and heads divide when a call comes here: attention.py has seen to it.
"""

import torch

from . import config
from .gpu import TRITON, of
from .problem import Problem

if TRITON:
    from . import launch

torch.library.define("tritonattn::forward", (
    "(Tensor q, Tensor k, Tensor v, float scale, int? left, int? right, bool bottom_right, bool keep_residual)"
    " -> (Tensor, Tensor, Tensor)"))
torch.library.define("tritonattn::backward", (
    "(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor residual,"
    " float scale, int? left, int? right, bool bottom_right, bool[] wanted) -> (Tensor, Tensor, Tensor)"))


def empty_rows(like, width):
    """An empty tensor of like's shape but for the last size, in like's order of dimensions, each row contiguous.

    A [B, H, L, D] view of [B, L, H, D] memory gets a result that lies the same way.
    """
    rows = torch.empty_like(like[..., 0], device="meta")
    strides = [stride * width for stride in rows.stride()]
    return like.new_empty_strided((*like.shape[:-1], width), (*strides, 1))


def empty_results(q, v, keep_residual):
    """o [..., H, L, DV], lse [..., H, L] in float32 (or q's dtype, if that is wider), and o's residual or nothing."""
    o = empty_rows(q, v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return o, lse, torch.empty_like(o) if keep_residual else q.new_empty(0)


def empty_gradients(q, k, v, wanted):
    """Gradients in their inputs' layout; empty where not wanted."""
    return tuple(empty_rows(x, x.shape[-1]) if want else x.new_empty(0) for x, want in zip((q, k, v), wanted))


def _forward(q, k, v, scale, left, right, bottom_right, keep_residual):
    problem = Problem.of(q, k, v, (left, right), bottom_right)
    o, lse, residual = empty_results(q, v, keep_residual)
    kept = residual if keep_residual else None
    chosen = config.find("forward", problem, of(q.device))
    launch.run(launch.forward_call(problem, chosen, scale, q, k, v, o, kept, lse), q.device)
    return o, lse, residual


def _backward(do, dlse, q, k, v, o, lse, residual, scale, left, right, bottom_right, wanted):
    problem, gpu = Problem.of(q, k, v, (left, right), bottom_right), of(q.device)
    dq, dk, dv = empty_gradients(q, k, v, wanted)
    dk_asked, dv_asked = (x if want else None for x, want in zip((dk, dv), wanted[1:]))
    delta = torch.empty_like(lse)
    if wanted[0] or wanted[1]:
        kept = residual if residual.numel() else None
        launch.run(launch.delta_call(problem, config.find("delta", problem, gpu), o, kept, do, dlse, delta), q.device)
    if wanted[0]:
        chosen = config.find("dq", problem, gpu)
        launch.run(launch.dq_call(problem, chosen, scale, q, k, v, do, dq, lse, delta), q.device)
    if wanted[1] or wanted[2]:
        chosen = config.find("dkdv", problem, gpu)
        launch.run(launch.dkdv_call(problem, chosen, scale, q, k, v, do, dk_asked, dv_asked, lse, delta), q.device)
    return dq, dk, dv


torch.library.impl("tritonattn::forward", ("cpu", "cuda"), _forward)
torch.library.impl("tritonattn::backward", ("cpu", "cuda"), _backward)


@torch.library.register_fake("tritonattn::forward")
def _(q, k, v, scale, left, right, bottom_right, keep_residual):
    return empty_results(q, v, keep_residual)


@torch.library.register_fake("tritonattn::backward")
def _(do, dlse, q, k, v, o, lse, residual, scale, left, right, bottom_right, wanted):
    return empty_gradients(q, k, v, wanted)


forward_op, backward_op = torch.ops.tritonattn.forward.default, torch.ops.tritonattn.backward.default


class Attention(torch.autograd.Function):
    """o and lse, with gradients for q, k and v through both."""

    @staticmethod
    def forward(q, k, v, scale, left, right, bottom_right, keep_residual):
        return forward_op(q, k, v, scale, left, right, bottom_right, keep_residual)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, *ctx.options, _ = inputs
        o, lse, residual = output
        ctx.mark_non_differentiable(residual)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, o, lse, residual)

    @staticmethod
    def backward(ctx, do, dlse, _):
        q, k, v, o, lse, residual = ctx.saved_tensors
        if do is None:
            # only lse was used; zeros take no memory
            do = o.new_zeros(()).expand(o.shape)
        wanted = list(ctx.needs_input_grad[:3])
        gradients = AttentionBackward.apply(do, dlse, q, k, v, o, lse, residual, *ctx.options, wanted)
        return *(gradient if want else None for gradient, want in zip(gradients, wanted)), None, None, None, None, None

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError("tritonattn.attention: expected reverse-mode derivatives, got forward mode (jvp)")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _as_batch(Attention, info, in_dims, inputs)


class AttentionBackward(torch.autograd.Function):
    """The gradients; a function of its own so that asking for theirs is an error and not silently wrong."""

    @staticmethod
    def forward(do, dlse, q, k, v, o, lse, residual, scale, left, right, bottom_right, wanted):
        return backward_op(do, dlse, q, k, v, o, lse, residual, scale, left, right, bottom_right, wanted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("tritonattn.attention: expected at most first derivatives, got a second one (a gradient "
                           "penalty or a Hessian); tritonattn.reference.attention has every order")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _as_batch(AttentionBackward, info, in_dims, inputs)


def _as_batch(function, info, in_dims, inputs):
    """vmap: the mapped dimension becomes one more batch dimension, the first. What is absent stays so."""
    def lead(x, dim):
        if not isinstance(x, torch.Tensor) or x.dim() == 1:
            return x
        return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    out = function.apply(*(lead(x, dim) for x, dim in zip(inputs, in_dims)))
    return out, tuple(0 if x.dim() > 1 else None for x in out)


# exported programs call the op itself
torch.library.register_autograd("tritonattn::forward", Attention.backward, setup_context=Attention.setup_context)
torch.library.register_autograd("tritonattn::backward", AttentionBackward.backward,
                                setup_context=AttentionBackward.setup_context)


# opaque to Dynamo, which would trace the backward pass too, and lose its rule for vmap and its error for second derivatives
@torch.compiler.allow_in_graph
def attend(q, k, v, scale, left, right, bottom_right, precise_grad):
    """o and lse. The residual is kept where a gradient may be taken of 16-bit numbers."""
    # a tensor that torch.func has wrapped does not tell whether the one in it requires a gradient
    wanted = any(x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in (q, k, v))
    keep_residual = precise_grad and torch.is_grad_enabled() and wanted and q.dtype.itemsize == 2
    o, lse, _ = Attention.apply(q, k, v, scale, left, right, bottom_right, keep_residual)
    return o, lse


def _register_flop_formulas():
    """Counted as torch counts its own attention: every pair, seen or not."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    def products(q_shape, k_shape, v_shape, of_d, of_dv):
        *batch_heads, n_q, d = q_shape
        pairs = n_q * k_shape[-2]
        for size in batch_heads:
            pairs *= size
        return 2 * pairs * (of_d * d + of_dv * v_shape[-1])

    forward, backward = torch.ops.tritonattn.forward, torch.ops.tritonattn.backward
    if forward not in flop_registry:
        register_flop_formula(forward)(lambda q, k, v, *_, **__: products(q, k, v, 1, 1))
        register_flop_formula(backward)(lambda do, dlse, q, k, v, *_, **__: products(q, k, v, 3, 2))


_register_flop_formulas()
