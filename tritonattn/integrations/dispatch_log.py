"""What came of each call while the swap was on: counted by reason and shape, told once, logged.

    count(why, kind)  ->  report()          a warning for the first of a reason          TORCH_LOGS="+tritonattn"
"""

import logging
import os
import threading
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.attention.bias import CausalBias

TRACED, OTHERS = "in compiled code", "other shapes"  # what stands for calls whose shapes are not kept
MOST_SHAPES = 256  # as many are told apart in a report

_log = logging.getLogger(__name__)
# also of the switch itself; a signal handler or a finalizer may attend while its thread counts
LOCK = threading.RLock()
_calls = Counter()  # calls by what sent them to torch, None if served, and by their kind
_warned = set()     # the reasons that were told aloud

if hasattr(os, "register_at_fork"):
    # a child forked while another thread counts must not wait for that thread
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


class FallbackWarning(UserWarning):
    """A call that ours does not serve went to torch while the swap was on; told once for each reason."""


class Call(NamedTuple):
    """What a report tells of calls of one kind: shapes, dtype and options."""

    query: tuple | None = None
    key: tuple | None = None
    value: tuple | None = None
    mask: tuple | str | None = None  # the shape of attn_mask; "upper left" or "lower right" for a CausalBias
    dtype: str = ""
    causal: bool = False
    gqa: bool = False
    note: str = ""                   # what stands here instead of all of these, where they were not kept


@dataclass(frozen=True)
class FallbackReport:
    """Calls that came while the swap was on. One in a compiled function counts whenever it is traced, not when it runs."""

    served: int
    passed: dict[str, int]                              # by the reason why torch had to do it
    calls: tuple[tuple[str | None, Call, int], ...]     # reason or None, what call, how many; the most frequent first

    def __str__(self):
        lines = [("calls", "done by", "query", "key", "value", "mask", "dtype", "causal", "gqa")]
        for why, call, count in self.calls:
            shapes = map(_written, call[:4]) if not call.note else (call.note, "", "", "")
            options = ("yes" if on else "" for on in (call.causal, call.gqa))
            lines.append((str(count), f"torch: {why}" if why else "ours", *shapes, call.dtype, *options))
        widths = [max(map(len, column)) for column in zip(*lines)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        sums = f"attention while the swap was on: {self.served} calls served, {sum(self.passed.values())} passed on to torch"
        return "\n".join([sums, *table] if self.calls else [sums])


def fallback_report(clear: bool = False) -> FallbackReport:
    """How many calls came while the swap was on: those ours served, those passed on to torch and why, all by shape.

    At most some hundred kinds of calls are told apart, the rest is counted together. With clear=True counting starts from
    nothing afterwards, and the first call passed on for a reason warns anew.
    """
    with LOCK:
        tally = dict(_calls)
        if clear:
            _calls.clear()
            _warned.clear()
    reasons = Counter()
    for (why, _), count in tally.items():
        reasons[why] += count
    calls = sorted(((why, _call(kind), count) for (why, kind), count in tally.items()), key=lambda line: -line[2])
    return FallbackReport(reasons.pop(None, 0), dict(reasons), tuple(calls))


def _written(shape):
    return shape if isinstance(shape, str) else "" if shape is None else "x".join(map(str, shape)) or "scalar"


_TO_DO = {
    "type": "it serves plain tensors, no subclasses",
    "nested": "it serves dense tensors: pad, and give tritonattn.attention key_lengths",
    "layout": "it serves dense tensors",
    "device": "it serves tensors on a GPU; to try it on the CPU, set TRITON_INTERPRET=1 before Python starts",
    "dtype": "it serves float16, bfloat16 and float32; torch.autocast casts",
    "head size": "it serves at most 512, or 256 in float32 where shared memory is small",
    "Triton is not installed": "install it: pip install triton",
    "function mode in compiled code": "leave the mode before compiling, if it is to serve the call",
    "forward-mode derivative": "it has reverse-mode derivatives",
    "sdpa_kernel": "sdpa_kernel, or torch.backends.cuda, forbids every fused kernel here; allow one",
    "torch.jit.trace": "torch.jit.trace keeps torch's own function; torch.export keeps ours",
}


def fallback_message(why, kind):
    """The reason of a call passed on, its shapes, and what helps."""
    call = _call(kind)
    helps = next((f": {todo}" for word, todo in _TO_DO.items() if why.startswith(word)), "")
    shapes = call.note or (f"query {_written(call.query)}, key {_written(call.key)}, value {_written(call.value)}, "
                           f"mask {_written(call.mask) or None}, {call.dtype}")
    return f"tritonattn does not serve this call of scaled_dot_product_attention, which is torch's: {why}{helps}. Got {shapes}"


def call_signature(query, key, value, attn_mask, is_causal, enable_gqa):
    """The fields of the Call that this call is, whatever its arguments are; made for every call, so made fast."""
    mask = attn_mask if attn_mask is None else _shape(attn_mask)
    return _shape(query), _shape(key), _shape(value), mask, getattr(query, "dtype", ""), is_causal is True, enable_gqa is True


def _shape(x):
    if (type(x) is torch.Tensor or type(x) is torch.nn.Parameter) and not x.is_nested:
        return x.shape
    if isinstance(x, CausalBias):
        return x.variant.name.lower().replace("_", " ")
    if not isinstance(x, torch.Tensor):
        return None
    # symbols have no hash
    return "nested" if x.is_nested and x.layout == torch.strided else tuple(n if type(n) is int else str(n) for n in x.shape)


def _call(kind):
    """The Call of these fields, or of a note in their place."""
    return Call(note=kind) if isinstance(kind, str) else Call(*kind[:4], str(kind[4]).removeprefix("torch."), *kind[5:])


def first(why):
    """Whether nobody was told of this reason yet; from now on somebody was."""
    with LOCK:
        new = why not in _warned and len(_warned) < MOST_SHAPES
        if new:
            _warned.add(why)
    return new


# Dynamo runs the following two when it compiles, and takes their results for constants


@torch.compiler.assume_constant_result
def record_call(why, kind):
    """One more call of this kind was served (why is None), or passed on for this reason: then the first one warns."""
    with LOCK:
        line = why, kind
        if line not in _calls and len(_calls) >= MOST_SHAPES:
            line = why, OTHERS
            if line not in _calls and len(_calls) >= 2 * MOST_SHAPES:
                line = "other", OTHERS
        _calls[line] += 1
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s: %s", "served" if why is None else f"passed on to torch, {why}", _call(kind))
    if why is not None and first(why):
        advice = "Told once for each reason; tritonattn.report() counts, TRITONATTN_STRICT=1 makes it an error."
        warnings.warn(f"{fallback_message(why, kind)}. {advice}", FallbackWarning, stacklevel=3)


@torch.compiler.assume_constant_result
def strict():
    return os.environ.get("TRITONATTN_STRICT", "0") == "1"
