"""Run the notebooks without Jupyter: python -m notebooks.run [NAME ...]

    --verbose   the seconds of each cell        --json    alone on stdout: what a notebook leaves in KEY
    --pictures  SLIDES to notebooks/pictures    --strip   clear outputs and run nothing

A notebook is JSON and its code cells are Python, so this is all it takes. What a notebook says about itself is in two
names that it defines: KEY, a dict of numbers that the tests look at, and SLIDES, a list of figures worth a slide.
"""

import argparse
import contextlib
import io
import json
import linecache
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}


class CellError(RuntimeError):
    """A cell of a notebook raised; its message has the cell's number and source."""


def execute(path, verbose: bool = False) -> dict:
    """Run all code cells in order in one fresh namespace, as the kernel of a freshly opened notebook would; return it.

    Whether Triton's kernels are interpreted is settled once in a process, so a process is for one notebook. Raises CellError.
    """
    import matplotlib

    path = Path(path).resolve()
    matplotlib.use("Agg")
    if str(path.parent) not in sys.path:
        # where Jupyter would look for what lies beside a notebook
        sys.path.insert(0, str(path.parent))
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(read(path)["cells"]):
        if cell["cell_type"] == "code":
            start = time.perf_counter()
            run_cell("".join(cell["source"]), f"{path.stem}, cell {number}", namespace)
            if verbose:
                print(f"{path.stem}, cell {number} ({cell['id']}): {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return namespace


def run_cell(source: str, name: str, namespace: dict) -> None:
    """Run one cell; `name` says in errors which it is."""
    filename = f"<{name}>"
    # Triton reads a kernel's source, and has nothing but this to read it from
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    try:
        exec(compile(source, filename, "exec"), namespace)
    except Exception as error:
        raise CellError(f"{name}: {type(error).__name__}: {error}\n\n{source}") from error


def read(path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def stripped(notebook: dict) -> str:
    """The text of a notebook file that holds no output, and of metadata nothing but the cells' tags."""
    cells = []
    for cell in notebook["cells"]:
        tags = {"tags": cell["metadata"]["tags"]} if cell["metadata"].get("tags") else {}
        kept = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": tags}
        if cell["cell_type"] == "code":
            kept |= {"execution_count": None, "outputs": []}
        cells.append(kept | {"source": "".join(cell["source"]).splitlines(keepends=True)})
    found = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def save_pictures(figures, folder, name: str) -> list[Path]:
    """The first figure as NAME.png, further ones as NAME-2.png and so on: the same bytes for the same figure."""
    paths = []
    for i, figure in enumerate(figures, 1):
        image = io.BytesIO()
        # the version of matplotlib, which it would write into the file, is no part of the picture
        figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
        paths.append(Path(folder) / (f"{name}.png" if i == 1 else f"{name}-{i}.png"))
        write(paths[-1], image.getvalue())
    return paths


def write(path: Path, content: bytes) -> None:
    """Put a file in its place whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def path_of(name: str) -> Path:
    """The file of a notebook that is named by its number, its name or its file."""
    found = [each for each in NAMES if Path(name).name.removesuffix(".ipynb") in (each, each.split("_")[0])]
    if not found:
        raise SystemExit(f"notebook: expected one of {', '.join(NAMES)}, got {name!r}")
    return FOLDER / f"{found[0]}.ipynb"


def run_one(path: Path, options) -> None:
    """Run a notebook and do with it what was asked for."""
    # with --json, what the notebook itself prints goes elsewhere
    with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
        namespace = execute(path, options.verbose)
    if options.json:
        print(json.dumps(namespace.get("KEY", {})))
    if options.pictures:
        for picture in save_pictures(namespace.get("SLIDES", ()), FOLDER / "pictures", path.stem):
            print(picture, file=sys.stderr)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m notebooks.run", description="Run the notebooks without Jupyter.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 1 or 1_self_attention; all without one")
    parser.add_argument("--verbose", action="store_true", help="print the seconds of each cell")
    parser.add_argument("--json", action="store_true", help="print what a notebook leaves in KEY, and nothing else")
    parser.add_argument("--pictures", action="store_true", help="save the figures in SLIDES to notebooks/pictures")
    parser.add_argument("--strip", action="store_true", help="clear outputs, in place, and run nothing")
    options = parser.parse_args(arguments)
    paths = [path_of(name) for name in options.names or NAMES]
    if options.strip:
        for path in paths:
            write(path, stripped(read(path)).encode())
        return 0
    if len(paths) == 1:
        run_one(paths[0], options)
        return 0
    flags = [f"--{flag}" for flag in ("verbose", "json", "pictures") if getattr(options, flag)]
    commands = [[sys.executable, "-m", "notebooks.run", path.stem, *flags] for path in paths]
    return max(subprocess.run(command, cwd=FOLDER.parent).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main())
