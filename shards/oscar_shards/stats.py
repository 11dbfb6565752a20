"""What a folder of shards holds, in numbers."""

from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from oscar_shards.read import ShardFolder, read_rejects


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


def count(folder: ShardFolder) -> Stats:
    """Count what the indexes of a folder say."""
    table, rejects = folder.table, read_rejects(folder)
    regions = table["num_boxes"].to_numpy()
    texts = table["texts"].combine_chunks().flatten()
    return Stats(
        images=len(table),
        images_without_text=int((table["texts"].combine_chunks().value_lengths().to_numpy() == 0).sum()),
        triples=_counter(
            pc.binary_join_element_wise(pc.struct_field(texts, "source"), pc.struct_field(texts, "kind"), ", ")
        ),
        regions=int(regions.sum()),
        regions_min=int(regions.min(initial=regions.max(initial=0))),
        regions_max=int(regions.max(initial=0)),
        tags=_counter(table["tags"].combine_chunks().flatten()),
        rejects=_counter(rejects["reason"]) if rejects else Counter(),
        shards=len(folder.tars),
        bytes=sum(tar.stat().st_size for tar in folder.tars),
    )


def _counter(names: pa.Array) -> Counter[str]:
    return Counter({row["values"]: row["counts"] for row in pc.value_counts(names).to_pylist()})
