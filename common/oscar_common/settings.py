"""Every setting of both stages, once: these dataclasses are the schema of pipelines.yaml and of the commands' flags."""

from dataclasses import dataclass, field
from typing import Any

PRESETS = ("detectron2",)
DEVICES = ("auto", "cpu", "cuda")


def setting(
    default: Any, help: str, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None
) -> Any:
    """Declare a field: its default, the sentence that `--help` shows, and the values allowed."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An entry of `datasets:` in pipelines.yaml."""

    images: str
    captions: str | None = None
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Detector:
    """An entry of `detectors:` in pipelines.yaml, and what `--detector` and `--weights` come to."""

    config: str = setting("builtin", "detectron2 config file, or `builtin`")
    weights: str | None = setting(None, "weights file: .safetensors, .pth or .pkl")
    classes: str | None = setting(None, "file of class names, one a line")
    preset: str = setting("detectron2", "numerics preset", choices=PRESETS)


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Stage 1: images to shards."""

    dataset: str | None = setting(None, "Name under `datasets:` in pipelines.yaml, instead of --images and --captions.")
    images: str | None = setting(None, "Folder of images, searched recursively.")
    captions: str | None = setting(
        None,
        "Texts: COCO captions .json; .tsv, .csv, .jsonl or .parquet of (image, caption); a folder with .txt files "
        "named like the images; or the word `txt` for .txt files beside the images.",
    )
    source: str | None = setting(None, "Name of the dataset in the samples. [default: the images folder's name]")
    out: str | None = setting(None, "Folder for the shards. The same command again continues what is there.")
    name: str = setting("shard", "First part of the shards' file names.")
    detector: str = setting("builtin", "Name under `detectors:` in pipelines.yaml, or a detectron2 config file.")
    weights: str | None = setting(None, "Weights for --detector: .safetensors, .pth or .pkl.")
    classes: str | None = setting(
        None, "File of class names, one a line. [default: what detectron2 knows of the config's training set]"
    )
    min_boxes: int = setting(10, "Keep at least this many regions of an image, however low their score.", low=1)
    max_boxes: int = setting(100, "Keep at most this many regions of an image.", low=1)
    score_threshold: float = setting(0.2, "Between the two, keep regions of at least this score.", low=0, high=1)
    images_per_shard: int = setting(1000, "Images in a shard, the unit of work, of failure and of resume.", low=1)
    batch_size: int = setting(1, "Images of equal resized shape per forward pass (try 8 on a GPU).", low=1)
    decode_threads: int = setting(4, "Threads that read and decode images.", low=1)
    max_reject_fraction: float = setting(
        0.5, "Exit 1 at the end if more of the images than this were refused.", low=0, high=1
    )
    retry_rejects: bool = setting(False, "Do the shards that have rejects again.")
    overwrite: bool = setting(False, "Delete the shards in --out and start anew.")
    device: str = setting("auto", "Where the detector runs; auto is cuda where there is one.", choices=DEVICES)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Stage 2: shards to a checkpoint."""

    shards: str | None = setting(None, "Folder of shards made by oscar-extract.")
    out: str | None = setting(None, "Folder for checkpoints and logs. The same command again continues what is there.")
    init: str = setting("random:tiny", "Start from: a BERT folder, a hub name, or random:tiny|small|base|large.")
    steps: int = setting(1000, "Optimiser steps in all.", low=1)
    batch_size: int = setting(64, "Triples per step, over all devices.", low=2)
    lr: float = setting(1e-4, "Peak learning rate.", low=0)
    warmup_steps: int = setting(0, "Steps of linear warm-up; then linear decay to 0.", low=0)
    weight_decay: float = setting(0.01, "AdamW weight decay; biases and LayerNorm have none.", low=0)
    max_grad_norm: float = setting(10.0, "Clip the gradient's norm to this; 0: no clipping.", low=0)
    seed: int = setting(42, "Seed of order, masks, negatives and dropout.", low=0, high=2**63 - 1)
    checkpoint_every: int = setting(500, "Steps between checkpoints; one is always written at the end.", low=1)
    keep_checkpoints: int = setting(2, "Keep this many of the newest checkpoints.", low=1)
    log_every: int = setting(1, "Steps between rows of metrics.csv, TensorBoard points and terminal lines.", low=1)
    overwrite: bool = setting(False, "Delete the checkpoints and logs in --out and start anew.")
    device: str = setting("auto", "Where to train; auto is cuda where there is one.", choices=DEVICES)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """An entry of `pipelines:` in pipelines.yaml."""

    extract: Extract = field(default_factory=Extract)
    train: Train = field(default_factory=Train)


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The whole of pipelines.yaml."""

    datasets: dict[str, Dataset] = field(default_factory=dict)
    detectors: dict[str, Detector] = field(default_factory=dict)
    clusters: dict[str, dict[str, Any]] = field(default_factory=dict)  # reserved: their schema comes with the executors
    pipelines: dict[str, Pipeline] = field(default_factory=dict)
