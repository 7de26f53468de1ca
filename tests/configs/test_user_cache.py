"""The user cache: records survive round trips and concurrent use, and no file can break a call."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonattn import Config, Problem, gpu
from tritonattn.configs import key as keys
from tritonattn.configs import shipped, user_cache
from tritonattn.configs.user_cache import Cache, Record

H200, H100 = gpu.named("h200"), gpu.named("h100")
KEY = keys.key_of("forward", Problem((4,), 32, 8, 4096, 4096, 128, 128, torch.bfloat16, (None, 0)), H200)
DIRNAME = "sm_90-132sm-227k-60m-144g"
NAMES = ("A100", "RTX 3090", "A10", "RTX 4090", "L40S", "H100", "H200", "B200", "RTX 5090", "MI300X")
SMALL = Config(64, 64, 4, 2)


def record_of(key=KEY, on=H200, triton=None, memory=(160 * 1024, 0), **changes):
    """A record as the tuner makes it on this machine for a GPU; `memory` is (shared, tensor)."""
    static = {"registers": 168, "stack": 0, "shared_memory": memory[0], "tensor_memory": memory[1], "occupancy": 1,
              "bound": "tensor", "cycles": 1234.5}
    record = Record(
        key, Config(128, 64, 8, 3, 1), 0.1 + 0.2, 30, True, 1485.0, Config(128, 128, 8, 2), 0.4,
        {"o": [0.001, 0.002], "lse": [0.0, 1e-7]}, static, shipped.gpu_fingerprint(on) | {"name": on.name},
        {"tritonattn": "0.1.0", "torch": "2.11.0", "triton": triton or user_cache.triton_version(), "cuda": "13.0"},
        user_cache.kernel_hash(),
        {"time": "2026-11-21T15:04:05Z", "strategy": "all", "trials": 40, "seconds": 60.5, "seed": 0})
    return dataclasses.replace(record, **changes)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def numbered(i):
    """A key other than KEY."""
    return f"{KEY} {i}"


@pytest.fixture
def store(tmp_path):
    return Cache(tmp_path)


@pytest.fixture
def caught():
    """The list of the warnings of a test."""
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        yield messages


# round trips

times = st.floats(1e-9, 1e3)
some_keys = st.builds("{} {}".format, st.sampled_from(["forward", "dq"]), st.text(max_size=9))
some_configs = st.builds(Config, st.sampled_from([16, 32, 64, 128, 256]), st.sampled_from([16, 32, 64, 128, 256]),
                         st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 9), st.sampled_from([None, 1]))
some_changes = st.fixed_dictionaries({
    "config": some_configs, "default": some_configs, "seconds": times,
    "samples": st.integers(1, 99), "default_seconds": st.none() | times,
    "check": st.dictionaries(st.text(), st.tuples(times, times).map(list))})


@settings(max_examples=60)
@given(key=some_keys, changes=some_changes)
def test_a_record_survives_the_round_trip(key, changes):
    record = record_of(key, **changes)
    with tempfile.TemporaryDirectory() as home:
        store = Cache(Path(home))
        path = store.put(record)
        assert json.loads(path.read_text()) == record.as_json()
        for cache in (store, Cache(store.folder)):
            assert cache.get(key, H200) == record
        assert list(Cache(store.folder).records()) == [(path, record)]


def test_a_record_has_one_file_and_a_new_one_replaces_it(store, tmp_path, caught):
    path = store.put(record_of())
    assert path.parent == tmp_path / "tuned" / "v4" / DIRNAME
    kernel, digits = path.stem.split("-")
    assert kernel == "forward" and len(digits) == 16 and int(digits, 16) >= 0
    assert store.put(record_of(config=SMALL)) == path
    assert store.get(KEY, H200).config == Cache(tmp_path).get(KEY, H200).config == SMALL
    assert files(tmp_path) == [path.relative_to(tmp_path).as_posix()] and not caught


@pytest.mark.parametrize("name", ["seconds", "default_seconds"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_time_that_is_not_positive_and_finite_is_rejected(name, value):
    with pytest.raises(ValueError, match=f"expected a positive time for {name}"):
        record_of(**{name: value})


@pytest.mark.parametrize("changes, words", [
    ({"seconds": "fast"}, "for seconds, got 'fast'"), ({"default_seconds": "slow"}, "for default_seconds"),
    ({"samples": "many"}, "int'> for samples, got 'many'"), ({"key": 3}, "for key"), ({"run": []}, "for run"),
    ({"clock": "fast"}, "for clock"), ({"sustained": 3}, "for sustained"),
    ({"run": {}}, "for run.time"), ({"run": {"time": "", "tried": 3}}, "for run.tried"),
    ({"static": {"registers": 3}}, "for static.shared_memory"),
], ids=str)
def test_a_value_of_another_type_is_rejected_when_the_record_is_made(changes, words):
    with pytest.raises(TypeError, match=f"record: expected .*{words}"):
        record_of(**changes)


def test_nan_is_not_stored(store):
    with pytest.raises(ValueError, match="JSON"):
        store.put(record_of(check={"o": [float("nan"), 0.2]}))
    assert files(store.folder) == []


# which records apply

def test_each_model_of_gpu_has_its_own_folder():
    names = [user_cache.gpu_dirname(shipped.gpu_fingerprint(gpu.named(name))) for name in NAMES]
    assert len(set(names)) == len(NAMES) and names[NAMES.index("H200")] == DIRNAME


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [1, 0.995, 0.98])
def test_memory_reserved_by_drivers_does_not_change_the_folder(name, share):
    model = gpu.named(name)
    device = dataclasses.replace(model, name="any other", l2=model.peaks.l2, memory=int(model.peaks.memory * share))
    assert user_cache.gpu_dirname(shipped.gpu_fingerprint(device)) == user_cache.gpu_dirname(shipped.gpu_fingerprint(model))


def test_unknown_sizes_are_0_in_the_folder_name():
    unknown = shipped.gpu_fingerprint(dataclasses.replace(H200, name="unknown"))
    assert user_cache.gpu_dirname(unknown) == "sm_90-132sm-227k-0m-0g"


def test_records_of_another_gpu_are_not_used(store, tmp_path):
    store.put(record_of(config=SMALL))
    store.put(record_of(on=H100, config=Config(128, 64, 4, 2)))
    for cache in (store, Cache(tmp_path)):
        assert cache.get(KEY, H200).config == SMALL and cache.get(KEY, H100).config == Config(128, 64, 4, 2)
        for change in ({"memory": 94 << 30}, {"sms": 114}, {"l2": 50 << 20}, {"arch": "sm_91"}, {"shared_memory": 228 * 1024}):
            assert cache.get(KEY, dataclasses.replace(H200, **change)) is None, change


def test_records_of_another_minor_version_of_triton_are_not_used(store, tmp_path):
    major, minor = user_cache.triton_version().split(".")[:2]
    same = [f"{major}.{minor}.99", f"{major}.{minor}.0+git12", f"{major}.{minor}"]
    others = [f"{major}.{int(minor) + 1}.0", f"{int(major) + 1}.{minor}.0", f"{major}.{minor}0.0", "unknown"]
    for version in same + others:
        store.clear()
        record = record_of(triton=version)
        path = store.put(record)
        assert record.is_current == (version in same)
        for cache in (store, Cache(tmp_path)):
            assert cache.get(KEY, H200) == (record if version in same else None), version
            assert list(cache.records()) == [(path, record)]


def test_records_of_other_kernels_are_not_used(store, tmp_path, monkeypatch):
    old = record_of()
    path = store.put(old)
    monkeypatch.setattr(user_cache, "kernel_hash", lambda: "0" * 12)
    for cache in (store, Cache(tmp_path)):
        assert cache.get(KEY, H200) is None
    new = record_of(config=SMALL)
    assert new.kernel_hash == "0" * 12 and store.put(new) != path and new.is_current and not old.is_current
    store.put(old)
    assert store.get(KEY, H200) == Cache(tmp_path).get(KEY, H200) == new and len(files(tmp_path)) == 2


# damaged and foreign files

def test_a_file_cut_anywhere_is_ignored_with_a_warning(store, tmp_path, caught):
    path = store.put(record_of())
    content, reader = path.read_bytes(), Cache(tmp_path)
    for end in range(len(content) - 1):
        path.write_bytes(content[:end])
        assert reader.get(KEY, H200) is None, end
    assert len(caught) == len(content) - 1 and f"{path}: not a valid tuned config, ignored" in str(caught[0].message)
    path.write_bytes(content)
    assert reader.get(KEY, H200) == record_of()


def test_a_flipped_byte_never_raises(store, tmp_path, caught):
    path = store.put(record_of())
    content, reader = path.read_bytes(), Cache(tmp_path)
    for offset in range(len(content)):
        for bit in (1, 0x20, 0x80):
            path.write_bytes(content[:offset] + bytes([content[offset] ^ bit]) + content[offset + 1:])
            record = reader.get(KEY, H200)
            assert record is None or (isinstance(record.config, Config) and record.key == KEY)
    assert len(caught) > len(content)


@pytest.mark.parametrize("content", [
    b"", b"\0" * 100, b"null", b"[]", b"{}", b"1", b'"a"', b"NaN", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000,
    b"9" * 100_000, b" " * 100, b"\x80\x04N.", b'{"key": 3}', "é\n".encode("utf-16"),
], ids=lambda content: str(content[:12]))
def test_a_foreign_file_is_ignored_with_a_warning_and_replaced(content, store, tmp_path, caught):
    path = store.put(record_of())
    path.write_bytes(content)
    reader = Cache(tmp_path)
    assert reader.get(KEY, H200) is None and list(reader.records()) == []
    assert len(caught) == 2 and path.read_bytes() == content
    assert reader.put(record_of()) == path and Cache(tmp_path).get(KEY, H200) == record_of()


def spoiled():
    """(what is wrong, content) of records with one wrong value."""
    content = record_of().as_json()

    def without(mapping, name):
        return {other: value for other, value in mapping.items() if other != name}

    for name in content:
        yield f"no {name}", without(content, name)
    for name in ("key", "config", "seconds", "samples", "default", "check", "static", "gpu", "versions",
                 "kernel_hash", "run"):
        for value in (None, "text", [], [[]], {"a": 1}):
            if (name, value) not in [("check", {"a": 1}), ("static", {"a": 1}), ("run", {"a": 1})]:
                yield f"{name} is {value}", content | {name: value}
    for inner in shipped.gpu_fingerprint(H200):
        yield f"no gpu.{inner}", content | {"gpu": without(content["gpu"], inner)}
        for value in (1.5, [[]], {"a": 1}):
            yield f"gpu.{inner} is {value}", content | {"gpu": content["gpu"] | {inner: value}}
    for value in (1.5, [[]], {"a": 1}):
        yield f"triton is {value}", content | {"versions": {"triton": value}}
    yield "unknown field", content | {"more": 1}
    yield "another key", content | {"key": content["key"] + " more"}
    yield "another GPU", content | {"gpu": content["gpu"] | {"sms": 114}}
    yield "other kernels", content | {"kernel_hash": "0" * 12}
    yield "another Triton", content | {"versions": {"triton": "0.1.0"}}


def test_a_record_with_one_wrong_value_is_ignored_with_a_warning(store, tmp_path):
    path = store.put(record_of())
    for words, content in spoiled():
        path.write_text(json.dumps(content))
        reader = Cache(tmp_path)
        with pytest.warns(UserWarning, match="not a valid tuned config, ignored"):
            assert reader.get(KEY, H200) is None, words


def test_files_of_older_schemas_are_not_read(store, tmp_path, caught):
    path = tmp_path / "tuned" / "v2" / DIRNAME / "forward-0123456789abcdef.json"
    path.parent.mkdir(parents=True)
    path.write_text("any")
    assert list(store.records()) == [] and not caught


# no home, no permission, no room

def raising(error):
    def function(*_, **__):
        raise error
    return function


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "open"])
@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(28, "No space left on device")], ids=str)
def test_memory_alone_holds_a_record_that_cannot_be_written(function, error, store, tmp_path, monkeypatch, caught):
    monkeypatch.setattr(f"tritonattn.configs.shipped.{function}", raising(error), raising=False)
    for i in range(3):
        assert store.put(record_of(numbered(i))) is None
        assert store.get(numbered(i), H200) == record_of(numbered(i))
    assert len(caught) == 3 and error.strerror in str(caught[0].message) and files(tmp_path) == []


def test_an_interrupted_write_leaves_nothing_behind(store, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped.os, "fsync", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        store.put(record_of())
    assert files(tmp_path) == []


def test_a_kill_before_the_rename_leaves_the_old_record(store, tmp_path):
    store.put(record_of())
    program = ("import os; from tests.configs.test_user_cache import *; from tritonattn.configs import shipped; "
               "shipped.os.replace = lambda *_: os._exit(9); "
               f"Cache(Path({str(tmp_path)!r})).put(record_of(config=SMALL))")
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 9
    assert len(files(tmp_path)) == 2 and Cache(tmp_path).get(KEY, H200) == record_of()
    assert Cache(tmp_path).clear() == 2 and files(tmp_path) == [], "clear removes the partial file too"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write to read-only folders")
def test_a_read_only_folder_is_read(store, tmp_path, caught):
    path = store.put(record_of())
    path.parent.chmod(0o500)
    try:
        reader = Cache(tmp_path)
        assert reader.get(KEY, H200) == record_of() and not caught
        assert reader.put(record_of(numbered(1))) is None and len(caught) == 1
        assert reader.get(numbered(1), H200) == record_of(numbered(1))
    finally:
        path.parent.chmod(0o700)


def test_without_a_home_memory_alone_holds_records(caught):
    store = Cache(None)
    assert store.get(KEY, H200) is None and not caught
    for i in range(2):
        assert store.put(record_of(numbered(i))) is None and store.get(numbered(i), H200) == record_of(numbered(i))
    assert len(caught) == 2 and "TRITONATTN_CACHE_DIR" in str(caught[0].message)
    assert list(store.records()) == [] and store.clear() == 0 and store.get(numbered(0), H200) is None


@pytest.mark.parametrize("named, caches, expected", [
    ("/a", "/b", "/a"), (None, "/b", "/b/tritonattn"), ("", "/b", "/b/tritonattn"), (None, None, "/home/me/.cache/tritonattn"),
    (None, "", "/home/me/.cache/tritonattn"), (None, "relative", "/home/me/.cache/tritonattn"),
])
def test_the_folder_follows_the_environment(named, caches, expected, monkeypatch):
    for name, value in {"TRITONATTN_CACHE_DIR": named, "XDG_CACHE_HOME": caches}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/home/me")
    assert user_cache.cache_folder() == Path(expected)


def test_an_unknown_home_is_none(monkeypatch):
    monkeypatch.delenv("TRITONATTN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", raising(RuntimeError("Could not determine home directory.")))
    assert user_cache.cache_folder() is None and user_cache.current_cache().folder is None


def test_the_current_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONATTN_CACHE_DIR", str(tmp_path / "a"))
    first = user_cache.current_cache()
    first.put(record_of())
    assert user_cache.current_cache() is first and first.folder == tmp_path / "a"
    monkeypatch.setenv("TRITONATTN_CACHE_DIR", str(tmp_path / "b"))
    assert user_cache.current_cache().folder == tmp_path / "b" and user_cache.current_cache().get(KEY, H200) is None


def test_clear_removes_the_files_of_the_cache_alone(store, tmp_path):
    (tmp_path / "mine.json").write_text("of the user")
    (tmp_path / "tuned" / "v1" / DIRNAME).mkdir(parents=True)
    (tmp_path / "tuned" / "v1" / DIRNAME / "forward-0123456789abcdef.json.bad").write_text("old")
    store.put(record_of())
    store.put(record_of(on=H100))
    assert store.clear() == 3 and files(tmp_path) == ["mine.json"]
    assert store.get(KEY, H200) is None and store.get(KEY, H100) is None


# concurrent use

PROCESSES, KEYS_EACH = 8, 25


def fork_writers(home):
    """Write and read in eight processes at once: some keys of their own and one common key."""
    children = []
    for number in range(PROCESSES):
        if not (child := os.fork()):
            try:
                write_and_read(Path(home), number)
                os._exit(0)
            except BaseException as error:
                print(f"{number}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(statuses))


def write_and_read(home, number):
    warnings.simplefilter("error")
    store = Cache(home)
    for i in range(KEYS_EACH):
        store.put(record_of(numbered(number * KEYS_EACH + i), samples=number))
        store.put(record_of(samples=number, seconds=i + 1.0))
        common = Cache(home).get(KEY, H200)
        assert common == record_of(samples=common.samples, seconds=common.seconds), "a mixture of two records"
        assert Cache(home).get(numbered(number * KEYS_EACH + i), H200).samples == number


def test_concurrent_processes_lose_no_record(tmp_path):
    """The writers fork from one process, because each import of torch takes seconds."""
    program = f"from tests.configs.test_user_cache import fork_writers; fork_writers({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True,
                         timeout=120)
    assert run.returncode == 0, run.stderr
    records = {record.key: record for _, record in Cache(tmp_path).records()}
    common = records.pop(KEY)
    assert common == record_of(samples=common.samples, seconds=common.seconds)
    assert {key: record.samples for key, record in records.items()} == {
        numbered(i): i // KEYS_EACH for i in range(PROCESSES * KEYS_EACH)}
    assert len(files(tmp_path)) == len(records) + 1, "a partial file was left"


def test_concurrent_threads_read_their_own_writes(store, caught):
    errors, barrier = [], threading.Barrier(8)

    def work(number):
        barrier.wait()
        try:
            for i in range(20):
                record = record_of(numbered(number), samples=i + 1)
                store.put(record)
                store.put(record_of(samples=i + 1))
                assert store.get(record.key, H200) == record and store.get(KEY, H200).config == record.config
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors and not caught and len(list(store.records())) == 9
