"""The command line: python -m tritonattn demo | selftest | doctor.

Exit codes: 0 all is well, 1 something disagrees or will not work, 2 wrong usage or input, 130 after Ctrl-C.
"""

import argparse
import json
import os
import subprocess
import sys

import torch

from . import doctor, gpu
from .gpu import INTERPRETED
from .version import VERSION


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
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Every command and its options; a command that runs kernels has a `device`."""
    top = argparse.ArgumentParser("tritonattn", description="Exact attention in Triton: see it work, check it, mend it.",
                                  epilog="exit code: 0 all is well, 1 something is wrong, 2 wrong usage or input")
    top.add_argument("--version", action="version", version=f"tritonattn {VERSION}")
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
    return top


def _device(name: str) -> str:
    if name not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"expected cuda or cpu, got {name}")
    if name == "cuda" and not doctor.compiles():
        raise argparse.ArgumentTypeError("expected cpu, since kernels are not compiled here (doctor says why), got cuda")
    return name


def _interpret(argv: list[str]) -> int:
    """The same command in a new Python, interpreted: Triton had to be told before the kernels were defined."""
    # a child and not os.execve: on Windows that ends this process at once, and the shell neither waits for the new one
    # nor learns its exit code; Ctrl-C reaches a child too
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.call([sys.executable, "-m", "tritonattn", *argv], env=environment)


def _demo(arguments) -> int:
    from . import demo

    try:
        return demo.run(arguments.text, arguments.steps, arguments.out)
    except demo.InputError as error:
        return _complain(str(error), 2)


def _selftest(arguments) -> int:
    from . import selftest

    device = torch.device(arguments.device)
    if not arguments.json:
        print(f"tritonattn {VERSION} on {gpu.of(device).name}", flush=True)
    results = selftest.run(device)
    print(json.dumps(selftest.as_json(results), indent=1) if arguments.json else selftest.table(results))
    return 0 if all(result.agrees for result in results) else 1


def _doctor(arguments) -> int:
    found = doctor.findings()
    print(json.dumps(doctor.as_json(found), indent=1) if arguments.json else doctor.table(found))
    return 1 if any(finding.status == "bad" for finding in found) else 0


def _complain(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
