"""The layout: imports go to lower layers, or down a fixed order inside a folder; device code imports Triton alone."""

import ast
from pathlib import Path

import pytest

import perf
import tritonattn

PACKAGE = Path(tritonattn.__file__).parent
# one whole number for each folder; files at the root have their own
FLOORS = {
    "reference": 0, "kernels": 0, "problem": 1, "config": 1, "gpu": 1, "block_mask": 1, "relative": 1, "score_function": 2,
    "measure": 2,
    "configs": 2, "runtime": 3, "attention": 4, "analysis": 5, "integrations": 5, "autotune": 6, "cli": 7,
}
# inside a folder, a file imports only files that stand before it
ORDER = {
    "kernels": ["packed", "tile", "window", "dropout", "functions", "scores", "softmax", "unnormalized", "forward", "backward",
                "diagonals", "mass"],
    "measure": ["journal", "accuracy", "device_timer", "timing", "environment"],
    "configs": ["kernel_hash", "shipped", "key", "user_cache", "lookup"],
    "runtime": ["arguments", "packed_arguments", "interpreter", "launch", "row_gradients", "diagonal_gradients",
                "plan", "custom_op", "eager"],
    "analysis": ["sass", "races", "compile_report", "cost_model", "check_score_function", "explain"],
    "integrations": ["dispatch_log", "torch_private", "support", "jagged", "aten_overrides", "sdpa_patch", "transformers"],
    "autotune": ["worker_pool", "prune", "trials", "record_problems", "search", "bench", "tune", "first_call", "sweep",
                 "replay", "sweep_report"],
    "cli": ["format", "reports", "doctor", "selftest", "demo", "tuning", "inspection", "main"],
    "perf": ["cases", "results", "baselines", "limits", "measure", "readme_table", "plot", "peaks", "run", "precompile", "gpu",
             "config_table", "null_driver", "host"],
}


def absolute_imports(path: Path):
    """Dotted names that a file imports, wherever the import stands."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[:len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            # "from .. import gpu" imports a module, "from ..gpu import Gpu" a name in one
            yield from (".".join([*base, alias.name]) for alias in node.names)


def place(dotted: str):
    """(folder or root file, file inside the folder or None) of a name inside the package."""
    parts = dotted.split(".")[1:]
    return parts[0], parts[1] if len(parts) > 1 else None


ENTRY = {"__init__.py", "__main__.py"}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).as_posix() not in ENTRY)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path):
    top, *rest = path.relative_to(PACKAGE).with_suffix("").parts
    inside = rest[0] if rest else None
    for name in absolute_imports(path):
        root = name.split(".")[0]
        assert root not in ("perf", "tests", "notebooks"), name
        if root != "tritonattn" or name == "tritonattn.__version__":
            continue
        target, file = place(name)
        if target == top and rest:
            if file in ORDER[top] and inside in ORDER[top] and file != inside:
                assert ORDER[top].index(file) < ORDER[top].index(inside), f"{path.name} imports {name}"
        else:
            assert FLOORS[target] < FLOORS[top], f"{path.name} (floor {FLOORS[top]}) imports {name} (floor {FLOORS[target]})"


def test_every_file_and_folder_has_its_place():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert folders | files == set(FLOORS) and folders <= set(ORDER)
    for folder in (*sorted(folders), "perf"):
        root = PACKAGE.parent if folder == "perf" else PACKAGE
        found = {path.stem for path in (root / folder).glob("*.py")}
        found |= {path.parent.name for path in (root / folder).glob("*/__init__.py")}
        assert found - {"__init__"} == set(ORDER[folder]), folder


def test_kernels_import_triton_alone():
    for path in (PACKAGE / "kernels").glob("*.py"):
        for name in absolute_imports(path):
            assert name.split(".")[0] in ("triton", "typing") or name.startswith("tritonattn.kernels."), f"{path.name}: {name}"


def test_benchmarks_import_downwards():
    for path in Path(perf.__file__).parent.glob("*.py"):
        for name in absolute_imports(path):
            parts = name.split(".")
            if parts[0] == "perf" and parts[1] in ORDER["perf"] and path.stem != "__init__" and parts[1] != path.stem:
                assert ORDER["perf"].index(parts[1]) < ORDER["perf"].index(path.stem), f"perf/{path.name} imports {name}"


def test_only_two_files_hold_autograd():
    for path in PACKAGE.rglob("*.py"):
        assert ("autograd.Function" in path.read_text()) == (path.name in ("custom_op.py", "eager.py")), path.name


def test_functions_stay_short():
    for path in [*PACKAGE.rglob("*.py"), *Path(perf.__file__).parent.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = range(node.lineno, node.end_lineno + 1)
                doc = ast.get_docstring(node)
                length = len(body) - (len(doc.splitlines()) + 1 if doc else 0)
                assert length <= 45, f"{path.name}: {node.name} has {length} lines"
