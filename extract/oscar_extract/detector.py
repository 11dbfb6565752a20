"""A detector: a detectron2 config, its weights and a numerics preset, built and ready."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import oscar_extract.network.backbone  # noqa: F401  (registers the built-in detector's backbone)
from oscar_common import settings
from oscar_common.config import installed_catalog
from oscar_common.device import choose_device
from oscar_common.errors import UsageError, nearest, reason
from oscar_common.files import sha256
from oscar_common.vocabulary import NAMES, read_names
from oscar_extract.network.architecture import add_config
from oscar_extract.network.class_names import known_names
from oscar_extract.network.download import local_file, zoo_config
from oscar_extract.network.families import DETECTRON2, Family, family_of
from oscar_extract.network.weights import fill, read_weights
from oscar_extract.steps.presets import PRESETS, Preset
from oscar_shards.manifest import DetectorRecord

HERE = Path(__file__).parent
BUILTIN = HERE / "builtin"
CONFIGS = {"builtin": BUILTIN / "config.yaml"} | {p.stem: p for p in (HERE / "vg").glob("*.yaml")}
VISUAL_GENOME = 1600, 400  # classes and attributes of bottom-up attention, whose names come with oscar_common


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A model in evaluation mode on its device. `record` is what the manifest says of it."""

    model: Any  # detectron2's GeneralizedRCNN, which carries no types
    cfg: Any
    preset: Preset
    precision: str
    record: DetectorRecord


def open_detector(
    name: str = "builtin",
    *,
    weights: str | Path | None = None,
    classes: str | Path | None = None,
    attributes: str | Path | None = None,
    preset: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
) -> Detector:
    """Build a detector by name, as `oscar-extract --detector NAME` does.

    Args:
        name: builtin, vg-r101, vg-r152 or vinvl-x152; a name in detectron2's model zoo; or a detectron2 config file.
        weights: their file, or hf://OWNER/NAME/FILE; None is what belongs to the name.
        classes, attributes: files of names, one a line.
        preset: whose extractor to follow (docs/numerics.md); None is the one that goes with the weights.
        device: auto, cpu or cuda.
        precision: fp32, tf32 or bf16.

    Raises:
        UsageError: no such detector or weights, or they do not belong together.
    """
    overrides = {"weights": weights, "classes": classes, "attributes": attributes, "preset": preset}
    entry = installed_catalog().detectors.get(name, settings.Detector(config=name))
    entry = replace(entry, **{key: str(value) for key, value in overrides.items() if value is not None})
    return load_detector(name, entry, choose_device(device), precision)


def load_detector(name: str, entry: settings.Detector, device: str, precision: str = "fp32") -> Detector:
    """Build the detector of a `detectors:` entry.

    Raises:
        UsageError: no such config or weights, weights of another network, or a model that is no Faster R-CNN.
    """
    cfg = load_config(name, entry.config)
    path = _weights_of(name, entry, cfg.MODEL.WEIGHTS)
    state = read_weights(path)
    family = family_of(state)
    preset = choose_preset(entry.preset, family, path)
    configure(cfg, preset, device)
    model = build(name, cfg)
    classes, attributes = _classes(name, cfg, entry), _attributes(name, cfg, entry)
    fill(model, family, preset.name, state, path)
    _set_eps(model, preset.batch_norm_eps)
    fold_batch_norms(model)
    model.to(memory_format=torch.channels_last)
    _set_precision(precision)
    cfg.MODEL.DEVICE = "cpu"  # the record is of the numbers, not of the place
    record = DetectorRecord(
        name=name,
        preset=preset.name,
        config=cfg.dump(),
        weights=path.name,
        weights_sha256=sha256(path),
        classes=classes,
        attributes=attributes,
        feature_dim=model.roi_heads.box_predictor.cls_score.in_features,
    )

    return Detector(model=model, cfg=cfg, preset=preset, precision=precision, record=record)


def configure(cfg: CfgNode, preset: Preset, device: str) -> CfgNode:
    """Change a config to what is built, and return it: what the preset fixes wins over the file's values."""
    cfg.merge_from_list([x for pair in preset.fixed.items() for x in pair])
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "", device, ""
    return cfg


def load_config(name: str, config: str) -> CfgNode:
    """Read a detectron2 config: a file, one that comes with this package, or a name in detectron2's model zoo.

    YAML tags that would run code are refused.
    """
    path = CONFIGS.get(config) or zoo_config(config) or Path(config)
    if not path.is_file():
        raise UsageError(f"--detector {name}: no such detectron2 config file: {config}")

    cfg = get_cfg()
    add_config(cfg)
    try:
        cfg.merge_from_file(str(path), allow_unsafe=False)
    except Exception as error:  # yaml, yacs and fvcore each raise their own kinds; all mean that the file is no config
        raise UsageError(f"--detector {path}: not a detectron2 config: {reason(error)}") from None

    return cfg


def _weights_of(name: str, entry: settings.Detector, configured: str) -> Path:
    """Return the file of an entry's weights: those it names, else the built-in ones, the zoo's, or those configured."""
    if entry.weights:
        return local_file(name, entry.weights)
    if entry.config == "builtin":
        return BUILTIN / "model.safetensors"
    if zoo_config(entry.config):
        from detectron2 import model_zoo

        try:
            url = model_zoo.get_checkpoint_url(entry.config.removesuffix(".yaml") + ".yaml")
        except RuntimeError:
            raise UsageError(f"--detector {name}: the model zoo has no weights for it; give --weights FILE") from None

        return local_file(name, url)
    if not configured or "://" in configured:
        raise UsageError(
            f"--detector {name}: no file of its weights is known{f', only {configured}' if configured else ''}; "
            "give one with --weights FILE (docs/numerics.md says where they come from)"
        )

    return Path(configured)


def choose_preset(name: str | None, family: Family, path: Path) -> Preset:
    """Return the preset asked for, or the one that a file's family goes with.

    Raises:
        UsageError: the preset asked for reads other files.
    """
    if name is None:
        return PRESETS[family.presets[0]]
    if name not in PRESETS:
        raise UsageError(f"--preset {name}: no such preset{nearest(name, PRESETS)}")
    if name not in family.presets and family is not DETECTRON2:
        allowed = " or ".join(family.presets)
        raise UsageError(f"--preset {name}: --weights {path} is of family {family.name}, which goes with {allowed}")

    return PRESETS[name]


def build(name: str, cfg: CfgNode) -> Any:
    """Build the network, in evaluation mode.

    Raises:
        UsageError: detectron2 cannot, or it is no Faster R-CNN.
    """
    torch.backends.cudnn.deterministic = True  # the same command ends with the same bytes
    try:
        model = build_model(cfg).eval().requires_grad_(False)
    except (KeyError, AssertionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--detector {name}: detectron2 cannot build it: {reason(error)}") from None

    _check_architecture(name, model)
    return model


def _check_architecture(name: str, model: nn.Module) -> None:
    from detectron2.modeling import GeneralizedRCNN
    from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads

    heads = getattr(model, "roi_heads", None)
    if (
        not isinstance(model, GeneralizedRCNN)
        or not isinstance(heads, Res5ROIHeads | StandardROIHeads)
        or isinstance(heads, CascadeROIHeads)
    ):
        architecture = f"{type(model).__name__} with {type(heads).__name__}"
        raise UsageError(
            f"--detector {name}: a {architecture}; allowed: GeneralizedRCNN with StandardROIHeads or Res5ROIHeads"
        )


def _set_eps(model: nn.Module, eps: float) -> None:
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = eps


def fold_batch_norms(model: nn.Module) -> None:
    """Put batch norms into the convolutions before them: the same numbers but for rounding, and a pass less."""
    for conv in model.modules():
        norm = getattr(conv, "norm", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
            old: Any = norm
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, old.running_mean, old.running_var, old.eps, old.weight, old.bias
            )
            conv.register_module("norm", None)


def compile_network(model: Any) -> None:
    """Have torch compile backbone and box head when they first run.

    Raises:
        UsageError: no compiler that torch could use.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise UsageError("--compile: torch.compile needs a C++ compiler; install g++, or leave out --compile")
    heads = model.roi_heads
    for network in (model.backbone, heads.res5 if hasattr(heads, "res5") else heads.box_head):
        network.compile(dynamic=True)


def _set_precision(precision: str) -> None:
    allowed = precision != "fp32"  # torch would use TF32 in convolutions without being asked
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def _classes(name: str, cfg: CfgNode, entry: settings.Detector) -> list[str]:
    count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if entry.classes:
        names, where = read_names("--classes", Path(entry.classes), "label_to_idx"), f"--classes {entry.classes} has"
    elif (count, cfg.MODEL.ROI_ATTRIBUTE_HEAD.NUM_CLASSES) == VISUAL_GENOME:
        return read_names("--classes", NAMES / "objects.txt")
    else:
        names, where = known_names(cfg), f"its training set {cfg.DATASETS.TRAIN} is known with"

    if len(names) != count:
        raise UsageError(
            f"--detector {name}: it has {count} classes, but {where} {len(names)}; give --classes FILE, one name a line"
        )

    return names


def _attributes(name: str, cfg: CfgNode, entry: settings.Detector) -> list[str]:
    count = cfg.MODEL.ROI_ATTRIBUTE_HEAD.NUM_CLASSES
    file = entry.attributes or (entry.classes if str(entry.classes).endswith(".json") else None)
    if file and count:
        names = read_names("--attributes", Path(file), "attribute_to_idx")
    else:
        names = read_names("--attributes", NAMES / "attributes.txt") if count == VISUAL_GENOME[1] else []

    if len(names) != count:
        raise UsageError(
            f"--detector {name}: it has {count} attributes, but {file or 'this package'} has {len(names)} names for "
            "them; give --attributes FILE, one name a line"
        )

    return names
