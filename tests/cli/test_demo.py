"""The demo: what it refuses, and that it says yes to the real attention and no to a slightly wrong one."""

import sys
from dataclasses import replace

import pytest
import torch

import tritonattn
from tritonattn.cli.demo import demo


@pytest.fixture
def tiny(monkeypatch):
    """A model of one block that trains in a second, with nothing compiled beside it."""
    for name in ("ON_CPU", "ON_GPU"):
        setup = getattr(demo, name)
        monkeypatch.setattr(demo, name, replace(setup, blocks=1, width=32, heads=2, context=32, batch=1, steps=3))
    monkeypatch.setattr(demo, "start_compiling", lambda: None)


@pytest.mark.parametrize("content, message", [
    (None, r"text: expected a file that can be read, got '.*novel.txt' \(No such file or directory\)"),
    (b"", r"text: expected at least 66 characters, the context and 2, got 0 in '.*novel.txt'"),
    (b"x" * 65, r"text: expected at least 66 characters, the context and 2, got 65 in '.*novel.txt'"),
    ("ü".encode() * 40, r"text: expected at least 66 characters, the context and 2, got 40 in '.*novel.txt'"),
    (b"x" * 70 + b"\xff" + b"x" * 70, r"text: expected UTF-8, got byte 0xff at position 70 of '.*novel.txt'"),
])
def test_refuses_a_text_it_cannot_use(tmp_path, content, message):
    path = tmp_path / "novel.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(demo.InputError, match=f"^{message}$"):
        demo.read_text(str(path), 66)


def test_refuses_a_directory(tmp_path):
    with pytest.raises(demo.InputError, match=r"^text: expected a file that can be read, got "):
        demo.read_text(str(tmp_path), 66)


def test_takes_a_text_just_long_enough(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("ü" * 66, encoding="utf-8")
    assert demo.read_text(str(path), 66) == "ü" * 66


@pytest.mark.parametrize("arguments, message", [
    ({"steps": 1}, "^steps: expected at least 2, for a curve, got 1$"),
    ({"out": "."}, r"^out: expected a file in a folder that can be written to, got '\.'$"),
    ({"out": "no/such/folder/demo.png"}, "^out: expected a file in a folder that can be written to, got 'no/"),
    ({"text": "no such file"}, "^text: expected a file that can be read, got 'no such file'"),
])
def test_refuses_before_it_works(tiny, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(demo.InputError, match=message):
        demo.run(**arguments)


def test_says_that_matplotlib_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(demo.InputError, match=r"^matplotlib: expected it installed"):
        demo.new_figure(str(tmp_path / "demo.png"))


def test_the_text_that_comes_with_python_is_long_and_real():
    text = demo.read_text(None, 66)
    assert len(text) > 100_000 and "statement" in text


def test_characters_are_numbered_from_0():
    numbers, characters = demo.encode("abca\u4e2d\U0001f600a")
    assert numbers.tolist() == [0, 1, 2, 0, 3, 4, 0] and characters == 5


def test_batches_follow_from_the_seed():
    setup, numbers = replace(demo.ON_CPU, context=5, batch=3), torch.arange(7)
    first, again, other = (next(demo.batches(numbers, setup, seed)) for seed in (0, 0, 1))
    assert first.shape == (3, 6) and torch.equal(first, again) and not torch.equal(first, other)
    # with two characters more than the context there are two places to start
    assert {text.tolist()[0] for _, batch in zip(range(20), demo.batches(numbers, setup, 0)) for text in batch} == {0, 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_and_draws(tiny, monkeypatch, tmp_path, capsys, dtype):
    for name in ("ON_CPU", "ON_GPU"):
        monkeypatch.setattr(demo, name, replace(getattr(demo, name), dtype=dtype))
    picture = tmp_path / "curves.png"
    code = demo.run(out=str(picture))
    said = capsys.readouterr().out
    assert code == 0, said
    assert "everything agrees" in said
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and picture.stat().st_size > 10_000


def test_a_slightly_wrong_attention_does_not_agree(tiny, monkeypatch, tmp_path, capsys):
    right = tritonattn.scaled_dot_product_attention
    monkeypatch.setattr(demo, "ON_GPU", replace(demo.ON_GPU, dtype=torch.float32))
    monkeypatch.setattr(demo, "scaled_dot_product_attention", lambda *qkv, **options: 1.01 * right(*qkv, **options))
    assert demo.run(out=str(tmp_path / "demo.png")) == 1
    said = capsys.readouterr().out
    for what in ("output", "dq", "dk", "dv", "model's logits", "model's gradients"):
        assert f"\n{what} (float32): expected an error of at most" in said
    assert "everything agrees" not in said


def test_names_every_fault():
    losses = {"torch": torch.tensor([2.0, 1.0]), "tritonattn": torch.tensor([torch.nan, 1.1])}
    measured = {"dq": [1.0, 4.0], "dk": [1.0, 4.1], "dv": [1.0, torch.nan]}
    found = demo.faults(losses, measured, replace(demo.ON_CPU, tolerance=0.01))
    assert [fault.split(":")[0] for fault in found] == ["dk", "dv", "losses of tritonattn", "last losses"]


def test_times_the_steps_after_the_warm_up(monkeypatch):
    class Mark(int):
        def elapsed_time(self, later):
            return later - self

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    durations = [100] * demo.WARM_UP + [3, 5, 70]
    marks = [Mark(at) for duration in durations for at in (0, duration)]
    assert demo.milliseconds(marks) == 5
    assert demo.milliseconds(marks[:2]) == 100


def test_compiles_for_a_gpu_that_is_not_here(capsys):
    assert demo.finish_compiling(demo.start_compiling(("sm_90",)))
    header, *rows = capsys.readouterr().out.strip().splitlines()
    assert "registers" in header and "loop spills" in header
    assert len(rows) == 6 and all(row.startswith("H200, sm_90") for row in rows)


def test_shows_why_compiling_failed(capsys):
    assert not demo.finish_compiling(demo.start_compiling(("sm_1",)))
    assert "compiling ended with exit code 1:" in (said := capsys.readouterr().out) and "KeyError: 'sm_1'" in said
