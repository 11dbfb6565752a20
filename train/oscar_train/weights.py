"""Where the weights begin: a BERT or Oscar folder, a hub name, or random ones."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig

from oscar_common.errors import UsageError
from oscar_train.arguments import RANDOM
from oscar_train.model import OscarForPreTraining, oscar_config, random_config
from oscar_train.tokens import FILES, Tokenizer, has_tokenizer, load_tokenizer
from oscar_train.triples import MAX_TOKENS

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TIED = "cls.predictions.decoder.weight"
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


def build(start: Start, feature_dim: int, seed: int) -> tuple[OscarForPreTraining, str]:
    """Make the model, and say in one line what was filled from where.

    Raises:
        UsageError: the weights cannot be read, or have other shapes than the configuration says.
    """
    torch.manual_seed(seed)
    model = OscarForPreTraining(oscar_config(start.config, feature_dim))
    total = sum(p.numel() for p in model.parameters())
    if start.folder is None:
        return model, f"{start.init}: {total:,} parameters, all random"
    filled = fill(model, read_weights(start.init, start.folder), f"--init {start.init}")
    rest = sorted({".".join(n.split(".")[:-1][:3]) for n in _names(model) if n not in filled})
    return model, f"{start.init}: {total:,} parameters; random: {', '.join(rest) or 'none'}"


def fill(model: OscarForPreTraining, weights: dict[str, Tensor], place: str) -> set[str]:
    """Copy weights into a model by name; return the names that were filled.

    Names may lack `bert.`, and may say gamma and beta for a LayerNorm's weight and bias. Oscar's own parts are taken
    only if their shapes fit (other features, or another number of classes, leave them random).

    Raises:
        UsageError: a part of BERT has another shape, or nothing fits at all.
    """
    own = _names(model)
    filled = set()
    for name, tensor in ((_renamed(n), t) for n, t in weights.items()):
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


def read_weights(init: str, folder: Path) -> dict[str, Tensor]:
    """Read model.safetensors, else pytorch_model.bin (tensors only: nothing in it is executed).

    Raises:
        UsageError: neither is there, or it cannot be read.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UsageError(f"--init {init}: {folder} has neither of {', '.join(WEIGHTS)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return loaded
    except Exception as error:  # what a damaged file raises is not documented by either library
        raise UsageError(f"--init {init}: {path} cannot be read: {error}") from None


def _names(model: OscarForPreTraining) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)


def _renamed(name: str) -> str:
    name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
    return name if name.startswith(("bert.", "cls.")) else f"bert.{name}"


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
