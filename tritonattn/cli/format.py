"""Helpers of the commands: errors of input, checks before the work, and text in columns."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path


class InputError(ValueError):
    """Input that the user can correct; the message says what is wrong and what is accepted."""


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Align rows of text, one line each: the columns in `left` to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(text.ljust(width) if i in left else text.rjust(width)
                      for i, (text, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


def complain(message: str, code: int) -> int:
    """Print a message to stderr and return the exit code."""
    print(message, file=sys.stderr)
    return code


def require(module: str, extra: str) -> None:
    """Raise InputError where an optional package is missing; the message names the extra that installs it."""
    try:
        importlib.import_module(module)
    except ImportError:
        raise InputError(f"{module} is not installed; fix: pip install 'tritonattn[{extra}]'") from None


def require_writable(option: str, path: str) -> None:
    """Raise InputError unless a file can be written at `path`."""
    if Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK):
        raise InputError(f"{option}: expected a file in a folder that can be written to, got {path!r}")
