"""NLVR2: is a statement true of two images? (Oscar appendix A; run_nlvr.py of the released code.)

Each image makes a row with the statement and its own tags; the two pooled [CLS] side by side go through a head of two
layers. A statement is a question of the left image, whose key ends in -img0, with the answer True or False; the right
one is the image whose key ends in -img1 instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import cross_entropy

from oscar_common.errors import UsageError
from oscar_common.progress import plural
from oscar_common.settings import Finetune
from oscar_train.batch import IGNORED
from oscar_train.checkpoints.init import Start
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.regions import RegionReader
from oscar_train.data.sampling.philox import SAMPLE, words
from oscar_train.data.sampling.shape import Shape
from oscar_train.data.sampling.triples import TextBatch
from oscar_train.data.sources import Source
from oscar_train.data.stream import Composer, Only
from oscar_train.data.texts.phrases import QA
from oscar_train.data.texts.ragged import Ints
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.model.packing import Packed
from oscar_train.tasks.classifier import OscarForClassification, build_classifier
from oscar_train.tasks.questions import read_questions
from oscar_train.tasks.samples import Samples, draw_triples, measure_samples
from oscar_train.tasks.task import Evaluation, Task, finite_samples, label_sums
from oscar_train.tasks.texts import rows_of

LEFT, RIGHT = "-img0", "-img1"  # ends of the keys of a pair
LABELS = {"false": 0, "true": 1}
ROWS = 2
LARGE = 1024  # hidden size from which on the head's inner layer is twice as wide as that, not three times


def make_task(settings: Finetune, sources: Sequence[Source], tokenizer: Tokenizer, names: Sequence[str] = ()) -> Task:
    """Return NLVR2 as the settings say."""
    questions = read_questions(sources, settings.texts, tokenizer, {})
    labels = {
        source.place: np.array([LABELS.get(row.best, IGNORED) if row else IGNORED for row in rows], np.int64)
        for source, rows in zip(sources, questions, strict=True)
    }
    shape = Shape(rows=ROWS, labels=1, tokens=settings.text_length, regions=settings.regions)
    return Task(
        name="nlvr2",
        shape=shape,
        kind=QA,
        composer=partial(make_composer, labels=labels, shape=shape),
        build=partial(_build, settings),
        criterion=criterion,
        shown={"match_accuracy": "accuracy"},
        evaluation=partial(make_evaluation, settings, labels, shape),
        about={"task": "nlvr2", "text_length": shape.tokens, "regions": shape.regions},
    )


def _build(settings: Finetune, start: Start, feature_dim: int, begin: Any) -> tuple[OscarForClassification, str]:
    scale = 2 if start.config.hidden_size >= LARGE else 3
    return build_classifier(
        settings, len(LABELS), start, feature_dim, begin, loss="sfmx", classifier="mlp", scale=scale, choices=ROWS
    )


def make_composer(
    corpus: Corpus, weights: Sequence[Fraction], only: Only, *, labels: Mapping[str, Ints], shape: Shape
) -> Composer:
    """Return what makes two rows of a statement: the left image's, which has the label, and the right image's.

    Raises:
        UsageError: no image has a partner.
    """
    of_triples = np.concatenate([labels[source.place] for source in corpus.sources])
    partners = find_partners(corpus)
    if (partners < 0).all():
        raise UsageError(
            f"--shards: no two images whose keys end in {LEFT} and {RIGHT}; give shards of NLVR2's images, with the "
            "statements as questions of the left ones"
        )

    def compose(triples: Ints, seed: int, epoch: int, place: int) -> tuple[TextBatch, Ints]:
        random_words = words(seed, SAMPLE, epoch, place, len(triples), 4)
        left_image = corpus.image[triples].astype(np.int64)
        right = np.where(partners[left_image] >= 0, partners[left_image], left_image)
        images = np.stack([left_image, right], 1).ravel()
        text = rows_of(corpus, np.repeat(triples, ROWS), images, shape.tokens)

        row_labels = np.full((len(triples), ROWS), IGNORED)
        row_labels[:, 0] = np.where(partners[left_image] >= 0, of_triples[triples], IGNORED)
        seeds = (random_words[:, :ROWS] >> np.uint64(32)).astype(np.int64)

        return replace(text, match_labels=row_labels.ravel(), dropout_seeds=seeds.ravel()), images

    return compose


def find_partners(corpus: Corpus) -> Ints:
    """Return for each left image the right one of its pair, int64 [N]; -1 for all others."""
    keys = [corpus.key(image) for image in range(len(corpus.images.shard))]
    image_of = {key: image for image, key in enumerate(keys)}
    partners = np.full(len(keys), -1)

    for image, key in enumerate(keys):
        if key.endswith(LEFT):
            partners[image] = image_of.get(key[: -len(LEFT)] + RIGHT, -1)

    return partners


def criterion(scores: Tensor, batch: Packed) -> tuple[Tensor, Tensor]:
    """Return the sums of cross-entropy and of right labels, and which pairs' scores are numbers.

    Args:
        scores: [B / 2, 2]. batch: the `match_labels` of left images are 0, 1 or -100.
    """
    labels = batch.match_labels[::ROWS]
    loss = cross_entropy(scores.float(), labels, ignore_index=IGNORED, reduction="sum")
    return label_sums(loss, (scores.argmax(-1) == labels).sum()), finite_samples(scores, 1)


def make_evaluation(
    settings: Finetune, labels: Mapping[str, Ints], shape: Shape, corpus: Corpus, reader: RegionReader, only: Only
) -> Evaluation:
    """Return what is asked while training: held-out statements. A pair is held out where its left image is."""
    samples = Samples(
        corpus=corpus,
        reader=reader,
        triples=draw_triples(corpus, only, settings.eval_triples),
        shape=shape,
        compose=make_composer(corpus, (), only, labels=labels, shape=shape),
        criterion=criterion,
    )
    return Evaluation(
        names=("loss", "accuracy"),
        description=plural(len(samples.triples), "statement"),
        measure=partial(measure_samples, samples),
        line=lambda values: f"held out: loss {values['loss']:.4f}  right {values['accuracy']:.1%}",
    )
