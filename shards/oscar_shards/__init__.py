"""The format between the stages: tar shards with a Parquet index beside each, and one manifest a folder.

Public are the names in `__all__`; docs/python.md shows them in use. Reading needs no torch.

    open_folder                     a folder of shards: its manifest, its tars, and one table of all images
    read_features, read_boxes       the arrays of one image, at their offsets
    read_samples                    everything in a tar, image by image
    write_folder                    samples to a new folder of shards
    write_shard, write_manifest     the same in parts, for writers that run side by side
"""

from typing import TYPE_CHECKING

from oscar_common.lazy import lazy_names

__all__ = [
    "DetectorRecord",
    "Layout",
    "Manifest",
    "PlanRecord",
    "Reject",
    "ShardFolder",
    "open_folder",
    "read_boxes",
    "read_features",
    "read_samples",
    "shard_path",
    "write_folder",
    "write_manifest",
    "write_shard",
]

if TYPE_CHECKING:
    from oscar_shards.manifest import DetectorRecord, Layout, Manifest, PlanRecord, write_manifest
    from oscar_shards.read import ShardFolder, open_folder, read_boxes, read_features, read_samples
    from oscar_shards.write import Reject, shard_path, write_folder, write_shard
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "oscar_shards.manifest": ["DetectorRecord", "Layout", "Manifest", "PlanRecord", "write_manifest"],
            "oscar_shards.read": ["ShardFolder", "open_folder", "read_boxes", "read_features", "read_samples"],
            "oscar_shards.write": ["Reject", "shard_path", "write_folder", "write_shard"],
        },
    )
