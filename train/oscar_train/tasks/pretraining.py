"""Pre-training as a task: masked tokens and the contrastive loss (Oscar section 3.1)."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor

from oscar_common.settings import Train
from oscar_train.batch import MAX_TOKENS
from oscar_train.checkpoints.init import Start, build_for
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.regions import RegionReader
from oscar_train.data.sampling.shape import PAIR
from oscar_train.data.sampling.triples import MASK_RATE
from oscar_train.data.sources import Source
from oscar_train.data.stream import Composer, Only, pairs
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.evaluation.measure import measure, names
from oscar_train.evaluation.questions import make_question_set
from oscar_train.evaluation.report import describe_question_set, line
from oscar_train.logs.log import LOSSES
from oscar_train.model.losses import sums
from oscar_train.model.oscar import OscarForPreTraining
from oscar_train.model.packing import Packed
from oscar_train.objectives import Objective, choose_objective
from oscar_train.tasks.task import Evaluation, Task, finite_samples


def make_task(settings: Train, sources: Sequence[Source] = (), tokenizer: Tokenizer | None = None) -> Task:
    """Return the pre-training that the settings say."""
    objective = choose_objective(settings)

    def composer(corpus: Corpus, weights: Sequence[Fraction], only: Only) -> Composer:
        return pairs(corpus, weights, objective, only)

    def make_network(start: Start, feature_dim: int, begin: Any) -> tuple[OscarForPreTraining, str]:
        return build_for(settings, start, feature_dim, begin, classes=objective.classes)

    def evaluation(corpus: Corpus, reader: RegionReader, only: Only) -> Evaluation:
        question_set = make_question_set(
            corpus, reader, objective, only, triples=settings.eval_triples, images=settings.eval_images
        )
        return Evaluation(
            names=tuple(names(question_set)),
            description=describe_question_set(question_set),
            measure=lambda answering: measure(question_set, answering),
            line=lambda values: line(dict(values)),
        )

    return Task(
        name="pretraining",
        shape=PAIR,
        composer=composer,
        build=make_network,
        criterion=criterion,
        shown=LOSSES,
        evaluation=evaluation,
        most_masked=lambda rows: most_masked(objective, rows),
    )


def criterion(scores: tuple[Tensor, Tensor], batch: Packed) -> tuple[Tensor, Tensor]:
    """Return the sums of both losses, and which triples have scores of pairs that are numbers."""
    words, pairs = scores
    return sums(words, pairs, batch), finite_samples(pairs, 1)


def most_masked(objective: Objective, rows: int) -> int:
    """Return how many tokens of each row are masked at most, or so rarely more that nobody will see it."""
    maskable = MAX_TOKENS - 2
    if objective.exact and not objective.whole_words:
        return math.ceil(MASK_RATE * maskable)
    deviation = math.sqrt(maskable * MASK_RATE * (1 - MASK_RATE) / rows) * (2 if objective.whole_words else 1)
    return min(maskable, math.ceil(MASK_RATE * maskable + 6 * deviation))
