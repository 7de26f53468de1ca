"""Exact attention in Triton, forward and backward, plugging into PyTorch."""

__version__ = "0.1.0"

import importlib
import os

from . import config, reference
from .attention import (
    attention,
    attention_map,
    attention_varlen,
    create_block_mask,
    dropout_mask,
    scaled_dot_product_attention,
    warm,
)
from .block_mask import BlockMask, block_mask
from .config import Config, pinned
from .integrations.dispatch_log import fallback_report
from .integrations.sdpa_patch import disable, enable, swapped
from .problem import Problem
from .relative import alibi_slopes, t5_table
from .score_function import ScoreFunction

# imported on first use, so that `import tritonattn` loads no tuning and no inspection
_LAZY = {"check_score_function": ".analysis.check_score_function", "explain": ".analysis.explain",
         "record_problems": ".autotune.record_problems", "tune": ".autotune.tune"}

__all__ = [
    "BlockMask", "Config", "Problem", "ScoreFunction", "__version__", "alibi_slopes", "attention", "attention_map",
    "attention_varlen", "block_mask", "check_score_function", "config", "create_block_mask", "disable", "dropout_mask",
    "enable", "explain", "fallback_report", "pinned", "record_problems", "reference", "scaled_dot_product_attention", "swapped",
    "t5_table", "tune", "warm",
]


def __getattr__(name: str):
    """Import `check_score_function`, `explain`, `record_problems` or `tune` on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


if os.environ.get("TRITONATTN_AUTOTUNE"):
    from .autotune import first_call

    first_call.install()
