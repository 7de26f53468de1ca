"""Exact attention in Triton, forward and backward, plugging into PyTorch."""

import os as _os

from . import config, reference
from .analysis.explain import explain
from .attention import attention, dropout_mask, scaled_dot_product_attention
from .autotune.record_problems import record_problems
from .block_mask import BlockMask, block_mask
from .config import Config
from .integrations.dispatch_log import fallback_report
from .integrations.sdpa_patch import disable, enable, swapped
from .problem import Problem
from .version import VERSION as __version__

__all__ = [
    "BlockMask", "Config", "Problem", "__version__", "attention", "block_mask", "config", "disable", "dropout_mask",
    "enable", "explain", "fallback_report", "record_problems", "reference", "scaled_dot_product_attention", "swapped", "tune",
]

if _os.environ.get("TRITONATTN_AUTOTUNE"):
    from .autotune import first_call

    first_call.install()


def __getattr__(name):
    """Import the tuner on first use."""
    if name == "tune":
        from .autotune.tune import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
