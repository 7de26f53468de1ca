"""Helpers of the commands: errors, checks of a picture's file before the work, and text in columns."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path


class CommandError(Exception):
    """The end of a command with one line on stderr: exit code 2 for input that the user can correct, else 1."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Align rows of text, one line each: the columns in `left` to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(text.ljust(width) if i in left else text.rjust(width)
                      for i, (text, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


def check_picture(option: str, path: str) -> None:
    """Raise CommandError unless matplotlib can draw a picture at `path`."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise CommandError("matplotlib is not installed; fix: pip install 'tritonattn[demo]'") from None
    if Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK):
        raise CommandError(f"{option}: expected a file in a folder that can be written to, got {path!r}")
