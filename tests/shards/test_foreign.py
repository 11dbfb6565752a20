"""Shards of other writers with the same members: indexed, verified and read; what could do harm is refused by name."""

import io
import json
import os
import subprocess
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import webdataset
from foreign_shards import content, joined, npy, sample, write_tar
from support import shards

from oscar_common.errors import UsageError
from oscar_shards.index import index_path, index_tar
from oscar_shards.read import open_folder, read_boxes, read_features, read_index, read_samples
from oscar_shards.tar import TarFault
from oscar_shards.verify import check


def by_webdataset(folder: Path) -> None:
    """Stock webdataset: members sorted by name, so that the JSON comes last; a pax header each for the time."""
    with webdataset.TarWriter(str(folder / "train_0.tar")) as writer:
        for number in (1, 2, 3):
            members = {name.partition(".")[2]: data for name, data in sample(number).items()}
            writer.write({"__key__": f"image-{number:03d}", **members})


def by_tar(folder: Path) -> None:
    """The command tar, of a folder: "./" before the names, and entries for folders."""
    unpacked = folder.parent / "unpacked"
    (unpacked / "sub").mkdir(parents=True)
    for name, data in joined(sample(1), sample(2)).items():
        (unpacked / name).write_bytes(data)
    for name, data in sample(3).items():
        (unpacked / "sub" / name).write_bytes(data)
    subprocess.run(["tar", "--sort=name", "-cf", folder / "a.tar", "-C", unpacked, "."], check=True)


def by_pax(folder: Path) -> None:
    """Long names and sizes in pax headers, a comment for all of the tar."""
    with tarfile.open(folder / "b-000000.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as archive:
        for name, data in joined(sample(1), sample(2), sample(3)).items():
            member = tarfile.TarInfo(("é" * 120 + "/") + name)
            member.size, member.mtime = len(data), 1.5
            archive.addfile(member, io.BytesIO(data))


def by_gnu(folder: Path) -> None:
    """Long names as GNU writes them, a photo with each image, .npy headers of version 2, ids that are numbers."""
    members: dict[str, bytes] = {}
    for number in (1, 2, 3):
        said = content(number, 3)
        said["image"]["id"], said["texts"][0]["id"] = number, 7
        mine = sample(number, **{"boxes.npy": npy(np.tile(np.float32([0, 0, 9, 9]), (3, 1)), (2, 0))})
        members |= {"x" * 101 + name: data for name, data in mine.items()}
        members[f"{'x' * 101}image-{number:03d}.json"] = json.dumps(said, indent=1).encode()
        members[f"{'x' * 101}image-{number:03d}.jpg"] = bytes(1000 * number)
    write_tar(folder / "c-000000.tar", members, mtime=12345)


@pytest.fixture(params=[by_webdataset, by_tar, by_pax, by_gnu])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = tmp_path / "theirs"
    made.mkdir()
    request.param(made)
    return made


def test_tars_of_others_are_indexed_verified_and_opened_like_ones_own(folder):
    assert shards("index", folder).returncode == 0
    done = shards("verify", folder)
    assert (done.returncode, done.stdout.startswith("1 shard, 3 images, 3 texts: no fault (")) == (0, True), done.stdout
    opened = open_folder(folder)
    assert opened.manifest.detector.feature_dim == 8
    rows = opened.table.to_pylist()
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    assert [row["texts"][0]["text"] for row in rows] == [f"Photo {n}, größer." for n in (1, 2, 3)]
    stock = list(webdataset.WebDataset(str(opened.tars[0]), shardshuffle=False).decode())
    for row, theirs, read in zip(rows, stock, read_samples(opened.tars[0]), strict=True):
        assert row["key"] == theirs["__key__"].removeprefix("./") == read.key
        np.testing.assert_array_equal(read_features(opened.tars[0], row), theirs["features.npy"], strict=True)
        np.testing.assert_array_equal(read_boxes(opened.tars[0], row), theirs["boxes.npy"], strict=True)
        np.testing.assert_array_equal(read.regions.features, theirs["features.npy"], strict=True)
    assert ds.dataset([str(index_path(t)) for t in opened.tars]).count_rows() == 3


def test_any_flipped_byte_of_them_is_found(folder, rng):
    shards("index", folder)
    (tar,) = folder.glob("*.tar")
    whole = tar.read_bytes()
    for position in rng.integers(0, len(whole), 100).tolist():
        tar.write_bytes(whole[:position] + bytes([whole[position] ^ int(rng.integers(1, 256))]) + whole[position + 1 :])
        assert check(tar, quick=False).faults, position


def test_an_index_made_again_is_the_one_that_was_written(folder):
    shards("index", folder)
    (index,) = folder.glob("*.parquet")
    before = index.read_bytes()
    index.unlink()
    shards("index", folder)
    assert index.read_bytes() == before


def test_without_an_index_one_is_made_in_memory(folder):
    (tar,) = folder.glob("*.tar")
    assert read_index(tar).num_rows == 3
    assert [p.name for p in folder.iterdir()] == [tar.name]


def test_folders_of_two_detectors_get_no_manifest(tmp_path):
    write_tar(tmp_path / "a.tar", sample(1, p=8))
    write_tar(tmp_path / "b.tar", sample(2, p=16))
    done = shards("index", tmp_path)
    assert done.returncode == 2
    assert "float16 with P = 8 (a.tar), float16 with P = 16 (b.tar)" in done.stderr
    assert not (tmp_path / "manifest.json").exists()


def test_one_damaged_tar_does_not_keep_the_others_from_their_index(tmp_path):
    write_tar(tmp_path / "a.tar", sample(1))
    write_tar(tmp_path / "b.tar", {"x.json": b"{}"})
    done = shards("index", tmp_path)
    assert done.returncode == 1
    assert "b.tar: x: no boxes.npy; 1 of 2 tars could not be indexed" in done.stderr
    assert index_path(tmp_path / "a.tar").exists()
    assert not index_path(tmp_path / "b.tar").exists()


HARM = [
    (partial(write_tar, members=sample(1) | {"../evil.json": b"{}"}), "'../evil.json' would lie outside"),
    (partial(write_tar, members=sample(1) | {"/etc/evil.json": b"{}"}), "'/etc/evil.json' would lie outside"),
    (partial(write_tar, members=sample(1) | {"a/../../evil.json": b"{}"}), "would lie outside"),
    (partial(write_tar, members=sample(1), type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link: refused"),
    (partial(write_tar, members=sample(1), type=tarfile.LNKTYPE, linkname="x"), "is a link: refused"),
    (partial(write_tar, members=sample(1), type=tarfile.CHRTYPE), "is a special file: refused"),
    (partial(write_tar, members=sample(1), type=tarfile.FIFOTYPE), "is a special file: refused"),
    (partial(write_tar, members=sample(1) | {"image-001.pkl": b"cos\nsystem\n"}), "image-001.pkl: a pickle is refused"),
    (partial(write_tar, members=sample(1) | {"image-001.x.pyd": b"."}), "image-001.x.pyd: a pickle is refused"),
    (partial(write_tar, members={k.replace("-", "."): v for k, v in sample(1).items()}), "a key ends at the first dot"),
    (partial(write_tar, members={k: v for k, v in sample(1).items() if "json" not in k}), "image-001: no json"),
]


@pytest.mark.parametrize(("write", "message"), HARM)
def test_what_could_do_harm_is_refused_by_name(tmp_path, write, message):
    tar = write(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r".") as refused:
        index_tar(tar)
    assert message in str(refused.value)
    done = shards("verify", tar)
    assert done.returncode == 1
    assert message in done.stdout


def test_no_size_that_a_tar_names_is_believed(tmp_path):
    tar = write_tar(tmp_path / "a.tar", sample(1))
    whole = tar.read_bytes()
    header = tarfile.TarInfo("image-000.json")
    header.size = 1 << 50
    tar.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + whole)
    with pytest.raises(TarFault, match=r"cut off: 'image-000.json' should end at byte 1,125,"):
        index_tar(tar)
    header.pax_headers = {"size": str(1 << 60)}
    header.size = 10
    tar.write_bytes(header.tobuf(tarfile.PAX_FORMAT) + whole)
    with pytest.raises(TarFault, match=r"a member of '1152921504606846976' bytes"):
        index_tar(tar)
    shape = (
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<f2', 'fortran_order': False, 'shape': (3, 1099511627775), }".ljust(117)
    )
    write_tar(tar, sample(1, **{"features.npy": shape + b"\n" + bytes(48)}))
    with pytest.raises(ValueError, match=r"\[3, 1099511627775\] has 6,597,069,766,650 bytes, not 48"):
        index_tar(tar)


@pytest.mark.parametrize(
    "text",
    [
        b"{}{}",
        b'{"image":{}},{"number":1,"content":{}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b"",
        b"null",
        b'{"image": 3}',
        b'{"tags": "cat"}',
        b'{"texts": [{"text": {}}]}',
        b'{"image": {"width": 1e400}}',
        b'{"image": {"width": 99999999999999999999}}',
        b'{"tags": ["\\ud800"]}',
    ],
)
def test_json_that_is_none_is_named_and_its_neighbours_are_kept(tmp_path, text):
    tar = write_tar(tmp_path / "a.tar", joined(sample(1), sample(2) | {"image-002.json": text}, sample(3)))
    with pytest.raises(ValueError, match=r"^image-002: json: "):
        index_tar(tar)
    report = check(tar, quick=False)
    assert [key for key, message in report.faults if message.startswith("json: ")] == ["image-002"]
    assert report.keys.to_pylist() == ["image-001", "image-003"]
    with pytest.raises(UsageError, match="image-002"):
        read_index(tar)


def test_files_that_are_no_tar_are_named(tmp_path, rng):
    for number, data in enumerate(
        [b"", b"\0" * 100, b"hello" * 1000, os.urandom(5000), bytes(512), b"\0" * 1024 + b"x"]
    ):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        assert shards("verify", path).returncode == 1, number
        assert shards("index", path).returncode == 1, number


def test_an_empty_tar_is_a_shard_without_images(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {})
    assert index_tar(tar).num_rows == 0
    assert shards("index", tar).returncode == 0
    assert shards("verify", tar).returncode == 0
    assert pq.read_table(index_path(tar)).num_rows == 0
