"""Attention as torch ops, and its autograd.

    tritonattn::forward    AttentionInputs, keep_residual                                   -> o, lse, o_residual, lse_minus_max
    tritonattn::backward   do, dlse, o, lse, o_residual, lse_minus_max, AttentionInputs, wanted         -> dq, dk, dv, dbias

torch.compile, export and the FLOP counter handle the ops; Problem and Config exist only inside them. The arguments are
checked: see arguments.py.
"""

import torch
from torch import Tensor

from ..configs import lookup
from ..gpu import TRITON, gpu_of
from .arguments import AttentionInputs

if TRITON:
    from triton.runtime.errors import OutOfResources

    from . import launch

SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int | None: "int?", bool: "bool"}
INPUTS = ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in AttentionInputs.__annotations__.items())
N_TENSORS = INPUTS.count("Tensor")  # the first fields
N_FIELDS = len(AttentionInputs._fields)
OUTPUTS = "Tensor o, Tensor lse, Tensor o_residual, Tensor lse_minus_max"
FOUR = "(Tensor, Tensor, Tensor, Tensor)"
torch.library.define("tritonattn::forward", f"({INPUTS}, bool keep_residual) -> {FOUR}")
torch.library.define("tritonattn::backward", f"(Tensor do, Tensor? dlse, {OUTPUTS}, {INPUTS}, bool[] wanted) -> {FOUR}")
torch.library.define("tritonattn::keep", "(SymInt[] sizes, float dropout_p, Tensor seed) -> Tensor")


def empty_rows(like, width):
    """Return an empty tensor of like's shape, but `width` columns, in like's order of dimensions, with contiguous rows.

    A [B, H, L, D] view of [B, L, H, D] memory gets a result of the same layout.
    """
    # select needs a column; for a fake tensor it builds no index
    rows = torch.empty_like(like.select(-1, 0) if like.shape[-1] else like.sum(-1), device="meta")
    strides = [stride * width for stride in rows.stride()]
    return like.new_empty_strided((*like.shape[:-1], width), (*strides, 1))


def empty_outputs(q, v, bias, keep_residual):
    """Return empty o [..., H, L, DV], lse [..., H, L] in float32 (or q's dtype, if wider), o_residual and lse_minus_max.

    The last two have no elements where they are not needed.
    """
    o = empty_rows(q, v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    o_residual = torch.empty_like(o) if keep_residual else q.new_empty(0)
    return o, lse, o_residual, q.new_empty(0) if bias is None else torch.empty_like(lse)


def empty_gradients(inputs, wanted):
    """Return empty gradients in their inputs' layout; without elements where not wanted."""
    return tuple(empty_rows(x, x.shape[-1]) if want else inputs[0].new_empty(0) for x, want in zip(inputs, wanted))


def _run(kernel, make_launch, problem, device, *tensors):
    """Run a kernel with its config. Raises RuntimeError, before the kernel runs, where the GPU has too little for it."""
    config = lookup.get_config(kernel, problem, gpu_of(device))
    try:
        launch.run(make_launch(problem, config, *tensors), device)
    except OutOfResources as error:
        raise RuntimeError(f"{kernel}: config {config} needs {error.required} of {error.name}, {gpu_of(device).name} allows "
                           f"{error.limit}, for {problem}; pin a smaller config (tritonattn.pinned)") from error


def _forward(*arguments):
    """Implement tritonattn::forward."""
    inputs, keep_residual = AttentionInputs(*arguments[:-1]), arguments[-1]
    o, lse, o_residual, lse_minus_max = outputs = empty_outputs(inputs.q, inputs.v, inputs.bias, keep_residual)
    record = launch.Outputs(o, lse, (o_residual,) if keep_residual else (), () if inputs.bias is None else (lse_minus_max,))
    _run("forward", launch.forward_launch, inputs.problem, inputs.q.device, inputs, record)
    return outputs


def _backward(do, dlse, o, lse, o_residual, lse_minus_max, *arguments):
    """Implement tritonattn::backward."""
    inputs, wanted = AttentionInputs(*arguments[:-1]), arguments[-1]
    problem, device, bias = inputs.problem, inputs.q.device, inputs.bias
    dq, dk, dv, dbias = gradients = empty_gradients(inputs[:4], wanted)
    delta = torch.empty_like(lse)
    queries = launch.Queries(inputs.q, do, lse, delta, () if bias is None else (lse_minus_max,))

    def run(kernel, make_launch, *tensors):
        _run(kernel, make_launch, problem, device, *tensors)

    if wanted[0] or wanted[1] or (wanted[3] and bias.shape[-1] != 1):
        run("delta", launch.delta_launch, o, o_residual if o_residual.numel() else None, do, dlse, delta)
    if wanted[0]:
        run("dq", launch.dq_launch, inputs, queries, dq)
    if wanted[1] or wanted[2]:
        run("dkdv", launch.dkdv_launch, inputs, queries, dk if wanted[1] else None, dv if wanted[2] else None)
    if wanted[3] and 0 in (lse.numel(), inputs.k.shape[-2]):
        dbias.zero_()
    elif wanted[3] and bias.shape[-1] == 1:
        # a constant added to all scores of a row changes only its lse; the gradient is not finite where lse is not
        rows = torch.where(lse == -torch.inf, 0, lse * 0 if dlse is None else dlse + lse * 0)
        dbias.copy_(rows.unsqueeze(-1).sum_to_size(bias.shape))
    elif wanted[3]:
        run("dbias", launch.dbias_launch, inputs, queries, dbias)
    return gradients


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
def _(do, dlse, o, lse, o_residual, lse_minus_max, q, k, v, bias, *others):
    return empty_gradients((q, k, v, bias), wanted=others[-1])


forward_op, backward_op, keep_op = (getattr(torch.ops.tritonattn, name).default for name in ("forward", "backward", "keep"))


class Attention(torch.autograd.Function):
    """o and lse, with gradients of both for q, k, v and the bias."""

    @staticmethod
    def forward(*inputs):
        return forward_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.numbers = inputs[N_TENSORS:N_FIELDS]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[:N_TENSORS])

    @staticmethod
    def backward(ctx, do, dlse, *_):
        o, *others = ctx.saved_tensors
        if do is None:
            # only lse was used; expanded zeros take no memory
            do = o.new_zeros(()).expand(o.shape)
        wanted = list(ctx.needs_input_grad[:4])
        gradients = AttentionBackward.apply(do, dlse, o, *others, *ctx.numbers, wanted)
        return *(gradient if want else None for gradient, want in zip(gradients, wanted)), *(None,) * (N_FIELDS + 1 - 4)

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError("tritonattn.attention: expected reverse-mode derivatives, got forward mode (jvp)")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(Attention, forward_op, info, in_dims, inputs)


class AttentionBackward(torch.autograd.Function):
    """The gradients. A separate function, so that a second derivative is an error and not silently wrong."""

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
        return _vmap(AttentionBackward, backward_op, info, in_dims, inputs)


def _vmap(function, op, info, in_dims, inputs):
    """Run a function with the mapped dimension as one more batch dimension, the first. None and empty tensors stay as they are.

    With dropout it is a loop, since the weights to drop depend on the batch index that the mapped function has.
    """
    names = [argument.name for argument in op._schema.arguments]

    def lead(x, dim, name):
        if not isinstance(x, torch.Tensor) or (name in ("o_residual", "lse_minus_max") and x.dim() == 1):
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.contiguous() if name == "key_lengths" else x

    if inputs[names.index("seed")] is None:
        out = function.apply(*map(lead, inputs, in_dims, names))
        return out, tuple(0 if x.dim() > 1 else None for x in out)
    results = [function.apply(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(inputs, in_dims)))
               for i in range(info.batch_size)]
    return tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])


# exported programs call the ops directly
torch.library.register_autograd("tritonattn::forward", Attention.backward, setup_context=Attention.setup_context)
torch.library.register_autograd("tritonattn::backward", AttentionBackward.backward,
                                setup_context=AttentionBackward.setup_context)


# opaque to Dynamo, which would trace the backward pass too, and lose its rule for vmap and its error for second derivatives
@torch.compiler.allow_in_graph
def attention_op(q, k, v, bias, *others, precise_grad):
    """Return o and lse. The positional arguments are the fields of AttentionInputs.

    The residual is kept where a gradient of a 16-bit output may be taken.
    """
    # a wrapper of torch.func does not show whether its inner tensor requires a gradient
    tensors = (x for x in (q, k, v, bias) if x is not None)
    wanted = any(x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
    keep_residual = precise_grad and torch.is_grad_enabled() and wanted and q.dtype.itemsize == 2
    return Attention.apply(q, k, v, bias, *others, keep_residual)[:2]


def _register_flop_formulas():
    """Count FLOPs as torch does for its own attention: of every (query, key) pair, masked or not."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    def products(q_shape, k_shape, v_shape, n_d, n_dv):
        *batch_heads, n_q, d = q_shape
        pairs = n_q * k_shape[-2]
        for size in batch_heads:
            pairs *= size
        return 2 * pairs * (n_d * d + n_dv * v_shape[-1])

    forward, backward = torch.ops.tritonattn.forward, torch.ops.tritonattn.backward
    if forward not in flop_registry:
        register_flop_formula(forward)(lambda q, k, v, *_, **__: products(q, k, v, 1, 1))
        # after do, dlse and the four outputs
        register_flop_formula(backward)(lambda *shapes, **_: products(*shapes[6:9], 3, 2))


_register_flop_formulas()
