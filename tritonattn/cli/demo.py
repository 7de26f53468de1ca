"""Train a small language model twice, with torch's attention and with tritonattn's, and compare both with float64.

Both start from the same weights and take the same batches. The errors follow the rule of measure/accuracy.py. On a GPU the
model runs under autocast in bfloat16. Without a GPU, a smaller model runs the same kernels in Triton's interpreter, in float32,
while a second process compiles them for several GPUs and prints registers, memory and instructions.
"""

import atexit
import copy
import importlib.util
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data import topics

import torch
from torch import nn
from torch.nn import functional as F

from .. import gpu
from ..integrations.dispatch_log import fallback_report
from ..integrations.sdpa_patch import swapped
from ..measure.accuracy import max_error, tolerance
from .format import CommandError, columns

TARGETS = "sm_80,sm_90,sm_100,gfx942"


@dataclass(frozen=True)
class Setup:
    """The model and its training."""

    layers: int
    heads: int
    width: int
    context: int        # characters
    batch: int          # texts per step
    steps: int
    rate: float         # learning rate
    dtype: torch.dtype
    tolerance: float    # nats per character by which the last two losses may differ


# a context of two interpreted tiles, so that the loop over keys takes more than one step
ON_CPU = Setup(2, 2, 64, 128, 1, 30, 0.005, torch.float32, 0.001)
# training amplifies the rounding of bfloat16, with either attention
ON_GPU = Setup(6, 6, 384, 1024, 8, 300, 0.001, torch.bfloat16, 0.05)


class Model(nn.Module):
    """Map texts [batch, n + 1] to the loss in nats per character and logits [batch, n, characters]."""

    def __init__(self, setup: Setup, characters: int):
        super().__init__()
        self.character, self.position = nn.Embedding(characters, setup.width), nn.Embedding(setup.context, setup.width)
        nn.init.normal_(self.position.weight, std=0.02)
        # no bias: a key's bias has gradient 0, so its error would be rounding alone
        layer = nn.TransformerEncoderLayer(setup.width, setup.heads, 4 * setup.width, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True, bias=False)
        self.layers = nn.TransformerEncoder(layer, setup.layers, nn.LayerNorm(setup.width), enable_nested_tensor=False)
        self.head = nn.Linear(setup.width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(setup.context))

    def forward(self, texts):
        x = self.character(texts[:, :-1]) + self.position.weight
        logits = self.head(self.layers(x, self.mask, is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()), logits


def batches(indices: torch.Tensor, setup: Setup, seed: int):
    """Yield texts [batch, context + 1] from random positions, without end."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(indices) - setup.context, (setup.batch, 1), generator=rng)
        yield indices[starts.to(indices.device) + torch.arange(setup.context + 1, device=indices.device)]


def run_model(name: str, model: Model, texts: torch.Tensor, dtype: torch.dtype):
    """Return loss and logits, computed with the attention of torch or of tritonattn."""
    attention = swapped() if name == "tritonattn" else nullcontext()
    with attention, torch.autocast(texts.device.type, dtype, enabled=dtype == torch.bfloat16):
        return model(texts)


def train(models: dict[str, Model], indices: torch.Tensor, setup: Setup) -> dict[str, torch.Tensor]:
    """Train each model with its own attention on the same texts; return the losses [steps] in nats per character."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=setup.rate) for name, model in models.items()}
    losses = {name: torch.empty(setup.steps) for name in models}
    print(f"\n{'step':>6}{'torch':>16}{'tritonattn':>16}{'difference':>16}   (loss in nats per character)", flush=True)
    for step, texts in zip(range(setup.steps), batches(indices, setup, seed=0)):
        for name, model in models.items():
            optimizers[name].zero_grad()
            loss, _ = run_model(name, model, texts, setup.dtype)
            loss.backward()
            optimizers[name].step()
            losses[name][step] = loss.detach()
        if step in (0, setup.steps - 1) or (step + 1) % math.ceil(setup.steps / 8) == 0:
            torch_loss, loss = (values[step].item() for values in losses.values())
            print(f"{step + 1:>6}{torch_loss:>16.4f}{loss:>16.4f}{loss - torch_loss:>16.1e}", flush=True)
    return losses


def compare(model: Model, texts: torch.Tensor, dtype: torch.dtype) -> dict[str, tuple[float, float, float]]:
    """Return torch's error, ours and the tolerance for the logits, and for the gradients of each kind of parameter.

    Each kind has one gradient per layer, of which the one nearest to its tolerance counts.
    """
    parameters = [re.sub(r"^layers\.layers\.\d+\.", "", name) for name, _ in model.named_parameters()]
    results = []
    for name, used, used_dtype in (("torch", model, dtype), ("tritonattn", model, dtype),
                                   ("torch", copy.deepcopy(model).double(), torch.float64)):
        loss, logits = run_model(name, used, texts, used_dtype)
        results.append((logits.detach(), *torch.autograd.grad(loss, list(used.parameters()))))
    errors = {}
    for name, torch_result, ours, exact in zip(["logits", *(f"gradient of {name}" for name in parameters)], *results):
        pair = max_error(torch_result, exact), max_error(ours, exact), tolerance(torch_result, exact, dtype)
        errors[name] = max(errors.get(name, pair), pair, key=lambda each: each[1] / max(each[2], 1e-30))
    return errors


def start_compiling(targets: str = TARGETS) -> subprocess.Popen:
    """Start a process that prints the compile reports of the kernels; in this process they are interpreted."""
    command = [sys.executable, "-m", "tritonattn", "inspect", "--target", targets, "--causal"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    atexit.register(process.kill)  # if the training fails meanwhile
    return process


def finish_compiling(process: subprocess.Popen) -> list[str]:
    """Wait for the process and print its table; return a line if it failed."""
    print("\nthe kernels, compiled for GPUs that are not here:", flush=True)
    print(process.communicate()[0], end="")
    return ["kernels: expected all of them to compile, got an error"] if process.returncode else []


def draw(losses: dict[str, torch.Tensor], path: str) -> None:
    """Draw both losses, and their difference below, as a PNG."""
    from matplotlib.figure import Figure

    figure, difference = Figure(figsize=(7, 4.4), layout="constrained"), losses["tritonattn"] - losses["torch"]
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = range(1, len(difference) + 1)
    top.plot(steps, losses["torch"], color="#f5b971", linewidth=7, label="torch's attention")
    top.plot(steps, losses["tritonattn"], color="#14213d", linewidth=1.8, linestyle="--", label="tritonattn")
    top.set_title(f"Same start, same text: the losses differ by at most {difference.abs().max():.1e} nats", loc="left")
    top.set_ylabel("loss (nats per character)")
    top.legend(frameon=False)
    bottom.plot(steps, difference, color="#14213d", linewidth=1.8)
    bottom.set(xlabel="step", ylabel="difference\n(nats)")
    figure.savefig(path, format="png", dpi=200)


def problems(losses, errors, setup: Setup) -> list[str]:
    """Return a line for every error beyond its tolerance, NaN included."""
    lines = [f"{name}: expected an error of at most {allowed:.3g}, got {error:.3g}"
             for name, (_, error, allowed) in errors.items() if not error <= allowed]
    last = (losses["tritonattn"][-1] - losses["torch"][-1]).abs().item()
    if not last <= setup.tolerance:
        lines.append(f"last losses: expected a difference of at most {setup.tolerance} nats, got {last:.1e}")
    if fallback_report().fallbacks:
        lines.append("attention: expected tritonattn to handle every call, but torch handled some")
    return lines


def run(steps: int | None = None, out: str = "demo.png") -> int:
    """Train, compare and draw; return 0 if everything agrees, else 1. Raises CommandError for an unusable argument."""
    device = torch.device("cuda" if torch.cuda.is_available() and not gpu.INTERPRETED else "cpu")
    setup = ON_GPU if device.type == "cuda" else ON_CPU
    setup = setup if steps is None else replace(setup, steps=steps)
    if setup.steps < 2:
        raise CommandError(f"steps: expected at least 2, for a curve, got {steps}")
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("matplotlib is not installed; fix: pip install 'tritonattn[demo]'")
    if Path(out).is_dir() or not os.access(Path(out).parent, os.W_OK):
        raise CommandError(f"out: expected a file in a folder that can be written to, got {out!r}")
    compiling = start_compiling() if device.type == "cpu" else None
    if compiling:
        torch.set_num_threads(1)  # tensors this small gain nothing from threads, and the compiler needs the other cores

    text = "\n\n".join(topics.topics.values())  # Python's own documentation
    characters, indices = torch.tensor([ord(character) for character in text], device=device).unique(return_inverse=True)
    torch.manual_seed(0)
    fallback_report(clear=True)
    model = Model(setup, len(characters)).to(device)
    print(f"text: {len(indices)} characters, {len(characters)} of them different\n"
          f"model: {setup.layers} layers, {setup.heads} heads, width {setup.width}; in {setup.dtype} on "
          f"{gpu.gpu_of(device).name}; {setup.steps} steps of {setup.batch} x {setup.context} characters")
    losses = train({"torch": copy.deepcopy(model), "tritonattn": model}, indices, setup)
    errors = compare(model, next(batches(indices, replace(setup, batch=2), seed=1)), setup.dtype)
    rows = [(name, *(f"{x:.1e}" for x in each)) for name, each in errors.items()]
    print("", *columns([("largest error against float64", "torch", "tritonattn", "allowed"), *rows]), "", sep="\n")
    print(fallback_report(), flush=True)
    draw(losses, out)
    lines = problems(losses, errors, setup) + (finish_compiling(compiling) if compiling else [])
    print("\n" + "\n".join(lines or [f"everything agrees; the curves are in {out}"]))
    return 1 if lines else 0
