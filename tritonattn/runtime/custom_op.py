"""Attention as torch ops, and its autograd.

    tritonattn::forward    AttentionInputs, keep_residual                                   -> o, lse, statistics, o_residual
    tritonattn::backward   do, dlse, o, statistics, o_residual, AttentionInputs, wanted        -> dq, dk, dv, dbias, dsink,
                                                                                               dalibi, drelative

torch.compile, export and the FLOP counter handle the ops; Problem and Config exist only inside them. The arguments are
checked: see arguments.py.
"""

import torch
from torch import SymInt, Tensor

from ..gpu import TRITON
from . import plan
from .arguments import N_TENSORS, N_WITH_GRADIENTS, AttentionInputs

if TRITON:
    from . import launch

SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", float | None: "float?", int | None: "int?",
                SymInt | None: "SymInt?", bool: "bool"}
INPUTS = ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in AttentionInputs.__annotations__.items())
N_FIELDS = len(AttentionInputs._fields)
OUTPUTS = "Tensor o, Tensor statistics, Tensor o_residual"  # those that the backward pass reads
FOUR_TENSORS = "(Tensor, Tensor, Tensor, Tensor)"
GRADIENTS = f"({', '.join(['Tensor'] * N_WITH_GRADIENTS)})"
torch.library.define("tritonattn::forward", f"({INPUTS}, bool keep_residual) -> {FOUR_TENSORS}")
torch.library.define("tritonattn::backward", f"(Tensor do, Tensor? dlse, {OUTPUTS}, {INPUTS}, bool[] wanted) -> {GRADIENTS}")
torch.library.define("tritonattn::keep", "(SymInt[] sizes, float dropout_p, Tensor seed) -> Tensor")


def _forward(*arguments):
    """Implement tritonattn::forward."""
    inputs, keep_residual = AttentionInputs(*arguments[:-1]), arguments[-1]
    return _without_none(inputs.q, plan.forward_plan(inputs, keep_residual).run(inputs[:N_TENSORS]))


def _backward(do, dlse, o, statistics, o_residual, *arguments):
    """Implement tritonattn::backward."""
    inputs, wanted = AttentionInputs(*arguments[:-1]), tuple(arguments[-1])
    tensors = (do, dlse, o, statistics.contiguous(), o_residual if o_residual.numel() else None, *inputs[:N_TENSORS])
    return _without_none(inputs.q, plan.backward_plan(tensors, inputs[N_TENSORS:], wanted).run(tensors))


def _without_none(q, tensors):
    """Replace None with a tensor without elements, since an op cannot return None."""
    return tuple(q.new_empty(0) if x is None else x for x in tensors)


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
def _(q, *others):
    return _without_none(q, plan.empty_outputs(AttentionInputs(q, *others[:-1]), keep_residual=others[-1]))


@torch.library.register_fake("tritonattn::backward")
def _(do, dlse, o, statistics, o_residual, q, *others):
    inputs = q, *others[:N_WITH_GRADIENTS - 1]
    gradients = (plan.empty_rows(x, x.shape[-1]) if want else None for x, want in zip(inputs, others[-1]))
    return _without_none(q, gradients)


forward_op, backward_op, keep_op = (getattr(torch.ops.tritonattn, name).default for name in ("forward", "backward", "keep"))


def zeros_unless_given(do, o):
    """Return do, or zeros where only lse was used; expanded zeros take no memory."""
    return o.new_zeros(()).expand(o.shape) if do is None else do


class Attention(torch.autograd.Function):
    """o and lse, with gradients of both for q, k, v, biases and sink."""

    @staticmethod
    def forward(*inputs):
        return forward_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        o, _, statistics, o_residual = output
        ctx.numbers = inputs[N_TENSORS:N_FIELDS]
        ctx.mark_non_differentiable(statistics, o_residual)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(o, statistics, o_residual if inputs[-1] else None, *inputs[:N_TENSORS])

    @staticmethod
    def backward(ctx, do, dlse, *_):
        o, *others = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:N_WITH_GRADIENTS]
        gradients = AttentionBackward.apply_to((zeros_unless_given(do, o), dlse, o, *others), ctx.numbers, wanted)
        others = (None,) * (N_FIELDS + 1 - N_WITH_GRADIENTS)
        return *(gradient if want else None for gradient, want in zip(gradients, wanted)), *others

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError("tritonattn.attention: expected reverse-mode derivatives, got forward mode (jvp)")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(Attention, forward_op, info, in_dims, inputs)


class AttentionBackward(torch.autograd.Function):
    """The gradients. A separate function, so that a second derivative is an error and not silently wrong."""

    @classmethod
    def apply_to(cls, tensors, numbers, wanted):
        """Return the gradients. `tensors` are do, dlse, o, statistics, o_residual, then those of AttentionInputs."""
        do, dlse, *outputs = tensors[:5]
        # Dynamo traces this under compiled autograd, where it cannot trace a Function inside the backward pass of another
        apply = backward_op if torch.compiler.is_dynamo_compiling() else cls.apply
        return apply(do, dlse, *_without_none(outputs[0], outputs), *tensors[5:], *numbers, list(wanted))

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

    With dropout, loop over the mapped dimension instead: the dropped weights depend on the batch index in the mapped function.
    So with packed sequences, which take the place of batches.
    """
    names = [argument.name for argument in op._schema.arguments]

    def lead(x, dim, name):
        if not isinstance(x, torch.Tensor) or (name == "o_residual" and x.dim() == 1):
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        # these are read as dense
        return x.contiguous() if name in ("key_lengths", "statistics") else x

    if inputs[names.index("seed")] is None and inputs[names.index("q_starts")] is None:
        out = function.apply(*map(lead, inputs, in_dims, names))
        return out, tuple(0 if x.dim() > 1 else None for x in out)
    results = [function.apply(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(inputs, in_dims)))
               for i in range(info.batch_size)]
    return tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])


# exported programs call the ops directly
torch.library.register_autograd("tritonattn::forward", Attention.backward, setup_context=Attention.setup_context)
torch.library.register_autograd("tritonattn::backward", AttentionBackward.backward,
                                setup_context=AttentionBackward.setup_context)


def keeps_residual(inputs: tuple, precise_grad: bool) -> bool:
    """Return whether the residual of the output is kept: where a gradient of a 16-bit output may be taken."""
    # a wrapper of torch.func does not show whether its inner tensor requires a gradient
    tensors = [x for x in inputs[:N_WITH_GRADIENTS] if x is not None]
    wanted = any(x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
    return precise_grad and torch.is_grad_enabled() and wanted and inputs[0].dtype.itemsize == 2


# opaque to Dynamo, which would otherwise trace the backward pass, and lose its vmap rule and its error for second derivatives
@torch.compiler.allow_in_graph
def attention_op(*inputs, precise_grad):
    """Return o and lse. The positional arguments are the fields of AttentionInputs."""
    return Attention.apply(*inputs, keeps_residual(inputs, precise_grad))[:2]


def _register_flop_formulas():
    """Count FLOPs as torch does for its own attention: of every (query, key) pair, masked or not.

    Packed queries count as if their sequences all had the most keys, since the lengths are on the device.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    def products(fields, n_d, n_dv):
        shapes = AttentionInputs(*fields)
        *batch, heads, n_q, d = shapes.q
        n_k = shapes.k[-2]
        if shapes.q_starts is not None:
            n_k = shapes.longest_k
        pairs = heads * n_q * n_k
        for size in batch:
            pairs *= size
        return 2 * pairs * (n_d * d + n_dv * shapes.v[-1])

    forward, backward = torch.ops.tritonattn.forward, torch.ops.tritonattn.backward
    if forward not in flop_registry:
        register_flop_formula(forward)(lambda *shapes, **_: products(shapes[:-1], 1, 1))
        # after do, dlse and three outputs
        register_flop_formula(backward)(lambda *shapes, **_: products(shapes[5:-1], 3, 2))


_register_flop_formulas()
