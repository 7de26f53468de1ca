"""Attention as torch ops, and its autograd.

    tritonattn::forward    AttentionInputs, keep_residual                              -> o, lse, statistics, o_residual,
                                                                                          row_max, entropy, key_mass
    tritonattn::map        AttentionInputs, statistics, block                          -> sums of weights over blocks
    tritonattn::backward   do, dlse, o, statistics, o_residual, AttentionInputs, wanted,  -> dq, dk, dv, dbias, dsink,
                           d_entropy, d_mass, saved_entropy                                  dalibi, drelative

torch.compile, export and the FLOP counter handle the ops; Problem and Config exist only inside them. The arguments are
checked: see arguments.py.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import SymInt, Tensor

from ..block_mask import TILE
from ..gpu import TRITON
from ..score_function import functions_named
from . import plan
from .arguments import N_TENSORS, N_WITH_GRADIENTS, AttentionInputs

if TRITON:
    from . import launch

SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", float | None: "float?", int | None: "int?",
                SymInt | None: "SymInt?", bool: "bool", str: "str", str | None: "str?"}
INPUTS = ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in AttentionInputs.__annotations__.items())
N_FIELDS = len(AttentionInputs._fields)
ENTROPY, NORMALIZER = map(AttentionInputs._fields.index, ("entropy", "normalizer"))
OUTPUTS = "Tensor o, Tensor statistics, Tensor o_residual"  # those that the backward pass reads
COTANGENTS = "Tensor? d_entropy=None, Tensor? d_mass=None, Tensor? saved_entropy=None"
RESULTS = f"({', '.join(['Tensor'] * 7)})"
GRADIENTS = f"({', '.join(['Tensor'] * N_WITH_GRADIENTS)})"
torch.library.define("tritonattn::forward", f"({INPUTS}, bool keep_residual) -> {RESULTS}")
torch.library.define("tritonattn::backward", f"(Tensor do, Tensor? dlse, {OUTPUTS}, {INPUTS}, bool[] wanted, {COTANGENTS}) "
                                             f"-> {GRADIENTS}")
torch.library.define("tritonattn::map", f"({INPUTS}, Tensor statistics, int block) -> Tensor")
torch.library.define("tritonattn::keep", "(SymInt[] sizes, float dropout_p, Tensor seed) -> Tensor")


def _forward(*arguments):
    """Implement tritonattn::forward."""
    inputs, keep_residual = AttentionInputs(*arguments[:-1]), arguments[-1]
    return _without_none(inputs.q, plan.forward_plan(inputs, keep_residual).run(inputs[:N_TENSORS]))


def _backward(do, dlse, o, statistics, o_residual, *arguments):
    """Implement tritonattn::backward."""
    inputs, (wanted, *cotangents) = AttentionInputs(*arguments[:N_FIELDS]), arguments[N_FIELDS:]
    # the last arguments may be left out
    cotangents += [None] * (plan.N_COTANGENTS - len(cotangents))
    dlse, statistics, *cotangents = plan.dense(dlse, statistics, *cotangents)
    if inputs.normalizer != "softmax":
        dlse = statistics = None
    tensors = (do, dlse, o, statistics, o_residual if o_residual.numel() else None, *inputs[:N_TENSORS], *cotangents)
    return _without_none(inputs.q, plan.backward_plan(tensors, inputs[N_TENSORS:], tuple(wanted)).run(tensors))


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


def mask_strips(name: str, payload: Tensor | None, shape: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Yield the rows of a mask function, booleans [..., at most TILE, S]. Each overwrites the one before."""
    *leading, n_q, n_k = shape
    strip = torch.empty(math.prod(leading[:-1]), leading[-1], TILE, n_k, dtype=torch.uint8, device=device)
    for first in range(0, n_q, TILE):
        launch.run(launch.mask_launch(functions_named(name)[0], name, payload, strip, first, n_q), device)
        rows = min(TILE, n_q - first)
        yield strip.view(torch.bool)[..., :rows, :].reshape(*leading, rows, n_k)


def _map(*arguments):
    """Implement tritonattn::map: the sums of the weights over tiles of block x block pairs."""
    inputs, (statistics, block) = AttentionInputs(*arguments[:-2]), arguments[-2:]
    tiles = _empty_map(inputs, statistics, block).zero_()
    if tiles.numel():
        launch.run(launch.map_launch(inputs.problem, block, inputs, statistics, tiles), tiles.device)
    return tiles


def _empty_map(inputs, statistics, block):
    sizes = (-(-x.shape[-2] // block) for x in (inputs.q, inputs.k))
    return statistics.new_empty(*inputs.q.shape[:-2], *sizes)


torch.library.impl("tritonattn::map", ("cpu", "cuda"), _map)
torch.library.register_fake("tritonattn::map")(lambda *fields: _empty_map(AttentionInputs(*fields[:-2]), *fields[-2:]))


@torch.library.register_fake("tritonattn::keep")
def _(sizes, dropout_p, seed):
    return seed.new_empty(sizes, dtype=torch.bool)


@torch.library.register_fake("tritonattn::forward")
def _(q, *others):
    return _without_none(q, plan.empty_outputs(AttentionInputs(q, *others[:-1]), keep_residual=others[-1]))


@torch.library.register_fake("tritonattn::backward")
def _(do, dlse, o, statistics, o_residual, q, *others):
    inputs = q, *others[:N_WITH_GRADIENTS - 1]
    gradients = (plan.empty_rows(x, x.shape[-1]) if want else None for x, want in zip(inputs, others[N_FIELDS - 1]))
    return _without_none(q, gradients)


forward_op, backward_op, map_op, keep_op = (getattr(torch.ops.tritonattn, name).default
                                            for name in ("forward", "backward", "map", "keep"))


def zeros_unless_given(do, o):
    """Return do, or zeros where only lse was used; expanded zeros take no memory."""
    return o.new_zeros(()).expand(o.shape) if do is None else do


class Attention(torch.autograd.Function):
    """The results of tritonattn::forward, of which o, lse, entropy and key_mass have gradients for the first N_WITH_GRADIENTS
    inputs."""

    @staticmethod
    def forward(*inputs):
        return forward_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        o, _, statistics, o_residual, row_max, entropy, _ = output
        ctx.numbers = inputs[N_TENSORS:N_FIELDS]
        ctx.mark_non_differentiable(statistics, o_residual, row_max)
        ctx.set_materialize_grads(False)
        o_residual, entropy = o_residual if inputs[-1] else None, entropy if inputs[ENTROPY] else None
        if inputs[NORMALIZER] != "softmax":
            # the gradients depend on no result
            o = statistics = o_residual = None
        ctx.save_for_backward(o, statistics, o_residual, *inputs[:N_TENSORS], entropy)

    @staticmethod
    def backward(ctx, do, dlse, _statistics, _residual, _max, d_entropy, d_mass):
        o, *others, entropy = ctx.saved_tensors
        if o is None and do is None:
            # without a softmax there is no other result to differentiate
            return (None,) * (N_FIELDS + 1)
        o = do if o is None else o
        # compiled code gives an empty cotangent for an empty result
        inputs = AttentionInputs(*[None] * N_TENSORS, *ctx.numbers)
        d_entropy, d_mass = d_entropy if inputs.entropy else None, d_mass if inputs.key_mass else None
        wanted = ctx.needs_input_grad[:N_WITH_GRADIENTS]
        tensors = (zeros_unless_given(do, o), dlse, o, *others, d_entropy, d_mass, entropy)
        gradients = AttentionBackward.apply_to(tensors, ctx.numbers, wanted)
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
        """Return the gradients. `tensors` are as in `plan.backward_plan`."""
        do, dlse, *outputs = tensors[:5]
        inputs, cotangents = tensors[5:5 + N_TENSORS], tensors[5 + N_TENSORS:]
        # Dynamo traces this under compiled autograd, where it cannot trace a Function inside the backward pass of another
        apply = backward_op if torch.compiler.is_dynamo_compiling() else cls.apply
        return apply(do, dlse, *_without_none(outputs[0], outputs), *inputs, *numbers, list(wanted), *cotangents)

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

    With dropout or a function of the user's, loop over the mapped dimension instead: they depend on the batch index in the
    mapped function. So with packed sequences, which take the place of batches.
    """
    names = [argument.name for argument in op._schema.arguments]

    def lead(x, dim, name):
        if not isinstance(x, torch.Tensor) or (name == "o_residual" and x.dim() == 1):
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        # these are read as dense
        return x.contiguous() if name in ("key_lengths", "statistics") else x

    if all(inputs[names.index(name)] is None for name in ("seed", "q_starts", "score_function", "mask_function")):
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
    """Return o, lse, row_max, entropy and key_mass. The positional arguments are the fields of AttentionInputs."""
    o, lse, _, _, *computed = Attention.apply(*inputs, keeps_residual(inputs, precise_grad))
    return o, lse, *computed


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
        key_mass = AttentionInputs._fields.index("key_mass")
        register_flop_formula(forward)(lambda *shapes, **_: products(shapes[:-1], 1 + shapes[key_mass], 1))
        # after do, dlse and three outputs
        register_flop_formula(backward)(lambda *shapes, **_: products(shapes[5:5 + N_FIELDS], 3 + shapes[5 + key_mass], 2))
        register_flop_formula(torch.ops.tritonattn.map)(lambda *shapes, **_: products(shapes[:-2], 1, 0))


_register_flop_formulas()
