"""TRITONATTN_AUTOTUNE=quick: the first call of each kind times at most eight configs of the shipped tables.

Configs run in a child process. Nothing is timed while a CUDA graph is captured, in the interpreter, under
torch.use_deterministic_algorithms, or with several ranks. Calls of other threads continue meanwhile with the current config.
"""

import os
import threading
import warnings

import torch

from .. import config, gpu
from ..configs import lookup
from ..configs.key import key_of
from ..gpu import Gpu
from ..problem import Problem

VARIABLE = "TRITONATTN_AUTOTUNE"


class FirstCallTuner:
    """An observer of config lookups that calls `tune` once for each new key, in one thread at a time."""

    def __init__(self, tune):
        self._tune, self._seen, self._busy = tune, set(), threading.Lock()

    def __call__(self, kernel: str, problem: Problem, on: Gpu) -> None:
        if kernel in lookup.UNTUNED or on is gpu.INTERPRETER or config.pinned_config(kernel) is not None:
            return
        key = key_of(kernel, problem, on)
        if key in self._seen:
            return
        if must_not_time():
            return
        # calls that come while a graph is captured or another key is timed do not wait, and are observed again at the next call
        if (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()) or not self._busy.acquire(blocking=False):
            lookup.new_version()
            return
        try:
            if key in self._seen:
                return
            self._seen.add(key)
            if lookup.lookup_config(kernel, problem, on).origin != "cache":
                self._tune(kernel, problem, on)
        except Exception as error:  # a call must not fail because tuning does
            warnings.warn(f"{VARIABLE}: {kernel} of {problem} was not tuned: {type(error).__name__}: {error}", stacklevel=2)
        finally:
            self._busy.release()


def must_not_time() -> bool:
    """Return whether algorithms must be deterministic, or several ranks would have to agree."""
    dist = torch.distributed
    return (torch.are_deterministic_algorithms_enabled()
            or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1))


def tune_from_tables(kernel: str, problem: Problem, on: Gpu) -> None:
    """Tune with strategy "table". Raises RuntimeError if the current device is not the one of the tensors."""
    from .tune import local_setup, tune_kernel

    device = torch.device("cuda", torch.cuda.current_device())
    if gpu.gpu_of(device) != on:
        raise RuntimeError(f"the tensors are on another GPU than the current device, {device}")
    torch.cuda.synchronize(device)  # the child is timed, so nothing else may run
    setup = local_setup(device)
    with setup.compilers:
        tune_kernel(kernel, problem, setup, "table")


def install(environment=os.environ) -> None:
    """Observe lookups from now on if TRITONATTN_AUTOTUNE is "quick"; warn about an unknown value."""
    value = environment.get(VARIABLE, "off").lower()
    if value == "quick":
        lookup.observers.append(FirstCallTuner(tune_from_tables))
    elif value not in ("off", "0", ""):
        warnings.warn(f"{VARIABLE}: expected quick or off, got {value!r}; nothing is tuned", stacklevel=2)
