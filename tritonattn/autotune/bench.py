"""Check and time one kernel of one problem with any config, in this process (Bench) or in one of its own (IsolatedBench).

    check     two runs, within tolerance of the definition and equal bit for bit, on inputs that are hard to get right
              (`hard_inputs`), also at the problem's own size where the definition is not too large
    times     with the device's clock (measure/timing.py): rounds in which every config gives one sample
    windows   the same under continuous load: rounds in which every config has a window. Neither finds the tensors of a launch
              in the L2 cache: samples flush it, windows rotate over copies of the tensors

A JointBench adds up the times of several problems.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace

import torch

from .. import gpu, reference
from ..analysis import compile_report
from ..analysis.check_score_function import as_torch, dense_mask
from ..attention import attention, create_block_mask, dropout_mask
from ..block_mask import BlockMask, block_mask
from ..config import Config, pinned
from ..configs import lookup
from ..configs.key import precision
from ..kernels.backward import Queries
from ..kernels.forward import Outputs
from ..measure import accuracy, device_timer, timing
from ..problem import Problem
from ..runtime import launch
from ..runtime.arguments import AttentionInputs, empty_statistics, prepare
from ..runtime.custom_op import forward_op
from ..runtime.plan import empty_rows
from ..score_function import ScoreFunction, functions_named
from . import search
from .worker_pool import Child, Failure, Workers, parent_pipe, serve

# the tensors that each kernel computes
OUTPUTS = {"forward": ("o", "lse"), "dq": ("dq",), "dkdv": ("dk", "dv"), "dbias": ("dbias",)}
# many configs are timed, so each is tried only once before
BUDGET = timing.TimingBudget(settle=(0.2, 1.0), long=0.0)
# launches on all copies of the tensors are in graphs of at least 5 ms: the device never waits for the host
SUSTAINED = timing.TimingBudget(settle=search.WARM_UP_SECONDS, small=math.inf, sample=5e-3)
MAX_COPIES = 256      # of the tensors: with 60 MB of cache, windows of problems under 0.5 MB find some of their data there
MAX_CHECKED_SCORES = 2**27  # scores in the definition at the problem's own size; a larger one is not checked at its own size
DROPOUT_P = 0.5       # as in runtime/launch.py, example_launch
SOFTCAP = 30.0        # as in example_launch
ROUNDING = 3e-5       # absolute error that is always allowed: an exact 0 may come from rounded float32 sums
JSON_INFINITY = 1e30  # stands for infinity, which JSON does not have
# limits of IsolatedBench in seconds, compiling included; while it times, for each message of the child
OPEN_LIMIT, CHECK_LIMIT, TIMING_LIMIT = 300.0, 180.0, 180.0
WRONG = ("incorrect", "not repeatable")  # after any other failure the child is replaced


class Bench:
    """One kernel of one problem on a device, ready to run with any config. `announce` gets the config before each sample."""

    def __init__(self, kernel: str, problem: Problem, device, seed: int = 0,
                 announce: Callable[[str], object] = lambda config: None):
        self.kernel, self.problem, self.device = kernel, problem.padded(), torch.device(device)
        self._timer, self._seed, self._announce = device_timer.timer_of(self.device), seed, announce

    def check(self, config: str) -> dict[str, tuple[float, float]] | Failure:
        """Run this config twice on all `hard_inputs`. Return {tensor: (its worst error, the error allowed)}."""
        worst = {}
        for name, tensors, options, exact, allowed in self._cases:
            with pinned(**{self.kernel: Config.parse(config)}):
                first, second = (results_of(attention, tensors, options, self._outputs(options)) for _ in range(2))
                results = list(first.items())
                if self.kernel == "forward":
                    # inference uses another binary
                    with torch.no_grad():
                        result = attention(*tensors[:3], bias=tensors[4], **options)
                        results.append(("o", result[0] if isinstance(result, tuple) else result))
            for tensor, result in results:
                if not torch.equal(first[tensor].view(torch.uint8), second[tensor].view(torch.uint8)):
                    return Failure("not repeatable", f"{tensor}, {name}")
                error, limit = accuracy.max_error(result, exact[tensor]), allowed[tensor]
                if not error <= limit:
                    return Failure("incorrect", f"{tensor}: error {error:.1e}, {limit:.1e} allowed, {name}")
                worst[tensor] = max(worst.get(tensor, (0.0, 1.0)), (error, limit), key=lambda pair: pair[0] / pair[1])
        return worst

    @functools.cached_property
    def _cases(self) -> list[tuple]:
        """(name, tensors, options, exact results, the error allowed for each) of all `hard_inputs`."""
        return [(*case, *self._exact_and_allowed(*case[1:])) for case in hard_inputs(self.problem, self.device, self._seed)]

    def _exact_and_allowed(self, tensors, options):
        names, options = self._outputs(options), options_of_reference(options, tensors)
        exact = results_of(reference.attention, tensors, options, names, torch.float64)
        rounded = results_of(reference.attention, tensors, options, names)
        if "lse" in names:
            # float32 whatever the dtype of the inputs
            wide = torch.promote_types(self.problem.dtype, torch.float32)
            rounded |= results_of(reference.attention, tensors, options, names[1:], wide)
        return exact, {name: min(JSON_INFINITY, ROUNDING + accuracy.tolerance(rounded[name], exact[name], rounded[name].dtype))
                       for name in names}

    def _outputs(self, options) -> tuple[str, ...]:
        """Return the names of the tensors that the kernel computes, or is part of computing."""
        names = OUTPUTS[self.kernel] + (options.get("return_stats", ()) if self.kernel == "forward" else ())
        return names if self.problem.normalizer == "softmax" else tuple(name for name in names if name != "lse")

    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...]]:
        """Return `rounds` interleaved samples of each config in seconds. Raises timing.TimedError, which names a config."""
        make_launch = self._launcher
        with self._timer.context():
            timed = {config: self._timed(config, make_launch) for config in configs}
            timer = timing.InterleavedTimer(timed, self._timer, BUDGET)
            timer.settle()
            for _ in range(rounds):
                timer.take()
            return {config: timer.timing(config).samples for config in configs}

    def windows(self, configs: list[str], rounds: int) -> dict[str, timing.Windows]:
        """Return `rounds` windows of each config, in turns, after the device is warm. Raises timing.TimedError.

        The launches of a window rotate over copies of the tensors that together exceed the L2 cache twice: as in `times`, no
        launch finds its tensors in the cache.
        """
        launchers = self._launchers
        with self._timer.context():
            timed = {config: self._timed(config, *launchers) for config in configs}
            timer = timing.InterleavedTimer(timed, self._timer, SUSTAINED)
            timer.settle()
            return timer.windows(search.WINDOW_SECONDS, rounds)

    @functools.cached_property
    def _launcher(self):
        return self._new_launcher()

    def _new_launcher(self):
        return launcher(self.kernel, *inputs_of(*draw(self.problem, self.device, self._seed)))

    @functools.cached_property
    def _launchers(self):
        """Launchers on different copies of the tensors, shared by all configs: one for a large problem."""
        # counted without results, biases and masks, so there is at least as much data as needed
        copies = min(MAX_COPIES, math.ceil(2 * self._timer.cache_bytes / self.problem.bytes()) or 1)
        launchers = [self._launcher]
        try:
            while len(launchers) < copies:
                launchers.append(self._new_launcher())
        except torch.OutOfMemoryError:
            # the timing itself needs memory too
            del launchers[math.ceil(len(launchers) / 2):]
        return launchers

    def _timed(self, config, *launchers) -> timing.Timed:
        @contextlib.contextmanager
        def announced():
            self._announce(config)
            yield

        # the launch is made at the first call, so that an error is attributed to this config
        return timing.Timed([lambda make=make: launch.run(make(Config.parse(config)), self.device) for make in launchers],
                            around=announced)


def results_of(function, tensors, options: dict, names: tuple[str, ...], dtype: torch.dtype | None = None) -> dict:
    """Return the named results of an attention function for (q, k, v, do, bias or None), computed in `dtype` if given."""
    q, k, v, do, bias = (x if x is None else x.detach().to(dtype or x.dtype) for x in tensors)
    leaves = {name: x for name, x in (("dq", q), ("dk", k), ("dv", v), ("dbias", bias)) if x is not None}
    wanted = [name for name in names if name in leaves]
    # kernels of other gradients do not run; a forward pass alone runs as in training
    inference = getattr(options.get("score_function"), "derivative", True) is None
    for name in () if inference else wanted or leaves:
        leaves[name].requires_grad_()
    if options.get("normalizer", "softmax") == "softmax":
        o, lse, *statistics = function(q, k, v, bias=bias, return_lse=True, **options)
    else:
        o, lse, statistics = function(q, k, v, bias=bias, **options), None, ()
    # a cotangent of each statistic, so that the kernels are those that the problem names
    outputs = [o, *(x for each in statistics for x in each.values())]
    cotangents = [do.to(o.dtype), *(torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
                                    for x in outputs[1:])]
    gradients = torch.autograd.grad(outputs, [leaves[name] for name in wanted], cotangents) if wanted else ()
    results = {"o": o.detach(), "lse": lse} | dict(zip(wanted, gradients))
    results |= {name: x for each in statistics for name, x in each.items()}
    return {name: results[name].detach() for name in names}


def options_of_reference(options: dict, tensors) -> dict:
    """Return the options of `attention` as `reference.attention` takes them."""
    q, k = tensors[:2]
    options = dict(options)
    if isinstance(options.get("mask"), BlockMask):
        options["mask"] = dense_mask(options["mask"])
    if "score_function" in options:
        options["score_function"] = as_torch(options["score_function"])
    if (seed := options.pop("dropout_seed", None)) is not None:
        shape = (math.prod(q.shape[:-3]), q.shape[-3], q.shape[-2], k.shape[-2])
        options["keep"] = dropout_mask(shape, options["dropout_p"], seed).view(*q.shape[:-1], k.shape[-2])
    return options


def draw(problem: Problem, device, seed: int, masked_rows: int = 0) -> tuple[list, dict]:
    """Draw [q, k, v, do, bias or None] from a normal distribution, and the other options of `attention`.

    On device "meta" the tensors have no data. All batches share a bias and a mask; all heads share a mask, and a bias that
    would be larger than MAX_CHECKED_SCORES. The first `masked_rows` queries attend to no key, as far as a bias, a mask or key
    lengths can mask them.
    """
    rng = None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)
    q, k, v = problem.tensors(device, seed)
    do = torch.randn(*q.shape[:-1], problem.dv, dtype=problem.dtype, device=device, generator=rng)
    large = problem.heads * problem.n_q * problem.n_k > MAX_CHECKED_SCORES
    shape = (*(1 for _ in problem.batch), 1 if large else problem.heads, problem.n_q, problem.n_k)
    bias, options = None, {"window": problem.window, "align": "bottom_right" if problem.shift else "top_left"}
    if problem.bias is not None:
        bias = torch.randn(shape, dtype=problem.bias, device=device, generator=rng)
        bias[..., :masked_rows, :] = -torch.inf
    if problem.mask_function is not None:
        options["mask"] = _example_mask(problem, (*problem.batch, *q.shape[-3:-1], problem.n_k), device)
    elif problem.masked:
        mask = torch.rand(*shape[:-3], 1, *shape[-2:], device=device, generator=rng) < 0.9
        # whole tiles are masked, and whole tiles are not
        mask[..., : problem.n_q // 2, : problem.n_k // 4], mask[..., problem.n_q // 2:, problem.n_k // 2:] = False, True
        mask[..., :masked_rows, :] = False
        options["mask"] = block_mask(mask) if problem.mapped else mask
    if problem.lengths:
        options["key_lengths"] = torch.randint(problem.n_k // 2, problem.n_k + 1, problem.batch, dtype=torch.int32,
                                               device=device, generator=rng)
        if masked_rows:
            options["key_lengths"][0] = 0
    if problem.softcap:
        options["softcap"] = SOFTCAP
    if problem.sink:
        options["sink"] = torch.randn(problem.heads, device=device, generator=rng)
    if problem.alibi:
        options["alibi"] = torch.rand(problem.heads, device=device, generator=rng)
    if problem.relative:
        options["relative"] = torch.randn(problem.heads, launch.RELATIVE_ENTRIES, device=device, generator=rng)
    if problem.entropy or problem.key_mass:
        options["return_stats"] = ("entropy",) * problem.entropy + ("key_mass",) * problem.key_mass
    if problem.normalizer != "softmax":
        options["normalizer"] = problem.normalizer
    if problem.score_function is not None:
        function = problem.score_function
        options["score_function"] = ScoreFunction.named(function.name, function.example_payload(device))
    if problem.dropout:
        options |= {"dropout_p": DROPOUT_P, "dropout_seed": torch.tensor([seed], dtype=torch.int64, device=device)}
    return [q, k, v, do, bias], options


def _example_mask(problem, shape, device) -> BlockMask:
    """Return a mask with the mask function of a problem, and an example of its payload."""
    function, payload = problem.mask_function, problem.mask_function.example_payload(device)
    if str(device) != "meta":
        return create_block_mask(functions_named(function.name)[0], shape, payload=payload, device=device)
    mask = block_mask(torch.empty(shape, dtype=torch.bool, device=device))
    return BlockMask(payload, mask.kv_blocks, mask.q_blocks, function=(function.name, *shape[-2:]))


def hard_inputs(problem: Problem, device, seed: int) -> list[tuple]:
    """Return (name, tensors, options) of small inputs of the same kind that are hard to get right, and of one head of the
    problem's own size."""
    size = (70, 100) if gpu.INTERPRETED else (300, 400)
    n_q, n_k = min(size[0], problem.n_q), min(size[1], problem.n_k)
    left, right = (side if side in (None, 0) else min(side, n_k // 3) for side in problem.window)
    batch, kv_heads = (2,), 2
    if problem.score_function is not None or problem.mask_function is not None:
        # indices beyond the problem's own may lie outside of the payload
        batch, kv_heads = tuple(min(2, n) for n in problem.batch), min(2, problem.kv_heads)
    small = replace(problem, batch=batch, heads=kv_heads * problem.group, kv_heads=kv_heads, n_q=n_q, n_k=n_k, shift=0,
                    window=(left, right))
    # with a window that is bounded on the right, the first queries come before the first key
    few_keys = small if right is None else replace(small, n_k=-(-n_q // 2), shift=-(n_q // 2))
    scores = draw(small, device, seed + 1)
    scores[0][0].mul_(32)
    tensors, options = draw(small, device, seed + 2)
    cases = [("ragged lengths", *draw(small, device, seed)), ("large scores", *scores),
             ("nan past the ends", [x if x is None else surrounded_by_nan(x) for x in tensors], options)]
    if right is not None or problem.bias is not None or problem.masked or problem.lengths:
        cases.append(("fully masked rows", *draw(few_keys, device, seed + 3, masked_rows=n_q // 3)))
    own = replace(problem, batch=(1,), heads=problem.group, kv_heads=1)
    if own.heads * own.n_q * own.n_k <= MAX_CHECKED_SCORES and not gpu.INTERPRETED:
        cases.append(("one head of the problem's own size", *draw(own, device, seed + 4)))
    return cases


def surrounded_by_nan(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of x inside a larger tensor that is nan everywhere else."""
    outer = torch.full((*x.shape[:-2], x.shape[-2] + 64, x.shape[-1] + 64), torch.nan, dtype=x.dtype, device=x.device)
    return outer[..., : x.shape[-2], : x.shape[-1]].copy_(x)


def inputs_of(tensors: list, options: dict) -> tuple[AttentionInputs, torch.Tensor]:
    """Return the AttentionInputs and the output gradient of what `draw` returns."""
    # bias and mask are drawn as the kernels take them, and the argument checks do not support the device "meta"
    options = dict(options)
    mask = options.pop("mask", None)
    masks = {"mask": mask}
    if isinstance(mask, BlockMask):
        masks = {"mask": mask.mask, "kv_blocks": mask.kv_blocks, "q_blocks": mask.q_blocks, "mask_function": mask.function,
                 "mask_payload": mask.payload}
    return prepare(*tensors[:3], **options)._replace(bias=tensors[4], **masks), tensors[3]


def launcher(kernel: str, inputs: AttentionInputs, do: torch.Tensor,
             training: bool = True) -> Callable[[Config], launch.KernelLaunch]:
    """Return a function from a config to the launch of this kernel, on the results of a forward pass.

    On device "meta" nothing runs. training: whether the forward pass keeps what a backward pass needs.
    """
    problem = inputs.problem
    o, lse, statistics, *optional, mass = forward_op(*inputs, training and problem.dtype.itemsize == 2)
    o_residuals, row_max, entropy = ((x,) if x.numel() else () for x in optional)
    # the values of delta do not change the time
    delta = empty_statistics(inputs).zero_()
    if problem.normalizer != "softmax":
        lse = statistics = delta = ()
    # any numbers can be cotangents
    queries = Queries(inputs.q, do, statistics, delta, entropy, (mass,) if inputs.key_mass else ())
    dq, dk, dv, dbias = (x if x is None else empty_rows(x, x.shape[-1]) for x in inputs[:4])
    return functools.cache({
        "forward": lambda config: launch.forward_launch(
            problem, config, inputs, Outputs(o, lse, statistics, o_residuals, row_max, entropy)),
        "delta": lambda config: launch.delta_launch(
            problem, config, inputs, (o, *(o_residuals or (None,)), do, lse if inputs.entropy else None), delta),
        "dq": lambda config: launch.dq_launch(problem, config, inputs, queries, dq),
        "dkdv": lambda config: launch.dkdv_launch(problem, config, inputs, queries, dk, dv),
        "dbias": lambda config: launch.dbias_launch(problem, config, inputs, queries, dbias),
        "key_mass": lambda config: launch.key_mass_launch(problem, config, inputs, statistics, mass),
        "mass_delta": lambda config: launch.mass_delta_launch(problem, config, inputs, queries),
    }[kernel])


def cases_to_compile(problem: Problem) -> list[tuple]:
    """Return (tensors, options), without data, of all that Bench launches kernels with."""
    problem = problem.padded()
    return [*(case[1:] for case in hard_inputs(problem, "meta", 0)), draw(problem, "meta", 0)]


def others_of_a_check(kernel: str, problem: Problem) -> list[str]:
    """Return the kernels that run beside this one in a call that checks it."""
    if kernel == "forward":
        return ["key_mass"] if problem.key_mass else []
    if problem.normalizer != "softmax":
        return ["forward"]
    return ["forward", "delta", *(("key_mass", "mass_delta") if problem.key_mass else ())]


def compile_case(kernel: str, problem: Problem, config: Config | None, on: gpu.Gpu, case: int) -> None:
    """Compile what Bench launches of a kernel with one of `cases_to_compile`, into Triton's cache on disk.

    If config is None, compile the one that calls use.
    """
    inputs, do = inputs_of(*cases_to_compile(problem)[case])
    chosen = config or lookup.get_config(kernel, inputs.problem, on)
    # inference uses another binary
    for training in (True, False) if kernel == "forward" else (True,):
        compile_report.compile_launch(launcher(kernel, inputs, do, training)(chosen), on)


class IsolatedBench:
    """A Bench in a child process, which is replaced when a config hangs or raises an error. A context manager."""

    CODE = f"from {__name__} import serve_bench; serve_bench()"

    def __init__(self, kernel: str, problem: Problem, device: str, seed: int = 0, code: str = CODE,
                 compilers: tuple[Workers, gpu.Gpu] | None = None):
        """code: what the child runs, for tests. compilers: those that compile for this GPU what the child will launch."""
        self._bench, self._code, self._compilers = (kernel, problem, str(device), seed), code, compilers
        self._compiling: dict[str | None, list[Future]] = {}  # the jobs of each config; None: of what runs before this kernel
        self._child: Child | None = None
        self._timed: str | None = None  # the config that the child timed last

    def now(self) -> float:
        return time.monotonic()

    def prepare(self, configs: list[str]) -> None:
        """Queue the compilation of what the checks of these configs launch, in this order. A check waits only for its own
        binaries."""
        if self._compilers is None or not configs:
            return
        (kernel, problem, *_), (workers, on) = self._bench, self._compilers
        cases, dots = range(len(cases_to_compile(problem))), precision(problem) or "ieee"
        for config in (None, *configs):
            if config not in self._compiling:
                names = [kernel] if config else others_of_a_check(kernel, problem)
                self._compiling[config] = workers.submit([
                    (name, problem, config and Config.parse(config), on, dots, functools.partial(compile_case, case=case))
                    for name in names for case in cases])

    def stop_preparing(self) -> None:
        """Cancel what no compiler has begun, and wait for what is being compiled: compilers would disturb the timing."""
        self._cancel()
        # a cancelled job stays in the queue, behind the jobs of other benches
        concurrent.futures.wait([future for future in itertools.chain(*self._compiling.values()) if not future.cancelled()])
        # what was cancelled can be prepared again
        self._compiling = {config: futures for config, futures in self._compiling.items()
                           if not any(future.cancelled() for future in futures)}

    def _cancel(self):
        for future in itertools.chain(*self._compiling.values()):
            future.cancel()

    def check(self, config: str) -> dict[str, tuple[float, float]] | Failure:
        """Check a config as Bench.check does."""
        for future in (*self._compiling.get(None, ()), *self._compiling.get(config, ())):
            # a config that does not compile fails in the check below
            future.result()
        return self._ask(("check", config), CHECK_LIMIT)

    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...] | Failure]:
        """Time configs as Bench.times does. If the child fails, the config that it was timing has failed."""
        return self._time("times", configs, rounds)

    def windows(self, configs: list[str], rounds: int) -> dict[str, timing.Windows | Failure]:
        """Time configs as Bench.windows does. After a failure all windows of the others are repeated."""
        return self._time("windows", configs, rounds)

    def _time(self, method, configs, rounds):
        self.stop_preparing()
        failures = {}
        while remaining := [config for config in configs if config not in failures]:
            # a message is one action on one config: a sample, or a window and its warm-up
            result = self._ask((method, remaining, rounds), TIMING_LIMIT)
            if not isinstance(result, Failure):
                return failures | result
            if self._timed is None:
                raise RuntimeError(f"bench: {self._bench[0]} of {self._bench[1]} cannot be timed: {result.message}")
            failures[self._timed] = result
        return failures

    def _ask(self, job, limit):
        """Return the child's result. Raises RuntimeError if no child can do any job."""
        if self._child is None:
            self._child = Child(self._code, uses_gpu=True)
            if isinstance(result := self._ask(("open", *self._bench), OPEN_LIMIT), Failure):
                raise RuntimeError(f"bench: a new process cannot use {self._bench[2]}: {result.message}")
        announced = []
        result = self._child.ask(job, limit, ("hang", "device lost"), announced.append)
        self._timed = announced[-1] if announced else None
        if isinstance(result, Failure) and result.code not in WRONG:
            self._stop()
            if "OutOfMemoryError" in result.message:
                raise RuntimeError(f"bench: no room for the tensors of {self._bench[1]}: {result.message}")
        return result

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._cancel()
        self._stop()

    def _stop(self):
        child, self._child = self._child, None
        if child is not None:
            child.stop()


class JointBench:
    """The benches of several problems as one. A config takes the sum of its times, each multiplied by the calls of its problem.

    `checks` and `timings` hold the last results, {config: {problem: result}}.
    """

    def __init__(self, benches: dict[Problem, search.Bench], calls: Mapping[Problem, int]):
        self._benches, self._calls = benches, calls
        self.checks: dict[str, dict[Problem, dict]] = {}
        self.timings: dict[str, dict[Problem, timing.Windows]] = {}

    def now(self) -> float:
        return next(iter(self._benches.values())).now()

    def prepare(self, configs: list[str]) -> None:
        """Queue the compilation of what the next checks launch: of each config for all problems, as `check` needs it."""
        for config in configs:
            for bench in self._benches.values():
                bench.prepare([config])

    def stop_preparing(self) -> None:
        """Stop the compilation for all problems."""
        for bench in self._benches.values():
            bench.stop_preparing()

    def check(self, config: str) -> dict[str, tuple[float, float]] | Failure:
        """Check a config for every problem. Return the first failure, or the errors of the first problem."""
        results = self.checks[config] = {}
        for problem, bench in self._benches.items():
            results[problem] = bench.check(config)
            if isinstance(results[problem], Failure):
                return results[problem]
        return next(iter(results.values()))

    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...] | Failure]:
        """Time configs for every problem, one problem after the other."""
        results = self._sum("times", configs, rounds)
        return {config: result if isinstance(result, Failure) else result.seconds for config, result in results.items()}

    def windows(self, configs: list[str], rounds: int) -> dict[str, timing.Windows | Failure]:
        """Time configs in windows for every problem, one problem after the other. Several problems have no common clock."""
        return self._sum("windows", configs, rounds)

    def _sum(self, method, configs, rounds):
        self.stop_preparing()  # no problem's compilers disturb the timing of another
        failures, timings = {}, {config: {} for config in configs}
        for problem, bench in self._benches.items():
            results = getattr(bench, method)([config for config in configs if config not in failures], rounds)
            for config, result in results.items():
                if isinstance(result, Failure):
                    failures[config] = result
                else:
                    timings[config][problem] = result if method == "windows" else timing.Windows(tuple(result), None)
        self.timings |= {config: parts for config, parts in timings.items() if config not in failures}
        return failures | {config: self._total(self.timings[config]) for config in configs if config not in failures}

    def _total(self, parts) -> timing.Windows:
        seconds = zip(*([self._calls[problem] * x for x in part.seconds] for problem, part in parts.items()))
        clocks = [part.clock for part in parts.values()]
        return timing.Windows(tuple(map(sum, seconds)), clocks[0] if len(clocks) == 1 else None)


def serve_bench() -> None:
    """Answer the jobs of an IsolatedBench: ("open", ...), then ("check", config), ("times" or "windows", configs, rounds)."""
    benches = []

    def answer(kind, *arguments):
        if kind == "open":
            benches.append(Bench(*arguments, announce=parent_pipe().send))
            return None
        return getattr(benches[0], kind)(*arguments)

    serve(answer, "launch error")
