"""From the indexes of shards to the arrays of a corpus, some images at a time: memory does not grow with the corpus."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from oscar_common.errors import UsageError
from oscar_common.progress import meter
from oscar_common.settings import DTYPES
from oscar_shards import ground_truth
from oscar_shards.texts import read_overlays
from oscar_train.batch import MAX_TEXT
from oscar_train.data.sources import FLAG, Source
from oscar_train.data.texts.arrays import GrowingArray
from oscar_train.data.texts.phrases import CAPTION, QA, Phrases, Phrasing
from oscar_train.data.texts.ragged import Ragged
from oscar_train.data.texts.tags import TagRule
from oscar_train.data.texts.tokens import Tokenizer

# The arrays, by dtype; those of PLACES are columns of the indexes as they are
INT32 = ("shard", "width", "height", "num_boxes", "image", "caption_pool", "qa_pool")
INT64 = ("boxes_offset", "scales_offset", "features_offset", "sample_offset", "sample_bytes", "second_row")
UINT64 = ("boxes_xxh3", "scales_xxh3", "features_xxh3", "frame_xxh3", "key_xxh3", "content", "second_set")
STARTS = ("shard_triples", "shard_images", "source_shards", "tar_bytes")
PLACES = (*INT32[1:4], *INT64[:5], *UINT64[:4])
FLOAT16 = -1  # a scales_offset: there are none
UNREADABLE = -1  # a features_offset: the index of this image contradicts itself

SAME = 8  # images that may be one (several datasets have it); more that claim to be tell nothing

Array = npt.NDArray[Any]


def collect(
    folder: Path,
    sources: list[Source],
    tokenizer: Tokenizer,
    texts: Sequence[Path],
    skip_corrupt: bool,
    tags: TagRule,
    width: int = MAX_TEXT,
) -> dict[str, Any]:
    """Write the arrays of `oscar_train.data.corpus.Corpus` into a folder.

    Returns:
        left_out: what had to be, line by line. ground_truth: how many images have such tags for q.

    Raises:
        UsageError: a source has no text; no tag is in the vocabulary; or (without `skip_corrupt`) an index is missing,
            damaged or contradicts itself.
    """
    left_out: list[str] = []

    def refuse(line: str) -> None:
        if not skip_corrupt:
            raise UsageError(f"{FLAG}: {line}; or go on without it: --skip-corrupt")
        left_out.append(line)

    keys = _keys(sources, refuse) if texts else pa.array([], pa.string())
    tag_files = [file for file in texts if ground_truth.is_tag_overlay(file)]
    tag_overlays = ground_truth.read_overlays(keys, tag_files)
    overlays = read_overlays(keys, [file for file in texts if file not in tag_files])
    left_out.clear()  # what the keys lack will be met again
    phrasing = Phrasing(tokenizer, tags, width)
    total = sum(source.manifest.plan.num_images for source in sources)

    with (
        closing(Writer(folder, np.min_scalar_type(tokenizer.size))) as writer,
        meter("images' texts", total, refusal="shards left out") as shown,
    ):
        for source in sources:
            writer.begin_source()
            images, triples = writer.images, writer.triples
            for number in range(len(source.tars)):
                tar_bytes, batches = _opened(source, number, refuse)
                if not skip_corrupt:
                    source.check_size(number, tar_bytes)

                writer.begin_shard(tar_bytes)
                for rows in batches:
                    texts_of = rows.column("texts")
                    for overlay in overlays:
                        texts_of = overlay.laid_over(texts_of, writer.images)

                    for tag_overlay in tag_overlays:
                        gt_tags = tag_overlay.laid_over(rows.column("gt_tags"), writer.images)
                        rows = rows.set_column(rows.schema.get_field_index("gt_tags"), "gt_tags", gt_tags)

                    phrases = phrasing(rows, texts_of)
                    writer.add(rows.column("key"), places(rows, source, number, tar_bytes, skip_corrupt), phrases)
                    shown.show(writer.images, len(left_out))

            _check_texts(source, writer.images - images, writer.triples - triples)

        writer.finish()

    phrasing.tagging.check()
    _forget_common(folder / "content.npy")
    return {"left_out": left_out, "ground_truth": phrasing.tagging.ground_truth}


def _check_texts(source: Source, images: int, triples: int) -> None:
    if not triples:
        raise UsageError(
            f"{FLAG} {source.place}: none of its {images} images has a text; extract with --captions, or add some with "
            "--texts"
        )


class Writer:
    """The files of a corpus while they grow."""

    def __init__(self, folder: Path, token: npt.DTypeLike) -> None:
        dtypes: dict[str, npt.DTypeLike] = {
            **dict.fromkeys(INT32, np.int32),
            **dict.fromkeys(INT64 + STARTS, np.int64),
            **dict.fromkeys(UINT64, np.uint64),
            **dict.fromkeys(("first_offsets", "second_offsets", "key_offsets"), np.int64),
            **{"kind": np.int8, "first_values": token, "second_values": token, "key_values": np.uint8},
        }
        self._files = {name: GrowingArray(folder / f"{name}.npy", dtype) for name, dtype in dtypes.items()}
        for name in ("first", "second", "key"):
            self._add(f"{name}_offsets", 0)

    @property
    def images(self) -> int:
        """How many there are."""
        return self._files["width"].size

    @property
    def triples(self) -> int:
        """How many there are."""
        return self._files["image"].size

    def begin_source(self) -> None:
        """Begin a source; its shards follow."""
        self._add("source_shards", self._files["tar_bytes"].size)

    def begin_shard(self, tar_bytes: int) -> None:
        """Begin a shard; its images follow."""
        self._add("tar_bytes", tar_bytes)
        self._mark()

    def add(self, keys: pa.Array, columns: dict[str, Array], phrases: Phrases) -> None:
        """Write images and their triples behind those that are there."""
        first_image, first_triple, first_row = self.images, self.triples, self._files["second_set"].size
        for name, values in columns.items():
            self._add(name, values)

        self._add("shard", np.full(len(keys), self._files["tar_bytes"].size - 1))
        encoded = [key.encode() for key in keys.to_pylist()]
        self._add("key_xxh3", np.array([xxhash.xxh3_64_intdigest(key) for key in encoded], np.uint64))
        lengths = np.array([0, *map(len, encoded)])
        self._add_rows("key", Ragged(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum(lengths)))
        self._add_rows("first", phrases.first)
        self._add_rows("second", phrases.second)
        self._add("second_set", phrases.second_set)
        self._add("second_row", phrases.second_row + first_row)
        self._add("image", phrases.image + first_image)
        self._add("kind", phrases.kind)
        usable = phrases.second.lengths[phrases.second_row] > 0

        for pool, kind in (("caption_pool", CAPTION), ("qa_pool", QA)):
            self._add(pool, first_triple + np.flatnonzero(usable & (phrases.kind == kind)))

    def finish(self) -> None:
        """Say where the last source and shard end."""
        self.begin_source()
        self._mark()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _mark(self) -> None:
        self._add("shard_images", self.images)
        self._add("shard_triples", self.triples)

    def _add(self, name: str, values: Array | int) -> None:
        self._files[name].add(np.atleast_1d(values))

    def _add_rows(self, name: str, rows: Ragged) -> None:
        self._add(f"{name}_offsets", rows.offsets[1:] + self._files[f"{name}_values"].size)
        self._add(f"{name}_values", rows.values)


def places(rows: pa.RecordBatch, source: Source, number: int, tar_bytes: int, skip_corrupt: bool) -> dict[str, Array]:
    """Return where the regions of some images lie, and what stands for the bytes of their files.

    With `skip_corrupt`, an image whose row contradicts itself or the manifest is marked as unreadable.

    Raises:
        UsageError: there is one, without `skip_corrupt`; reads would go to the wrong bytes.
    """
    columns = {name: _numbers(rows, name) for name in PLACES}
    columns["scales_offset"] = rows.column("scales_offset").fill_null(FLOAT16).to_numpy(zero_copy_only=False)
    columns["content"] = np.array([_content(sha) for sha in rows.column("sha256").to_pylist()], np.uint64)

    for wrong, contradiction in _contradictions(rows, source, tar_bytes):
        if wrong.any() and not skip_corrupt:
            key = rows.column("key")[int(wrong.argmax())]
            raise UsageError(
                f"{FLAG}: {source.named(number)}: image {key} {contradiction}; extract it "
                "again, or go on without such images: --skip-corrupt"
            )
        columns["features_offset"] = np.where(wrong, UNREADABLE, columns["features_offset"])

    return columns


def _contradictions(
    rows: pa.RecordBatch, source: Source, tar_bytes: int
) -> Iterator[tuple[npt.NDArray[np.bool_], str]]:
    """Yield which images are wrong, and what to say of the first of them."""
    detector = source.manifest.detector
    if detector.dtype not in DTYPES:
        raise UsageError(
            f"{FLAG}: manifest.json of {source.place} has features of dtype {detector.dtype!r}; known: "
            f"{', '.join(DTYPES)}"
        )

    int8 = detector.dtype == "int8"
    wrong = rows.column("scales_offset").is_valid().to_numpy(zero_copy_only=False) != int8
    yield wrong, f"has features as {DTYPES[not int8]}, manifest.json says {detector.dtype}"
    count = _numbers(rows, "num_boxes").astype(np.int64)
    each = {"boxes": 16, "scales": 4 * int8, "features": (1 if int8 else 2) * detector.feature_dim}

    for name, size in each.items():
        begin, length = _numbers(rows, f"{name}_offset"), _numbers(rows, f"{name}_bytes")
        wrong = length != count * size
        n = int(wrong.argmax())
        contradiction = f"has {length[n]} {name}_bytes for {count[n]} regions, not {size} each"
        yield wrong, f"{contradiction} (P = {detector.feature_dim} in manifest.json)"
        outside = (begin < 0) | (length < 0) | (length > tar_bytes - begin)
        yield outside & (tar_bytes >= 0), f"has {name} outside its tar of {tar_bytes:,} bytes"

    yield np.minimum(_numbers(rows, "width"), _numbers(rows, "height")) < 1, "has no size"


def _numbers(rows: pa.RecordBatch, name: str) -> Array:
    numbers: Array = rows.column(name).fill_null(0).to_numpy(zero_copy_only=False)
    return numbers


def _content(sha256: str | None) -> int:
    """Return a number that stands for an image file's bytes; 0 if nothing is known of them."""
    return xxhash.xxh3_64_intdigest(sha256.encode()) if sha256 else 0


def _forget_common(path: Path) -> None:
    """Forget contents that more images claim to have than can be one: it is a placeholder's, and tells nothing."""
    content = np.load(path, mmap_mode="r+")
    _, inverse, counts = np.unique(content, return_inverse=True, return_counts=True)
    content[counts[inverse] > SAME] = 0
    content.flush()


def _opened(source: Source, number: int, refuse: Callable[[str], None]) -> tuple[int, Iterator[pa.RecordBatch]]:
    """Return how long a tar was when its index was made, and the rows of the index, as far as they can be read."""

    def readable(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except ValueError as error:
            refuse(f"{source.named(number)}: {error}")

    try:
        tar_bytes, batches = source.index(number)
    except ValueError as error:
        refuse(f"{source.named(number)}: {error}")
        return 0, iter(())

    return tar_bytes, _ahead(readable(batches))


def _ahead(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the same, each read while the one before is worked on."""
    with ThreadPoolExecutor(1, "index") as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


def _keys(sources: list[Source], refuse: Callable[[str], None]) -> pa.Array:
    """Return the keys of all images, in the order in which they are collected."""
    shards = ((source, number) for source in sources for number in range(len(source.tars)))
    keys = [rows.column("key") for shard in shards for rows in _opened(*shard, refuse)[1]]
    return pa.concat_arrays(keys) if keys else pa.array([], pa.string())
