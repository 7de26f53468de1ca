"""The demo: input errors, agreement of the real attention, and disagreement of a slightly wrong one."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import tritonattn
from tritonattn.cli import demo
from tritonattn.cli.format import CommandError

pytestmark = pytest.mark.usefixtures("patch_off")


@pytest.fixture
def tiny(monkeypatch):
    """A model of one layer that trains in a second, without a process that compiles."""
    for name in ("ON_CPU", "ON_GPU"):
        setup = getattr(demo, name)
        monkeypatch.setattr(demo, name, replace(setup, layers=1, width=32, heads=2, context=32, batch=1, steps=3))
    monkeypatch.setattr(demo, "start_compiling", lambda: None)


@pytest.mark.parametrize("arguments, message", [
    ({"steps": 1}, "^steps: expected at least 2, for a curve, got 1$"),
    ({"out": "."}, r"^out: expected a file in a folder that can be written to, got '\.'$"),
    ({"out": "no/such/folder/demo.png"}, "^out: expected a file in a folder that can be written to, got 'no/"),
])
def test_arguments_are_checked_before_the_work(tiny, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("training has started"))
    with pytest.raises(CommandError, match=message):
        demo.run(**arguments)


def test_missing_matplotlib_names_the_extra(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("training has started"))
    with pytest.raises(CommandError, match=r"^matplotlib is not installed; fix: pip install 'tritonattn\[demo\]'$"):
        demo.run()


def test_batches_depend_on_the_seed_alone():
    setup, numbers = replace(demo.ON_CPU, context=5, batch=3), torch.arange(7)
    first, again, other = (next(demo.batches(numbers, setup, seed)) for seed in (0, 0, 1))
    assert first.shape == (3, 6) and torch.equal(first, again) and not torch.equal(first, other)
    # two characters more than the context leave two starts
    assert {text.tolist()[0] for _, batch in zip(range(20), demo.batches(numbers, setup, 0)) for text in batch} == {0, 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_agree_and_are_drawn(tiny, monkeypatch, tmp_path, capsys, dtype):
    for name in ("ON_CPU", "ON_GPU"):
        monkeypatch.setattr(demo, name, replace(getattr(demo, name), dtype=dtype))
    picture = tmp_path / "curves.png"
    code = demo.run(out=str(picture))
    output = capsys.readouterr().out
    assert code == 0, output
    # three steps and the comparison
    assert "everything agrees" in output and "4 handled by tritonattn, 0 by torch" in output
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and picture.stat().st_size > 10_000


def test_error_of_one_percent_is_reported(tiny, monkeypatch, tmp_path, capsys):
    def wrong(*qkv, **options):
        return 1.01 * tritonattn.scaled_dot_product_attention(*qkv, **options)

    monkeypatch.setattr(demo, "ON_GPU", replace(demo.ON_GPU, dtype=torch.float32))
    monkeypatch.setattr(demo, "swapped", lambda: mock.patch.object(F, "scaled_dot_product_attention", wrong))
    assert demo.run(out=str(tmp_path / "demo.png")) == 1
    output = capsys.readouterr().out
    for name in ("logits", "gradient of character.weight", "gradient of self_attn.in_proj_weight"):
        assert f"\n{name}: expected an error of at most" in output
    assert "everything agrees" not in output


def test_every_error_beyond_its_tolerance_is_reported(monkeypatch):
    monkeypatch.setattr(demo, "fallback_report", lambda: SimpleNamespace(fallbacks={"a reason": 1}))
    losses = {"torch": torch.tensor([2.0, 1.0]), "tritonattn": torch.tensor([torch.nan, 1.1])}
    errors = {"dq": (1.0, 4.0, 4.0), "dk": (1.0, 4.1, 4.0), "dv": (1.0, torch.nan, 4.0)}
    lines = demo.problems(losses, errors, replace(demo.ON_CPU, tolerance=0.01))
    assert [line.split(":")[0] for line in lines] == ["dk", "dv", "last losses", "attention"]


@pytest.mark.slow
def test_kernels_are_compiled_for_other_gpus(capsys):
    assert demo.finish_compiling(demo.start_compiling("sm_90")) == []
    output = capsys.readouterr().out
    assert "regs" in output and output.count("\nH200, sm_90") == 4


def test_failed_compilation_is_reported(capsys):
    assert demo.finish_compiling(demo.start_compiling("sm_1")) == ["kernels: expected all of them to compile, got an error"]
    assert "sm_1" in capsys.readouterr().out
