"""Notebooks: they run from top to bottom, their numbers are right, and their exercises accept only right answers."""

import ast
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import traceback

import pytest
import torch

import tritonattn
from notebooks import course, exercises, run
from perf import results
from tests.helpers import corpus
from tritonattn.autotune import trials

PATHS = [run.FOLDER / f"{name}.ipynb" for name in run.NAMES]
TIGHT, LOOSE = 1e-12, 1e-5  # float64, float32
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)

# solutions of the exercises, as a reader would write them into the cells
SOLUTIONS = {
    "1.1": "answer = 4 * 512 * 512",
    "1.2": "def answer(x, heads):\n    return x.view(x.shape[0], heads, -1).permute(1, 0, 2)",
    "1.3": "def answer(n):\n"
           "    distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]\n"
           "    return torch.where((distance == 0) | (distance == 1), 0.0, -torch.inf)",
    "2.1": "def answer(first, second):\n"
           "    m = torch.maximum(first[0], second[0])\n"
           "    a, b = torch.exp2(first[0] - m), torch.exp2(second[0] - m)\n"
           "    return m, a * first[1] + b * second[1], a[:, None] * first[2] + b[:, None] * second[2]",
    "2.2": "answer = (32 * 4, sum(4 * i for i in range(32)))",
    "2.3": "answer = 127",
    "3.1": "def answer(p, dp):\n    return p * (dp - (p * dp).sum(1, keepdim=True))",
    "3.2": "answer = 8192 * 16 * (2 * 128 + 2 * 128 + 8)",
    "3.3": "def answer(q, k):\n    return tritonattn.attention(q, k, k) / math.sqrt(q.shape[-1])",
    "4.1": "answer = 128",
    "4.2": "answer = 128",
    "4.3": "def answer(samples, baseline):\n    return statistics.median(a / b for a, b in zip(samples, baseline))",
}
# run the notebook in a new process, then its exercises again, each with the solution before its check
DRIVER = """
import contextlib, io, json, resource, sys
from notebooks import run
path, solutions, folders = json.load(sys.stdin)
with contextlib.redirect_stdout(io.StringIO()) as printed:
    namespace = run.execute(path)
usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
answered = {}
for cell in run.read(path)["cells"]:
    if "exercise" in cell["metadata"].get("tags", []):
        head, tail = "".join(cell["source"]).split("\\ncheck(")
        number = tail.split('"')[1]
        with contextlib.redirect_stdout(io.StringIO()) as message:
            run.run_cell(head + "\\n" + solutions[number] + "\\ncheck(" + tail, number, namespace)
        answered[number] = message.getvalue()
for folder in folders:
    run.save_pictures(namespace["SLIDES"], folder, "picture")
print(json.dumps({"key": namespace["KEY"], "printed": printed.getvalue(), "answered": answered,
                  "seconds": sum(each.ru_utime + each.ru_stime for each in usage)}))
"""


def executed(name, tmp_path):
    """Run a notebook, check its exercises, pictures and time, and return its KEY."""
    dropped = () if torch.cuda.is_available() else ("TRITON_INTERPRET",)  # the first cell has to set it
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | {"OMP_NUM_THREADS": "1"}
    first, second = tmp_path / "first", tmp_path / "second"
    request = json.dumps([str(run.FOLDER / f"{name}.ipynb"), SOLUTIONS, [str(first), str(second)]])
    done = subprocess.run([sys.executable, "-c", DRIVER], env=environment, input=request, capture_output=True, text=True,
                          cwd=run.FOLDER.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["printed"].count("not answered yet") == 3, "an exercise is shipped with an answer"
    assert list(result["answered"]) == [f"{name[0]}.{i}" for i in (1, 2, 3)]
    for number, message in result["answered"].items():
        assert message.startswith(f"Exercise {number}: right. "), message
    picture, = first.iterdir()
    assert picture.read_bytes() == (second / picture.name).read_bytes(), "the same figure gives a different file"
    assert result["seconds"] < 90, f"expected less than 90 s of processor time, got {result['seconds']:.0f}"
    return result["key"]


@pytest.mark.slow
def test_self_attention(tmp_path):
    key = executed("1_self_attention", tmp_path)
    assert key["reach"] == [14, 5 * 14 - 6, 14 * 14]
    for name in ("one_by_one", "definition", "fused", "multi_head", "map", "equivariance"):
        assert key[name] < LOOSE, name
    assert max(key["maps"]) < LOOSE and key["distance_alone"] < 1e-4
    assert min(key["order_matters"]) > 0.1, "with positions the order matters"
    without, *placed = key["saws"]
    assert without < 1e-6 and min(placed) > 0.01, "equal words have equal weights only without positions"
    assert key["learned"] == 3 * 16 * 16 and key["multi_head_learned"] == 4 * 64 * 64
    scores = [2.5, 1.5, 1.0, 0.3, 0.0, -0.5, -1.2, -2.5]
    sums = {"softmax": 1, "ReLU": sum(max(0, s) for s in scores), "sigmoid": sum(1 / (1 + math.exp(-s)) for s in scores)}
    for name, total in sums.items():
        weight, doubled, moved = key[name]
        assert weight == pytest.approx(total, rel=1e-5)
        assert doubled == pytest.approx(1 if name == "softmax" else 2, rel=1e-5)
        assert (moved < LOOSE) == (name == "softmax")
    most, bound = key["additive_bound"]
    assert 0.5 * bound < most <= bound
    assert key["rows_sum_to"] == pytest.approx([1, 1], abs=LOOSE)
    check_scaling(key)
    check_bytes(key["bytes"])


def check_scaling(key):
    for d, variance in key["variance"]["unscaled"].items():
        assert variance == pytest.approx(int(d), rel=0.15), f"variance of unscaled scores, d = {d}"
    for d, variance in key["variance"]["scaled"].items():
        assert variance == pytest.approx(1, rel=0.15), f"variance of scaled scores, d = {d}"
    assert key["gradient"]["unscaled"]["1024"] < 0.05 * key["gradient"]["scaled"]["1024"]
    assert key["gradient"]["scaled"]["1024"] == pytest.approx(key["gradient"]["scaled"]["16"], rel=0.2)


def check_bytes(peaks, d=64):
    """Plain attention holds scores and weights, 4 n^2 bytes each; the kernel o, lse and two statistics of each row."""
    for n, plain, fused in zip(map(int, peaks["plain"]), peaks["plain"].values(), peaks["fused"].values()):
        assert 8 * n * n <= plain < 8 * n * n + 64 * n * d, f"plain attention, n = {n}"
        assert 4 * n * (d + 3) <= fused <= 4 * n * (d + 3) + 1024, f"the kernel, n = {n}"


@pytest.mark.slow
def test_softmax_in_pieces(tmp_path):
    key = executed("2_softmax_in_pieces", tmp_path)
    assert max(*key["one_row"].values(), *key["base_two"], key["any_order"]) < TIGHT
    assert set(key["in_pieces"]) == {"ordinary", "spread out", "around 1000", "rising", "masked"}
    assert max(key["in_pieces"].values()) < TIGHT
    largest = {"float16": 65504.0, "float32": (2 - 2**-23) * 2.0**127, "float64": sys.float_info.max}
    for dtype, number in largest.items():
        assert key["largest_x"][dtype] == pytest.approx(math.log(number))
    # the largest of 64 random scores is between 2 and 3: in float32 e^x is inf above 88.7, and 0 below -103.3
    below, above = key["formula_is_nan"]
    assert 85 <= above <= 88 and -107 <= below <= -104
    assert key["with_maximum"] < 1e-6
    windows = {"full": (None, None, 0), "causal, top left": (None, 0, 0), "causal, bottom right": (None, 0, 16),
               "sliding, bottom right": (23, 0, 16)}
    assert key["tiles"] == {name: count_tiles(48, 64, *window, tile=8) for name, window in windows.items()}
    assert key["causal_64"] == {str(n): count_tiles(n, n, None, 0, 0, tile=64) for n in (512, 1024, 2048, 4096)}
    check_compiled(key)


def count_tiles(n_q, n_k, left, right, shift, tile):
    """Count the tiles in which all pairs attend, some, and none, by the definition of a window."""
    distance = torch.arange(n_k) - torch.arange(n_q)[:, None] - shift
    attends = torch.ones(n_q, n_k, dtype=torch.bool)
    attends &= True if left is None else distance >= -left
    attends &= True if right is None else distance <= right
    pairs = attends.view(n_q // tile, tile, n_k // tile, tile).sum((1, 3))
    unmasked, skipped = (pairs == tile * tile).sum().item(), (pairs == 0).sum().item()
    return {"unmasked": unmasked, "masked": pairs.numel() - unmasked - skipped, "skipped": skipped}


def check_compiled(key):
    assert key["masks"]["full"] == [0], "full attention has one loop, without a mask"
    for name in ("length 1000", "causal"):
        unmasked, masked = key["masks"][name]
        assert unmasked == 0 and masked > 0, name
    left, unmasked, right = key["masks"]["sliding"]
    assert unmasked == 0 and left > 0 and right > 0
    unmasked, masked = key["instructions"]["unmasked"], key["instructions"]["masked"]
    assert masked["select"] > unmasked["select"]
    assert masked["special"] == unmasked["special"] and masked["tensor"] == unmasked["tensor"]


@pytest.mark.slow
def test_the_backward_pass(tmp_path):
    key = executed("3_the_backward_pass", tmp_path)
    assert set(key["steps"]) == {"dV", "dP", "delta", "dS", "dQ", "dK"}
    assert max(key["steps"].values()) < TIGHT and key["rows_of_ds"] < TIGHT and key["owned_is_right"] < TIGHT
    assert key["shapes"] == {"dV": [12, 6], "dP": [10, 12], "delta": [10], "dS": [10, 12], "dQ": [10, 8], "dK": [12, 8]}
    assert set(key["finite"]) == {"full", "causal"} and max(map(max, key["finite"].values())) < 1e-7
    (best, _), (coarse, _) = key["best"]["float64"], key["best"]["float32"]
    assert best < 1e-9 and 5e-5 < coarse < 5e-4, "the title of the figure of step sizes"
    for n, kept in key["kept"]["kernel"].items():
        assert kept == 4 * int(n) * 66 and key["kept"]["plain"][n] == 4 * int(n) ** 2
    assert key["kept_16"] == {"True": 128 * (4 * 64 + 8), "False": 128 * (2 * 64 + 8)}
    peaks = key["backward_bytes"]
    assert peaks["results"] <= peaks["kernel"] < 4 * 512 ** 2 <= peaks["plain"]
    assert key["owners"] == {"dq": [i // 16 for i in range(48)], "dk": [j // 16 for j in range(64)],
                             "dv": [j // 16 for j in range(64)]}
    assert key["changed"] == 0 and key["again"] == 1 and key["orders"] > 10
    check_rounding(key["shifts"], key["dq_errors"])


def check_rounding(shifts, errors):
    """A shift leaves the exact dQ unchanged; the error of a rounded delta grows with its square. The README agrees."""
    assert shifts["same"] < 1e-11 and shifts["formula"] < 1e-9
    for dtype, factor in (("bfloat16", 1), ("float16", 8)):
        assert shifts[dtype][-1] / shifts[dtype][-3] == pytest.approx(16, rel=0.4)
        assert shifts[dtype][-1] * factor == pytest.approx(shifts["bfloat16"][-1], rel=0.2)
    line = re.compile(r"^(\S+) +(bfloat16|float16) +([\d.]+)% +([\d.]+)% +([\d.]+)%$", re.M)
    table = line.findall((run.FOLDER.parent / "README.md").read_text(encoding="utf-8"))
    assert len(table) == 10
    for family, dtype, *percentages in table:
        sides = [errors[dtype][family][side] for side in ("precise_grad=True", "precise_grad=False", "plain torch")]
        # the table has two digits after the point
        expected = pytest.approx([float(percentage) for percentage in percentages], rel=0.05, abs=0.006)
        assert [100 * error for error in sides] == expected, (family, dtype)


@pytest.mark.slow
def test_seeing_and_choosing(tmp_path):
    key = executed("4_seeing_and_choosing", tmp_path)
    # for each pair one exponential, at 16 a clock, and 4 d operations of products, at 2048, 4096 or 8192 a clock
    for name, tensor in (("A100", 2048), ("H200", 4096), ("B200", 8192), ("MI300X", 2048)):
        assert key["ratio"][name] == pytest.approx([tensor / (64 * d) for d in (32, 64, 128, 256)])
    assert key["points"] == 4 * 3 * 6
    assert key["ceilings"]["H200"]["64"] == pytest.approx([1, 1 / 2])
    assert key["ceilings"]["B200"]["64"] == pytest.approx([1 / 2, 1 / 3])
    compiled = key["compiled"]
    paths = {"A100": "HMMA", "H200": "HGMMA", "B200": "UTCHMMA", "MI300X": "v_mfma"}
    assert {name: compiled[f"{name} 128"]["path"] for name in paths} == paths
    assert [name for name in paths if compiled[f"{name} 128"]["tensor_memory"]] == ["B200"]
    redone = {name: compiled[f"{name} 128"]["redone"] for name in paths}
    assert redone.pop("MI300X") > 2 and max(redone.values()) < 1.1, "the statement about eight waves"
    wide, narrow = (compiled[f"H200 {d}"]["units"] for d in (128, 64))
    assert narrow["special"] > narrow["tensor"] and wide["special"] < wide["tensor"], "the statement about Hopper"
    check_tiles({name: kernel for name, kernel in compiled.items() if "x" in name}, key["spilling"])
    check_regret(key)
    assert key["recorded"] == sum(len(measured.jobs) for measured in results.load())


def check_tiles(tiles, spilling):
    """Larger tiles use more registers and memory, so fewer blocks fit; the largest tile spills and the smallest does not."""
    assert len(tiles) == 9 and "128x128" in spilling and "32x32" not in spilling
    for smaller, larger in (("32x32", "64x64"), ("64x64", "128x128")):
        for name in ("registers", "shared"):
            assert tiles[smaller][name] < tiles[larger][name], name
        assert tiles[smaller]["blocks"] > tiles[larger]["blocks"]
    assert all(kernel["blocks"] == min(kernel["resident"].values()) for kernel in tiles.values())


def check_regret(key):
    """The sweep is marked as synthetic, and more configs do not make a strategy worse by more than jitter."""
    folder = run.FOLDER / "data" / "synthetic_sweep"
    sweep = trials.read(folder)
    assert key["synthetic"] and sweep.synthetic and sweep.environment["gpu"] == "a made-up GPU"
    made_up = corpus.made_up([(job.kernel, job.problem.d, job.problem.mask) for job in sweep.jobs])
    assert [job.name for job in sweep.jobs] == [job.name for job in made_up.jobs]
    for strategy, regrets in key["regret"].items():
        values = list(regrets.values())
        assert all(regret >= 0 for regret in values) and values[0] > 0.02 and values[-1] < 0.01, strategy
        assert all(after <= before + 0.01 for before, after in itertools.pairwise(values)), strategy
    seconds = {strategy: time for strategy, (time, _, _) in key["seconds"].items()}
    assert seconds["static"] < seconds["halving"] < seconds["exhaustive"]


# wrong answers, with a pattern of the hint that they get
WRONG = [
    ("1.1", 3 * 512 * 512, "One more matrix mixes"), ("1.1", 4 * 512 * 64, "That is one head"), ("1.1", 7, "Got 7"),
    ("1.1", "many", "Got many"),
    ("1.2", lambda x, heads: x.reshape(heads, x.shape[0], -1), "head 0 holds parts of the first vectors only"),
    ("1.2", lambda x, heads: x.view(x.shape[0], heads, -1), r"Expected a tensor of shape \(4, 5, 6\)"),
    ("1.2", lambda x, heads: x.view(x.shape[0], heads, -1).permute(1, 0, 2).flip(0), "the first columns of every vector"),
    ("1.2", lambda x: x, "That raised TypeError"), ("1.2", 5, "That raised TypeError"),
    ("1.3", lambda n: torch.zeros(n), r"Expected a tensor of shape \(6, 6\)"),
    ("1.3", lambda n: torch.eye(n), "The weights of row . are"),
    ("1.3", lambda n: torch.zeros(n, n), "and should be"),
    ("2.1", lambda a, b: (torch.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2]), "l is the plain sum"),
    ("2.1", lambda a, b: (a[0] + b[0], a[1], a[2]), "m is not the largest"),
    ("2.1", lambda a, b: (torch.maximum(a[0], b[0]), a[1], a[2]), "m is right, l is not"),
    ("2.2", (1984, 128), "in the wrong order"), ("2.2", (32, 1984), "crosses more than one tile"),
    ("2.2", (128, 3968), "That is all tiles"), ("2.2", (1, 2), r"Got \(1, 2\)"), ("2.2", 128, "expected two numbers"),
    ("3.1", lambda p, dp: p * dp, "It also lowers all other weights"), ("3.1", lambda p, dp: p, "A row of dS sums to 0"),
    ("3.1", lambda p, dp: p * (dp - dp.mean(1, keepdim=True)), "an average weighted by P"),
    ("3.1", lambda p, dp: p * (dp - (p * dp).sum(0, keepdim=True)), "not for each key"),
    ("3.1", lambda p, dp: dp - (p * dp).sum(1, keepdim=True), "has to be multiplied by the weight"),
    ("3.1", lambda p, dp: p * ((p * dp).sum(1, keepdim=True) - dp), "The sign is wrong"),
    ("3.1", lambda p, dp: p[0], r"Expected a tensor of shape \(4, 6\)"), ("3.1", 3, "That raised TypeError"),
    ("3.2", 8192 * 16 * (2 * 128 + 8), "one more tensor is kept"), ("3.2", 8192 * 16 * 512, "Two more numbers"),
    ("3.2", 8192 * 16 * 516, "In float32"), ("3.2", 8192 * 520, "one head"), ("3.2", 8192 * 16 * 524, "Delta is computed"),
    ("3.2", 8192 * 16 * 1040, "two bytes"), ("3.2", 5, "Got 5"),
    ("3.3", lambda q, k: tritonattn.attention(q, k, k), "times the scale"), ("3.3", lambda q, k: q, "dS = P"),
    ("3.3", lambda q, k: k, r"Expected a tensor of shape \(1, 5, 16\)"),
    ("4.1", 168, "room for 3 warps, so the SM for 1 block"), ("4.1", 136, "so the SM for 1 block"),
    ("4.1", 96, "not the largest"),
    ("4.1", 256, "so the SM for 1 block"), ("4.1", "all", "That raised TypeError"),
    ("4.2", 64, "on H200"), ("4.2", 32, "on A100"), ("4.2", 256, "4 d in all"), ("4.2", 100, "Got 100"),
    ("4.3", lambda a, b: statistics.median(a) / statistics.median(b), "not as warm"),
    ("4.3", lambda a, b: statistics.fmean(x / y for x, y in zip(a, b)), "compared with itself, which is right"),
    ("4.3", lambda a, b: statistics.fmean(a) / statistics.fmean(b), "moves a mean"),
    ("4.3", lambda a, b: min(a) / min(b), "two best samples"), ("4.3", lambda a, b: 1.0, r"Got 1\.0, expected 0\.900"),
    ("4.3", lambda a, b: statistics.median(y / x for x, y in zip(a, b)), "the speedup"),
    ("2.3", 126, "reaches back 126 keys"), ("2.3", 128, "not the smallest"),
]


@pytest.mark.parametrize("number, answer, hint", WRONG)
def test_a_wrong_answer_gets_a_hint(capsys, number, answer, hint):
    exercises.check(number, answer)
    message = capsys.readouterr().out
    assert message.startswith(f"Exercise {number}: not yet. ") and re.search(hint, message), message


def test_a_half_right_merge_gets_a_hint(capsys):
    def answer(first, second):
        m = torch.maximum(first[0], second[0])
        a, b = torch.exp2(first[0] - m), torch.exp2(second[0] - m)
        return m, a * first[1] + b * second[1], first[2] + second[2]

    exercises.check("2.1", answer)
    assert "m and l are right, acc is not" in capsys.readouterr().out


@pytest.mark.parametrize("number", SOLUTIONS)
def test_a_missing_answer_is_reported(capsys, number):
    exercises.check(number, None)
    exercises.check(number, None if "def" not in SOLUTIONS[number] else lambda *arguments: None)
    assert capsys.readouterr().out == f"Exercise {number}: not answered yet.\n" * 2


@pytest.mark.interpreted
def test_window_bounds_agree_with_exercise_2_3():
    """left = 127 is the smallest with which tiles of 64 have an unmasked range, one tile long."""
    from tests.kernels.test_window import bounds_and_mask

    for left, tiles in ((126, 0), (127, 1)):
        bounds, _ = bounds_and_mask((left, 0), 640, 4096, 64, 64)
        assert bounds[2] - bounds[1] == 64 * tiles


def test_peak_memory_counts_only_the_call():
    """A block of an earlier measurement that is freed during a later one must not lower its peak."""
    blocks = []
    course.largest_bytes(lambda: blocks.append(torch.empty(133_120, dtype=torch.uint8)))

    def call():
        blocks.clear()
        torch.empty(1_000_000, dtype=torch.uint8)
        torch.empty(500_000, dtype=torch.uint8)

    assert course.largest_bytes(call) == 1_000_000


@each_notebook
def test_is_a_notebook_without_output(path):
    notebook = run.read(path)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["metadata"], dict)
        assert all(isinstance(line, str) for line in cell["source"]) and cell["source"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, f"{cell['id']}: clear its output"


@each_notebook
def test_links_exist(path):
    text = "\n".join("".join(cell["source"]) for cell in run.read(path)["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 4
    for link in links:
        assert link.startswith("https://") or (path.parent / link).is_file(), link


@each_notebook
def test_ends_with_three_exercises(path):
    cells = run.read(path)["cells"]
    tagged = [i for i, cell in enumerate(cells) if "exercise" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 3 and tagged[-1] == len(cells) - 1
    for i, at in enumerate(tagged, 1):
        source = "".join(cells[at]["source"])
        assert re.findall(r"^check\((.*)\)$", source, re.M) == [f'"{path.stem[0]}.{i}", answer']
        assert f"**{path.stem[0]}.{i}**" in "".join(cells[at - 1]["source"])


@each_notebook
def test_first_cell_sets_triton_interpret_before_any_import_of_triton(path):
    code = [ast.parse("".join(cell["source"])) for cell in run.read(path)["cells"] if cell["cell_type"] == "code"]
    assert 'os.environ["TRITON_INTERPRET"] = "1"' in ast.unparse(code[0]).replace("'", '"')
    helper = ast.parse((run.FOLDER / "course.py").read_text(encoding="utf-8"))
    at_import = [node for node in helper.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in [*ast.walk(code[0]), *at_import]:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"torch", "triton", "tritonattn", "matplotlib", "exercises"}, names


@each_notebook
def test_has_a_picture(path):
    picture = run.FOLDER / "pictures" / f"{path.stem}.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and picture.stat().st_size < 300_000


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Replace the notebooks by one of two cells, 7_small."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "NAMES", ["7_small"])
    sources = ["import matplotlib.pyplot as plt\na = 1",
               "def f():\n    return a / 0  # fails\nSLIDES = [plt.figure(), plt.figure()]"]
    cells = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "source": source} for i, source in enumerate(sources)]
    path = tmp_path / "7_small.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return path


def test_cells_share_a_namespace_and_tracebacks_show_their_lines(small):
    namespace = run.execute(small)
    with pytest.raises(ZeroDivisionError) as error:
        namespace["f"]()
    text = "".join(traceback.format_exception(error.value))
    assert 'File "<7_small, cell 1>", line 2' in text and "return a / 0  # fails" in text


def test_saves_pictures(small, tmp_path):
    assert run.main(["7_small", "--pictures"]) == 0
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["7_small-2.png", "7_small.png"]
    assert b"Software" not in pictures[0].read_bytes()


def test_rejects_an_unknown_notebook(small, capsys):
    with pytest.raises(SystemExit):
        run.main(["9"])
    assert "unknown notebook 9; the notebooks are 7_small" in capsys.readouterr().err


def test_each_notebook_runs_in_its_own_process(monkeypatch):
    commands = []

    def fake_run(command, cwd):
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) % 2)

    monkeypatch.setattr(subprocess, "run", fake_run)
    assert run.main(["--pictures"]) == 1, "the exit code of a failed notebook is not hidden by a later one"
    assert [command[-2:] for command in commands] == [[name, "--pictures"] for name in run.NAMES]
