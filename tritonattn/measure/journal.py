"""An append-only file of JSON lines with a fixed plan. It survives a kill at any moment, and the next run resumes it.

    line 1   {"plan": {...}, "digest": "...", "begun": "2026-11-21T15:04:05Z"}          every other line   one entry
"""

import datetime
import fcntl
import hashlib
import json
import os
from pathlib import Path


class JournalError(Exception):
    """A journal that cannot be read, is locked, or has another plan."""


def digest(plan: dict) -> str:
    """Return twelve hexadecimal digits that identify a plan, independent of the order of its keys."""
    return hashlib.sha256(_line(plan).encode()).hexdigest()[:12]


def read(path: Path) -> tuple[dict, list[dict]]:
    """Return the first line and the entries. An incomplete last line is ignored; any other broken line is a JournalError."""
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise JournalError(f"{path}, line {number}: expected JSON, got {line[:60]!r}") from error
    if not rows:
        raise JournalError(f"{path}: expected a first line with a plan, got {'part of one' if torn else 'an empty file'}")
    head, *entries = rows
    if not isinstance(head, dict) or digest(head.get("plan", {})) != head.get("digest"):
        raise JournalError(f"{path}, line 1: expected a plan and its digest, got {str(head)[:60]}")
    return head, entries


class Journal:
    """The file at `path`, open for appending by one process; a new file starts with `plan`. A context manager.

    Raises JournalError if the file has another plan, is broken before its last line, or is open in another process.
    """

    def __init__(self, path: Path, plan: dict):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        try:
            self.entries = self._resume(path, plan)
        except BaseException:
            self._file.close()
            raise

    def _resume(self, path, plan) -> list[dict]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise JournalError(f"{path}: another process is writing to it") from error
        whole = path.read_bytes().rfind(b"\n") + 1
        # remove an incomplete last line, or the next entry would continue it
        self._file.truncate(whole)
        if not whole:
            self._write({"plan": plan, "digest": digest(plan), "begun": now()})
            return []
        head, entries = read(path)
        if head["digest"] != digest(plan):
            raise JournalError(f"{path}: expected the plan {digest(plan)}, got {head['digest']}; name another file")
        return entries

    def append(self, entry: dict) -> None:
        """Write one entry to the disk."""
        self._write(entry)
        self.entries.append(entry)

    def _write(self, entry):
        self._file.write(_line(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def now() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _line(entry: dict) -> str:
    return json.dumps(entry, sort_keys=True, allow_nan=False, separators=(",", ":"))
