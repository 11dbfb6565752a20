"""Questions about images, answered by one of many classes (Oscar appendix A): VQA and GQA.

VQA: the classes are the answers that most people gave to at least nine questions; the targets are soft, the loss is
binary cross-entropy times the number of classes. GQA: one answer a question, cross-entropy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from oscar_common.errors import UsageError
from oscar_common.files import digest
from oscar_common.progress import plural
from oscar_common.settings import Finetune
from oscar_train.batch import IGNORED
from oscar_train.data.batch_buffer import make_batch_buffer
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
from oscar_train.evaluation.measure import Answering
from oscar_train.model.packing import Packed, pack
from oscar_train.tasks.classifier import OscarForClassification, build_classifier
from oscar_train.tasks.questions import Question, read_people, read_questions
from oscar_train.tasks.samples import Samples, draw_triples
from oscar_train.tasks.task import Evaluation, Task, finite_samples, label_sums
from oscar_train.tasks.texts import rows_of
from oscar_train.tasks.vqa_text import common_answers, official_score, soft_score

_WIDTH = 4  # random words of a place; the first is dropout's


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the questions of some sources are answered with.

    names: of the classes. first: for each source, by its place, the row of its first triple. classes: int64 [Q, A], of
    the answers that are classes, -1 where there are fewer; soft, official: float32 [Q, A], their scores.
    """

    names: tuple[str, ...]
    first: dict[str, int]
    classes: Tensor
    soft: Tensor
    official: Tensor
    _moved: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def rows(self, corpus: Corpus) -> Ints:
        """Return the row of each triple of a corpus, int64 [T]."""
        starts = corpus.shard_triples[corpus.source_shards]
        rows = [
            self.first[source.place] + np.arange(end - begin)
            for source, begin, end in zip(corpus.sources, starts, starts[1:], strict=False)
        ]
        return np.concatenate(rows)

    def of(self, which: str, rows: Tensor) -> Tensor:
        """Return the `soft` or `official` scores of all classes for some rows, float32 [B, classes]."""
        classes = self._on(rows.device, "classes")[rows]
        table = torch.zeros(len(rows), len(self.names) + 1, device=rows.device)
        table.scatter_(1, classes.where(classes >= 0, len(self.names)), self._on(rows.device, which)[rows])
        return table[:, :-1]

    def _on(self, device: torch.device, name: str) -> Tensor:
        """Return one of the tables on a device, copied there once."""
        if (device, name) not in self._moved:
            self._moved[device, name] = getattr(self, name).to(device)
        return self._moved[device, name]


def make_task(settings: Finetune, sources: Sequence[Source], tokenizer: Tokenizer, names: Sequence[str] = ()) -> Task:
    """Return VQA or GQA as the settings say.

    Args:
        settings: of the run. sources: all that are read. tokenizer: of the model.
        names: of the classes; none: the frequent answers.

    Raises:
        UsageError: no answer is frequent enough to be a class.
    """
    people = read_people(settings.annotations)
    questions = read_questions(sources, settings.texts, tokenizer, people)
    least = settings.min_answers if settings.task == "vqa" else 1
    best_answers = [question.best for triples in questions for question in triples if question]
    names = names or common_answers(best_answers, least)
    if not names:
        raise UsageError(
            f"--min-answers {least}: none of the {len(best_answers):,} questions of --shards has an answer given "
            "so often; give fewer, or other shards"
        )

    targets = make_targets(names, {source.place: rows for source, rows in zip(sources, questions, strict=True)})
    shape = Shape(tokens=settings.text_length, regions=settings.regions)
    loss = "bce" if settings.task == "vqa" else "sfmx"
    return Task(
        name=settings.task,
        shape=shape,
        kind=QA,
        composer=partial(make_composer, targets=targets, shape=shape),
        build=partial(_build, settings, targets.names, loss),
        criterion=partial(criterion, targets=targets, loss=loss),
        shown={"match_accuracy": "score"},
        evaluation=partial(make_evaluation, settings, shape, targets, loss),
        about={"task": settings.task, "text_length": shape.tokens, "regions": shape.regions},
        identity={"annotations": digest((targets.names, targets.classes.tolist(), targets.soft.tolist()))},
    )


def _build(
    settings: Finetune, names: tuple[str, ...], loss: str, start: Any, feature_dim: int, begin: Any
) -> tuple[OscarForClassification, str]:
    model, line = build_classifier(settings, len(names), start, feature_dim, begin, loss=loss)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    return model, f"{line}; {len(names):,} answers"


def make_targets(names: Sequence[str], sources: Mapping[str, Sequence[Question | None]]) -> Targets:
    """Look up which classes answer each question, and how well."""
    number = {name: position for position, name in enumerate(names)}
    first: dict[str, int] = {}
    rows: list[list[tuple[int, float, float]]] = []

    for place, triples in sources.items():
        first[place] = len(rows)
        rows += [_scores(question, number) if question else [] for question in triples]

    width = max(map(len, rows), default=0) or 1
    table = np.array([row + [(-1, 0.0, 0.0)] * (width - len(row)) for row in rows]).reshape(-1, width, 3)
    return Targets(
        names=tuple(names),
        first=first,
        classes=torch.from_numpy(table[..., 0].astype(np.int64)),
        soft=torch.from_numpy(table[..., 1].astype(np.float32)),
        official=torch.from_numpy(table[..., 2].astype(np.float32)),
    )


def _scores(question: Question, number: Mapping[str, int]) -> list[tuple[int, float, float]]:
    """Return (class, soft score, official score) of each answer that is a class; one person's answer is right."""
    people = question.people
    if len(people) == 1:
        return [(number[people[0]], 1.0, 1.0)] if people[0] in number else []

    answers = [answer for answer in dict.fromkeys(people) if answer in number]
    counts = [people.count(answer) for answer in answers]
    return [
        (number[answer], soft_score(count), official_score(count, len(people)))
        for answer, count in zip(answers, counts, strict=True)
    ]


def make_composer(
    corpus: Corpus, weights: Sequence[Fraction], only: Only, *, targets: Targets, shape: Shape
) -> Composer:
    """Return what makes one row of a question: beside its image and tags, its label a row of `targets`.

    Questions none of whose answers is a class are in no loss.
    """
    rows = targets.rows(corpus)
    has_class = (targets.classes[:, 0] >= 0).numpy()

    def compose(triples: Ints, seed: int, epoch: int, place: int) -> tuple[TextBatch, Ints]:
        random_words = words(seed, SAMPLE, epoch, place, len(triples), _WIDTH)
        images = corpus.image[triples].astype(np.int64)
        text = rows_of(corpus, triples, images, shape.tokens)
        labels = np.where(has_class[rows[triples]], rows[triples], IGNORED)
        seeds = (random_words[:, 0] >> np.uint64(32)).astype(np.int64)
        return replace(text, match_labels=labels, dropout_seeds=seeds), images

    return compose


def criterion(scores: Tensor, batch: Packed, *, targets: Targets, loss: str) -> tuple[Tensor, Tensor]:
    """Return the sums of the loss and of the best answers' soft scores, and which samples' scores are numbers.

    Args:
        scores: [B, classes]. batch: `match_labels` are rows of `targets`, or -100. loss: `bce` or `sfmx`.
    """
    has_label = batch.match_labels != IGNORED
    rows = batch.match_labels.clamp(min=0)
    soft = targets.of("soft", rows) * has_label[:, None]
    if loss == "bce":
        each = binary_cross_entropy_with_logits(scores.float(), soft, reduction="none").sum(1)
    else:
        each = cross_entropy(scores.float(), soft.argmax(1), reduction="none")

    best = soft.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    return label_sums((each * has_label).sum(), best.sum()), finite_samples(scores, 1)


def make_evaluation(
    settings: Finetune, shape: Shape, targets: Targets, loss: str, corpus: Corpus, reader: RegionReader, only: Only
) -> Evaluation:
    """Return what is asked while training: held-out questions."""
    samples = Samples(
        corpus=corpus,
        reader=reader,
        triples=draw_triples(corpus, only, settings.eval_triples),
        shape=shape,
        compose=make_composer(corpus, (), only, targets=targets, shape=shape),
        criterion=partial(criterion, targets=targets, loss=loss),
    )
    return Evaluation(
        names=("loss", "soft_score", "official_score"),
        description=plural(len(samples.triples), "question"),
        measure=partial(measure_answers, samples, targets),
        line=describe_numbers,
    )


@torch.no_grad()
def measure_answers(samples: Samples, targets: Targets, answering: Answering) -> dict[str, float]:
    """Return the mean loss of the questions that a class answers, and the mean scores of the best answer of all.

    soft_score: that of training. official_score: VQA's, the mean over leaving out one of the ten people. A question
    that no class answers counts as wrong in both.
    """
    device = answering.ranks.device
    rows_of_triples = torch.from_numpy(targets.rows(samples.corpus))
    totals = torch.zeros(5, dtype=torch.float64, device=device)  # loss, its questions; soft, official; all questions
    buffer = make_batch_buffer(
        min(answering.size, len(samples.triples)), samples.corpus.feature_dim, shape=samples.shape
    )

    for begin, end in answering.shares(len(samples.triples)):
        batch = samples.put(begin, end, buffer.rows(0, end - begin))
        scores = answering.forward(batch)
        sums, _ = samples.criterion(scores, pack(batch, device))
        best = scores.argmax(1, keepdim=True)
        rows = rows_of_triples[batch.triples].to(device)
        scores_of_best = [targets.of(name, rows).gather(1, best).sum() for name in ("soft", "official")]
        labels = (batch.match_labels != IGNORED).sum().to(device)
        numbers = (sums[1], labels, *scores_of_best, torch.tensor(float(end - begin), device=device))
        totals += torch.stack([number.double() for number in numbers])

    answering.ranks.total(totals)
    loss, labels, soft, official, questions = totals.tolist()
    nothing = float("nan")
    return {
        "loss": loss / labels if labels else nothing,
        "soft_score": soft / questions if questions else nothing,
        "official_score": official / questions if questions else nothing,
    }


def describe_numbers(values: Mapping[str, float]) -> str:
    """Say an evaluation in one line."""
    return (
        f"held out: loss {values['loss']:.4f}  soft score {values['soft_score']:.1%}  "
        f"official score {values['official_score']:.1%}"
    )
