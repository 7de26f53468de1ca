"""Journals survive a kill at any byte, and reject other plans and broken lines."""

import json

import pytest

from tritonattn.measure.journal import Journal, JournalError, digest, read

PLAN = {"suite": "paper", "sizes": [1, 2, 3]}


def written(path, entries):
    with Journal(path, PLAN) as book:
        for entry in entries:
            book.append(entry)
    return path.read_bytes()


def test_round_trip(tmp_path):
    entries = [{"job": i, "text": "é\n"} for i in range(3)]
    written(tmp_path / "deep" / "a.jsonl", entries)
    head, found = read(tmp_path / "deep" / "a.jsonl")
    assert head["plan"] == PLAN and found == entries and len(head["begun"]) == 20
    with Journal(tmp_path / "deep" / "a.jsonl", dict(reversed(PLAN.items()))) as book:
        assert book.entries == entries


def test_kill_at_any_byte_loses_no_complete_entry(tmp_path):
    entries = [{"job": i, "value": i / 3} for i in range(3)]
    whole, path = written(tmp_path / "whole.jsonl", entries), tmp_path / "cut.jsonl"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = max(0, whole[:size].count(b"\n") - 1)
        with Journal(path, PLAN) as book:
            assert book.entries == entries[:kept], size
            book.append({"job": "next"})
        assert read(path)[1] == [*entries[:kept], {"job": "next"}], size


def test_another_plan_is_an_error_and_changes_nothing(tmp_path):
    before = written(tmp_path / "a.jsonl", [{"job": 1}])
    with pytest.raises(JournalError, match=f"expected the plan {digest({'suite': 'odd'})}, got {digest(PLAN)}"):
        Journal(tmp_path / "a.jsonl", {"suite": "odd"})
    assert (tmp_path / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize(("line", "text"), [(2, b"{\"job\""), (1, b"{}"), (1, b"[]"), (1, b"null"), (3, b"\xff")])
def test_broken_line_before_the_last_is_an_error(tmp_path, line, text):
    path = tmp_path / "a.jsonl"
    lines = written(path, [{"job": 1}, {"job": 2}, {"job": 3}]).split(b"\n")
    lines[line - 1] = text
    path.write_bytes(b"\n".join(lines))
    for action in (lambda: read(path), lambda: Journal(path, PLAN)):
        with pytest.raises(JournalError, match=f"line {line}: expected"):
            action()
    assert path.read_bytes() == b"\n".join(lines)


@pytest.mark.parametrize(("content", "words"), [(b"", "an empty file"), (b'{"plan"', "part of one")])
def test_reading_needs_a_first_line(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(JournalError, match=f"expected a first line with a plan, got {words}"):
        read(tmp_path / "a.jsonl")


def test_one_writer_at_a_time(tmp_path):
    with Journal(tmp_path / "a.jsonl", PLAN), pytest.raises(JournalError, match="another process is writing to it"):
        Journal(tmp_path / "a.jsonl", PLAN)
    with Journal(tmp_path / "a.jsonl", PLAN) as book:
        assert book.entries == []


def test_nan_is_an_error_and_writes_nothing(tmp_path):
    with Journal(tmp_path / "a.jsonl", PLAN) as book:
        with pytest.raises(ValueError, match="JSON"):
            book.append({"seconds": float("nan")})
        book.append({"job": 1})
        assert book.entries == [{"job": 1}]
    assert read(tmp_path / "a.jsonl")[1] == [{"job": 1}]


def test_digest_identifies_a_plan():
    assert digest(PLAN) == digest(json.loads(json.dumps(PLAN))) != digest(PLAN | {"suite": "odd"})
