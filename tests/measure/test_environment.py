"""What is recorded of a machine identifies it, and the source that ran."""

import json
import shutil
import subprocess

import pytest
import torch

import tritonattn
from tests import COMPILED
from tritonattn.measure import environment


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package outside any repository."""
    shutil.copytree(environment.PACKAGE, tmp_path / "tritonattn", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(environment, "PACKAGE", tmp_path / "tritonattn")
    return tmp_path / "tritonattn"


def test_versions_and_names(device):
    found = environment.environment_of(device)
    assert found["torch"] == torch.__version__ and found["tritonattn"] == tritonattn.__version__
    assert (found["sensors"] is None) == (not COMPILED)
    assert (found["arch"] == "interpreter") == (not COMPILED) and (found["driver"] is None) == (not COMPILED)
    assert json.loads(json.dumps(found)) == found


def edited(path, action):
    """The digest of the source after something is done to a file."""
    action(path)
    return environment.source_digest()


def test_the_source_is_known_wherever_it_lies(package):
    digests = [environment.source_digest()]
    for name in ("kernels/forward.py", "launch.py", "ops.py", "attention.py", "config.py", "timing.py", "clock.py"):
        digests.append(edited(package / name, lambda path: path.write_text(path.read_text() + "# another line\n")))
    digests.append(edited(package / "kernels" / "forward.py", lambda path: path.rename(path.with_name("forwards.py"))))
    assert len(set(digests)) == len(digests) == 9


def test_what_does_not_run_is_no_part_of_the_source(package):
    before = environment.source_digest()
    for name in ("doctor.py", "demo.py", "selftest.py", "__main__.py"):
        assert edited(package / name, lambda path: path.write_text("")) == before
    assert edited(package / "new.py", lambda path: path.write_text("")) == before


def test_files_beside_the_package_that_run_too(package, tmp_path):
    (tmp_path / "rivals.py").write_text("1")
    first = environment.source_digest(tmp_path / "rivals.py")
    (tmp_path / "rivals.py").write_text("2")
    assert len({environment.source_digest(), first, environment.source_digest(tmp_path / "rivals.py")}) == 3


def test_the_commit_is_of_the_packages_own_repository(package, tmp_path):
    assert environment.commit() is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True).stdout

    git("init")
    git("add", "tritonattn")
    git("commit", "-m", "all")
    commit = environment.commit()
    assert git("rev-parse", "HEAD").startswith(commit) and len(commit) == 12
    (tmp_path / "untracked").write_text("")
    assert environment.commit() == commit
    (package / "version.py").write_text("")
    assert environment.commit() == commit + "-dirty"


def test_a_repository_around_it_is_not_its_own(package, tmp_path, monkeypatch):
    subprocess.run(["git", "-C", tmp_path, "init"], check=True, capture_output=True)
    inner = tmp_path / "site-packages" / "tritonattn"
    shutil.copytree(package, inner)
    monkeypatch.setattr(environment, "PACKAGE", inner)
    assert environment.commit() is None


@pytest.mark.parametrize(("name", "folder"), [("NVIDIA H200", "nvidia-h200"), ("CPU, interpreted", "cpu-interpreted"),
                                              ("NVIDIA GeForce RTX 4090 / D", "nvidia-geforce-rtx-4090-d")])
def test_names_as_folders(name, folder):
    assert environment.slug(name) == folder
