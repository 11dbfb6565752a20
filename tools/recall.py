"""How many of a COCO annotation file's boxes a folder of shards has found: a check of an extraction on known images."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from torchvision.ops import box_iou

from oscar_shards.read import open_folder, read_boxes


@click.command()
@click.argument("shards", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("instances", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--iou", default=0.5, show_default=True, help="A box is found if a region overlaps it this much.")
def main(shards: Path, instances: Path, iou: float) -> None:
    """Print the recall of SHARDS' regions over INSTANCES (a COCO instances_*.json of the same images)."""
    truth = _boxes(json.loads(instances.read_bytes()))
    folder = open_folder(shards)
    total = by_box = by_tag = 0
    for row in folder.table.to_pylist():
        boxes, names = truth[Path(row["path"]).name]
        total += len(boxes)
        if not len(boxes) or not row["num_boxes"]:
            continue
        found = torch.from_numpy(read_boxes(folder.tars[row["shard"]], row))
        overlaps = (box_iou(torch.from_numpy(boxes), found) >= iou).numpy()  # [boxes, regions]
        by_box += int(overlaps.any(1).sum())
        by_tag += int((overlaps & (names[:, None] == np.array(row["tags"])[None])).any(1).sum())
    print(f"{total} boxes in {folder.table.num_rows} images; recall at IoU {iou}: {by_box / max(total, 1):.3f}", end="")
    print(f", with the same tag {by_tag / max(total, 1):.3f}")


def _boxes(coco: dict[str, Any]) -> dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.str_]]]:
    """Return boxes (crowds too), float32 xyxy [N, 4], and class names [N] of each image by its file name."""
    classes = {c["id"]: c["name"] for c in coco["categories"]}
    files = {i["id"]: i["file_name"] for i in coco["images"]}
    rows: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for a in coco["annotations"]:
        rows[files[a["image_id"]]].append((*a["bbox"], classes[a["category_id"]]))
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.str_)
    boxes: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.str_]]] = defaultdict(lambda: none)
    for file, found in rows.items():
        corners = np.array([r[:4] for r in found], np.float32)
        corners[:, 2:] += corners[:, :2]
        boxes[file] = corners, np.array([r[4] for r in found])
    return boxes


if __name__ == "__main__":
    main()
