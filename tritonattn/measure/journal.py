"""An append-only file of JSON lines under a frozen plan: a kill at any moment leaves it whole, and the next run goes on.

    line 1   {"plan": {...}, "digest": "...", "begun": "2026-11-21T15:04:05Z"}          every other line   one entry
"""

import datetime
import fcntl
import hashlib
import json
import os
from pathlib import Path


class JournalError(Exception):
    """A journal that cannot be read, or belongs to another plan."""


def digest(plan: dict) -> str:
    """Twelve hexadecimal digits that tell plans apart, whatever the order of their keys."""
    return hashlib.sha256(_line(plan).encode()).hexdigest()[:12]


def read(path: Path) -> tuple[dict, list[dict]]:
    """The first line and the entries. A last line that was torn by a kill is left out; any other broken line is an error."""
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise JournalError(f"{path}, line {number}: expected JSON, got {line[:60]!r}") from error
    if not found:
        raise JournalError(f"{path}: expected a first line with a plan, got {'part of one' if torn else 'an empty file'}")
    head, *entries = found
    if not isinstance(head, dict) or digest(head.get("plan", {})) != head.get("digest"):
        raise JournalError(f"{path}, line 1: expected a plan and its digest, got {str(head)[:60]}")
    return head, entries


class Journal:
    """The file at `path`, open for more entries; begun with `plan` if it is new. One process at a time.

    Raises JournalError if the file holds another plan, is broken before its last line, or is open elsewhere.
    """

    def __init__(self, path: Path, plan: dict):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        try:
            self._lock(path)
            self.entries = self._resume(path, plan)
        except BaseException:
            self._file.close()
            raise

    def _lock(self, path):
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise JournalError(f"{path}: expected to be the only writer, another process holds it") from error

    def _resume(self, path, plan) -> list[dict]:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        # what a kill tore off goes, or the next entry would continue it
        self._file.truncate(whole)
        if not whole:
            self._write({"plan": plan, "digest": digest(plan), "begun": now()})
            return []
        head, entries = read(path)
        if head["digest"] != digest(plan):
            raise JournalError(f"{path}: expected the plan {digest(plan)}, got {head['digest']}; name another file")
        return entries

    def append(self, entry: dict) -> None:
        """Write one entry; when this returns, it is on the disk."""
        self._write(entry)
        self.entries.append(entry)

    def _write(self, entry):
        self._file.write(_line(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def now() -> str:
    """This moment, in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _line(entry: dict) -> str:
    return json.dumps(entry, sort_keys=True, allow_nan=False, separators=(",", ":"))
