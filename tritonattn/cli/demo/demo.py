"""A small language model is trained twice, with torch's attention and with this one, and the two losses agree.

Same start, same text, same batches. Then both attentions are held against float64: this one's error may be LIMIT times
torch's plus ROUNDING. On a GPU the weights are float32, attention works in bfloat16, and the time per step is measured.
Without one, a smaller model runs the very same kernels in Triton's interpreter, in float32 throughout, while a second
process compiles them for the GPUs that are not here and reads what the compiler made of them.
"""

import atexit
import copy
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from ... import gpu, reference
from ...attention import scaled_dot_product_attention
from ...configs import lookup
from ...problem import Problem
from .char_model import ON_CPU, ON_GPU, InputError, Model, Setup, batches, encode, read_text

LIMIT = 2     # times torch's error: both round, each in its own order
ROUNDING = 2  # ulp of the largest number: torch may be lucky
WARM_UP = 10  # steps that are not timed: they compile and allocate
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


def attentions(dtype):
    """Causal attention of q, k, v [batch, heads, n, d]: torch's and this one, working in `dtype`, and the definition."""
    def working_in(dtype, attention, **causal):
        return lambda q, k, v: attention(q.to(dtype), k.to(dtype), v.to(dtype), **causal).to(q.dtype)

    return {
        "torch": working_in(dtype, F.scaled_dot_product_attention, is_causal=True),
        "tritonattn": working_in(dtype, scaled_dot_product_attention, is_causal=True),
        "float64": working_in(torch.float64, reference.attention, causal=True),
    }


def train(models, ways, texts, setup: Setup, device):
    """Each model with its own attention on the same texts: losses [steps] in nats per character, and marks of time."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=setup.rate) for name, model in models.items()}
    losses, marks, start = {name: [] for name in models}, {name: [] for name in models}, time.monotonic()
    print(f"\n{'step':>6}{'torch':>16}{'tritonattn':>16}{'difference':>16}   (loss in nats per character)", flush=True)
    for step, batch in zip(range(1, setup.steps + 1), texts):
        batch = batch.to(device)
        for name, model in models.items():
            marks[name].append(mark(device))
            optimizers[name].zero_grad()
            loss, _ = model(batch, ways[name])
            loss.backward()
            optimizers[name].step()
            marks[name].append(mark(device))
            losses[name].append(loss.detach())
        shown = step in (1, setup.steps) or step % math.ceil(setup.steps / 8) == 0
        if shown:
            theirs, ours = losses["torch"][-1].item(), losses["tritonattn"][-1].item()
            print(f"{step:>6}{theirs:>16.4f}{ours:>16.4f}{ours - theirs:>16.1e}", flush=True)
        show_progress(step, setup.steps, time.monotonic() - start, shown)
    return {name: torch.stack(values).cpu() for name, values in losses.items()}, marks


def show_progress(step, steps, seconds, keep):
    """A bar on stderr that the next line overwrites; where lines cannot be overwritten, only those to keep."""
    live = sys.stdout.isatty() and sys.stderr.isatty()
    if step < steps and (live or keep):
        bar = f"[{'#' * (20 * step // steps):20}] {step} of {steps}, {seconds / step * (steps - step):.0f} s left"
        print(f"{bar:50}", end="\r" if live else "\n", file=sys.stderr, flush=True)


def mark(device):
    """This point in the GPU's work, to be timed later; None without a GPU."""
    event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
    if event:
        event.record()
    return event


def milliseconds(marks) -> float:
    """The median of the steps after the warm-up, from the marks before and after each."""
    torch.cuda.synchronize()
    times = [start.elapsed_time(stop) for start, stop in zip(marks[::2], marks[1::2])]
    return statistics.median(times[WARM_UP:] or times)


def errors(results, ways, dtype):
    """Torch's and this one's largest difference from float64 for each tensor that `results` of an attention names.

    In ulp: the distance from 1 to the next number of dtype, times the tensor's largest number.
    """
    theirs, ours, exact = (results(ways[name]) for name in ("torch", "tritonattn", "float64"))
    found = {}
    for what, x in exact.items():
        ulp = torch.finfo(dtype).eps * x.abs().max() + torch.finfo(dtype).tiny
        found[f"{what} ({name_of(dtype)})"] = [((got[what] - x).abs().max() / ulp).item() for got in (theirs, ours)]
    return found


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def measure_attention(model, texts, ways, dtype):
    """Errors of attention alone: its output and gradients on the q, k, v of all blocks of the model."""
    blocks = []

    def record(*qkv):
        blocks.append(qkv)
        return ways["tritonattn"](*qkv)

    def results(attend):
        o = attend(*leaves)
        return dict(zip(("output", "dq", "dk", "dv"), (o.detach(), *torch.autograd.grad(o, leaves, do))))

    with torch.no_grad():
        model(texts, record)
    # numbers of dtype, held in float64: rounding them on the way into attention loses nothing
    leaves = [torch.cat(xs).to(dtype).double().requires_grad_() for xs in zip(*blocks)]
    do = torch.randn_like(leaves[2]).to(dtype).double()
    return errors(results, ways, dtype)


def measure_model(model, texts, ways):
    """Errors of the whole model: its logits, and of all its parameters' gradients the largest."""
    def results(attend):
        used = copy.deepcopy(model).double() if attend is ways["float64"] else model
        loss, logits = used(texts, attend)
        return dict(enumerate((logits.detach(), *torch.autograd.grad(loss, list(used.parameters())))))

    logits, *gradients = errors(results, ways, torch.float32).values()
    return {"model's logits (float32)": logits, "model's gradients (float32)": torch.tensor(gradients).amax(0).tolist()}


def start_compiling(archs=ARCHS):
    """A process that prints what the compiler makes of the kernels: in this one they are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", f"from tritonattn.cli.demo import demo; demo.print_compiled({archs})"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def finish_compiling(process) -> bool:
    """Wait for it and show its table; of its errors the end, since the compiler prints a whole kernel before it."""
    print("waiting for the compiler", file=sys.stderr, flush=True)
    table, complaints = process.communicate()
    print(f"\n{table}", end="")
    if process.returncode:
        print(f"compiling ended with exit code {process.returncode}:", *complaints.splitlines()[-20:], sep="\n")
    return process.returncode == 0


def print_compiled(archs=ARCHS):
    """What each kernel takes on GPUs that need not be here: registers per thread, spills, bytes of shared memory."""
    from ...analysis import compile_report

    print(f"{'compiled for':18}{'head size':>9}  {'kernel':9}{'tiles':>12}"
          f"{'registers':>11}{'stack':>7}{'loop spills':>13}{'shared':>9}")
    for arch, d, kernel in itertools.product(archs, (64, 128), ("forward", "dq", "dkdv")):
        device = gpu.KNOWN[arch]
        problem = Problem((4,), 16, 16, 4096, 4096, d, d, torch.bfloat16, (None, 0))
        got = compile_report.inspect_kernel(kernel, problem, lookup.get_config(kernel, problem, device), device)
        print(f"{f'{device.name}, {arch}':18}{d:>9}  {kernel:9}{got.config!s:>12}{got.registers:>11}{got.stack:>7}"
              f"{got.loop_spills:>13}{got.shared_memory:>9}", flush=True)


def new_figure(out: str):
    """Two empty panels of matplotlib; asked for before the work, not after it, as is whether `out` can be written."""
    if Path(out).is_dir() or not os.access(Path(out).parent, os.W_OK):
        raise InputError(f"out: expected a file in a folder that can be written to, got {out!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"matplotlib: expected it installed, to draw the curves, got {error}") from None
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    for axes in figure.subplots(2, 1, sharex=True, height_ratios=(3, 1)):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw(figure, losses, out):
    """Both curves, and below them their difference, as a PNG."""
    (top, bottom), difference = figure.axes, losses["tritonattn"] - losses["torch"]
    steps = range(1, len(difference) + 1)
    top.plot(steps, losses["torch"], color="#f5b971", linewidth=7, label="torch's attention")
    top.plot(steps, losses["tritonattn"], color="#14213d", linewidth=1.8, linestyle="--", label="tritonattn")
    top.set_title(f"Same start, same text: the two losses differ by at most {difference.abs().max():.1e} nats", loc="left")
    top.set_ylabel("loss (nats per character)")
    top.legend(frameon=False)
    bottom.plot(steps, difference, color="#14213d", linewidth=1.8)
    bottom.set(xlabel="step", ylabel="difference\n(nats)")
    bottom.yaxis.set_major_formatter("{x:.2g}")
    bottom.locator_params(axis="y", nbins=4)
    figure.savefig(out, format="png", dpi=200)


def faults(losses, measured, setup) -> list[str]:
    """What does not agree, in words; nan agrees with nothing."""
    found = [f"{what}: expected an error of at most {LIMIT} x {theirs:.3g} + {ROUNDING} ulp, got {ours:.3g}"
             for what, (theirs, ours) in measured.items() if not ours <= LIMIT * theirs + ROUNDING]
    found += [f"losses of {name}: expected finite numbers, got {values[~values.isfinite()][0]}"
              for name, values in losses.items() if not values.isfinite().all()]
    last = (losses["tritonattn"][-1] - losses["torch"][-1]).abs().item()
    if not last <= setup.tolerance:
        found.append(f"last losses: expected them within {setup.tolerance} nats of each other, got {last:.1e}")
    return found


def run(text: str | None = None, steps: int | None = None, out: str = "demo.png", device=None) -> int:
    """Train, measure and draw; 0 if everything agrees, 1 if something does not, which is said."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() and not gpu.INTERPRETED else "cpu"))
    setup = ON_GPU if device.type == "cuda" else ON_CPU
    setup = setup if steps is None else replace(setup, steps=steps)
    if setup.steps < 2:
        raise InputError(f"steps: expected at least 2, for a curve, got {steps}")
    figure = new_figure(out)
    numbers, characters = encode(read_text(text, setup.context + 2))
    compiling = start_compiling() if device.type == "cpu" else None
    if compiling:
        # tensors this small gain nothing from threads, and the compiler wants the other cores
        torch.set_num_threads(1)

    torch.manual_seed(0)
    model, ways = Model(setup, characters).to(device), attentions(setup.dtype)
    models = {"torch": copy.deepcopy(model), "tritonattn": model}
    print(f"text: {len(numbers)} characters, {characters} of them different\n"
          f"model: {setup.blocks} blocks, {setup.heads} heads, width {setup.width}; attention in {name_of(setup.dtype)} on "
          f"{gpu.gpu_of(device).name}; {setup.steps} steps of {setup.batch} x {setup.context} characters")
    losses, marks = train(models, ways, batches(numbers, setup, seed=0), setup, device)
    if device.type == "cuda":
        print("\nmilliseconds per step:", *(f"{name} {milliseconds(marks[name]):.1f} " for name in models))

    fresh = next(batches(numbers, replace(setup, batch=2), seed=1)).to(device)
    measured = measure_attention(model, fresh, ways, setup.dtype) | measure_model(model, fresh, ways)
    print(f"\n{'largest difference from float64, in ulp':44}{'torch':>10}{'tritonattn':>12}{'allowed':>10}")
    for what, (theirs, ours) in measured.items():
        print(f"{what:44}{theirs:>10.3g}{ours:>12.3g}{LIMIT * theirs + ROUNDING:>10.3g}", flush=True)
    draw(figure, losses, out)
    found = faults(losses, measured, setup)
    if compiling and not finish_compiling(compiling):
        found.append("kernels: expected all of them to compile, got an error")
    print("\n" + "\n".join(found or [f"everything agrees; the curves are in {out}"]))
    return 1 if found else 0
