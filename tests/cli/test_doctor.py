"""The doctor reports planted problems with a fix, and writes nothing."""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
import triton

from tritonattn.cli import doctor
from tritonattn.cli.main import main


@pytest.fixture(autouse=True)
def healthy(monkeypatch, tmp_path):
    """A machine without a GPU and without problems, whatever this one is."""
    monkeypatch.setattr(doctor, "compiles", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(numpy, "__version__", "2.3.5")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    declare(monkeypatch)


def declare(monkeypatch, *requirements):
    """Set the requirements in torch's metadata."""
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["filelock", *requirements])


def found(name):
    return next(finding for finding in doctor.findings() if finding.name == name)


def old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")


def old_triton(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.5.1")


def other_triton_than_pinned(monkeypatch):
    declare(monkeypatch, 'triton==3.7.1; platform_system == "Linux"')


def no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)


def no_numpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)


def new_numpy(monkeypatch):
    monkeypatch.setattr(numpy, "__version__", "2.4.0")


def unwritable_cache(monkeypatch):
    monkeypatch.setattr(doctor, "compiles", lambda: True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)


def full_disk(monkeypatch):
    monkeypatch.setattr(doctor, "compiles", lambda: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))


def test_machine_without_problems(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nOK\n") and "fix" not in out


@pytest.mark.parametrize("plant, names, fix", [
    (old_torch, ["torch"], "pip install --upgrade 'torch>=2.11'"),
    (old_triton, ["triton"], "pip install 'triton>=3.6'"),
    (other_triton_than_pinned, ["triton"], "pip install 'triton==3.7.1'"),
    (no_triton, ["triton", "interpreter"], "pip install 'triton>=3.6'"),
    (no_numpy, ["interpreter"], "pip install numpy"),
    (new_numpy, ["interpreter"], "pip install 'numpy<2.4'"),
    (unwritable_cache, ["cache"], "set TRITON_CACHE_DIR"),
    (full_disk, ["cache"], "set TRITON_CACHE_DIR"),
])
def test_problem_is_bad_and_has_a_fix(monkeypatch, capsys, plant, names, fix):
    plant(monkeypatch)
    bad = [finding for finding in doctor.findings() if finding.status == "bad"]
    assert [finding.name for finding in bad] == names
    assert bad[0].fix.startswith(fix)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"fix: {fix}" in out and out.endswith(f"problems: {', '.join(names)}\n")


@pytest.mark.parametrize("requirement, pin", [
    ('triton==3.7.1; platform_system == "Linux"', "triton==3.7.1"),
    ('triton~=3.9.0; platform_system == "Linux" and python_version < "3.16"', "triton~=3.9.0"),
    ('triton (==3.6.0) ; platform_system == "Linux"', "triton==3.6.0"),
    ('triton-rocm==3.6.0; platform_system == "Linux"', "triton-rocm==3.6.0"),
    ('triton==3.5.1; platform_system == "Linux"', None),  # a torch that is too old itself
    ("tritonclient==2.0.0", None),
])
def test_pinned_triton_is_read_from_torchs_metadata(monkeypatch, requirement, pin):
    declare(monkeypatch, requirement)
    assert doctor.pinned_by_torch() == pin


def test_torch_without_metadata_pins_nothing(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert doctor.pinned_by_torch() is None and found("triton").status == "ok"


def test_patch_release_of_triton_is_ignored(monkeypatch):
    declare(monkeypatch, 'triton==3.7.1; platform_system == "Linux"')
    monkeypatch.setattr(triton, "__version__", "3.7.0+git1234")
    assert found("triton").status == "ok"


def test_interpreter_problem_is_a_note_with_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "compiles", lambda: True)
    new_numpy(monkeypatch)
    assert found("interpreter").status == "note" and found("interpreter").fix


def test_cache_problem_is_a_note_without_a_gpu(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert found("cache").status == "note" and found("cache").fix


def test_gpus_are_listed_by_model(monkeypatch):
    monkeypatch.setattr(doctor, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(doctor.gpu, "gpu_of", lambda device: doctor.gpu.KNOWN["sm_90"])
    assert found("gpu") == doctor.Finding("gpu", "2 x H200, sm_90, 227 KiB of shared memory")


def test_nothing_is_written(tmp_path):
    assert "not created yet" in found("cache").value
    assert list(tmp_path.iterdir()) == []


def test_cache_folder_follows_triton_home(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert found("cache").value.startswith(str(tmp_path / ".triton" / "cache"))


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [set(entry) for entry in listed] == [{"name", "value", "status", "fix"}] * len(listed)
    names = [entry["name"] for entry in listed]
    assert names[:5] == ["python", "tritonattn", "torch", "triton", "numpy"] and {"gpu", "interpreter", "cache"} <= {*names}


@pytest.fixture
def gpu_of_arch(monkeypatch):
    """Return a function from an architecture to the findings on a machine with one GPU of it."""
    def findings(arch):
        monkeypatch.setattr(doctor, "compiles", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(doctor.gpu, "gpu_of", lambda device: SimpleNamespace(arch=arch))
        return {finding.name: finding for finding in doctor.of_compilers()}

    return findings


@pytest.mark.parametrize("version, status", [("12.8", "note"), ("13.2", "note"), ("13.3", "ok"), ("14.0", "ok")])
def test_an_old_ptxas_is_noted_on_hopper_alone(monkeypatch, gpu_of_arch, version, status):
    monkeypatch.setattr("triton.backends.nvidia.compiler.get_ptxas", lambda arch: SimpleNamespace(version=version))
    finding = gpu_of_arch("sm_90")["ptxas"]
    assert finding.status == status and finding.value.startswith(version) and bool(finding.fix) == (status == "note")
    assert "ptxas" not in gpu_of_arch("sm_80")


@pytest.mark.parametrize("version, bad", [("3.6.0", True), ("3.7.0", True), ("3.7.1", False), ("3.8.0", False)])
def test_missing_fences_are_bad_on_blackwell_alone(monkeypatch, gpu_of_arch, version, bad):
    monkeypatch.setattr(triton, "__version__", version)
    for arch in ("sm_100", "sm_103"):
        finding = gpu_of_arch(arch).get("fences")
        assert (finding is not None and finding.status == "bad" and "3.7.1" in finding.fix) == bad
    assert "fences" not in gpu_of_arch("sm_90") and "fences" not in gpu_of_arch("sm_120")


@pytest.mark.parametrize("cc, installed, headers, value", [
    (None, ["gcc", "clang"], True, "/bin/gcc"), (None, ["clang"], True, "/bin/clang"), ("zig cc", ["zig"], True, "/bin/zig"),
    (None, [], True, "none found"), ("icc", ["gcc"], True, "none found"), (None, ["gcc"], False, "Python.h is missing"),
])
def test_the_c_compiler_is_triton_s_choice(monkeypatch, tmp_path, cc, installed, headers, value):
    monkeypatch.delenv("CC")
    if cc:
        monkeypatch.setenv("CC", cc)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in installed else None)
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(doctor.sysconfig, "get_default_scheme", lambda: "posix_local")
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda scheme: {"posix_prefix": {"include": str(tmp_path)}}[scheme])
    finding = doctor.of_c_compiler()
    assert value in finding.value and (finding.status == "bad") == (not value.startswith("/bin")) == bool(finding.fix)
