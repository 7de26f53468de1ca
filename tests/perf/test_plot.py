"""perf.plot: the figures show the numbers that were recorded, say what is lacking, and come out the same every time."""

import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.lines import Line2D

from perf import baselines, cases, limits, plot
from perf import results as record
from tests.helpers.legible import assert_legible, boxes, texts
from tests.perf.test_readme_table import at, bad, job, of_grid, ok, write
from tritonattn import gpu
from tritonattn.measure import drawing

H200 = gpu.named("h200")


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def recorded(folder, *entries, **environment):
    """The run that a file of these entries is."""
    write(folder, *entries, **environment)
    (run,) = record.load(folder)
    return run


def headline(figure):
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def panel(figure, title):
    """The axes whose panel has this head size for a title; the upper one."""
    return next(axes for axes in figure.axes if axes.get_title() == title)


def markers(axes, style, hollow):
    """(x, y) of the points in a contender's style."""
    return [point for line in axes.lines if line.get_marker() == style.marker and line.get_color() == style.color
            and (line.get_markerfacecolor() == "white") == hollow for point in zip(line.get_xdata(), line.get_ydata())]


@pytest.fixture
def run(results):
    """A grid with a win, a loss, a throttled point, and every way in which a comparison can be lacking."""
    return recorded(
        results, at(600, 400, n=1024), at(200, 400, n=4096), at(300, 400, n=16384, throttled=True),
        of_grid(128, "full", 1024, tritonattn=bad("wrong"), cudnn=ok(4e-4), flash=ok(5e-4)),
        of_grid(128, "full", 4096, tritonattn=ok(2e-3), tritonattn_plain_grad=ok(1e-3), cudnn=bad("failed")),
        of_grid(128, "full", 16384, cudnn=ok(4e-3), xformers=bad("missing"), a_stranger=ok(5e-3)))


def test_the_grid_of_ratios(run):
    (shown,) = plot.maps(run.jobs)
    assert shown.rows == ["forward, size 64, full", "forward, size 128, full"] and shown.columns == ["1k", "4k", "16k"]
    assert [plot.label(cell) for cell in shown.cells[0]] == [("1.50", "cudnn"), ("0.50", "cudnn"), ("0.75†", "cudnn")]
    assert [plot.lacking(cell) for cell in shown.cells[1]] == ["ours: wrong", "no rival", "ours: not run"]


def test_a_cell_that_was_not_measured_says_so(results):
    run = recorded(results, at(400, 500, n=1024), at(400, 500, d=128, n=4096))
    assert plot.maps(run.jobs)[0].cells[0][1] == "not measured"
    assert texts(plot.ratios(run)).count("not measured") == 2


def test_other_cases_have_a_row_each_and_directions_nobody_asked_for_stay_empty(results):
    prefill, training = cases.MODELS[:2]
    run = recorded(results, *(job(case, direction, suite="models", tritonattn=ok(2.0), torch=ok(1.0))
                              for case, direction in ((prefill, "forward"), (training, "forward"), (training, "both"))))
    (shown,) = plot.maps(run.jobs)
    assert shown.rows == [prefill.name, training.name] and shown.columns == ["forward", "both"]
    assert shown.cells[0][1] is None and shown.cells[1][1].direction == "both"
    assert texts(plot.ratios(run)).count("0.50") == 3 and "not measured" not in texts(plot.ratios(run))


def test_an_interrupted_suite_shows_what_is_missing(results):
    run = recorded(results, job(cases.MODELS[1], "forward", suite="models", tritonattn=ok(2.0), torch=ok(1.0)),
                   job(cases.MODELS[3], "both", suite="models", tritonattn=ok(2.0), torch=ok(1.0)))
    assert plot.maps(run.jobs)[0].cells == [[run.jobs[0], "not measured"], ["not measured", run.jobs[1]]]


def test_many_cases_are_shown_side_by_side(results):
    run = recorded(results, *(job(case, suite="decode", tritonattn=ok(2.0), torch=ok(1.0)) for case in cases.DECODE))
    shown = plot.maps(run.jobs)
    assert [len(part.rows) for part in shown] == [16, 16, 16]
    assert [name for part in shown for name in part.rows] == [case.name for case in cases.DECODE]


def test_a_short_run_is_a_grid_and_cases(results):
    run = recorded(results, at(400, 500), job(cases.SHORT[-1], suite="short", tritonattn=ok(2.0), torch=ok(1.0)))
    assert [part.title for part in plot.maps(run.jobs)] == ["sequence length", "direction"]
    assert {"forward, size 64, full", cases.SHORT[-1].name} <= set(texts(plot.ratios(run)))


def test_ratios_are_drawn_with_their_rivals_and_reasons(run):
    found = texts(plot.ratios(run))
    for text in ("1.50", "0.50", "0.75†", "ours: wrong", "no rival", "ours: not run", "1k", "16k"):
        assert found.count(text) == 1, text
    assert found.count("cudnn") == 3


def test_ratios_say_what_they_come_to_and_where_they_come_from(run):
    said = headline(plot.ratios(run))
    assert said.startswith("tritonattn is faster in 1 of 3 cells; median 0.75 of the best rival NVIDIA H200")
    for text in ("bfloat16", "2026-11-21", "commit 0123456789ab-dirty", "no comparison, in 3 of 6.", "†: throttled"):
        assert text in said


def test_a_run_with_nothing_to_compare_says_so(results):
    run = recorded(results, of_grid(64, "full", 1024, tritonattn=bad("wrong"), cudnn=ok(1.0)))
    assert headline(plot.ratios(run)).startswith("no comparison in any of 1 cells")
    assert headline(plot.roofline(run)).startswith("tritonattn and its rivals")


def test_luminance_tells_wins_from_losses():
    def luminance(color):
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    values = [1e-3, 0.1, 0.5, 0.9, 0.999, 1.0, 1.001, 1.1, 2.0, 10.0, 1e3]
    faces = {value: luminance(plot.shade(value)[0]) for value in values}
    assert min(faces[value] for value in values if value > 1) > 3 * max(faces[value] for value in values if value <= 1)
    for value in values:
        _, ink = plot.shade(value)
        dark, light = sorted((faces[value], luminance(ink)))
        assert ink == ("black" if value > 1 else "white")
        # the contrast that the W3C asks of small text
        assert (light + 0.05) / (dark + 0.05) >= 4.5, value


def test_no_two_contenders_look_alike_without_color():
    everyone = [*plot.STYLES.values(), *plot.SPARE]
    looks = [(style.marker, style.line) for style in everyone]
    assert len(set(looks)) == len(looks)
    assert all(style.marker in Line2D.filled_markers for style in everyone), "hollow would look the same"
    assert len({dashes for _, dashes in plot.CEILINGS.values()}) == len(plot.CEILINGS)


def test_every_contender_there_is_has_its_own_look():
    assert set(baselines.everyone("cpu")) <= set(plot.STYLES)


def test_strangers_get_a_look_and_the_known_keep_theirs():
    found = plot.styles(["zeta", "cudnn", "alpha", "tritonattn", "beta"])
    assert list(found) == ["tritonattn", "cudnn", "alpha", "beta", "zeta"]
    assert found["cudnn"] == plot.STYLES["cudnn"] and len({(style.marker, style.line) for style in found.values()}) == 5


def test_a_curve_is_in_tflops_with_its_quantiles(run):
    jobs = [entry for entry in run.jobs if entry.problem.d == 64]
    ours = plot.curve(reversed(jobs), "tritonattn")
    assert [point.n for point in ours] == [1024, 4096, 16384]
    assert [point.tflops for point in ours] == pytest.approx([600, 200, 300])
    assert [point.low for point in ours] == pytest.approx([600 / 1.1, 200 / 1.1, 300 / 1.1])
    assert [point.high for point in ours] == pytest.approx([600 / 0.9, 200 / 0.9, 300 / 0.9])
    assert [point.throttled for point in ours] == [False, False, True]
    assert all(math.isnan(point.tflops) for point in plot.curve(jobs, "nobody"))


def test_points_are_drawn_where_they_were_measured(run):
    axes, style = panel(plot.roofline(run), "head size 64"), plot.STYLES["tritonattn"]
    assert np.allclose(markers(axes, style, hollow=False), [(1024, 600), (4096, 200)])
    assert np.allclose(markers(axes, style, hollow=True), [(16384, 300)])
    bars = [segment for bars in axes.collections if tuple(bars.get_color()[0][:3]) == to_rgb(style.color)
            for segment in bars.get_segments()]
    assert np.allclose(bars[0], [(1024, 600 / 1.1), (1024, 600 / 0.9)])


def test_a_line_breaks_where_ours_was_wrong_and_the_reason_stands_there(run):
    figure = plot.roofline(run)
    axes, style = panel(figure, "head size 128"), plot.STYLES["tritonattn"]
    line = next(line for line in axes.lines if line.get_color() == style.color and line.get_linestyle() == "-")
    assert np.isnan(line.get_ydata()).tolist() == [True, False, True]
    reasons = {text.get_text(): text.get_position()[0] for text in axes.texts if "ours" in text.get_text()}
    assert reasons == {"ours:\nwrong": 1024, "ours:\nnot run": 16384}


def test_the_legend_has_every_contender_and_why_one_has_no_point(run):
    (legend,) = plot.roofline(run).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["tritonattn", "tritonattn-plain-grad", "cudnn", "flash", "xformers: missing", "a-stranger",
                      "20% to 80% of samples", "hollow: throttled"]
    # dashes are scaled by the width of the line, so what was asked for is compared
    handles = legend.legend_handles[:6]
    assert len({(handle.get_marker(), handle._unscaled_dash_pattern) for handle in handles}) == 6


def test_ceilings_are_the_floors(run):
    problem = run.jobs[0].problem
    found = plot.ceilings(problem, "forward", [1024], H200)
    floor = limits.floor(problem, "forward", H200)
    for unit in plot.CEILINGS:
        assert found[unit] == pytest.approx([problem.flops() / getattr(floor, unit) / 1e12])
    assert found["tensor"] == pytest.approx([989.4], rel=1e-3)


def test_ceilings_are_drawn_and_named(run):
    figure = plot.roofline(run)
    axes = panel(figure, "head size 128")
    heights = {round(line.get_ydata()[-1]) for line in axes.lines if line.get_color() == plot.GREY}
    assert {989, 660} <= heights
    found = [text.get_text() for text in axes.texts]
    assert {"tensor cores 989", "tensor + special 660", "above: special-function units 1979, memory 2448+"} <= set(found)
    assert "special-function units 989" in [text.get_text() for text in panel(figure, "head size 64").texts]


def test_the_roofline_says_how_near_it_comes(results):
    run = recorded(results, *(at(989.4 * share, 500, n=n) for share, n in ((0.25, 1024), (0.5, 4096), (0.75, 16384))))
    said = headline(plot.roofline(run))
    assert said.startswith("tritonattn reaches 25% to 75% of what the hardware allows; median 50% NVIDIA H200")
    for text in ("bfloat16", "2026-11-21", "commit 0123456789ab-dirty"):
        assert text in said


@pytest.mark.parametrize("environment", [{"gpu": "NVIDIA Future"}, {"gpu": "NVIDIA H200 MIG 1g.18gb"}, {"sms": 16}], ids=str)
def test_no_ceilings_for_a_gpu_whose_limits_are_not_known(results, environment):
    figure = plot.roofline(recorded(results, at(400, 500), at(400, 500, n=4096), **environment))
    assert "No ceilings: this GPU's limits are not known here" in headline(figure)
    assert not [text for text in texts(figure) if "tensor cores" in text]


def test_float32_has_no_ceiling_of_tensor_cores(results):
    entries = [job(case, tritonattn=ok(1.0), torch=ok(1.0)) for case in cases.suite("paper", torch.float32)[:2]]
    found = texts(plot.roofline(recorded(results, *entries)))
    assert any(text.startswith("fp32 units") for text in found) and not any("tensor cores" in text for text in found)


def test_a_grid_of_one_length_can_be_drawn(results):
    figure = plot.roofline(recorded(results, at(400, 500)))
    assert "tensor cores 989" in texts(figure)


def test_the_axes_have_units(run):
    found = texts(plot.roofline(run))
    assert found.count("sequence length (tokens)") == 2 and "forward, full\nTFLOP/s" in found


def draw(*arguments):
    """Run the command, which succeeds."""
    assert plot.main([*map(str, arguments)]) == 0


def test_files_have_a_picture_and_a_text_in_them(run, results, tmp_path, capsys):
    draw("--results", results, "--out", tmp_path / "out")
    folder = tmp_path / "out" / "nvidia-h200"
    names = [f"paper-0-{figure}.{kind}" for figure in ("ratio", "roofline") for kind in ("png", "svg")]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert capsys.readouterr().out.split() == [str(folder / name) for name in (*names[2:], *names[:2])]
    for name in names[::2]:
        pixels = imread(folder / name)
        assert pixels[..., :3].std() > 0.05 and min(pixels.shape[:2]) > 400
    labels = {"ratio": ("1.50", "0.75†", "cudnn", "ours: wrong", "forward, size 64, full"),
              "roofline": ("tritonattn-plain-grad", "tensor cores 989", "sequence length (tokens)", "hollow: throttled")}
    for figure, expected in labels.items():
        text = (folder / f"paper-0-{figure}.svg").read_text()
        assert all(f">{label}<" in text for label in expected)


def test_figures_lie_beside_their_results(run, results):
    draw("--results", results)
    assert sorted(path.suffix for path in run.path.parent.iterdir()) == [".jsonl", ".png", ".png", ".svg", ".svg"]


def test_a_suite_off_the_grid_has_no_roofline(results, tmp_path):
    write(results, job(cases.MODELS[0], suite="models", tritonattn=ok(2.0), torch=ok(1.0)), name="models-0")
    draw("--results", results, "--out", tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out").rglob("*.*")} == {"models-0-ratio"}


def test_the_same_to_the_byte(run, results, tmp_path):
    """In another process, with other hashes, and with a user's settings in the way; and pyplot is never touched."""
    code = ("import sys; from perf import plot; [plot.main(['--out', sys.argv[2], '--results', folder]) for folder in "
            "(sys.argv[1], sys.argv[2])]; assert 'matplotlib.pyplot' not in sys.modules")
    there, here = tmp_path / "there", tmp_path / "here"
    subprocess.run([sys.executable, "-c", code, str(results), str(there)], check=True, cwd=Path(plot.__file__).parents[1],
                   env=os.environ | {"PYTHONHASHSEED": "12345"}, stdout=subprocess.DEVNULL)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "xtick.labelsize": 20, "svg.fonttype": "path"}):
        draw("--results", results, "--out", here)
        draw("--results", here, "--out", here)
    names = sorted(path.relative_to(here) for path in here.rglob("*.*"))
    assert len(names) == 6 and names == sorted(path.relative_to(there) for path in there.rglob("*.*"))
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name


def test_with_nothing_recorded_nobody_can_take_it_for_a_measurement(tmp_path, capsys):
    draw("--results", tmp_path / "none", "--out", tmp_path)
    assert f"nothing is recorded in {tmp_path / 'none'}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"published-h200.png", "published-h200.svg"}
    assert imread(tmp_path / "published-h200.png")[..., :3].std() > 0.05
    text = (tmp_path / "published-h200.svg").read_text()
    assert "No measurement of tritonattn yet; points are published by others on H100" in text


def test_a_run_without_a_job_is_nothing_recorded(results, tmp_path, capsys):
    write(results)
    draw("--results", results, "--out", tmp_path / "out")
    assert "nothing is recorded" in capsys.readouterr().out


def test_published_points_are_those_on_file_and_none_is_ours():
    figure = plot.published(H200)
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert {"FA2", "FA3", "cuDNN 9", "Triton tutorial"} < set(labels) and not any("tritonattn" in label for label in labels)
    rows = [row for row in limits.published() if row.gpu in ("H100", "H200") and row.mask == "full" and row.d == 256
            and row.direction == "forward" and 512 <= row.n <= 16384]
    axes = panel(figure, "head size 256")
    points = [(x, y) for line in axes.lines if line.get_linestyle() == "None"
              for x, y in zip(line.get_xdata(), line.get_ydata())]
    assert sorted(points) == sorted((row.n, row.tflops) for row in rows) and rows
    assert texts(figure).count("nothing published on file") == 3


def test_a_gpu_that_nobody_has_published_for_shows_ceilings_only():
    figure = plot.published(gpu.named("a100"))
    assert headline(figure).startswith("No measurement of tritonattn yet; ceilings only")
    assert "tensor cores 312" in texts(figure)


@pytest.mark.parametrize("name", ["h200", "a100", "mi300x", "rtx 5090"])
def test_ceilings_are_legible(name):
    assert_legible(plot.published(gpu.named(name)))


def test_measurements_are_legible(run):
    assert_legible(plot.roofline(run))
    assert_legible(plot.ratios(run))


def test_long_names_are_legible(results):
    long = cases.MODELS[0]._replace(name="x" * 60)
    assert_legible(plot.ratios(recorded(results, job(long, suite="models", tritonattn=ok(2.0), torch=ok(1.0)), gpu="G " * 60)))


def test_a_long_headline_is_broken(run):
    figure = plot.ratios(run)
    while figure.texts:
        figure.texts[0].remove()
    title, below = f"{plot.finding(run.jobs)}, " * 4, [f"{plot.EXPLAINED} " * 5, plot.provenance(run) * 3]
    drawing.headline(figure, title, below, *plot.SIZES)
    assert_legible(figure)
    assert min(box.y0 for text, box in boxes(figure).items() if text in figure.texts) > figure.axes[0].get_tightbbox().y1


def test_broken_results_and_unknown_gpus_are_refused(results, tmp_path, capsys):
    write(results, at(400, 500)).write_text("no JSON\n")
    assert plot.main(["--results", str(results), "--out", str(tmp_path / "out")]) == 2
    assert "expected JSON" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        plot.main(["--gpu", "voodoo2"])
    assert "expected a GPU out of" in capsys.readouterr().err
