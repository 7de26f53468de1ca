"""Attention as torch ops, and the only autograd.

    tritonattn::forward   q, k, v, bias, mask -> o, lse, o_residual, lse_minus_max     tritonattn::backward  -> dq, dk, dv, dbias

The ops are what torch.compile, export and the FLOP counter see; Problem and Config live inside them. Batch
dimensions agree and heads divide when a call comes here: attention.py has seen to it.
"""

import itertools

import torch

from ..configs import lookup
from ..gpu import TRITON, of

if TRITON:
    from triton.runtime.errors import OutOfResources

    from . import launch

# GIVEN and OPTIONS are the fields of launch.AttentionInputs
OPTIONS = "float scale, int? left, int? right, bool bottom_right, float dropout_p"
GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? query_lists, Tensor? key_lists, "
GIVEN += "Tensor? seed, Tensor? key_lengths"
FIELDS = ("q", "k", "v", "bias", "mask", "query_lists", "key_lists", "seed", "key_lengths")
LEFT = "Tensor o, Tensor lse, Tensor o_residual, Tensor lse_minus_max"
torch.library.define("tritonattn::forward", f"({GIVEN}, {OPTIONS}, bool keep_residual) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define("tritonattn::backward", f"(Tensor do, Tensor? dlse, {GIVEN}, {LEFT}, {OPTIONS}, bool[] wanted)"
                     " -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define("tritonattn::keep", "(SymInt[] sizes, float dropout_p, Tensor seed) -> Tensor")


def empty_rows(like, width):
    """An empty tensor of like's shape but for the last size, in like's order of dimensions, each row contiguous.

    A [B, H, L, D] view of [B, L, H, D] memory gets a result that lies the same way.
    """
    # without columns there is no order to keep; and a fake tensor knows select, where it would build an index
    rows = torch.empty_like(like.select(-1, 0) if like.shape[-1] else like.sum(-1), device="meta")
    strides = [stride * width for stride in rows.stride()]
    return like.new_empty_strided((*like.shape[:-1], width), (*strides, 1))


def empty_outputs(q, v, bias, keep_residual):
    """o [..., H, L, DV], lse [..., H, L] in float32 (or q's dtype, if wider), o's residual and lse's excess or nothing."""
    o = empty_rows(q, v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    o_residual = torch.empty_like(o) if keep_residual else q.new_empty(0)
    return o, lse, o_residual, q.new_empty(0) if bias is None else torch.empty_like(lse)


def empty_gradients(inputs, wanted):
    """Gradients in their inputs' layout; empty where not wanted."""
    return tuple(empty_rows(x, x.shape[-1]) if want else inputs[0].new_empty(0) for x, want in zip(inputs, wanted))


def _run(kernel, call, problem, device, *tensors):
    """One kernel with the config that is found for it. RuntimeError: the GPU has too little for that; it has not run then."""
    chosen = lookup.get_config(kernel, problem, of(device))
    try:
        launch.run(call(problem, chosen, *tensors), device)
    except OutOfResources as error:
        taken = f"{error.required} of {error.limit} ({error.name})"
        raise RuntimeError(f"{kernel}: expected a config that fits {of(device).name}, got {chosen}, which takes {taken}, "
                           f"for {problem}") from error


def _forward(*arguments):
    """The op: a launch.AttentionInputs, spread out, and whether o's residual is kept."""
    inputs, keep_residual = launch.AttentionInputs(*arguments[:-1]), arguments[-1]
    problem, device = inputs.problem, inputs.q.device
    o, lse, o_residual, lse_minus_max = found = empty_outputs(inputs.q, inputs.v, inputs.bias, keep_residual)
    results = launch.Outputs(o, lse, (o_residual,) if keep_residual else (), () if inputs.bias is None else (lse_minus_max,))
    _run("forward", launch.forward_launch, problem, device, inputs, results)
    return found


def _backward(do, dlse, *arguments):
    """The op: a launch.AttentionInputs, spread out around what the forward pass left, and which gradients are wanted."""
    given, (o, lse, o_residual, lse_minus_max), (*numbers, wanted) = arguments[:9], arguments[9:13], arguments[13:]
    inputs = launch.AttentionInputs(*given, *numbers)
    problem, device, bias = inputs.problem, inputs.q.device, inputs.bias
    dq, dk, dv, dbias = found = empty_gradients(given[:4], wanted)
    delta = torch.empty_like(lse)
    queries = launch.Queries(inputs.q, do, lse, delta, () if bias is None else (lse_minus_max,))

    def run(kernel, call, *tensors):
        _run(kernel, call, problem, device, *tensors)

    if wanted[0] or wanted[1] or (wanted[3] and bias.shape[-1] != 1):
        run("delta", launch.delta_launch, o, o_residual if o_residual.numel() else None, do, dlse, delta)
    if wanted[0]:
        run("dq", launch.dq_launch, inputs, queries, dq)
    if wanted[1] or wanted[2]:
        run("dkdv", launch.dkdv_launch, inputs, queries, dk if wanted[1] else None, dv if wanted[2] else None)
    if wanted[3] and 0 in (lse.numel(), inputs.k.shape[-2]):
        dbias.zero_()
    elif wanted[3] and bias.shape[-1] == 1:
        # what all scores of a row share changes nothing but its log-sum-exp; where that is not finite, nor is the gradient
        rows = torch.where(lse == -torch.inf, 0, lse * 0 if dlse is None else dlse + lse * 0)
        dbias.copy_(rows.unsqueeze(-1).sum_to_size(bias.shape))
    elif wanted[3]:
        run("dbias", launch.dbias_launch, inputs, queries, dbias)
    return found


torch.library.impl("tritonattn::forward", ("cpu", "cuda"), _forward)
torch.library.impl("tritonattn::backward", ("cpu", "cuda"), _backward)


def _keep(sizes, dropout_p, seed):
    keep = seed.new_empty(sizes, dtype=torch.uint8)
    launch.run(launch.keep_launch(keep, launch.dropout_record(dropout_p, seed)), seed.device)
    return keep.to(torch.bool)


torch.library.impl("tritonattn::keep", ("cpu", "cuda"), _keep)


@torch.library.register_fake("tritonattn::keep")
def _(sizes, dropout_p, seed):
    return seed.new_empty(sizes, dtype=torch.bool)


@torch.library.register_fake("tritonattn::forward")
def _(q, k, v, bias, *others):
    return empty_outputs(q, v, bias, keep_residual=others[-1])


@torch.library.register_fake("tritonattn::backward")
def _(do, dlse, q, k, v, bias, *others):
    return empty_gradients((q, k, v, bias), wanted=others[-1])


forward_op, backward_op, keep_op = (getattr(torch.ops.tritonattn, name).default for name in ("forward", "backward", "keep"))


class Attention(torch.autograd.Function):
    """o and lse, with gradients for q, k, v and the bias through both."""

    @staticmethod
    def forward(*inputs):
        return forward_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.options = inputs[:9], inputs[9:-1]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, do, dlse, *_):
        *tensors, o, lse, o_residual, lse_minus_max = ctx.saved_tensors
        if do is None:
            # only lse was used; zeros take no memory
            do = o.new_zeros(()).expand(o.shape)
        wanted = list(ctx.needs_input_grad[:4])
        gradients = AttentionBackward.apply(do, dlse, *tensors, o, lse, o_residual, lse_minus_max, *ctx.options, wanted)
        return *(gradient if want else None for gradient, want in zip(gradients, wanted)), *(None,) * 11

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError("tritonattn.attention: expected reverse-mode derivatives, got forward mode (jvp)")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(Attention, info, in_dims, inputs)


class AttentionBackward(torch.autograd.Function):
    """The gradients; a function of its own so that asking for theirs is an error and not silently wrong."""

    @staticmethod
    def forward(*inputs):
        return backward_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("tritonattn.attention: expected at most first derivatives, got a second one (a gradient "
                           "penalty or a Hessian); tritonattn.reference.attention has every order")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(AttentionBackward, info, in_dims, inputs)


def _vmap(function, info, in_dims, inputs):
    """vmap: the mapped dimension becomes one more batch dimension, the first. What is absent, or empty, stays so.

    With dropout it is a loop: what is dropped depends on a pair's batch, which is that of the function that is mapped.
    """
    names = FIELDS if function is Attention else ("do", "dlse", *FIELDS[:9], "o", "lse", "o_residual", "lse_minus_max")

    def lead(x, dim, name=None):
        if not isinstance(x, torch.Tensor) or (name in ("o_residual", "lse_minus_max") and x.dim() == 1):
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.contiguous() if name == "key_lengths" else x

    if inputs[names.index("seed")] is None:
        out = function.apply(*itertools.starmap(lead, itertools.zip_longest(inputs, in_dims, names[:len(inputs)])))
        return out, tuple(0 if x.dim() > 1 else None for x in out)
    found = [function.apply(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(inputs, in_dims)))
             for i in range(info.batch_size)]
    return tuple(map(torch.stack, zip(*found))), (0,) * len(found[0])


# exported programs call the op itself
torch.library.register_autograd("tritonattn::forward", Attention.backward, setup_context=Attention.setup_context)
torch.library.register_autograd("tritonattn::backward", AttentionBackward.backward,
                                setup_context=AttentionBackward.setup_context)


# opaque to Dynamo, which would trace the backward pass too, and lose its rule for vmap and its error for second derivatives
@torch.compiler.allow_in_graph
def attention_op(q, k, v, bias, *others, precise_grad):
    """o and lse; the arguments are the op's.

    The residual is kept where a gradient may be taken of 16-bit numbers.
    """
    # a tensor that torch.func has wrapped does not tell whether the one in it requires a gradient
    tensors = (x for x in (q, k, v, bias) if x is not None)
    wanted = any(x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
    keep_residual = precise_grad and torch.is_grad_enabled() and wanted and q.dtype.itemsize == 2
    return Attention.apply(q, k, v, bias, *others, keep_residual)[:2]


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
