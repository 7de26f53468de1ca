"""Run the notebooks without Jupyter: python -m notebooks.run [NAME ...]

A notebook may define two names for the tests and the README: KEY, a dict of numbers, and SLIDES, a list of figures.
"""

import argparse
import json
import linecache
import subprocess
import sys
import traceback
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def execute(path) -> dict:
    """Run all code cells in order in one new namespace and return it. Triton reads TRITON_INTERPRET once per process."""
    import matplotlib

    path = Path(path).resolve()
    matplotlib.use("Agg")
    sys.path.insert(0, str(path.parent))  # as Jupyter does
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(read(path)["cells"]):
        if cell["cell_type"] == "code":
            run_cell("".join(cell["source"]), f"<{path.stem}, cell {number}>", namespace)
    return namespace


def run_cell(source: str, name: str, namespace: dict) -> None:
    """Run one cell; tracebacks show its lines under `name`."""
    # Triton and tracebacks read the source of a function from here
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    exec(compile(source, name, "exec"), namespace)


def save_pictures(figures, folder, name: str) -> None:
    """Save figures as NAME.png, NAME-2.png, ... without matplotlib's version, so that equal figures give equal files."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, figure in enumerate(figures, 1):
        suffix = "" if number == 1 else f"-{number}"
        figure.savefig(Path(folder) / f"{name}{suffix}.png", dpi=130, metadata={"Software": None})


def main(arguments=None) -> int:
    """Run notebooks, each in its own process. Return the exit code: 0, or that of a notebook that failed."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.run", description="Run the notebooks without Jupyter.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all)")
    parser.add_argument("--pictures", action="store_true", help="save the figures in SLIDES to notebooks/pictures")
    options = parser.parse_args(arguments)
    names = options.names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"unknown notebook {', '.join(unknown)}; the notebooks are {', '.join(NAMES)}")
    if len(names) > 1:
        flags = ["--pictures"] if options.pictures else []
        commands = [[sys.executable, "-m", "notebooks.run", name, *flags] for name in names]
        return max(subprocess.run(command, cwd=FOLDER.parent).returncode for command in commands)
    slides = execute(FOLDER / f"{names[0]}.ipynb").get("SLIDES", [])
    save_pictures(slides if options.pictures else [], FOLDER / "pictures", names[0])
    return 0


if __name__ == "__main__":
    sys.excepthook = traceback.print_exception  # the built-in hook does not show the lines of a cell
    sys.exit(main())
