"""The evaluation while training: what is held out of it, and when it is asked about."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oscar_common.settings import Train
from oscar_train.data.corpus import Corpus
from oscar_train.data.sources import Source
from oscar_train.data.stream import Stream, open_stream
from oscar_train.data.texts.tags import TagRule
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.evaluation.held_out import apart, asked, of_kind, split
from oscar_train.tasks.task import Evaluation, Task


@dataclass(frozen=True)
class HeldOut:
    """What a run holds out. beside: the stream of --eval-shards, None where there are none."""

    settings: Train
    task: Task
    beside: Stream | None

    def trained(self, corpus: Corpus) -> npt.NDArray[np.integer[Any]] | None:
        """Return the triples of --shards that are trained on, sorted; None: all."""
        if self.beside is not None:
            trained = apart(corpus, self.beside.corpus.images)
        else:
            trained = split(corpus, self.settings.eval_fraction).trained if self.settings.eval_fraction else None
        return of_kind(corpus, self.task.kind, trained, "--shards")

    def evaluation(self, stream: Stream) -> Evaluation | None:
        """Return what is asked, None if nothing is held out. stream: that of training."""
        if self.beside is None and not self.settings.eval_fraction:
            return None

        source = stream if self.beside is None else self.beside
        partly = [self.beside is None] * len(source.corpus.sources)
        only = asked(source.corpus, partly, self.settings.eval_fraction)
        flag = "--eval-fraction" if self.beside is None else "--eval-shards"

        return self.task.evaluation(source.corpus, source.reader, of_kind(source.corpus, self.task.kind, only, flag))


@contextmanager
def holding_out(
    settings: Train, sources: Sequence[Source], tags: TagRule, tokenizer: Tokenizer, task: Task
) -> Iterator[HeldOut]:
    """Open what is held out beside --shards. sources: those of --eval-shards."""
    opened = (
        open_asked(
            sources,
            tokenizer=tokenizer,
            shape=task.shape,
            tags=tags,
            cache=settings.cache,
            cache_size=settings.cache_size,
            skip_corrupt=settings.skip_corrupt,
        )
        if sources
        else nullcontext()
    )
    with opened as beside:
        yield HeldOut(settings, task, beside)


@contextmanager
def open_asked(sources: Sequence[Source], **options: Any) -> Iterator[Stream]:
    """Open shards of which no batch is asked for, but regions at any time; options: of `open_stream`."""
    with open_stream(sources, batch_size=1, **options) as stream:
        yield stream


def is_due(settings: Train, step: int) -> bool:
    """Whether there is an evaluation after a step."""
    every = settings.eval_every or settings.checkpoint_every
    return step > 0 and (step % every == 0 or step == settings.steps)
