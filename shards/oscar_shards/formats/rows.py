"""What the other formats have in common: rows that become samples or are refused, their numbers, names and ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from oscar_common.sample import Attribute, ImageRecord, Regions, Sample, Text, make_key
from oscar_shards.formats.fields import Floats, Ints, Refused
from oscar_shards.write import Reject

if TYPE_CHECKING:
    from oscar_shards.formats.lines import Lines

SIDE_LIMIT = 2**31 - 1  # pixels: what the index can hold


class Rows(Protocol):
    """Images in another format, in their order. Picklable: a part of them is what a process gets."""

    @property
    def paths(self) -> list[Path]:
        """The files, which `file` counts."""

    @property
    def ids(self) -> list[str]:
        """The id of each image; "" where it has none."""

    @property
    def sources(self) -> list[str]:
        """The name of each image's dataset."""

    @property
    def notes(self) -> list[str]:
        """What people should know, a line each."""

    @property
    def file(self) -> Ints:
        """Which of `paths` has each image."""

    @property
    def num_texts(self) -> int:
        """Texts of all images."""

    @property
    def misfits(self) -> list[Reject]:
        """What belongs to no image, like a text of an image that is not there."""

    def take(self, rows: Ints) -> "Rows":
        """Return some of them."""

    def name(self, row: int) -> str:
        """Return the id of an image, or FILE:LINE where it has none."""

    def read(self, row: int, lines: "Lines") -> tuple[Sample, list[Reject]]:
        """Read an image: features as they are in the file, and which of its texts were refused.

        Raises:
            Refused: it is damaged.
        """


def make_sample(
    id: str,
    source: str,
    size: tuple[int, int],
    boxes: Floats,
    features: npt.NDArray[np.floating[Any]],
    tags: list[str],
    scores: list[float],
    attributes: list[list[Attribute]],
    texts: list[Text],
    gt_tags: Sequence[str] = (),
) -> Sample:
    """Return the sample of an image: `size` is width and height, boxes [K, 4], features [K, P]; the path is unknown.

    Raises:
        Refused: it has no id, or a size that is none.
    """
    if not id:
        raise Refused("no-id", "no id in the first field")

    for name, side in zip(("width", "height"), size, strict=True):
        if not 0 < side <= SIDE_LIMIT:
            raise Refused("no-size", f"a {name} of {side} pixels")

    return Sample(
        key=make_key(f"{source}/{id}"),
        image=ImageRecord(source=source, id=id, path="", width=size[0], height=size[1], sha256=""),
        regions=Regions(boxes=boxes, features=features, tags=tags, scores=scores, attributes=attributes),
        texts=texts,
        gt_tags=list(gt_tags),
    )
