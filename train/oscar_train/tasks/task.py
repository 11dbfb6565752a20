"""What a task gives the trainer. The trainer has the rest: order, reading, ranks, steps, logs, checkpoints, resume.

A sample is one text of the corpus with its image, a `triple` there. The loop asks a task, in this order:

1. `shape`: how many rows of a batch a sample becomes, and how long they are;
2. `composer`: a function that turns the samples at some places of an epoch into rows;
3. `build`: the network, from the weights that --init names;
4. `criterion`: the loss of a batch;
5. `evaluation`: what is asked about held-out samples while training.

A module for each task has one function `make_task(settings, sources, tokenizer) -> Task`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oscar_train.checkpoints.init import Start
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.regions import RegionReader
from oscar_train.data.sampling.shape import Shape
from oscar_train.data.stream import Composer
from oscar_train.evaluation.measure import Answering
from oscar_train.model.oscar import OscarModel
from oscar_train.model.packing import Packed

Only = npt.NDArray[np.integer[Any]] | None  # the triples that there are, sorted; None: all of a corpus


class Network(Protocol):
    """A torch module that is trained. `config` has the fields of `oscar_config`."""

    config: Any
    bert: OscarModel

    def __call__(self, batch: Packed) -> Any:
        """Return scores; of which shape is between a task's network, criterion and evaluation."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked about held-out samples.

    names: of the numbers, in their order; the columns of evaluation.csv. description: of the samples, for people.
    measure: asks, and returns the numbers, the same on all ranks; NaN where there is nothing to measure. It lets
    `Interrupted` pass. line: says the numbers in one line.
    """

    names: tuple[str, ...]
    description: str
    measure: Callable[[Answering], dict[str, float]]
    line: Callable[[Mapping[str, float]], str]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained.

    name: of the task. shape: of a sample's rows. kind: of the texts that are samples, CAPTION or QA; None: all.

    composer: called once with (corpus, the weights of its sources, only); returns a function of (triples, seed, epoch,
    place) that makes the rows of those samples: pure, and safe in several threads. See `stream.Composer`.

    build: called with (start, feature_dim, begin); returns the network, with `config` ready to be written beside its
    weights, and a line that says what was filled from where. begin: see `oscar_train.checkpoints.init.build`.

    criterion: called with (the network's scores, the batch); returns float32 [4], sums over the batch, and bool
    [samples], whose scores are all finite. The sums are: loss of masked tokens, loss of labels, tokens that are right,
    labels that are right (or their score). The trainer divides the first and third by the number of masked tokens, the
    others by the number of labels, both of the global batch, and minimises the sum of the two losses.

    shown: which of `mlm_loss`, `match_loss`, `mlm_accuracy`, `match_accuracy` stand in metrics.csv beside `loss`, and
    what they are called there.

    evaluation: called with (corpus, reader, only).

    most_masked: how many tokens of a row are masked at most, in a batch of so many rows; for the rehearsal.

    about: what `oscar-predict` must know of a checkpoint; goes into its trainer.json. identity: what a rerun must have
    in common with the run, beside its settings and corpus.
    """

    name: str
    shape: Shape
    composer: Callable[[Corpus, Any, Only], Composer]
    build: Callable[[Start, int, Any], tuple[Any, str]]
    criterion: Callable[[Any, Packed], tuple[Tensor, Tensor]]
    shown: Mapping[str, str]
    evaluation: Callable[[Corpus, RegionReader, Only], Evaluation]
    kind: int | None = None
    most_masked: Callable[[int], int] = lambda rows: 0
    about: Mapping[str, object] = field(default_factory=dict)
    identity: Mapping[str, object] = field(default_factory=dict)


def finite_samples(scores: Tensor, rows: int) -> Tensor:
    """Return which samples have scores that are numbers, bool [samples], for scores [samples * rows, ...]."""
    finite: Tensor = scores.detach().isfinite().flatten(1).all(1)
    return finite.view(-1, rows).all(1)


def label_sums(loss: Tensor, right: Tensor) -> Tensor:
    """Return the sums of a task without masked tokens: float32 [4] of a loss and of how many labels are right."""
    nothing = torch.zeros((), device=loss.device)
    return torch.stack([nothing, loss.float(), nothing, right.float()])
