"""Which images are held out of training. An image decides it itself, by a hash, so that it is on the same side in every
run, whatever the seed, the order of the shards, or the images beside it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oscar_common.errors import UsageError
from oscar_train.data.corpus import Corpus, Images
from oscar_train.data.texts.phrases import CAPTION, QA
from oscar_train.data.texts.ragged import Ints

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Split:
    """The triples of a corpus on either side, sorted, int32: those that are trained on, and those to be asked about."""

    trained: Array
    held: Array


def split(corpus: Corpus, fraction: float) -> Split:
    """Hold a share of the images out.

    What may be the same image (the same bytes, or the same key in another source) is on neither side of the other:
    it is not trained on.

    Raises:
        UsageError: nothing is left to train on, or there are not two images to evaluate on.
    """
    images = corpus.images
    held = held_images(images, fraction)
    has_content = images.content != 0
    doubtful = np.isin(images.key_xxh3, images.key_xxh3[held]) | (
        has_content & np.isin(images.content, images.content[held])
    )
    sides = Split(trained=_of(corpus, ~(held | doubtful)), held=_of(corpus, held))
    if len(np.unique(corpus.image[sides.held])) < 2:
        raise UsageError(_too_few(corpus, fraction))
    if not len(sides.trained):
        raise UsageError(
            f"--eval-fraction {fraction:g}: of {len(held)} images none that has a text is left to train on; give "
            "another share, or --eval-shards"
        )

    _check_sources(corpus, sides.trained, f"--eval-fraction {fraction:g}")
    return sides


def asked(corpus: Corpus, partly: list[bool], fraction: float) -> Array | None:
    """Return the triples to evaluate on, sorted, int32: of some sources, only those that were held out; None: all.

    Args:
        partly: for each source, whether it was trained on but for a `fraction`.

    Raises:
        UsageError: there are none.
    """
    if not any(partly):
        return None

    source = np.searchsorted(corpus.source_shards, corpus.images.shard, "right") - 1
    selected = _of(corpus, ~np.array(partly)[source] | held_images(corpus.images, fraction))
    if not len(selected):
        raise UsageError("--shards: no image with a text was held out of training; give other shards, or --all")

    return selected


def apart(corpus: Corpus, others: Images) -> Array | None:
    """Return the triples whose images are not among some others, sorted, int32; None if that is all.

    Raises:
        UsageError: nothing is left to train on.
    """
    same = np.isin(_identity(corpus.images), _identity(others))
    if not same.any():
        return None

    distinct = _of(corpus, ~same)
    if not len(distinct):
        raise UsageError("--eval-shards: all images of --shards are in them, too; nothing is left to train on")

    _check_sources(corpus, distinct, "--eval-shards")
    return distinct


def of_kind(corpus: Corpus, kind: int | None, only: Array | None, flag: str) -> Array | None:
    """Return those of some triples (None: all) that are captions, or questions, sorted; None if that is all.

    Raises:
        UsageError: there are none.
    """
    if kind is None:
        return only

    kinds = np.asarray(corpus.kind) if only is None else corpus.kind[only]
    if (kinds == kind).all():
        return only

    of_this_kind = np.flatnonzero(kinds == kind).astype(np.int32) if only is None else only[kinds == kind]
    if not len(of_this_kind):
        names = {CAPTION: "caption", QA: "question"}
        raise UsageError(f"{flag}: no image has a {names[kind]}; give other shards, or texts with --texts")

    return of_this_kind


def _check_sources(corpus: Corpus, trained: Array, flag: str) -> None:
    """Refuse a source of which nothing would be trained on."""
    counts = np.diff(np.searchsorted(trained, corpus.shard_triples[corpus.source_shards]))
    for source, count in zip(corpus.sources, counts, strict=True):
        if not count:
            raise UsageError(f"{flag}: nothing of --shards {source.place} is left to train on; leave that folder out")


def _too_few(corpus: Corpus, fraction: float) -> str:
    """Say how large a share would do."""
    shares = np.sort(_mixed(_identity(corpus.images))[np.unique(corpus.image)] / 2.0**64)
    held = int((shares < fraction).sum())
    enough = f"--eval-fraction {np.ceil(shares[1] * 100 + 1e-6) / 100:g} or more, or " if len(shares) > 1 else ""
    return (
        f"--eval-fraction {fraction:g}: of {len(shares)} images with a text {held} is held out, two are needed; give "
        f"{enough}--eval-shards"
    )


def held_images(images: Images, fraction: float) -> Bools:
    """Say which images are held out, bool [N]: those whose hash is among the smallest `fraction` of all numbers."""
    return _mixed(_identity(images)) < np.uint64(round(fraction * 2**53) << 11)


def _identity(images: Images) -> Array:
    """Return a number that stands for each image: for the bytes of its file, or, where these are unknown, its key."""
    identity: Array = np.where(images.content != 0, images.content, images.key_xxh3)
    return identity


def _mixed(numbers: Array) -> Array:
    """Return other 64 bits for 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = numbers ^ (numbers >> np.uint64(31))
    return mixed


def _of(corpus: Corpus, images: Bools) -> Array:
    """Return the triples of some images."""
    triples: Ints = np.flatnonzero(images[corpus.image])
    return triples.astype(np.int32)
