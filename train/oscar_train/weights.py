"""Where the weights begin: a BERT or Oscar folder, a hub name, or random ones."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig

from oscar_common.errors import UsageError
from oscar_train.arguments import RANDOM
from oscar_train.model import OscarForPreTraining, oscar_config, random_config
from oscar_train.objectives import MATCHED, WRONG, WRONG_Q, WRONG_W
from oscar_train.tokens import FILES, Tokenizer, has_tokenizer, load_tokenizer
from oscar_train.triples import MAX_TOKENS

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TIED = "cls.predictions.decoder.weight"
HEAD = "cls.seq_relationship"
IMAGE_NORM = "bert.LayerNorm.weight"
UNNAMED = {2: (MATCHED, WRONG), 3: (MATCHED, WRONG_Q, WRONG_W)}  # classes of heads whose config.json names none
ENCODER = ("embeddings.", "encoder.", "pooler.", "img_embedding.", "LayerNorm.")  # of names without `bert.`
WORDS = "bert.embeddings.word_embeddings.weight"


@dataclass(frozen=True, kw_only=True)
class Start:
    """What --init came to: the folder it names (None for random weights), its configuration and tokenizer."""

    init: str
    folder: Path | None
    config: BertConfig
    tokenizer: Tokenizer


def open_init(init: str) -> Start:
    """Read the configuration and tokenizer that --init names.

    Raises:
        UsageError: no such folder or hub model, it is no BERT, or its vocabulary does not fit its weights.
    """
    if init.startswith(RANDOM):
        tokenizer = load_tokenizer(None)
        return Start(
            init=init, folder=None, config=random_config(init[len(RANDOM) :], tokenizer.size), tokenizer=tokenizer
        )
    folder = Path(init) if Path(init).is_dir() else _download(init)
    config, tokenizer = _read_config(init, folder), load_tokenizer(folder)
    if config.max_position_embeddings < MAX_TOKENS or config.type_vocab_size < 2:
        raise UsageError(
            f"--init {init}: has {config.max_position_embeddings} positions and {config.type_vocab_size} token types; "
            f"Oscar needs {MAX_TOKENS} and 2"
        )
    own = has_tokenizer(folder)  # its weights may have rows to spare, but those of a foreign vocabulary mean nothing
    if tokenizer.size > config.vocab_size or (not own and tokenizer.size != config.vocab_size):
        raise UsageError(
            f"--init {init}: {'its' if own else 'the shipped'} vocabulary has {tokenizer.size} entries, its weights "
            f"{config.vocab_size}; put the vocab.txt that belongs to the weights into the folder"
        )
    return Start(init=init, folder=folder, config=config, tokenizer=tokenizer)


def build(
    start: Start,
    feature_dim: int,
    seed: int,
    *,
    classes: tuple[str, ...] | None = None,
    image_layernorm: bool = False,
) -> tuple[OscarForPreTraining, str]:
    """Make the model, and say in one line what was filled from where, what is random and what was not used.

    Args:
        start: the folder.
        feature_dim: of the regions, P.
        seed: of the random weights.
        classes: names of the contrastive classes in the order of their labels, into which the head's rows are put; None
            takes the head as it is.
        image_layernorm: whether regions have a LayerNorm even if the folder's have none.

    Raises:
        UsageError: the weights cannot be read, or have other shapes than the configuration says.
    """
    config, weights = start.config, {}
    if start.folder is not None:
        weights = _described(config, read_weights(start.init, start.folder))
    if classes is not None:
        _order_classes(config, weights, classes)
    config.use_img_layernorm = int(bool(getattr(config, "use_img_layernorm", 0)) or image_layernorm)
    torch.manual_seed(seed)
    model = OscarForPreTraining(oscar_config(config, feature_dim))
    total = f"{start.init}: {sum(p.numel() for p in model.parameters()):,} parameters"
    if start.folder is None:
        return model, f"{total}, all random"
    filled = fill(model, weights, f"--init {start.init}")
    lost, extra = _names(model).keys() - filled, {name for name in weights.keys() - filled if not _means_nothing(name)}
    unfit = {f"{name} (here {_shape(_names(model)[name])})" for name in lost & weights.keys()}
    parts = {
        "random": modules(lost - weights.keys()),
        "random, as other shapes are in the file": sorted(unfit),
        "in the file and not used": modules(extra - lost),
    }
    said = [f"{what}: {', '.join(some) or 'none'}" for what, some in parts.items() if some or what == "random"]
    return model, "; ".join([total, *said])


def modules(names: Iterable[str]) -> list[str]:
    """Return the modules that some tensors belong to, with their number, neighbouring layers together: all are told.

    `bert.pooler.dense`; `bert.encoder.layer.6-11 (96 tensors)`.
    """
    counts: Counter[str] = Counter()
    layers: dict[str, set[int]] = {}
    for name in names:
        if found := re.match(r"(.*\.layer)\.(\d+)\.", name):
            counts[found[1]] += 1
            layers.setdefault(found[1], set()).add(int(found[2]))
        else:
            counts[name.rpartition(".")[0] or name] += 1
    said = []
    for module, count in sorted(counts.items()):
        numbers = f".{_runs(layers[module])}" if module in layers else ""
        said.append(f"{module}{numbers} ({count} tensors)" if numbers else module)
    return said


def fill(model: OscarForPreTraining, weights: dict[str, Tensor], place: str) -> set[str]:
    """Copy weights into a model by name; return the names that were filled.

    Names are as `read_weights` returns them. Oscar's own parts are taken only if their shapes fit (other features, or
    another number of classes, leave them random).

    Raises:
        UsageError: a part of BERT has another shape, or nothing fits at all.
    """
    own = _names(model)
    filled = set()
    for name, tensor in weights.items():
        if name not in own or name == TIED:
            continue
        if own[name].shape == tensor.shape:
            own[name].data.copy_(tensor)
            filled.add(name)
        elif not name.startswith(("bert.img_embedding", "cls.seq_relationship")):
            raise UsageError(f"{place}: {name} is {list(tensor.shape)}, but config.json says {list(own[name].shape)}")
    if WORDS not in filled:
        raise UsageError(f"{place}: its weights are not those of a BERT (no word embeddings)")
    return filled | {TIED}


def _described(config: BertConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let the configuration say what the weights show: old checkpoints' say less, and some the wrong thing."""
    if any(name.startswith("bert.img_embedding") for name in weights):
        config.use_img_layernorm = int(IMAGE_NORM in weights)
    if (head := weights.get(f"{HEAD}.weight")) is not None:
        config.num_contrast_classes = len(head)
    return weights


def _order_classes(config: Any, weights: dict[str, Tensor], classes: tuple[str, ...]) -> None:
    """Put the rows of the contrastive head into the order of some classes; drop it if it has others.

    Checkpoints of this project name theirs. Otherwise row 0 is "matched", as it is in BERT's next-sentence head and in
    released Oscars, and of three the order is that of the released code.
    """
    rows = getattr(config, "num_contrast_classes", 2)
    theirs = tuple(getattr(config, "contrast_classes", None) or UNNAMED.get(rows, ()))
    for name in (f"{HEAD}.weight", f"{HEAD}.bias"):
        if name not in weights:
            continue
        if set(theirs) == set(classes) and len(weights[name]) == len(theirs):
            weights[name] = weights[name][[theirs.index(each) for each in classes]]
    config.num_contrast_classes, config.contrast_classes = len(classes), list(classes)
    if set(theirs) != set(classes):
        weights.pop(f"{HEAD}.weight", None)
        weights.pop(f"{HEAD}.bias", None)


def _means_nothing(name: str) -> bool:
    """Say whether a tensor of a file is a duplicate, or a buffer that old versions saved."""
    return name == TIED or name.endswith(("position_ids", "token_type_ids")) or name == "cls.predictions.decoder.bias"


def _runs(numbers: set[int]) -> str:
    """Return whole numbers as text, neighbours together: 0-2,5."""
    ordered = sorted(numbers)
    begins = [n for n in ordered if n - 1 not in numbers]
    ends = [n for n in ordered if n + 1 not in numbers]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(begins, ends, strict=True))


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def read_weights(init: str, folder: Path) -> dict[str, Tensor]:
    """Read model.safetensors, else pytorch_model.bin (tensors only: nothing in it is executed).

    Names become Oscar's: old files say gamma and beta for a LayerNorm's weight and bias, some begin with `module.`, and
    those of a bare encoder lack `bert.`.

    Raises:
        UsageError: neither is there, or it cannot be read.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UsageError(f"--init {init}: {folder} has neither of {', '.join(WEIGHTS)}")
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        return {_renamed(name): tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # what a damaged file raises is not documented by either library
        raise UsageError(f"--init {init}: {path} cannot be read: {error}") from None


def _names(model: OscarForPreTraining) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)


def _renamed(name: str) -> str:
    name = name.removeprefix("module.").replace(".gamma", ".weight").replace(".beta", ".bias")
    return f"bert.{name}" if name.startswith(ENCODER) else name


def _read_config(init: str, folder: Path) -> BertConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"--init {init}: {folder} has no config.json; give the folder of a BERT model")
    try:
        content = BertConfig.get_config_dict(folder)[0]
        if content.get("model_type", "bert") != "bert":
            raise UsageError(f"--init {init}: a {content['model_type']} model; only BERT models can start an Oscar")
        return BertConfig.from_dict(content)
    except UsageError:
        raise
    except Exception as error:  # OSError for JSON that is none, and a validation error of the library's own
        raise UsageError(f"--init {init}: {path} cannot be read: {error}") from None


def _download(init: str) -> Path:
    """Fetch a model from the Hugging Face hub into its cache; return the folder there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # type: ignore[no-untyped-call]  # its warnings about retries would come before our one line

    def present(name: str) -> bool:
        try:
            return bool(hf_hub_download(init, name))
        except EntryNotFoundError:
            return False

    try:
        config = Path(hf_hub_download(init, "config.json"))
        _ = present(WEIGHTS[0]) or present(WEIGHTS[1])
        _ = [present(name) for name in FILES]
    except Exception as error:  # no network, no such model, no rights: each has its own exceptions
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"--init {init}: no such folder, and not to be had from the Hugging Face hub ({reason}); "
            "give a BERT folder, a hub name or random:tiny|small|base|large"
        ) from None
    return config.parent
