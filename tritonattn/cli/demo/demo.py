"""Train a small language model twice, with torch's attention and with ours, and compare both with float64.

Start, text and batches are the same, and the errors follow the rule of measure/accuracy.py. On a GPU the weights are
float32 and attention works in bfloat16. Without a GPU, a smaller model runs the same kernels in Triton's interpreter, in
float32, while a second process compiles them for several GPUs and prints registers, memory and instructions.
"""

import atexit
import copy
import math
import os
import subprocess
import sys
from dataclasses import replace

import torch
from torch.nn import functional as F

from ... import gpu, reference
from ...attention import scaled_dot_product_attention
from ...measure.accuracy import max_error, tolerance
from ..format import InputError, columns, require, require_writable
from .char_model import ON_CPU, ON_GPU, Model, Setup, batches, encode, read_text

TARGETS = "sm_80,sm_90,sm_100,gfx942"


def attentions(dtype):
    """Return causal attention of q, k, v [batch, heads, n, d] by torch, by tritonattn in `dtype`, and exact in float64."""
    def in_dtype(dtype, attention, **causal):
        return lambda q, k, v: attention(q.to(dtype), k.to(dtype), v.to(dtype), **causal).to(q.dtype)

    return {
        "torch": in_dtype(dtype, F.scaled_dot_product_attention, is_causal=True),
        "tritonattn": in_dtype(dtype, scaled_dot_product_attention, is_causal=True),
        "float64": in_dtype(torch.float64, reference.attention, causal=True),
    }


def train(models, functions, texts, setup: Setup, device):
    """Train each model with its own attention on the same texts; return the losses [steps] in nats per character."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=setup.rate) for name, model in models.items()}
    losses = {name: [] for name in models}
    print(f"\n{'step':>6}{'torch':>16}{'tritonattn':>16}{'difference':>16}   (loss in nats per character)", flush=True)
    for step, batch in zip(range(1, setup.steps + 1), texts):
        batch = batch.to(device)
        for name, model in models.items():
            optimizers[name].zero_grad()
            loss, _ = model(batch, functions[name])
            loss.backward()
            optimizers[name].step()
            losses[name].append(loss.detach())
        if step in (1, setup.steps) or step % math.ceil(setup.steps / 8) == 0:
            torch_loss, loss = losses["torch"][-1].item(), losses["tritonattn"][-1].item()
            print(f"{step:>6}{torch_loss:>16.4f}{loss:>16.4f}{loss - torch_loss:>16.1e}", flush=True)
    return {name: torch.stack(values).cpu() for name, values in losses.items()}


def compare(results, functions, dtype) -> dict:
    """Return torch's error, ours and the tolerance for each tensor that `results(attention)` returns by name."""
    torch_results, ours, exact = (results(functions[name]) for name in ("torch", "tritonattn", "float64"))
    return {name: (max_error(torch_results[name], x), max_error(ours[name], x), tolerance(torch_results[name], x, dtype))
            for name, x in exact.items()}


def compare_attention(model, texts, functions, dtype):
    """Compare the output and gradients of attention on the q, k, v of all blocks of the model."""
    blocks = []

    def record(*qkv):
        blocks.append(qkv)
        return functions["tritonattn"](*qkv)

    def results(attention):
        o = attention(*leaves)
        return dict(zip(("output", "dq", "dk", "dv"), (o.detach(), *torch.autograd.grad(o, leaves, do))))

    with torch.no_grad():
        model(texts, record)
    # values of dtype, stored in float64: converting them back inside attention is exact
    leaves = [torch.cat(xs).to(dtype).double().requires_grad_() for xs in zip(*blocks)]
    do = torch.randn_like(leaves[2]).to(dtype).double()
    return compare(results, functions, dtype)


def compare_model(model, texts, functions):
    """Compare the model's logits, and that gradient of a parameter which is nearest to its tolerance."""
    def results(attention):
        used = copy.deepcopy(model).double() if attention is functions["float64"] else model
        loss, logits = used(texts, attention)
        return dict(enumerate((logits.detach(), *torch.autograd.grad(loss, list(used.parameters())))))

    logits, *gradients = compare(results, functions, torch.float32).values()
    return {"model's logits": logits, "model's gradients": max(gradients, key=lambda each: each[1] / max(each[2], 1e-30))}


def start_compiling(targets=TARGETS):
    """Start a process that prints the compile reports of the kernels; in this process they are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "tritonattn", "inspect", "--target", targets, "--causal"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def finish_compiling(process) -> bool:
    """Wait for the process and print its table, or the end of its error output; return whether it succeeded."""
    print("\nwaiting for the compiler", file=sys.stderr, flush=True)
    table, errors = process.communicate()
    print(f"\nthe kernels, compiled for GPUs that are not here:\n{table}", end="")
    if process.returncode:
        print(f"compiling ended with exit code {process.returncode}:", *errors.splitlines()[-20:], sep="\n")
    return process.returncode == 0


def draw(losses, path):
    """Draw both losses, and their difference below, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    (top, bottom), difference = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1)), losses["tritonattn"] - losses["torch"]
    steps = range(1, len(difference) + 1)
    top.plot(steps, losses["torch"], color="#f5b971", linewidth=7, label="torch's attention")
    top.plot(steps, losses["tritonattn"], color="#14213d", linewidth=1.8, linestyle="--", label="tritonattn")
    top.set_title(f"Same start, same text: the losses differ by at most {difference.abs().max():.1e} nats", loc="left")
    top.set_ylabel("loss (nats per character)")
    top.legend(frameon=False)
    bottom.plot(steps, difference, color="#14213d", linewidth=1.8)
    bottom.set(xlabel="step", ylabel="difference\n(nats)")
    figure.savefig(path, format="png", dpi=200)


def problems(losses, errors, setup) -> list[str]:
    """Return a line for every error beyond its tolerance, NaN included."""
    lines = [f"{name}: expected an error of at most {allowed:.3g}, got {error:.3g}"
             for name, (_, error, allowed) in errors.items() if not error <= allowed]
    lines += [f"losses of {name}: expected finite numbers, got {values[~values.isfinite()][0]}"
              for name, values in losses.items() if not values.isfinite().all()]
    last = (losses["tritonattn"][-1] - losses["torch"][-1]).abs().item()
    if not last <= setup.tolerance:
        lines.append(f"last losses: expected a difference of at most {setup.tolerance} nats, got {last:.1e}")
    return lines


def run(text: str | None = None, steps: int | None = None, out: str = "demo.png", device=None) -> int:
    """Train, compare and draw; return 0 if everything agrees, else 1. InputError: an argument that cannot be used."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() and not gpu.INTERPRETED else "cpu"))
    setup = ON_GPU if device.type == "cuda" else ON_CPU
    setup = setup if steps is None else replace(setup, steps=steps)
    if setup.steps < 2:
        raise InputError(f"steps: expected at least 2, for a curve, got {steps}")
    require("matplotlib", "demo")
    require_writable("out", out)
    indices, characters = encode(read_text(text, setup.context + 2))
    compiling = start_compiling() if device.type == "cpu" else None
    if compiling:
        torch.set_num_threads(1)  # tensors this small gain nothing from threads, and the compiler needs the other cores

    torch.manual_seed(0)
    model, functions = Model(setup, characters).to(device), attentions(setup.dtype)
    models = {"torch": copy.deepcopy(model), "tritonattn": model}
    print(f"text: {len(indices)} characters, {characters} of them different\n"
          f"model: {setup.blocks} blocks, {setup.heads} heads, width {setup.width}; attention in {setup.dtype} on "
          f"{gpu.gpu_of(device).name}; {setup.steps} steps of {setup.batch} x {setup.context} characters")
    losses = train(models, functions, batches(indices, setup, seed=0), setup, device)
    unseen = next(batches(indices, replace(setup, batch=2), seed=1)).to(device)
    errors = compare_attention(model, unseen, functions, setup.dtype) | compare_model(model, unseen, functions)
    rows = [(name, *(f"{x:.1e}" for x in each)) for name, each in errors.items()]
    print("", *columns([("largest error against float64", "torch", "tritonattn", "allowed"), *rows]), sep="\n", flush=True)
    draw(losses, out)
    lines = problems(losses, errors, setup)
    if compiling and not finish_compiling(compiling):
        lines.append("kernels: expected all of them to compile, got an error")
    print("\n" + "\n".join(lines or [f"everything agrees; the curves are in {out}"]))
    return 1 if lines else 0
