"""The house stands: imports only go down, and device code imports Triton alone."""

import ast
from pathlib import Path

import perf
import tritonattn

PACKAGE = Path(tritonattn.__file__).parent
FLOORS = {
    "kernels": 0, "version": 0, "journal": 0, "reference": 1, "gpu": 1, "problem": 1, "tile_map": 1, "interpreter": 1,
    "accuracy": 1, "clock": 1, "binary": 1, "drawing": 1, "tables": 1.5, "keys": 1.5,
    "environment": 1.5, "cache": 1.8, "timing": 2, "config": 2, "recording": 3, "launch": 3, "lens": 4,
    "model": 4.5, "ops": 4, "attention": 5, "tuning": 5.5,
    "aten": 5.5, "tally": 1, "charmodel": 5, "show": 6, "explanation": 6,
    "swap": 6, "integrations": 6, "demo": 6, "selftest": 6, "doctor": 6, "__init__": 7, "__main__": 7,
}
# of the benchmarks, which stand beside the package and lean on it
PERF = {
    "cases": 0, "record": 0, "rivals": 1, "limits": 1, "measure": 2, "table": 2, "plot": 3, "ceilings": 3, "run": 3, "gpu": 4,
}
# within the kernels, in reading order
STEPS = ["tile", "window", "dropout", "scores", "softmax", "forward", "backward"]


def imports(path):
    """(level, module) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


def test_every_file_has_a_floor():
    assert {path.stem for path in PACKAGE.glob("*.py")} | {"kernels", "integrations", "tuning"} == set(FLOORS)
    assert {path.stem for path in (PACKAGE / "kernels").glob("*.py")} == {*STEPS, "__init__"}


def test_imports_go_down():
    for path in PACKAGE.glob("*.py"):
        for level, name in imports(path):
            assert not name.startswith("tritonattn"), f"{path.name}: expected relative imports, got {name}"
            target = name.split(".")[0]
            if level == 1 and target in FLOORS and path.stem not in ("__init__", "__main__"):
                assert FLOORS[target] < FLOORS[path.stem], f"{path.name} (floor {FLOORS[path.stem]}) imports {target}"


def test_integrations_import_from_below_and_not_each_other():
    for path in (PACKAGE / "integrations").glob("*.py"):
        for level, name in imports(path):
            assert not name.startswith("tritonattn"), f"{path.name}: expected relative imports, got {name}"
            assert level in (0, 2), f"integrations/{path.name} imports {name}"
            assert level == 0 or FLOORS[name.split(".")[0]] < FLOORS["integrations"], f"integrations/{path.name} imports {name}"


def test_tuning_imports_from_below_and_goes_down():
    steps = ["workers", "survey", "table", "runs", "race", "bench", "isolation", "tuner", "quick", "sweep", "replay",
             "measured", "pictures", "report", "commands", "__init__"]
    assert {path.stem for path in (PACKAGE / "tuning").glob("*.py")} == set(steps)
    for path in (PACKAGE / "tuning").glob("*.py"):
        for level, name in imports(path):
            if level == 1:
                assert steps.index(name) < steps.index(path.stem), f"tuning/{path.name} imports {name}"
            elif level == 2:
                assert FLOORS[name.split(".")[0]] < FLOORS["tuning"], f"tuning/{path.name} imports {name}"


def test_kernels_import_triton_alone_and_go_down():
    for path in (PACKAGE / "kernels").glob("*.py"):
        for level, name in imports(path):
            if level == 0:
                assert name.split(".")[0] in ("triton", "typing"), f"kernels/{path.name} imports {name}"
            else:
                assert level == 1 and STEPS.index(name) < STEPS.index(path.stem), f"kernels/{path.name} imports {name}"


def test_benchmarks_lean_on_the_package_and_go_down():
    folder = Path(perf.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} == {*PERF, "__init__"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "perf"):
                inner = (node.module or "").removeprefix("perf").strip(".").split(".")[0]
                for target in [inner] if inner else [alias.name for alias in node.names]:
                    assert PERF[target] < PERF[path.stem], f"perf/{path.name} imports {target}"
    for path in PACKAGE.rglob("*.py"):
        assert not any(name.split(".")[0] in ("perf", "tests") for _, name in imports(path)), path.name


def test_only_ops_holds_autograd():
    for path in PACKAGE.rglob("*.py"):
        assert ("autograd.Function" in path.read_text()) == (path.name == "ops.py"), path.name


def test_functions_stay_short():
    for path in [*PACKAGE.rglob("*.py"), *Path(perf.__file__).parent.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = range(node.lineno, node.end_lineno + 1)
                doc = ast.get_docstring(node)
                length = len(body) - (len(doc.splitlines()) + 1 if doc else 0)
                assert length <= 45, f"{path.name}: {node.name} has {length} lines"
