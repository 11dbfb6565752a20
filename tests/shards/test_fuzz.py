"""Tars and indexes as an attacker would make them: an error that says what is wrong, never a crash, never much memory.

`make fuzz` tries 100,000 of each kind; `make test` some hundred.
"""

import json
import os
import resource
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_shards import joined, sample, write_tar
from hypothesis import HealthCheck, given, settings

from oscar_common.errors import UsageError
from oscar_shards.content import read_content
from oscar_shards.index import index_path, index_tar, load_index
from oscar_shards.read import read_index, read_samples
from oscar_shards.samples import parse_npy_header
from oscar_shards.tar import BLOCK
from oscar_shards.verify import check

COUNT = int(os.environ.get("OSCAR_FUZZ", "150"))
PART = 1000  # tried at once: what hypothesis remembers of them grows
FUZZ = settings(
    max_examples=min(COUNT, PART), deadline=None, database=None, derandomize=COUNT < PART, print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
ROOM = 256 << 20  # bytes of memory beyond what was in use before
parts = pytest.mark.parametrize("part", range(-(-COUNT // PART)))

edit = st.tuples(
    st.floats(0, 1, exclude_max=True),  # where
    st.sampled_from(["flip", "set", "digits", "cut", "insert", "copy"]),
    st.binary(min_size=1, max_size=24),
)


def edited(data: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    """Damage data here and there, mostly where headers are: these decide what is read."""
    for where, how, what in edits:
        place = int(where * len(data))
        if how == "flip":
            data = data[:place] + bytes([(data[place] if data else 0) ^ (what[0] or 1)]) + data[place + 1 :]
        elif how == "set":
            data = data[:place] + what + data[place + len(what) :]
        elif how == "digits":  # numbers: sizes, shapes, checksums
            data = data[:place] + bytes(0x30 + b % 8 for b in what) + data[place + len(what) :]
        elif how == "cut":
            data = data[:place]
        elif how == "insert":
            data = data[:place] + what + data[place:]
        else:
            data = data[:place] + data[place // 2 : place // 2 + BLOCK] + data[place + BLOCK :]
    return data


def with_checksums(data: bytes) -> bytes:
    """Give every block that looks like a header the right checksum, so that readers go on to its contents."""
    blocks = [data[n : n + BLOCK] for n in range(0, len(data), BLOCK)]
    for n, block in enumerate(blocks):
        if len(block) == BLOCK and block[257:262] == b"ustar":
            said = sum(block[:148]) + 8 * 32 + sum(block[156:])
            blocks[n] = block[:148] + b"%06o\0 " % said + block[156:]
    return b"".join(blocks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    tar = write_tar(
        tmp_path_factory.mktemp("fuzz") / "a.tar", joined(sample(1), sample(2, k=0), sample(3, gt_tags=["ski"]))
    )
    index = index_path(tar)
    pq.write_table(index_tar(tar), index, compression="zstd", write_page_checksum=True)
    return tar, tar.read_bytes(), index.read_bytes()


@pytest.fixture(autouse=True)
def little_memory() -> None:
    """No test may make this process much larger than it was."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < ROOM


@parts
@FUZZ
@given(edits=st.lists(edit, min_size=1, max_size=6), sums=st.booleans())
def test_a_tar_that_is_damaged_in_any_way_is_an_error_or_an_index(part, whole, edits, sums):
    tar, data, _ = whole
    damaged = edited(data, edits)
    tar.write_bytes(with_checksums(damaged) if sums else damaged)
    index_path(tar).unlink(missing_ok=True)
    try:
        table = index_tar(tar)
        table.validate(full=True)
        assert table["features_bytes"].null_count == 0
        for read in read_samples(tar):
            assert read.regions.features.shape[0] == read.regions.boxes.shape[0]
    except ValueError:
        pass
    assert len(check(tar, quick=False).faults) < 50
    check(tar, quick=True)


@parts
@FUZZ
@given(edits=st.lists(edit, min_size=1, max_size=4))
def test_an_index_that_is_damaged_in_any_way_is_found_or_made_anew(part, whole, edits):
    tar, data, index = whole
    tar.write_bytes(data)
    index_path(tar).write_bytes(edited(index, edits))
    report = check(tar, quick=False)
    assert report.faults or pq.read_table(index_path(tar)).equals(index_tar(tar))
    read_index(tar)


@parts
@FUZZ
@given(data=st.binary(max_size=4096))
def test_any_bytes_may_be_called_a_tar(part, whole, data):
    tar, _, _ = whole
    tar.write_bytes(data)
    index_path(tar).write_bytes(data[::-1])
    assert check(tar, quick=False).faults
    with pytest.raises(UsageError):
        read_index(tar)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from(
                ["image", "tags", "scores", "attributes", "gt_tags", "texts", "id", "width", "kind", "name"]
            )
            | st.text(),
            inner,
            max_size=5,
        )
    ),
    max_leaves=30,
)


@parts
@FUZZ
@given(contents=st.lists(json_like.map(json.dumps).map(str.encode) | st.binary(max_size=60), max_size=4))
def test_any_json_is_a_row_or_named(part, contents):
    batch, wrong = read_content(contents)
    batch.validate(full=True)
    assert batch.num_rows + len(wrong) == len(contents)


@parts
@FUZZ
@given(
    header=st.binary(max_size=200)
    | st.text("{}()[]'descrshapefortran_order:<>f2i14,0123456789 TrueFalse", max_size=200)
)
def test_any_npy_header_is_a_shape_or_an_error(part, header):
    raw = header.encode() if isinstance(header, str) else header
    try:
        shape, dtype = parse_npy_header(b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw)
    except ValueError:
        return
    assert all(n >= 0 for n in shape)
    assert not np.dtype(dtype).hasobject


def test_a_short_index_that_holds_gigabytes_is_refused_before_they_are_there(whole):
    tar, data, _ = whole
    tar.write_bytes(data)
    table = index_tar(tar).slice(0, 1)
    for column, value in (("path", "x" * (8 << 20)), ("tags", ["y" * 1000] * 8000)):
        large = pa.concat_tables([table] * 3).set_column(
            table.schema.get_field_index(column), table.schema.field(column), [[value] * 3]
        )
        pq.write_table(large, index_path(tar), compression="zstd")
        assert index_path(tar).stat().st_size < 200_000
        with pytest.raises(ValueError, match=r"more than there can be"):
            load_index(tar)


def test_these_tests_can_fail(whole):
    """What is fuzzed is a tar that is read, an index that is compared, and JSON that is parsed."""
    tar, data, index = whole
    tar.write_bytes(data)
    index_path(tar).write_bytes(index)
    assert not check(tar, quick=False).faults
    assert edited(data, [(0.5, "flip", b"a")]) != data
    assert with_checksums(data) == data
    assert isinstance(read_content([b"{}"])[0], pa.RecordBatch)
