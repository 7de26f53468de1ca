"""Counts of the attention calls made while the patch is on: handled by tritonattn, or passed back to torch, by reason.

    record_call(reason, call) -> fallback_report()     one FallbackWarning per reason     TORCH_LOGS="+tritonattn"

A call is the tuple (query, key, value, mask, is_causal), or None while a program is traced: its shapes may be symbols.
"""

import logging
import os
import threading
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn.attention.bias import CausalBias

_log = logging.getLogger(__name__)
# reentrant: a signal handler or a finalizer may call attention while its thread holds the lock
LOCK = threading.RLock()
_calls = Counter()  # number of calls by reason; the key None counts handled calls

if hasattr(os, "register_at_fork"):
    # a child forked while another thread holds the lock must not inherit it locked
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


class FallbackWarning(UserWarning):
    """A patched attention call went to torch. Issued once per reason."""


@dataclass(frozen=True)
class FallbackReport:
    """Attention calls made while the patch was on. A call in compiled code counts when it is traced, not when it runs."""

    handled: int               # calls computed by tritonattn
    fallbacks: dict[str, int]  # calls computed by torch, by reason

    def __str__(self):
        total = sum(self.fallbacks.values())
        lines = [f"attention calls while patched: {self.handled} handled by tritonattn, {total} by torch"]
        return "\n".join(lines + [f"{count:>8}  {reason}" for reason, count in Counter(self.fallbacks).most_common()])


def fallback_report(clear: bool = False) -> FallbackReport:
    """Return the number of calls that tritonattn handled, and of those that fell back to torch by reason.

    With clear=True the counts restart at zero, and the next fallback for each reason warns again.
    """
    with LOCK:
        counts = dict(_calls)
        if clear:
            _calls.clear()
    return FallbackReport(counts.pop(None, 0), counts)


_FIXES = {
    "type": "only plain tensors are supported, not subclasses",
    "nested": "jagged keys and values must share their offsets; or pass the rows of all sequences to attention_varlen",
    "layout": "only dense tensors are supported",
    "device": "the kernels run on a GPU; to try them on the CPU, set TRITON_INTERPRET=1 before Python starts",
    "dtype": "float16, bfloat16 and float32 are supported; cast the inputs, or use torch.autocast",
    "head size": "the limit is 512, or 256 in float32 where shared memory is small",
    "Triton is not installed": "pip install triton",
    "function mode in compiled code": "leave the mode before compiling",
    "forward-mode derivative": "only reverse-mode derivatives are supported",
    "sdpa_kernel": "sdpa_kernel, or torch.backends.cuda, forbids every fused kernel here; allow one",
    "torch.jit.trace": "a traced program keeps torch's function; torch.export keeps tritonattn's",
    "dropout on the aten route": "torch's operators cannot carry the seed to the backward pass; use route=\"python\"",
}


def fallback_message(reason, call):
    """Return the reason why a call falls back to torch, the fix, and the shapes of the call."""
    fix = next((f": {fix}" for word, fix in _FIXES.items() if reason.startswith(word)), "")
    start = "tritonattn does not support this scaled_dot_product_attention call, torch computes it"
    return f"{start}: {reason}{fix}. Got {call_signature(call)}"


def call_signature(call):
    """Return the shapes and dtype of a call as text, whatever its arguments are."""
    if call is None:
        return "in compiled code"
    *tensors, is_causal = call
    shapes = ", ".join(f"{name} {_shape(x)}" for name, x in zip(("query", "key", "value", "mask"), tensors))
    dtype = str(getattr(tensors[0], "dtype", None)).removeprefix("torch.")
    return f"{shapes}, {dtype}{', causal' if is_causal is True else ''}"


def _shape(x):
    if isinstance(x, CausalBias):
        return x.variant.name.lower().replace("_", " ")
    if not isinstance(x, torch.Tensor):
        return None if x is None else type(x).__name__
    return "nested" if x.is_nested and x.layout == torch.strided else "x".join(map(str, x.shape)) or "scalar"


def raise_if_strict(reason, call):
    """Raise RuntimeError if a call falls back (its reason is not None) and TRITONATTN_STRICT is 1."""
    if reason is not None and _strict():
        raise RuntimeError(fallback_message(reason, call))


# Dynamo runs the following two when it compiles, and takes their results for constants


@torch.compiler.assume_constant_result
def _strict():
    return os.environ.get("TRITONATTN_STRICT", "0") == "1"


@torch.compiler.assume_constant_result
def record_call(reason, call):
    """Count a call that was handled (reason None) or that fell back to torch; warn about a new reason."""
    with LOCK:
        is_new = reason not in _calls
        _calls[reason] += 1
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s: %s", "handled" if reason is None else f"fallback to torch, {reason}", call_signature(call))
    if is_new and reason is not None:
        advice = "Shown once per reason; tritonattn.fallback_report() counts all, TRITONATTN_STRICT=1 makes it an error."
        warnings.warn(f"{fallback_message(reason, call)}. {advice}", FallbackWarning, stacklevel=3)
