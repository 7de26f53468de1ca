"""perf.readme_table writes what was recorded between the markers of the README, and changes nothing else."""

import re

import pytest
import torch

from perf import cases, readme_table, results
from tests.perf.recorded import bad, entry, grid_entry, ok, rates, seconds, write

README = f"# title\n\nbefore\n\n{readme_table.BEGIN}\nold\n{readme_table.END}\n\nafter, 1 | 2\n"


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(README)
    return path


def command(readme):
    return readme_table.main(["--results", str(readme.parent / "results"), "--readme", str(readme)])


def sections(folder):
    return "\n\n".join(map(readme_table.section, readme_table.newest(results.load(folder))))


def rows(folder):
    """The cells of all table rows."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in sections(folder).splitlines() if line[:1] == "|"]


def test_grid_shows_some_lengths(tmp_path):
    write(tmp_path, rates(12.34, 300, d=128, n=512), rates(99.94, 300, mask="causal", direction="backward"),
          rates(410, 480, n=1024, throttled=True), rates(500, 400, n=16384))
    assert rows(tmp_path) == [
        ["case", "forward", "backward"], ["---"] * 3,
        ["d64 causal 1024", "-", "99.9 / 300 (cudnn) = 0.33"],
        ["d64 full 1024", "410† / 480 (cudnn) = 0.85", "-"],
        ["d64 full 16384", "500 / 400 (cudnn) = **1.25**", "-"],
    ]
    head, *_, last = sections(tmp_path).splitlines()
    for text in ("**NVIDIA H200**, paper suite, bfloat16", "driver 570.124", "torch 2.11.0+cu130", "Triton 3.6.0",
                 "2026-11-21,", "commit 0123456789ab-dirty"):
        assert text in head
    assert last == "† The GPU was throttled during this measurement."


def test_grid_without_these_lengths_is_shown_whole(tmp_path):
    write(tmp_path, rates(300, 300, n=512))
    assert [row[0] for row in rows(tmp_path)[2:]] == ["d64 full 512"]


def test_case_table(tmp_path):
    case, other = cases.MODELS[1], cases.MODELS[0]._replace(name="a | b")
    forward = entry(case, suite="models")
    write(tmp_path, entry(case, "both", suite="models", tritonattn=ok(2.0), tritonattn_plain_grad=ok(1.0), flex=ok(3.0)),
          entry(case, suite="models", tritonattn=ok(seconds(forward, 250)), flash=ok(seconds(forward, 500)), math=ok(9.0)),
          entry(other, suite="models", tritonattn=bad("refused"), flash=ok(1.0)))
    head, _, first, second = rows(tmp_path)
    assert head == ["case", "forward", "both"] and second == [r"a \| b", "ours: refused", "-"]
    assert first[1] == "250 / 500 (flash) = 0.50" and first[2].endswith("(flex) = **1.50**")
    assert "†" not in sections(tmp_path)


@pytest.mark.parametrize(("outcomes", "text"), [
    ({"tritonattn": bad("wrong"), "tritonattn_plain_grad": ok(1e-3), "cudnn": ok(1e-3)}, "ours: wrong"),
    ({"cudnn": ok(1e-3)}, "ours: not run"),
    ({"tritonattn": ok(seconds(grid_entry(64, "full", 4096), 321)), "cudnn": bad("wrong")}, "321 (no baseline)"),
])
def test_incomplete_comparisons_have_a_reason(tmp_path, outcomes, text):
    write(tmp_path, grid_entry(64, "full", 4096, **outcomes))
    assert rows(tmp_path)[2] == ["d64 full 4096", text]


def test_newest_run_of_each_gpu_suite_and_dtype(tmp_path):
    write(tmp_path, rates(111, 500), name="a", date="2026-11-22T00:00:00Z")
    write(tmp_path, rates(222, 500), name="b", date="2026-11-23T00:00:00Z")
    write(tmp_path, name="c", date="2027-01-01T00:00:00Z")
    write(tmp_path, rates(333, 500), name="d", gpu="NVIDIA A100-SXM4-80GB")
    write(tmp_path, rates(444, 500) | {"suite": "short"}, name="e")
    write(tmp_path, entry(cases.suite("paper", torch.float16)[0], tritonattn=ok(1.0), cudnn=ok(1.0)), name="f")
    text = sections(tmp_path)
    assert "222 / 500" in text and "111" not in text
    assert [line.split(" (")[0] for line in text.splitlines() if line.startswith("**")] == [
        "**NVIDIA A100-SXM4-80GB**, paper suite, bfloat16", "**NVIDIA H200**, paper suite, bfloat16",
        "**NVIDIA H200**, paper suite, float16", "**NVIDIA H200**, short suite, bfloat16"]


@pytest.mark.parametrize("interpreted", [False, True])
def test_without_a_gpu_the_readme_has_no_number(readme, interpreted):
    if interpreted:
        write(readme.parent / "results", rates(410, 480), arch="interpreter")
    assert command(readme) == 0
    block = readme.read_text().partition(readme_table.BEGIN)[2].partition(readme_table.END)[0]
    assert "Nothing has been measured" in block and not re.search(r"\d", block)


def test_only_the_block_changes(readme):
    write(readme.parent / "results", rates(410, 480))
    text = "ü one\r\n" + README
    readme.write_bytes(text.encode())
    assert command(readme) == 0
    written, (before, after) = readme.read_bytes().decode(), text.split("old\n")
    assert written.startswith(before) and written.endswith(f"\n{after}") and "410 / 480" in written and "\nold\n" not in written
    assert command(readme) == 0 and readme.read_bytes().decode() == written


@pytest.mark.parametrize("text", [
    README.replace(readme_table.BEGIN, ""), README.replace(readme_table.END, ""), README + readme_table.BEGIN, README + README,
    f"x\n{readme_table.END}\n\n{readme_table.BEGIN}\n",
], ids=["no begin", "no end", "two begins", "two blocks", "reversed"])
def test_wrong_markers_are_an_error(readme, text, capsys):
    readme.write_text(text)
    assert command(readme) == 2 and readme.read_text() == text
    assert "README: expected one block from <!-- perf.readme_table: begin -->" in capsys.readouterr().err


def test_broken_results_and_a_missing_readme_are_errors(readme, capsys):
    path = write(readme.parent / "results", rates(410, 480))
    path.write_text("no JSON\n")
    assert command(readme) == 2 and "JSON" in capsys.readouterr().err and readme.read_text() == README
    path.unlink()
    readme.unlink()
    assert command(readme) == 2 and "README.md" in capsys.readouterr().err


def test_readme_of_this_repository_is_up_to_date():
    text = readme_table.README.read_text()
    assert text == readme_table.written(text, results.RESULTS), "run python -m perf.readme_table"
