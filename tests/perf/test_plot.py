"""perf.plot draws the recorded points and the ceilings. These tests read the data of the figure, not its pixels."""

import pytest

from perf import limits, plot, results
from tests.perf.recorded import bad, entry, grid_entry, ok, rates, write
from tritonattn import gpu

H200 = gpu.named("h200")


@pytest.fixture
def run(tmp_path):
    """Two panels: one complete, one where ours is wrong or missing; and a job outside the papers' grid."""
    write(tmp_path, rates(600, 400, n=4096), rates(200, 400, n=1024), rates(300, 400, n=16384, throttled=True),
          grid_entry(128, "full", 1024, tritonattn=bad("wrong"), cudnn=ok(4e-4)),
          grid_entry(128, "full", 4096, cudnn=ok(2e-3), xformers=bad("missing")),
          entry(plot.cases.MODELS[0], suite="models", tritonattn=ok(2.0), torch=ok(1.0)))
    return results.load(tmp_path)[0]


def axes_of(figure, title):
    return next(axes for axes in figure.axes if axes.get_title() == title)


def line(axes, label):
    """(x, y) of a line of the figure."""
    [found] = [line for line in axes.lines if line.get_label() == label]
    return list(zip(found.get_xdata(), found.get_ydata()))


def test_jobs_on_the_grid_are_those_timed_by_length(run):
    jobs = plot.grid_jobs(run.jobs)
    assert [(job.problem.d, job.problem.n_q) for job in jobs] == [(64, 1024), (128, 1024), (64, 4096), (128, 4096), (64, 16384)]
    assert [list(job.timed) for job in jobs if job.problem.d == 128] == [["cudnn"]] * 2


def test_figure_shows_points_ceilings_and_provenance(run):
    figure = plot.roofline(plot.summary(run, H200), plot.grid_jobs(run.jobs), H200)
    axes = axes_of(figure, "forward, full, head size 64")
    assert line(axes, "tritonattn") == [(1024, pytest.approx(200)), (4096, pytest.approx(600)), (16384, pytest.approx(300))]
    [hollow] = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert list(hollow.get_xdata()) == [16384]
    bars = axes.collections[0].get_segments()
    assert bars[1].tolist() == [[4096, pytest.approx(600 / 1.1)], [4096, pytest.approx(600 / 0.9)]]
    floor = limits.floor(run.jobs[0].problem, "forward", H200)
    assert dict(line(axes, "ceiling: all units overlapped"))[4096] == floor.tflops
    assert dict(line(axes, "ceiling: products, then exponentials"))[4096] == floor.serial_tflops
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["tritonattn", "cudnn"] and len(labels) == 4
    title = figure.get_suptitle()
    assert title.startswith("NVIDIA H200, bfloat16: tritonattn reaches 20% to 61% of the ceiling\ndriver 570.124")
    assert "2026-11-21, commit 0123456789ab-dirty" in title


@pytest.mark.parametrize("environment", [{"gpu": "NVIDIA Future"}, {"gpu": "NVIDIA H200 MIG 1g.18gb"}, {"sms": 16}], ids=str)
def test_gpu_with_unknown_limits_has_no_ceilings(tmp_path, environment):
    write(tmp_path, rates(400, 500), **environment)
    [run] = results.load(tmp_path)
    assert plot.known_gpu(run) is None and "no ceilings" in plot.summary(run, None)
    figure = plot.roofline("", plot.grid_jobs(run.jobs), None)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"tritonattn", "cudnn"}


def test_command_saves_a_figure_for_each_run_on_the_grid(run, tmp_path, capsys):
    write(tmp_path, entry(plot.cases.MODELS[0], suite="models", tritonattn=ok(2.0)), name="models-0")
    assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    [path] = (tmp_path / "out").rglob("*.*")
    assert path.relative_to(tmp_path / "out").as_posix() == "nvidia-h200/paper-0-roofline.png" and path.stat().st_size > 10000
    assert capsys.readouterr().out == f"{path}\n"


def test_command_without_results_says_so(tmp_path, capsys):
    assert plot.main(["--results", str(tmp_path)]) == 0 and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == f"{tmp_path}: no run of the papers' grid is recorded\n"


def test_broken_results_are_an_error(run, tmp_path, capsys):
    run.path.write_text("no JSON\n")
    assert plot.main(["--results", str(tmp_path)]) == 2 and "JSON" in capsys.readouterr().err
