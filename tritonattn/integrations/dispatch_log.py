"""Count of the attention calls made while the patch is on: handled by tritonattn, or passed back to torch, by reason.

    record_call(reason, signature) -> fallback_report()     one FallbackWarning per reason     TORCH_LOGS="+tritonattn"
"""

import logging
import os
import threading
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn.attention.bias import CausalBias

TRACED = "in compiled code"  # replaces the shapes of a call that is being traced, since they may be symbols

_log = logging.getLogger(__name__)
# reentrant: a signal handler or a finalizer may call attention while its thread holds the lock
LOCK = threading.RLock()
_calls = Counter()  # number of calls by reason; the key None counts handled calls
_warned = set()     # reasons that have been warned about

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
        width = max((len(str(count)) for count in self.fallbacks.values()), default=0)
        lines += [f"  {count:>{width}}  {reason}" for reason, count in Counter(self.fallbacks).most_common()]
        return "\n".join(lines)


def fallback_report(clear: bool = False) -> FallbackReport:
    """Return the number of calls that tritonattn handled, and of those that fell back to torch by reason.

    With clear=True the counts restart at zero, and the next call that falls back for a reason warns again.
    """
    with LOCK:
        counts = dict(_calls)
        if clear:
            _calls.clear()
            _warned.clear()
    return FallbackReport(counts.pop(None, 0), counts)


_FIXES = {
    "type": "only plain tensors are supported, not subclasses",
    "nested": "only dense tensors are supported: pad, and pass key_lengths to tritonattn.attention",
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


def fallback_message(reason, signature):
    """Return the reason why a call falls back to torch, the fix, and the shapes of the call."""
    fix = next((f": {fix}" for word, fix in _FIXES.items() if reason.startswith(word)), "")
    start = "tritonattn does not support this scaled_dot_product_attention call, torch computes it"
    return f"{start}: {reason}{fix}. Got {signature}"


def call_signature(query, key, value, attn_mask, is_causal, enable_gqa):
    """Return the shapes, dtype and options of a call as text, whatever its arguments are."""
    shapes = {"query": query, "key": key, "value": value, "mask": attn_mask}
    text = ", ".join(f"{name} {_shape(x)}" for name, x in shapes.items())
    options = "".join(f", {name}" for name, on in (("causal", is_causal), ("gqa", enable_gqa)) if on is True)
    return f"{text}, {str(getattr(query, 'dtype', None)).removeprefix('torch.')}{options}"


def _shape(x):
    if isinstance(x, CausalBias):
        return x.variant.name.lower().replace("_", " ")
    if not isinstance(x, torch.Tensor):
        return None if x is None else type(x).__name__
    return "nested" if x.is_nested and x.layout == torch.strided else "x".join(map(str, x.shape)) or "scalar"


def needs_signature(reason):
    """Return whether record_call uses the signature: a fallback's warning and the debug log show it."""
    return reason is not None or _log.isEnabledFor(logging.DEBUG)


def is_first(reason):
    """Return whether a reason is new, and mark it as warned about."""
    with LOCK:
        new = reason not in _warned
        _warned.add(reason)
    return new


# Dynamo runs the following two when it compiles, and takes their results for constants


@torch.compiler.assume_constant_result
def record_call(reason, signature):
    """Count a call that was handled (reason None) or that fell back to torch; warn about a new reason."""
    with LOCK:
        _calls[reason] += 1
    _log.debug("%s: %s", "handled" if reason is None else f"fallback to torch, {reason}", signature)
    if reason is not None and is_first(reason):
        advice = "Shown once per reason; tritonattn.fallback_report() counts, TRITONATTN_STRICT=1 turns it into an error."
        warnings.warn(f"{fallback_message(reason, signature)}. {advice}", FallbackWarning, stacklevel=3)


@torch.compiler.assume_constant_result
def strict():
    """Return whether a fallback is an error (TRITONATTN_STRICT=1)."""
    return os.environ.get("TRITONATTN_STRICT", "0") == "1"
