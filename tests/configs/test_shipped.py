"""Shipped tables: the files of the package, and files that are not tables."""

import dataclasses
import re

import pytest

from perf import config_table
from tests.helpers.shipped_rows import versions
from tritonattn import Config, gpu
from tritonattn.configs import lookup, shipped
from tritonattn.configs.kernel_hash import kernel_hash
from tritonattn.configs.shipped import FILLS, Entry, Row, Table, TableError
from tritonattn.measure import environment

ENTRY = Entry(Config(64, 64), "static-model", 200, 70000, 0, 2, "tensor")
FAULTY = Entry(Config(16, 16, 4, 1), "measured", 255, 70000, 0, 1, "issue", "spill: 3 in the loop")
ROW = Row("forward", 2, 64, "full", ENTRY, FAULTY, {"128x64w4s2": "spill"})
TABLE = Table("any", {"name": "Any", "arch": "sm_90", "sms": 132, "shared_memory": 232448, "l2": None, "memory": None},
              {"triton": "3.6.0"}, {ROW.key: ROW})
TABLES = pytest.mark.parametrize("table", shipped.shipped_tables(), ids=lambda table: table.name)


@TABLES
def test_a_shipped_table_is_complete_and_fits_its_gpu(table):
    on = next(known for known in gpu.KNOWN.values() if known.name == table.gpu["name"])
    assert table.matches(on) and table.name == environment.slug(on.name)
    assert list(table.rows) == list(config_table.row_keys_of(on))
    for row in table.rows.values():
        for entry in (row.filled, row.underfilled):
            assert entry.source in shipped.SOURCES and entry.fits(on), (row.key, entry)
            assert entry.bound and entry.occupancy > 0
            # a table that was updated, not built, knows the figures of its checked rows only
            checked = on.name == "H200" or (row.itemsize == 2 and row.width in config_table.CHECKED_WIDTHS)
            unknown = entry.registers is None and not checked
            assert unknown or 0 < entry.registers <= 512, (row.key, entry)
            assert max(entry.config.block_m, entry.config.block_n) <= 128, "larger than the tiles of a block mask"
            assert entry.config.num_stages > 1 or entry.config.edge_stages is None, "edge_stages without a pipeline"
            assert "race" not in entry.accepted_fault, (row.key, entry)
            excused = row.itemsize == 4 or row.width > 128 or row.mask in ("pairs", "window", "softcap")
            assert not entry.accepted_fault or excused or on.shared_memory == 99 << 10, (row.key, entry)


@TABLES
def test_the_usual_rows_have_no_fault_but_light_spills_with_99_kib_of_shared_memory(table):
    usual = [row for row in table.rows.values() if row.itemsize == 2 and row.width <= 128 and row.mask != "pairs"]
    for row in usual:
        for fault in filter(None, "; ".join([row.filled.accepted_fault, row.underfilled.accepted_fault]).split("; ")):
            match = re.fullmatch(r"spill: (\d+) in the loop(, with a map|, with whole tiles)?", fault)
            light = match and int(match[1]) <= config_table.LIGHT_SPILLS
            assert light and (match[2] or row.width == 96 or row.mask in ("window", "softcap")), (row.key, fault)


def test_no_tile_has_too_few_queries_for_the_tensor_cores():
    """A Hopper or Blackwell product has 64 rows; each of AMD's four waves has 16, or repeats another wave's work.

    Heads of 512 are too wide for so many keys in dK/dV on Hopper and Blackwell, and for dbias on Blackwell.
    """
    too_wide = {("sm_90", "dkdv", 512), ("sm_100", "dkdv", 512), ("sm_100", "dbias", 512)}
    for table in shipped.shipped_tables():
        arch = table.gpu["arch"]
        for row in table.rows.values() if arch in ("sm_90", "sm_100", "gfx942") else ():
            configs = [getattr(row, fill).config for fill in FILLS]
            owned = [config.block_n if row.kernel == "dkdv" else config.block_m for config in configs]
            assert row.itemsize == 4 or (min(owned) >= 64) != ((arch, row.kernel, row.width) in too_wide), row


def test_all_tables_were_made_with_the_same_versions_of_triton():
    """A table that was updated after an edit of the kernels has no second version."""
    assert len(versions("triton")) == 1 and None not in versions("triton")
    assert len(versions("second_triton")) == 1


def test_every_known_architecture_has_a_table():
    assert sorted(table.gpu["arch"] for table in shipped.shipped_tables()) == sorted(gpu.KNOWN)


def test_the_tables_belong_to_the_current_kernels():
    stale = [table.name for table in shipped.shipped_tables() if table.provenance["kernel_hash"] != kernel_hash()]
    assert not stale, (
        f"the kernels have changed since the tables {', '.join(stale)} were made. If the binaries are the same, run "
        f"`python -m perf.config_table {' '.join(stale)} --restamp`, which checks that; otherwise rebuild the tables with "
        f"`python -m perf.config_table {' '.join(stale)} --also PYTHON`")


def test_a_table_survives_the_round_trip(tmp_path):
    path = shipped.write_table(TABLE, tmp_path)
    assert path == tmp_path / "any.json" and shipped.read_table(path) == TABLE and list(tmp_path.iterdir()) == [path]
    assert len(path.read_text().splitlines()) == 2 + len(TABLE.rows) + 1, "a row a line"


@pytest.mark.parametrize("content, words", [
    ("", "JSONDecodeError"), ("[]", "TypeError"), ("{}", "KeyError"), ('{"schema": 99}', "expected schema 2, got 99"),
    ('{"schema": 1}', "expected schema 2, got 1"),
    ('{"schema": 2, "gpu": {}, "provenance": {}, "rows": [{"kernel": "forward"}]}', "KeyError"),
    ('{"schema": 2, "gpu": {}, "provenance": {}, "rows": [{"filled": {"config": "x"}, "underfilled": {}}]}', "ValueError"),
    ('{"schema": 2, "gpu": {}, "provenance": {}, "rows": [{"filled": {"config": "16x16w4s1"}, "underfilled": {}}]}',
     "TypeError"),
])
def test_a_file_that_is_not_a_table_is_an_error(content, words, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(TableError, match=words):
        shipped.read_table(path)


def test_a_truncated_file_is_an_error(tmp_path):
    text = shipped.write_table(TABLE, tmp_path).read_text()
    for end in range(0, len(text) - 2, 7):
        (tmp_path / "torn.json").write_text(text[:end])
        with pytest.raises(TableError):
            shipped.read_table(tmp_path / "torn.json")


@pytest.mark.parametrize("change, same", [
    ({}, True), ({"name": "any other"}, True), ({"sms": 114}, False), ({"arch": "sm_100"}, False),
    ({"shared_memory": 1}, False), ({"l2": 50 << 20, "memory": 96 << 30}, True),
])
def test_the_fingerprint_and_not_the_name_identifies_a_gpu(change, same):
    assert TABLE.matches(dataclasses.replace(gpu.KNOWN["sm_90"], **change)) is same


def test_memory_and_cache_distinguish_gpus_where_both_are_known():
    h200 = gpu.KNOWN["sm_90"]
    table = dataclasses.replace(TABLE, gpu=TABLE.gpu | {"l2": 60 << 20, "memory": 141 << 30})
    assert table.matches(h200) and table.matches(dataclasses.replace(h200, memory=139 << 30)), "drivers reserve memory"
    assert table.matches(dataclasses.replace(h200, name="any other"))
    assert not table.matches(gpu.named("h100")) and not table.matches(dataclasses.replace(h200, memory=96 << 30))
    assert not table.matches(dataclasses.replace(h200, l2=80 << 20))
    amd = gpu.KNOWN["gfx942"]
    table = Table("amd", {"name": amd.name} | shipped.gpu_fingerprint(amd), {}, {})
    assert table.matches(dataclasses.replace(amd, l2=4 << 20)), "its driver reports the cache of one die"


def test_the_table_of_the_h200_serves_an_h200_as_it_reports_itself():
    reported = gpu.Gpu("NVIDIA H200", "sm_90", 132, 232448, 0, 60 << 20, 150_000_000_000)
    assert next(lookup.table_sources(reported))[1].name == "h200"
    assert next(origin for origin, _ in lookup.table_sources(reported)) == "table"


def test_an_entry_fits_by_shared_and_tensor_memory():
    h200 = gpu.KNOWN["sm_90"]
    assert ENTRY.fits(h200) and not dataclasses.replace(ENTRY, tensor_memory=1).fits(h200)
    assert not dataclasses.replace(ENTRY, shared_memory=h200.shared_memory + 1).fits(h200)
