"""Captioning: masked tokens of captions, with microsoft/Oscar's attention for it, and captions of held-out images."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from oscar_common.errors import UsageError
from oscar_common.progress import plural
from oscar_common.settings import Finetune
from oscar_train.batch import IGNORED
from oscar_train.captioning.caption_set import NAMES, make_caption_set, measure_captions, references
from oscar_train.captioning.layout import MOST_MASKED, TEXT, caption_batch
from oscar_train.captioning.network import OscarForCaptioning, criterion
from oscar_train.captioning.self_critical import reference_frequencies
from oscar_train.captioning.self_critical_network import SelfCriticalOscar, Truth, self_critical_criterion
from oscar_train.checkpoints.init import Start, build_for
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.regions import RegionReader
from oscar_train.data.sampling.shape import Shape
from oscar_train.data.sampling.triples import TextBatch
from oscar_train.data.sources import Source
from oscar_train.data.stream import Composer, Only
from oscar_train.data.texts.phrases import CAPTION
from oscar_train.data.texts.ragged import Ints
from oscar_train.data.texts.tokens import Tokenizer, load_tokenizer
from oscar_train.tasks.task import Evaluation, Task

SHOWN = {"mlm_loss": "mlm_loss", "mlm_accuracy": "mlm_accuracy"}
SELF_CRITICAL_SHOWN = {"match_accuracy": "cider_d"}


def make_task(
    settings: Finetune,
    sources: Sequence[Source] = (),
    tokenizer: Tokenizer | None = None,
    names: Sequence[str] = (),
) -> Task:
    """Return the training on masked tokens, or self-critical training, which begins with a model trained on these.

    There are no classes, so that `names` means nothing here.
    """
    words, truths = tokenizer or load_tokenizer(None), list[Truth]()
    self_critical = settings.self_critical

    def truth() -> Truth:
        if not truths:
            raise UsageError("--batch-size auto: cannot be found for --self-critical; give a number")
        return truths[0]

    def make_composer(corpus: Corpus, weights: Any, only: Only) -> Composer:
        if not self_critical:
            return composer(corpus)
        truths.append(make_truth(corpus, only))
        return self_critical_composer(corpus)

    def network_of(config: Any) -> OscarForCaptioning:
        if settings.dropout is not None:
            config.hidden_dropout_prob = settings.dropout
        if self_critical:
            return SelfCriticalOscar(config, words, truth)
        return OscarForCaptioning(config, words)

    def make_network(start: Start, feature_dim: int, begin: Any) -> tuple[OscarForCaptioning, str]:
        if start.config.max_position_embeddings < TEXT:
            raise UsageError(
                f"{start.place}: has {start.config.max_position_embeddings} positions; captions with tags need {TEXT}"
            )
        return build_for(settings, start, feature_dim, begin, network=network_of)

    def evaluation(corpus: Corpus, reader: RegionReader, only: Only) -> Evaluation:
        caption_set = make_caption_set(corpus, reader, only, settings.eval_images, settings.regions)
        return Evaluation(
            names=NAMES,
            description=f"captions of {plural(len(caption_set.triples), 'image')}",
            measure=partial(measure_captions, caption_set),
            line=line,
        )

    return Task(
        name="caption",
        shape=Shape(tokens=TEXT, regions=settings.regions),
        kind=CAPTION,
        composer=make_composer,
        build=make_network,
        criterion=self_critical_criterion
        if self_critical
        else partial(criterion, label_smoothing=settings.label_smoothing),
        shown=SELF_CRITICAL_SHOWN if self_critical else SHOWN,
        evaluation=evaluation,
        most_masked=lambda rows: 0 if self_critical else MOST_MASKED,
        about={"task": "caption", "regions": settings.regions},
    )


def composer(corpus: Corpus) -> Composer:
    """Return what makes the rows of captions."""

    def compose(triples: Ints, seed: int, epoch: int, place: int) -> tuple[TextBatch, Ints]:
        return caption_batch(corpus, triples, seed, epoch, place), corpus.image[triples].astype(np.int64)

    return compose


def self_critical_composer(corpus: Corpus) -> Composer:
    """Return what makes rows of which nothing is masked, and whose labels are the numbers of the triples."""
    compose_captions = composer(corpus)

    def compose(triples: Ints, seed: int, epoch: int, place: int) -> tuple[TextBatch, Ints]:
        text, images = compose_captions(triples, seed, epoch, place)
        text.mlm_labels[:] = IGNORED
        return replace(text, match_labels=triples), images

    return compose


def make_truth(corpus: Corpus, only: Only) -> Truth:
    """Return what drawn captions are compared with: those of the triples that are trained on."""
    triples = np.arange(len(corpus)) if only is None else only.astype(np.int64)
    captions = triples[corpus.kind[triples] == CAPTION]
    _, first = np.unique(corpus.image[captions], return_index=True)
    frequencies = reference_frequencies(references(corpus, captions, captions[first]))
    return Truth(partial(references, corpus, captions), frequencies)


def line(values: Mapping[str, float]) -> str:
    """Say the scores in one line, a hundred times as large, as publications do."""
    shown = {"bleu_4": "BLEU-4", "cider_d": "CIDEr-D", "rouge_l": "ROUGE-L"}
    return "held out: " + "  ".join(f"{title} {100 * values[name]:.1f}" for name, title in shown.items())
