"""Regions come out of the tars as they went in, or their image is named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from small_shards import P, write_folder

from oscar_common.errors import OperationError, UsageError
from oscar_common.sample import Sample
from oscar_shards.quantise import dequantise, quantise
from oscar_shards.read import open_folder
from oscar_train.batch import IGNORED, MAX_REGIONS
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.regions import RegionReader, Slots, make_slots
from oscar_train.data.reading.tars import Tars
from oscar_train.data.stream import Stream, open_stream


def slots(size: int) -> Slots:
    return make_slots(np.full((size, MAX_REGIONS, P), 7, np.float16))


def read(reader: RegionReader, images: np.ndarray, into: Slots) -> np.ndarray:
    """Read images and return z."""
    reader.read(images, into)
    z = np.full((len(images), MAX_REGIONS, 6), 7, np.float32)
    reader.z(images, into, z)
    return z


@pytest.fixture
def reader(corpus: Corpus) -> RegionReader:
    return RegionReader(corpus, Tars(corpus, None))


def test_features_and_z_are_those_of_the_samples(reader: RegionReader, samples: list[Sample]):
    buffer = slots(40)
    for images in (np.arange(40), np.array([5, 5, 4, 39, *range(36)])):  # the second time into used room
        z = read(reader, images, buffer)
        for row, image in enumerate(images):
            sample = samples[image]
            k = min(len(sample.regions.tags), MAX_REGIONS)
            assert buffer.counts[row] == k
            np.testing.assert_array_equal(buffer.features[row, :k], sample.regions.features[:k])
            assert not buffer.features[row, k:].any()
            assert not z[row, k:].any()
            width, height = sample.image.width, sample.image.height
            for i, (x1, y1, x2, y2) in enumerate(sample.regions.boxes[:k].tolist()):
                expected = [x1 / width, y1 / height, x2 / width, y2 / height, (x2 - x1) / width, (y2 - y1) / height]
                np.testing.assert_allclose(z[row, i], expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def int8_shards(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("int8") / "shards", samples, dtype="int8")


def test_features_stored_as_int8_arrive_as_the_stored_numbers_rounded_to_float16(
    int8_shards: Path, samples: list[Sample]
):
    buffer = slots(40)
    with open_stream([str(int8_shards)], batch_size=8, threads=3) as stream:
        for images in (np.arange(40), np.array([5, 5, 4, 39, *range(36)])):
            read(stream.reader, images, buffer)
            for row, image in enumerate(images):
                regions = samples[image].regions
                k = min(len(regions.tags), MAX_REGIONS)
                expected = dequantise(*quantise(regions.features))[:k].astype(np.float16)
                np.testing.assert_array_equal(buffer.features[row, :k], expected)
                np.testing.assert_allclose(expected, regions.features[:k], rtol=0, atol=0.015)
                assert not buffer.features[row, k:].any()
                np.testing.assert_array_equal(buffer.boxes[row, :k], regions.boxes[:k])


def test_float16_and_int8_folders_can_be_mixed(shards: Path, int8_shards: Path, samples: list[Sample]):
    with open_stream([str(shards), str(int8_shards)], batch_size=8) as stream:
        buffer = slots(80)
        read(stream.reader, np.arange(80), buffer)
        for image in range(40):
            k = min(len(samples[image].regions.tags), MAX_REGIONS)
            np.testing.assert_array_equal(buffer.features[image, :k], samples[image].regions.features[:k])
            np.testing.assert_allclose(buffer.features[image + 40], buffer.features[image], rtol=0, atol=0.015)


def flip(folder: Path, key: str, array: str, byte: int = 3) -> None:
    """Change one bit of an array of an image; the index and the tar's length stay."""
    opened = open_folder(folder)
    row = opened.table.filter(pc.equal(opened.table["key"], key)).to_pylist()[0]
    with opened.tars[row["shard"]].open("r+b") as tar:
        tar.seek(row[f"{array}_offset"] + byte)
        found = tar.read(1)
        tar.seek(-1, 1)
        tar.write(bytes([found[0] ^ 16]))


@pytest.mark.parametrize(
    ("array", "key"), [("features", "image-011"), ("boxes", "image-011"), ("features", "image-005")]
)
def test_a_flipped_bit_is_found_and_the_image_named(shards: Path, tmp_path: Path, array: str, key: str):
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    last = 60 * P * 2 - 1 if key == "image-005" else 3  # a byte of a region that is not even used
    flip(copy, key, array, last)
    with open_stream([str(copy)], batch_size=8) as stream:
        with pytest.raises(OperationError) as caught:
            read(stream.reader, np.arange(40), slots(40))
        number = 1 if key == "image-011" else 0
        assert caught.value.message == (
            f"{copy}/shard-00000{number}.tar: image {key}: its {array} are not those that were written (checksum); "
            "extract its shard again (delete the tar and run the same oscar-extract command), or go on without what is "
            "damaged: --skip-corrupt"
        )


@pytest.mark.parametrize("array", ["scales", "features"])
def test_a_flipped_bit_of_int8_is_found(int8_shards: Path, tmp_path: Path, array: str):
    copy = Path(shutil.copytree(int8_shards, tmp_path / "shards"))
    flip(copy, "image-020", array)
    with (
        open_stream([str(copy)], batch_size=8) as stream,
        pytest.raises(OperationError, match=f"image-020: its {array} are not those that were written"),
    ):
        read(stream.reader, np.arange(40), slots(40))


def test_a_tar_that_is_cut_or_gone_during_the_run_is_named_with_the_image(shards: Path, tmp_path: Path):
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    with open_stream([str(copy)], batch_size=8) as stream:
        with (copy / "shard-000001.tar").open("r+b") as tar:
            tar.truncate(20_000)
        with pytest.raises(OperationError, match=r"shard-000001\.tar: image image-017: it is cut off"):
            read(stream.reader, np.array([0, 17]), slots(2))
        (copy / "shard-000002.tar").unlink()
        with pytest.raises(OperationError, match=r"shard-000002\.tar: image image-018: its tar cannot be read: No"):
            read(stream.reader, np.array([18, 0]), slots(2))


def damage(folder: Path) -> set[int]:
    """Spoil shards in all ways; return the images that cannot be read any more. The last shard is left out whole."""
    flip(folder, "image-002", "features")
    flip(folder, "image-006", "boxes")
    with (folder / "shard-000001.tar").open("r+b") as tar:
        tar.truncate(20_000)
    rows = pq.read_table(folder / "shard-000001.parquet").to_pylist()
    cut = {9 + n for n, row in enumerate(rows) if row["features_offset"] + row["features_bytes"] > 20_000}
    (folder / "shard-000002.tar").unlink()
    (folder / "shard-000004.parquet").write_bytes(b"PAR1")
    return {2, 6, *cut, *range(18, 27)}


def test_with_skip_corrupt_the_stream_goes_on_and_stays_the_same(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    lost = damage(copy)

    def batches(**options: object) -> list[dict[str, torch.Tensor]]:
        found = []
        with open_stream([str(copy)], batch_size=16, skip_corrupt=True, window=2, **options) as stream:  # type: ignore
            assert len(stream.corpus.images.shard) == 36  # the shard without an index is left out
            for batch in stream.batches(0, 20):
                images = stream.corpus.image[batch.triples]
                out = np.isin(images, list(lost))
                assert (batch.match_labels == IGNORED).tolist() == out.tolist()
                assert (batch.mlm_labels[out] == IGNORED).all()
                assert (batch.mlm_labels[~out] != IGNORED).any(1).all()
                assert batch.attention_mask[out].sum(1).tolist() == [1] * out.sum()
                assert not batch.features[out].any()
                assert not batch.region_mask[out].any()
                found.append({name: getattr(batch, name).clone() for name in ("input_ids", "features", "match_labels")})
            assert len(stream.reader.skipped & lost) == len(stream.reader.skipped) > 10
        return found

    one = batches(threads=1)
    said = capsys.readouterr().err
    assert "shard-000004.tar: its index shard-000004.parquet is damaged" in said
    assert "skipped: " in said
    assert "others will only be counted" in said or said.count("skipped: ") == len(lost)
    two = [batches(threads=4, rank=rank, ranks=2) for rank in (0, 1)]
    for step in range(20):
        for name, tensor in one[step].items():
            assert torch.equal(tensor, torch.cat([two[0][step][name], two[1][step][name]]))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda p: (p / "shard-000002.tar").unlink(),
            "4 of 5 shards are there; .* go on without the others: --skip-corrupt",
        ),
        (lambda p: (p / "shard-000002.parquet").unlink(), "shard-000002.tar: it has no index .*--skip-corrupt"),
        (lambda p: (p / "shard-000002.parquet").write_bytes(b"no"), "its index shard-000002.parquet is damaged"),
        (
            lambda p: append(p / "shard-000002.tar"),
            r"its index says .*: it is cut or changed \(something follows the end of the tar.*--skip-corrupt",
        ),
        (
            lambda p: (p / "manifest.json").unlink(),
            "no manifest.json in it; .* for tars of others, first run: oscar-shards index",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_one_line(
    shards: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
):
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    spoil(copy)
    with pytest.raises(UsageError, match=message), open_stream([str(copy)], batch_size=8):
        pass


def changed(folder: Path, column: str, row: int, value: object) -> None:
    """Write another value into the index of the second shard."""
    path = folder / "shard-000001.parquet"
    table = pq.read_table(path)
    position = table.schema.get_field_index(column)
    values = table[column].to_pylist()
    values[row] = value
    field = table.schema.field(column)
    pq.write_table(table.set_column(position, field, pa.array(values, field.type)), path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("features_bytes", 2, r"image image-011 has 2 features_bytes for \d regions, not 48 each \(P = 24"),
        ("boxes_bytes", 2, r"image image-011 has 2 boxes_bytes for \d regions, not 16 each"),
        ("scales_bytes", 8, r"image image-011 has 8 scales_bytes for \d regions, not 0 each"),
        ("scales_offset", 8, r"image image-011 has features as int8, manifest\.json says float16"),
        ("width", 0, "image image-011 has no size"),
        ("features_offset", 10**9, r"image image-011 has features outside its tar of \d+,\d+ bytes"),
        ("boxes_offset", -1, r"image image-011 has boxes outside its tar"),
    ],
)
def test_an_index_that_contradicts_the_manifest_is_refused_or_skipped(
    shards: Path, tmp_path: Path, column: str, value: int, message: str
):
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    changed(copy, column, 2, value)
    with (
        pytest.raises(UsageError, match=rf"shard-000001\.tar: {message}.*--skip-corrupt"),
        open_stream([str(copy)], batch_size=8),
    ):
        pass
    with open_stream([str(copy)], batch_size=8, skip_corrupt=True) as stream:
        buffer = slots(40)
        read(stream.reader, np.arange(40), buffer)
        assert np.flatnonzero(~buffer.readable).tolist() == [11]


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float16", r"image image-000 has features as int8, manifest\.json says float16; extract it again"),
        ("int4", r"has features of dtype 'int4'; known: float16, int8"),
    ],
)
def test_a_manifest_of_another_dtype_is_refused(int8_shards: Path, tmp_path: Path, dtype: str, message: str):
    copy = Path(shutil.copytree(int8_shards, tmp_path / "shards"))
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"dtype": "int8"', f'"dtype": "{dtype}"'))
    with pytest.raises(UsageError, match=message), open_stream([str(copy)], batch_size=8):
        pass


def test_room_is_used_again_and_not_copied(stream: Stream):
    buffer = stream.buffer()
    place = buffer.batch.features.data_ptr()
    assert stream.batch(0, buffer).features.data_ptr() == place
    assert stream.batch(1, buffer).features.data_ptr() == place
