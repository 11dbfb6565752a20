"""Images and texts that are to find each other: every text is scored with every image, and the own one is looked for.

The protocol is that of COCO's 1K and 5K tests (run_retrieval.py of the released code, --cross_image_eval): N images,
all their captions. A caption looks for its one image, an image for the best of its captions. What has the same score
as the own one, or a score that is no number, counts as better: so a model that says the same of all pairs finds
nothing. (The released code leaves the order of equal scores to numpy's argsort.)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oscar_train.data.batch_buffer import make_batch_buffer, put_regions, put_text
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.regions import RegionReader
from oscar_train.data.sampling.philox import EVALUATION, permutation
from oscar_train.data.sampling.shape import Shape
from oscar_train.data.stream import Only
from oscar_train.data.texts.ragged import Ints
from oscar_train.evaluation.measure import Answering
from oscar_train.tasks.samples import SEED
from oscar_train.tasks.texts import rows_of

RANKS = (1, 5, 10)
WAYS = ("text_to_image", "image_to_text")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """N images and their C texts. images: int64 [N]. texts: int64 [C], triples. owner: int64 [C], of `images`."""

    corpus: Corpus
    reader: RegionReader
    images: Ints
    texts: Ints
    owner: Ints


def make_gallery(corpus: Corpus, reader: RegionReader, only: Only, count: int) -> Gallery:
    """Draw at most `count` images of some triples (None: all), with all the texts that these have."""
    triples = np.arange(len(corpus)) if only is None else only.astype(np.int64)
    images = np.unique(corpus.image[triples]).astype(np.int64)
    images = np.sort(images[permutation(SEED, EVALUATION, 0, len(images), (1, 0))[:count]])
    texts = triples[np.isin(corpus.image[triples], images)]
    owner = np.searchsorted(images, corpus.image[texts])
    return Gallery(corpus=corpus, reader=reader, images=images, texts=texts, owner=owner)


@torch.no_grad()
def score_pairs(gallery: Gallery, shape: Shape, answering: Answering, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Score every text with every image: float32 [C, N], the same on all ranks.

    Args:
        gallery: the images and texts.
        shape: of a row; each pair is one.
        answering: who answers.
        score: makes a number of the network's scores of a pair, [B, classes] to [B].
    """
    count, ranks = len(gallery.images), answering.ranks
    scores = torch.zeros(len(gallery.texts), count, device=ranks.device)
    buffers = make_batch_buffer(min(answering.size, count), gallery.corpus.feature_dim, shape=replace(shape, rows=1))

    for first in range(0, count, answering.size):
        block = slice(first, min(first + answering.size, count))
        images = gallery.images[block]
        buffer = buffers.rows(0, len(images))
        gallery.reader.read(images, buffer.slots)
        put_regions(gallery.reader, images, buffer)
        features = buffer.batch.features.to(ranks.device)  # once for all texts

        for text, _ in answering.shares(len(gallery.texts), size=1):
            texts = np.full(len(images), gallery.texts[text])
            put_text(rows_of(gallery.corpus, texts, images, shape.tokens), buffer, gallery.corpus.tokenizer)
            scores[text, block] = score(answering.forward(replace(buffer.batch, features=features)))

    ranks.total(scores)
    return scores


def recall_names() -> tuple[str, ...]:
    """Return the names of the numbers that `recalls` finds, in its order."""
    shares = [f"{way}_r{k}" for way in WAYS for k in RANKS]
    return (*shares, *(f"{way}_median_rank" for way in WAYS))


def recalls(scores: Any, owner: Ints) -> dict[str, float]:
    """Return the shares of texts, and of images, whose own partner is among the k best, and the median of its rank.

    Args:
        scores: float [C, N]. owner: int64 [C], the image of each text.
    """
    ranks = {"text_to_image": ranks_of_images(scores, owner), "image_to_text": ranks_of_texts(scores, owner)}
    values = {f"{way}_r{k}": float(np.mean(ranks[way] <= k)) for way in WAYS for k in RANKS}
    return values | {f"{way}_median_rank": float(np.median(ranks[way])) for way in WAYS}


def ranks_of_images(scores: Any, owner: Ints) -> Ints:
    """Return for each text the rank of its image, from 1, int64 [C]."""
    own_scores = scores[np.arange(len(owner)), owner]
    better: Ints = (~(scores < own_scores[:, None])).sum(1)  # the own one is among them
    return better


def ranks_of_texts(scores: Any, owner: Ints) -> Ints:
    """Return for each image the rank of the best of its texts among those of other images, from 1, int64 [N]."""
    is_own = owner[:, None] == np.arange(scores.shape[1])
    best = np.where(is_own & ~np.isnan(scores), scores, -np.inf).max(0)
    better: Ints = (~is_own & ~(scores < best)).sum(0) + 1
    return better
