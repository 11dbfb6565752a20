"""Captions of held-out images beside those that people wrote for them, while training and after it."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oscar_train.batch import IGNORED, MAX_REGIONS, Batch
from oscar_train.captioning.layout import laid_out, tags_of
from oscar_train.captioning.metrics import caption_scores
from oscar_train.captioning.search import MOST_TOKENS
from oscar_train.captioning.spelling import spell
from oscar_train.data.batch_buffer import BatchBuffer, make_batch_buffer, put_regions
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.regions import RegionReader
from oscar_train.data.sampling.philox import EVALUATION, permutation
from oscar_train.data.sampling.shape import Shape
from oscar_train.data.texts.phrases import CAPTION
from oscar_train.data.texts.ragged import Ints
from oscar_train.evaluation.measure import Answering

NAMES = ("bleu_4", "cider_d", "rouge_l")
SEED = 0


@dataclass(frozen=True, kw_only=True)
class CaptionSet:
    """N images that captions are asked for.

    triples: int64 [N], the first caption of each. references: all captions of each, as text. regions: the most of each.
    """

    corpus: Corpus
    reader: RegionReader
    triples: Ints
    references: list[list[str]]
    regions: int


def make_caption_set(
    corpus: Corpus,
    reader: RegionReader,
    only: npt.NDArray[np.integer[Any]] | None,
    images: int,
    regions: int = MAX_REGIONS,
) -> CaptionSet:
    """Draw images that have captions, the same ones whatever the run. images: how many at most, 0: all.

    Args:
        only: the triples that there are, sorted; None: all of the corpus.
    """
    triples = np.arange(len(corpus)) if only is None else only.astype(np.int64)
    captions = triples[corpus.kind[triples] == CAPTION]
    first = captions[np.unique(corpus.image[captions], return_index=True)[1]]
    drawn = np.sort(first[permutation(SEED, EVALUATION, 0, len(first))[: images or len(first)]])

    return CaptionSet(
        corpus=corpus,
        reader=reader,
        triples=drawn,
        references=references(corpus, captions, drawn),
        regions=regions,
    )


def references(corpus: Corpus, captions: Ints, triples: Ints) -> list[list[str]]:
    """Return all captions of the images of some triples, as text. captions: the triples that are captions, sorted."""
    image = corpus.image[captions]  # rises
    begins, ends = (np.searchsorted(image, corpus.image[triples], side) for side in ("left", "right"))
    return [
        [spell(corpus.tokenizer, corpus.first[row].tolist()) for row in captions[begin:end].tolist()]
        for begin, end in zip(begins, ends, strict=True)
    ]


def measure_captions(caption_set: CaptionSet, answering: Answering) -> dict[str, float]:
    """Have captions written for all images, and score them.

    Args:
        answering: whose `forward` is that of an `OscarForCaptioning` in eval mode.

    Raises:
        Interrupted: a rank was asked to stop.
    """
    captions = _written(caption_set, answering).tolist()
    written = [spell(caption_set.corpus.tokenizer, [token for token in row if token >= 0]) for row in captions]
    return caption_scores(written, caption_set.references)


@torch.no_grad()
def _written(caption_set: CaptionSet, answering: Answering) -> Tensor:
    """Return the tokens of all captions, int64 [N, 19], -1 after the end; each rank asks for its share."""
    count = len(caption_set.triples)
    tokens = torch.zeros(count, MOST_TOKENS, dtype=torch.int64, device=answering.ranks.device)
    shape = Shape(regions=caption_set.regions)
    buffer = make_batch_buffer(min(answering.size, count), caption_set.corpus.feature_dim, shape=shape)

    for begin, end in answering.shares(count):
        batch = images_with_tags(
            caption_set.corpus, caption_set.reader, caption_set.triples[begin:end], buffer.rows(0, end - begin)
        )
        tokens[begin:end] = answering.forward(batch) + 1  # 0 where another rank writes

    return answering.ranks.total(tokens) - 1


def images_with_tags(corpus: Corpus, reader: RegionReader, triples: Ints, buffer: BatchBuffer) -> Batch:
    """Return the images of triples with their tags, in the places of training, and no caption. They lie in `buffer`."""
    images = corpus.image[triples]
    reader.read(images, buffer.slots)
    put_regions(reader, images, buffer)

    nothing, lengths = np.zeros((len(triples), 0), np.int32), np.zeros(len(triples), np.int64)
    ids, types, present = laid_out(corpus.tokenizer, nothing, lengths, *tags_of(corpus, triples))

    return replace(
        buffer.batch,
        input_ids=torch.from_numpy(ids.astype(np.int64)),
        token_type_ids=torch.from_numpy(types),
        attention_mask=torch.from_numpy(present & (types == 1)),
        mlm_labels=torch.full(ids.shape, IGNORED),
    )
