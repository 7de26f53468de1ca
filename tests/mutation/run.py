"""Mutation check of the kernels: would the tests notice a small mistake?

    python -m tests.mutation --out FILE [--only scores.py] [--sample N] [--minutes M] [--again] [--equivalent] [--list]

A mutant is the package with one small change in a kernel: `<` for `<=`, `-` for `+`, a constant plus one, a condition
negated, a cast dropped. Each meets the tests of TESTS, a part of the default selection, in a process of its own, up to
the first failure. FILE keeps one line per finished mutant, so that another run continues; --again repeats the survivors.
equivalent.json lists mutants that compute the same, by reason; they pass every test, so only --equivalent runs them. The exit
code is 1 below a kill rate of 95 %.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton defines its own device functions

import hypothesis  # noqa: F401  imported once, here; the package and its tests are imported in the children alone
import pytest
import torch
import torch._dynamo
import torch.utils.flop_counter
import triton.runtime.interpreter  # noqa: F401

from .mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "tritonattn/kernels"
EQUIVALENT = Path(__file__).with_name("equivalent.json")
WALL_SECONDS = 900  # that all tests of a mutant may take
CPU_SECONDS = 20  # that a test may take before its mutant counts as killed, by an endless loop
GOAL = 0.95
USUAL = 6  # tests that run first because they killed other mutants of the function, and as many for the file
UNCHANGED = "unchanged"  # the key of the package without a mutation
# in the order in which they run: cheap and sensitive ones first
TESTS = ("tests/kernels/test_edge_cases.py", "tests/kernels/test_score_mods.py", "tests/test_block_mask.py",
         "tests/kernels/test_softcap_and_sink.py", "tests/kernels/test_relative.py", "tests/kernels/test_statistics.py",
         "tests/kernels/test_normalizers.py", "tests/kernels/test_score_function.py", "tests/kernels/test_mask_function.py",
         "tests/kernels/test_softmax.py", "tests/kernels/test_window.py", "tests/runtime/test_launch.py",
         "tests/kernels/test_packed.py")
# tests of those files that are about torch, not about kernels
DESELECT = ("not (jacrev or vmap or functional or rejects or raise or autocast or compile or checkpointing or attn_mask or "
            "causal_bias or generator "
            "or export or pickled or opcheck or test_errors or flops or test_explain)")
# most mutants of a file meet no more than these
FIRST = {
    "dropout.py": ("tests/kernels/test_score_mods.py::test_dropped_weights_are_those_of_philox",
                   "tests/kernels/test_score_mods.py::test_dropout_is_exact_for_its_keep_mask"),
    "functions.py": ("tests/kernels/test_score_function.py::test_values_and_derivatives_of_given_scores[squares]",
                     "tests/kernels/test_mask_function.py::test_the_blocks_are_those_of_the_booleans[stripes]",
                     "tests/kernels/test_score_function.py"
                     "::test_indices_do_not_depend_on_the_alignment[top_left-(20, 50)-documents]"),
    "diagonals.py": ("tests/kernels/test_relative.py::test_tables_of_any_radius[16]",
                     "tests/kernels/test_relative.py::test_dropped_weights_have_no_gradient[9-50-bottom_right]",
                     "tests/kernels/test_packed.py::test_each_feature[relative]"),
    "mass.py": ("tests/kernels/test_statistics.py::test_each_sequence_has_its_own_length[window1-sizes1-bottom_right]",
                "tests/kernels/test_statistics.py::test_maps_of_any_tile[options1-48]",
                "tests/kernels/test_packed.py::test_each_feature[statistics]"),
    "packed.py": ("tests/kernels/test_packed.py::test_many_short_sequences[11]",
                  "tests/kernels/test_packed.py::test_each_feature[bottom-right]",
                  "tests/kernels/test_packed.py::test_rows_after_the_last_sequence_attend_to_nothing[None]"),
}


class Watch:
    """A pytest plugin: the tests in `first` come first, `failed` is the first that fails, and each has limited CPU time."""

    failed = None

    def __init__(self, first: tuple[str, ...] = ()):
        self._rank = {test: i for i, test in enumerate(dict.fromkeys(first))}

    def pytest_collection_modifyitems(self, items):
        # as arguments they would not come first: pytest drops a test whose file is an argument too
        items.sort(key=lambda item: self._rank.get(item.nodeid, len(self._rank)))

    def pytest_runtest_logstart(self):
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed = self.failed or report.nodeid


def run_tests(folder: Path, first: tuple[str, ...], result: Path) -> None:
    """In a child: run the tests up to the first failure, and write its name to `result`. `first` come before the others."""
    signal.alarm(WALL_SECONDS)  # a mutant that waits for something takes no CPU time
    os.chdir(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    watch = Watch(first)
    arguments = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--assert=plain", "--rootdir", str(folder), "-k", DESELECT,
                 *TESTS]
    code = pytest.main(arguments, plugins=[watch])
    says_something = code in (0, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
    outcome = watch.failed or ("an import" if code else None)
    result.write_text(json.dumps(outcome if says_something else {"exit code of pytest": int(code)}))


def killer(folder: Path, first: tuple[str, ...] = (), quiet: bool = True) -> str | None:
    """Return the first test that fails on the package in `folder`, or None. `first` are run before the other tests."""
    result = folder / "result.json"
    result.write_text(json.dumps("crash or endless loop"))
    child = os.fork()
    if child == 0:
        if quiet:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        with contextlib.suppress(BaseException):
            run_tests(folder, first, result)
        os._exit(0)
    os.waitpid(child, 0)
    outcome = json.loads(result.read_text())
    if isinstance(outcome, dict):
        sys.exit(f"the tests could not be run: {outcome}")
    return outcome


@contextlib.contextmanager
def package_copy():
    """Yield a folder with a copy of the package and the tests, so that edits meanwhile change nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("tritonattn", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        yield folder


def check_unchanged(out: Path) -> None:
    """Exit if the tests fail without a mutation; else note in `out` that they pass."""
    with package_copy() as folder:
        if failed := killer(folder, quiet=False):
            sys.exit(f"{failed} fails without a mutation")
    with out.open("a") as journal:
        journal.write(json.dumps({"mutant": UNCHANGED, "digest": digest("*.py"), "killer": None}) + "\n")


def run_mutants(chosen: list[Mutant], out: Path, minutes: float) -> None:
    """Run the tests on each mutant and append the result to `out`, for at most so many minutes."""
    end, kills = time.monotonic() + 60 * minutes, read_kills(out)
    with package_copy() as folder, out.open("a") as journal:
        for i, mutant in enumerate(chosen, 1):
            if time.monotonic() > end:
                break
            path = folder / KERNELS / mutant.file
            original = path.read_text()
            path.write_text(mutant.source)
            by = killer(folder, (*usual_killers(kills, mutant.key), *FIRST.get(mutant.file, ())))
            path.write_text(original)
            count_kill(kills, mutant.key, by)
            journal.write(json.dumps({"mutant": mutant.key, "digest": digest(mutant.file), "killer": by}) + "\n")
            journal.flush()
            print(f"{i}/{len(chosen)} {'killed' if by else 'survived: ' + mutant.key}", file=sys.stderr, flush=True)


def digest(file: str) -> str:
    """Return twelve hexadecimal digits of the text of a kernels file, or of all that a pattern names."""
    text = b"".join(path.read_bytes() for path in sorted((ROOT / KERNELS).glob(file)))
    return hashlib.sha256(text).hexdigest()[:12]


def read_journal(out: Path, every: list[Mutant]) -> dict[str, str | None]:
    """Return {key: first failing test} of the mutants of the present files; a later line replaces an earlier one."""
    digests = {file: digest(file) for file in {mutant.file for mutant in every}}
    digests = {mutant.key: digests[mutant.file] for mutant in every} | {UNCHANGED: digest("*.py")}
    lines = map(json.loads, out.read_text().splitlines()) if out.exists() else ()
    return {line["mutant"]: line["killer"] for line in lines if digests.get(line["mutant"]) == line["digest"]}


def read_kills(out: Path) -> dict[str, collections.Counter]:
    """Return {file or function: how many of its mutants each test killed}, also in runs on other versions of the file."""
    kills = collections.defaultdict(collections.Counter)
    for line in map(json.loads, out.read_text().splitlines()) if out.exists() else ():
        count_kill(kills, line["mutant"], line["killer"])
    return kills


def count_kill(kills: dict[str, collections.Counter], key: str, test: str | None) -> None:
    """Count a test that killed a mutant for the mutant's file and for its function."""
    if test and "::" in test:
        file, function, *_ = key.split()
        kills[file][test] += 1
        kills[f"{file} {function}"][test] += 1


def usual_killers(kills: dict[str, collections.Counter], key: str) -> list[str]:
    """Return the tests that killed most mutants of the same function, then those of the same file."""
    file, function, *_ = key.split()
    return [test for place in (f"{file} {function}", file) for test, _ in kills[place].most_common(USUAL)]


def read_equivalent() -> dict[str, str]:
    """Return {key: reason}."""
    return {key: reason for reason, keys in json.loads(EQUIVALENT.read_text()).items() for key in keys}


def report(done: dict[str, str | None], count: int) -> float:
    """Print the outcome; return the kill rate over the mutants that are not equivalent."""
    equivalent = read_equivalent()
    for key in sorted(equivalent.keys() & done.keys()):
        if done[key]:
            print(f"listed as equivalent, but killed by {done[key]}: {key}")
    rated = {key: by for key, by in done.items() if key not in equivalent}
    survivors = [key for key, by in rated.items() if not by]
    print(*(f"survived: {key}" for key in survivors), sep="\n")
    for test, kills in collections.Counter(by for by in rated.values() if by).most_common(20):
        print(f"{kills:5} killed by {test}")
    rate = 1 - len(survivors) / max(1, len(rated))
    print(f"{len(done)} of {count} mutants run: {len(rated) - len(survivors)} killed, {len(survivors)} survived, "
          f"{len(done) - len(rated)} equivalent; kill rate {rate:.1%}")
    return rate


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="journal of finished mutants; a second run continues it")
    parser.add_argument("--only", metavar="FILE", default="*.py", help="a file of tritonattn/kernels, such as window.py")
    parser.add_argument("--sample", type=int, metavar="N", help="a random sample of N mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and of the order")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many minutes")
    parser.add_argument("--again", action="store_true", help="repeat the survivors, after tests were added")
    parser.add_argument("--equivalent", action="store_true", help="run the mutants of equivalent.json, and no others")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    every = [mutant for path in sorted((ROOT / KERNELS).glob(options.only)) for mutant in mutants(path)]
    chosen = random.Random(options.seed).sample(every, min(options.sample or len(every), len(every)))
    if options.list:
        print(*(mutant.key for mutant in every), sep="\n")
        return
    if options.out is None:
        parser.error("--out: expected a file for the results")
    done, equivalent = read_journal(options.out, every), read_equivalent()
    left = [mutant for mutant in chosen if (mutant.key in equivalent) == options.equivalent
            and (mutant.key not in done or (options.again and not done[mutant.key]))]
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # two mutants written within a second would look the same to Python's cache
    if UNCHANGED not in done:
        check_unchanged(options.out)
    if left:
        run_mutants(left, options.out, options.minutes)
    done = read_journal(options.out, every)
    sys.exit(report({key: by for key, by in done.items() if key != UNCHANGED}, len(chosen)) < GOAL)
