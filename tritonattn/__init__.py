"""Exact attention in Triton, forward and backward, plugging into PyTorch."""

from . import config, reference
from .attention import attention, dropout_mask, scaled_dot_product_attention
from .config import Config
from .explanation import explain
from .problem import Problem
from .recording import record_problems
from .swap import disable, enable, swapped
from .tally import report
from .tile_map import TileMap, tile_map
from .tuning import quick, tune
from .version import VERSION as __version__

__all__ = [
    "Config", "Problem", "TileMap", "__version__", "attention", "config", "disable", "dropout_mask", "enable",
    "explain", "record_problems", "reference", "report", "scaled_dot_product_attention", "swapped", "tile_map", "tune",
]

quick.install()
