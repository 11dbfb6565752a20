"""Pages of photos with what a model said of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from oscar_common.files import replacing
from oscar_common.progress import plural
from oscar_shards.pages.page import page, text
from oscar_shards.pages.photos import find_photos
from oscar_shards.pages.show import MIN_SCORE
from oscar_shards.pages.view import sheet
from oscar_train.captioning.writer import Captioned

MODEL = "model"  # the source of its captions on a page


def write_page(path: Path, captions: Sequence[Captioned], images: Path | None, title: str) -> None:
    """Write a page of photos with their captions, before the captions that the shards have.

    Args:
        images: the folder of the photos; None: blank canvases instead.
    """
    rows = [(captioned.tar, _row(captioned)) for captioned in captions]
    photos = find_photos(images, [row for _, row in rows]) if images is not None else [None] * len(rows)

    def body() -> Iterator[str]:
        yield f'<h1>{text(title)}</h1>\n<p class="lead">{plural(len(rows), "photo")}</p>\n'
        yield from sheet(rows, photos, MIN_SCORE, "")

    with replacing(path) as file:
        for piece in page(title, body()):
            file.write(piece.encode("utf-8", "replace"))


def _row(captioned: Captioned) -> dict[str, object]:
    record = {"kind": "caption", "text": captioned.caption, "source": MODEL}
    return {**captioned.row, "texts": [record, *(captioned.row.get("texts") or [])]}
