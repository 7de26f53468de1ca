"""Helpers of the commands: errors, and text in columns."""

from collections.abc import Sequence


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
