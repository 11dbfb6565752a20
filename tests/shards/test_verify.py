"""oscar-shards verify: any byte that is not as it was, and any value that cannot be, is named by shard and key."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from foreign_shards import joined, npy, sample, write_tar
from small_shards import make_samples, write_folder
from support import shards

from oscar_common.sample import ImageRecord, Regions, Sample
from oscar_shards.index import index_path, write_index
from oscar_shards.manifest import Layout
from oscar_shards.reindex import reindex
from oscar_shards.verify import check
from oscar_shards.write import Reject, write_shard


def faults(tar: Path, quick: bool = False) -> list[tuple[str, str]]:
    return check(tar, quick).faults


def changed(tar: Path, position: int, flip: int) -> None:
    with tar.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ flip]))


@pytest.fixture(params=["float16", "int8"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_folder(tmp_path / "shards", make_samples(12), per_shard=6, dtype=request.param)


def test_whole_shards_have_no_fault(folder):
    done = shards("verify", folder)
    assert done.returncode == 0
    assert done.stdout.startswith("2 shards, 12 images, 36 texts: no fault (")
    assert shards("verify", folder / "shard-000001.tar", "--quick").returncode == 0


def test_any_flipped_byte_is_found_and_its_image_named(folder, rng):
    tar = folder / "shard-000000.tar"
    rows = pq.read_table(index_path(tar)).to_pylist()
    for position in rng.integers(0, tar.stat().st_size, 300).tolist():
        flip = int(rng.integers(1, 256))
        changed(tar, position, flip)
        found = faults(tar)
        key = [r["key"] for r in rows if r["sample_offset"] <= position < r["sample_offset"] + r["sample_bytes"]]
        assert found, position
        assert {k for k, _ in found} <= set(key or [""]), (position, found)
        changed(tar, position, flip)
    assert not faults(tar)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_every_single_byte_matters(tmp_path, dtype, rng):
    tar = write_folder(tmp_path, make_samples(7)[-2:], dtype=dtype) / "shard-000000.tar"
    for position in range(tar.stat().st_size):
        flip = int(rng.integers(1, 256))
        changed(tar, position, flip)
        assert faults(tar), position
        changed(tar, position, flip)


def test_a_tar_cut_anywhere_is_found_with_and_without_its_index(folder, rng):
    tar = folder / "shard-000000.tar"
    whole = tar.read_bytes()
    boundaries = [r["sample_offset"] for r in pq.read_table(index_path(tar)).to_pylist()]
    places = [*boundaries, *range(0, len(whole), 2560), *rng.integers(0, len(whole), 40).tolist(), len(whole) - 1]
    end = boundaries[-1] + pq.read_table(index_path(tar))["sample_bytes"][-1].as_py()
    for place in places:
        tar.write_bytes(whole[:place])
        assert faults(tar), place
        assert faults(tar, quick=True), place
    index_path(tar).unlink()
    for place in (p for p in places if p < end + 1024):  # what is cut of the zeros after that is no loss
        tar.write_bytes(whole[:place])
        assert any("cut off" in m or "the file ends" in m for _, m in faults(tar)), place


def test_arrays_that_are_larger_than_what_is_read_at_once_are_checked_as_well(tmp_path, rng):
    def large(number: int, k: int) -> Sample:
        return Sample(
            key=f"k{number}",
            image=ImageRecord(source="s", id="1", path="p", width=10, height=10, sha256=""),
            regions=Regions(
                boxes=np.zeros((k, 4), np.float32),
                features=rng.random((k, 2048)).astype(np.float16),
                tags=[],
                scores=[],
            ),
            texts=[],
        )

    tar = tmp_path / "large-000000.tar"
    write_shard(tar, [large(1, 600), large(2, 1300), large(3, 900), large(4, 1)], Layout(feature_dim=2048))
    assert not faults(tar)
    for position in rng.integers(0, tar.stat().st_size, 30).tolist():
        changed(tar, position, 1)
        assert len(faults(tar)) == 1, position
        changed(tar, position, 1)


def test_after_a_damage_the_other_images_are_checked_still(folder):
    tar = folder / "shard-000000.tar"
    rows = pq.read_table(index_path(tar)).to_pylist()
    changed(tar, rows[1]["sample_offset"] + 150, 0xFF)  # the checksum in a header: no tar reader gets past this
    changed(tar, rows[3]["features_offset"] + 5, 0x10)
    done = shards("verify", folder)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 4  # with the summary, and the count that is now too low
    assert f"shard-000000.tar: {rows[1]['key']}: no tar header" in lines[0]
    assert f"shard-000000.tar: {rows[3]['key']}: not what the index says: the bytes of features" in lines[1]


def test_an_index_that_says_something_else_is_named(folder):
    tar = folder / "shard-000000.tar"
    table = pq.read_table(index_path(tar))
    for name in ("tags", "gt_tags"):
        tags = table[name].to_pylist()
        tags[2] = ["zebra"] * max(len(tags[2]), 1)
        changed = table.set_column(table.schema.get_field_index(name), table.schema.field(name), [tags])
        write_index(changed, index_path(tar))
        assert faults(tar) == [("image-002", f"not what the index says: {name}")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: index_path(folder / "shard-000000.tar").unlink(), "it has no index"),
        (
            lambda folder: index_path(folder / "shard-000000.tar").write_bytes(b"PAR1"),
            "shard-000000.parquet is damaged",
        ),
        (lambda folder: (folder / "shard-000001.tar").unlink(), "1 of the 2 shards of manifest.json are there"),
        (lambda folder: (folder / "shard-000001.tar").unlink(), "shard-000001.parquet: its tar is not there"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not valid JSON"),
        (
            lambda folder: (folder / "shard-000000.rejects.parquet").write_bytes(b"PAR1x"),
            "shard-000000.rejects.parquet is damaged",
        ),
        (
            lambda folder: shutil.copy(folder / "shard-000000.tar", folder / "shard-000001.tar"),
            "image-000: it is there 2 times, in shard-000000.tar, shard-000001.tar",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(folder, change, message):
    change(folder)
    done = shards("verify", folder)
    assert done.returncode == 1
    assert message in done.stdout


def test_rejects_count_as_planned_images(tmp_path):
    folder = write_folder(tmp_path, make_samples(6), per_shard=6)
    tar = folder / "shard-000000.tar"
    write_shard(tar, [*make_samples(5), Reject(path="x", reason="truncated", message="")], Layout(feature_dim=24))
    assert shards("verify", folder).returncode == 0
    write_shard(tar, make_samples(5), Layout(feature_dim=24))
    assert "5 images and 0 rejects; manifest.json says 6 images" in shards("verify", folder).stdout


NAN = np.full((3, 8), np.nan, np.float16)
WRONG = {
    "features are not all finite numbers": {"features.npy": npy(NAN)},
    "a box is not within the image": {"boxes.npy": npy(np.float32([[0, 0, 9, 9]] * 2 + [[600, 9, 642, 20]]))},
    "a box is not  within the image": {"boxes.npy": npy(np.float32([[0, 0, 9, 9]] * 2 + [[50, 9, 42, 20]]))},
    "a box is not   within the image": {"boxes.npy": npy(np.float32([[0, 0, 9, 9]] * 2 + [[50, np.nan, 52, 20]]))},
    "its width or height is missing": {"image": {"id": "1", "width": 640}},
    "it has not as many tags as boxes": {"tags": ["cat"] * 2, "scores": [0.5] * 2},
    "it has not as many scores as tags": {"scores": [0.5] * 2},
    "it has not as many attributes as boxes": {"attributes": [[]]},
    "a score is not between 0 and 1": {"scores": [0.5, 0.5, 1.5]},
    "a tag is not of the detector's vocabulary": {"tags": ["cat", "unicorn", "cat"]},
    "one of its gt_tags is no text": {"gt_tags": ["cat", None]},
    "json: gt_tags is str instead of a list": {"gt_tags": "cat"},
    "json: Expected bytes, got a 'int' object": {"gt_tags": ["cat", 5]},
    "a text is no caption, and no question with answer": {"texts": [{"kind": "qa", "question": "what?"}]},
    "features are float16 [3, 9]; in this folder they are float16 [K, 8]": {
        "features.npy": npy(np.zeros((3, 9), np.float16))
    },
    "boxes.npy is <f8 [3, 4], not <f4 [K, 4]": {"boxes.npy": npy(np.zeros((3, 4)))},
    "features.npy is <f2 [2, 8], not <f2 or |i1 [3, P]": {"features.npy": npy(np.zeros((2, 8), np.float16))},
    "features.npy is |i1 without scales.npy": {"features.npy": npy(np.zeros((3, 8), np.int8))},
    "features.npy: in Fortran order; the contract has C order": {
        "features.npy": npy(np.asfortranarray(np.zeros((3, 8), np.float16)))
    },
    "features.npy: an array of object is refused": {
        "features.npy": b"\x93NUMPY\x01\x00\x3a\x00{'descr': '|O', 'fortran_order': False, 'shape': (3, 8), }\n"
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_a_value_that_cannot_be_is_named(tmp_path, message):
    tar = write_tar(tmp_path / "a-000000.tar", joined(sample(1), sample(2), sample(3)))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    reindex([tmp_path], tmp_path / "names.txt", 1)
    assert not faults(tar)
    write_tar(tar, joined(sample(1), sample(2, **WRONG[message]), sample(3)))
    index_path(tar).unlink()
    found = [(key, m) for key, m in faults(tar) if "no index" not in m]
    assert [key for key, _ in found] == ["image-002"]
    assert " ".join(message.split()) in found[0][1]


def test_what_others_wrote_cannot_play_with_the_terminal(tmp_path):
    tar = write_tar(tmp_path / "a.tar", joined(sample(1)) | {"\x1b[31mred\n.json": b"{}"})
    done = shards("verify", tar)
    assert done.returncode == 1
    assert "\\x1b[31mred\\x0a: " in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere"], "PATH nowhere: no such file or folder"),
        (["index", "nowhere"], "PATH nowhere: no such file or folder"),
        (["verify"], "Missing argument"),
        (["verify", "--wuick", "x"], "No such option"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, message):
    done = shards(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_without_tars_is_refused(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({}))
    assert "no tar in it" in shards("verify", tmp_path).stderr
