"""The command line: python -m tritonattn demo | selftest | doctor | inspect | explain | tune | sweep | report | replay | cache.

Exit codes: 0 success, 1 a check failed, 2 wrong usage or input, 130 after Ctrl-C.
"""

import argparse
import json
import os
import subprocess
import sys

import torch

from .. import __version__, gpu
from ..gpu import INTERPRETED
from . import doctor, inspection, tuning
from .format import CommandError


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    A command that compiles kernels runs in a new process if this one interprets them, and the other way round.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    finding, interpreted = None, INTERPRETED
    try:
        if "device" in arguments:
            arguments.device = arguments.device or ("cuda" if doctor.compiles() else "cpu")
            if arguments.device == "cpu":
                finding, interpreted = doctor.of_interpreter(), True
            elif not doctor.compiles():
                raise CommandError("--device: expected cpu, got cuda, but kernels cannot be compiled here; see `doctor`")
        elif "compiled" in arguments:
            finding, interpreted = doctor.of_triton(), False
        if finding and finding.status == "bad":
            raise CommandError(f"{finding.name}: {finding.value}; fix: {finding.fix}", 1)
        return arguments.run(arguments) if interpreted == INTERPRETED else _rerun(argv, interpreted)
    except CommandError as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Build the parser. A command that runs kernels has a `device`, one that compiles them has `compiled`."""
    top = argparse.ArgumentParser("tritonattn", description="Exact attention in Triton: try, check, inspect and tune it.",
                                  epilog="exit codes: 0 success, 1 a check failed, 2 wrong usage or input")
    top.add_argument("--version", action="version", version=f"tritonattn {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train a small language model with torch's attention and with this one")
    demo.add_argument("--steps", type=int, metavar="N", help="training steps (default: 30 without a GPU, 300 with one)")
    demo.add_argument("--out", default="demo.png", metavar="PNG", help="file for the picture (default: %(default)s)")
    demo.set_defaults(run=_demo, device=None)

    selftest = commands.add_parser("selftest", help="check every kernel against float64 on this machine, in seconds")
    selftest.add_argument("--device", choices=("cuda", "cpu"),
                          help="a GPU, or the CPU with Triton's interpreter (default: a GPU if there is one)")
    selftest.add_argument("--json", action="store_true", help="print a JSON list with every tensor instead of a table")
    selftest.set_defaults(run=_selftest)

    check = commands.add_parser("doctor", help="list versions, GPUs and folders, and a fix for every problem")
    check.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    check.set_defaults(run=_doctor)
    inspection.add(commands)
    tuning.add(commands)
    return top


def _rerun(argv: list[str], interpreted: bool) -> int:
    """Run the same command in a new process: Triton reads TRITON_INTERPRET when the kernels are defined."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted))}
    return subprocess.call([sys.executable, "-m", "tritonattn", *argv], env=environment)


def _demo(arguments) -> int:
    from . import demo

    return demo.run(arguments.steps, arguments.out)


def _selftest(arguments) -> int:
    from . import selftest

    device = torch.device(arguments.device)
    if not arguments.json:
        print(f"tritonattn {__version__} on {gpu.gpu_of(device).name}", flush=True)
    results = selftest.run(device)
    print(json.dumps(selftest.as_json(results), indent=1) if arguments.json else selftest.table(results))
    return 0 if all(result.agrees for result in results) else 1


def _doctor(arguments) -> int:
    findings = doctor.findings()
    print(json.dumps(list(map(vars, findings)), indent=1) if arguments.json else doctor.table(findings))
    return 1 if any(finding.status == "bad" for finding in findings) else 0
