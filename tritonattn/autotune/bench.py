"""Check and time one kernel of one problem with any config; in this process (Bench), or in one of its own (IsolatedBench).

    check   against the definition, twice, bit for bit, on inputs that are hard to get right (`hard_inputs`); at the
            problem's own size where the definition is not too large
    times   with the device's clock (measure/timing.py): rounds in which every config gives one sample
"""

import dataclasses
import functools
import math
import time

import torch

from .. import gpu, reference
from ..attention import attention, dropout_mask
from ..block_mask import block_mask
from ..config import Config, pinned
from ..configs.lookup import lookup_config
from ..kernels.backward import Queries
from ..kernels.forward import Outputs
from ..measure import accuracy, device_timer, timing
from ..problem import Problem
from ..runtime import launch
from ..runtime.arguments import prepare
from ..runtime.custom_op import empty_outputs
from .search import Check
from .worker_pool import Child, Failure, serve

# the tensors that each kernel computes
OUTPUTS = {"forward": ("o", "lse"), "delta": ("dq",), "dq": ("dq",), "dkdv": ("dk", "dv"), "dbias": ("dbias",)}
# many configs are timed, so each is tried only once before
BUDGET = timing.TimingBudget(settle=(0.2, 1.0), long=0.0)
LARGEST = 2**27  # scores in the definition at the problem's own size; a larger one is not checked at its own size
DROPOUT_P = 0.5       # as in runtime/launch.py, example_launch
ROUNDING = 3e-5       # absolute error that is always allowed: an exact 0 may come from rounded float32 sums
HUGE = 1e30           # stands for infinity, which JSON does not have

# limits of IsolatedBench in seconds, compiling included
OPEN_LIMIT, CHECK_LIMIT, FIRST_LIMIT = 300.0, 180.0, 300.0
BASE_LIMIT, SAMPLE_LIMIT = 60.0, 0.5  # before the first sample; for each sample, on top of the time of one
LONGEST_SAMPLE = 60.0


class DeviceLost(RuntimeError):
    """The device is unusable in this process."""


class Bench:
    """One kernel of one problem on a device, ready to run with any config."""

    def __init__(self, kernel: str, problem: Problem, device, timer=None, budget: timing.TimingBudget = BUDGET, seed: int = 0):
        self.kernel, self.problem, self.device = kernel, problem, torch.device(device)
        self._timer = timer or device_timer.timer_of(self.device)
        self._budget, self._seed, self._cases, self._launch = budget, seed, None, None

    def now(self) -> float:
        return self._timer.now()

    def check(self, config: str) -> Check:
        """Run this config twice on all `hard_inputs` and compare it with the definition."""
        if self._cases is None:
            self._cases = [self._with_tolerance(*case) for case in hard_inputs(self.problem, self.device, self._seed)]
        try:
            return self._check(config)
        except torch.OutOfMemoryError:
            # not the fault of this config
            raise
        except Exception as error:  # any error of the compiler or the launch is the result of this config
            return Check({}, *self._reason(error))

    def _check(self, config):
        worst = {}
        for name, (tensors, options), exact, allowed in self._cases:
            with pinned(**{self.kernel: Config.parse(config)}):
                first, second = (results_of(attention, tensors, options, OUTPUTS[self.kernel]) for _ in range(2))
            for tensor in OUTPUTS[self.kernel]:
                if not torch.equal(first[tensor].view(torch.uint8), second[tensor].view(torch.uint8)):
                    return Check(worst, "not repeatable", f"{tensor}, {name}")
                error = accuracy.max_error(first[tensor], exact[tensor])
                if not error <= allowed[tensor]:
                    return Check(worst, "incorrect", f"{tensor}: error {error:.1e}, {allowed[tensor]:.1e} allowed, {name}")
                worst[tensor] = max(worst.get(tensor, (0.0, 1.0)), (error, allowed[tensor]), key=lambda pair: pair[0] / pair[1])
            if self.kernel == "forward":
                # inference uses another binary
                with pinned(forward=Config.parse(config)), torch.no_grad():
                    o = attention(*tensors[:3], bias=tensors[4], **options)
                if not accuracy.max_error(o, exact["o"]) <= allowed["o"]:
                    return Check(worst, "incorrect", f"o without a gradient, {name}")
        return Check(worst)

    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...] | Failure]:
        """Return `rounds` interleaved samples of each config in seconds. If one fails, the others are timed again."""
        self._launch = self._launch or launcher(self.kernel, self.problem, self.device, self._seed)
        configs, results = list(configs), {}
        with self._timer.context():
            while configs:
                try:
                    timed = {config: timing.Timed([self._call(config)]) for config in configs}
                    timer = timing.InterleavedTimer(timed, self._timer, self._budget)
                    timer.settle()
                    for _ in range(rounds):
                        timer.take()
                    return results | {config: timer.timing(config).samples for config in configs}
                except timing.TimedError as error:
                    results[error.name] = Failure(*self._reason(error.__cause__))
                    configs.remove(error.name)
        return results

    def _call(self, config):
        @functools.cache
        def prepared():
            return self._launch(Config.parse(config))

        # prepared at the first call, so that an error is attributed to this config
        return lambda: launch.run(prepared(), self.device)

    def _reason(self, error) -> tuple[str, str]:
        """Return the reason code and the message of an error. Raises DeviceLost if the device is unusable after it."""
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        try:
            self._timer.synchronize()
        except RuntimeError as lost:
            raise DeviceLost(message) from lost
        return "launch error", message

    def _with_tolerance(self, name, tensors, options):
        """Return a case with its exact results and the error allowed for each."""
        names = OUTPUTS[self.kernel]
        reference_options = options_of_reference(options, tensors)
        exact = results_of(reference.attention, tensors, reference_options, names, torch.float64)
        rounded = results_of(reference.attention, tensors, reference_options, names)
        if "lse" in names:
            # float32 whatever the dtype of the inputs
            wide = torch.promote_types(self.problem.dtype, torch.float32)
            rounded["lse"] = results_of(reference.attention, tensors, reference_options, ("lse",), wide)["lse"]
        allowed = {tensor: min(HUGE, ROUNDING + accuracy.tolerance(rounded[tensor], exact[tensor], rounded[tensor].dtype))
                   for tensor in names}
        return name, (tensors, options), exact, allowed


def results_of(function, tensors, options: dict, names: tuple[str, ...], dtype: torch.dtype | None = None) -> dict:
    """Return the named results of an attention function for (q, k, v, do, bias or None), computed in `dtype` if given."""
    q, k, v, do, bias = (x if x is None else x.detach().to(dtype or x.dtype) for x in tensors)
    leaves = {name: x.requires_grad_() for name, x in (("dq", q), ("dk", k), ("dv", v), ("dbias", bias)) if x is not None}
    o, lse = function(q, k, v, bias=bias, return_lse=True, **options)
    wanted = [name for name in names if name in leaves]
    gradients = torch.autograd.grad(o, [leaves[name] for name in wanted], do.to(o.dtype)) if wanted else ()
    results = {"o": o.detach(), "lse": lse.detach()} | dict(zip(wanted, gradients))
    return {name: results[name] for name in names}


def options_of_reference(options: dict, tensors) -> dict:
    """Return the options of `attention` as `reference.attention` takes them."""
    q, k = tensors[:2]
    options = dict(options)
    if "mask" in options:
        options["mask"] = getattr(options["mask"], "mask", options["mask"])
    if (seed := options.pop("dropout_seed", None)) is not None:
        shape = (math.prod(q.shape[:-3]), q.shape[-3], q.shape[-2], k.shape[-2])
        options["keep"] = dropout_mask(shape, options["dropout_p"], seed).view(*q.shape[:-1], k.shape[-2])
    return options


def draw(problem: Problem, device, seed: int) -> tuple[list, dict]:
    """Draw [q, k, v, do, bias or None] from a normal distribution, and the other options of `attention`.

    All batches share a bias and a mask; all heads share a mask, and a bias that would be larger than LARGEST.
    """
    rng = torch.Generator(device).manual_seed(seed)
    q, k, v = problem.tensors(device, seed)
    do = torch.randn(*q.shape[:-1], problem.dv, dtype=problem.dtype, device=device, generator=rng)
    large = problem.heads * problem.n_q * problem.n_k > LARGEST
    shape = (*(1 for _ in problem.batch), 1 if large else problem.heads, problem.n_q, problem.n_k)
    bias = None if problem.bias is None else torch.randn(shape, dtype=problem.bias, device=device, generator=rng)
    options = {"window": problem.window, "align": "bottom_right" if problem.shift else "top_left"}
    if problem.masked:
        mask = torch.rand(*shape[:-3], 1, *shape[-2:], device=device, generator=rng) < 0.9
        # whole tiles are masked, and whole tiles are not
        mask[..., : problem.n_q // 2, : problem.n_k // 4], mask[..., problem.n_q // 2:, problem.n_k // 2:] = False, True
        options["mask"] = block_mask(mask) if problem.mapped else mask
    if problem.lengths:
        options["key_lengths"] = torch.randint(problem.n_k // 2, problem.n_k + 1, problem.batch, dtype=torch.int32,
                                               device=device, generator=rng)
    if problem.dropout:
        options |= {"dropout_p": DROPOUT_P, "dropout_seed": torch.tensor([seed], dtype=torch.int64, device=device)}
    return [q, k, v, do, bias], options


def hard_inputs(problem: Problem, device, seed: int) -> list[tuple]:
    """Return (name, tensors, options) of small inputs of the same kind that are hard to get right, and of one head of the
    problem's own size."""
    size = (70, 100) if gpu.INTERPRETED else (300, 400)
    n_q, n_k = min(size[0], problem.n_q), min(size[1], problem.n_k)
    left, right = (side if side in (None, 0) else min(side, n_k // 3) for side in problem.window)
    small = dataclasses.replace(problem, batch=(2,), heads=2 * problem.group, kv_heads=2, n_q=n_q, n_k=n_k, shift=0,
                                window=(left, right))
    scores = draw(small, device, seed + 1)
    scores[0][0].mul_(32)
    tensors, options = draw(small, device, seed + 2)
    cases = [("ragged lengths", *draw(small, device, seed)), ("large scores", *scores),
             ("nan past the ends", [x if x is None else surrounded_by_nan(x) for x in tensors], options)]
    if (masked := with_masked_rows(small, device, seed + 3)) is not None:
        cases.append(("fully masked rows", *masked))
    own = dataclasses.replace(problem, batch=(1,), heads=problem.group, kv_heads=1)
    if own.heads * own.n_q * own.n_k <= LARGEST and not gpu.INTERPRETED:
        cases.append(("one head of the problem's own size", *draw(own, device, seed + 4)))
    return cases


def surrounded_by_nan(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of x inside a larger tensor that is nan everywhere else."""
    outer = torch.full((*x.shape[:-2], x.shape[-2] + 64, x.shape[-1] + 64), torch.nan, dtype=x.dtype, device=x.device)
    return outer[..., : x.shape[-2], : x.shape[-1]].copy_(x)


def with_masked_rows(problem: Problem, device, seed: int) -> tuple | None:
    """Return inputs in which some queries attend to no key, or None if nothing in this problem can mask a whole row."""
    if problem.n_q < 4:
        return None
    if problem.window[1] is not None:
        # the first queries come before the first key
        n_k = max(1, problem.n_q // 2)
        problem = dataclasses.replace(problem, n_k=n_k, shift=n_k - problem.n_q)
    tensors, options = draw(problem, device, seed)
    rows = slice(None, max(1, problem.n_q // 3))
    if tensors[4] is not None:
        tensors[4][..., rows, :] = -torch.inf
    elif problem.masked:
        mask = getattr(options["mask"], "mask", options["mask"])
        mask[..., rows, :] = False
        options["mask"] = block_mask(mask) if problem.mapped else mask
    elif problem.lengths:
        options["key_lengths"][0] = 0
    elif not problem.shift:
        return None
    return tensors, options


def launcher(kernel: str, problem: Problem, device, seed: int):
    """Return a function from a Config to the launch.KernelLaunch of this kernel; the kernels that it depends on have run."""
    tensors, options = draw(problem, device, seed)
    inputs = prepare(*tensors[:3], bias=tensors[4], **options)
    local_gpu, do = gpu.gpu_of(inputs.q.device), tensors[3]
    o, lse, o_residual, lse_minus_max = empty_outputs(inputs.q, inputs.v, inputs.bias, problem.dtype.itemsize == 2)
    o_residuals, lse_minus_maxes = (o_residual,) if o_residual.numel() else (), () if inputs.bias is None else (lse_minus_max,)
    delta = torch.empty_like(lse)
    queries = Queries(inputs.q, do, lse, delta, lse_minus_maxes)
    dq, dk, dv = (torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v))
    dbias = None if inputs.bias is None else torch.empty_like(inputs.bias)
    outputs = Outputs(o, lse, o_residuals, lse_minus_maxes)
    launches = {
        "forward": lambda config: launch.forward_launch(problem, config, inputs, outputs),
        "delta": lambda config: launch.delta_launch(problem, config, o, next(iter(o_residuals), None), do, None, delta),
        "dq": lambda config: launch.dq_launch(problem, config, inputs, queries, dq),
        "dkdv": lambda config: launch.dkdv_launch(problem, config, inputs, queries, dk, dv),
        "dbias": lambda config: launch.dbias_launch(problem, config, inputs, queries, dbias),
    }
    for before in ("forward", "delta")[: 0 if kernel == "forward" else 1 if kernel == "delta" else 2]:
        launch.run(launches[before](lookup_config(before, problem, local_gpu).config), inputs.q.device)
    return launches[kernel]


class IsolatedBench:
    """A Bench in a child process, which is replaced when a config hangs or makes the device unusable. A context manager."""

    CODE = f"from {__name__} import serve_bench; serve_bench()"

    def __init__(self, kernel: str, problem: Problem, device: str, seed: int = 0, code: str = CODE):
        """code: what the child runs, for tests."""
        self._bench, self._code = (kernel, problem, str(device), seed), code
        self._child: Child | None = None
        self._sample_seconds: float | None = None

    def now(self) -> float:
        return time.monotonic()

    def check(self, config: str) -> Check:
        """Check a config as Bench.check does."""
        result = self._ask(("check", config), CHECK_LIMIT)
        return Check({}, result.code, result.message) if isinstance(result, Failure) else result

    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...] | Failure]:
        """Time configs as Bench.times does. If the child fails, each config is tried alone, then the rest together again."""
        results = self._time_one_sample(configs)
        while remaining := [config for config in configs if config not in results]:
            answer = self._ask(("times", remaining, rounds), self._limit(rounds * len(remaining)))
            if not isinstance(answer, Failure):
                return results | answer
            if len(remaining) == 1:
                return results | {remaining[0]: answer}
            alone = {config: self._time_alone(config, self._limit(1)) for config in remaining}
            failures = {config: result for config, result in alone.items() if isinstance(result, Failure)}
            if not failures:
                # together they take too long, or too much memory
                half = len(remaining) // 2
                return results | self.times(remaining[:half], rounds) | self.times(remaining[half:], rounds)
            results |= failures
        return results

    def _time_one_sample(self, configs) -> dict[str, Failure]:
        """Measure how long a sample takes, with the first config that gives one. Return the failures before it."""
        failures = {}
        for config in configs if self._sample_seconds is None else ():
            if self._child is None:
                # starting takes long, and is not part of a sample
                self._start()
            start = self.now()
            result = self._time_alone(config, FIRST_LIMIT)
            if not isinstance(result, Failure):
                self._sample_seconds = min(self.now() - start, LONGEST_SAMPLE)
                break
            failures[config] = result
        return failures

    def _time_alone(self, config, limit):
        result = self._ask(("times", [config], 1), limit)
        return result if isinstance(result, Failure) else result[config]

    def _limit(self, samples) -> float:
        return BASE_LIMIT + (SAMPLE_LIMIT + self._sample_seconds) * samples

    def _ask(self, job, limit):
        """Return the child's result; after a Failure the child is gone. Raises RuntimeError if no child can do any job."""
        if self._child is None:
            self._start()
        result = self._exchange(job, limit)
        if isinstance(result, Failure):
            self.__exit__()
            if "OutOfMemoryError" in result.message:
                raise RuntimeError(f"bench: no room for the tensors of {self._bench[1]}: {result.message}")
        return result

    def _exchange(self, job, limit):
        try:
            self._child.send(job)
            return self._child.receive(limit)
        except TimeoutError:
            return Failure("hang", f"no result in {limit:.0f} s", lasting=False)
        except EOFError:
            return Failure("device lost", "its process ended", lasting=False)
        except BaseException:
            self.__exit__()
            raise

    def _start(self):
        self._child = Child(self._code, uses_gpu=True)
        result = self._exchange(("open", *self._bench), OPEN_LIMIT)
        if isinstance(result, Failure):
            # no config is to blame
            self.__exit__()
            raise RuntimeError(f"bench: a new process cannot use {self._bench[2]}: {result.message}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        child, self._child = self._child, None
        if child is not None:
            child.stop()


def serve_bench() -> None:
    """Answer the jobs of an IsolatedBench: ("open", ...), then ("check", config) and ("times", configs, rounds)."""
    benches = []

    def answer(kind, *arguments):
        if kind == "open":
            kernel, problem, device, seed = arguments
            benches[:] = [Bench(kernel, problem, device, seed=seed)]
            return None
        return getattr(benches[0], kind)(*arguments)

    serve(answer, "device lost")
