"""What the values in shards must be: boxes within their image, tags of the vocabulary, scores from 0 to 1."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from oscar_shards.manifest import Layout, Manifest
from oscar_shards.samples import Entry

SLACK = 1.0  # pixels that a box may reach over the edge: some extractors round so
KINDS = ("caption", "qa")
Bools = npt.NDArray[np.bool_]


class Boxes:
    """The boxes of many images, gathered to be checked at once."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._boxes: list[npt.NDArray[np.float32]] = []

    def add(self, key: str, boxes: npt.NDArray[np.float32]) -> None:
        """Keep a copy of boxes [K, 4]."""
        self._keys.append(key)
        self._boxes.append(boxes.copy())

    def drop(self, keys: set[str]) -> None:
        """Forget some images."""
        if keys:
            kept = [n for n, key in enumerate(self._keys) if key not in keys]
            self._keys, self._boxes = [self._keys[n] for n in kept], [self._boxes[n] for n in kept]

    def outside(self, width: npt.NDArray[np.float64], height: npt.NDArray[np.float64]) -> Bools:
        """Return which images have a box that is no box within width [N] x height [N]; bool [N]."""
        counts = [len(b) for b in self._boxes]
        image = np.repeat(np.arange(len(counts)), counts)
        x1, y1, x2, y2 = np.concatenate([np.zeros((0, 4), np.float32), *self._boxes]).T
        inside = (x1 >= -SLACK) & (y1 >= -SLACK) & (x1 <= x2) & (y1 <= y2)  # each is false for NaN
        inside &= (x2 <= width[image] + SLACK) & (y2 <= height[image] + SLACK)
        is_outside = np.zeros(len(counts), bool)
        is_outside[image[~inside]] = True

        return is_outside


def check_fit(entries: Iterator[Entry], manifest: Manifest | None, faults: list[tuple[str, str]]) -> Iterator[Entry]:
    """Pass images on and note which are not as large as the manifest says, or without one, as the first."""
    layout = manifest.layout if manifest else None
    for entry in entries:
        assert entry.features
        k, p = entry.features.shape
        dtype = "int8" if entry.scales else "float16"
        layout = layout or Layout(feature_dim=p, dtype=dtype)
        if (p, dtype) != (layout.feature_dim, layout.dtype):
            expected = f"{layout.dtype} [K, {layout.feature_dim}]"
            faults.append((entry.key, f"features are {dtype} [{k}, {p}]; in this folder they are {expected}"))

        if layout.max_boxes is not None and k > layout.max_boxes:
            faults.append((entry.key, f"{k} regions; manifest.json says at most {layout.max_boxes}"))

        yield entry


def check_values(table: pa.Table, boxes: Boxes, manifest: Manifest | None) -> Iterator[tuple[str, str]]:
    """Yield (key, fault) for the rows of an index whose values are not what they must be."""
    width, height = (pc.cast(table[n], pa.float64()).fill_null(0).to_numpy() for n in ("width", "height"))
    count = table["num_boxes"].to_numpy()
    lengths = {n: pc.list_value_length(table[n]).to_numpy() for n in ("tags", "scores", "attributes")}
    checks: list[tuple[Bools, str]] = [
        ((width < 1) | (height < 1), "its width or height is missing"),
        (boxes.outside(*(np.where(n < 1, np.inf, n) for n in (width, height))), "a box is not within the image"),
        ((lengths["tags"] != count) & (lengths["tags"] != 0), "it has not as many tags as boxes"),
        (lengths["scores"] != lengths["tags"], "it has not as many scores as tags"),
        ((lengths["attributes"] != count) & (lengths["attributes"] != 0), "it has not as many attributes as boxes"),
        (_rows(table["scores"], _no_probability(_flat(table["scores"]))), "a score is not between 0 and 1"),
        (_rows(table["texts"], _no_text(_flat(table["texts"]))), "a text is no caption, and no question with answer"),
    ]
    known = pa.array(manifest.detector.classes if manifest else [], pa.string())
    tags = _flat(table["tags"])
    strange = pc.invert(pc.is_in(tags, value_set=known)) if len(known) else pc.is_null(tags)
    checks.append((_rows(table["tags"], strange), "a tag is not of the detector's vocabulary"))
    checks.append((_rows(table["gt_tags"], pc.is_null(_flat(table["gt_tags"]))), "one of its gt_tags is no text"))

    for wrong, message in checks:
        yield from ((str(table["key"][int(row)]), message) for row in np.flatnonzero(wrong))


def _flat(column: pa.ChunkedArray) -> pa.Array:
    flat = pc.list_flatten(column).combine_chunks()
    return flat.chunk(0) if isinstance(flat, pa.ChunkedArray) else flat


def _rows(column: pa.ChunkedArray, wrong: pa.Array) -> Bools:
    """Return for each list whether any of its items is `wrong`, which counts the items of all lists."""
    lengths = pc.list_value_length(column).to_numpy()
    is_bad = np.zeros(len(lengths), bool)
    is_bad[np.repeat(np.arange(len(lengths)), lengths)[wrong.to_numpy(zero_copy_only=False).astype(bool)]] = True
    return is_bad


def _no_probability(scores: pa.Array) -> pa.Array:
    fine = pc.and_(pc.greater_equal(scores, 0.0), pc.less_equal(scores, 1.0))  # false for NaN
    return pc.invert(fine.fill_null(False))


def _no_text(texts: pa.StructArray) -> pa.Array:
    kind, text, question, answer = (pc.struct_field(texts, n) for n in ("kind", "text", "question", "answer"))
    caption = pc.and_(pc.equal(kind, KINDS[0]), pc.is_valid(text))
    qa = pc.and_(pc.equal(kind, KINDS[1]), pc.and_(pc.is_valid(question), pc.is_valid(answer)))
    return pc.invert(pc.or_(caption, qa).fill_null(False))
