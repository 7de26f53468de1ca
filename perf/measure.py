"""One job: a case in one direction. Every contender is checked against the definition; those that are right are timed.

"forward" is inference; "backward" is the backward pass alone, after a forward pass made for training; "both" is that
forward pass and its backward pass.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch

from tritonattn import Problem, gpu, reference
from tritonattn.configs import lookup
from tritonattn.measure import accuracy, device_timer, timing

from .baselines import Refused, Rival, bottom_right, sdpa_choice
from .cases import Case

LARGE = 2**31  # pairs above which 16-bit results are held against float32, whose rounding is far finer than theirs
COPIES = 32    # of small inputs at most, to be rotated
BURST = 100    # kernels that a profiler sees before those that count: it may lose the first of a session
NOBODY = MappingProxyType({})
SPIN = "spin_kernel"  # what these are called; no contender runs it
KERNELS = {"forward": ("forward",), "backward": ("delta", "dq", "dkdv"), "both": ("forward", "delta", "dq", "dkdv")}
TENSORS = {"forward": ("o",), "backward": ("dq", "dk", "dv"), "both": ("o", "dq", "dk", "dv")}


class DeviceLost(Exception):
    """The device answers nothing any more; `name` is the contender that ran last."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class Truth(NamedTuple):
    """The exact results of a case, in the order of its tensors, and the error that each may have."""

    exact: dict[str, torch.Tensor]
    allowed: dict[str, float]

    def errors(self, names, results) -> dict[str, list[float]]:
        """{tensor: [error, allowed]}"""
        return {name: [accuracy.max_error(x, self.exact[name]), self.allowed[name]] for name, x in zip(names, results)}


@dataclass
class Bench:
    """A device, how it is timed, and what is kept from one job to the next."""

    device: torch.device
    stopwatch: object  # of tritonattn.clock
    effort: timing.TimingBudget = field(default_factory=timing.TimingBudget)
    _truth: tuple = (None, None)

    def truth(self, case: Case, inputs) -> Truth:
        """Of this case; its directions come one after another, so that of the last case is kept."""
        if self._truth[0] != case:
            self._truth = (None, None)
            self._truth = (case, truth(case, inputs))
        return self._truth[1]

    @property
    def room(self) -> int:
        """Bytes that inputs may take."""
        return torch.cuda.get_device_properties(self.device).total_memory // 2 if self.device.type == "cuda" else 4 << 30


def job(bench: Bench, case: Case, direction: str, rivals: list[Rival], without: Mapping[str, str] = NOBODY) -> dict:
    """{"results": {contender: its outcome}, "state": what the device said}, as the journal holds them; or DeviceLost.

    `without` names contenders that are not run, and why.
    """
    if too_large := _too_large(bench, case.problem, direction):
        return {"results": {rival.name: {"status": "refused", "reason": too_large} for rival in rivals}, "state": None}
    results, ready = {}, {}
    with bench.stopwatch.context():
        inputs = draw(case.problem, bench.device, _copies(case.problem, bench.stopwatch.cache_bytes))
        truth_here = bench.truth(case, inputs[0])
        for rival in rivals:
            if reason := without.get(rival.name):
                results[rival.name] = {"status": "failed", "reason": reason}
            else:
                results[rival.name] = prepare(bench, rival, case, direction, inputs, truth_here, ready)
        timings, states = _time(bench, ready, results)
    for contender, found in timings.items():
        results[contender] = as_ok(found, results[contender]["details"])
    return {"results": results, "state": summary(states)}


def _too_large(bench, problem: Problem, direction):
    needed = problem.bytes("forward" if direction == "forward" else "backward")
    if needed > bench.room:
        return f"its tensors are {needed / 2**30:.0f} GiB, there is room for {bench.room / 2**30:.0f}"


def _copies(problem: Problem, cache: int) -> int:
    """How many copies of the inputs it takes that none is found in a cache of so many bytes."""
    size = problem.bytes()
    return 1 if size >= 2 * cache else min(COPIES, -(-3 * cache // size))


def draw(problem: Problem, device, copies: int) -> list[tuple]:
    """Copies of q, k, v, do: random normal, each other numbers. Zeros would be multiplied faster."""
    like_o = Problem(problem.batch, problem.heads, problem.heads, problem.n_q, 1, problem.dv, 1, problem.dtype)
    return [(*problem.tensors(device, seed=2 * i), like_o.tensors(device, seed=2 * i + 1)[0]) for i in range(copies)]


def truth(case: Case, inputs) -> Truth:
    """Float64, or float32 for large problems of 16 bits; what torch makes of it, function by function, is the measure.

    Raises ValueError where what torch makes is not finite: by that nothing can be measured.
    """
    problem, (q, k, v, do) = case.problem, inputs
    pairs = torch.Size(problem.batch).numel() * problem.heads * problem.n_q * problem.n_k
    wide = torch.float32 if pairs > LARGE and problem.dtype.itemsize == 2 else torch.float64
    options = {"window": problem.window, "align": "bottom_right" if bottom_right(problem) else "top_left"}
    names, do = (TENSORS["forward"], None) if case.directions == ("forward",) else (TENSORS["both"], do)

    def by_name(dtype):
        found = reference.by_heads(q, k, v, do, dtype=dtype, **options)
        return dict(zip(names, (found,) if do is None else found))

    exact, torchs = by_name(wide), by_name(problem.dtype)
    allowed = {name: accuracy.tolerance(torchs[name], exact[name], problem.dtype) for name in names}
    if vague := [name for name, limit in allowed.items() if not math.isfinite(limit)]:
        raise ValueError(f"{', '.join(vague)}: expected finite numbers from the definition in {problem.dtype}")
    return Truth(exact, allowed)


def prepare(bench: Bench, rival: Rival, case: Case, direction: str, inputs, truth_here: Truth, ready: dict) -> dict:
    """A rival's outcome so far; if it may be timed, its calls go to `ready`. Raises DeviceLost."""
    if rival.missing:
        return {"status": "missing", "reason": rival.missing}
    try:
        with rival.around():
            function = rival.build(case.problem, bench.device)
            calls = [CALLS[direction](function, *copy) for copy in inputs]
            first = calls[0]()
            errors = truth_here.errors(TENSORS[direction], first)
            details = {"errors": errors, "repeatable": all(map(torch.equal, first, calls[0]()))}
            if wrong := [name for name, (error, allowed) in errors.items() if not error <= allowed]:
                text = ", ".join(f"{name} is off by {errors[name][0]:.1e}, {errors[name][1]:.1e} allowed" for name in wrong)
                return {"status": "wrong", "reason": text, "details": _finite(details)}
            del first
            details |= {"peak_bytes": bench.stopwatch.peak_bytes(calls[0]),
                        **_choices(rival, case.problem, direction, inputs[0], bench.device)}
    except Refused as refusal:
        return {"status": "refused", "reason": str(refusal)}
    except Exception as error:
        return failure(bench, rival.name, error)
    ready[rival.name] = timing.Timed(calls, case.problem.bytes(), rival.around)
    return {"status": "ok", "details": details}


def failure(bench: Bench, name: str, error: Exception) -> dict:
    """What an exception says of a contender, if the device outlived it; else DeviceLost."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    try:
        bench.stopwatch.synchronize()
    except RuntimeError as lost:
        raise DeviceLost(name, reason) from lost
    # torch's words where a backend that was forced does not serve the problem
    return {"status": "refused" if "No available kernel" in reason else "failed", "reason": reason}


def _forward(function, q, k, v, do):
    return lambda: (function(q, k, v),)


def _both(function, q, k, v, do):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def call():
        o = function(*leaves)
        return o.detach(), *torch.autograd.grad(o, leaves, do)

    return call


def _backward(function, q, k, v, do):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = function(*leaves)
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


CALLS = {"forward": _forward, "backward": _backward, "both": _both}


def names(bench: Bench, case: Case, direction: str, rivals: list[Rival]) -> dict[str, list[str]]:
    """{contender: the kernels that really run}; nothing is to be timed in this process any more. Raises DeviceLost."""
    found = {}
    with bench.stopwatch.context():
        for rival in rivals:
            try:
                with rival.around():
                    function = rival.build(case.problem, bench.device)
                    call = CALLS[direction](function, *draw(case.problem, bench.device, 1)[0])
                    found[rival.name] = kernels(call, bench.device)
            except Exception as error:
                found[rival.name] = [f"not read: {failure(bench, rival.name, error)['reason']}"]
    return found


def kernels(call, device, most: int = 6) -> list[str]:
    """The names of the kernels that a call runs on a GPU, the longest-running first; or "not seen"."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()  # what is compiled at the first call is none of it
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(BURST):
            torch.cuda._sleep(1000)
        torch.cuda.synchronize(device)
        for _ in range(3):
            call()
        torch.cuda.synchronize(device)
    spent = Counter()
    for event in seen.events():
        if event.device_type == DeviceType.CUDA and SPIN not in event.name:
            spent[event.name[:160]] += event.self_device_time_total
    return [name for name, _ in spent.most_common(most)] or ["not seen"]


def _choices(rival: Rival, problem: Problem, direction, inputs, device) -> dict:
    """What a contender that chooses for itself has chosen: our configs, torch's backend."""
    if rival.name.startswith("tritonattn"):
        here = gpu.gpu_of(device)
        return {"configs": {kernel: str(lookup.get_config(kernel, problem, here)) for kernel in KERNELS[direction]}}
    if rival.name == "torch" and device.type == "cuda":
        q, k, v = (x.detach().requires_grad_(direction != "forward") for x in inputs[:3])
        return {"backend": sdpa_choice(problem, q, k, v)}
    return {}


def _time(bench, ready, results):
    """Timings of those that are ready; one that fails on the way is taken out, and the others are timed anew."""
    # each contender's tensors are held by `ready` alone, so that one taken out leaves its room to the others
    while ready:
        try:
            return timing.measure(ready, bench.stopwatch, bench.effort)
        except timing.TimedError as failed:
            results[failed.name] = failure(bench, failed.name, failed.__cause__)
            del ready[failed.name]
    return {}, []


def as_ok(found: timing.Timing, details: dict) -> dict:
    """The outcome of a contender that was timed; lists are in microseconds."""
    details = details | {
        "method": found.method, "caches": found.caches, "calls": found.calls, "note": found.note,
        "host_us": round(found.host_seconds * 1e6, 2), "samples_us": [round(x * 1e6, 3) for x in found.samples],
        "throttled_samples": list(found.throttled),
    }
    return {"status": "ok", "seconds": found.seconds, "q20": found.q20, "q80": found.q80,
            "throttled": found.mostly_throttled, "details": details}


def summary(states: list[device_timer.State]) -> dict | None:
    """Clock in MHz, temperature in degrees Celsius, power in watts, and in how many rounds a reason held the clock back."""
    if not states:
        return None
    clocks = [state.clock for state in states]
    return {"clock": statistics.median(clocks), "least_clock": min(clocks), "most_clock": max(clocks),
            "temperature": max(state.temperature for state in states),
            "power": statistics.median(state.power for state in states),
            "reasons": dict(Counter(reason for state in states for reason in state.reasons)), "rounds": len(states)}


def _finite(details: dict) -> dict:
    """JSON has no word for inf."""
    errors = {name: [error if error < float("inf") else None, allowed] for name, (error, allowed) in details["errors"].items()}
    return details | {"errors": errors}
