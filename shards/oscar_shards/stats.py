"""What a folder of shards holds, in numbers."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oscar_shards.index import index_path
from oscar_shards.read import read_rejects


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts over all shards of a folder. A triple is an image with one of its texts."""

    images: int
    images_without_text: int
    triples: Counter[str]  # by "source, kind"
    regions: int
    regions_min: int
    regions_max: int
    tags: Counter[str]
    rejects: Counter[str]  # by reason
    shards: int
    bytes: int

    @property
    def regions_mean(self) -> float:
        """Regions per image."""
        return self.regions / max(self.images, 1)


def count(tars: list[Path]) -> Stats:
    """Count what the indexes of shards say, one shard after the other."""
    triples, tags, rejects = Counter[str](), Counter[str](), Counter[str]()
    images = without_text = regions = most = size = 0
    least: int | None = None
    for tar in tars:
        table = pq.read_table(index_path(tar), columns=["num_boxes", "tags", "texts"])
        found, of_image = table["num_boxes"].to_numpy(), table["texts"].combine_chunks()
        texts = of_image.flatten()
        names = (pc.struct_field(texts, "source"), pc.struct_field(texts, "kind"))
        triples += _counter(pc.binary_join_element_wise(*names, ", "))
        tags += _counter(table["tags"].combine_chunks().flatten())
        images, regions, size = images + len(table), regions + int(found.sum()), size + tar.stat().st_size
        without_text += int((of_image.value_lengths().to_numpy() == 0).sum())
        if len(found):
            lowest, most = int(found.min()), max(most, int(found.max()))
            least = lowest if least is None else min(least, lowest)
        if (refused := read_rejects([tar])) is not None:
            rejects += _counter(refused["reason"])
    return Stats(
        images=images,
        images_without_text=without_text,
        triples=triples,
        regions=regions,
        regions_min=least or 0,
        regions_max=most,
        tags=tags,
        rejects=rejects,
        shards=len(tars),
        bytes=size,
    )


def _counter(names: pa.Array) -> Counter[str]:
    return Counter({row["values"]: row["counts"] for row in pc.value_counts(names).to_pylist()})
