"""Captioning: masked tokens of captions, with microsoft/Oscar's attention for it, and captions of held-out images."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from oscar_common.errors import UsageError
from oscar_common.progress import plural
from oscar_common.settings import Train
from oscar_train.captioning.exam import NAMES, make_caption_exam, measure_captions
from oscar_train.captioning.layout import MOST_MASKED, TEXT, caption_batch
from oscar_train.captioning.network import OscarForCaptioning, criterion
from oscar_train.corpus import Corpus
from oscar_train.reading.regions import RegionReader
from oscar_train.sampling.shape import Shape
from oscar_train.sampling.triples import IGNORED, TextBatch
from oscar_train.sources import Source
from oscar_train.stream import Composer, Only
from oscar_train.tasks.task import Evaluation, Task
from oscar_train.texts.phrases import CAPTION
from oscar_train.texts.ragged import Ints
from oscar_train.texts.tokens import Tokenizer, load_tokenizer
from oscar_train.weights import Start, build

SHAPE = Shape(tokens=TEXT)
SHOWN = {"mlm_loss": "mlm_loss", "mlm_accuracy": "mlm_accuracy"}


def make_task(
    settings: Train,
    sources: Sequence[Source] = (),
    tokenizer: Tokenizer | None = None,
    label_smoothing: float = 0.0,
) -> Task:
    """Return the training on masked tokens. label_smoothing: the share of a label that other tokens get."""
    words = tokenizer or load_tokenizer(None)

    def make_network(start: Start, feature_dim: int, begin: Any) -> tuple[OscarForCaptioning, str]:
        if start.config.max_position_embeddings < TEXT:
            raise UsageError(
                f"{start.place}: has {start.config.max_position_embeddings} positions; captions with tags need {TEXT}"
            )
        return build(
            start,
            feature_dim,
            settings.seed,
            image_layernorm=settings.image_layernorm,
            position=settings.region_position,
            attention_dropout=settings.attention_dropout,
            begin=begin,
            network=partial(OscarForCaptioning, tokenizer=words),
        )

    def evaluation(corpus: Corpus, reader: RegionReader, only: Only) -> Evaluation:
        exam = make_caption_exam(corpus, reader, only, settings.eval_images)
        return Evaluation(
            names=NAMES,
            description=f"captions of {plural(len(exam.triples), 'image')}",
            measure=partial(measure_captions, exam),
            line=line,
        )

    return Task(
        name="caption",
        shape=SHAPE,
        composer=lambda corpus, weights, only: composer(corpus),
        build=make_network,
        criterion=partial(criterion, label_smoothing=label_smoothing),
        shown=SHOWN,
        evaluation=evaluation,
        most_masked=lambda rows: MOST_MASKED,
        about={"task": "caption"},
        identity={"task": "caption"},
    )


def composer(corpus: Corpus) -> Composer:
    """Return what makes the rows of captions. A question of the corpus is in no loss."""

    def compose(triples: Ints, seed: int, epoch: int, place: int) -> tuple[TextBatch, Ints]:
        text = caption_batch(corpus, triples, seed, epoch, place)
        questions = corpus.kind[triples] != CAPTION
        text.mlm_labels[questions] = text.match_labels[questions] = IGNORED
        return text, corpus.image[triples].astype(np.int64)

    return compose


def line(values: Mapping[str, float]) -> str:
    """Say the scores in one line, a hundred times as large, as publications do."""
    shown = {"bleu_4": "BLEU-4", "cider_d": "CIDEr-D", "rouge_l": "ROUGE-L"}
    return "held out: " + "  ".join(f"{title} {100 * values[name]:.1f}" for name, title in shown.items())
