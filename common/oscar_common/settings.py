"""Every setting of both stages, once: these dataclasses are the schema of pipelines.yaml and of the commands' flags."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

PRESETS = ("detectron2", "bua", "bua-r152", "lxmert", "bua-d2", "vinvl")
PRECISIONS = ("fp32", "tf32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float16", "int8")
OBJECTIVES = ("oscar", "oscar-plus", "visualbert")
VARIANTS = ("paper", "release")
NEGATIVES = ("typed", "any", "lines")
TAGS = ("detected", "ground-truth", "none")
TAG_ORDERS = ("detector", "score", "random")
REGION_INITS = ("tags", "random")
REGION_POSITIONS = (4, 6)
SCHEDULES = ("linear", "cosine", "constant")
TASKS = ("retrieval", "vqa", "gqa", "nlvr2", "caption")
ATTENTIONS = ("full", "text-image", "text-tags", "tags-image")
LAYOUTS = ("coco", "cc", "sbu", "flickr30k", "gqa", "vqa", "vg-qa")
ENGINES = ("slurm",)
PATTERNS = {  # forms of texts, as regular expressions, and what they are called in messages
    "time": (r"(\d+-)?\d+(:\d\d){0,2}", 'a time like "12:00:00" or "2-00:00:00" (two days)'),
    "memory": (r"\d+[KMGT]?", "a size like 32G"),
}
AUTO = 0  # the batch size that `auto` stands for, until it is known


def setting(
    default: Any,
    help: str,
    choices: tuple[str | int, ...] = (),
    low: float | None = None,
    high: float | None = None,
    words: Mapping[str, int] = MappingProxyType({}),
    decides: bool | None = None,
    group: str = "",
    path: bool | None = None,
    url: bool = False,
    pattern: str = "",
) -> Any:
    """Declare a field: its default, the sentence that `--help` shows, and the values allowed.

    Args:
        words: what may be given instead of a number; each stands for one that is out of the range.
        group: under which `--help` lists it.
        decides: whether the numbers of a run depend on it, so that a run must go on with the same value. Every
            setting of `Train` says so.
        path: whether it names files or folders (it may be a URL or a name, too). Every setting of `Train` that is a
            text without `choices` says so.
        url: whether a path may also be a URL; all other paths are of this machine.
        pattern: the form that a text must have, a name in `PATTERNS`.
    """
    metadata = {
        "help": help,
        "group": group,
        "choices": choices,
        "low": low,
        "high": high,
        "words": words,
        "decides": decides,
        "path": path,
        "url": url,
        "pattern": pattern,
    }
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)

    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An entry of `datasets:` in pipelines.yaml."""

    images: str | None = setting(None, "folder of images, or manifest file")
    captions: str | None = setting(None, "caption file for `images`")
    source: str | None = setting(None, "name of the dataset in the samples")
    layout: str | None = setting(None, "a published dataset's layout, instead of `images`", choices=LAYOUTS)
    root: str | None = setting(None, "folder of that dataset")


@dataclass(frozen=True, kw_only=True)
class Detector:
    """An entry of `detectors:` in pipelines.yaml, and what `--detector` and `--weights` come to."""

    config: str = setting(
        "builtin", "detectron2 config: a file, `builtin`, `vg-r101`, `vg-r152`, `vinvl-x152`, or a model zoo name"
    )
    weights: str | None = setting(None, "weights file: .safetensors, .pth, .bin or .pkl; or hf://OWNER/NAME/FILE")
    classes: str | None = setting(None, "file of class names, one a line, or VinVL's label map")
    attributes: str | None = setting(None, "file of attribute names, one a line")
    preset: str | None = setting(None, "numerics preset, else the one that goes with the weights", choices=PRESETS)


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Stage 1: images to shards."""

    dataset: list[str] = setting(
        [],
        "A dataset in its published layout: coco, cc, sbu, flickr30k, gqa, vqa or vg-qa, with --root; or a name under "
        "`datasets:` in pipelines.yaml. Several (give it again, or a,b,c) are joined: an image in two of them is "
        "extracted once and carries the texts of both.",
        group="Images",
    )
    root: list[str] = setting(
        [],
        "Folder of the --dataset; DIR/NAME if there is such a folder. One for all of them, or one for each in turn.",
        path=True,
        group="Images",
    )
    images: str | None = setting(
        None,
        "Folder of images, searched recursively, tars of images (img2dataset's) included; or a manifest file .jsonl, "
        ".csv, .tsv or .parquet with columns path, text, source. With --dataset: a further folder with its images. "
        "Also the URL of a folder of such tars, or https://host/{00000..00331}.tar.",
        path=True,
        url=True,
        group="Images",
    )
    captions: str | None = setting(
        None,
        "Texts: COCO captions .json; .tsv, .csv, .jsonl or .parquet of (image, caption); a folder with .txt files "
        "named like the images; or the word `txt` for .txt files beside the images.",
        path=True,
        group="Images",
    )
    source: str | None = setting(
        None, "Name of the dataset in the samples. [default: the images folder's name]", group="Images"
    )
    splits: str = setting(
        "train",
        "Splits of a --dataset to take: train, val, test, or several like train,val. Images of val and test splits not "
        "taken are kept out, whichever dataset names them.",
        group="Images",
    )
    exclude: list[str] = setting(
        [],
        "File of images to keep out, one a line (id, source/id, file name or path), or a .json: Karpathy's split (its "
        "val and test), COCO annotations, or a list. May be given again.",
        path=True,
        group="Images",
    )
    duplicates: str = setting(
        "merge",
        "Image files of the same bytes: merge into one sample with the texts of all, or keep each.",
        choices=("merge", "keep"),
        group="Images",
    )
    limit: int | None = setting(None, "Take only the first so many images.", low=1, group="Images")
    shuffle_seed: int | None = setting(
        None, "Shuffle the images by this seed first.", low=0, high=2**63 - 1, group="Images"
    )
    dry_run: bool = setting(
        False,
        "Print the corpus and the plan, and from a short sample the hours and bytes; write nothing.",
        group="Output",
    )
    rate: float | None = setting(
        None,
        "With --dry-run: images a second that one GPU does. Then hours and bytes are worked out, and the detector's "
        "weights are not needed.",
        low=1e-6,
        group="Output",
    )
    plan_only: bool = setting(
        False,
        "Write the plan to --out and nothing else; then oscar-extract --resume OUT does the work.",
        group="Output",
    )
    check: bool = setting(
        False,
        "With --resume: count the shards that are done, in work and left, and the rejects; exit 1 unless all are done.",
        group="Output",
    )
    json: bool = setting(False, "With --check: print one JSON object.", group="Output")
    out: str | None = setting(
        None, "Folder for the shards. The same command again continues what is there.", path=True, group="Output"
    )
    name: str = setting("shard", "First part of the shards' file names.", group="Output")
    detector: str = setting(
        "builtin",
        "builtin, vg-r101, vg-r152, vinvl-x152 or another name under `detectors:` in pipelines.yaml; a name in "
        "detectron2's model zoo, like COCO-Detection/faster_rcnn_R_50_FPN_3x; or a detectron2 config file.",
        group="Detector",
    )
    weights: str | None = setting(
        None,
        "Weights for --detector: .safetensors, .pth, .bin or .pkl, of any known family.",
        path=True,
        url=True,
        group="Detector",
    )
    preset: str | None = setting(
        None,
        "Numerics: whose extractor to follow. [default: the one that goes with the weights]",
        choices=PRESETS,
        group="Detector",
    )
    classes: str | None = setting(
        None,
        "Class names, one a line, or VinVL's label map (.json). [default: Visual Genome's for vg-r101, else what "
        "detectron2 knows of the config's training set]",
        path=True,
        group="Detector",
    )
    attributes: str | None = setting(
        None, "Attribute names, one a line. [default: Visual Genome's, or the label map's]", path=True, group="Detector"
    )
    min_boxes: int | None = setting(
        None,
        "Keep at least this many regions of an image, however low their score. "
        "[default: 10, lxmert 36, bua-r152 100, bua-d2 0]",
        low=0,
        group="Detector",
    )
    max_boxes: int | None = setting(
        None, "Keep at most this many regions of an image. [default: 100, lxmert 36]", low=1, group="Detector"
    )
    score_threshold: float | None = setting(
        None,
        "Between the two, keep regions of at least this score; lxmert has no such threshold. "
        "[default: 0.2, bua-d2 0.05]",
        low=0,
        high=1,
        group="Detector",
    )
    dtype: str = setting(
        "float16",
        "How features are stored: float16; or int8 with a scale a region, half as large (error: docs/shards.md).",
        choices=DTYPES,
        group="Output",
    )
    images_per_shard: int = setting(
        1000, "Images in a shard, the unit of work, of failure and of resume.", low=1, group="Output"
    )
    batch_size: int = setting(
        1, "Images of equal resized shape per forward pass (try 8 on a GPU).", low=1, group="Machine"
    )
    workers: int | None = setting(
        None,
        "Processes on this machine. [default: one for each GPU; without any, as many as cores, memory and work allow]",
        low=1,
        group="Machine",
    )
    scheduler: str | None = setting(
        None,
        "Address of a dask scheduler, like tcp://host:8786, whose workers do the work and see the same folders.",
        group="Machine",
    )
    cache: str | None = setting(
        None,
        "Folder for tars of --images that are fetched from a URL; on a disk of each machine that works. It may be "
        "deleted at any time. [default: ~/.cache/oscar-pretrain]",
        path=True,
        group="Images",
    )
    cache_size: float = setting(
        100.0, "GB of fetched tars that may be in --cache; the least used go.", low=0, group="Images"
    )
    decode_threads: int = setting(4, "Threads of a process that read and decode images.", low=1, group="Machine")
    image_timeout: float = setting(
        60.0, "Refuse an image that takes longer than these seconds to decode.", low=0.1, group="Machine"
    )
    max_reject_fraction: float = setting(
        0.5, "Exit 1 if more of the images than this are missing or were refused.", low=0, high=1, group="Output"
    )
    retry_rejects: bool = setting(False, "Do the shards that have rejects again.", group="Output")
    overwrite: bool = setting(False, "Delete the shards in --out and start over.", group="Output")
    device: str = setting(
        "auto", "Where the detector runs; auto is cuda where there is one.", choices=DEVICES, group="Machine"
    )
    precision: str = setting(
        "fp32",
        "Arithmetic of the network: fp32 as the references; tf32 and bf16 are faster on a GPU.",
        choices=PRECISIONS,
        group="Machine",
    )
    compile: bool = setting(
        False,
        "Compile the network with torch.compile: some minutes at the start, then faster; for long jobs.",
        group="Machine",
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    """Stage 2: shards to a checkpoint. Also an entry of `recipes:` in pipelines.yaml."""

    recipe: str | None = setting(
        None,
        "Settings to begin with: oscar-base, oscar-large, oscar-plus-base, oscar-plus-large, visualbert or another "
        "name under `recipes:` in pipelines.yaml, or a YAML file of settings like a run's run.yaml. What a pipeline or "
        "flag says wins.",
        decides=False,
        path=False,
        group="Run",
    )
    shards: list[str] = setting(
        [],
        "Folder of shards made by oscar-extract, or its URL: s3://, gs://, hf://, https://. May be given again: then "
        "their images are mixed.",
        decides=False,
        path=True,
        url=True,
        group="Data",
    )
    mix: list[float] = setting(
        [],
        "Weights of the --shards folders, one for each in turn: the triples of a folder of weight 2 come twice in an "
        "epoch, those of one of weight 0.5 in every other epoch. [default: 1 each]",
        low=0.001,
        high=1000,
        decides=True,
        group="Data",
    )
    texts: list[str] = setting(
        [],
        "Overlay that adds texts or ground-truth tags to the images of --shards or replaces theirs, a .parquet file "
        "made by oscar-shards texts or tags. May be given again; they are laid over the shards in that order.",
        decides=False,
        path=True,
        group="Data",
    )
    out: str | None = setting(
        None,
        "Folder for checkpoints and logs. The same command again continues what is there.",
        decides=False,
        path=True,
        group="Run",
    )
    init: str = setting(
        "random:tiny",
        "Start from: a BERT folder, a hub name, or random:tiny|small|base|large.",
        decides=True,
        path=True,
        group="Model",
    )
    objective: str = setting(
        "oscar",
        "What is asked of a triple: oscar (are its tags its own?), oscar-plus (are its text and its tags, or answer?) "
        "or visualbert (is its text?). docs/objectives.md has all of it.",
        choices=OBJECTIVES,
        decides=True,
        group="Objective",
    )
    variant: str = setting(
        "paper",
        "As the paper describes the objective, or as the released code does it.",
        choices=VARIANTS,
        decides=True,
        group="Objective",
    )
    negatives: str | None = setting(
        None,
        "What replaces a text or tags: typed (tags by tags, answers by answers, ...), any (of all triples), or lines "
        "(also texts for tags). [default: the objective's]",
        choices=NEGATIVES,
        decides=True,
        group="Objective",
    )
    whole_word_masking: bool = setting(False, "Mask all tokens of a word or none.", decides=True, group="Objective")
    tags: str | None = setting(
        None,
        "Which tags are q: detected, ground-truth (where shards carry them, else detected), or none. [default: "
        "detected; ground-truth with --variant release; none with --objective visualbert]",
        choices=TAGS,
        decides=False,
        group="Objective",
    )
    tag_budget: int | None = setting(
        None, "Most tags of an image. [default: as many as 35 tokens hold]", low=1, decides=False, group="Objective"
    )
    min_tag_score: float | None = setting(
        None,
        "Leave out tags that the detector scored lower; tags without a score stay. [default: all tags]",
        low=0,
        high=1,
        decides=False,
        group="Objective",
    )
    tag_dedupe: bool = setting(False, "Each tag of an image once.", decides=False, group="Objective")
    tag_order: str = setting(
        "detector",
        "Tags of an image as the detector has them, by score (highest first), or shuffled, once for all epochs.",
        choices=TAG_ORDERS,
        decides=False,
        group="Objective",
    )
    tag_vocabulary: str | None = setting(
        None, "File of tags, one a line; all others are left out.", decides=False, path=True, group="Objective"
    )
    attention_dropout: float | None = setting(
        None,
        "Share of attention weights that dropout sets to 0; 0 is faster. [default: that of --init, 0.1 in BERT]",
        low=0,
        high=0.9,
        decides=True,
        group="Model",
    )
    image_layernorm: bool = setting(
        False,
        "A LayerNorm on the embedded regions, as Oscar+ has, even if --init has none.",
        decides=True,
        group="Model",
    )
    region_position: int | None = setting(
        None,
        "Numbers of a region's position that the model takes, 4 (x1/W, y1/H, x2/W, y2/H) or 6 (w/W and h/H, too). "
        "[default: what --init takes, else 6]",
        choices=REGION_POSITIONS,
        decides=True,
        group="Model",
    )
    region_init: str | None = setting(
        None,
        "Where the embedding of regions begins, if --init has none for these features: at their tags' embeddings, by "
        "least squares, or random. [default: tags; random with --variant release]",
        choices=REGION_INITS,
        decides=True,
        group="Model",
    )
    steps: int = setting(1000, "Optimiser steps in all.", low=1, decides=True, group="Schedule")
    batch_size: int = setting(
        64,
        "Triples per step, over all devices and --accumulate: the global batch. auto: the largest that fits.",
        low=2,
        words={"auto": AUTO},
        decides=True,
        group="Schedule",
    )
    accumulate: int = setting(
        1,
        "Parts in which each device does its share of a batch: memory for time.",
        low=1,
        decides=False,
        group="Schedule",
    )
    lr: float = setting(1e-4, "Peak learning rate.", low=0, decides=True, group="Schedule")
    schedule: str = setting(
        "linear",
        "The learning rate after the warm-up: down to 0, or constant.",
        choices=SCHEDULES,
        decides=True,
        group="Schedule",
    )
    warmup_steps: int = setting(0, "Steps of linear warm-up.", low=0, decides=True, group="Schedule")
    weight_decay: float = setting(
        0.01, "AdamW weight decay; biases and LayerNorm have none.", low=0, decides=True, group="Schedule"
    )
    max_grad_norm: float = setting(
        10.0, "Clip the gradient's norm to this; 0: no clipping.", low=0, decides=True, group="Schedule"
    )
    shuffle_window: int = setting(
        64,
        "Shards whose triples are shuffled together; those behind a URL are all in the cache at once.",
        low=1,
        decides=True,
        group="Data",
    )
    read_threads: int | None = setting(
        None,
        "Threads that read and make batches, which are the same for any number. [default: as many as cores, at most 8]",
        low=1,
        decides=False,
        group="Data",
    )
    cache: str | None = setting(
        None,
        "Folder for token ids, made once for each tokenizer and set of texts, and for fetched shards; on a disk of "
        "this machine. It may be deleted at any time. [default: ~/.cache/oscar-pretrain]",
        decides=False,
        path=True,
        group="Data",
    )
    cache_size: float = setting(
        100.0, "GB of fetched shards that may be in --cache; the least used go.", low=0, decides=False, group="Data"
    )
    skip_corrupt: bool = setting(
        False,
        "Count and name shards and images that are gone or damaged, and go on without them.",
        decides=False,
        group="Data",
    )
    seed: int = setting(
        42, "Seed of order, masks, negatives and dropout.", low=0, high=2**63 - 1, decides=True, group="Schedule"
    )
    max_skipped: int = setting(
        20,
        "End the run once more steps than this were skipped: their loss was no number, or a spike.",
        low=0,
        decides=False,
        group="Schedule",
    )
    spike: float = setting(
        3.0,
        "Skip a step whose loss is more than this times the median of the last 100 steps; 0: never.",
        low=0,
        decides=True,
        group="Schedule",
    )
    checkpoint_every: int = setting(
        500, "Steps between checkpoints; one is always written at the end.", low=1, decides=False, group="Run"
    )
    keep: int = setting(2, "Keep this many of the newest checkpoints.", low=1, decides=False, group="Run")
    log_every: int = setting(
        1,
        "Steps between rows of metrics.csv, TensorBoard points and terminal lines.",
        low=1,
        decides=False,
        group="Run",
    )
    wandb: str | None = setting(
        None,
        "Project at Weights & Biases that gets the same numbers. It needs pip install wandb; WANDB_MODE=offline writes "
        "to --out only.",
        decides=False,
        path=False,
        group="Run",
    )
    overwrite: bool = setting(
        False, "Delete the checkpoints and logs in --out and start over.", decides=False, group="Run"
    )
    eval_shards: list[str] = setting(
        [],
        "Folder or URL of shards that is not trained on, for the evaluation while training; images of --shards that "
        "are in it, too, are left out of training. May be given again.",
        decides=False,
        path=True,
        url=True,
        group="Evaluation",
    )
    eval_fraction: float = setting(
        0.0,
        "Share of the images of --shards that is kept out of training, for the evaluation; which ones follows from the "
        "images alone. 0: no evaluation, unless there are --eval-shards.",
        low=0,
        high=0.9,
        decides=True,
        group="Evaluation",
    )
    eval_every: int | None = setting(
        None,
        "Steps between evaluations; there is one at the end, too. [default: --checkpoint-every]",
        low=1,
        decides=False,
        group="Evaluation",
    )
    eval_triples: int = setting(
        2000, "Held-out triples that are asked about, drawn once; 0: all.", low=0, decides=False, group="Evaluation"
    )
    eval_images: int = setting(
        100,
        "Held-out images for retrieval, each with one text: the model sees the square of it. 0: none.",
        low=0,
        decides=False,
        group="Evaluation",
    )
    device: str = setting(
        "auto", "Where to train; auto is cuda where there is one.", choices=DEVICES, decides=False, group="Machine"
    )
    precision: str = setting(
        "fp32",
        "Arithmetic of the network: fp32; or tf32 or bf16, faster on a GPU. Weights and optimizer are always fp32.",
        choices=PRECISIONS,
        decides=True,
        group="Machine",
    )
    compile: bool = setting(
        False,
        "Compile the network with torch.compile: some minutes at the start, then faster (on a CPU by a few hundredths "
        "only); for long runs.",
        decides=False,
        group="Machine",
    )
    cuda_graphs: bool = setting(
        False,
        "Record steps on the GPU and replay them, where the host is what limits it; for one GPU and --accumulate 1.",
        decides=False,
        group="Machine",
    )
    activation_checkpointing: bool = setting(
        False,
        "Compute activations again in the backward pass: a third more time, a fraction of the memory.",
        decides=False,
        group="Machine",
    )


def _again(name: str, default: Any) -> Any:
    """Declare a field of `Train` with another default."""
    return field(default=default, metadata=Train.__dataclass_fields__[name].metadata)


@dataclass(frozen=True, kw_only=True)
class Finetune(Train):
    """Shards and a pre-trained model to a model for a task. Also an entry of `finetune:` in pipelines.yaml."""

    task: str = setting("retrieval", "What the model is fine-tuned for.", choices=TASKS, decides=True, group="Task")
    text_length: int = setting(
        70,
        "Most text tokens of a row: caption or question, tags, [CLS] and each [SEP].",
        low=8,
        high=512,
        decides=True,
        group="Task",
    )
    regions: int = setting(50, "Most regions of an image, the first.", low=1, high=1000, decides=True, group="Task")
    attention: str = setting(
        "full",
        "What sees what: full; or the text and the image only each other (text-image), the text and the tags "
        "(text-tags), the tags and the image (tags-image), each block always itself. The paper's ablation.",
        choices=ATTENTIONS,
        decides=True,
        group="Task",
    )
    dropout: float | None = setting(
        None,
        "Share of hidden numbers that dropout sets to 0. [default: that of --init, 0.1 in BERT]",
        low=0,
        high=0.9,
        decides=True,
        group="Task",
    )
    annotations: list[str] = setting(
        [],
        "VQA's annotations (.json): what all people answered to the questions of the shards. May be given again.",
        decides=False,
        path=True,
        group="Task",
    )
    min_answers: int = setting(
        9, "Answers that were given at least so often are classes.", low=1, decides=True, group="Task"
    )
    label_smoothing: float = setting(
        0.0,
        "Share of the label of a masked token that is spread over all other tokens.",
        low=0,
        high=0.9,
        decides=True,
        group="Task",
    )
    self_critical: bool = setting(
        False,
        "Train on captions that the model draws itself, by how much better than its greedy ones they are in CIDEr-D; "
        "--init is then a run that was trained without.",
        decides=True,
        group="Task",
    )
    batch_size: int = _again("batch_size", 64)
    lr: float = _again("lr", 2e-5)
    weight_decay: float = _again("weight_decay", 0.05)
    max_grad_norm: float = _again("max_grad_norm", 1.0)
    eval_images: int = _again("eval_images", 50)


def decisive(schema: type[Train] = Train) -> list[str]:
    """Return the settings of a schema on which the numbers of a run depend."""
    unsaid = [field.name for field in fields(schema) if field.metadata["decides"] is None]
    assert not unsaid, f"say for {unsaid} whether the numbers of a run depend on it: decides="
    return [field.name for field in fields(schema) if field.metadata["decides"]]


def paths(schema: type[Train] = Train) -> list[str]:
    """Return the settings of a schema that may name files and folders."""
    return [field.name for field in fields(schema) if field.metadata["path"]]


@dataclass(frozen=True, kw_only=True)
class WorkerJobs:
    """What the jobs of stage 1 ask of a cluster: so many workers that share the shards of one folder."""

    workers: int = setting(2, "Workers: elements of the job array. Each takes shards until none is left.", low=1)
    max_running: int | None = setting(None, "Most workers that may run at once. [default: all]", low=1)
    gpus: int = setting(0, "GPUs of a worker; it uses one.", low=0, high=1)
    cpus: int = setting(2, "CPU cores of a worker.", low=1)
    memory: str = setting("4G", "Memory of a worker, like 32G.", pattern="memory")
    time: str | None = setting(None, "Time limit of a worker. [default: the cluster's]", pattern="time")
    partition: str | None = setting(None, "Partition for workers. [default: the cluster's]")


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What the job of stage 2 asks of a cluster: one process for each GPU, on so many nodes."""

    nodes: int = setting(1, "Nodes that train together.", low=1)
    gpus: int = setting(0, "GPUs of a node, with one process each; 0 trains on CPUs.", low=0)
    processes: int = setting(1, "Processes of a node where there are no GPUs.", low=1)
    cpus: int = setting(2, "CPU cores of a node.", low=1)
    memory: str = setting("8G", "Memory of a node, like 256G.", pattern="memory")
    time: str | None = setting(
        None, "Time limit of the job, which then queues again. [default: the cluster's]", pattern="time"
    )
    partition: str | None = setting(None, "Partition for training. [default: the cluster's]")

    @property
    def processes_per_node(self) -> int:
        """Processes that torchrun starts on a node."""
        return self.gpus or self.processes

    @property
    def ranks(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes_per_node


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """An entry of `clusters:` in pipelines.yaml: where and how `oscar-submit` has the stages done."""

    engine: str = setting("slurm", "What starts the jobs.", choices=ENGINES)
    partition: str | None = setting(None, "Partition of the jobs. [default: the scheduler's]")
    account: str | None = setting(None, "Account that the jobs are charged to. [default: the scheduler's]")
    time: str = setting("24:00:00", "Time limit of a job; one that reaches it queues again.", pattern="time")
    warning_seconds: int = setting(
        120, "Seconds before the time limit at which a job saves its work and queues again.", low=1, high=65535
    )
    options: list[str] = setting([], "Further options of sbatch, each as it would stand there: --constraint=a100.")
    setup: list[str] = setting([], "Lines of shell that each job runs first: module load cuda.")
    python: str | None = setting(
        None, "Command that starts Python on the nodes. [default: the interpreter that runs oscar-submit]"
    )
    extract: WorkerJobs = field(default_factory=WorkerJobs)
    train: TrainJob = field(default_factory=TrainJob)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a pipeline's corpus should come to, by the paper that describes it."""

    images: int = setting(0, "Images, each counted once.", low=1)
    texts: int = setting(0, "Captions, and questions with their answers.", low=1)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """An entry of `pipelines:` in pipelines.yaml: of each stage the settings that it has, of the fields' types.

    They are a layer over a recipe's and under the flags', so those that it does not have are not filled in.
    """

    cluster: str | None = setting(None, "Entry of `clusters:` that oscar-submit takes.")
    expected: Expected | None = setting(None, "Counts of the paper, to compare with.")
    extract: dict[str, Any] = field(default_factory=dict, metadata={"values_of": Extract})
    train: dict[str, Any] = field(default_factory=dict, metadata={"values_of": Train})
    finetune: dict[str, Any] = field(default_factory=dict, metadata={"values_of": Finetune})


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The whole of pipelines.yaml."""

    datasets: dict[str, Dataset] = field(default_factory=dict)
    detectors: dict[str, Detector] = field(default_factory=dict)
    recipes: dict[str, Train] = field(default_factory=dict)
    finetune: dict[str, Finetune] = field(default_factory=dict)
    clusters: dict[str, Cluster] = field(default_factory=dict)
    pipelines: dict[str, Pipeline] = field(default_factory=dict)
