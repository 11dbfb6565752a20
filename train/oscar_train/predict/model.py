"""A fine-tuned model from disk: a run of oscar-finetune, a checkpoint of one, or a folder of microsoft/Oscar's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oscar_common.device import choose_device
from oscar_common.errors import OperationError, UsageError
from oscar_train.arguments import RECORD, check_model
from oscar_train.batch import Batch
from oscar_train.captioning.network import OscarForCaptioning
from oscar_train.checkpoints.checkpoint import whole
from oscar_train.checkpoints.init import newest_model, open_folder, position_of, read
from oscar_train.checkpoints.tensor_names import TIED, fitting, modules
from oscar_train.data.sampling.shape import Shape
from oscar_train.data.texts.tags import TagRule
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.evaluation.evaluate import tag_rule_of
from oscar_train.evaluation.measure import answer
from oscar_train.model.oscar import oscar_config
from oscar_train.tasks.classifier import OscarForClassification, is_classifier, with_head

CAPTIONING = "caption"
RELEASED = Shape(tokens=70)  # of microsoft/Oscar's retrieval, which says nothing of it in its folders


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """A fine-tuned model. shape: of a row. feature_dim: of the regions that it knows, P. tags: which tags it sees."""

    folder: Path
    network: Any  # an OscarForClassification, or an OscarForCaptioning
    tokenizer: Tokenizer
    shape: Shape
    feature_dim: int
    tags: TagRule
    about: dict[str, Any]
    device: torch.device
    precision: str

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """Return the scores of classes for rows, float32 [B, classes], on the CPU."""
        scores: Tensor = answer(self.network, self.precision, batch)
        return scores.float().cpu()


def open_model(
    path: str | Path, task: str | tuple[str, ...], device: str = "auto", precision: str = "fp32"
) -> TaskModel:
    """Open a model that was fine-tuned for a task, or for one of several.

    Raises:
        UsageError: there is no model, or it is for something else.
        OperationError: it is a damaged checkpoint.
    """
    place = f"--model {path}"
    folder = _folder(Path(path), place)
    start = open_folder(str(path), folder, place)
    config, weights = read(start)
    about = _about(folder)
    tasks = (task,) if isinstance(task, str) else task
    writes = tasks == (CAPTIONING,)
    if about.get("task", tasks[0]) not in tasks or not (writes or is_classifier(weights)):
        kind = f"fine-tuned for {about['task']}" if about.get("task") else "pre-trained only"
        raise UsageError(f"{place}: a model that is {kind}; make one with: oscar-finetune {tasks[0]} --init {path}")

    position = position_of(config)
    features = int(getattr(config, "img_feature_dim", 0)) - position
    config = oscar_config(config, features, position)
    network: Any = (
        OscarForCaptioning(config, start.tokenizer) if writes else OscarForClassification(with_head(config, weights))
    )
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    loaded = fitting(weights, expected, place)
    if lost := expected.keys() - loaded.keys() - {TIED}:
        raise UsageError(f"{place}: it lacks {', '.join(modules(lost))}")

    network.load_state_dict(loaded, strict=False)  # a tied weight has two names

    chosen = torch.device(choose_device(device))
    shape = Shape(
        tokens=int(about.get("text_length", RELEASED.tokens)), regions=int(about.get("regions", RELEASED.regions))
    )
    return TaskModel(
        folder=folder,
        network=network.to(chosen).eval(),
        tokenizer=start.tokenizer,
        shape=shape,
        feature_dim=features,
        tags=tag_rule_of(about),
        about=about,
        device=chosen,
        precision=precision,
    )


def _folder(path: Path, place: str) -> Path:
    """Return the folder of the weights."""
    try:
        check_model(path)
    except UsageError as error:
        raise UsageError(str(error).replace(f"FOLDER {path}", place)) from None
    return newest_model(path, place)


def _about(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint of this project says of itself; nothing of another's."""
    if not (folder / RECORD).is_file():
        return {}
    try:
        return whole(folder).about
    except ValueError as error:
        raise OperationError(f"--model {folder}: is damaged ({error}); give another checkpoint of the run") from None
