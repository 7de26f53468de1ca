"""Tables of configs: the shipped files, and what is no such file."""

import dataclasses
import json
import re

import pytest

from perf import config_table
from tests.helpers.shipped_rows import versions
from tritonattn import Config, gpu
from tritonattn.configs import shipped as tables
from tritonattn.configs.kernel_hash import kernel_hash
from tritonattn.configs.shipped import FILLS, Entry, Row, Table, TableError
from tritonattn.measure import environment

ENTRY = Entry("64x64w4s2", "static-model", 200, 70000, 0, 2, "tensor")
ODD = Entry("16x16w4s1", "measured", 255, 70000, 0, 1, "issue", "spill: 3 in the loop")
ROW = Row("forward", 2, 64, "full", ENTRY, ODD, {"128x64w4s2": "spill"})
TABLE = Table("any", {"name": "Any", "arch": "sm_90", "sms": 132, "shared_memory": 232448, "l2": None, "memory": None},
              {"triton": "3.6.0"}, {ROW.key: ROW})


@pytest.mark.parametrize("shipped", tables.shipped_tables(), ids=lambda each: each.name)
def test_a_shipped_table_is_whole(shipped):
    on = next(known for known in gpu.KNOWN.values() if known.name == shipped.gpu["name"])
    assert shipped.is_of(on) and shipped.name == environment.slug(on.name)
    assert list(shipped.rows) == list(config_table.cells(on))
    for row in shipped.rows.values():
        for fill in FILLS:
            entry = getattr(row, fill)
            config = Config.parse(entry.config)
            assert entry.source in tables.SOURCES and entry.fits(on), (row.key, entry)
            assert entry.bound and entry.occupancy > 0 and 0 < entry.registers <= 512
            assert max(config.block_m, config.block_n) <= 128, "a map's tiles are no larger"
            assert config.num_stages > 1 or config.edge_stages is None, "without a pipeline nothing is left out of it"
            if row.itemsize == 2 and row.width <= 128 and row.mask != "pairs":
                # what is used most has nothing against it; on GPUs whose blocks have 99 KiB heads of 96, and a map, spill a bit
                for said in filter(None, entry.exception.split("; ")):
                    found = re.fullmatch(r"spill: (\d+) in the loop(, with a map)?", said)
                    little = found and int(found[1]) <= config_table.LIGHT and (found[2] or row.width == 96)
                    assert on.shared_memory == 99 << 10 and little, (row.key, entry)


def test_no_tile_has_too_few_queries_for_the_tensor_cores():
    """A product of Hopper's or Blackwell's own has 64 rows; each of AMD's four waves has 16, or makes what another makes.

    Heads of 512 are too wide for so many keys in dK/dV on Hopper and Blackwell, and for dbias on Blackwell.
    """
    too_wide = {("sm_90", "dkdv", 512), ("sm_100", "dkdv", 512), ("sm_100", "dbias", 512)}
    for shipped in tables.shipped_tables():
        arch = shipped.gpu["arch"]
        for row in shipped.rows.values() if arch in ("sm_90", "sm_100", "gfx942") else ():
            configs = [Config.parse(getattr(row, fill).config) for fill in FILLS]
            owned = [config.block_n if row.kernel == "dkdv" else config.block_m for config in configs]
            assert row.itemsize == 4 or (min(owned) >= 64) != ((arch, row.kernel, row.width) in too_wide), row


def test_all_were_made_with_the_same_two_versions_of_triton():
    assert len(versions("triton")) == len(versions("also")) == 1 and None not in versions("triton") | versions("also")


def test_there_is_a_table_for_every_known_architecture():
    assert sorted(each.gpu["arch"] for each in tables.shipped_tables()) == sorted(gpu.KNOWN)


def test_the_tables_were_made_from_the_kernels_as_they_are():
    source = kernel_hash()
    stale = [each.name for each in tables.shipped_tables() if each.made["source"] != source]
    assert not stale, f"{', '.join(stale)}: run python -m tritonattn table build {','.join(gpu.KNOWN)}"


def test_what_is_written_is_read(tmp_path):
    path = tables.write_table(TABLE, tmp_path)
    assert path == tmp_path / "any.json" and tables.read_table(path) == TABLE and list(tmp_path.iterdir()) == [path]
    assert len(path.read_text().splitlines()) == 2 + len(TABLE.rows) + 1, "a row a line"


@pytest.mark.parametrize("content, words", [
    ("", "JSONDecodeError"), ("[]", "TypeError"), ("{}", "KeyError"), ('{"schema": 99}', "expected schema 1, got 99"),
    ('{"schema": 1, "gpu": {}, "made": {}, "rows": [{"kernel": "forward"}]}', "KeyError"),
    ('{"schema": 1, "gpu": {}, "made": {}, "rows": [{"many": {}, "few": {}}]}', "TypeError"),
])
def test_what_is_no_table_is_said(content, words, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(TableError, match=words):
        tables.read_table(path)


def test_a_torn_file_never_passes(tmp_path):
    text = tables.write_table(TABLE, tmp_path).read_text()
    for end in range(0, len(text) - 2, 7):
        (tmp_path / "torn.json").write_text(text[:end])
        with pytest.raises(TableError):
            tables.read_table(tmp_path / "torn.json")


@pytest.mark.parametrize("change, same", [
    ({}, True), ({"name": "any other"}, True), ({"sms": 114}, False), ({"arch": "sm_100"}, False),
    ({"shared_memory": 1}, False), ({"l2": 50 << 20, "memory": 96 << 30}, True),
])
def test_a_fingerprint_is_of_what_a_gpu_is_and_not_of_its_name(change, same):
    assert TABLE.is_of(dataclasses.replace(gpu.KNOWN["sm_90"], **change)) is same


def test_memory_and_cache_tell_gpus_apart_where_both_are_known():
    h200 = gpu.KNOWN["sm_90"]
    mine = dataclasses.replace(TABLE, gpu=TABLE.gpu | {"l2": 50 << 20, "memory": 141 << 30})
    assert mine.is_of(h200) and mine.is_of(dataclasses.replace(h200, memory=139 << 30)), "a driver keeps some"
    assert mine.is_of(dataclasses.replace(h200, name="any other"))
    assert not mine.is_of(gpu.named("h100")) and not mine.is_of(dataclasses.replace(h200, memory=96 << 30))
    assert not mine.is_of(dataclasses.replace(h200, l2=60 << 20))
    amd = gpu.KNOWN["gfx942"]
    of_amd = Table("of amd", {"name": amd.name} | tables.gpu_fingerprint(amd), {}, {})
    assert of_amd.is_of(dataclasses.replace(amd, l2=4 << 20)), "its driver tells of one die's cache, its vendor of all"


def test_an_entry_knows_what_it_needs():
    assert ENTRY.fits(gpu.KNOWN["sm_90"]) and not dataclasses.replace(ENTRY, tensor_memory=1).fits(gpu.KNOWN["sm_90"])
    assert json.loads(json.dumps(dataclasses.asdict(ENTRY)))["config"] == "64x64w4s2"
