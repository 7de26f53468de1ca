"""The mutants of the kernels are distinct changes, and the list of equivalent ones names existing mutants."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

from tests.mutation import run
from tests.mutation.mutants import mutants
from tritonattn import kernels

KERNELS = sorted(Path(kernels.__file__).parent.glob("*.py"))
MUTANTS = {path.name: list(mutants(path)) for path in KERNELS}


def test_each_mutant_is_another_valid_program():
    for path in KERNELS:
        sources = [mutant.source for mutant in MUTANTS[path.name]]
        assert path.read_text() not in sources
        for source in sources[::10]:
            ast.parse(source)


def test_equivalent_mutants_exist():
    keys = [mutant.key for each in MUTANTS.values() for mutant in each]
    assert len(keys) > 700 and len(set(keys)) == len(keys)
    equivalent = json.loads(Path(__file__).with_name("equivalent.json").read_text())
    listed = [key for keys_of_reason in equivalent.values() for key in keys_of_reason]
    assert len(set(listed)) == len(listed) and set(listed) <= set(keys)


def test_killers_of_the_function_run_first_then_those_of_the_file(tmp_path):
    kills = [("tile.py f: a -> b", "t.py::one"), ("tile.py f: a -> c", "t.py::one"), ("tile.py f: a -> d", "t.py::two"),
             ("tile.py g: a -> b", "t.py::three"), ("tile.py g: a -> c", "crash or endless loop"), ("unchanged", None)]
    lines = (json.dumps({"mutant": key, "digest": "of an older file", "killer": test}) for key, test in kills)
    out = tmp_path / "journal"
    out.write_text("\n".join(lines))
    first = run.usual_killers(run.read_kills(out), "tile.py g: x -> y")
    assert list(dict.fromkeys(first)) == ["t.py::three", "t.py::one", "t.py::two"]
    items = [SimpleNamespace(nodeid=f"t.py::{name}") for name in ("zero", "one", "two", "three")]
    run.Watch(tuple(first)).pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["t.py::three", "t.py::one", "t.py::two", "t.py::zero"]
