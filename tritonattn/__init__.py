"""Exact attention in Triton, forward and backward, plugging into PyTorch."""

from . import config, reference
from .attention import attention, scaled_dot_product_attention
from .config import Config
from .problem import Problem

__version__ = "0.1.0"
__all__ = ["Config", "Problem", "attention", "config", "reference", "scaled_dot_product_attention"]
