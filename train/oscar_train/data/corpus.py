"""All texts and tags of the shards as arrays of token ids, and where each image's regions lie: a step slices integers
and meets no string.

The arrays are made once for each tokenizer and set of texts, into a folder of the cache, and mapped from there: opening
them takes a second whatever their size, and the processes of a machine share the memory.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oscar_common.errors import UsageError
from oscar_common.files import ASIDE, TEMPORARY, digest, hold, release, replacing_folder, restore_folder, temporary
from oscar_common.progress import warn
from oscar_train.batch import MAX_TEXT
from oscar_train.data.sources import FLAG, Source
from oscar_train.data.texts.arrays import mapped, seal
from oscar_train.data.texts.collection import collect
from oscar_train.data.texts.phrases import QA
from oscar_train.data.texts.ragged import Ints, Ragged
from oscar_train.data.texts.tags import DETECTED, TagRule
from oscar_train.data.texts.tokens import Tokenizer

FORMAT = 3  # since 3, no text holds a special token
META = "corpus.json"
# What a training run can see; the other arrays say where it lies
SEEN = (
    *("first_values", "first_offsets", "second_values", "second_offsets", "second_row", "second_set", "image", "kind"),
    *("width", "height", "num_boxes", "boxes_xxh3", "scales_xxh3", "features_xxh3", "key_xxh3", "content"),
    *("shard_triples", "source_shards"),
)
POLL_SECONDS = 0.2

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Images:
    """N images: where the regions of each lie. Every array is [N].

    shard: counts through all sources. num_boxes: K. offsets: in the tar, of the raw arrays; scales_offset is -1 where
    features are float16. xxh3: of the raw arrays; frame_xxh3 of the other bytes of the sample. key_xxh3: of its key.
    content: stands for the bytes of the image file; 0 if they are not known.
    """

    shard: Array
    width: Array
    height: Array
    num_boxes: Array
    boxes_offset: Array
    boxes_xxh3: Array
    scales_offset: Array
    scales_xxh3: Array
    features_offset: Array
    features_xxh3: Array
    sample_offset: Array
    sample_bytes: Array
    frame_xxh3: Array
    key_xxh3: Array
    content: Array


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """T triples (w, q, v) of N images in S shards of F sources. An image with n texts is in n triples.

    first: T rows, the tokens of w: a caption, or a question.
    second: what q is taken from: the tag sequence of each image, and the answers. second_row: int64 [T], the row of
        each triple's q. second_set: uint64, stands for the set of tags (or words of an answer) of each row.
    image: int32 [T]. kind: int8 [T], CAPTION or QA.
    pools: per kind, the triples that q may be taken from for another triple: those whose q is not empty.
    shard_triples, shard_images: int64 [S + 1], the first triple and image of each shard. source_shards: int64 [F + 1].
    tar_bytes: int64 [S]. keys: the images' keys in UTF-8. ground_truth: images whose q is tags of the ground truth.
    fingerprint: changes with anything that a training run could see of the shards or the tokenizer.
    """

    sources: list[Source]
    first: Ragged
    second: Ragged
    second_row: Array
    second_set: Array
    image: Array
    kind: Array
    pools: tuple[Array, Array]
    images: Images
    shard_triples: Ints
    shard_images: Ints
    source_shards: Ints
    tar_bytes: Ints
    keys: Ragged
    ground_truth: int
    fingerprint: str
    tokenizer: Tokenizer
    feature_dim: int

    def __len__(self) -> int:
        return len(self.image)

    @property
    def textless(self) -> int:
        """How many images have no text, and so are in no triple."""
        return len(self.images.shard) - 1 - int(np.count_nonzero(np.diff(self.image)))  # triples of an image adjoin

    @cached_property
    def tag_rows(self) -> Ints:
        """The row of `second` that has the tags of each image, int64 [N]: all rows but those of answers."""
        of_images = np.ones(len(self.second), bool)
        of_images[self.second_row[self.kind == QA]] = False
        return np.flatnonzero(of_images)

    def key(self, image: int) -> str:
        """Return the key of an image."""
        return self.keys[image].tobytes().decode()

    def place(self, shard: int) -> tuple[Source, int]:
        """Return the source of a shard, and its number there."""
        source = int(np.searchsorted(self.source_shards, shard, "right")) - 1
        return self.sources[source], shard - int(self.source_shards[source])

    def shard_name(self, shard: int) -> str:
        """Return how messages call a shard."""
        source, number = self.place(shard)
        return source.named(number)


def open_corpus(
    sources: list[Source],
    tokenizer: Tokenizer,
    cache: Path,
    texts: Sequence[Path] = (),
    skip_corrupt: bool = False,
    tags: TagRule = DETECTED,
    width: int = MAX_TEXT,
) -> Corpus:
    """Map the corpus of some sources from the cache, made now if it is not there. One process makes it, others wait.

    Args:
        width: how many tokens of w and q together a row has room for.

    Raises:
        UsageError: no image has a text; an index is missing, damaged or not what the contract allows; no tag is in the
            vocabulary; the cache cannot be written.
    """
    folder = cache / "corpus" / _name(sources, tokenizer, texts, tags, width)
    meta = _whole(folder)
    if meta is None:
        with _alone(folder):
            restore_folder(folder)
            meta = _whole(folder)  # another process may have made it meanwhile
            if meta is None:
                meta = _make(folder, sources, tokenizer, texts, skip_corrupt, tags, width)

    if meta["left_out"] and not skip_corrupt:
        raise UsageError(f"{FLAG}: {meta['left_out'][0]}; or go on without it: --skip-corrupt")

    for line in meta["left_out"]:
        warn(f"left out: {line}")

    corpus = _mapped(folder, meta, sources, tokenizer)
    if not skip_corrupt:  # else reading finds out
        for shard, tar_bytes in enumerate(corpus.tar_bytes.tolist()):
            source, number = corpus.place(shard)
            source.check_size(number, tar_bytes)

    return corpus


def _make(
    folder: Path,
    sources: list[Source],
    tokenizer: Tokenizer,
    texts: Sequence[Path],
    skip_corrupt: bool,
    tags: TagRule,
    width: int,
) -> dict[str, Any]:
    """Make a corpus in the cache, whole or not at all, and return what is said of it."""
    with replacing_folder(folder) as unfinished:
        meta = collect(unfinished, sources, tokenizer, texts, skip_corrupt, tags, width)
        meta["files"] = {path.name: seal(path) for path in sorted(unfinished.glob("*.npy"))}
        (unfinished / META).write_text(json.dumps(meta, indent=1) + "\n")
    return meta


def _name(sources: list[Source], tokenizer: Tokenizer, texts: Sequence[Path], tags: TagRule, width: int) -> str:
    """Return a name that changes with the tokenizer, the indexes, the texts and the rule, but not with their place."""
    overlays = [seal(path) for path in texts]
    content = (FORMAT, tokenizer.fingerprint, [source.stamp for source in sources], overlays, tags)
    return digest(content if width == MAX_TEXT else (*content, width))


def _whole(folder: Path) -> dict[str, Any] | None:
    """Return what is said of a corpus in the cache; None if there is none, or it is damaged."""
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text())
        damaged = [name for name, stored_seal in meta["files"].items() if seal(folder / name) != stored_seal]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        damaged = [META]

    if damaged:
        warn(f"--cache: {folder / damaged[0]} is damaged; it is made again")
        return None

    return meta


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes this corpus."""
    lock = _lock(folder)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        if (handle := hold(lock)) is None:
            print("waiting for another process that makes the token ids", file=sys.stderr, flush=True)
        while handle is None:
            time.sleep(POLL_SECONDS)
            handle = hold(lock)
    except OSError as error:
        raise UsageError(f"--cache {lock.parent}: cannot be written: {error.strerror}; give another --cache") from None

    try:
        _sweep(folder.parent)
        yield
    finally:
        release(handle, lock)


def _sweep(corpora: Path) -> None:
    """Delete what killed processes left unfinished; without locks, others may be at work on any of it."""
    for leftover in [*corpora.glob(f"{TEMPORARY}*"), *corpora.glob(f"{ASIDE}*")]:
        folder = corpora / leftover.name.removeprefix(TEMPORARY).removeprefix(ASIDE)
        lock = _lock(folder)
        if (handle := hold(lock, surely=True)) is not None:
            restore_folder(folder)
            shutil.rmtree(temporary(folder), ignore_errors=True)
            release(handle, lock)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _mapped(folder: Path, meta: dict[str, Any], sources: list[Source], tokenizer: Tokenizer) -> Corpus:
    def array(name: str) -> Array:
        return mapped(folder / f"{name}.npy")

    def ragged(name: str) -> Ragged:
        return Ragged(array(f"{name}_values"), array(f"{name}_offsets"))

    return Corpus(
        sources=sources,
        first=ragged("first"),
        second=ragged("second"),
        keys=ragged("key"),
        pools=(array("caption_pool"), array("qa_pool")),
        images=Images(**{f.name: array(f.name) for f in fields(Images)}),
        ground_truth=meta["ground_truth"],
        fingerprint=digest([meta["files"][f"{name}.npy"] for name in SEEN]),
        tokenizer=tokenizer,
        feature_dim=sources[0].manifest.detector.feature_dim,
        **{name: array(name) for name in ("second_row", "second_set", "image", "kind", "shard_triples")},
        **{name: array(name) for name in ("shard_images", "source_shards", "tar_bytes")},
    )
