"""Regions come out of the tars as they went in."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_shards import P, write_folder

from oscar_common.errors import OperationError, UsageError
from oscar_common.sample import Sample
from oscar_shards.quantise import dequantise, quantise
from oscar_shards.read import ShardFolder, open_folder
from oscar_train.regions import MAX_REGIONS, RegionReader


def test_features_and_z_are_those_of_the_samples(folder: ShardFolder, samples: list[Sample]):
    reader = RegionReader(folder, threads=3)
    slots = reader.slots(40)
    for images in (np.arange(40), np.array([5, 5, 4, 39, *range(36)])):  # the second time into used room
        reader.read(images, slots)
        z = reader.z(images, slots)
        for row, image in enumerate(images):
            sample = samples[image]
            k = min(len(sample.regions.tags), MAX_REGIONS)
            assert slots.counts[row] == k
            np.testing.assert_array_equal(slots.features[row, :k], sample.regions.features[:k])
            assert not slots.features[row, k:].any()
            assert not z[row, k:].any()
            width, height = sample.image.width, sample.image.height
            for i, (x1, y1, x2, y2) in enumerate(sample.regions.boxes[:k].tolist()):
                expected = [x1 / width, y1 / height, x2 / width, y2 / height, (x2 - x1) / width, (y2 - y1) / height]
                np.testing.assert_allclose(z[row, i], expected, rtol=0, atol=1e-6)


def test_room_is_used_again_and_not_copied(folder: ShardFolder):
    reader = RegionReader(folder)
    slots = reader.slots(3)
    place = slots.features.ctypes.data
    reader.read(np.array([0, 20, 39]), slots)
    assert slots.features.ctypes.data == place
    assert slots.features.shape == (3, MAX_REGIONS, P)


def test_a_tar_that_is_cut_or_gone_during_the_run_is_named_with_the_image(shards: Path, tmp_path: Path):
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    reader = RegionReader(open_folder(copy))
    slots = reader.slots(2)
    with (copy / "shard-000001.tar").open("r+b") as tar:
        tar.truncate(20_000)
    with pytest.raises(OperationError, match=r"shard-000001\.tar: image image-017 is cut off"):
        reader.read(np.array([0, 17]), slots)
    (copy / "shard-000002.tar").unlink()
    with pytest.raises(OperationError, match=r"shard-000002\.tar: cannot be read: No such file"):
        reader.read(np.array([18, 0]), slots)


def test_an_index_that_contradicts_the_manifest_is_refused(folder: ShardFolder):
    sizes = folder.table.column("features_bytes").to_numpy().copy()
    sizes[11] += 2
    position = folder.table.schema.get_field_index("features_bytes")
    table = folder.table.set_column(position, "features_bytes", pa.array(sizes))
    broken = ShardFolder(folder=folder.folder, manifest=folder.manifest, tars=folder.tars, table=table)
    with pytest.raises(UsageError, match=r"shard-000001\.tar: image image-011 has .* not 48 each \(P = 24"):
        RegionReader(broken)


@pytest.fixture(scope="module")
def int8_shards(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("int8") / "shards", samples, dtype="int8")


def test_features_stored_as_int8_arrive_as_the_stored_numbers_rounded_to_float16(
    int8_shards: Path, samples: list[Sample]
):
    reader = RegionReader(open_folder(int8_shards), threads=3)
    slots = reader.slots(40)
    for images in (np.arange(40), np.array([5, 5, 4, 39, *range(36)])):  # the second time into used room
        reader.read(images, slots)
        for row, image in enumerate(images):
            regions = samples[image].regions
            k = min(len(regions.tags), MAX_REGIONS)
            expected = dequantise(*quantise(regions.features))[:k].astype(np.float16)
            np.testing.assert_array_equal(slots.features[row, :k], expected)
            np.testing.assert_allclose(expected, regions.features[:k], rtol=0, atol=0.015)
            assert not slots.features[row, k:].any()
            np.testing.assert_array_equal(slots.boxes[row, :k], regions.boxes[:k])


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float16", r"image image-000 has features as int8, manifest\.json says float16; extract it again"),
        ("int4", r"manifest\.json has features of dtype 'int4'; known: float16, int8"),
    ],
)
def test_a_manifest_of_another_dtype_is_refused(int8_shards: Path, dtype: str, message: str):
    folder = open_folder(int8_shards)
    detector = replace(folder.manifest.detector, dtype=dtype)
    with pytest.raises(UsageError, match=message):
        RegionReader(replace(folder, manifest=replace(folder.manifest, detector=detector)))


def test_features_cut_short_are_refused_for_int8_too(int8_shards: Path):
    folder = open_folder(int8_shards)
    position = folder.table.schema.get_field_index("scales_bytes")
    sizes = folder.table.column("scales_bytes").to_numpy().copy()
    sizes[11] += 2
    table = folder.table.set_column(position, "scales_bytes", pa.array(sizes))
    with pytest.raises(UsageError, match=r"shard-000001\.tar: image image-011 has .* scales_bytes for .* not 4 each"):
        RegionReader(replace(folder, table=table))
