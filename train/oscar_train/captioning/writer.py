"""A model that writes captions, from its folder to the text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oscar_common.device import choose_device
from oscar_common.errors import UsageError
from oscar_shards.read import ShardFolder
from oscar_train.batch import MAX_REGIONS, Batch
from oscar_train.captioning.constraints import FREE, Machine, Phrase, build_machine
from oscar_train.captioning.decoder import Decoder, decoder_of
from oscar_train.captioning.layout import TEXT
from oscar_train.captioning.photos import read_photos
from oscar_train.captioning.search import BEAMS, Caption, beam_search, greedy
from oscar_train.captioning.self_critical import without_captions
from oscar_train.captioning.spelling import spell
from oscar_train.checkpoints.export import Model, find
from oscar_train.checkpoints.init import position_of
from oscar_train.checkpoints.tensor_names import HEAD, REGIONS, modules
from oscar_train.data.reading.regions import POSITIONS
from oscar_train.data.texts.tags import TagRule
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.evaluation.evaluate import tag_rule_of
from oscar_train.model.oscar import OscarForPreTraining
from oscar_train.model.packing import pack

TASK = "caption"
UNUSED = (HEAD, "bert.pooler")  # which microsoft/Oscar's captioning models lack


@dataclass(frozen=True)
class Writer:
    """A model in eval mode, its tokens, which tags and how many regions of a photo it takes, and its arithmetic."""

    decoder: Decoder
    tokenizer: Tokenizer
    tags: TagRule
    regions: int
    precision: str


@dataclass(frozen=True)
class Captioned:
    """A photo with its caption.

    row: of the index of its shard. tar: its shard. score: the mean log-probability of the caption's tokens. satisfied:
    how many of the asked words it mentions.
    """

    row: dict[str, Any]
    tar: Path
    caption: str
    score: float
    satisfied: int = 0

    @property
    def name(self) -> str:
        """What people call the photo."""
        return str(self.row.get("path") or self.row["key"])

    @property
    def references(self) -> list[str]:
        """The captions that its shard has."""
        return [text["text"] for text in self.row.get("texts") or [] if text["kind"] == "caption" and text["text"]]


def open_writer(path: Path, feature_dim: int, device: str = "auto", precision: str = "fp32") -> Writer:
    """Open a run, a checkpoint or an Oscar's folder.

    Raises:
        UsageError: there is no whole Oscar, or it is for other features or shorter texts.
        OperationError: it is damaged.
    """
    model = find(path, f"--model {path}")
    lost = [name for name in model.lost if not name.startswith(UNUSED)]
    if not model.has_regions or lost:
        raise UsageError(f"--model {path}: no whole Oscar; it lacks {', '.join(modules(lost or [REGIONS]))}")
    if model.config.max_position_embeddings < TEXT:
        raise UsageError(
            f"--model {path}: has {model.config.max_position_embeddings} positions; captions with tags need {TEXT}"
        )

    about = {"task": TASK} if model.made is None else model.made.about
    if about.get("task") != TASK:
        kind = f"fine-tuned for {about['task']}" if "task" in about else "pre-trained only"
        raise UsageError(f"--model {path}: a model that is {kind}; make one with: oscar-finetune {TASK} --init {path}")

    return Writer(
        decoder=decoder_of(_network(path, model, feature_dim).to(choose_device(device)), model.tokenizer),
        tokenizer=model.tokenizer,
        tags=tag_rule_of(about),
        regions=int(about.get("regions", MAX_REGIONS)),
        precision=precision,
    )


def _network(path: Path, model: Model, feature_dim: int) -> OscarForPreTraining:
    network = OscarForPreTraining(model.config)
    width = network.bert.img_embedding.in_features
    if width - feature_dim not in POSITIONS:
        raise UsageError(
            f"--model {path}: is for regions of {width - position_of(model.config)} features, these photos' have "
            f"{feature_dim}; extract them with the detector that the model was trained with"
        )

    network.load_state_dict(model.tensors, strict=False)
    return network.eval()


@torch.no_grad()
def write(writer: Writer, batch: Batch, machines: Sequence[Machine] = (), beams: int = BEAMS) -> list[Caption]:
    """Write a caption for each image of a batch; one beam is the likeliest token each time."""
    device = writer.decoder.device
    with torch.autocast(device.type, torch.bfloat16, enabled=writer.precision == "bf16"):
        context = writer.decoder.read(pack(without_captions(batch), device))
        if beams == 1 and not machines:
            return greedy(writer.decoder, context)
        return beam_search(writer.decoder, context, machines, beams=beams)


def caption_folder(
    writer: Writer, folder: ShardFolder, *, words: Sequence[str] = (), beams: int = BEAMS, batch_size: int = 32
) -> Iterator[Captioned]:
    """Write a caption for each image of a folder of shards, in its order.

    Args:
        words: that a caption should mention, each with its forms between `|`, like "dog|dogs".
    """
    machine = build_machine([_phrases(writer.tokenizer, word) for word in words], len(words)) if words else FREE
    for photos in read_photos(folder, writer.tags, writer.tokenizer, batch_size, writer.regions):
        machines = [machine] * len(photos.rows) if words else []
        captions = write(writer, photos.batch, machines, beams)
        for row, tar, caption in zip(photos.rows, photos.tars, captions, strict=True):
            text = spell(writer.tokenizer, caption.tokens)
            yield Captioned(row, tar, text, caption.score, caption.satisfied)


def _phrases(tokenizer: Tokenizer, word: str) -> list[Phrase]:
    """Return the token ids of each form of a word."""
    forms = tokenizer([form.strip() for form in word.split("|")], TEXT)
    return [tuple(forms[number].tolist()) for number in range(len(forms))]
