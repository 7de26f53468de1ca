"""Plans: everything that a call of the kernels needs except its data, found again by one dictionary lookup.

    shapes, strides, dtypes, devices, alignment, numbers, settings   ->  ForwardPlan, BackwardPlan
                                                                         sizes of the results, and for each kernel:
                                                                         compiled kernel, grid, arguments without pointers

The first run of a plan launches through Triton, which compiles. Later runs hand pointers to the compiled kernels.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..configs import lookup
from ..gpu import INTERPRETED, TRITON, gpu_of
from ..score_function import functions_named
from . import diagonal_gradients, row_gradients
from .arguments import N_TENSORS, NO_DERIVATIVE, AttentionInputs, empty_statistics, largest_score_unit

if TRITON:
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.errors import OutOfResources

    from . import launch

BIAS, SINK, ALIBI, RELATIVE, Q_STARTS = map(AttentionInputs._fields.index, ("bias", "sink", "alibi", "relative", "q_starts"))
N_COTANGENTS = 3  # the last tensors of a backward pass, for entropy and key mass: see `backward_plan`
LARGEST_CACHE = 4096  # entries: plans, and known calls of eager.py
_entries: dict[tuple, object] = {}  # the oldest first
_changes = threading.Lock()
# Triton 3.6 marks a kernel as loaded before it is: a second thread would launch nothing
_first_launch = threading.RLock()


def find(key: tuple | None):
    """Return the entry that was kept for this key, or None."""
    return _entries.get(key)


def keep(key: tuple | None, entry):
    """Keep an entry for later calls unless the key is None, and return it. A full cache drops its oldest entry."""
    if key is not None:
        with _changes:
            while len(_entries) >= LARGEST_CACHE:
                del _entries[next(iter(_entries))]
            _entries[key] = entry
    return entry


def clear() -> None:
    """Forget all entries."""
    with _changes:
        _entries.clear()


def settings(dtype: torch.dtype) -> tuple | None:
    """Return the settings of the process that a plan depends on, or None if no plan may be reused."""
    if (version := lookup.version()) is None:
        return None
    # set_float32_matmul_precision changes this setting too
    return version, torch.backends.cuda.matmul.fp32_precision if dtype is torch.float32 else None


def signature(x: Tensor | None) -> tuple | None:
    """Return the properties of a tensor that a plan depends on: those that Triton specializes on or that kernels receive."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)


def forward_plan(inputs: AttentionInputs, keep_residual: bool) -> "ForwardPlan":
    """Return the plan of a forward pass with these inputs."""
    process = settings(inputs.q.dtype)
    key = process and (keep_residual, process, inputs[N_TENSORS:], tuple(map(signature, inputs[:N_TENSORS])))
    return find(key) or keep(key, ForwardPlan(inputs, keep_residual))


def backward_plan(tensors: Sequence[Tensor | None], numbers: tuple, wanted: tuple[bool, ...],
                  signatures: tuple | None = None) -> "BackwardPlan":
    """Return the plan of a backward pass.

    `tensors` are do, dlse, o, statistics and o_residual, then those of the AttentionInputs, then d_entropy, d_mass and
    entropy; `numbers` are the other fields of the AttentionInputs, `signatures` those of the tensors if they are known.
    """
    process = settings(tensors[0].dtype)
    key = process and (wanted, process, numbers, signatures or tuple(map(signature, tensors)))
    return find(key) or keep(key, BackwardPlan(tensors, numbers, wanted))


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return contiguous tensors, as the kernels read numbers of rows: a cotangent or a saved tensor may have any layout."""
    return [x if x is None else x.contiguous() for x in tensors]


class Results:
    """Sizes, strides and dtypes of the tensors that a plan allocates. None stays None."""

    def __init__(self, tensors: Sequence[Tensor | None]):
        self._layouts = [None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors]

    def allocate(self, like: Tensor) -> list[Tensor | None]:
        """Return empty tensors on the device of `like`."""
        return [layout and like.new_empty_strided(layout[0], layout[1], dtype=layout[2]) for layout in self._layouts]


class PlannedLaunch:
    """The launch of one kernel, for any tensors with the layouts of those that it was made with.

    `tensors` are on the meta device; the launch that `make_launch(problem, config, ...)` returns holds views of them.
    """

    def __init__(self, kernel: str, make_launch: Callable, inputs: AttentionInputs, device: torch.device,
                 tensors: Sequence[Tensor | None], arguments: tuple):
        self._kernel, self._problem, self._device = kernel, inputs.problem, device
        self._config = lookup.get_config(kernel, self._problem, gpu_of(device))
        self._call = make_launch(self._problem, self._config, *arguments)
        # a view has the storage of its tensor
        self._slots = {x.untyped_storage()._cdata: slot for slot, x in enumerate(tensors) if x is not None}
        self._tensors = tensors  # keeps the storages alive: another one could reuse the number of a freed one
        self._compiled = None    # kept, because Triton unloads a kernel that is deleted
        self._direct = None

    def run(self, tensors: Sequence[Tensor | None], pointers: Sequence[int], direct: bool) -> None:
        """Launch the kernel on these tensors, in the plan's order. direct: whether the launch may bypass Triton's hooks."""
        direct = direct and not self._call.kernel.pre_run_hooks
        if direct and self._direct is not None:
            self._direct(pointers)
        elif direct and self._compiled is not None:
            # from the second run on: many kinds of calls, such as those of a new length, come only once
            self._direct = self._direct_launch(self._compiled)
            self._direct(pointers)
        elif self._call.programs:
            compiled = self._launch_through_triton(tensors)
            # a hook or the debug mode compiles another kernel
            self._compiled = compiled if direct else self._compiled

    def _launch_through_triton(self, tensors):
        """Launch with records as arguments, which Triton specializes, and return the compiled kernel.

        Raises RuntimeError, before the kernel runs, if it needs more of a resource than the GPU has.
        """
        call = self._call._replace(arguments=self._filled(self._call.arguments, tensors))
        try:
            with contextlib.nullcontext() if INTERPRETED else _first_launch:
                return launch.run(call, self._device)
        except OutOfResources as error:
            need = f"config {self._config} needs {error.required} of {error.name}"
            raise RuntimeError(f"{self._kernel}: {need}, {gpu_of(self._device).name} allows {error.limit}, for "
                               f"{self._problem}; pin a smaller config (tritonattn.pinned)") from error

    def _filled(self, node, tensors):
        """Return a nested argument with `tensors` in place of the plan's."""
        if isinstance(node, Tensor):
            x = tensors[self._slots[node.untyped_storage()._cdata]]
            return x if x.dtype == node.dtype else x.view(node.dtype)
        if not isinstance(node, tuple):
            return node
        values = [self._filled(x, tensors) for x in node]
        return type(node)(*values) if hasattr(node, "_fields") else tuple(values)

    def _direct_launch(self, compiled):
        """Return a function of the pointers that calls `CompiledKernel.run` as `JITFunction.run` does (triton/runtime/jit.py).

        The arguments are nested tuples, which one expression builds fastest:
        ((pointers[0], constants[0], constants[1]), (pointers[1], constants[2], constants[3]), constants[4])
        """
        constants = []

        def expression(node):
            if isinstance(node, Tensor):
                return f"pointers[{self._slots[node.untyped_storage()._cdata]}]"
            if isinstance(node, tuple) and any(isinstance(x, Tensor) for x in launch.flatten(node)):
                return f"({''.join(expression(x) + ', ' for x in node)})"
            constants.append(node)
            return f"constants[{len(constants) - 1}]"

        arguments = eval(f"lambda pointers: {expression(self._call.arguments)}", {"constants": constants})
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        programs, passes, index = self._call.programs, self._call.passes, self._device.index

        def start(pointers):
            stream = driver.active.get_current_stream(index)
            run(programs, passes, 1, stream, function, metadata, None, None, None, *arguments(pointers))

        return start


class Plan:
    """The results and the launches of one pass."""

    def __init__(self, device: torch.device):
        self._device, self._launches = device, []

    def _launch(self, tensors: Sequence[Tensor | None]) -> None:
        """Run the launches. Triton launches on the current device, wherever the tensors are."""
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        if INTERPRETED or driver.active.get_current_device() == (self._device.index or 0):
            self._run_launches(tensors, pointers)
        else:
            with launch.device_guard(self._device):
                self._run_launches(tensors, pointers)

    def _run_launches(self, tensors, pointers):
        direct = not INTERPRETED and not _instrumented()
        for each in self._launches:
            each.run(tensors, pointers, direct)


def _instrumented() -> bool:
    """Return whether launches go through Triton: for a profiler's hooks, in debug mode, to compile instrumented code."""
    runtime = knobs.runtime
    # a hook is a chain, or a function or None that a program put in its place
    hooks = (getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))
    return bool(runtime.debug or knobs.compilation.instrumentation_mode or any(hooks)
                or getattr(runtime, "add_stages_inspection_hook", None))


class ForwardPlan(Plan):
    """The plan of a forward pass."""

    def __init__(self, inputs: AttentionInputs, keep_residual: bool):
        super().__init__(inputs.q.device)
        inputs = AttentionInputs(*map(_meta, inputs[:N_TENSORS]), *inputs[N_TENSORS:])
        outputs = empty_outputs(inputs, keep_residual)
        self._outputs = Results(outputs)
        o, lse, statistics, *optional, key_mass = outputs
        if inputs.normalizer != "softmax":
            lse = statistics = ()
        record = launch.Outputs(o, lse, statistics, *map(_present, optional))
        tensors = *inputs[:N_TENSORS], *outputs
        self._launches.append(PlannedLaunch("forward", launch.forward_launch, inputs, self._device, tensors, (inputs, record)))
        if key_mass is not None:
            self._launches.append(PlannedLaunch("key_mass", launch.key_mass_launch, inputs, self._device, tensors,
                                                (inputs, statistics, key_mass)))

    def run(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the `empty_outputs`, computed. `tensors` are those of the AttentionInputs, in their order."""
        outputs = self._outputs.allocate(tensors[0])
        if tensors[Q_STARTS] is not None and outputs[2] is not None:
            # between the statistics of packed sequences are numbers that no kernel writes
            outputs[2].zero_()
        self._launch((*tensors, *outputs))
        return outputs


class BackwardPlan(Plan):
    """The plan of a backward pass."""

    def __init__(self, tensors: Sequence[Tensor | None], numbers: tuple, wanted: tuple[bool, ...]):
        super().__init__(tensors[0].device)
        do, dlse, o, statistics, o_residual, *others, d_entropy, d_mass, _ = tensors = [_meta(x) for x in tensors]
        # statistics without a cotangent do not count
        inputs = AttentionInputs(*others, *numbers)._replace(entropy=d_entropy is not None, key_mass=d_mass is not None)
        _check_derivative(inputs.score_function, wanted)
        gradients = [empty_rows(x, x.shape[-1]) if want else None for x, want in zip(inputs, wanted)]
        dq, dk, dv, dbias, dsink, dalibi, drelative = gradients
        self._bias_gradient, self._problem = _bias_gradient(inputs, dbias), inputs.problem
        delta, sums, row_terms = empty_statistics(inputs), None, None
        # of every head and batch, since one program sums over those that share a bias
        sizes = *self._problem.batch, self._problem.heads, self._problem.n_q, 1
        bias_rows = delta.new_empty(sizes) if self._bias_gradient == "sums by kernel" else None
        self._needs_diagonals = (dalibi is not None or drelative is not None) and not _no_pairs(inputs)
        self._numbers = numbers
        if self._needs_diagonals:
            sums = delta.new_empty(*inputs.q.shape[:-2], inputs.q.shape[-2] + inputs.k.shape[-2])
        self._needs_rows, self._score_unit = dsink is not None or self._bias_gradient == "rows", largest_score_unit(inputs)
        needs_ds = wanted[0] or wanted[1] or self._bias_gradient in ("kernel", "sums by kernel") or self._needs_diagonals
        needs_delta = needs_ds or (self._needs_rows and inputs.sink is not None)
        if inputs.normalizer != "softmax":
            needs_delta, delta, statistics = False, None, ()
        if needs_delta and d_entropy is not None:
            row_terms = delta.new_empty(inputs.q.shape[:-1])
        self._needs_row_terms = row_terms is not None
        self._outputs = Results((*gradients, delta, sums, bias_rows))
        tensors += [*gradients, delta, sums, bias_rows, row_terms]
        queries = launch.Queries(inputs.q, do, statistics, () if delta is None else delta, _present(d_entropy),
                                 _present(d_mass))

        def add(kernel, make_launch, *arguments):
            self._launches.append(PlannedLaunch(kernel, make_launch, inputs, self._device, tensors, arguments))

        if needs_delta:
            add("delta", launch.delta_launch, inputs, (o, o_residual, do, dlse if row_terms is None else row_terms), delta)
            if d_mass is not None:
                add("mass_delta", launch.mass_delta_launch, inputs, queries)
        if wanted[0]:
            add("dq", launch.dq_launch, inputs, queries, dq)
        if wanted[1] or wanted[2]:
            add("dkdv", launch.dkdv_launch, inputs, queries, dk, dv)
        if self._bias_gradient in ("kernel", "sums by kernel"):
            add("dbias", launch.dbias_launch, inputs, queries, dbias if bias_rows is None else bias_rows)
        if self._needs_diagonals:
            add("diagonals", launch.diagonals_launch, inputs, queries, sums)

    def run(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of q, k, v, biases and sink, in the order of AttentionInputs; None where not wanted.

        `tensors` are as in `backward_plan`.
        """
        *gradients, delta, sums, bias_rows = self._outputs.allocate(tensors[0])
        if self._needs_rows and self._problem.packed is not None:
            # see ForwardPlan.run
            delta.zero_()
        row_terms = self._row_terms(*tensors) if self._needs_row_terms else None
        self._launch((*tensors, *gradients, delta, sums, bias_rows, row_terms))
        if self._bias_gradient == "zero":
            gradients[BIAS].zero_()
        if bias_rows is not None:
            gradients[BIAS].copy_(bias_rows.sum_to_size(gradients[BIAS].shape))
        if self._needs_rows:
            self._reduce_rows(tensors, gradients, delta)
        if gradients[ALIBI] is not None or gradients[RELATIVE] is not None:
            self._reduce_diagonals(tensors, gradients, sums)
        return gradients

    def _row_terms(self, _do, dlse, _o, statistics, _residual, *inputs_and_statistics):
        """Return dLSE and the terms of the entropy, which delta subtracts, [..., H, L]."""
        *inputs, d_entropy, _, entropy = inputs_and_statistics
        n = inputs[0].shape[-2]
        slots = slice(n)
        if self._problem.packed is not None:
            *_, slots = row_gradients.rows_of_packed(inputs[Q_STARTS], n, statistics.shape[-1])
        minus_m, log2_l = statistics[..., slots].unbind(-2)
        sink = inputs[SINK]
        of_sink = None if sink is None else row_gradients.sink_weight(sink, minus_m, log2_l, self._score_unit)
        terms = row_gradients.entropy_terms(d_entropy, entropy, log2_l, of_sink)
        return (terms if dlse is None else terms + dlse).contiguous()

    def _reduce_rows(self, tensors, gradients, delta):
        """Write the gradients that are sums over rows."""
        _, dlse, _, statistics, _, *inputs = tensors[:-N_COTANGENTS]
        dbias, dsink = gradients[BIAS], gradients[SINK]
        ds = None
        if self._problem.packed is None:
            n = inputs[0].shape[-2]
            statistics, delta = statistics[..., :n], delta[..., :n]
        if inputs[SINK] is not None:
            ds = row_gradients.sink_ds(inputs[SINK], statistics, delta, self._score_unit)
            ds = ds if self._problem.packed is None else torch.where(delta == 0, 0, ds)
        if dsink is not None:
            dsink.copy_(ds.unsqueeze(-1).sum_to_size(dsink.shape))
        if self._bias_gradient == "rows":
            rows = statistics[..., 1, :], dlse, ds
            if self._problem.packed is None:
                total = row_gradients.dbias_of_rows(*rows).unsqueeze(-1).sum_to_size(dbias.shape)
            else:
                sizes = inputs[0].shape[-2], self._problem.n_q
                total = row_gradients.sum_of_packed(*rows, inputs[Q_STARTS], *sizes, dbias.shape)
            dbias.copy_(total)

    def _reduce_diagonals(self, tensors, gradients, sums):
        """Write the gradients that are sums over diagonals: zeros if there are none."""
        reductions = (ALIBI, diagonal_gradients.slopes_gradient), (RELATIVE, diagonal_gradients.table_gradient)
        wanted = [(gradients[index], reduce) for index, reduce in reductions if gradients[index] is not None]
        if sums is None:
            for gradient, _ in wanted:
                gradient.zero_()
            return
        inputs = AttentionInputs(*tensors[5:-N_COTANGENTS], *self._numbers)
        offsets = diagonal_gradients.diagonal_offsets(inputs)
        for gradient, reduce in wanted:
            gradient.copy_(reduce(sums, offsets, gradient.shape))


def _check_derivative(score_function: str | None, wanted: tuple[bool, ...]) -> None:
    """Raise RuntimeError if the gradients of q or k need a derivative that the score function does not have."""
    if score_function is not None and (wanted[0] or wanted[1]) and functions_named(score_function)[1] is None:
        # where the first check could not see that a gradient is needed
        raise RuntimeError(f"score_function: {NO_DERIVATIVE}, got {score_function}")


def _no_pairs(inputs: AttentionInputs) -> bool:
    """Return whether there is no pair of a query and a key."""
    return 0 in (*inputs.q.shape[:-1], inputs.k.shape[-2], inputs.longest_q, inputs.longest_k)


def _bias_gradient(inputs: AttentionInputs, dbias: Tensor | None) -> str | None:
    """Return how the gradient of a bias is computed.

    "kernel": as its kernel writes it; "sums by kernel": the kernel writes a sum over keys for each query; "rows": from the
    statistics of each query; "zero": there is no pair.
    """
    if dbias is None:
        return None
    if _no_pairs(inputs):
        return "zero"
    if dbias.shape[-1] > 1:
        return "kernel"
    # a constant added to all scores of a row changes only the lse of a softmax
    return "rows" if inputs.normalizer == "softmax" else "sums by kernel"


def _present(x: Tensor | None) -> tuple:
    """Return a tensor in a tuple, an empty one for None: an optional field of a record of the kernels."""
    return () if x is None else (x,)


def _meta(x: Tensor | None) -> Tensor | None:
    """Return a tensor with the layout of x and no data."""
    return None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def empty_rows(like: Tensor, width: int) -> Tensor:
    """Return an empty tensor of like's shape, but `width` columns, in like's order of dimensions, with contiguous rows.

    A [B, H, L, D] view of [B, L, H, D] memory gets a result of the same layout.
    """
    # select needs a column; for a fake tensor it builds no index
    rows = torch.empty_like(like.select(-1, 0) if like.shape[-1] else like.sum(-1), device="meta")
    strides = [stride * width for stride in rows.stride()]
    return like.new_empty_strided((*like.shape[:-1], width), (*strides, 1))


def empty_outputs(inputs: AttentionInputs, keep_residual: bool):
    """Return empty o [..., H, L, DV], lse [..., H, L], statistics [..., H, 2, padded L] and o_residual, row_max [..., H, L],
    entropy [..., H, L] and key_mass [..., H, S]. The last four are None where not kept, or not asked for; without a softmax all
    but o are None."""
    if inputs.normalizer != "softmax":
        return empty_rows(inputs.q, inputs.v.shape[-1]), *(None,) * 6
    o, statistics = empty_rows(inputs.q, inputs.v.shape[-1]), empty_statistics(inputs, (2,))
    lse = inputs.q.new_empty(inputs.q.shape[:-1], dtype=statistics.dtype)
    row_max, entropy = (torch.empty_like(lse) if wanted else None for wanted in (inputs.row_max, inputs.entropy))
    mass = lse.new_empty(*lse.shape[:-1], inputs.k.shape[-2]) if inputs.key_mass else None
    return o, lse, statistics, torch.empty_like(o) if keep_residual else None, row_max, entropy, mass
