"""Named attention calls: every feature alone (SINGLE), every pair of features (PAIRWISE), all pairs in few calls (COVERING)."""

import itertools
import math
from dataclasses import dataclass

import torch

from tests.helpers.score_functions import Both
from tests.helpers.tolerance import agree
from tritonattn import Config, attention, config, reference

TILES = Config(16, 32)
LARGE_TILES = Config(32, 32)  # an interpreted step costs the same whatever its size


@dataclass(frozen=True)
class Case:
    """One call: sizes, arguments of `attention`, and how the tensors lie in memory."""

    name: str = "plain"
    batch: tuple = (1,)
    heads: int = 1
    kv_heads: int = 1
    n_q: int = 40
    n_k: int = 40
    d: int = 16
    dv: int = 16
    causal: bool = False
    window: tuple = (None, None)
    align: str = "top_left"
    scale: float | None = None
    layout: str = "contiguous"
    pairs: tuple = ()  # keys of PAIRS
    softcap: float | None = None
    sinks: int = 0     # for each head
    alibi: bool = False
    radius: int | None = None  # of a table of relative positions
    stats: tuple = ()          # of return_stats
    normalizer: str = "softmax"
    function: str | None = None  # one of score_functions.CHANGES

    @property
    def options(self):
        return {"causal": self.causal, "window": self.window, "align": self.align, "scale": self.scale, "softcap": self.softcap,
                "normalizer": self.normalizer}

    def given(self, dtype, device, seed=1):
        """Return biases, mask, sink, names of statistics and score function, as arguments of `results`."""
        rng = torch.Generator().manual_seed(seed)
        sizes = {"batch": self.batch, "heads": (self.heads,), "n_q": (self.n_q,), "n_k": (self.n_k,)}
        arguments = {}
        for name in self.pairs:
            shape = sum((sizes.get(size, (size,)) for size in PAIRS[name]), ())
            x = torch.randn(shape, generator=rng)
            arguments["mask" if "mask" in name else "bias"] = (x > -0.7).to(device) if "mask" in name else x.to(device, dtype)
        if self.sinks:
            shape = (self.heads,) if self.sinks == 1 else (self.heads, self.sinks)
            arguments["sink"] = (2 + torch.randn(shape, generator=rng)).to(device, dtype)
        if self.alibi:
            arguments["alibi"] = torch.rand(self.heads, generator=rng).to(device, dtype)
        if self.radius is not None:
            arguments["relative"] = torch.randn(self.heads, 2 * self.radius + 1, generator=rng).to(device, dtype)
        if self.stats:
            arguments["return_stats"] = self.stats
        if self.function is not None:
            arguments["score_function"] = Both(self.function, device)
        return arguments

    def tensors(self, dtype, device, seed=0, family="randn"):
        """Return q, k, v in the layout of this case, and cotangents of o and lse."""
        rng = torch.Generator().manual_seed(seed)
        q, k, v, do = (DRAW[family](shape, rng).to(dtype).to(device) for shape in (
            (*self.batch, self.heads, self.n_q, self.d), (*self.batch, self.kv_heads, self.n_k, self.d),
            (*self.batch, self.kv_heads, self.n_k, self.dv), (*self.batch, self.heads, self.n_q, self.dv)))
        q, k, v = (LAYOUT[self.layout](x) for x in (q, k, v))
        dlse = torch.randn(q.shape[:-1], generator=rng).to(device, torch.promote_types(dtype, torch.float32))
        return q, k, v, LAYOUT[self.layout](do), dlse


DRAW = {
    "randn": lambda shape, rng: torch.randn(shape, generator=rng),
    "uniform": lambda shape, rng: torch.rand(shape, generator=rng),
    "mean-shifted": lambda shape, rng: torch.randn(shape, generator=rng) + 1,
    "saturated": lambda shape, rng: (torch.randn(shape, generator=rng) * 4).clamp(-9, 9),
    "outliers": lambda shape, rng: (torch.randn(shape, generator=rng)
                                    + 10 * torch.randn(shape, generator=rng) * (torch.rand(shape, generator=rng) < 0.001)),
}


def _padded(x, left, right):
    """Return x inside a larger tensor of NaN, with rows that start at an odd offset."""
    padded = x.new_full((*x.shape[:-1], left + x.shape[-1] + right), torch.nan)
    padded[..., left:left + x.shape[-1]] = x
    return padded[..., left:left + x.shape[-1]]


LAYOUT = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
    "columns": lambda x: x.mT.contiguous().mT,
    "offset": lambda x: _padded(x, 1, 2),
    "expanded": lambda x: x[..., :1, :, :].expand(x.shape),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2].repeat_interleave(2, -2)[..., ::2, :],
}

WIDE = ("lse", "max", "entropy", "key_mass")        # results in float32
LEARNED = ("bias", "sink", "alibi", "relative")  # arguments with a gradient, beside q, k and v

# shapes of biases and masks
PAIRS = {"bias": ("batch", "heads", "n_q", "n_k"), "key-bias": ("n_k",), "head-bias": ("heads", "n_q", "n_k"),
         "row-bias": ("heads", "n_q", 1), "mask": ("n_q", "n_k"), "key-mask": ("batch", 1, 1, "n_k")}

# a case has at most one feature of each group; each feature differs from the plain case
FEATURES = {
    "mask": {
        "causal": {"causal": True},
        "bottom-right": {"causal": True, "align": "bottom_right"},
        "left": {"window": (5, None)},
        "right": {"window": (None, 3)},
        "window": {"window": (7, 4)},
        "window-bottom-right": {"window": (20, 0), "align": "bottom_right"},
    },
    "heads": {"two-heads": {"heads": 2, "kv_heads": 2}, "gqa": {"heads": 4, "kv_heads": 2}, "mqa": {"heads": 3}},
    "lengths": {
        "ragged": {"n_q": 33, "n_k": 33},
        "more-keys": {"n_q": 17, "n_k": 50},
        "more-queries": {"n_q": 50, "n_k": 17},
        "one-query": {"n_q": 1},
        "one-key": {"n_k": 1},
        "no-partial-tile": {"n_q": 32, "n_k": 64},
    },
    "sizes": {"d24": {"d": 24}, "split": {"d": 40, "dv": 72}, "narrow": {"d": 1, "dv": 3}, "dv": {"dv": 32}},
    "scale": {"negative": {"scale": -0.7}, "zero": {"scale": 0.0}, "large": {"scale": 3.0}},
    "layout": {name: {"layout": name} for name in LAYOUT if name not in ("contiguous", "expanded")},
    "expanded": {"expanded": {"layout": "expanded", "heads": 2, "kv_heads": 2}},
    "pairs": {"bias": {"pairs": ("bias",)}, "key-bias-mask": {"pairs": ("key-bias", "mask")},
              "key-mask": {"pairs": ("key-mask",)}, "row-bias": {"pairs": ("row-bias",)}},
    "batch": {"two-batches": {"batch": (2,)}, "batch-of-batches": {"batch": (2, 1, 2)}},
    "softcap": {"softcap": {"softcap": 2.0}},
    "sink": {"sink": {"sinks": 1}, "sinks": {"sinks": 3}},
    "alibi": {"alibi": {"alibi": True}},
    "relative": {"relative": {"radius": 6}, "relative-unclipped": {"radius": 64}},
    "statistics": {"statistics": {"stats": ("max", "entropy", "key_mass")}},
    "function": {name: {"function": name} for name in ("penalty", "squares")},
    # which has no sinks and no statistics
    "normalizer": {name: {"normalizer": name, "sinks": 0, "stats": ()} for name in ("sigmoid", "relu")},
}


def _compatible(names):
    """Return whether no group has two of these features and no field of Case is set twice."""
    groups, fields = [GROUP[name] for name in names], [field for name in names for field in FEATURE[name]]
    return len(groups) == len(set(groups)) and len(fields) == len(set(fields))


def _case(names):
    return Case("+".join(names) or "plain", **{field: value for name in names for field, value in FEATURE[name].items()})


def _pairs(names):
    return {frozenset(pair) for pair in itertools.combinations(names, 2)}


def _cost(names):
    """Return how many tiles the kernels interpret, in all programs."""
    case = _case(names)
    tiles = -(-case.n_q // LARGE_TILES.block_m) * -(-case.n_k // LARGE_TILES.block_n)
    return tiles * math.prod(case.batch) * (2 * case.heads + case.kv_heads)


def _covering(most=32):
    """Yield cases of several features each, which together hold every pair of features that can meet.

    Greedy: a case begins with an uncovered pair and takes, while its cost is at most `most`, the feature that adds most
    uncovered pairs for its cost.
    """
    uncovered = {pair for pair in _pairs(FEATURE) if _compatible(pair)}
    while uncovered:
        names = [name for name in FEATURE if name in min(uncovered, key=sorted)]
        while True:
            worth = {}
            for name in FEATURE:
                more = [*names, name]
                gain = len(_pairs(more) & uncovered) - len(_pairs(names) & uncovered)
                if name not in names and gain and _compatible(more) and _cost(more) <= most:
                    worth[name] = gain / (1 + _cost(more) - _cost(names)) if _cost(more) > _cost(names) else gain
            if not worth:
                break
            names.append(max(worth, key=worth.get))
        uncovered -= _pairs(names)
        yield _case(names)


FEATURE = {name: change for group in FEATURES.values() for name, change in group.items()}
GROUP = {name: group for group, features in FEATURES.items() for name in features}
SINGLE = {case.name: case for case in map(_case, ((), *((name,) for name in FEATURE)))}
COVERING = {case.name: case for case in _covering()}
PAIRWISE = {case.name: case for case in map(_case, sorted(sorted(pair) for pair in _pairs(FEATURE) if _compatible(pair)))}


def in_dtype_of(arguments, dtype):
    """Return arguments of attention with the tensors of numbers in this dtype."""
    return {name: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype != torch.bool else x for name, x in arguments.items()}


def results(function, q, k, v, do, dlse, **options):
    """Return the tensors that `result_names` names. Rows whose lse is -inf have no gradient through it; with another normalizer
    than softmax there is no lse.

    The gradients are those of o, lse, entropy and key_mass together; the last two have random cotangents.
    """
    if isinstance(score_function := options.get("score_function"), Both):
        options["score_function"] = score_function.of(function)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    learned = {name: options[name].detach().requires_grad_() for name in LEARNED if options.get(name) is not None}
    if options.get("normalizer", "softmax") != "softmax":
        o = function(*leaves, **options | learned)
        return o, *torch.autograd.grad(o, (*leaves, *learned.values()), do.to(o.dtype))
    o, lse, *statistics = function(*leaves, return_lse=True, **options | learned)
    statistics = statistics[0] if statistics else {}
    outputs = [o, lse, *(statistics[name] for name in ("entropy", "key_mass") if name in statistics)]
    rng = torch.Generator().manual_seed(5)
    cotangents = [do.to(o.dtype), torch.where(lse.isfinite(), dlse, 0).to(lse.dtype),
                  *(torch.randn(x.shape, generator=rng).to(x) for x in outputs[2:])]
    return o, lse, *torch.autograd.grad(outputs, (*leaves, *learned.values()), cotangents), *statistics.values()


def result_names(options):
    """Return the names of the `results` with these options."""
    learned = (f"d{name}" for name in LEARNED if options.get(name) is not None)
    lse = ("lse",) if options.get("normalizer", "softmax") == "softmax" else ()
    return "o", *lse, "dq", "dk", "dv", *learned, *options.get("return_stats", ())


def launch(case, dtype, device, family="randn", tiles=TILES):
    """Return the tensors, the `given` ones, and the results of attention for one case; see `check` for the arguments."""
    tensors, given = case.tensors(dtype, device, family=family), case.given(dtype, device)
    with config.pinned(tiles):
        return tensors, given, results(attention, *tensors, **case.options, **given)


def check(case, dtype, device, family="randn", tiles=TILES):
    """Check every result of one case by `agree`; with the shipped config if `tiles` is None."""
    tensors, given, ours = launch(case, dtype, device, family, tiles)

    def in_dtype(dtype):
        return results(reference.attention, *(x.to(dtype) for x in tensors), **case.options, **in_dtype_of(given, dtype))

    exact, torchs = in_dtype(torch.float64), in_dtype(dtype)
    # lse and statistics are float32 whatever the inputs are: compare them with float32 arithmetic
    wide = torch.promote_types(dtype, torch.float32)
    for name, *values, in_wide in zip(result_names(case.options | given), ours, torchs, exact, in_dtype(wide), strict=True):
        if name in WIDE:
            agree(name, values[0], in_wide, values[2], wide)
        else:
            agree(name, *values, dtype)


def tensors(device, dtype=torch.float64, *, batch=(2,), heads=2, kv_heads=2, n_q=37, n_k=37, d=16, seed=0):
    """Return q, k, v and the cotangents of o and lse."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (heads, n_q, d), (kv_heads, n_k, d), (kv_heads, n_k, d), (heads, n_q, d), (heads, n_q)
    *qkv, do, dlse = (torch.randn(*batch, *shape, generator=rng) for shape in shapes)
    return [*(x.to(device, dtype) for x in (*qkv, do)), dlse.to(device, torch.promote_types(dtype, torch.float32))]


def assert_exact(given, tiles=TILES, ours_only=None, exact_only=None, **options):
    """Assert that all results in float64 equal the definition's, for `given` tensors and options of attention.

    ours_only and exact_only: options of the kernels alone, and of the definition alone.
    """
    with config.pinned(tiles):
        ours = results(attention, *given, **options, **ours_only or {})
    exact = results(reference.attention, *given, **options, **exact_only or {})
    for name, one, other in zip(result_names(options), ours, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
