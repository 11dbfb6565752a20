"""`oscar-shards show`: some images of shards on one page, with photos, boxes, tags, scores and texts."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.errors import UsageError, nearest, reason, shorten
from oscar_common.files import check_output_file, no_folder, replacing
from oscar_common.progress import meter, plural
from oscar_shards.manifest import Manifest
from oscar_shards.pages.page import MARK, page, size, text
from oscar_shards.pages.photos import find_photos
from oscar_shards.pages.view import MOST, sheet
from oscar_shards.read import manifest_of, read_index, tars_at

MIN_SCORE = 0.3  # at first; the page has a slider
CANDIDATES = 10_000  # names among which one is looked for that was meant
LISTS = ("tags", "scores", "attributes", "texts")


def show(
    path: Path,
    keys: Sequence[str],
    tags: Sequence[str],
    images: Path | None,
    limit: int,
    html: Path,
    overwrite: bool = False,
) -> None:
    """Write the page of at most `limit` images: those with these keys, those with any of these tags, else the first.

    Raises:
        UsageError: nothing to read or to write there, or a key or tag that no image has.
    """
    tars, manifest = tars_at(path), manifest_of(path)
    if images is not None and not images.is_dir():
        raise UsageError(f"--images {images}: {no_folder(images)}; give the one that has the photos")

    check_output_file(html, "--html", mark=MARK, overwrite=overwrite)
    rows = choose(path, keys, tags, limit)
    photos = _photos(rows, images)
    lead = _lead(len(rows), len(tars), limit, manifest)

    with replacing(html) as file:
        body = _body(path, lead, sheet(rows, photos, MIN_SCORE, _first(tags)))
        for piece in page(f"Shards: {path.name or path}", body):
            file.write(piece.encode("utf-8", "replace"))

    num_photos = sum(photo is not None for photo in photos)
    blank = f" ({len(rows) - num_photos:,} without their photo)" if images and num_photos < len(rows) else ""
    print(f"{html}: {plural(len(rows), 'image')}{blank}, {size(html.stat().st_size)}")


def _photos(rows: Sequence[tuple[Path, dict[str, Any]]], images: Path | None) -> list[Path | None]:
    """Return where each image's photo lies in `images`, if anywhere.

    Raises:
        UsageError: it has none of them.
    """
    if images is None:
        return [None] * len(rows)

    photos = find_photos(images, [row for _, row in rows])
    if rows and not any(photos):
        name = rows[0][1].get("path") or rows[0][1].get("key")
        raise UsageError(
            f"--images {images}: it has none of the {len(rows):,} photos (the first is {shorten(str(name))!r}); give "
            "the folder that was extracted, or leave --images out for blank canvases"
        )

    return photos


def _first(tags: Sequence[str]) -> str:
    return tags[0] if len(tags) == 1 else ""


def _body(path: Path, lead: str, sheet: Iterator[str]) -> Iterator[str]:
    yield f'<h1>{text(path)}</h1>\n<p class="lead">{lead}</p>\n'
    yield from sheet


def _lead(shown: int, shards: int, limit: int, manifest: Manifest | None) -> str:
    more = "; --limit shows more" if shown == limit else ""
    parts = [f"{plural(shown, 'image')} of {plural(shards, 'shard')}{more}"]
    if manifest:
        detector = manifest.detector
        parts.append(f"detector {text(detector.name)}, preset {text(detector.preset)}, P = {detector.feature_dim:,}")
    return " · ".join(parts)


def choose(
    path: Path, keys: Sequence[str] = (), tags: Sequence[str] = (), limit: int = 100
) -> list[tuple[Path, dict[str, Any]]]:
    """Return (tar, row) of the images asked for, reading one shard after the other and no more than needed.

    Raises:
        UsageError: a key or a tag that no image has.
    """
    images: list[tuple[Path, dict[str, Any]]] = []
    tars = tars_at(path)
    missing, met = set(keys), _Names()

    with meter("shards", len(tars)) as shown:
        for number, tar in enumerate(tars, start=1):
            table = checked_index(tar)
            chosen = table.filter(_wanted(table, keys, tags)).slice(0, limit - len(images))
            images += [(tar, row) for row in _rows(chosen)]
            missing -= set(chosen["key"].to_pylist()) if missing else set()
            shown.show(number, 0)
            if len(images) == limit or (keys and not missing):
                return images

            met.add(table["key"] if keys else pc.list_flatten(table["tags"]) if tags else None)

    if keys and missing and not tags:
        raise UsageError(f"--key {min(missing)!r}: no image of {path} has it{met.like(min(missing))}")
    if tags and not images:
        raise UsageError(f"--tag {tags[0]!r}: no image of {path} has it{met.like(tags[0])}")

    return images


class _Names:
    """Some of the keys or tags that were met, to say which one may have been meant."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def add(self, column: Any) -> None:
        """Note the names of a shard, as long as there is room."""
        if column is not None and len(self.names) < CANDIDATES:
            self.names |= dict.fromkeys(n for n in pc.unique(column)[:CANDIDATES].to_pylist() if n is not None)

    def like(self, name: str) -> str:
        """Return the nearest names, as the tail of a message."""
        close = difflib.get_close_matches(name[:200], [n for n in self.names if len(n) < 200], n=5, cutoff=0.3)
        listed = close or list(self.names)[:5]
        return nearest(name, listed, len(self.names) - len(listed))


def checked_index(tar: Path) -> pa.Table:
    """Return the index of a tar, every string of it valid.

    Raises:
        UsageError: it is damaged.
    """
    try:
        table = read_index(tar)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"PATH {tar}: its index is damaged ({reason(error)}); run: oscar-shards index {tar}") from None
    return table


def _wanted(table: pa.Table, keys: Sequence[str], tags: Sequence[str]) -> pa.Array:
    """Return whether each row has one of the keys and one of the tags (in any case), as far as any are asked for."""
    mask = pa.repeat(True, len(table))
    if keys:
        mask = pc.and_(mask, pc.is_in(table["key"].combine_chunks(), value_set=pa.array(keys, pa.string())))

    if tags:
        column = table["tags"].combine_chunks()
        has = pc.is_in(pc.utf8_lower(column.flatten()), value_set=pc.utf8_lower(pa.array(tags, pa.string())))
        rows = pc.list_parent_indices(column).filter(has)
        mask = pc.and_(mask, pc.is_in(pa.array(range(len(table)), rows.type), value_set=rows))

    return mask


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return rows as dicts, of each list no more than is shown."""
    for name in LISTS:
        table = table.set_column(table.schema.get_field_index(name), name, pc.list_slice(table[name], 0, MOST))
    return table.to_pylist()  # type: ignore[no-any-return]
