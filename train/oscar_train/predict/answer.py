"""Answers to a question about photos."""

from dataclasses import dataclass

import numpy as np

from oscar_common.errors import UsageError
from oscar_train.predict.model import TaskModel
from oscar_train.predict.photos import Photos, make_batch
from oscar_train.predict.search import CHUNK


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A photo's answer, and how likely the model finds it."""

    path: str
    answer: str
    probability: float


def answers(model: TaskModel, photos: Photos, question: str, limit: int | None = None) -> list[Answer]:
    """Return what a model that was fine-tuned for VQA or GQA answers about each of the first photos.

    Raises:
        UsageError: there is no question, or nobody knows what the model's answers are called.
    """
    tokens = model.tokenizer([question], model.shape.tokens - 2)
    if not tokens.lengths[0]:
        raise UsageError(f"QUESTION {question!r}: no word; give a question")

    config = model.network.config
    names = [config.id2label[number] for number in range(config.num_labels)]
    if names[0] == "LABEL_0":  # transformers' name for what has none
        raise UsageError(f"--model {model.folder}: its {len(names):,} answers have no names; fine-tune one of your own")

    paths = photos.table["path"].to_pylist()
    answered = []
    for begin in range(0, min(len(photos), limit or len(photos)), CHUNK):
        chunk = np.arange(begin, min(begin + CHUNK, limit or len(photos), len(photos)))
        scores = model.scores(make_batch(model, photos, chunk, tokens))
        shares = scores.sigmoid() if config.loss_type == "bce" else scores.softmax(1)
        best = scores.argmax(1)

        for photo, label in zip(chunk.tolist(), best.tolist(), strict=True):
            share = float(shares[photo - begin, label])
            answered.append(Answer(path=str(paths[photo]), answer=names[label], probability=share))

    return answered
