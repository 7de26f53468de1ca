"""README files: every code block and command works, and every link, file and module that they name exists.

The Python blocks of a page run in order in one process, as a reader would type them. A block whose first line begins with
`# needs ` (a GPU, the result of a sweep) is parsed only: its syntax, or its command's arguments by the command's own parser.
"""

import argparse
import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from tests import COMPILED
from tritonattn.gpu import KNOWN

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FOLDERS = ("tritonattn", "perf", "notebooks", "tests", ".ci")  # not a virtual environment that lies beside them
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
PAGES = [README, *(path for path in FILES if path.name == "README.md")]
# an interpreted process cannot compile for a GPU
COMPILING_PAGES = ["tritonattn/analysis/README.md"]
# commands that are long, or write into the tree, and that other tests or .ci/run execute
PARSED_ONLY = ["pytest", "venv", "notebooks.run", "perf.readme_table", "perf.plot", "perf.gpu", "tests.mutation"]
EXTRAS = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1], re.M)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())

# the blocks arrive as JSON on stdin; an error names the block by its first line
RUN_BLOCKS = """
import json, linecache, sys
namespace = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    name = f"<block {number}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    exec(compile(source, name, "exec"), namespace)
"""


class Parsed(Exception):
    """Raised in place of running a command whose arguments are valid."""


class BadArguments(Exception):
    """Arguments that a command's parser refuses."""


def blocks(page, language):
    """The fenced code blocks of one language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page):
    """The text outside fenced code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def is_run(block):
    """Return whether a block is executed, not only parsed."""
    return not block.lstrip().startswith("# needs ")


def commands(block):
    """The commands of a shell block as lists of words, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split("&&") if part.strip()]


def parse(words, partial=False):
    """Have the command's own parser check its arguments, without running the command.

    `partial` accepts a command that is named without its required arguments.
    """
    module, arguments = words[2], words[3:]
    assert importlib.util.find_spec(module), f"python -m {module}: no such module"
    if module in ("pytest", "venv"):
        return
    real = argparse.ArgumentParser.parse_known_args
    depth = []

    def parse_known_args(parser, *given, **options):
        depth.append(parser)
        parsed = real(parser, *given, **options)
        depth.pop()
        if not depth:
            if parsed[1]:
                raise BadArguments(f"unrecognized arguments: {' '.join(parsed[1])}")
            raise Parsed
        return parsed

    def error(parser, message):
        raise Parsed if partial and "required" in message else BadArguments(message)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy: the module is already imported
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        patch.setattr(argparse.ArgumentParser, "error", error)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except Parsed:
            return
        except SystemExit as end:
            assert not end.code, f"{shlex.join(words)}: exit code {end.code}"
            return
        except BadArguments as reason:
            pytest.fail(f"{shlex.join(words)}: {reason}")
    pytest.fail(f"{shlex.join(words)}: the command does not parse arguments")


def environment(page):
    """The environment in which a page's blocks run: interpreted, unless there is a GPU or the page compiles."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if not COMPILED and page.relative_to(ROOT).as_posix() not in COMPILING_PAGES:
        variables["TRITON_INTERPRET"] = "1"
    return variables


@pytest.mark.slow
@by_page
def test_python_blocks_run(page, tmp_path):
    for block in blocks(page, "python"):
        ast.parse(textwrap.dedent(block))
    sources = json.dumps([textwrap.dedent(block) for block in blocks(page, "python") if is_run(block)])
    done = subprocess.run([sys.executable, "-c", RUN_BLOCKS], input=sources, env=environment(page), cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@by_page
def test_commands_have_valid_arguments(page):
    for block in blocks(page, "bash"):
        for words in commands(block):
            if words[:2] == ["python", "-m"]:
                parse(words)
            elif words[:2] == ["pip", "install"]:
                for extra in re.findall(r"\[(.*?)\]", " ".join(words)):
                    assert set(extra.split(",")) <= set(EXTRAS), f"{shlex.join(words)}: pyproject.toml has no such extra"
            else:
                assert words[0] in ("git", "cd", "source"), f"{shlex.join(words)}: unknown kind of command"


@by_page
def test_commands_in_the_text_exist(page):
    inline = re.findall(r"(?:`|<!-- )(?:\w+=\S+ )?(python -m [^`>]+?)(?:`| -->)", prose(page))
    in_text_blocks = re.findall(r"^ *(python -m .*)$", "".join(blocks(page, "text")), re.M)
    for words in commands("\n".join(inline + in_text_blocks)):
        if "argparse" in Path(importlib.util.find_spec(words[2]).origin).read_text() or words[2] == "tritonattn":
            parse(words, partial=True)


@pytest.mark.slow
@by_page
def test_commands_run(page, tmp_path):
    for block in blocks(page, "bash"):
        for words in commands(block) if is_run(block) else ():
            if words[:2] == ["python", "-m"] and words[2] not in PARSED_ONLY and words[2:4] != ["tritonattn", "demo"]:
                done = subprocess.run([sys.executable, *words[1:]], env=environment(page), cwd=tmp_path, capture_output=True,
                                      text=True)
                # doctor exits with 1 where this machine has a problem to report
                assert done.returncode == 0 or words[3] == "doctor", f"{shlex.join(words)}: {done.stderr[-4000:]}"


def slug(heading):
    """The anchor that a Markdown heading gets."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@by_page
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", prose(target), re.M) if anchor else ()
        assert not anchor or anchor in map(slug, headings), link


@by_page
def test_named_files_and_folders_exist(page):
    for name in re.findall(r"`([\w./-]+(?:\.py|\.md|\.ipynb|/))`", prose(page)):
        name = name.strip("/")
        nearby = (page.parent / name).exists() or (ROOT / name).exists()
        assert nearby or any(path.as_posix().endswith(f"/{name}") for path in FILES), name


def test_readme_is_a_front_page():
    words = len(prose(README).split())
    assert 700 <= words <= 1100, f"the README has {words} words outside its code"


def test_readme_status_matches_the_package():
    status = prose(README).split("## Why")[0]
    assert set(re.findall(r"sm_\d+|gfx\d+", status)) == set(KNOWN)
    project = (ROOT / "pyproject.toml").read_text()
    for name, pattern in (("Python", r'requires-python = ">=([\d.]+)"'), ("torch", r'"torch>=([\d.]+)"')):
        assert f"{name} {re.search(pattern, project)[1]} or newer" in status
    oldest = re.search(r'"triton>=([\d.]+)"', project)[1]
    assert f"Triton {oldest} to " in status


def test_readme_has_the_two_commands():
    install = "python -m venv .venv && source .venv/bin/activate && pip install -e"
    assert f'{install} ".[demo]" && python -m tritonattn demo\n' in blocks(README, "bash")
    assert f'{install} ".[test]" && python -m pytest\n' in blocks(README, "bash"), "the block that .ci/run executes"
