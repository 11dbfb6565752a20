"""Tensors by name, as people's files have them, under the names of microsoft/Oscar's checkpoints."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig

from oscar_common.errors import UsageError, reason
from oscar_common.weight_files import read_weight_file
from oscar_train.model.oscar import OscarForPreTraining

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLED, f"{PICKLED}.index.json")
WORDS = "bert.embeddings.word_embeddings.weight"
TIED = "cls.predictions.decoder.weight"
COPIES = {TIED: WORDS, "cls.predictions.decoder.bias": "cls.predictions.bias"}
HEAD, IMAGE_NORM, REGIONS = "cls.seq_relationship", "bert.LayerNorm", "bert.img_embedding"
CLASSIFIER = "classifier."  # the head of a fine-tuned model
BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")  # that some versions saved
RENAMED = (
    (r"^module\.", ""),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"^(?=(embeddings|encoder|pooler|img_embedding|LayerNorm)\.)", "bert."),
)


def read_weights(place: str, folder: Path) -> dict[str, Tensor]:
    """Read the weights of a folder, from one file or several (tensors only: nothing in them is executed).

    Names become Oscar's: old files say gamma and beta for a LayerNorm's weight and bias, some begin with `module.`, and
    those of a bare encoder lack `bert.`. Buffers, and copies of other tensors, are left out.

    Raises:
        UsageError: no file is there, or it cannot be read. The message begins with `place`.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UsageError(f"{place}: {folder} has none of {', '.join(WEIGHTS)}")

    try:
        named = [(_renamed(name), tensor) for part in _parts(path) for name, tensor in _load(part).items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # the last three: an index's JSON
        raise UsageError(f"{place}: {path} cannot be read: {reason(error)}") from None

    state = dict(named)
    if len(state) < len(named):
        twice = Counter(name for name, _ in named).most_common(1)[0][0]
        raise UsageError(f"{place}: {path} has {twice} under two names, and which of them counts is unknown")

    for copy, original in COPIES.items():
        if copy in state and (original not in state or torch.equal(state[copy], state[original])):
            state[original] = state.pop(copy)

    return {name: tensor for name, tensor in state.items() if name not in BUFFERS}


def shapes(config: BertConfig) -> dict[str, torch.Size]:
    """Return the tensors of an Oscar, in the order of its files. `config` has the fields of `oscar_config`."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in OscarForPreTraining(config).state_dict().items()}


def fitting(weights: dict[str, Tensor], expected: dict[str, torch.Size], place: str) -> dict[str, Tensor]:
    """Return the weights that a model of `expected` takes, but for the tied one, in its order.

    Oscar's own parts are among them only if their shapes fit: not those of other features or other classes.

    Raises:
        UsageError: a part of BERT has another shape, a weight is no floating-point number, or it is no BERT at all.
    """
    if WORDS not in weights:
        raise UsageError(f"{place}: its weights are not those of a BERT (no word embeddings)")

    fitted = {}
    for name, shape in expected.items():
        if name not in weights or name == TIED:
            continue

        tensor = weights[name]
        if not tensor.is_floating_point():
            raise UsageError(f"{place}: {name} is {tensor.dtype}; give weights that are not quantised")

        if tensor.shape == shape:
            fitted[name] = tensor
        elif not name.startswith((REGIONS, HEAD, CLASSIFIER)):
            raise UsageError(f"{place}: {name} is {list(tensor.shape)}, but config.json says {list(shape)}")

    return fitted


def modules(names: Iterable[str]) -> list[str]:
    """Return the modules that some tensors belong to, with their number, neighbouring layers together.

    `bert.pooler.dense (2 tensors)`, `bert.encoder.layer.6-11 (96 tensors)`.
    """
    counts: Counter[str] = Counter()
    layers: dict[str, set[int]] = {}
    for name in names:
        if match := re.match(r"(.*\.layer)\.(\d+)\.", name):
            counts[match[1]] += 1
            layers.setdefault(match[1], set()).add(int(match[2]))
        else:
            counts[name.rpartition(".")[0] or name] += 1

    listed = []
    for module, count in sorted(counts.items()):
        numbers = f".{_runs(layers[module])}" if module in layers else ""
        listed.append(f"{module}{numbers} ({count} tensor{'s' * (count > 1)})")

    return listed


def _parts(path: Path) -> list[Path]:
    """Return the files that an index names, all of them beside it; another file is its only part."""
    if path.suffix != ".json":
        return [path]
    names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    if odd := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{odd[0]!r} is no name of a file beside it")
    return [path.parent / name for name in names]


def _load(path: Path) -> dict[str, Tensor]:
    loaded = read_weight_file(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not named tensors")
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


def _renamed(name: str) -> str:
    for pattern, instead in RENAMED:
        name = re.sub(pattern, instead, name)
    return name


def _runs(numbers: set[int]) -> str:
    """Return whole numbers as text, neighbours together: 0-2,5."""
    ordered = sorted(numbers)
    begins = [n for n in ordered if n - 1 not in numbers]
    ends = [n for n in ordered if n + 1 not in numbers]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(begins, ends, strict=True))
