"""Captions for one's own photos, from Python.

from oscar_train.predict.captions import caption
for photo in caption("run", images="photos"):
    print(photo.name, photo.caption)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oscar_common.errors import UsageError

if TYPE_CHECKING:
    from oscar_train.captioning.writer import Captioned

BUILTIN = "builtin"  # the detector in the box


def caption(
    model: str | Path,
    *,
    shards: str | Path | None = None,
    images: str | Path | None = None,
    mention: Sequence[str] = (),
    beams: int = 5,
    batch_size: int = 32,
    detector: str = BUILTIN,
    device: str = "auto",
    precision: str = "fp32",
    cache: Path | None = None,
) -> "Iterator[Captioned]":
    """Write a caption for each photo; see `oscar-predict caption --help`.

    Args:
        model: a run of oscar-finetune caption, one of its checkpoints, or the folder of microsoft/Oscar's.
        shards: the photos, as oscar-extract wrote them.
        images: or a folder of them, from which oscar-extract makes shards first.
        mention: words that each caption should mention, each with its forms between `|`.

    Raises:
        UsageError, OperationError: in one line, what the command would say.
    """
    from oscar_shards.read import open_folder
    from oscar_train.captioning.constraints import check_words
    from oscar_train.captioning.writer import caption_folder, open_writer
    from oscar_train.predict.photos import extract

    check_words(mention)
    if shards is None:
        if images is None:
            raise UsageError("no photos: give a folder of them, or the shards that oscar-extract wrote")
        shards = extract(Path(images), cache, detector)

    folder = open_folder(Path(shards))
    writer = open_writer(Path(model), folder.manifest.detector.feature_dim, device, precision)
    return caption_folder(writer, folder, words=mention, beams=beams, batch_size=batch_size)
