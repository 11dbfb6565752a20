"""Retrieval: does a caption belong to an image? Images are found by captions, and captions by images.

A fresh head with two classes on the pooled [CLS] (Oscar appendix A; run_retrieval.py of the released code). Each
caption with its image makes two rows of a batch: as it is, and with half of the time another image's caption, half of
the time another image's regions and tags. The score of a pair is the probability of `MATCHED`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy

from oscar_common.errors import UsageError
from oscar_common.progress import plural
from oscar_common.settings import Finetune
from oscar_train.batch import IGNORED
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.regions import RegionReader
from oscar_train.data.sampling.negatives import TRIES, Pools, Words, candidates, different_images, make_pools
from oscar_train.data.sampling.philox import SAMPLE, uniform, words
from oscar_train.data.sampling.shape import Shape
from oscar_train.data.sampling.text_pairs import Bools
from oscar_train.data.sampling.triples import TextBatch
from oscar_train.data.sources import Source
from oscar_train.data.stream import Composer, Only
from oscar_train.data.texts.phrases import CAPTION
from oscar_train.data.texts.ragged import Ints
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.evaluation.measure import Answering
from oscar_train.model.packing import Packed
from oscar_train.objectives import TABLE
from oscar_train.tasks.classifier import build_classifier
from oscar_train.tasks.recalls import RANKS, make_gallery, recall_names, recalls, score_pairs
from oscar_train.tasks.samples import Samples, draw_triples, measure_samples
from oscar_train.tasks.task import Evaluation, Task, finite_samples, label_sums
from oscar_train.tasks.texts import rows_of

WRONG, MATCHED = 0, 1  # the labels of microsoft/Oscar
ROWS = 2

# Which of a place's random words are for what
_SIDE = 0
_DROPOUT = slice(1, 1 + ROWS)
_CANDIDATES = slice(_DROPOUT.stop, _DROPOUT.stop + TRIES)
_WIDTH = -(-_CANDIDATES.stop // 4) * 4


def make_task(
    settings: Finetune,
    sources: Sequence[Source] = (),
    tokenizer: Tokenizer | None = None,
    names: Sequence[str] = (),
) -> Task:
    """Return retrieval as the settings say; it needs nothing else."""
    shape = Shape(rows=ROWS, labels=ROWS, tokens=settings.text_length, regions=settings.regions)
    return Task(
        name="retrieval",
        shape=shape,
        kind=CAPTION,
        composer=partial(make_composer, shape=shape),
        build=partial(build_classifier, settings, 2, loss="sfmx"),
        criterion=criterion,
        shown={"match_accuracy": "accuracy"},
        evaluation=partial(make_evaluation, settings, shape),
        about={"task": "retrieval", "text_length": shape.tokens, "regions": shape.regions},
    )


def make_composer(corpus: Corpus, weights: Sequence[Fraction], only: Only, *, shape: Shape) -> Composer:
    """Return what makes two rows of a caption and its image: a matched one and a wrong one."""
    pools = make_pools(corpus, weights, replace(TABLE["visualbert", "paper"], negatives="typed"), only)

    def compose(triples: Ints, seed: int, epoch: int, place: int) -> tuple[TextBatch, Ints]:
        drawn = words(seed, SAMPLE, epoch, place, len(triples), _WIDTH)
        negatives = other_triples(corpus, pools, triples, drawn[:, _CANDIDATES])
        wrong_text = uniform(drawn[:, _SIDE]) < 0.5

        own_images = corpus.image[triples].astype(np.int64)
        texts = np.stack([triples, np.where(wrong_text, negatives, triples)], 1).ravel()
        images = np.stack([own_images, np.where(wrong_text, own_images, corpus.image[negatives])], 1).ravel()
        labels = np.full((len(triples), ROWS), MATCHED)
        labels[:, 1] = np.where(negatives == triples, IGNORED, WRONG)

        text = rows_of(corpus, texts, images, shape.tokens)
        seeds = (drawn[:, _DROPOUT] >> np.uint64(32)).astype(np.int64)

        return replace(text, match_labels=labels.ravel(), dropout_seeds=seeds.ravel()), images

    return compose


def other_triples(corpus: Corpus, pools: Pools, triples: Ints, drawn: Words) -> Ints:
    """Return for each triple another one, of another image and with another caption; itself if none was drawn.

    Args:
        triples: int64 [n]. drawn: [n, TRIES], random words.
    """
    negatives, waiting = triples.copy(), np.arange(len(triples))
    for attempt in drawn.T:
        drawn_triples = candidates(corpus, pools.w, triples[waiting], attempt[waiting])
        fits = different_images(corpus, drawn_triples, triples[waiting])
        fits &= ~_same_text(corpus, drawn_triples, triples[waiting])
        negatives[waiting[fits]] = drawn_triples[fits]
        waiting = waiting[~fits]
        if not len(waiting):
            break

    return negatives


def _same_text(corpus: Corpus, some: Ints, others: Ints) -> Bools:
    """Say for pairs of triples whether their captions are the same tokens."""
    width = int(max(corpus.first.offsets[some + 1] - corpus.first.offsets[some], default=0)) + 1
    one, other = corpus.first.padded(some, width)[0], corpus.first.padded(others, width)[0]
    same: Bools = (one == other).all(1)
    return same


def criterion(scores: Tensor, batch: Packed) -> tuple[Tensor, Tensor]:
    """Return the sums of cross-entropy and of right labels, and which samples' scores are numbers.

    Args:
        scores: [B, 2]. batch: `match_labels` are WRONG, MATCHED or -100.
    """
    loss = cross_entropy(scores.float(), batch.match_labels, ignore_index=IGNORED, reduction="sum")
    right = (scores.argmax(-1) == batch.match_labels).sum()
    return label_sums(loss, right), finite_samples(scores, ROWS)


def match_score(scores: Tensor) -> Tensor:
    """Return how surely pairs match, [B] for [B, 2]: the log of the odds, which keeps the order of probabilities."""
    return scores[:, MATCHED].float() - scores[:, WRONG].float()


def make_evaluation(settings: Finetune, shape: Shape, corpus: Corpus, reader: RegionReader, only: Only) -> Evaluation:
    """Return what is asked while training: matched and wrong pairs, and the recalls of some images.

    Raises:
        UsageError: there are fewer than two images, so that nothing can be wrong.
    """
    triples = draw_triples(corpus, only, settings.eval_triples)
    if len(np.unique(corpus.image[triples])) < 2:
        raise UsageError("the evaluation needs at least two held-out images with captions; give more")

    samples = Samples(
        corpus=corpus,
        reader=reader,
        triples=triples,
        shape=shape,
        compose=make_composer(corpus, [Fraction(1)] * len(corpus.sources), only, shape=shape),
        criterion=criterion,
    )
    gallery = make_gallery(corpus, reader, only, settings.eval_images)

    def measure(answering: Answering) -> dict[str, float]:
        values = measure_samples(samples, answering)
        if not len(gallery.images):
            return values
        scores = score_pairs(gallery, shape, answering, match_score)
        return values | recalls(scores.cpu().numpy(), gallery.owner)

    described = plural(len(triples), "caption")
    if len(gallery.images):
        described += f", and on all pairs of {plural(len(gallery.images), 'image')} and {len(gallery.texts):,} captions"

    return Evaluation(
        names=("loss", "accuracy", *(recall_names() if len(gallery.images) else ())),
        description=described,
        measure=measure,
        line=describe_numbers,
    )


def describe_numbers(values: Mapping[str, float]) -> str:
    """Say an evaluation in one line."""
    parts = [f"match {values['loss']:.4f} ({values['accuracy']:.1%})"]
    for way, name in (("t2i", "text_to_image"), ("i2t", "image_to_text")):
        if f"{name}_r1" in values:
            shares = "/".join(f"{100 * values[f'{name}_r{k}']:.1f}" for k in RANKS)
            parts.append(f"{way} R@1/5/10 {shares} %")
    return "held out: " + "  ".join(parts)
