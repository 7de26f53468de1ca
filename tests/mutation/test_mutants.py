"""The mutants of the kernels are distinct changes, and the list of equivalent ones names existing mutants."""

import ast
import json
from pathlib import Path

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
