"""One kernel of one problem on a device, with any config: held against the definition, then timed in turns with others.

    check   on inputs made to be hard, twice, to the bit; at the problem's own size where the definition is not too large
    times   on the device's own clock (timing.py), cold, or warm where a launch takes less than 100 us; so many rounds, each
            with one sample of every config
"""

import dataclasses
import functools
import math

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
from .worker_pool import Failure

# of each kernel's trials: the tensors it makes
MAKES = {"forward": ("o", "lse"), "delta": ("dq",), "dq": ("dq",), "dkdv": ("dk", "dv"), "dbias": ("dbias",)}
# each config is tried once before it is timed: there are many
EFFORT = timing.TimingBudget(settle=(0.2, 1.0), long=0.0)
LARGEST = 2**27  # scores of the definition at the problem's own size; beyond that it is not formed
DROPPED = 0.5         # as the lens compiles it
FLOOR = 3e-5          # that anything may be off: what is exactly 0 may come of float32 sums that are rounded
ENORMOUS = 1e30       # JSON has no word for what is infinite


class DeviceLost(RuntimeError):
    """The device is unusable in this process."""


class Bench:
    """A kernel of a problem, ready to be run with any config."""

    def __init__(self, kernel: str, problem: Problem, device, stopwatch=None, effort: timing.TimingBudget = EFFORT, seed: int = 0):
        self.kernel, self.problem, self.device = kernel, problem, torch.device(device)
        self.stopwatch = stopwatch or device_timer.timer_of(self.device)
        self._effort, self._seed, self._truths, self._call = effort, seed, None, None

    def now(self) -> float:
        return self.stopwatch.now()

    def check(self, config: str) -> Check:
        """Run with this config on everything that `hard` gives, twice."""
        if self._truths is None:
            self._truths = [self._truth(*given) for given in hard(self.problem, self.device, self._seed)]
        try:
            return self._check(config)
        except torch.OutOfMemoryError:
            # no fault of the config's
            raise
        except Exception as error:  # whatever the compiler or the launch raises is told
            return Check({}, *self._reason(error))

    def _check(self, config):
        worst = {}
        for name, given, exact, allowed in self._truths:
            with pinned(**{self.kernel: Config.parse(config)}):
                first, second = (outcome(attention, *given, MAKES[self.kernel]) for _ in range(2))
            for tensor in MAKES[self.kernel]:
                if not torch.equal(first[tensor].view(torch.uint8), second[tensor].view(torch.uint8)):
                    return Check(worst, "not repeatable", f"{tensor}, {name}")
                error = accuracy.max_error(first[tensor], exact[tensor])
                if not error <= allowed[tensor]:
                    return Check(worst, "incorrect", f"{tensor} is off by {error:.1e}, {allowed[tensor]:.1e} allowed, {name}")
                worst[tensor] = max(worst.get(tensor, (0.0, 1.0)), (error, allowed[tensor]), key=lambda pair: pair[0] / pair[1])
            if self.kernel == "forward":
                # without a gradient to come it is another binary
                with pinned(forward=Config.parse(config)), torch.no_grad():
                    bare = attention(*given[0][:3], bias=given[0][4], **given[1])
                if not accuracy.max_error(bare, exact["o"]) <= allowed["o"]:
                    return Check(worst, "incorrect", f"o without a gradient, {name}")
        return Check(worst)

    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...] | Failure]:
        """`rounds` samples of each in seconds, round by round, in turns; where one fails, the others once more without it."""
        self._call = self._call or launches(self.kernel, self.problem, self.device, self._seed)
        configs, found = list(configs), {}
        with self.stopwatch.context():
            while configs:
                try:
                    contenders = {config: timing.Timed([self._launch(config)]) for config in configs}
                    turns = timing.InterleavedTimer(contenders, self.stopwatch, self._effort)
                    turns.settle()
                    for _ in range(rounds):
                        turns.take()
                    return found | {config: turns.timing(config).samples for config in configs}
                except timing.TimedError as failed:
                    found[failed.name] = Failure(*self._reason(failed.__cause__))
                    configs.remove(failed.name)
        return found

    def _launch(self, config):
        @functools.cache
        def prepared():
            return self._call(Config.parse(config))

        # prepared at its first use, so that what it raises is this contender's
        return lambda: launch.run(prepared(), self.device)

    def _reason(self, error) -> tuple[str, str]:
        """Code and words for what was raised. Raises DeviceLost where nothing can run after it."""
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        try:
            self.stopwatch.synchronize()
        except RuntimeError as lost:
            raise DeviceLost(said) from lost
        return "launch error", said

    def _truth(self, name, tensors, options):
        """What is exact on these inputs, and how far from it a kernel may be."""
        wanted = MAKES[self.kernel]
        exact = outcome(reference.attention, tensors, as_defined(options, tensors), wanted, torch.float64)
        torchs = outcome(reference.attention, tensors, as_defined(options, tensors), wanted)
        if "lse" in wanted:
            # it is float32 whatever the inputs are
            wide = torch.promote_types(self.problem.dtype, torch.float32)
            torchs["lse"] = outcome(reference.attention, tensors, as_defined(options, tensors), ("lse",), wide)["lse"]
        allowed = {tensor: min(ENORMOUS, FLOOR + accuracy.tolerance(torchs[tensor], exact[tensor], torchs[tensor].dtype))
                   for tensor in wanted}
        return name, (tensors, options), exact, allowed


def outcome(attend, tensors, options: dict, wanted: tuple[str, ...], dtype: torch.dtype | None = None) -> dict:
    """The tensors that one kind of attention makes of q, k, v, do and a bias or None, by name; in `dtype`, if given."""
    q, k, v, do, bias = (x if x is None else x.detach().to(dtype or x.dtype) for x in tensors)
    leaves = {name: x.requires_grad_() for name, x in (("dq", q), ("dk", k), ("dv", v), ("dbias", bias)) if x is not None}
    o, lse = attend(q, k, v, bias=bias, return_lse=True, **options)
    asked = [name for name in wanted if name in leaves]
    gradients = torch.autograd.grad(o, [leaves[name] for name in asked], do.to(o.dtype)) if asked else ()
    made = {"o": o.detach(), "lse": lse.detach()} | dict(zip(asked, gradients))
    return {name: made[name] for name in wanted}


def as_defined(options: dict, tensors) -> dict:
    """The same options, as the definition takes them."""
    q, k = tensors[:2]
    options = dict(options)
    if "mask" in options:
        options["mask"] = getattr(options["mask"], "mask", options["mask"])
    if (seed := options.pop("dropout_seed", None)) is not None:
        shape = (math.prod(q.shape[:-3]), q.shape[-3], q.shape[-2], k.shape[-2])
        options["keep"] = dropout_mask(shape, options["dropout_p"], seed).view(*q.shape[:-1], k.shape[-2])
    return options


def draw(problem: Problem, device, seed: int) -> tuple[list, dict]:
    """q, k, v, do and a bias or None, random normal; and the other options of attention. What is given for each pair is
    shared by all batches; a mask, and what would be huge, by all heads too."""
    rng = torch.Generator(device).manual_seed(seed)
    q, k, v = problem.tensors(device, seed)
    do = torch.randn(*q.shape[:-1], problem.dv, dtype=problem.dtype, device=device, generator=rng)
    large = problem.heads * problem.n_q * problem.n_k > LARGEST
    pairs = (*(1 for _ in problem.batch), 1 if large else problem.heads, problem.n_q, problem.n_k)
    bias = None if problem.bias is None else torch.randn(pairs, dtype=problem.bias, device=device, generator=rng)
    options = {"window": problem.window, "align": "bottom_right" if problem.shift else "top_left"}
    if problem.masked:
        mask = torch.rand(*pairs[:-3], 1, *pairs[-2:], device=device, generator=rng) < 0.9
        # whole tiles of it are seen by none, and by all
        mask[..., : problem.n_q // 2, : problem.n_k // 4], mask[..., problem.n_q // 2:, problem.n_k // 2:] = False, True
        options["mask"] = block_mask(mask) if problem.mapped else mask
    if problem.lengths:
        options["key_lengths"] = torch.randint(problem.n_k // 2, problem.n_k + 1, problem.batch, dtype=torch.int32,
                                               device=device, generator=rng)
    if problem.dropout:
        options |= {"dropout_p": DROPPED, "dropout_seed": torch.tensor([seed], dtype=torch.int64, device=device)}
    return [q, k, v, do, bias], options


def hard(problem: Problem, device, seed: int) -> list[tuple]:
    """(name, tensors, options): small inputs of the same kind that are hard to do right, and one head of its own size."""
    size = (70, 100) if gpu.INTERPRETED else (300, 400)
    n_q, n_k = min(size[0], problem.n_q), min(size[1], problem.n_k)
    left, right = (side if side in (None, 0) else min(side, n_k // 3) for side in problem.window)
    small = dataclasses.replace(problem, batch=(2,), heads=2 * problem.group, kv_heads=2, n_q=n_q, n_k=n_k, shift=0,
                                window=(left, right))
    found = [("ragged lengths", *draw(small, device, seed)), ("large scores", *draw(small, device, seed + 1)),
             ("nan past the ends", *draw(small, device, seed + 2))]
    found[1][1][0].mul_(32)
    found[2] = (found[2][0], [x if x is None else in_nans(x) for x in found[2][1]], found[2][2])
    if (blind := blinded(small, device, seed + 3)) is not None:
        found.append(("rows that see nothing", *blind))
    own = dataclasses.replace(problem, batch=(1,), heads=problem.group, kv_heads=1)
    if own.heads * own.n_q * own.n_k <= LARGEST and not gpu.INTERPRETED:
        found.append(("one head of its own size", *draw(own, device, seed + 4)))
    return found


def in_nans(x: torch.Tensor) -> torch.Tensor:
    """The same numbers inside of a larger tensor that is nan everywhere else."""
    around = torch.full((*x.shape[:-2], x.shape[-2] + 64, x.shape[-1] + 64), torch.nan, dtype=x.dtype, device=x.device)
    inside = around[..., : x.shape[-2], : x.shape[-1]]
    return inside.copy_(x)


def blinded(problem: Problem, device, seed: int) -> tuple | None:
    """Inputs where some queries see no key; None where the problem has nothing that hides one, or hardly a query."""
    if problem.n_q < 4:
        return None
    if problem.window[1] is not None:
        # the first queries stand before the first key
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


def launches(kernel: str, problem: Problem, device, seed: int):
    """What makes of a config the launch.KernelLaunch of this kernel, on inputs that are drawn once; what it needs has run."""
    tensors, options = draw(problem, device, seed)
    inputs = prepare(*tensors[:3], bias=tensors[4], **options)
    here, do = gpu.gpu_of(inputs.q.device), tensors[3]
    o, lse, residual, excess = empty_outputs(inputs.q, inputs.v, inputs.bias, problem.dtype.itemsize == 2)
    kept, over = (residual,) if residual.numel() else (), () if inputs.bias is None else (excess,)
    delta = torch.empty_like(lse)
    queries = Queries(inputs.q, do, lse, delta, over)
    into = {name: torch.empty_like(x) for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))}
    dbias = None if inputs.bias is None else torch.empty_like(inputs.bias)
    calls = {
        "forward": lambda config: launch.forward_launch(problem, config, inputs, Outputs(o, lse, kept, over)),
        "delta": lambda config: launch.delta_launch(problem, config, o, kept[0] if kept else None, do, None, delta),
        "dq": lambda config: launch.dq_launch(problem, config, inputs, queries, into["q"]),
        "dkdv": lambda config: launch.dkdv_launch(problem, config, inputs, queries, into["k"], into["v"]),
        "dbias": lambda config: launch.dbias_launch(problem, config, inputs, queries, dbias),
    }
    for before in ("forward", "delta")[: 0 if kernel == "forward" else 1 if kernel == "delta" else 2]:
        launch.run(calls[before](lookup_config(before, problem, here).config), inputs.q.device)
    return calls[kernel]
