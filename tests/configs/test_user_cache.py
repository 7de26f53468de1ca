"""The user's cache: what is put is got, and nothing that happens to its files reaches a call."""

import dataclasses
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.cpu_speed import slowness
from tritonattn import Config, Problem, gpu
from tritonattn.configs import key as keys
from tritonattn.configs import shipped, user_cache
from tritonattn.configs.user_cache import Cache, Record

H200, H100 = gpu.named("h200"), gpu.named("h100")
KEY = keys.key_of("forward", Problem((4,), 32, 8, 4096, 4096, 128, 128, torch.bfloat16, (None, 0)), H200)
BOARD = "sm_90-132sm-227k-50m-144g"
NAMES = ("A100", "RTX 3090", "A10", "RTX 4090", "L40S", "H100", "H200", "B200", "RTX 5090", "MI300X")


def record_of(key=KEY, on=H200, triton=None, taking=(160 * 1024, 0), time="2026-11-21T15:04:05Z", **changes):
    """A record as a tuner would make it here, on this GPU."""
    static = {"registers": 168, "stack": 0, "shared_memory": taking[0], "tensor_memory": taking[1], "occupancy": 1,
              "bound": "tensor", "cycles": 1234.5}
    record = Record(
        key, "128x64w8s3e1", 0.1 + 0.2, 0.29, 0.32, 30, "128x128w8s2", 0.4, {"o": [0.001, 0.002], "lse": [0.0, 1e-7]}, static,
        shipped.gpu_fingerprint(on) | {"name": on.name},
        {"tritonattn": "0.1.0", "torch": "2.11.0", "triton": triton or user_cache.triton_version(), "cuda": "13.0"},
        user_cache.kernel_hash(), {"id": "a", "time": time, "strategy": "all", "trials": 40, "seconds": 60.5, "seed": 0})
    return dataclasses.replace(record, **changes)


def sealed(content):
    """The content with the digest that it would have if a cache had written it."""
    bare = {name: value for name, value in content.items() if name != "digest"}
    text = json.dumps(bare, sort_keys=True)
    return bare | {"digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def numbered(i):
    """Keys that are not KEY."""
    return dataclasses.replace(KEY, group=100 + i)


@pytest.fixture
def store(tmp_path):
    return Cache(tmp_path)


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def heard():
    """The warnings of a test, all of them."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


# round trips

words = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=12)
times = st.floats(1e-9, 1e3)
sizes = st.integers(1, 512)
some_keys = st.builds(
    keys.Key, words, words, sizes, sizes, st.sampled_from([None, "ieee", "tf32"]),
    st.sampled_from(["full", "causal", "window"]), st.sampled_from([(None, None), (None, 0), (256, 0)]), st.booleans(),
    st.lists(st.text(max_size=9)).map(tuple), st.integers(1, 64), st.none() | st.sampled_from(keys.QUERIES),
    st.sampled_from(keys.KEYS), st.sampled_from(keys.FILL_BUCKETS))
some_configs = st.builds(Config, st.sampled_from([16, 32, 64, 128, 256]), st.sampled_from([16, 32, 64, 128, 256]),
                         st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 9), st.sampled_from([None, 1])).map(str)
some_changes = st.fixed_dictionaries({
    "config": some_configs, "default": some_configs, "seconds": times, "q20": times, "q80": times,
    "samples": st.integers(1, 99), "default_seconds": st.none() | times,
    "check": st.dictionaries(st.text(), st.tuples(times, times).map(list))})


@settings(max_examples=60)
@given(key=some_keys, changes=some_changes)
def test_what_is_put_is_got(key, changes):
    record = record_of(key, **changes)
    with tempfile.TemporaryDirectory() as home:
        store = Cache(Path(home))
        path = store.put(record, H200)
        assert json.loads(path.read_text()) == record.as_json()
        for found in (store, Cache(store.folder)):
            assert found.get(key, H200) == found.hint(key, H200) == record
        assert list(Cache(store.folder).records()) == [(path, record)] and store.verify() == []


def test_a_file_is_where_a_reader_expects_it(store, tmp_path, silent):
    path = store.put(record_of(), H200)
    assert path.parent == tmp_path / "tuned" / "v1" / BOARD
    kernel, digits = path.stem.split("-")
    assert kernel == "forward" and len(digits) == 16 and int(digits, 16) >= 0
    assert files(tmp_path) == [path.relative_to(tmp_path).as_posix()], "and nothing is left beside it"


def test_what_is_put_again_takes_its_place(store, tmp_path):
    store.put(record_of(), H200)
    store.put(record_of(config="64x64w4s2"), H200)
    assert store.get(KEY, H200).config == Cache(tmp_path).get(KEY, H200).config == "64x64w4s2" and len(files(tmp_path)) == 1


@pytest.mark.parametrize("changes, words", [
    ({"seconds": float("nan")}, "JSON"), ({"seconds": 0.0}, "seconds"), ({"config": "7x64w4s2"}, "config"),
    ({"static": {"tensor_memory": 0}}, "shared_memory"), ({"default_seconds": "fast"}, "default_seconds"),
    ({"gpu": shipped.gpu_fingerprint(H100) | {"name": "H100"}}, f"expected one of {BOARD}, got one of sm_90-132sm-227k-50m-80g"),
])
def test_what_could_not_be_read_back_is_refused_at_once(changes, words, store, tmp_path):
    with pytest.raises((ValueError, TypeError, KeyError), match=words):
        store.put(record_of(**changes), H200)
    assert store.get(KEY, H200) is None and files(tmp_path) == []


def test_memory_holds_what_a_file_would(store):
    """Tuples would come back as lists: then at once."""
    store.put(record_of(check={"o": (0.1, 0.2)}), H200)
    assert store.get(KEY, H200).check == {"o": [0.1, 0.2]} == Cache(store.folder).get(KEY, H200).check


def test_misses_are_remembered_until_forget(store, tmp_path):
    assert store.get(KEY, H200) is None
    Cache(tmp_path).put(record_of(), H200)
    assert store.get(KEY, H200) is None
    store.forget()
    assert store.get(KEY, H200) == record_of()


# who may use what

def test_boards_have_folders_of_their_own():
    boards = [user_cache.gpu_dirname(shipped.gpu_fingerprint(gpu.named(name))) for name in NAMES]
    assert len(set(boards)) == len(NAMES) and boards[NAMES.index("H200")] == BOARD


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("left", [1, 0.995, 0.98])
def test_what_drivers_keep_for_themselves_changes_no_folder(name, left):
    model = gpu.named(name)
    device = dataclasses.replace(model, name="any other", l2=model.peaks.l2, memory=int(model.peaks.memory * left))
    assert user_cache.gpu_dirname(shipped.gpu_fingerprint(device)) == user_cache.gpu_dirname(shipped.gpu_fingerprint(model))


def test_what_is_not_known_of_a_board_is_x():
    known = shipped.gpu_fingerprint(dataclasses.replace(H200, name="none that is known"))
    assert user_cache.gpu_dirname(known) == "sm_90-132sm-227k-x-x"


def test_two_boards_of_one_architecture_share_nothing(store, tmp_path):
    store.put(record_of(config="64x64w4s2"), H200)
    store.put(record_of(on=H100, config="128x64w4s2"), H100)
    for each in (store, Cache(tmp_path)):
        assert each.get(KEY, H200).config == "64x64w4s2" and each.get(KEY, H100).config == "128x64w4s2"
        for change in ({"memory": 94 << 30}, {"sms": 114}, {"l2": 60 << 20}, {"arch": "sm_91"}, {"shared_memory": 228 * 1024}):
            assert each.get(KEY, dataclasses.replace(H200, **change)) is None, change


def test_another_minor_version_of_triton_is_a_hint_and_no_more(store, tmp_path):
    major, minor = user_cache.triton_version().split(".")[:2]
    same = [f"{major}.{minor}.99", f"{major}.{minor}.0+git12", f"{major}.{minor}"]
    others = [f"{major}.{int(minor) + 1}.0", f"{int(major) + 1}.{minor}.0", f"{major}.{minor}0.0", "unheard of"]
    for version, stale in [(version, False) for version in same] + [(version, True) for version in others]:
        record = record_of(triton=version)
        assert record.stale is stale, version
        store.put(record, H200)
        for each in (store, Cache(tmp_path)):
            assert each.get(KEY, H200) == (None if stale else record) and each.hint(KEY, H200) == record, version
    unknown = record_of()
    assert dataclasses.replace(unknown, versions=unknown.versions | {"triton": None}).stale


def test_after_an_edit_of_the_kernels_nothing_old_is_found(store, tmp_path, monkeypatch):
    old = record_of()
    path = store.put(old, H200)
    monkeypatch.setattr(user_cache, "kernel_hash", lambda: "0" * 12)
    edited = Cache(tmp_path)
    assert edited.get(KEY, H200) is None and edited.hint(KEY, H200) is None
    new = record_of(config="64x64w4s2")
    assert new.source == "0" * 12 and edited.put(new, H200) != path and edited.get(KEY, H200) == new
    # nor is it found by way of memory
    edited.put(old, H200)
    assert edited.get(KEY, H200) == new and Cache(tmp_path).get(KEY, H200) == new and len(files(tmp_path)) == 2


@pytest.mark.parametrize("taking, fits", [((227 * 1024, 0), True), ((227 * 1024 + 1, 0), False), ((0, 1), False)])
def test_what_does_not_fit_is_not_returned(taking, fits, store, tmp_path):
    record = record_of(taking=taking)
    assert record.fits(H200) is fits
    store.put(record, H200)
    for each in (store, Cache(tmp_path)):
        assert each.get(KEY, H200) == each.hint(KEY, H200) == (record if fits else None)


def test_tensor_memory_fits_where_there_is_some(store):
    b200 = gpu.named("b200")
    store.put(record_of(on=b200, taking=(0, 512)), b200)
    assert store.get(KEY, b200) and store.get(KEY, dataclasses.replace(b200, tensor_memory=256)) is None


# what may be in a file

def check_damaged(path, content, record, store):
    """The right record or a miss, and what is no record is out of the way."""
    path.write_bytes(content)
    store.forget()
    found = store.get(KEY, H200)
    assert found is None or found == record, content
    assert path.exists() or (found is None and path.with_name(path.name + ".bad").read_bytes() == content)
    return found


def test_damage_at_any_byte_gives_the_record_or_a_miss(store, heard):
    record = record_of()
    path = store.put(record, H200)
    whole = path.read_bytes()
    assert len(whole) > 500
    for offset in range(len(whole)):
        right = check_damaged(path, whole[:offset], record, store)
        assert (right is not None) == (whole[offset:] == b"\n"), "torn anywhere but at its last line's end it is none"
    for offset, flip in itertools.product(range(len(whole)), (1, 0x20)):
        torn = whole[:offset] + bytes([whole[offset] ^ flip]) + whole[offset + 1:]
        right = check_damaged(path, torn, record, store)
        # white space, and the sign of an exponent, are not the record's
        assert right is None or torn.split() == whole.split() or json.loads(torn) == json.loads(whole), (offset, flip)
    assert check_damaged(path, whole, record, store) == record
    assert len(heard) == 1 and str(path) in str(heard[0].message), "of one file there is one warning"


@pytest.mark.parametrize("content", [
    b"", b"\0" * 100, b"null", b"[]", b"{}", b"1", b'"a"', b"NaN", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000,
    b"9" * 100_000, b"9" * 4000, b" " * (user_cache.LIMIT + 1), b"\x80\x04N.", b'{"schema": 1}', b'{"schema": true}',
    b'{"schema": 0}', b'{"schema": 1, "digest": 5}', "é\n".encode("utf-16"),
], ids=lambda content: str(content[:12]))
def test_what_is_no_record_is_set_aside_with_one_warning(content, store, heard):
    path = store.put(record_of(), H200)
    path.write_bytes(content)
    store.forget()
    for _ in range(2):
        assert store.get(KEY, H200) is None and store.hint(KEY, H200) is None
        store.forget()
    assert [other.name for other in path.parent.iterdir()] == [path.name + ".bad"]
    assert len(heard) == 1 and f"{path}: expected a tuned config, got" in str(heard[0].message)
    assert store.put(record_of(), H200) == path and Cache(store.folder).get(KEY, H200) == record_of()


def spoiled():
    """Records with something wrong in them, that a digest vouches for."""
    content = record_of().as_json()

    def without(within, name):
        return {other: value for other, value in within.items() if other != name}

    for name in content:
        yield f"{name} left out", without(content, name)
        for value in (None, True, "text", -1, 10**400, [], [[]], {}, {"a": 1}):
            if (name, value) not in (("default_seconds", None), ("check", {}), ("samples", -1), ("samples", 10**400),
                                     ("default", "text")):
                yield f"{name} is {str(value)[:9]}", content | {name: value}
    # of the rest nothing is relied on
    relied_on = {"key": content["key"], "gpu": content["gpu"], "static": ["shared_memory", "tensor_memory"],
                 "versions": ["triton"], "run": ["time"]}
    for name, within in relied_on.items():
        for inner in within:
            yield f"{name}.{inner} left out", content | {name: without(content[name], inner)}
            for value in (1.5, [[]], [1], {"a": 1}):
                yield f"{name}.{inner} is {value}", content | {name: content[name] | {inner: value}}
    yield "more of a record", content | {"more": 1}
    yield "more of a key", content | {"key": content["key"] | {"more": 1}}
    yield "a bool for a number", content | {"key": content["key"] | {"d": True}}
    yield "a kernel that is a path", content | {"key": content["key"] | {"kernel": "../../forward"}}
    yield "a GPU that is a path", content | {"gpu": content["gpu"] | {"arch": "../sm_90"}}
    yield "a time of another form", content | {"run": content["run"] | {"time": "yesterday"}}
    yield "another key", content | {"key": content["key"] | {"group": 3}}
    yield "another GPU", content | {"gpu": content["gpu"] | {"sms": 114}}
    yield "another source", content | {"source": "0" * 12}
    yield "half a check", content | {"check": {"o": [1.0]}}


@pytest.mark.parametrize("content", [pytest.param(content, id=words) for words, content in spoiled()])
def test_a_digest_does_not_vouch_for_what_is_wrong_or_elsewhere(content, store, heard):
    path = store.put(record_of(), H200)
    if "digest" in content and type(content["digest"]) is str and content["digest"] != "text":
        content = sealed(content)
    path.write_text(json.dumps(content))
    store.forget()
    assert store.get(KEY, H200) is None and store.hint(KEY, H200) is None
    # a schema of 10^400 is a later one
    assert len(heard) == 1 and path.exists() == (content.get("schema") == 10**400)


def test_a_record_that_was_changed_by_hand_is_none(store, heard):
    path = store.put(record_of(), H200)
    path.write_text(path.read_text().replace("128x64w8s3e1", "128x64w8s4e1"))
    store.forget()
    assert store.get(KEY, H200) is None and "the record was changed or damaged" in str(heard[0].message)


@pytest.mark.parametrize("text", [
    "128x64w8s3", "128x64w8s3e1", "16x16w1s1", "1024x256w32s10", "", "128x64", "8x16w4s1", "24x16w4s1", "16x16w3s1",
    "16x16w4s0", "16x16w4s1e2", "16x16w4s1e1\n", "016x16w4s1", "\u0661\u0666x16w4s1", " 16x16w4s1", "16x16w4s-1", "16X16w4s1",
])
def test_a_config_is_what_a_config_prints(text):
    try:
        printed = str(Config.parse(text))
    except ValueError:
        printed = None
    content = record_of(config=text).as_json()
    if printed == text:
        assert Record.from_json(content).config == text
    else:
        with pytest.raises(ValueError, match="config: expected the form"):
            Record.from_json(content)


def test_what_a_later_version_wrote_stays_where_it_is(store, heard):
    path = store.put(record_of(), H200)
    path.write_text(json.dumps({"schema": 2, "anything": "else"}))
    before = path.read_bytes()
    for _ in range(2):
        store.forget()
        assert store.get(KEY, H200) is None
    assert path.read_bytes() == before and len(heard) == 1
    assert "expected 1, got 2; a newer tritonattn wrote it" in str(heard[0].message)


def test_a_file_of_another_key_or_gpu_is_foreign(store, tmp_path, heard):
    mine, other = store.put(record_of(), H200), store.put(record_of(numbered(8)), H200)
    theirs = tmp_path / "tuned" / "v1" / "sm_90-132sm-227k-50m-80g" / mine.name
    theirs.parent.mkdir()
    theirs.write_bytes(mine.read_bytes())
    mine.write_bytes(other.read_bytes())
    store.forget()
    assert store.get(KEY, H200) is None and store.get(KEY, H100) is None and store.get(numbered(8), H200)
    assert [str(one.message).count("expected what belongs there") for one in heard] == [1, 1]
    assert sorted(path.name for path in tmp_path.rglob("*.bad")) == [mine.name + ".bad"] * 2


def test_a_folder_or_a_loop_in_place_of_a_file_is_a_miss(store, heard):
    path = store.put(record_of(), H200)
    path.unlink()
    path.mkdir()
    store.forget()
    assert store.get(KEY, H200) is None and len(heard) == 1 and path.is_dir()
    path.rmdir()
    path.symlink_to(path)
    store.forget()
    assert store.get(KEY, H200) is None and len(heard) == 1, "of what cannot be read one warning is enough"


def test_a_file_in_place_of_the_cache_is_a_miss_and_holds_nothing(tmp_path, heard):
    (tmp_path / "home").write_text("mine")
    store = Cache(tmp_path / "home")
    assert store.get(KEY, H200) is None and not heard
    assert store.put(record_of(), H200) is None and store.get(KEY, H200) == record_of() and len(heard) == 1
    assert list(store.records()) == [] and store.verify() == [] and store.clear() == 0
    assert (tmp_path / "home").read_text() == "mine"


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(5, "input/output error"), OSError(116, "stale")])
def test_what_cannot_be_read_is_a_miss_with_one_warning(error, store, monkeypatch, heard):
    for i in range(3):
        store.put(record_of(numbered(i)), H200)
    store.forget()
    monkeypatch.setattr(user_cache, "open", raising(error), raising=False)
    assert [store.get(numbered(i), H200) for i in range(3)] == [None] * 3 and list(store.records()) == []
    assert len(heard) == 1 and error.strerror in str(heard[0].message)
    monkeypatch.undo()
    store.forget()
    assert all(store.get(numbered(i), H200) for i in range(3)), "nothing was set aside"


def raising(error):
    def call(*_, **__):
        raise error
    return call


# homes that take nothing

@pytest.mark.parametrize("where", ["cache.open", "cache.os.replace", "cache.os.fsync", "cache.Path.mkdir"])
@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(28, "no space left")])
def test_where_nothing_can_be_written_memory_holds_it_with_one_warning(where, error, store, tmp_path, monkeypatch, heard):
    monkeypatch.setattr(f"tritonattn.configs.user_{where}", raising(error), raising=False)
    for i in range(3):
        assert store.put(record_of(numbered(i)), H200) is None
        assert store.get(numbered(i), H200) == record_of(numbered(i))
    assert len(heard) == 1 and error.strerror in str(heard[0].message) and files(tmp_path) == []
    assert Cache(tmp_path).put(record_of(), H200) is None and len(heard) == 2, "each cache tells it once"


def test_an_interrupt_leaves_nothing_behind(store, tmp_path, monkeypatch):
    monkeypatch.setattr(user_cache.os, "fsync", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        store.put(record_of(), H200)
    assert files(tmp_path) == []


def test_what_cannot_be_set_aside_is_passed_over_with_one_warning(store, monkeypatch, heard):
    path = store.put(record_of(), H200)
    path.write_text("torn")
    monkeypatch.setattr(user_cache.os, "replace", raising(PermissionError(13, "denied")))
    for _ in range(3):
        store.forget()
        assert store.get(KEY, H200) is None
    assert path.read_text() == "torn" and len(heard) == 1 and "cannot be set aside" in str(heard[0].message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read(store, tmp_path, heard):
    path = store.put(record_of(), H200)
    path.parent.chmod(0o500)
    try:
        assert Cache(tmp_path).get(KEY, H200) == record_of() and not heard
        assert store.put(record_of(numbered(1)), H200) is None and len(heard) == 1
        assert store.get(numbered(1), H200) == record_of(numbered(1))
    finally:
        path.parent.chmod(0o700)


def test_without_a_home_memory_holds_it(heard):
    store = Cache(None)
    assert store.get(KEY, H200) is None and not heard
    for i in range(2):
        assert store.put(record_of(numbered(i)), H200) is None and store.get(numbered(i), H200) == record_of(numbered(i))
    assert len(heard) == 1 and "TRITONATTN_CACHE_DIR" in str(heard[0].message)
    assert list(store.records()) == [] and store.verify() == [] and store.clear() == 0
    assert store.get(numbered(0), H200) is None, "cleared"
    with pytest.raises(FileNotFoundError, match="expected a folder to merge into"):
        store.merge(Path("anything"))


@pytest.mark.parametrize("named, caches, expected", [
    ("/a", "/b", "/a"), (None, "/b", "/b/tritonattn"), ("", "/b", "/b/tritonattn"), (None, None, "/home/me/.cache/tritonattn"),
    (None, "", "/home/me/.cache/tritonattn"), (None, "relative", "/home/me/.cache/tritonattn"),
])
def test_where_the_cache_is(named, caches, expected, monkeypatch):
    for name, value in {"TRITONATTN_CACHE_DIR": named, "XDG_CACHE_HOME": caches}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/home/me")
    assert user_cache.cache_folder() == Path(expected)


def test_a_home_that_cannot_be_found_is_none(monkeypatch):
    monkeypatch.delenv("TRITONATTN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", raising(RuntimeError("Could not determine home directory.")))
    assert user_cache.cache_folder() is None and user_cache.current_cache().folder is None


def test_the_current_cache_follows_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONATTN_CACHE_DIR", str(tmp_path / "a"))
    first = user_cache.current_cache()
    first.put(record_of(), H200)
    assert user_cache.current_cache() is first and first.folder == tmp_path / "a"
    monkeypatch.setenv("TRITONATTN_CACHE_DIR", str(tmp_path / "b"))
    assert user_cache.current_cache().folder == tmp_path / "b" and user_cache.current_cache().get(KEY, H200) is None
    monkeypatch.setenv("TRITONATTN_CACHE_DIR", str(tmp_path / "a"))
    assert user_cache.current_cache() is not first and user_cache.current_cache().get(KEY, H200) == record_of()


# moving and cleaning

def test_what_is_exported_is_merged(store, tmp_path, silent):
    records = {numbered(i): record_of(numbered(i)) for i in range(3)} | {KEY: record_of(on=H100)}
    for record in records.values():
        store.put(record, H100 if record.key == KEY else H200)
    store.export(tmp_path / "out" / "all.json")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["all.json"]
    other = Cache(tmp_path / "other")
    assert other.get(numbered(0), H200) is None
    assert other.merge(tmp_path / "out" / "all.json") == (4, 0)
    assert other.get(numbered(0), H200) == record_of(numbered(0)), "a miss that was remembered is forgotten"
    assert sorted(path.name for path, _ in other.records()) == sorted(path.name for path, _ in store.records())
    assert other.merge(tmp_path / "out" / "all.json") == (0, 4) == other.merge(tmp_path)
    assert Cache(tmp_path / "third").merge(tmp_path) == (4, 0), "a folder is as good"


def test_of_two_records_the_later_wins_unless_its_triton_is_older(store, tmp_path):
    def merged(ours, theirs):
        """What is there after a merge, by its config."""
        store.clear()
        other = Cache(tmp_path / "other")
        for each, record in ((store, ours), (other, theirs)):
            each.put(dataclasses.replace(record, config="16x16w4s1" if each is store else "32x32w4s1"), H200)
        counts = store.merge(other.folder)
        found = store.hint(KEY, H200).config
        assert counts == {"16x16w4s1": (0, 1), "32x32w4s1": (1, 0)}[found]
        return {"16x16w4s1": "ours", "32x32w4s1": "theirs"}[found]

    early, late = "2026-01-31T23:59:59Z", "2026-02-01T00:00:00Z"
    assert merged(record_of(time=early), record_of(time=late)) == "theirs"
    assert merged(record_of(time=late), record_of(time=early)) == "ours"
    assert merged(record_of(time=late), record_of(time=late)) == "ours"
    assert merged(record_of(time=early, triton="3.10.0"), record_of(time=late, triton="3.9.0")) == "ours"
    assert merged(record_of(time=early, triton="3.9.0"), record_of(time=late, triton="3.10.0")) == "theirs"
    assert merged(record_of(time=early, triton="3.9.1"), record_of(time=late, triton="3.9.0")) == "theirs"
    assert merged(record_of(time=early, triton="3.9.1"), record_of(time=late, triton="who knows")) == "ours"


def test_merging_changes_nothing_elsewhere_and_passes_over_what_is_none(store, tmp_path, heard):
    other = Cache(tmp_path / "other")
    other.put(record_of(), H200)
    torn = other.put(record_of(numbered(1)), H200)
    torn.write_text("torn")
    before = files(other.folder)
    assert store.merge(other.folder) == (1, 0) and files(other.folder) == before and torn.read_text() == "torn"
    assert len(heard) == 1 and str(torn) in str(heard[0].message)


@pytest.mark.parametrize("content, words", [
    ("", "JSONDecodeError"), ("[]", "expected an object"), ('{"schema": 1}', "KeyError"), ("[" * 100_000, "RecursionError"),
    ('{"schema": 1, "records": {}}', "records: expected list"), ('{"schema": 1, "records": [{"schema": 1}]}', "KeyError"),
    ('{"schema": 9}', "schema: expected 1, got 9; a newer tritonattn wrote it"),
    ('{"schema": 1, "records": [], "x": 1}', "'x' besides"),
])
def test_an_export_is_whole_or_refused(content, words, store, tmp_path):
    path = tmp_path / "all.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        store.merge(path)
    assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        store.merge(tmp_path / "nowhere")


def test_one_bad_record_of_an_export_spoils_it(store, tmp_path):
    store.put(record_of(), H200)
    store.put(record_of(numbered(1)), H200)
    store.export(tmp_path / "all.json")
    text = (tmp_path / "all.json").read_text()
    (tmp_path / "all.json").write_text(text[::-1].replace("1e3s8w46x821", "1e4s8w46x821", 1)[::-1])
    other = Cache(tmp_path / "other")
    with pytest.raises(ValueError, match="changed or damaged"):
        other.merge(tmp_path / "all.json")
    assert list(other.records()) == []


def test_verify_has_a_line_for_each_file_that_is_of_no_use(store, tmp_path, silent):
    good = store.put(record_of(), H200)
    stale = store.put(record_of(numbered(1), triton="1.0.0"), H200)
    edited = store.put(record_of(numbered(2), source="0" * 12), H200)
    torn, moved = store.put(record_of(numbered(3)), H200), good.with_name("forward-0000000000000000.json")
    torn.write_text("torn")
    moved.write_bytes(good.read_bytes())
    aside = good.with_name("dq-0000000000000000.json.bad")
    aside.touch()
    before = {path: (tmp_path / path).read_bytes() for path in files(tmp_path)}
    lines = store.verify()
    words = {stale: f"expected to be made by Triton {user_cache.triton_version()}, got 1.0.0", torn: "JSONDecodeError",
             edited: f"expected to be made from the kernels {user_cache.kernel_hash()}, got 000000000000",
             moved: f"expected what belongs there, got the record of {BOARD}/{good.name}", aside: "set aside"}
    assert len(lines) == len(words) and all("\n" not in line for line in lines)
    for path, said in words.items():
        assert [line for line in lines if line.startswith(f"{path}: ") and said in line], (path, said, lines)
    assert {path: (tmp_path / path).read_bytes() for path in files(tmp_path)} == before


def test_clear_removes_the_records_of_a_board_and_what_lies_about(store, tmp_path, silent):
    (tmp_path / "mine.json").write_text("of the user")
    for i in range(3):
        store.put(record_of(numbered(i)), H200)
    path = store.put(record_of(on=H100), H100)
    path.with_name(path.name + ".bad").touch()
    path.with_name(f".{path.name}.12-34-56").touch()
    assert store.clear(H200) == 3 and len(files(tmp_path)) == 4
    assert store.get(numbered(0), H200) is None and store.get(KEY, H100) == record_of(on=H100)
    assert store.clear() == 1 and files(tmp_path) == ["mine.json"] and store.get(KEY, H100) is None


# many at a time

EIGHT, EACH = 8, 25


def work(home):
    """Write and read as eight processes at once, each keys of its own and all one key; ends with whatever went wrong."""
    children = []
    for who in range(EIGHT):
        if not (child := os.fork()):
            try:
                toil(Cache(Path(home)), who)
                os._exit(0)
            except BaseException as error:
                print(f"{who}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(statuses))


def toil(store, who):
    warnings.simplefilter("error")
    for i in range(EACH):
        store.put(record_of(numbered(who * EACH + i), samples=who), H200)
        store.put(record_of(samples=who, default=f"of {who} at {i}"), H200)
        store.forget()
        found = store.get(KEY, H200)
        assert found == record_of(samples=found.samples, default=found.default), "a record is whole, whoever wrote it"
        assert store.get(numbered(who * EACH + i), H200).samples == who


def test_many_processes_lose_nothing(tmp_path):
    """They fork in an interpreter of its own, since one takes seconds to start; what they wrote is read in this one."""
    program = f"from tests.configs.test_user_cache import work; work({str(tmp_path)!r})"
    ended = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True,
                           timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = {record.key: record for _, record in Cache(tmp_path).records()}
    last = found.pop(KEY)
    assert last == record_of(samples=last.samples, default=last.default)
    assert {key: record.samples for key, record in found.items()} == {numbered(i): i // EACH for i in range(EIGHT * EACH)}
    assert len(files(tmp_path)) == len(found) + 1, "nothing is left beside them"


def test_many_threads_see_what_they_have_put(store, silent):
    wrong, together = [], threading.Barrier(8)

    def toil(who):
        together.wait()
        try:
            for i in range(20):
                mine = record_of(numbered(who), samples=i + 1)
                store.put(mine, H200)
                store.put(record_of(samples=i + 1), H200)
                if i % 5 == who % 5:
                    store.forget()
                assert store.get(mine.key, H200) == mine and store.get(KEY, H200).config == mine.config
        except BaseException as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=toil, args=(who,)) for who in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and len(list(store.records())) == 9


@pytest.mark.parametrize("meanwhile", ["put", "forget"])
def test_what_was_read_before_hides_nothing_that_came_after(meanwhile, store, tmp_path, monkeypatch):
    """Between the look at a file and the memory of it, another thread is done with all of its work."""
    attempt = user_cache._attempt

    def slow(path):
        found = attempt(path)
        monkeypatch.setattr(user_cache, "_attempt", attempt)
        (store if meanwhile == "put" else Cache(tmp_path)).put(record_of(), H200)
        if meanwhile == "forget":
            store.forget()
        return found

    monkeypatch.setattr(user_cache, "_attempt", slow)
    store.get(KEY, H200)
    assert store.get(KEY, H200) == record_of()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_reads_though_a_thread_held_the_lock_at_the_fork(store):
    store.put(record_of(), H200)
    store.forget()
    held, done = threading.Event(), threading.Event()

    def hold():
        with user_cache._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        if not (child := os.fork()):
            # a child that waits for the lock is ended by this
            signal.alarm(20)
            os._exit(0 if store.get(KEY, H200) == record_of() and user_cache.current_cache() else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        thread.join()
    assert store.get(KEY, H200) == record_of()


@pytest.mark.parametrize("there", [True, False])
def test_a_second_look_takes_no_time(there, store):
    if there:
        store.put(record_of(), H200)
    assert (store.get(KEY, H200) is not None) is there
    seconds = timeit.repeat("get(key, gpu)", globals={"get": store.get, "key": KEY, "gpu": H200}, number=1000, repeat=200,
                            timer=time.thread_time)
    assert min(seconds) / 1000 < 3e-6 * slowness()
