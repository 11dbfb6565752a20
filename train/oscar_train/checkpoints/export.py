"""Models on disk: found, described, and written for others: microsoft/Oscar's fine-tuning, and Hugging Face."""

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig

from oscar_common.device import choose_device
from oscar_common.errors import OperationError, UsageError, reason
from oscar_common.files import replacing_folder, restore_folder
from oscar_common.progress import warn
from oscar_train.arguments import CHECKPOINT, RECORD, check_model
from oscar_train.batch import BOX
from oscar_train.checkpoints import checkpoint
from oscar_train.checkpoints.checkpoint import Checkpoint
from oscar_train.checkpoints.init import classes_of, open_folder, position_of, read
from oscar_train.checkpoints.tensor_names import (
    IMAGE_NORM,
    PICKLED,
    REGIONS,
    SAFETENSORS,
    TIED,
    WEIGHTS,
    WORDS,
    fitting,
    modules,
    shapes,
)
from oscar_train.data.texts.arrays import seal
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.model.oscar import OscarForPreTraining, oscar_config
from oscar_train.tasks.classifier import head_shapes, is_classifier

CONFIG = "config.json"
SEALS = "export.json"  # size and XXH3-64 of each file of an export: what --overwrite may delete
RELEASED = 2048  # features of a region in Oscar's releases
BERT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size"),
    *("initializer_range", "layer_norm_eps"),
)
OSCAR = ("img_feature_dim", "img_feature_type", "use_img_layernorm", "img_layer_norm_eps", "num_contrast_classes")
FIXED: dict[str, object] = {
    "finetuning_task": None,
    "num_labels": 2,
    "output_attentions": False,
    "output_hidden_states": False,
    "pruned_heads": {},
    "torchscript": False,
}
INSTEAD = "free some space, or give another --out"
HEAD_FIELDS = ("num_labels", "loss_type", "classifier", "cls_hidden_scale", "num_choice")  # of a fine-tuned model
ACTIVATIONS = ("gelu", "relu", "swish")  # that its code knows


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model on disk.

    made: the checkpoint of this project that it is, if it is one. tensors: those that Oscar has, under its names and in
    its order, of any floating-point type; the tied one is the word embedding. lost, extra: names of those that Oscar
    has and the file lacks, and of those that only the file has.
    """

    folder: Path
    made: Checkpoint | None
    config: BertConfig
    tokenizer: Tokenizer
    tensors: "OrderedDict[str, Tensor]"
    lost: list[str]
    extra: list[str]

    @property
    def parameters(self) -> int:
        """How many numbers it has; the tied ones once."""
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name != TIED)

    @property
    def has_regions(self) -> bool:
        """Whether it is an Oscar, and not a BERT."""
        return f"{REGIONS}.weight" in self.tensors


def find(path: Path, place: str = "") -> Model:
    """Read a model folder, or the newest whole checkpoint of a run folder. place: what messages begin with.

    Raises:
        UsageError: neither is there, or it is no BERT.
        OperationError: it is a checkpoint that is not whole.
    """
    made, place = checkpoint_at(path), place or f"FOLDER {path}"
    folder = path if made is None else made.folder
    start = open_folder(str(path), folder, place)
    config, weights = read(start)
    position = position_of(config) if f"{REGIONS}.weight" in weights else BOX
    features = config.img_feature_dim - position if f"{REGIONS}.weight" in weights else RELEASED
    config = oscar_config(config, features, position)
    expected = head_shapes(config, weights) if is_classifier(weights) else shapes(config)
    tensors = fitting(weights, expected, place)
    if TIED in expected:
        tensors[TIED] = weights[WORDS]

    return Model(
        folder=folder,
        made=made,
        config=config,
        tokenizer=start.tokenizer,
        tensors=OrderedDict((name, tensors[name]) for name in expected if name in tensors),
        lost=[name for name in expected if name not in tensors],
        extra=[name for name in weights if name not in tensors or name == TIED],
    )


def load_checkpoint(path: str | Path, device: str = "auto") -> tuple[OscarForPreTraining, Tokenizer]:
    """Load a trained model from disk, in evaluation mode, with its tokenizer.

    Args:
        path: a checkpoint, a run folder (its newest whole checkpoint counts), an export, or a folder of an Oscar.
        device: auto, cpu or cuda.

    Returns:
        the model, float32, which takes what `oscar_train.pack` returns; and the tokenizer.

    Raises:
        UsageError: neither is there, or it is no whole Oscar.
        OperationError: it is a checkpoint that is damaged.
    """
    stored = find(Path(path))
    if not stored.has_regions or stored.lost:
        raise UsageError(f"{path}: no whole Oscar; it lacks {', '.join(modules(stored.lost))}")

    model = OscarForPreTraining(stored.config)
    model.load_state_dict(stored.tensors)
    return model.eval().to(choose_device(device)), stored.tokenizer


def describe(model: Model) -> list[str]:
    """Say what a model is, a line each."""
    config: Any = model.config
    has_norm = f"{IMAGE_NORM}.weight" in model.tensors
    entries = {
        "format": _format(model),
        "step": "unknown" if model.made is None else f"{model.made.step:,}",
        "parameters": f"{model.parameters:,}",
        "sizes": f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads, "
        f"inner {config.intermediate_size}, {config.max_position_embeddings} positions",
        "features": f"{config.img_feature_dim - config.region_position} and {config.region_position} of the box"
        if model.has_regions
        else "none",
        "image norm": f"LayerNorm, eps {config.img_layer_norm_eps:g}" if has_norm else "none",
        "classes": _classes(config),
        "vocabulary": f"{model.tokenizer.size:,} entries, {config.vocab_size:,} rows",
        "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.tensors.values()})),
        "whole": "unknown: only oscar-train's checkpoints have seals"
        if model.made is None
        else "yes, by size and hash",
        "missing": ", ".join(modules(model.lost)) or "none",
        "extra": ", ".join(modules(model.extra)) or "none",
    }
    return [f"{name:<12}{value}" for name, value in entries.items()]


def export(path: Path, format: str, out: Path, overwrite: bool) -> Model:
    """Write a model as `format`, oscar or hf, to a new folder; nothing that it lacks is made up.

    Raises:
        UsageError: there is no model, something is in `out`, or the format has no place for it.
        OperationError: the disk is full; nothing is left in `out`.
    """
    _check_out(out, overwrite)
    model = find(path)
    if out.exists() and out.samefile(model.folder):
        raise UsageError(f"--out {out}: the model itself; give another --out")
    if format == "oscar" and model.config.hidden_act not in ACTIVATIONS:
        activations = ", ".join(ACTIVATIONS)
        raise UsageError(
            f"--format oscar: microsoft/Oscar has no {model.config.hidden_act} (known: {activations}); give hf"
        )

    # Copies, as torch saves all of a memory of which a tensor may be a part
    tensors = OrderedDict((name, tensor.float().contiguous().clone()) for name, tensor in model.tensors.items())
    if TIED in tensors:
        tensors[TIED] = tensors[WORDS]

    write = {"oscar": _write_oscar, "hf": _write_hf}[format]
    try:
        with replacing_folder(out) as folder:
            write(folder, model, tensors)
            seals = {path.name: seal(path) for path in sorted(folder.iterdir())}
            (folder / SEALS).write_text(json.dumps({"format": format, "files": seals}, indent=1) + "\n")
    except OSError as error:
        kind = UsageError if isinstance(error, PermissionError | NotADirectoryError) else OperationError
        raise kind(f"--out {out}: cannot be written: {error.strerror}; {INSTEAD}") from None
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        raise OperationError(f"--out {out}: cannot be written: {reason(error)}; {INSTEAD}") from None

    return model


def checkpoint_at(path: Path) -> Checkpoint | None:
    """Return the checkpoint that a folder is, or the newest whole one that it has; None if it is another model's."""
    check_model(path)
    if (path / CONFIG).is_file() or (path / RECORD).is_file():
        return _whole(path) if (path / RECORD).is_file() else None

    try:
        made, damages = checkpoint.newest(path)
    except UsageError:
        see = f"see: oscar-checkpoint show {path}/{CHECKPOINT}*"
        raise OperationError(f"FOLDER {path}: none of its checkpoints is whole; {see}") from None

    for damage in damages:
        warn(damage)

    return made


def _whole(path: Path) -> Checkpoint:
    try:
        return checkpoint.whole(path)
    except ValueError as error:
        raise OperationError(f"FOLDER {path}: is damaged ({error}); give another checkpoint of the run") from None


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuse to write over anything but an export, and over that only if it is wanted."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: a file; give a folder")

    restore_folder(out)
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"--out {out}: not empty; give another --out, or --overwrite")
    if why := _is_foreign(out):
        raise UsageError(f"--overwrite: {out} is no export ({why}); delete it, or give another --out")


def _is_foreign(out: Path) -> str:
    """Say what of a folder this command did not write, or nothing: fine-tuning may have written to an export, too."""
    try:
        seals = dict(json.loads((out / SEALS).read_bytes())["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return f"no {SEALS} in it"

    for path in sorted(out.iterdir()):
        if path.name == SEALS:
            continue
        if path.name not in seals or not path.is_file():
            return f"{path.name} is in it"
        if seal(path) != seals[path.name]:
            return f"{path.name} changed"

    return ""


def _write_oscar(folder: Path, model: Model, tensors: "OrderedDict[str, Tensor]") -> None:
    """Write what microsoft/Oscar's `from_pretrained` reads. Tied weights are written once, as torch saves them."""
    config = {name: getattr(model.config, name) for name in (*BERT, *OSCAR)}
    if is_classifier(model.tensors):
        config |= {name: getattr(model.config, name) for name in HEAD_FIELDS}
    elif named := getattr(model.config, "contrast_classes", None):
        config["contrast_classes"] = named

    (folder / CONFIG).write_text(json.dumps({**FIXED, **config}, indent=2, sort_keys=True) + "\n")
    _write_vocabulary(folder, model.tokenizer)
    torch.save(tensors, folder / PICKLED, pickle_protocol=2, _use_new_zipfile_serialization=False)


def _write_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """Write vocab.txt and whether letters become small; of today's other entries that code takes none."""
    entries = sorted(tokenizer.backend.get_vocab().items(), key=lambda entry: entry[1])
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in entries), encoding="utf-8")
    lower = bool(tokenizer.backend.init_kwargs.get("do_lower_case", True))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}) + "\n")


def _write_hf(folder: Path, model: Model, tensors: "OrderedDict[str, Tensor]") -> None:
    """Write what a checkpoint has but for its optimizer. Tied weights are written twice: shared ones are refused."""
    model.config.to_json_file(folder / CONFIG, use_diff=False)
    model.tokenizer.save(folder)
    tied = {TIED: tensors[TIED].clone()} if TIED in tensors else {}
    save_file(tensors | tied, folder / SAFETENSORS, metadata={"format": "pt"})


def _format(model: Model) -> str:
    if model.made is not None:
        return "checkpoint of oscar-train"
    file = next(name for name in WEIGHTS if (model.folder / name).is_file())
    return f"{'Oscar' if model.has_regions else 'BERT, without regions'}, in {file}"


def _classes(config: Any) -> str:
    if hasattr(config, "loss_type"):
        return f"{config.num_labels:,} of a fine-tuned head ({config.classifier}, {config.loss_type})"
    names = ", ".join(classes_of(config)) or "of unknown names"
    note = "" if getattr(config, "contrast_classes", None) else ", as in the releases"
    return f"{config.num_contrast_classes} ({names}{note})"
