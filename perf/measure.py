"""Measure one job: check every implementation against the definition, then time the correct ones together.

"forward" is inference, "backward" the backward pass alone after a forward pass with gradients, "both" that forward pass
and its backward pass.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from tritonattn import Problem, gpu, reference
from tritonattn.configs import lookup
from tritonattn.measure import accuracy, device_timer, timing

from .baselines import Implementation, Unsupported, align, sdpa_choice, variants
from .cases import Case
from .results import OURS

FLOAT32_PAIRS = 2**31  # (query, key) pairs above which 16-bit results are checked against float32 instead of float64
MAX_COPIES = 32        # copies of small inputs, rotated so that none is in the cache
KERNELS = {"forward": ("forward",), "backward": ("delta", "dq", "dkdv"), "both": ("forward", "delta", "dq", "dkdv")}
TENSORS = {"forward": ("o",), "backward": ("dq", "dk", "dv"), "both": ("o", "dq", "dk", "dv")}


class DeviceLost(Exception):
    """The device fails every call, after a sticky CUDA error for example; `name` is the implementation that ran last."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


Expected = dict[str, tuple[torch.Tensor, float]]  # {name: (exact tensor, allowed error)}


@dataclass
class Setup:
    """A device, its timer and the time to spend. The expected tensors of the last case are kept for its other directions."""

    device: torch.device
    timer: device_timer.Cuda | device_timer.Host
    budget: timing.TimingBudget = field(default_factory=timing.TimingBudget)
    _expected: tuple = (None, None)

    def expected(self, case: Case, inputs) -> Expected:
        """Return the expected tensors of a case."""
        if self._expected[0] != case:
            self._expected = (None, None)  # free the memory first
            self._expected = (case, expected_tensors(case, inputs))
        return self._expected[1]


def measure_job(setup: Setup, case: Case, direction: str, implementations: list[Implementation],
                excluded: Mapping[str, str]) -> dict:
    """Return {"results": {name: outcome}, "state": device state} as the journal stores it.

    `excluded` maps names of implementations that must not run to the reason. Raises DeviceLost.
    """
    needed = case.problem.bytes("forward" if direction == "forward" else "backward")
    cuda = setup.device.type == "cuda"
    limit = torch.cuda.get_device_properties(setup.device).total_memory // 2 if cuda else 4 << 30
    if needed > limit:
        reason = f"the tensors need {needed / 2**30:.0f} GiB, the limit is {limit / 2**30:.0f} GiB"
        return {"results": {each.name: {"status": "refused", "reason": reason} for each in implementations}, "state": None}
    outcomes, ready = {}, {}
    with setup.timer.context():
        inputs = draw_inputs(case.problem, setup.device, copies_needed(case.problem, setup.timer.cache_bytes))
        expected = setup.expected(case, inputs[0])
        for each in implementations:
            if each.missing:
                outcomes[each.name] = {"status": "missing", "reason": each.missing}
            elif reason := excluded.get(each.name):
                outcomes[each.name] = {"status": "failed", "reason": reason}
            else:
                outcomes[each.name] = check(setup, each, case.problem, direction, inputs, expected, ready)
        timings, states = _time(setup, ready, outcomes)
    for name, result in timings.items():
        outcomes[name] = timed_outcome(result, outcomes[name]["details"])
    return {"results": outcomes, "state": summarize_states(states)}


def copies_needed(problem: Problem, cache_bytes: int) -> int:
    """Return how many copies of the inputs exceed the cache, so that rotating them leaves none in it."""
    size = problem.bytes()
    return 1 if size >= 2 * cache_bytes else min(MAX_COPIES, -(-3 * cache_bytes // size))


def draw_inputs(problem: Problem, device, copies: int) -> list[tuple]:
    """Return copies of (q, k, v, do) with different random normal values. Constant inputs would draw less power."""
    rows = problem.packed and (problem.packed[0], 1)
    like_o = Problem(problem.batch, problem.heads, problem.heads, problem.n_q, 1, problem.dv, 1, problem.dtype, packed=rows)
    return [(*problem.tensors(device, seed=2 * i), like_o.tensors(device, seed=2 * i + 1)[0]) for i in range(copies)]


def expected_tensors(case: Case, inputs) -> Expected:
    """Compute a case by the definition in float64 (float32 for large 16-bit problems), and the error allowed for each tensor.

    Raises ValueError if the definition in the problem's dtype is not finite, which leaves no bound for the error.
    """
    problem, (q, k, v, do) = case.problem, inputs
    pairs = math.prod(problem.batch) * problem.heads * problem.n_q * problem.n_k
    wide = torch.float32 if pairs > FLOAT32_PAIRS and problem.dtype.itemsize == 2 else torch.float64
    names, do = (TENSORS["forward"], None) if case.directions == ("forward",) else (TENSORS["both"], do)

    def tensors_by_name(dtype):
        if problem.packed:
            # all sequences are as long as the longest
            tensors = [x if x is None else x[0].unflatten(1, (problem.batch[0], -1)).transpose(0, 1) for x in (q, k, v, do)]
        else:
            tensors = q, k, v, do
        tensors = reference.by_heads(*tensors, dtype=dtype, window=problem.window, align=align(problem),
                                     **variants(problem, 1, q.device))
        tensors = (tensors,) if do is None else tensors
        return dict(zip(names, (x.transpose(0, 1).flatten(1, 2)[None] for x in tensors) if problem.packed else tensors))

    exact, rounded = tensors_by_name(wide), tensors_by_name(problem.dtype)
    expected = {name: (exact[name], accuracy.tolerance(rounded[name], exact[name], problem.dtype)) for name in names}
    if unbounded := [name for name, (_, allowed) in expected.items() if not math.isfinite(allowed)]:
        raise ValueError(f"{', '.join(unbounded)}: the definition in {problem.dtype} is not finite")
    return expected


def check(setup: Setup, each: Implementation, problem: Problem, direction: str, inputs, expected: Expected,
          ready: dict) -> dict:
    """Run an implementation, compare it with the expected tensors, and return its outcome. Raises DeviceLost.

    The calls of a correct implementation are added to `ready`, to be timed.
    """
    try:
        with each.context():
            function = each.build(problem, setup.device)
            calls = [call_of(direction, function, *copy) for copy in inputs]
            first = calls[0]()
            errors = {name: (accuracy.max_error(x, expected[name][0]), expected[name][1])
                      for name, x in zip(TENSORS[direction], first)}
            # JSON has no infinity
            recorded = {name: [error if math.isfinite(error) else None, allowed] for name, (error, allowed) in errors.items()}
            details = {"errors": recorded, "repeatable": all(map(torch.equal, first, calls[0]()))}
            wrong = [f"{name}: error {error:.1e}, limit {allowed:.1e}" for name, (error, allowed) in errors.items()
                     if not error <= allowed]
            if wrong:
                return {"status": "wrong", "reason": ", ".join(wrong), "details": details}
            del first
            details |= {"peak_bytes": setup.timer.peak_bytes(calls[0])} | choices(each, problem, direction, inputs[0])
    except Unsupported as error:
        return {"status": "refused", "reason": str(error)}
    except Exception as error:
        return failure(setup, each.name, error)
    ready[each.name] = timing.Timed(calls, problem.bytes(), each.context)
    return {"status": "ok", "details": details}


def failure(setup: Setup, name: str, error: Exception) -> dict:
    """Return the outcome of an implementation that raised. Raises DeviceLost if the device does not respond any more."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    try:
        setup.timer.synchronize()
    except RuntimeError as lost:
        raise DeviceLost(name, reason) from lost
    # torch's message if the forced backend does not support the problem
    return {"status": "refused" if "No available kernel" in reason else "failed", "reason": reason}


def call_of(direction: str, function, q, k, v, do):
    """Return a function that runs one direction and returns its tensors; for "backward", the forward pass has run."""
    if direction == "forward":
        return lambda: (function(q, k, v),)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if direction == "backward":
        o = function(*leaves)
        return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)

    def both():
        o = function(*leaves)
        return o.detach(), *torch.autograd.grad(o, leaves, do)

    return both


def choices(each: Implementation, problem: Problem, direction: str, inputs) -> dict:
    """Return what an implementation selects by itself: our configs, the backend of torch's SDPA."""
    q, k, v = (x.detach().requires_grad_(direction != "forward") for x in inputs[:3])
    if each.name.startswith(OURS):
        this_gpu = gpu.gpu_of(q.device)
        return {"configs": {kernel: str(lookup.get_config(kernel, problem, this_gpu)) for kernel in KERNELS[direction]}}
    return {"backend": sdpa_choice(problem, q, k, v)} if each.name == "torch" and q.is_cuda else {}


def _time(setup, ready, outcomes):
    """Time all that are ready. One that fails while it is timed is removed, and the others are timed again."""
    # only `ready` holds the tensors of an implementation, so that removing it frees their memory
    while ready:
        try:
            return timing.measure(ready, setup.timer, setup.budget)
        except timing.TimedError as error:
            outcomes[error.name] = failure(setup, error.name, error.__cause__)
            del ready[error.name]
    return {}, []


def timed_outcome(result: timing.Timing, details: dict) -> dict:
    """Return the outcome of an implementation that was timed; lists are in microseconds."""
    details = details | {
        "method": result.method, "caches": result.caches, "calls": result.calls, "note": result.note,
        "host_us": round(result.host_seconds * 1e6, 2), "samples_us": [round(x * 1e6, 3) for x in result.samples],
        "throttled_samples": list(result.throttled),
    }
    return {"status": "ok", "seconds": result.seconds, "q20": result.q20, "q80": result.q80,
            "throttled": result.mostly_throttled, "details": details}


def summarize_states(states: list[device_timer.State]) -> dict | None:
    """Return clocks in MHz, temperature in degrees Celsius, power in watts, and the rounds with each throttle reason."""
    if not states:
        return None
    clocks = [state.clock for state in states]
    return {"clock": statistics.median(clocks), "least_clock": min(clocks), "most_clock": max(clocks),
            "temperature": max(state.temperature for state in states),
            "power": statistics.median(state.power for state in states),
            "reasons": dict(Counter(reason for state in states for reason in state.reasons)), "rounds": len(states)}
