"""`oscar-evaluate`: a model from disk, the images to ask it about, and its answers."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from oscar_common.device import choose_device
from oscar_common.errors import UsageError
from oscar_common.files import replacing
from oscar_common.progress import warn
from oscar_train.checkpoints.export import Model, find
from oscar_train.checkpoints.init import classes_of, position_of
from oscar_train.checkpoints.tensor_names import modules
from oscar_train.data.reading.regions import POSITIONS
from oscar_train.data.sources import Source, check_together, manifest_sha256, open_source
from oscar_train.data.texts.tags import TagRule
from oscar_train.evaluation.held_out import asked
from oscar_train.evaluation.in_training import open_asked
from oscar_train.evaluation.measure import Answering, answer, measure
from oscar_train.evaluation.questions import QuestionSet, make_question_set
from oscar_train.evaluation.report import Numbers, describe_question_set, table
from oscar_train.model.oscar import OscarForPreTraining
from oscar_train.objectives import TABLE, Objective
from oscar_train.ranks import Ranks

BY_CLASSES = {2: "oscar", 3: "oscar-plus"}  # objectives of models that do not say theirs


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command was given; its options' help says what each is."""

    path: Path
    shards: tuple[str, ...]
    everything: bool
    triples: int
    images: int
    shuffles: tuple[str, ...]
    json_file: Path | None
    objective: str | None
    seed: int
    batch_size: int
    device: str
    precision: str
    cache: Path | None
    skip_corrupt: bool


def evaluate(request: Asked) -> None:
    """Ask a model, and print and write what it knows.

    Raises:
        UsageError: there is no model that can be asked, or nothing to ask it about.
        OperationError: the model or a shard is damaged.
    """
    model = find(request.path)
    if not model.has_regions or model.lost:
        raise UsageError(f"FOLDER {request.path}: no whole Oscar; it lacks {', '.join(modules(model.lost))}")

    objective = choose_objective(model, request.objective)
    ranks = Ranks(0, 1, torch.device(choose_device(request.device)))
    sources = [open_source(place, request.skip_corrupt) for place in request.shards]
    check_together(sources)

    with opened(model, sources, objective, request) as question_set:
        forward = partial(answer, loaded(model, question_set.corpus.feature_dim).to(ranks.device), request.precision)
        answering = Answering(forward=forward, ranks=ranks, size=request.batch_size)
        columns = {"as it is": measure(question_set, answering)}
        columns |= {f"{name} shuffled": measure(question_set, answering, name) for name in request.shuffles}

    title = f"{model.folder}: {describe_question_set(question_set)}"
    Console(soft_wrap=True).print(table(question_set, columns, title))
    if request.json_file is not None:
        _write(request, model, sources, question_set, columns)


def choose_objective(model: Model, name: str | None) -> Objective:
    """Return what a model was trained to tell, with its own classes.

    Raises:
        UsageError: it has other classes than an objective of this name.
    """
    classes = classes_of(model.config)
    trained = None if model.made is None else str(model.made.run["objective"])
    chosen = name or trained or BY_CLASSES.get(len(classes), "oscar")
    objective = TABLE[chosen, "paper"]
    if set(classes) != set(objective.classes):
        has = ", ".join(classes) or f"{getattr(model.config, 'num_contrast_classes', 2)} classes without names"
        raise UsageError(
            f"--objective {chosen}: it tells {', '.join(objective.classes)}; the model tells {has}; give another"
        )

    return replace(objective, classes=classes)


@contextmanager
def opened(model: Model, sources: list[Source], objective: Objective, request: Asked) -> Iterator[QuestionSet]:
    """Open shards and draw what is asked about."""
    about = {} if model.made is None else model.made.about
    fraction = 0.0 if model.made is None else float(model.made.run.get("eval_fraction") or 0)
    is_known = [manifest_sha256(source) in about.get("shards", ()) for source in sources]
    if any(is_known) and (request.everything or not fraction):
        warn("the model was trained on these shards: what follows is not what it knows of other images")

    partly = [each and fraction > 0 and not request.everything for each in is_known]
    with open_asked(
        sources,
        tokenizer=model.tokenizer,
        objective=objective,
        tags=tag_rule_of(about),
        cache=request.cache,
        skip_corrupt=request.skip_corrupt,
    ) as stream:
        corpus, reader = stream.corpus, stream.reader
        only = asked(corpus, partly, fraction)
        yield make_question_set(
            corpus, reader, objective, only, triples=request.triples, images=request.images, seed=request.seed
        )


def tag_rule_of(about: dict[str, Any]) -> TagRule:
    """Return the rule for tags that a model was trained with."""
    rule = dict(about.get("tags", {}))
    vocabulary = rule.pop("vocabulary", None)
    return TagRule(**rule, vocabulary=None if vocabulary is None else tuple(vocabulary))


def loaded(model: Model, feature_dim: int) -> OscarForPreTraining:
    """Make the network of a model.

    Raises:
        UsageError: it is for regions of another number of features.
    """
    network = OscarForPreTraining(model.config)
    width = network.bert.img_embedding.in_features
    if width - feature_dim not in POSITIONS:
        expected_dim = width - position_of(model.config)
        raise UsageError(f"--shards: their regions have {feature_dim} features, the model is for {expected_dim}")

    network.load_state_dict(model.tensors)
    return network.eval()


def _write(
    request: Asked, model: Model, sources: list[Source], question_set: QuestionSet, columns: dict[str, Numbers]
) -> None:
    """Write the numbers as JSON; one that is none is null."""
    content = {
        "model": str(model.folder),
        "step": None if model.made is None else model.made.step,
        "shards": {source.place: manifest_sha256(source) for source in sources},
        "classes": list(question_set.objective.classes),
        "triples": len(question_set.triples),
        "images": len(np.unique(question_set.corpus.image[question_set.triples])),
        "gallery": len(question_set.gallery),
        "seed": request.seed,
        "precision": request.precision,
        "numbers": {
            name: {key: None if math.isnan(value) else value for key, value in values.items()}
            for name, values in columns.items()
        },
    }
    assert request.json_file is not None
    with replacing(request.json_file) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
