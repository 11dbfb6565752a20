"""`oscar-evaluate` of a fine-tuned model: what its task asks, of held-out images or of other shards."""

import json
import math
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from oscar_common.errors import UsageError
from oscar_common.files import replacing
from oscar_common.progress import warn
from oscar_common.settings import Finetune
from oscar_train.checkpoints.export import checkpoint_at
from oscar_train.data.sources import check_together, manifest_sha256, open_source
from oscar_train.evaluation.held_out import asked, of_kind
from oscar_train.evaluation.in_training import open_asked
from oscar_train.evaluation.measure import Answering, answer
from oscar_train.predict.model import open_model
from oscar_train.ranks import Ranks
from oscar_train.tasks.finetune import MODULES


def task_of(path: Path) -> str | None:
    """Return the task that a run or a checkpoint was fine-tuned for; None if it is no fine-tuned one of ours."""
    checkpoint = checkpoint_at(path)
    return None if checkpoint is None else checkpoint.about.get("task")


def evaluate_task(path: Path, task: str, shards: tuple[str, ...], annotations: tuple[str, ...], flags: Any) -> None:
    """Ask a fine-tuned model, and print and write what it knows. flags: those of `oscar-evaluate`.

    Raises:
        UsageError: the model and the shards do not fit together, or there is nothing to ask about.
        OperationError: the model or a shard is damaged.
    """
    model = open_model(path, task, flags["device"], flags["precision"])
    checkpoint = checkpoint_at(path)
    assert checkpoint is not None
    settings = Finetune(
        task=task,
        text_length=model.shape.tokens,
        regions=model.shape.regions,
        annotations=list(annotations),
        eval_triples=flags["triples"],
        eval_images=flags["images"],
    )
    sources = [open_source(place, flags["skip_corrupt"]) for place in shards]
    check_together(sources)
    if sources[0].manifest.detector.feature_dim != model.feature_dim:
        raise UsageError(f"--shards: the model is for regions of {model.feature_dim} features; give others")

    names = tuple(dict(getattr(model.network.config, "id2label", {})).values())
    make_task = import_module(f"oscar_train.tasks.{MODULES[task]}").make_task
    task_parts = make_task(settings, sources, model.tokenizer, names=names)

    fraction = float(checkpoint.run.get("eval_fraction") or 0)
    is_trained_on = [manifest_sha256(source) in checkpoint.about.get("shards", ()) for source in sources]
    if any(is_trained_on) and (flags["everything"] or not fraction):
        warn("the model was trained on these shards: what follows is not what it knows of other images")

    partly = [same and fraction > 0 and not flags["everything"] for same in is_trained_on]
    with open_asked(
        sources,
        tokenizer=model.tokenizer,
        shape=task_parts.shape,
        tags=model.tags,
        cache=flags["cache"],
        skip_corrupt=flags["skip_corrupt"],
    ) as stream:
        only = of_kind(stream.corpus, task_parts.kind, asked(stream.corpus, partly, fraction), "--shards")
        evaluation = task_parts.evaluation(stream.corpus, stream.reader, only)
        ranks = Ranks(0, 1, torch.device(model.device))
        forward = partial(answer, model.network, model.precision)
        values = evaluation.measure(Answering(forward=forward, ranks=ranks, size=flags["batch_size"]))

    Console(soft_wrap=True).print(_table(values, f"{model.folder}: {evaluation.description}"))
    if flags["json_file"] is not None:
        content = {
            "model": str(model.folder),
            "step": checkpoint.step,
            "task": task,
            "shards": {source.place: manifest_sha256(source) for source in sources},
            "numbers": {name: None if math.isnan(value) else value for name, value in values.items()},
        }
        with replacing(flags["json_file"]) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())


def _table(values: dict[str, float], title: str) -> Table:
    shown = Table(title=title, title_justify="left")
    shown.add_column("", no_wrap=True)
    shown.add_column("as it is", justify="right")

    for name, value in values.items():
        as_number = name.endswith(("loss", "rank"))
        shown_value = "–" if math.isnan(value) else f"{value:.4g}" if as_number else f"{value:.1%}"
        shown.add_row(name.replace("_", " "), shown_value)

    return shown
