"""The command line: python -m tritonattn demo | selftest | doctor | lens | explain, and what tuning/commands.py has.

Exit codes: 0 all is well, 1 something disagrees or will not work, 2 wrong usage or input, 130 after Ctrl-C.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from .. import gpu
from ..config import Config
from ..configs import lookup
from ..gpu import INTERPRETED
from ..problem import Problem
from .. import __version__
from . import doctor, tuning
from .tuning import DTYPES

DIRECTIONS = {"forward": ["forward"], "backward": ["delta", "dq", "dkdv"]}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    try:
        if "device" in arguments:
            arguments.device = arguments.device or ("cuda" if doctor.compiles() else "cpu")
            if arguments.device == "cpu" and (found := doctor.of_interpreter()).status == "bad":
                return _complain(f"{found.name}: {found.value}; mend: {found.mend}", 1)
            if arguments.device == "cpu" and not INTERPRETED:
                return _interpret(argv)
        if "compiled" in arguments:
            if (found := doctor.of_triton()).status == "bad":
                return _complain(f"{found.name}: {found.value}; mend: {found.mend}", 1)
            if INTERPRETED:
                return _interpret(argv, False)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Every command and its options; a command that runs kernels has a `device`, one that compiles them is `compiled`."""
    top = argparse.ArgumentParser("tritonattn", description="Exact attention in Triton: see it work, check it, see through it.",
                                  epilog="exit code: 0 all is well, 1 something is wrong, 2 wrong usage or input")
    top.add_argument("--version", action="version", version=f"tritonattn {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train a small language model with torch's attention and with this one")
    demo.add_argument("--text", metavar="FILE", help="what to learn, in UTF-8 (default: Python's own documentation)")
    demo.add_argument("--steps", type=int, metavar="N", help="training steps (default: enough to see it learn)")
    demo.add_argument("--out", default="demo.png", metavar="PNG", help="where the picture goes (default: %(default)s)")
    demo.set_defaults(run=_demo, device=None)

    selftest = commands.add_parser("selftest", help="check every kernel against float64 on this machine, in seconds")
    selftest.add_argument("--device", type=_device, metavar="cuda|cpu",
                          help="a GPU, or the CPU in Triton's interpreter (default: a GPU where there is one)")
    selftest.add_argument("--json", action="store_true", help="print a JSON list with every tensor instead of a table")
    selftest.set_defaults(run=_selftest)

    look = commands.add_parser("doctor", help="list versions, GPUs and folders, and how to mend what will not work")
    look.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    look.set_defaults(run=_doctor)
    _add_lens(commands)
    _add_explain(commands)
    tuning.add(commands, _gpus)
    return top


def _add_lens(commands) -> None:
    lens = commands.add_parser("lens", help="what the compiler makes of the kernels for any GPU, without one")
    lens.add_argument("--target", type=_gpus, default="sm_90", metavar="GPU,...",
                      help="architectures or models: sm_80, h200, mi300x (default: %(default)s)")
    lens.add_argument("--dtype", choices=DTYPES, default="bf16", help="of q, k and v (default: %(default)s)")
    lens.add_argument("--head-dim", type=int, default=128, metavar="D", help="1 to 512 (default: %(default)s)")
    lens.add_argument("--length", type=int, default=4096, metavar="N", help="queries and keys (default: %(default)s)")
    lens.add_argument("--causal", action="store_true", help="a query sees no later key")
    lens.add_argument("--direction", choices=DIRECTIONS, help="one direction alone (default: both)")
    which = lens.add_mutually_exclusive_group()
    which.add_argument("--config", metavar="128x64w8s3", help="for every kernel (default: what a call would use)")
    which.add_argument("--compare", nargs=2, metavar="CONFIG", help="two configs side by side, for every kernel and GPU")
    lens.add_argument("--plot", metavar="PNG", help="draw the cycles of each unit")
    form = lens.add_mutually_exclusive_group()
    form.add_argument("--sass", action="store_true", help="print the loop without a mask too, as it is disassembled")
    form.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    lens.set_defaults(run=_lens, compiled=True)


def _add_explain(commands) -> None:
    explain = commands.add_parser("explain", help="which configs a call would use, where they come from, why others lost")
    explain.add_argument("--shape", required=True, metavar="BxHxHKxNxD", help="batch, heads, kv heads, length, head size")
    explain.add_argument("--gpu", required=True, type=_gpus, metavar="GPU,...", help="models or architectures: h200, sm_80")
    explain.add_argument("--dtype", choices=DTYPES, default="bf16", help="of q, k and v (default: %(default)s)")
    explain.add_argument("--causal", action="store_true", help="a query sees no later key")
    explain.add_argument("--json", action="store_true", help="print a JSON list instead of text")
    explain.set_defaults(run=_explain)


def _gpus(names: str) -> list[gpu.Gpu]:
    """GPUs by architecture or model."""
    try:
        return [gpu.KNOWN.get(name.lower()) or gpu.named(name) for name in names.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; or an architecture out of {', '.join(gpu.KNOWN)}") from None


def _device(name: str) -> str:
    if name not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"expected cuda or cpu, got {name}")
    if name == "cuda" and not doctor.compiles():
        raise argparse.ArgumentTypeError("expected cpu, since kernels are not compiled here (doctor says why), got cuda")
    return name


def _interpret(argv: list[str], interpreted: bool = True) -> int:
    """The same command in a new Python, interpreted or not: Triton had to be told before the kernels were defined."""
    # a child and not os.execve: on Windows that ends this process at once, and the shell neither waits for the new one
    # nor learns its exit code; Ctrl-C reaches a child too
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted))}
    return subprocess.call([sys.executable, "-m", "tritonattn", *argv], env=environment)


def _demo(arguments) -> int:
    from .demo import demo

    try:
        return demo.run(arguments.text, arguments.steps, arguments.out)
    except demo.InputError as error:
        return _complain(str(error), 2)


def _selftest(arguments) -> int:
    from . import selftest

    device = torch.device(arguments.device)
    if not arguments.json:
        print(f"tritonattn {__version__} on {gpu.of(device).name}", flush=True)
    results = selftest.run(device)
    print(json.dumps(selftest.as_json(results), indent=1) if arguments.json else selftest.table(results))
    return 0 if all(result.agrees for result in results) else 1


def _doctor(arguments) -> int:
    found = doctor.findings()
    print(json.dumps(doctor.as_json(found), indent=1) if arguments.json else doctor.table(found))
    return 1 if any(finding.status == "bad" for finding in found) else 0


def _lens(arguments) -> int:
    from ..analysis.compile_report import inspect_kernel
    from . import format

    try:
        jobs = _jobs(arguments)
        with ThreadPoolExecutor() as pool:
            reports = list(pool.map(lambda job: inspect_kernel(*job), jobs))
            said = list(pool.map(lambda job: _remarks(*job), jobs))
        if arguments.plot:
            format.plot(reports, arguments.plot)
    except (ValueError, OSError) as error:
        return _complain(str(error), 2)
    except Exception as error:  # whatever the compiler raises
        return _complain(f"the compiler refuses this: {type(error).__name__}: {str(error)[:200]!r}", 1)
    if arguments.json:
        print(json.dumps([format.as_json(report) | {"ptxas": lines} for report, lines in zip(reports, said)], indent=1))
    elif arguments.compare:
        print("\n\n".join(format.side_by_side(reports[i:i + 2]) for i in range(0, len(reports), 2)))
    else:
        print(format.table(reports))
    for report, lines in zip(reports, () if arguments.json else said):
        for line in lines:
            print(f"ptxas on {report.gpu.arch} {report.kernel} {report.config}: {line}")
    for report in reports if arguments.sass else ():
        text = report.loops[0].text if report.loops else "no loop over tiles"
        print(f"\n{report.gpu.arch} {report.kernel} {report.config}\n{text}")
    return 0


def _remarks(*job) -> list[str]:
    """What ptxas has to say, or why it has nothing: a report stands without it."""
    from ..analysis.compile_report import ptxas_remarks

    try:
        return ptxas_remarks(*job)
    except (ValueError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return [f"no remarks: {error}"]


def _jobs(arguments) -> list[tuple]:
    """Kernel, problem, config and GPU of everything that is asked to be looked at."""
    d, n, dtype = arguments.head_dim, arguments.length, getattr(torch, DTYPES[arguments.dtype])
    if not 1 <= d <= 512 or n < 1:
        raise ValueError(f"expected a head size from 1 to 512 and a positive length, got {d} and {n}")
    problem = Problem((4,), 32, 32, n, n, d, d, dtype, (None, 0) if arguments.causal else (None, None))
    named = [Config.parse(text) for text in arguments.compare or [arguments.config] if text]
    return [(kernel, problem, chosen, target)
            for target in arguments.target
            for kernel in (DIRECTIONS.get(arguments.direction) or [kernel for both in DIRECTIONS.values() for kernel in both])
            for chosen in named or [lookup.get_config(kernel, problem, target)]]


def _explain(arguments) -> int:
    from ..analysis import explain as explanation

    try:
        problem = Problem.parse(arguments.shape, getattr(torch, DTYPES[arguments.dtype]), arguments.causal)
        found = [explanation.explain_problem(problem, target) for target in arguments.gpu]
    except (ValueError, RuntimeError) as error:
        return _complain(str(error), 2)
    print(json.dumps([each.as_json() for each in found], indent=1) if arguments.json else "\n\n".join(map(str, found)))
    return 0


def _complain(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
