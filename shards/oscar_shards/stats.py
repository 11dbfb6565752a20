"""What shards hold, in numbers: counted by Arrow, one shard after the other, so that memory does not grow with them."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oscar_shards.index import index_path
from oscar_shards.read import read_rejects

COLUMNS = ["num_boxes", "tags", "texts"]
SCORE_BINS = 20
Ints = npt.NDArray[np.int64]


def _no_scores() -> Ints:
    return np.zeros(SCORE_BINS, np.int64)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts over shards, which can be added. A triple is an image with one of its texts.

    scores: int64 [20], regions by their score, in twentieths. attributes, scores: only with all columns counted.
    """

    images: int = 0
    images_without_text: int = 0
    triples: Counter[str] = field(default_factory=Counter)  # by "source, kind"
    regions_of_image: Counter[int] = field(default_factory=Counter)  # images by their number of regions
    tags: Counter[str] = field(default_factory=Counter)
    attributes: Counter[str] = field(default_factory=Counter)
    scores: Ints = field(default_factory=_no_scores)
    rejects: Counter[str] = field(default_factory=Counter)  # by reason
    shards: int = 0
    bytes: int = 0
    index_bytes: int = 0

    def __add__(self, other: "Stats") -> "Stats":
        names = [f.name for f in dataclasses.fields(self)]
        return Stats(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def regions(self) -> int:
        """Regions of all images."""
        return sum(n * images for n, images in self.regions_of_image.items())

    @property
    def regions_min(self) -> int:
        """Least regions of an image."""
        return min(self.regions_of_image, default=0)

    @property
    def regions_max(self) -> int:
        """Most regions of an image."""
        return max(self.regions_of_image, default=0)

    @property
    def regions_mean(self) -> float:
        """Regions per image."""
        return self.regions / max(self.images, 1)


def count(tars: Sequence[Path]) -> Stats:
    """Count what the indexes of shards say of images, texts, regions, tags and rejects."""
    return reduce(add, (count_shard(tar, pq.read_table(index_path(tar), columns=COLUMNS)) for tar in tars), Stats())


def count_shard(tar: Path, table: pa.Table) -> Stats:
    """Count what one shard's index says; attributes and scores only if these columns are among those given."""
    of_image = table["texts"].combine_chunks()
    texts = of_image.flatten()
    names = (pc.fill_null(pc.struct_field(texts, name), "?") for name in ("source", "kind"))
    refused = read_rejects([tar])
    index = index_path(tar)
    columns = set(table.column_names)

    return Stats(
        images=len(table),
        images_without_text=int((pc.fill_null(pc.list_value_length(of_image), 0).to_numpy() == 0).sum()),
        triples=_counter(pc.binary_join_element_wise(*names, ", ")),
        regions_of_image=_counter(table["num_boxes"]),
        tags=_counter(pc.list_flatten(table["tags"])),
        attributes=_counter(_attributes(table["attributes"])) if "attributes" in columns else Counter(),
        scores=_scores(table["scores"]) if "scores" in columns else _no_scores(),
        rejects=_counter(refused["reason"]) if refused is not None else Counter(),
        shards=1,
        bytes=tar.stat().st_size,
        index_bytes=index.stat().st_size if index.exists() else 0,
    )


def quantile(counts: Counter[int], share: float) -> int:
    """Return the least number that at least `share` of those counted do not exceed."""
    numbers = sorted(counts)
    sums = np.cumsum([counts[n] for n in numbers])
    return numbers[int(np.searchsorted(sums, share * sums[-1]))] if numbers else 0


def mean(counts: Counter[int]) -> float:
    """Return the mean of the numbers counted."""
    return sum(n * times for n, times in counts.items()) / max(counts.total(), 1)


def _attributes(column: pa.ChunkedArray) -> Any:
    return pc.struct_field(pc.list_flatten(pc.list_flatten(column)), "name")


def _scores(column: pa.ChunkedArray) -> Ints:
    scores = pc.drop_null(pc.list_flatten(column)).to_numpy()
    return np.histogram(scores[(scores >= 0) & (scores <= 1)], SCORE_BINS, (0.0, 1.0))[0].astype(np.int64)


def _counter(names: Any) -> "Counter[Any]":
    values, counts = pc.value_counts(names).flatten()
    return Counter({v: n for v, n in zip(values.to_pylist(), counts.to_pylist(), strict=True) if v is not None})
