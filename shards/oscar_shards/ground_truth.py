"""Ground-truth tags laid over shards: a Parquet file with the columns `key` and `gt_tags`; the shards stay as they are.

The tags come from files in the format of COCO's instances_*.json: the category names of an image's annotations, in the
order of the file and as often as they occur, crowds included. Oscar's code, too, keeps order and duplicates.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oscar_common.errors import UsageError
from oscar_common.files import replacing
from oscar_common.progress import plural
from oscar_common.tables import Ints, array, find, reading
from oscar_common.text_files import read_json
from oscar_shards.read import tars_at
from oscar_shards.seal import write_sealed
from oscar_shards.texts import check_overlay_file, image_names, match_images, warn_of

FLAG = "--ground-truth"
FORMAT = b"oscar.gt_tags"  # key of the schema's metadata: the format's version
VERSION = b"1"
TAGS = pa.list_(pa.string())
OVERLAY = pa.schema([("key", pa.string()), ("gt_tags", TAGS)], {FORMAT: VERSION})


def read_instances(path: Path) -> dict[str, list[str]]:
    """Read the tags of images, by file name; images without annotation have none and are left out.

    Raises:
        UsageError: the file cannot be read, is no instances file, or an annotation has an unknown image or category.
    """
    if not path.is_file():
        raise UsageError(f"{FLAG} {path}: no such file; give one like COCO's instances_val2017.json")

    with reading(path, FLAG):
        content = read_json(path, FLAG)
        lists = ("images", "annotations", "categories")
        if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in lists):
            raise UsageError(f"{FLAG} {path}: not COCO instances; needed are the lists {', '.join(lists)}")

        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        names = {category["id"]: str(category["name"]) for category in content["categories"]}

        tags: dict[str, list[str]] = {}

        for annotation in content["annotations"]:
            image, category = annotation["image_id"], annotation.get("category_id")
            if image not in files:
                raise UsageError(f"{FLAG} {path}: an annotation has the image_id {image!r}, which is not in `images`")
            if category not in names:
                raise UsageError(
                    f"{FLAG} {path}: an annotation of image {image!r} has the category_id {category!r}, which is not "
                    "in `categories`; give instances_*.json"
                )

            tags.setdefault(files[image], []).append(names[category])

    return tags


def write_overlay(path: Path, files: Sequence[Path], out: Path, overwrite: bool = False) -> None:
    """Write the ground-truth tags of some instances files as an overlay for the shards at `path`, a folder or a tar.

    Raises:
        UsageError: no shards, a file that cannot be read or names none of their images, or an `out` of another form.
    """
    began = time.monotonic()
    check_overlay_file(out, overwrite, FORMAT)
    images = pa.concat_tables([image_names(tar) for tar in tars_at(path)])

    tags_by_row: dict[int, list[str]] = {}

    for file in files:
        tags = read_instances(file)
        rows = match_images(pa.array(list(tags), pa.string()), images)
        if not (rows >= 0).any():
            like = images["path"][0].as_py() if len(images) else None
            raise UsageError(
                f"{FLAG} {file}: none of its {len(tags):,} annotated images is in {path} (images there are like "
                f"{like!r}); give the instances of these images"
            )

        for row, names in zip(rows.tolist(), tags.values(), strict=True):
            if row >= 0:
                tags_by_row.setdefault(row, []).extend(names)

    order = sorted(tags_by_row)
    keys = array(images["key"]).take(pa.array(order, pa.int64()))
    overlay = pa.table([keys, pa.array([tags_by_row[row] for row in order], TAGS)], schema=OVERLAY)
    out.parent.mkdir(parents=True, exist_ok=True)

    with replacing(out) as file_out:
        write_sealed(overlay, file_out, compression="zstd", write_page_checksum=True)

    number, seconds = sum(map(len, tags_by_row.values())), time.monotonic() - began
    print(f"{out}: {plural(number, 'tag')} for {len(order):,} of {plural(len(images), 'image')}, {seconds:.1f} s")


@dataclass(frozen=True)
class TagOverlay:
    """Ground-truth tags, `gt_tags` [N], of the images that stand in `rows` (int64 [N], ascending) of a table."""

    gt_tags: pa.ListArray
    rows: Ints

    def laid_over(self, gt_tags: pa.ListArray, start: int) -> pa.ListArray:
        """Return the tags of the images from row `start` on; those that this overlay has replace the images' own."""
        begin, end = np.searchsorted(self.rows, (start, start + len(gt_tags)))
        source = np.arange(len(gt_tags))
        source[self.rows[begin:end] - start] = len(gt_tags) + np.arange(end - begin)
        return pa.concat_arrays([gt_tags.cast(TAGS), self.gt_tags[begin:end]]).take(pa.array(source))


def is_tag_overlay(file: Path) -> bool:
    """Whether a file is an overlay of ground-truth tags; False for one that cannot be read."""
    try:
        return FORMAT in (pq.read_schema(file).metadata or {})
    except (OSError, pa.ArrowInvalid):
        return False


def read_overlays(keys: pa.Array, files: Iterable[Path], flag: str = "--texts") -> list[TagOverlay]:
    """Read overlays of ground-truth tags for the images that have these keys, row by row.

    Raises:
        UsageError: a file is damaged, of a later format, has other columns, or names no image.
    """
    return [_read_overlay(keys, file, flag) for file in files]


def _read_overlay(keys: pa.Array, file: Path, flag: str) -> TagOverlay:
    with reading(file, flag):
        overlay = pq.read_table(file, partitioning=None, page_checksum_verification=True)
        version = (overlay.schema.metadata or {}).get(FORMAT)
        if version != VERSION or overlay.schema.names != OVERLAY.names:
            raise UsageError(f"{flag} {file}: not an overlay that this version reads; make it with: oscar-shards tags")
        overlay = overlay.cast(OVERLAY)

    rows = find(array(overlay["key"]), keys)
    strays = int((rows < 0).sum())
    if strays == len(rows):
        raise UsageError(
            f"{flag} {file}: none of its {len(rows):,} keys is an image's; make it with: oscar-shards tags"
        )

    if strays:
        warn_of(f"{strays:,} of {len(rows):,} keys are no image's", f"{flag} {file}")

    order = np.argsort(rows, kind="stable")[strays:]
    return TagOverlay(array(overlay["gt_tags"]).take(pa.array(order)), rows[order])
