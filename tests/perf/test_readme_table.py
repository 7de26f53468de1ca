"""perf.readme_table: what stands in the README is what was recorded, and nothing else in the README moves."""

import itertools
import os
import re

import pytest
import torch

from perf import cases, readme_table
from perf import results as record
from tritonattn.measure.journal import Journal

ENVIRONMENT = {"gpu": "NVIDIA H200", "arch": "sm_90", "driver": "570.124", "torch": "2.11.0+cu130", "triton": "3.6.0",
               "commit": "0123456789ab-dirty", "date": "2026-11-21T15:04:05Z"}
README = f"# title\n\nbefore\n\n{readme_table.BEGIN}\nold\n{readme_table.END}\n\nafter, 1 | 2\n"


def ok(seconds, throttled=False):
    """A result that is right, with quantiles a tenth below and above."""
    return {"status": "ok", "seconds": seconds, "q20": 0.9 * seconds, "q80": 1.1 * seconds, "throttled": throttled,
            "reason": None, "details": None}


def bad(status, reason="error 3.25 | of 1"):
    return {"status": status, "reason": reason}


def job(case, direction="forward", *, suite="paper", **results):
    """An entry of a journal; a name's underscore stands for a dash."""
    results = {name.replace("_", "-"): result for name, result in results.items()}
    return {"job": f"{suite}/{case.name}/{direction}", "suite": suite, "case": case.name, "direction": direction,
            "problem": case.problem.as_json(), "results": results}


def of_grid(d, mask, n, direction="forward", **results):
    return job(cases.of_paper(d, mask, n), direction, **results)


def seconds(entry, tflops):
    """The time in which an entry's job makes so many TFLOP/s."""
    return record.job_of(entry).flops / tflops / 1e12


def at(ours, rival, d=64, mask="full", n=1024, direction="forward", throttled=False):
    """An entry in the grid with ours and cudnn at so many TFLOP/s."""
    empty = of_grid(d, mask, n, direction)
    return of_grid(d, mask, n, direction, tritonattn=ok(seconds(empty, ours), throttled), cudnn=ok(seconds(empty, rival)))


def write(folder, *entries, name="paper-0", **environment):
    """A file of results, as a run leaves it."""
    path = folder / "nvidia-h200" / f"{name}.jsonl"
    with Journal(path, {"environment": ENVIRONMENT | environment, "name": name}) as book:
        for entry in entries:
            book.append(entry)
    return path


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(README)
    return path


@pytest.fixture
def command(results, readme):
    """The command on these results and this README."""
    return lambda *options: readme_table.main(["--results", str(results), "--readme", str(readme), *options])


def block(results):
    return readme_table.block(record.load(results))


def rows(text):
    """The cells of all lines of tables."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"]


def test_the_grid_in_numbers(results):
    write(results, at(410, 480, n=1024), at(500, 400, n=16384), at(99.94, 300, mask="causal", direction="backward"),
          at(12.34, 300, d=128, n=512))
    assert rows(block(results)) == [
        ["head size", "mask", "direction", "1k", "16k"], ["---"] * 5,
        ["64", "full", "forward", "410 / 480 (cudnn) = 0.85", "500 / 400 (cudnn) = **1.25**"],
        ["64", "causal", "backward", "99.9 / 300 (cudnn) = 0.33", "-"],
        ["128", "full", "forward", "-", "-"],
    ]


def test_lengths_that_a_table_has_no_room_for_stand_where_there_are_no_others(results):
    write(results, at(400, 500, n=512), at(450, 500, n=2048))
    assert rows(block(results))[0][3:] == ["512", "2k"]


def test_families_come_in_order(results):
    keys = list(itertools.product((64, 128, 256), ("full", "causal"), ("forward", "backward")))
    write(results, *(at(400, 500, *key[:2], direction=key[2]) for key in reversed(keys)))
    assert [tuple(row[:3]) for row in rows(block(results))[2:]] == [(str(d), *rest) for d, *rest in keys]


def test_other_suites_have_a_row_for_each_case(results):
    case = cases.MODELS[1]
    direct = job(case, "forward", suite="models")
    write(results, job(case, "both", suite="models", tritonattn=ok(2.0), flex=ok(3.0)),
          job(case, suite="models", tritonattn=ok(seconds(direct, 250)), flash=ok(seconds(direct, 500))),
          job(cases.MODELS[0], suite="models", tritonattn=bad("refused"), flash=ok(1.0)))
    head, _, *body = rows(block(results))
    assert head == ["case", "forward", "both"]
    assert body[0][:2] == [case.name, "250 / 500 (flash) = 0.50"] and body[0][2].endswith("(flex) = **1.50**")
    assert body[1] == [cases.MODELS[0].name, "ours: refused", "-"]


def test_a_short_run_has_both_tables(results):
    write(results, at(400, 500), job(cases.SHORT[-1], suite="short", tritonattn=ok(1.0), torch=ok(1.0)))
    heads = [row[0] for row in rows(block(results)) if row[0] in ("head size", "case")]
    assert heads == ["head size", "case"]


@pytest.mark.parametrize("status", ["wrong", "refused", "failed", "missing"])
def test_where_ours_is_not_ok_no_number_stands(results, status):
    write(results, of_grid(64, "full", 4096, tritonattn=bad(status), tritonattn_plain_grad=ok(1e-3), cudnn=ok(1e-3)))
    assert rows(block(results))[2] == ["64", "full", "forward", f"ours: {status}"]


def test_ours_that_was_not_run_and_rivals_that_are_wrong(results):
    took = seconds(of_grid(64, "full", 4096), 321)
    write(results, of_grid(64, "full", 1024, cudnn=ok(1.0)),
          of_grid(64, "full", 4096, tritonattn=ok(took), cudnn=bad("wrong")))
    assert rows(block(results))[2][3:] == ["ours: not run", "321 (no rival)"]


def test_a_variant_of_ours_is_no_rival(results):
    write(results, of_grid(64, "full", 1024, tritonattn=ok(2.0), tritonattn_plain_grad=ok(1.0), flex=ok(3.0), math=ok(4.0)))
    assert rows(block(results))[2][3].endswith("(flex) = **1.50**")


def test_the_fastest_rival_that_is_right_is_the_best(results):
    write(results, of_grid(64, "full", 1024, tritonattn=ok(2.0), cudnn=ok(3.0), flash=ok(1.0), flex=bad("wrong")))
    assert rows(block(results))[2][3].endswith("(flash) = 0.50")


def test_no_tie_that_is_none(results):
    write(results, of_grid(64, "full", 1024, tritonattn=ok(1.0), cudnn=ok(0.9991)),
          of_grid(64, "full", 4096, tritonattn=ok(1.0), cudnn=ok(1.0012)))
    lost, won = rows(block(results))[2][3:]
    assert lost.endswith("= 0.999") and won.endswith("= **1.001**")


def test_throttled_numbers_carry_a_dagger_and_its_footnote(results):
    write(results, at(410, 480, throttled=True))
    text = block(results)
    assert rows(text)[2][3] == "410† / 480 (cudnn) = 0.85"
    assert text.splitlines()[-1].startswith("† The GPU held its clocks back")


def test_no_footnote_without_a_dagger(results):
    write(results, at(410, 480))
    assert "†" not in block(results)


def test_a_run_says_where_its_numbers_come_from(results):
    write(results, at(410, 480))
    first = block(results).splitlines()[0]
    for text in ("NVIDIA H200", "paper suite", "bfloat16", "driver 570.124", "torch 2.11.0+cu130", "Triton 3.6.0", "2026-11-21",
                 "commit 0123456789ab-dirty"):
        assert text in first
    assert "15:04" not in first


def test_what_was_not_recorded_is_said(results):
    write(results, at(410, 480), driver=None, commit="f" * 40)
    first = block(results).splitlines()[0]
    assert "driver not recorded" in first and f"commit {'f' * 12})" in first


def test_the_newest_run_wins(results):
    write(results, at(111, 500), name="paper-a", date="2026-11-22T00:00:00Z")
    write(results, at(222, 500), name="paper-b", date="2026-11-23T00:00:00Z")
    write(results, at(333, 500), name="paper-c", date="2026-11-21T00:00:00Z")
    text = block(results)
    assert "222 / 500" in text and "111" not in text and "333" not in text


def test_another_gpu_suite_or_dtype_does_not_compete(results):
    half = cases.suite("paper", torch.float16)[0]
    write(results, at(111, 500), name="a")
    write(results, at(222, 500), name="b", gpu="NVIDIA A100-SXM4-80GB")
    write(results, at(333, 500) | {"suite": "short"}, name="c")
    write(results, job(half, tritonattn=ok(1.0), cudnn=ok(1.0)), name="d")
    heads = [line.split(" (")[0] for line in block(results).splitlines() if line.startswith("**")]
    assert heads == ["**NVIDIA A100-SXM4-80GB**, paper suite, bfloat16", "**NVIDIA H200**, paper suite, bfloat16",
                     "**NVIDIA H200**, paper suite, float16", "**NVIDIA H200**, short suite, bfloat16"]


def test_a_run_without_a_job_hides_no_other(results):
    write(results, at(111, 500), name="a")
    write(results, name="b", date="2027-01-01T00:00:00Z")
    assert "111 / 500" in block(results)


def test_a_bar_in_a_name_does_not_break_the_table(results):
    case = cases.MODELS[0]._replace(name="a | b")
    write(results, job(case, suite="models", tritonattn=ok(1.0), torch=ok(1.0)), gpu="G | H")
    text = block(results)
    assert rows(text)[2][0] == r"a \| b" and r"**G \| H**" in text


@pytest.mark.parametrize("environment", [None, {"arch": "interpreter", "gpu": "CPU, interpreted"}], ids=["nothing", "CPU"])
def test_no_number_where_no_gpu_was(results, command, readme, environment):
    if environment:
        write(results, at(410, 480), **environment)
    assert command() == 0
    inside = readme.read_text().partition(readme_table.BEGIN)[2].partition(readme_table.END)[0]
    assert "Nothing has been measured" in inside and not re.search(r"\d", inside)


@pytest.mark.parametrize("text, message", [
    (README.replace(readme_table.BEGIN, ""), f"README.md: expected the marker {readme_table.BEGIN} once, got it 0 times"),
    (README.replace(readme_table.END, ""), f"README.md: expected the marker {readme_table.END} once, got it 0 times"),
    (README + readme_table.BEGIN, f"README.md: expected the marker {readme_table.BEGIN} once, got it 2 times"),
    (README + README, f"README.md: expected the marker {readme_table.BEGIN} once, got it 2 times"),
    (f"{readme_table.BEGIN}\n{readme_table.END}\n{readme_table.END}", f"README.md: expected the marker {readme_table.END} once, got it 2 times"),
    (f"x\n{readme_table.END}\n\n{readme_table.BEGIN}\n", f"README.md: expected {readme_table.BEGIN} before {readme_table.END}, got them on lines 4 and 2"),
], ids=["no begin", "no end", "two begins", "two of both", "two ends", "reversed"])
@pytest.mark.parametrize("options", [(), ("--check",)], ids=["write", "check"])
def test_markers_that_are_amiss_are_refused(results, command, readme, capsys, text, message, options):
    write(results, at(410, 480))
    readme.write_text(text)
    before = readme.stat()
    assert command(*options) == 2
    assert capsys.readouterr().err == message + "\n"
    assert readme.read_text() == text
    assert (readme.stat().st_mtime_ns, readme.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_only_what_is_between_the_markers_changes(results, command, readme):
    write(results, at(410, 480))
    readme.write_bytes(b"\xc3\xbc one\r\n" + README.encode())
    before, _, after = README.partition("old\n")
    assert command() == 0
    text = readme.read_bytes().decode()
    assert text.startswith(f"ü one\r\n{before}") and text.endswith(f"\n{after}")
    assert "410 / 480" in text and "\nold\n" not in text


def test_a_second_time_changes_nothing(results, command, readme):
    write(results, at(410, 480))
    assert command() == 0
    first, before = readme.read_bytes(), readme.stat()
    assert command() == 0
    assert readme.read_bytes() == first and readme.stat().st_mtime_ns == before.st_mtime_ns


def test_check_compares_and_writes_nothing(results, command, readme, capsys):
    write(results, at(410, 480))
    assert command("--check") == 1
    assert readme.read_text() == README and "expected what `python -m perf.readme_table` writes" in capsys.readouterr().err
    assert command() == 0 and command("--check") == 0
    write(results, at(411, 480), name="later", date="2027-01-01T00:00:00Z")
    assert command("--check") == 1


def test_a_write_that_fails_leaves_the_old_file_and_no_other(results, command, readme, monkeypatch, capsys):
    write(results, at(410, 480))

    def fail(*_):
        raise OSError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        assert command() == 2
    assert "no room" in capsys.readouterr().err
    assert readme.read_text() == README and sorted(path.name for path in readme.parent.iterdir()) == ["README.md", "results"]


def test_the_file_keeps_its_mode_and_a_link_stays_one(results, readme, tmp_path):
    write(results, at(410, 480))
    readme.chmod(0o640)
    link = tmp_path / "link.md"
    link.symlink_to(readme)
    assert readme_table.main(["--results", str(results), "--readme", str(link)]) == 0
    assert readme.stat().st_mode & 0o777 == 0o640 and link.is_symlink() and "410 / 480" in readme.read_text()


def test_broken_results_are_refused(results, command, readme, capsys):
    write(results, at(410, 480)).write_text('{"plan": {}, "digest": "0"}\n')
    assert command() == 2
    assert "expected a plan and its digest" in capsys.readouterr().err and readme.read_text() == README


def test_a_readme_that_is_not_there_is_refused(results, readme, command, capsys):
    readme.unlink()
    assert command() == 2
    assert "README.md" in capsys.readouterr().err


def test_this_repository_is_in_step(capsys):
    assert readme_table.main(["--check"]) == 0, capsys.readouterr().err
