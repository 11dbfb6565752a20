"""Where the weights begin: a BERT or Oscar folder, a hub name, or random ones."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig

from oscar_common.errors import UsageError, reason
from oscar_common.settings import Train
from oscar_train.arguments import RANDOM, checkpoints
from oscar_train.batch import BOX, MAX_TOKENS
from oscar_train.checkpoints.checkpoint import whole
from oscar_train.checkpoints.hub import fetch
from oscar_train.checkpoints.tensor_names import (
    HEAD,
    IMAGE_NORM,
    PICKLED,
    REGIONS,
    SAFETENSORS,
    TIED,
    fitting,
    modules,
    read_weights,
)
from oscar_train.data.reading.regions import POSITIONS
from oscar_train.data.texts.tokens import FILES, Tokenizer, has_tokenizer, load_tokenizer
from oscar_train.model.oscar import OscarForPreTraining, oscar_config, random_config
from oscar_train.objectives import MATCHED, WRONG, WRONG_Q, WRONG_W

UNNAMED = {2: (MATCHED, WRONG), 3: (MATCHED, WRONG_Q, WRONG_W)}  # classes of heads whose config.json names none


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a model begins: the folder (None for random weights), its configuration and tokenizer.

    name: as given. place: what messages begin with.
    """

    name: str
    place: str
    folder: Path | None
    config: BertConfig
    tokenizer: Tokenizer


def open_init(init: str) -> Start:
    """Read the configuration and tokenizer that --init names.

    Raises:
        UsageError: no such folder or hub model, it is no BERT, or its vocabulary does not fit its weights.
    """
    place = f"--init {init}"
    if init.startswith(RANDOM):
        tokenizer = load_tokenizer(None)
        config = random_config(init[len(RANDOM) :], tokenizer.size)
        return Start(name=init, place=place, folder=None, config=config, tokenizer=tokenizer)

    folder = Path(init) if Path(init).is_dir() else fetch(init, (SAFETENSORS, PICKLED), FILES)
    return open_folder(init, newest_model(folder, place), place)


def newest_model(folder: Path, place: str) -> Path:
    """Return the folder of a model: the one given, or the newest whole checkpoint of a run.

    Raises:
        UsageError: it is a run without any whole checkpoint.
    """
    if (folder / "config.json").is_file() or not checkpoints(folder):
        return folder

    damages: list[str] = []
    for checkpoint in checkpoints(folder):
        try:
            return whole(checkpoint).folder
        except ValueError as error:
            damages.append(f"{checkpoint} is damaged ({error})")

    raise UsageError(f"{place}: {damages[0]} and no other checkpoint is whole")


def open_folder(name: str, folder: Path, place: str) -> Start:
    """Read the configuration and tokenizer of a folder; see `open_init`."""
    config, tokenizer = _read_config(place, folder), load_tokenizer(folder)
    if config.max_position_embeddings < MAX_TOKENS or config.type_vocab_size < 2:
        raise UsageError(
            f"{place}: has {config.max_position_embeddings} positions and {config.type_vocab_size} token types; "
            f"Oscar needs {MAX_TOKENS} and 2"
        )

    # Its weights may have rows to spare, but those of a foreign vocabulary mean nothing.
    has_own_tokenizer = has_tokenizer(folder)
    if tokenizer.size > config.vocab_size or (not has_own_tokenizer and tokenizer.size != config.vocab_size):
        raise UsageError(
            f"{place}: {'its' if has_own_tokenizer else 'the shipped'} vocabulary has {tokenizer.size} entries, "
            f"its weights {config.vocab_size}; put the vocab.txt that belongs to the weights into the folder"
        )

    return Start(name=name, place=place, folder=folder, config=config, tokenizer=tokenizer)


def build_for(
    settings: Train,
    start: Start,
    feature_dim: int,
    begin: Callable[[Any], str] | None,
    *,
    classes: tuple[str, ...] | None = None,
    network: Callable[[BertConfig], Any] = OscarForPreTraining,
) -> tuple[Any, str]:
    """Do what `build` does, with what the settings of a run say of its model."""
    return build(
        start,
        feature_dim,
        settings.seed,
        classes=classes,
        image_layernorm=settings.image_layernorm,
        position=settings.region_position,
        attention_dropout=settings.attention_dropout,
        begin=begin,
        network=network,
    )


def build(
    start: Start,
    feature_dim: int,
    seed: int,
    *,
    classes: tuple[str, ...] | None = None,
    image_layernorm: bool = False,
    position: int | None = None,
    attention_dropout: float | None = None,
    begin: Callable[[Any], str] | None = None,
    network: Callable[[BertConfig], Any] = OscarForPreTraining,
) -> tuple[Any, str]:
    """Make the model, and say in one line what was filled from where, what is random and what was not used.

    Args:
        start: the folder.
        feature_dim: of the regions, P.
        seed: of the random weights.
        classes: names of the contrastive classes in the order of their labels, into which the head's rows are put; None
            takes the head as it is.
        image_layernorm: whether regions have a LayerNorm even if the folder's have none.
        position: how many numbers of z the model takes, 4 or 6; None is what the folder's does, else 6.
        attention_dropout: share of attention weights that are set to 0 in training; None is the folder's.
        begin: sets the embedding of regions, where the folder has none for these, and says to what.
        network: makes the model of a configuration, with random weights.

    Raises:
        UsageError: the weights cannot be read, have other shapes than the configuration says, or take another number
            of z than `position`.
    """
    config, weights = read(start)
    position = _position(start, config, feature_dim, position)
    if classes is not None:
        _order_classes(config, weights, classes)

    config.use_img_layernorm = int(bool(getattr(config, "use_img_layernorm", 0)) or image_layernorm)
    if attention_dropout is not None:
        config.attention_probs_dropout_prob = attention_dropout

    torch.manual_seed(seed)
    model = network(oscar_config(config, feature_dim, position))
    total = f"{start.name}: {sum(p.numel() for p in model.parameters()):,} parameters"
    if start.folder is None:
        filled, line = set(), f"{total}, all random"
    else:
        filled = fill(model, weights, start.place)
        line = "; ".join([total, *differences(model, weights, filled)])

    if begin is not None and f"{REGIONS}.weight" not in filled:
        line += f"; {begin(model)}"

    return model, line


def _position(start: Start, config: Any, feature_dim: int, asked: int | None) -> int:
    """Return how many numbers of z a model takes: as its weights do if they are for P features, else what is asked."""
    theirs = getattr(config, "img_feature_dim", 0) - feature_dim
    of_other_features = getattr(config, "region_position", theirs) != theirs
    if start.folder is None or theirs not in POSITIONS or of_other_features:
        return asked or BOX
    if asked not in (None, theirs):
        raise UsageError(
            f"--region-position {asked}: {start.place} takes {theirs} numbers of a region's position "
            f"(img_feature_dim {config.img_feature_dim}, {feature_dim} of them features); leave the flag out"
        )

    return theirs


def position_of(config: Any) -> int:
    """Return how many numbers of z a model takes.

    Ours say so. Of a released one only the sum with the features is known, whose number is a multiple of 8.
    """
    likely = (position for position in (BOX, 4) if (config.img_feature_dim - position) % 8 == 0)
    return getattr(config, "region_position", None) or next(likely, BOX)


def read(start: Start) -> tuple[BertConfig, dict[str, Tensor]]:
    """Return the weights of a folder, none if there is no folder, and its configuration, which says what they show.

    Old checkpoints' configurations say less, and some the wrong thing: the weights are right.
    """
    config = deepcopy(start.config)
    if start.folder is None:
        return config, {}

    weights = read_weights(start.place, start.folder)
    if f"{REGIONS}.weight" in weights:
        config.use_img_layernorm = int(f"{IMAGE_NORM}.weight" in weights)
        config.img_feature_dim = weights[f"{REGIONS}.weight"].shape[-1]

    if f"{HEAD}.weight" in weights:
        config.num_contrast_classes = len(weights[f"{HEAD}.weight"])

    return config, weights


def fill(model: nn.Module, weights: dict[str, Tensor], place: str) -> set[str]:
    """Copy weights into a model by name; return the names that were filled. See `fitting`."""
    model_tensors = _tensors(model)
    loaded = fitting(weights, {name: tensor.shape for name, tensor in model_tensors.items()}, place)
    for name, tensor in loaded.items():
        model_tensors[name].data.copy_(tensor)
    return {*loaded, TIED}


def differences(model: nn.Module, weights: dict[str, Tensor], filled: set[str]) -> list[str]:
    """Name every tensor that is missing from the file, has another shape there, or is unexpected."""
    model_tensors = _tensors(model)
    lost = model_tensors.keys() - filled
    unfit = sorted(lost & weights.keys())
    absent = lost - weights.keys()
    bert = {name for name in absent if name.startswith(("bert.embeddings.", "bert.encoder."))}
    parts = {
        "INCOMPLETE, random instead": modules(bert),
        "random": modules(absent - bert),
        "random, as the file has other shapes": [
            f"{name} (file {list(weights[name].shape)}, here {list(model_tensors[name].shape)})" for name in unfit
        ],
        "in the file and not used": modules(weights.keys() - model_tensors.keys() | weights.keys() & {TIED}),
    }

    return [
        f"{part_name}: {', '.join(some) or 'none'}"
        for part_name, some in parts.items()
        if some or (part_name == "random" and not lost)
    ]


def classes_of(config: Any) -> tuple[str, ...]:
    """Return the names of a contrastive head's rows; none where nobody knows.

    Checkpoints of this project name theirs. Otherwise row 0 is "matched", as it is in BERT's next-sentence head and in
    released Oscars, and of three the order is that of the released code.
    """
    rows, named = getattr(config, "num_contrast_classes", 2), tuple(getattr(config, "contrast_classes", None) or ())
    return named if len(named) == rows else UNNAMED.get(rows, ())


def _order_classes(config: Any, weights: dict[str, Tensor], classes: tuple[str, ...]) -> None:
    """Put the rows of the contrastive head into the order of some classes; drop it if it has others."""
    theirs = classes_of(config)
    for name in weights.keys() & {f"{HEAD}.weight", f"{HEAD}.bias"}:
        head = weights.pop(name)
        if set(theirs) == set(classes) and len(head) == len(theirs):
            weights[name] = head[[theirs.index(each) for each in classes]]
    config.num_contrast_classes, config.contrast_classes = len(classes), list(classes)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)


def _read_config(place: str, folder: Path) -> BertConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{place}: {folder} has no config.json; give the folder of a BERT model")

    try:
        content = BertConfig.get_config_dict(folder)[0]
        if content.get("model_type", "bert") != "bert":
            raise UsageError(f"{place}: a {content['model_type']} model; only BERT models can start an Oscar")
        return BertConfig.from_dict(content)
    except UsageError:
        raise
    except Exception as error:  # OSError for JSON that is none, and a validation error of the library's own
        raise UsageError(f"{place}: {path} cannot be read: {reason(error)}") from None
