"""Exact attention in Triton, forward and backward, plugging into PyTorch."""

from . import config, reference
from .attention import attention, scaled_dot_product_attention
from .config import Config
from .problem import Problem
from .version import VERSION as __version__

__all__ = [
    "Config", "Problem", "__version__", "attention", "config", "reference", "scaled_dot_product_attention",
]
