"""Captioning by the trainer's own loop, on small shards: it learns, goes on where it stopped, and improves itself."""

import csv
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from oscar_common.settings import Finetune
from oscar_train.captioning.caption_set import make_caption_set, measure_captions
from oscar_train.captioning.network import OscarForCaptioning
from oscar_train.data.corpus import Corpus
from oscar_train.data.sources import open_source
from oscar_train.data.stream import Stream
from oscar_train.evaluation.measure import Answering, answer
from oscar_train.model.oscar import oscar_config, random_config
from oscar_train.ranks import Ranks
from oscar_train.tasks.caption import make_task
from oscar_train.training.loop import train
from oscar_train.training.signals import watched_signals

ALONE = Ranks(0, 1, torch.device("cpu"))


def run(out: Path, shards: Path, **given) -> list[dict[str, str]]:
    """Train, and return the rows of metrics.csv."""
    settings = Finetune(
        **{
            "task": "caption",
            "shards": [str(shards)],
            "out": str(out),
            "steps": 6,
            "batch_size": 8,
            "lr": 3e-3,
            "eval_fraction": 0.2,
            "eval_images": 5,
            "cache": str(out.parent / "cache"),
            **given,
        }
    )
    with watched_signals() as stop:
        train(settings, [open_source(str(shards), False)], out, stop, (), make_task)
    return rows(out / "metrics.csv")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def numbers(table: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(row["step"], row["loss"]) for row in table]


def test_it_learns_and_goes_on_to_the_same_numbers(shards: Path, tmp_path: Path):
    """The loss falls; what is held out is captioned; a run that was stopped ends as one that was not."""
    whole = run(tmp_path / "whole", shards, checkpoint_every=3)
    losses = [float(row["mlm_loss"]) for row in whole]
    assert losses[-1] < losses[0] - 1
    assert list(rows(tmp_path / "whole" / "evaluation.csv")[-1]) == ["step", "bleu_4", "cider_d", "rouge_l"]

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-000006")
    assert numbers(run(tmp_path / "again", shards, checkpoint_every=3)) == numbers(whole)


def test_self_critical_training_begins_with_a_captioning_model(shards: Path, tmp_path: Path):
    run(tmp_path / "first", shards, steps=2, eval_fraction=0.0)
    init = str(tmp_path / "first" / "checkpoint-000002")
    table = run(
        tmp_path / "second", shards, init=init, self_critical=True, steps=2, lr=1e-4, eval_fraction=0.0, batch_size=4
    )
    assert [row["step"] for row in table] == ["1", "2"]
    assert "cider_d" in table[0]
    assert "mlm_loss" not in table[0]


def caption_set_answers(stream: Stream, size: int, ranks: Ranks = ALONE) -> dict[str, float]:
    torch.manual_seed(2)
    config = random_config("tiny", stream.corpus.tokenizer.size)
    network = OscarForCaptioning(oscar_config(config, stream.corpus.feature_dim), stream.corpus.tokenizer)
    caption_set = make_caption_set(stream.corpus, stream.reader, None, images=9)
    return measure_captions(caption_set, Answering(forward=partial(answer, network, "fp32"), ranks=ranks, size=size))


def test_what_an_exam_finds_does_not_depend_on_the_batch(stream: Stream):
    assert caption_set_answers(stream, 9) == pytest.approx(caption_set_answers(stream, 4))


def test_an_exam_has_all_captions_of_its_images_as_references(stream: Stream, corpus: Corpus):
    caption_set = make_caption_set(corpus, stream.reader, None, images=0)
    assert len(caption_set.triples) == len(corpus.images.shard) - corpus.textless
    assert all(len(texts) == 3 for texts in caption_set.references)
    assert caption_set.references[0][0].startswith("photo 0 of a ")
