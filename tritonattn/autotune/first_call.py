"""TRITONATTN_AUTOTUNE=quick: the first call of each kind times a few configs, and those after it use the best.

At most eight, all from the shipped tables, in a process of its own: nothing of what is tried runs in the caller's. Never
while a CUDA graph is captured, in the interpreter, under torch.use_deterministic_algorithms, or where several processes
would have to agree. Calls in other threads go on meanwhile with what they would have used without it.
"""

import dataclasses
import functools
import os
import threading
import warnings

import torch

from .. import config, gpu
from ..configs import lookup, user_cache
from ..configs.key import key_of
from ..gpu import Gpu
from ..problem import Problem

VARIABLE = "TRITONATTN_AUTOTUNE"


class Quick:
    """What is told of every lookup (config.watch). `tune` is called for each new key, once, by one thread at a time."""

    def __init__(self, tune):
        self._tune, self._seen, self._busy = tune, set(), threading.Lock()
        # the thread that was tuning does not live in the child
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self):
        self._busy = threading.Lock()

    def __call__(self, kernel: str, problem: Problem, on: Gpu) -> None:
        if kernel == "delta" or on is gpu.INTERPRETER or config.pinned_config(kernel) is not None:
            return
        key = key_of(kernel, problem, on)
        # whoever comes while a key is being timed does not wait
        if key in self._seen or forbidden() or not self._busy.acquire(blocking=False):
            return
        try:
            if key in self._seen:
                return
            self._seen.add(key)
            if lookup.lookup_config(kernel, problem, on).origin != "cache":
                self._tune(kernel, problem, on)
        except Exception as error:  # a training run is worth more than a tuned config
            warnings.warn(f"{VARIABLE}: {kernel} of {problem} was not tuned: {type(error).__name__}: {error}", stacklevel=2)
        finally:
            self._busy.release()


def forbidden() -> str | None:
    """Why nothing may be timed now."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return "several processes would have to agree: tune before, with tritonattn.tune"
    return None


def from_tables(kernel: str, problem: Problem, on: Gpu) -> None:
    """Tune with what the tables have. RuntimeError: the current device is another than the tensors'."""
    from .tuner import tune_kernel

    device = torch.device("cuda", torch.cuda.current_device())
    if gpu.gpu_of(device) != on:
        raise RuntimeError(f"expected the tensors on the current device, {device}, got them on another GPU")
    tune_kernel(kernel, problem, dataclasses.replace(_lab(device), store=user_cache.current_cache()), "table")


@functools.cache
def _lab(device):
    """Once for each device: asking for its driver takes a second."""
    from .tuner import local_setup

    return local_setup(device)


def install(environment=os.environ) -> None:
    """Begin to watch, if the environment asks for it; what it asks for wrongly is warned of."""
    asked = environment.get(VARIABLE, "off").lower()
    if asked == "quick":
        lookup.add_observer(Quick(from_tables))
    elif asked not in ("off", "0", ""):
        warnings.warn(f"{VARIABLE}: expected quick or off, got {asked!r}; nothing is tuned", stacklevel=2)
