"""The recorded environment: versions, the digest of the source, the commit."""

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
    record = environment.environment_of(device)
    assert record["torch"] == torch.__version__ and record["tritonattn"] == tritonattn.__version__
    assert (record["sensors"] is None) == (not COMPILED)
    assert (record["arch"] == "interpreter") == (not COMPILED) and (record["driver"] is None) == (not COMPILED)
    assert json.loads(json.dumps(record)) == record


def edited(path, action):
    """Apply `action` to a file and return the digest of the source."""
    action(path)
    return environment.source_digest()


def test_digest_changes_with_every_file_that_a_measurement_runs(package):
    digests = [environment.source_digest()]
    for name in ("kernels/forward.py", "runtime/launch.py", "runtime/custom_op.py", "attention.py", "config.py",
                 "measure/timing.py", "measure/device_timer.py"):
        digests.append(edited(package / name, lambda path: path.write_text(path.read_text() + "# another line\n")))
    digests.append(edited(package / "kernels" / "forward.py", lambda path: path.rename(path.with_name("forwards.py"))))
    assert len(set(digests)) == len(digests) == 9


def test_digest_ignores_files_that_a_measurement_does_not_run(package):
    before = environment.source_digest()
    for name in ("cli/doctor.py", "cli/demo.py", "cli/selftest.py", "__main__.py"):
        assert edited(package / name, lambda path: path.write_text("")) == before
    assert edited(package / "new.py", lambda path: path.write_text("")) == before


def test_digest_includes_extra_files(package, tmp_path):
    (tmp_path / "extra.py").write_text("1")
    first = environment.source_digest(tmp_path / "extra.py")
    (tmp_path / "extra.py").write_text("2")
    assert len({environment.source_digest(), first, environment.source_digest(tmp_path / "extra.py")}) == 3


def test_commit_is_that_of_the_packages_repository(package, tmp_path):
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
    (package / "__main__.py").write_text("")
    assert environment.commit() == commit + "-dirty"


def test_commit_of_a_surrounding_repository_is_ignored(package, tmp_path, monkeypatch):
    subprocess.run(["git", "-C", tmp_path, "init"], check=True, capture_output=True)
    inner = tmp_path / "site-packages" / "tritonattn"
    shutil.copytree(package, inner)
    monkeypatch.setattr(environment, "PACKAGE", inner)
    assert environment.commit() is None


@pytest.mark.parametrize(("name", "folder"), [("NVIDIA H200", "nvidia-h200"), ("CPU, interpreted", "cpu-interpreted"),
                                              ("NVIDIA GeForce RTX 4090 / D", "nvidia-geforce-rtx-4090-d")])
def test_slug(name, folder):
    assert environment.slug(name) == folder


def test_every_pattern_matches_a_file():
    assert all(list(environment.PACKAGE.glob(pattern)) for pattern in environment.RUNS)
    # the files that choose a config are among them
    assert {"configs/lookup.py", "configs/key.py", "configs/shipped.py", "runtime/*.py"} <= set(environment.RUNS)
