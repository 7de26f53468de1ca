"""The commands that show compiled kernels without a GPU: python -m tritonattn inspect | explain."""

import argparse
import importlib
import json
import operator
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from .. import gpu
from ..config import KERNELS, Config
from ..configs import lookup
from ..problem import NORMALIZERS, Problem, UserFunction
from ..score_function import ScoreFunction
from .format import CommandError
from .tuning import DTYPES

DIRECTIONS = {"forward": ["forward"], "backward": ["delta", "dq", "dkdv"]}


def add(commands) -> None:
    """Add these commands to a parser."""
    inspect = commands.add_parser("inspect", help="show registers, spills, memory and instructions of compiled kernels")
    inspect.add_argument("--target", type=gpus, default="sm_90", metavar="GPU,...",
                         help="architectures or models: sm_80, h200, mi300x (default: %(default)s)")
    inspect.add_argument("--head-dim", type=int, default=128, metavar="D", help="1 to 512 (default: %(default)s)")
    inspect.add_argument("--length", type=int, default=4096, metavar="N", help="queries and keys (default: %(default)s)")
    inspect.add_argument("--direction", choices=DIRECTIONS, help="one direction only (default: both)")
    choice = inspect.add_mutually_exclusive_group()
    choice.add_argument("--config", metavar="128x64w8s3", help="for every kernel (default: what a call would use)")
    choice.add_argument("--compare", nargs=2, metavar="CONFIG", help="two configs side by side, for every kernel and GPU")
    form = inspect.add_mutually_exclusive_group()
    form.add_argument("--sass", action="store_true", help="also print the disassembled loop without a mask")
    inspect.set_defaults(run=_inspect, compiled=True)

    explain = commands.add_parser("explain", help="show the configs that a call would use, their origin, and those rejected")
    explain.add_argument("--shape", required=True, metavar="BxHxHKxNxD", help="batch, heads, kv heads, length, head size")
    explain.add_argument("--gpu", required=True, type=gpus, metavar="GPU,...", help="models or architectures: h200, sm_80")
    explain.set_defaults(run=_explain)
    for command, output in ((inspect, form), (explain, explain)):
        command.add_argument("--dtype", choices=DTYPES, default="bf16", help="of q, k and v (default: %(default)s)")
        command.add_argument("--causal", action="store_true", help="mask keys after the query")
        command.add_argument("--softcap", action="store_true", help="bound the scores by a softcap")
        command.add_argument("--alibi", action="store_true", help="a slope for each head")
        command.add_argument("--relative", action="store_true", help="a table of relative positions for each head")
        command.add_argument("--entropy", action="store_true", help="the entropy of each row, differentiated")
        command.add_argument("--key-mass", action="store_true", help="the mass of each key, differentiated")
        command.add_argument("--normalizer", choices=NORMALIZERS, default="softmax", help="default: %(default)s")
        command.add_argument("--score-function", metavar="MODULE:NAME", help="a tritonattn.ScoreFunction in a module")
        command.add_argument("--packed", action="store_true", help="the sequences of the batch are packed")
        output.add_argument("--json", action="store_true", help="print a JSON list instead of text")


def gpus(names: str) -> list[gpu.Gpu]:
    """Parse a list of GPUs, by architecture or model."""
    try:
        return [gpu.KNOWN.get(name.lower()) or gpu.named(name) for name in names.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; or an architecture out of {', '.join(gpu.KNOWN)}") from None


def _inspect(arguments) -> int:
    from ..analysis.compile_report import inspect_kernel
    from . import reports as show

    jobs = _jobs(arguments)
    try:
        with ThreadPoolExecutor() as pool:
            reports = list(pool.map(lambda job: inspect_kernel(*job), jobs))
            remarks = list(pool.map(_remarks, jobs))
    except Exception as error:  # compilers raise errors of many types
        raise CommandError(f"compilation failed: {type(error).__name__}: {str(error)[:200]!r}", 1) from None
    if arguments.json:
        print(json.dumps([show.as_json(report) | {"ptxas": lines} for report, lines in zip(reports, remarks)], indent=1))
        return 0
    if arguments.compare:
        print("\n\n".join(show.side_by_side(reports[i:i + 2]) for i in range(0, len(reports), 2)))
    else:
        print(show.table(reports))
    names = [f"{report.gpu.arch} {report.kernel} {report.config}" for report in reports]
    for name, lines in zip(names, remarks):
        for line in lines:
            print(f"ptxas on {name}: {line}")
    for name, report in zip(names, reports) if arguments.sass else ():
        for each in report.passes:
            title = f"{name} ({each.part})" if each.part else name
            print(f"\n{title}\n{each.loops[0].text if each.loops else 'no loop over tiles'}")
    return 0


def _remarks(job) -> list[str]:
    """Return the performance remarks of ptxas, or why there are none: a report is useful without them."""
    from ..analysis.compile_report import ptxas_remarks

    try:
        return ptxas_remarks(*job)
    except (ValueError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return [f"no remarks: {error}"]


def _jobs(arguments) -> list[tuple]:
    """Return kernel, problem, config and GPU of every report that the arguments name."""
    d, n, dtype = arguments.head_dim, arguments.length, getattr(torch, DTYPES[arguments.dtype])
    if not 1 <= d <= 512 or n < 1:
        raise CommandError(f"expected a head size from 1 to 512 and a positive length, got {d} and {n}")
    window = (None, 0) if arguments.causal else (None, None)
    problem = _variant(Problem((4,), 32, 32, n, n, d, d, dtype, window), arguments)
    try:
        configs = [Config.parse(text) for text in arguments.compare or [arguments.config] if text]
    except ValueError as error:
        raise CommandError(str(error)) from None
    kernels = DIRECTIONS[arguments.direction] if arguments.direction else KERNELS[:4]
    if arguments.normalizer != "softmax":
        kernels = [kernel for kernel in kernels if kernel != "delta"]
    if (arguments.alibi or arguments.relative) and arguments.direction != "forward":
        kernels = *kernels, "diagonals"
    if arguments.key_mass and arguments.direction != "backward":
        kernels = *kernels, "key_mass"
    if arguments.key_mass and arguments.direction != "forward":
        kernels = *kernels, "mass_delta"
    return [(kernel, problem, config, target) for target in arguments.target for kernel in kernels
            for config in configs or [lookup.get_config(kernel, problem, target)]]


def _variant(problem: Problem, arguments) -> Problem:
    """Return a problem with the features that the arguments name."""
    if arguments.normalizer != "softmax" and (arguments.entropy or arguments.key_mass):
        raise CommandError("only a softmax has statistics: leave out --entropy and --key-mass, or --normalizer")
    packed = (problem.batch[0] * problem.n_q,) * 2 if arguments.packed else None
    if arguments.score_function is not None:
        function = _score_function(arguments.score_function)
        problem = replace(problem, score_function=UserFunction.of(function.name, function.payload))
    return replace(problem, softcap=arguments.softcap, packed=packed, alibi=arguments.alibi, relative=arguments.relative,
                   entropy=arguments.entropy, key_mass=arguments.key_mass, normalizer=arguments.normalizer)


def _score_function(name: str) -> ScoreFunction:
    """Return the ScoreFunction MODULE:NAME."""
    module, _, attribute = name.partition(":")
    try:
        function = operator.attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:  # importing a module may raise anything
        raise CommandError(f"--score-function {name}: {type(error).__name__}: {error}") from None
    if not isinstance(function, ScoreFunction):
        raise CommandError(f"--score-function {name}: expected a tritonattn.ScoreFunction, got {function!r}")
    return function


def _explain(arguments) -> int:
    from ..analysis.explain import explain_problem

    try:
        problem = Problem.parse(arguments.shape, getattr(torch, DTYPES[arguments.dtype]), arguments.causal)
        problem = _variant(problem, arguments)
        explanations = [explain_problem(problem, target) for target in arguments.gpu]
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from None
    if arguments.json:
        print(json.dumps([explanation.as_json() for explanation in explanations], indent=1))
    else:
        print("\n\n".join(map(str, explanations)))
    return 0
