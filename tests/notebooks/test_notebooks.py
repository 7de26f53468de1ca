"""The notebooks: they run from top to bottom, the numbers they show are true, and their exercises tell right from wrong."""

import ast
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tritonattn
from notebooks import exercises, run
from perf import results
from tests.helpers import corpus
from tritonattn.autotune import trials

PATHS = [run.FOLDER / f"{name}.ipynb" for name in run.NAMES]
TIGHT, LOOSE = 1e-12, 1e-5  # float64, float32
both = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)

# what a reader would write into the cells of the exercises, by their numbers
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
    "3.2": "answer = 8192 * 16 * (2 * 128 + 2 * 128 + 4)",
    "3.3": "def answer(q, k):\n    return tritonattn.attention(q, k, k) / math.sqrt(q.shape[-1])",
    "4.1": "answer = 128",
    "4.2": "answer = 128",
    "4.3": "def answer(samples, beside):\n    return statistics.median(a / b for a, b in zip(samples, beside))",
}
# the notebook in a process of its own; then its exercises once more, with the answers put in before their checks
DRIVER = """
import contextlib, io, json, resource, sys
from notebooks import run
path, solutions, folders = json.load(sys.stdin)
with contextlib.redirect_stdout(io.StringIO()) as said:
    namespace = run.execute(path)
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
answered = {}
for cell in run.read(path)["cells"]:
    if "exercise" in cell["metadata"].get("tags", []):
        head, tail = "".join(cell["source"]).split("\\ncheck(")
        number = tail.split('"')[1]
        with contextlib.redirect_stdout(io.StringIO()) as words:
            run.run_cell(head + "\\n" + solutions[number] + "\\ncheck(" + tail, number, namespace)
        answered[number] = words.getvalue()
pictures = [[str(path) for path in run.save_pictures(namespace["SLIDES"], folder, "picture")] for folder in folders]
print(json.dumps({"key": namespace["KEY"], "said": said.getvalue(), "answered": answered, "pictures": pictures,
                  "seconds": sum(each.ru_utime + each.ru_stime for each in used)}))
"""


def executed(path, tmp_path):
    """KEY of a notebook that has run; its exercises, time and pictures are looked at here."""
    drop = () if torch.cuda.is_available() else ("TRITON_INTERPRET",)  # its first cell has to find that out by itself
    environment = {name: value for name, value in os.environ.items() if name not in drop} | {"OMP_NUM_THREADS": "1"}
    question = json.dumps([str(path), SOLUTIONS, [str(tmp_path / "once"), str(tmp_path / "again")]])
    done = subprocess.run([sys.executable, "-c", DRIVER], env=environment, input=question, capture_output=True, text=True,
                          cwd=run.FOLDER.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    number = path.stem[0]
    assert found["said"].count("not answered yet") == 3, "an exercise is shipped with an answer, or does not say so"
    assert list(found["answered"]) == [f"{number}.{i}" for i in (1, 2, 3)]
    for name, words in found["answered"].items():
        assert words.startswith(f"Exercise {name}: right. "), words
    for once, again in zip(*found["pictures"]):
        assert Path(once).read_bytes() == Path(again).read_bytes(), "a picture differs when it is saved again"
    assert len(found["pictures"][0]) == 1
    assert found["seconds"] < 90, f"expected less than 90 s of processor time, got {found['seconds']:.0f}"
    return found["key"]


def test_self_attention(tmp_path):
    key = executed(run.path_of("1"), tmp_path)
    assert key["reach"] == [14, 5 * 14 - 6, 14 * 14]
    for name in ("one_by_one", "definition", "fused", "multi_head", "map", "equivariance"):
        assert key[name] < LOOSE, name
    assert max(key["maps"]) < LOOSE and key["distance_alone"] < 1e-4
    assert min(key["order_matters"]) > 0.1, "positions were added, and the order still does not matter"
    without, *placed = key["saws"]
    assert without < 1e-6 and min(placed) > 0.01, "equal words are alike without positions, and only then"
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


def check_bytes(found, d=64):
    """Plain attention has scores and weights at a time, 4 n^2 bytes each; the kernel o and lse."""
    for n, plain, fused in zip(map(int, found["plain"]), found["plain"].values(), found["fused"].values()):
        assert 8 * n * n <= plain < 8 * n * n + 64 * n * d, f"plain attention, n = {n}"
        assert 4 * n * (d + 1) <= fused <= 4 * n * (d + 1) + 1024, f"the kernel, n = {n}"


def test_softmax_in_pieces(tmp_path):
    key = executed(run.path_of("2"), tmp_path)
    assert max(*key["one_row"].values(), *key["base_two"], key["any_order"]) < TIGHT
    assert set(key["in_pieces"]) == {"ordinary", "spread out", "around 1000", "rising", "hidden"}
    assert max(key["in_pieces"].values()) < TIGHT
    largest = {"float16": 65504.0, "float32": (2 - 2**-23) * 2.0**127, "float64": sys.float_info.max}
    for dtype, number in largest.items():
        assert key["largest_x"][dtype] == pytest.approx(math.log(number))
    # the largest of 64 random scores is some 2 or 3 over 0: e^x of it is inf from 88.7 on, and 0 from -103.3 on
    below, above = key["formula_is_nan"]
    assert 85 <= above <= 88 and -107 <= below <= -104
    assert key["with_maximum"] < 1e-6
    windows = {"full": (None, None, 0), "causal, top left": (None, 0, 0), "causal, bottom right": (None, 0, 16),
               "sliding, bottom right": (23, 0, 16)}
    assert key["tiles"] == {name: counted(48, 64, *window, tile=8) for name, window in windows.items()}
    assert key["causal_64"] == {str(n): counted(n, n, None, 0, 0, tile=64) for n in (512, 1024, 2048, 4096)}
    check_compiled(key)


def counted(n_q, n_k, left, right, shift, tile):
    """Tiles that hold only pairs that see each other, some, and none, by the definition of a window."""
    distance = torch.arange(n_k) - torch.arange(n_q)[:, None] - shift
    seen = torch.ones(n_q, n_k, dtype=torch.bool)
    seen &= True if left is None else distance >= -left
    seen &= True if right is None else distance <= right
    share = seen.view(n_q // tile, tile, n_k // tile, tile).sum((1, 3))
    free, never = (share == tile * tile).sum().item(), (share == 0).sum().item()
    return {"free": free, "masked": share.numel() - free - never, "never": never}


def check_compiled(key):
    assert key["masks"]["full"] == [0], "full attention has one loop, without a mask"
    for name in ("length 1000", "causal"):
        free, edge = key["masks"][name]
        assert free == 0 and edge > 0, name
    left, free, right = key["masks"]["sliding"]
    assert free == 0 and left > 0 and right > 0
    free, edge = key["instructions"]["free"], key["instructions"]["edge"]
    assert edge["select"] > free["select"] and edge["special"] == free["special"] and edge["tensor"] == free["tensor"]


def test_the_backward_pass(tmp_path):
    key = executed(run.path_of("3"), tmp_path)
    assert set(key["steps"]) == {"dV", "dP", "delta", "dS", "dQ", "dK"}
    assert max(key["steps"].values()) < TIGHT and key["rows_of_ds"] < TIGHT and key["owned_is_right"] < TIGHT
    assert key["shapes"] == {"dV": [12, 6], "dP": [10, 12], "delta": [10], "dS": [10, 12], "dQ": [10, 8], "dK": [12, 8]}
    assert set(key["finite"]) == {"full", "causal"} and max(map(max, key["finite"].values())) < 1e-7
    (best, _), (coarse, _) = key["best"]["float64"], key["best"]["float32"]
    assert best < 1e-9 and 5e-5 < coarse < 5e-4, "the title of the picture of steps"
    for n, kept in key["kept"]["kernel"].items():
        assert kept == 4 * int(n) * 65 and key["kept"]["plain"][n] == 4 * int(n) ** 2
    assert key["kept_16"] == {"True": 128 * (4 * 64 + 4), "False": 128 * (2 * 64 + 4)}
    found = key["backward_bytes"]
    assert found["results"] <= found["kernel"] < 4 * 512 ** 2 <= found["plain"]
    assert key["owners"] == {"dq": [i // 16 for i in range(48)], "dk": [j // 16 for j in range(64)],
                             "dv": [j // 16 for j in range(64)]}
    assert key["changed"] == 0 and key["again"] == 1 and key["orders"] > 10
    check_rounding(key["shifts"], key["dq_errors"])


def check_rounding(shifts, errors):
    """The exact dQ does not feel a shift; the error of a rounded delta grows with its square. And the README's table."""
    assert shifts["same"] < 1e-11 and shifts["formula"] < 1e-9
    for dtype, factor in (("bfloat16", 1), ("float16", 8)):
        assert shifts[dtype][-1] / shifts[dtype][-3] == pytest.approx(16, rel=0.4)
        assert shifts[dtype][-1] * factor == pytest.approx(shifts["bfloat16"][-1], rel=0.2)
    line = re.compile(r"^(\S+) +(bfloat16|float16) +([\d.]+)% +([\d.]+)% +([\d.]+)%$", re.M)
    table = line.findall((run.FOLDER.parent / "README.md").read_text(encoding="utf-8"))
    assert len(table) == 10
    for family, dtype, *written in table:
        found = errors[dtype][family]
        sides = [found[side] for side in ("precise_grad=True", "precise_grad=False", "plain torch")]
        # the table has two digits after the point
        expected = pytest.approx([float(number) for number in written], rel=0.05, abs=0.006)
        assert [100 * error for error in sides] == expected, (family, dtype)


def test_seeing_and_choosing(tmp_path):
    key = executed(run.path_of("4"), tmp_path)
    # one exponential for each pair, 16 a clock; 4 d operations of products, 2048, 4096 and 8192 a clock
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
    assert redone.pop("MI300X") > 2 and max(redone.values()) < 1.1, "what the text says of eight waves"
    wide, narrow = (compiled[f"H200 {d}"]["units"] for d in (128, 64))
    assert narrow["special"] > narrow["tensor"] and wide["special"] < wide["tensor"], "what the text says of Hopper"
    check_tiles({name: seen for name, seen in compiled.items() if "x" in name}, key["spilling"])
    check_regret(key)
    assert key["recorded"] == sum(len(found.jobs) for found in results.load())


def check_tiles(tiles, spilling):
    """Larger tiles take more and leave room for fewer blocks; the largest spills and the smallest does not."""
    assert len(tiles) == 9 and "128x128" in spilling and "32x32" not in spilling
    for less, more in (("32x32", "64x64"), ("64x64", "128x128")):
        for name in ("registers", "shared"):
            assert tiles[less][name] < tiles[more][name], name
        assert tiles[less]["blocks"] > tiles[more]["blocks"]
    assert all(seen["blocks"] == min(seen["resident"].values()) for seen in tiles.values())


def check_regret(key):
    """The sweep says that it is made up, and more configs do not make a strategy worse by more than jitter."""
    folder = run.FOLDER / "data" / "synthetic_sweep"
    sweep = trials.read(folder)
    assert key["synthetic"] and sweep.synthetic and sweep.environment["gpu"] == "a made-up GPU"
    made_up = corpus.made_up([(job.kernel, job.problem.d, job.problem.mask) for job in sweep.jobs])
    assert [job.name for job in sweep.jobs] == [job.name for job in made_up.jobs]
    for strategy, regrets in key["regret"].items():
        found = list(regrets.values())
        assert all(regret >= 0 for regret in found) and found[0] > 0.02 and found[-1] < 0.01, strategy
        assert all(after <= before + 0.01 for before, after in itertools.pairwise(found)), strategy
    spent = {strategy: seconds for strategy, (seconds, _, _) in key["seconds"].items()}
    assert spent["static"] < spent["halving"] < spent["exhaustive"]


# answers that are not right, and of what they should be told
WRONG = [
    ("1.1", 3 * 512 * 512, "mixed by one more matrix"), ("1.1", 4 * 512 * 64, "That is one head"), ("1.1", 7, "Got 7"),
    ("1.1", "many", "Got many"),
    ("1.2", lambda x, heads: x.reshape(heads, x.shape[0], -1), "head 0 holds pieces of the first vectors alone"),
    ("1.2", lambda x, heads: x.view(x.shape[0], heads, -1), r"Expected the shape \(4, 5, 6\)"),
    ("1.2", lambda x, heads: x.view(x.shape[0], heads, -1).permute(1, 0, 2).flip(0), "the first columns of every vector"),
    ("1.2", lambda x: x, "That raised TypeError"), ("1.2", 5, "That raised TypeError"),
    ("1.3", lambda n: torch.zeros(n), r"Expected a tensor of shape \(6, 6\)"),
    ("1.3", lambda n: torch.eye(n), "Row . weighs the keys by"),
    ("1.3", lambda n: torch.zeros(n, n), "should by"),
    ("2.1", lambda a, b: (torch.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2]), "l was added as it stands"),
    ("2.1", lambda a, b: (a[0] + b[0], a[1], a[2]), "m is not the largest"),
    ("2.1", lambda a, b: (torch.maximum(a[0], b[0]), a[1], a[2]), "m is right, l is not"),
    ("2.2", (1984, 128), "in the wrong order"), ("2.2", (32, 1984), "crosses more than one tile"),
    ("2.2", (128, 3968), "That would be all tiles"), ("2.2", (1, 2), r"Got \(1, 2\)"), ("2.2", 128, "Expected two numbers"),
    ("3.1", lambda p, dp: p * dp, "It also takes from all others"), ("3.1", lambda p, dp: p, "The first row sums to 1.00"),
    ("3.1", lambda p, dp: p * (dp - dp.mean(1, keepdim=True)), "an average by the weights"),
    ("3.1", lambda p, dp: p * (dp - (p * dp).sum(0, keepdim=True)), "not for each key"),
    ("3.1", lambda p, dp: dp - (p * dp).sum(1, keepdim=True), "each counts by its weight"),
    ("3.1", lambda p, dp: p * ((p * dp).sum(1, keepdim=True) - dp), "sign is the wrong way round"),
    ("3.1", lambda p, dp: p[0], r"Expected a tensor of shape \(4, 6\)"), ("3.1", 3, "That raised TypeError"),
    ("3.2", 8192 * 16 * (2 * 128 + 4), "one more tensor is kept"), ("3.2", 8192 * 16 * 512, "one number more"),
    ("3.2", 8192 * 16 * 514, "is float32"), ("3.2", 8192 * 516, "one head"), ("3.2", 8192 * 16 * 520, "Delta is made"),
    ("3.2", 8192 * 16 * 1032, "two bytes"), ("3.2", 5, "Got 5"),
    ("3.3", lambda q, k: tritonattn.attention(q, k, k), "through the scale"), ("3.3", lambda q, k: q, "dS = P"),
    ("3.3", lambda q, k: k, r"Expected a tensor of shape \(1, 5, 16\)"),
    ("4.1", 168, "room for 3 warps, the SM for 1 block"), ("4.1", 136, "the SM for 1 block"), ("4.1", 96, "not the most"),
    ("4.1", 256, "from 1 to 255"), ("4.1", "all", "from 1 to 255"),
    ("4.2", 64, "on H200"), ("4.2", 32, "on A100"), ("4.2", 256, "4 d in all"), ("4.2", 100, "Got 100"),
    ("4.3", lambda a, b: statistics.median(a) / statistics.median(b), "not as warm"),
    ("4.3", lambda a, b: statistics.fmean(x / y for x, y in zip(a, b)), "compared with itself, which is right"),
    ("4.3", lambda a, b: statistics.fmean(a) / statistics.fmean(b), "moves a mean"),
    ("4.3", lambda a, b: min(a) / min(b), "two best samples"), ("4.3", lambda a, b: 1.0, r"Got 1\.000, where 0\.900"),
    ("4.3", lambda a, b: statistics.median(y / x for x, y in zip(a, b)), "times as fast"),
    ("2.3", 126, "sees no further back than 126"), ("2.3", 128, "not the least"), ("2.3", 64.0, "Expected a whole number"),
]


@pytest.mark.parametrize("number, answer, words", WRONG)
def test_a_wrong_answer_is_told_why(capsys, number, answer, words):
    exercises.check(number, answer)
    said = capsys.readouterr().out
    assert said.startswith(f"Exercise {number}: not yet. ") and re.search(words, said), said


def test_half_a_merge_is_told_which_half(capsys):
    def answer(first, second):
        m = torch.maximum(first[0], second[0])
        a, b = torch.exp2(first[0] - m), torch.exp2(second[0] - m)
        return m, a * first[1] + b * second[1], first[2] + second[2]

    exercises.check("2.1", answer)
    assert "m and l are right, acc is not" in capsys.readouterr().out


@pytest.mark.parametrize("number", SOLUTIONS)
def test_no_answer_is_none(capsys, number):
    exercises.check(number, None)
    exercises.check(number, None if "def" not in SOLUTIONS[number] else lambda *given: None)
    assert capsys.readouterr().out == f"Exercise {number}: not answered yet.\n" * 2


@pytest.mark.interpreted
def test_the_window_of_the_third_exercise_is_what_spans_says():
    """left = 127 is the least with which tiles of 64 have a stretch without a mask, one tile long."""
    from tests.kernels.test_window import walk

    for left, tiles in ((126, 0), (127, 1)):
        bounds, _ = walk((left, 0), 640, 4096, 64, 64)
        assert bounds[2] - bounds[1] == 64 * tiles


@both
def test_is_a_notebook_without_output(path):
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    assert set(found) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in found["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    for cell in found["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["metadata"], dict)
        assert all(isinstance(line, str) for line in cell["source"]) and cell["source"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, f"{cell['id']}: python -m notebooks.run --strip"
    assert text == run.stripped(found), "python -m notebooks.run --strip"


@both
def test_links_lead_somewhere(path):
    text = "\n".join("".join(cell["source"]) for cell in run.read(path)["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 4
    for link in links:
        assert link.startswith("https://") or (path.parent / link).is_file(), link


@both
def test_ends_with_three_exercises(path):
    cells = run.read(path)["cells"]
    tagged = [i for i, cell in enumerate(cells) if "exercise" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 3 and tagged[-1] == len(cells) - 1
    for i, at in enumerate(tagged, 1):
        source = "".join(cells[at]["source"])
        assert re.findall(r"^check\((.*)\)$", source, re.M) == [f'"{path.stem[0]}.{i}", answer']
        assert f"**{path.stem[0]}.{i}**" in "".join(cells[at - 1]["source"])


@both
def test_settles_how_kernels_run_before_it_imports_them(path):
    code = [ast.parse("".join(cell["source"])) for cell in run.read(path)["cells"] if cell["cell_type"] == "code"]
    assert 'os.environ["TRITON_INTERPRET"] = "1"' in ast.unparse(code[0]).replace("'", '"')
    helper = ast.parse((run.FOLDER / "course.py").read_text(encoding="utf-8"))
    at_import = [node for node in helper.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in [*ast.walk(code[0]), *at_import]:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"torch", "triton", "tritonattn", "matplotlib", "exercises"}, names


@both
def test_has_a_picture_for_the_readme(path):
    picture = run.FOLDER / "pictures" / f"{path.stem}.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and picture.stat().st_size < 300_000


def notebook(folder, *sources, name="7_small"):
    """A file of these code cells."""
    cells = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "source": source} for i, source in enumerate(sources)]
    path = folder / f"{name}.ipynb"
    path.write_text(run.stripped({"cells": cells}), encoding="utf-8")
    return path


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of one notebook, in the place of the real one."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "NAMES", ["7_small"])
    return notebook(tmp_path, "import matplotlib.pyplot as plt\nprint('hello')",
                    "KEY = {'a': 1}\nSLIDES = [plt.figure(), plt.figure()]")


def test_runs_cells_in_one_fresh_namespace(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside.py").write_text("number = 40\n")
    path = notebook(tmp_path, "import beside\na = beside.number", "def f():\n    return a + 2", "b = f()")
    assert run.execute(path)["b"] == 42
    assert "b" not in run.execute(notebook(tmp_path, "c = 1", name="8_other"))


def test_an_error_names_its_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = notebook(tmp_path, "a = 1", "b = a / 0  # here")
    with pytest.raises(run.CellError, match=r"7_small, cell 1: ZeroDivisionError(.|\n)*b = a / 0  # here"):
        run.execute(path)


def test_prints_key_alone_as_json(small, capsys):
    assert run.main(["7", "--json", "--verbose"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1}
    assert "hello" in err and re.search(r"7_small, cell 0 \(cell-0\): \d+\.\d s", err)


def test_saves_pictures_whole_or_not_at_all(small, tmp_path, monkeypatch):
    run.main(["7_small.ipynb", "--pictures"])
    pictures = tmp_path / "pictures"
    assert sorted(path.name for path in pictures.iterdir()) == ["7_small-2.png", "7_small.png"]
    before = (pictures / "7_small.png").read_bytes()
    assert b"Software" not in before
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        run.write(pictures / "7_small.png", b"half")
    assert (pictures / "7_small.png").read_bytes() == before and len(list(pictures.iterdir())) == 2


def test_strips_outputs_and_what_tools_leave(small):
    clean = small.read_text(encoding="utf-8")
    dirty = json.loads(clean)
    dirty["cells"][0] |= {"outputs": [{"output_type": "stream"}], "execution_count": 3, "metadata": {"tags": ["kept"], "x": 1}}
    dirty["metadata"]["vscode"] = {}
    small.write_text(json.dumps(dirty), encoding="utf-8")
    assert run.main(["--strip"]) == 0
    expected = json.loads(clean)
    expected["cells"][0]["metadata"] = {"tags": ["kept"]}
    assert json.loads(small.read_text(encoding="utf-8")) == expected


def test_an_unknown_notebook_is_named(small):
    with pytest.raises(SystemExit, match="^notebook: expected one of 7_small, got '9'$"):
        run.main(["9"])


def test_several_notebooks_have_processes_of_their_own(monkeypatch):
    commands = []

    def pretend(command, cwd):
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) - 1)

    monkeypatch.setattr(subprocess, "run", pretend)
    assert run.main(["--json"]) == len(run.NAMES) - 1, "one that fails is not hidden by another"
    assert [command[-2:] for command in commands] == [[name, "--json"] for name in run.NAMES]
