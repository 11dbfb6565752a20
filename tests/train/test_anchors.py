"""The embedding of regions begins at their tags: least squares, compared with numpy's, from the samples themselves."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from small_shards import P, make_samples, write_folder
from support import error_line, train

from oscar_common.sample import Sample
from oscar_train.checkpoints.init import build, open_init
from oscar_train.data.reading.regions import Slots
from oscar_train.data.stream import Stream, open_stream
from oscar_train.model.oscar import OscarForPreTraining
from oscar_train.training.region_init import IMAGES, RIDGE, anchor


def make_model(layernorm: bool = False) -> OscarForPreTraining:
    model, _ = build(open_init("random:tiny"), P, seed=3, image_layernorm=layernorm)
    with torch.no_grad():  # of random weights all LayerNorms are alike
        model.bert.embeddings.LayerNorm.weight.uniform_(0.5, 2)
        model.bert.embeddings.LayerNorm.bias.normal_()
    return model


def regions_of(samples: Sequence[Sample]) -> tuple[npt.NDArray[np.float64], list[str]]:
    """[v'; z] of the first 50 regions of each image with a text, and their tags."""
    rows, tags = [], []
    for sample in samples:
        for n in range(min(len(sample.regions.tags), 50) if sample.texts else 0):
            (x1, y1, x2, y2), (w, h) = sample.regions.boxes[n], (sample.image.width, sample.image.height)
            z = [x1 / w, y1 / h, x2 / w, y2 / h, x2 / w - x1 / w, y2 / h - y1 / h]
            rows.append([*sample.regions.features[n].astype(float), *z])
            tags.append(sample.regions.tags[n])
    return np.array(rows), tags


def embedding_of(tag: str, model: OscarForPreTraining, stream: Stream) -> npt.NDArray[np.float64]:
    """The sum of BERT's three embeddings, the mean over the tag's tokens and the 35 positions."""
    one = model.bert.embeddings
    ids = stream.corpus.tokenizer.backend(tag, add_special_tokens=False).input_ids
    sums = [
        one.word_embeddings.weight[i] + one.token_type_embeddings.weight[1] + one.position_embeddings.weight[place]
        for i in ids
        for place in range(35)
    ]
    return torch.stack(sums).mean(0).detach().double().numpy()


def reference(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
    """Ridge regression as least squares over rows that were added: sqrt(lambda) * weight shall be 0."""
    centre, middle = x.mean(0), y.mean(0)
    ridge = RIDGE * len(x) * (x - centre).var(0).mean()
    more = np.sqrt(ridge) * np.eye(x.shape[1])
    stacked = np.vstack([x - centre, more]), np.vstack([y - middle, np.zeros((len(more), y.shape[1]))])
    weight = np.linalg.lstsq(*stacked, rcond=None)[0]
    return weight, middle - centre @ weight


@pytest.mark.parametrize("layernorm", [False, True])
def test_regions_begin_at_their_tags(stream: Stream, samples: list[Sample], layernorm: bool):
    model = make_model(layernorm)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = anchor(model, stream)

    x, tags = regions_of(samples)
    norm = model.bert.embeddings.LayerNorm
    wanted = {tag: torch.from_numpy(embedding_of(tag, model, stream)).float() for tag in set(tags)}
    if not layernorm:
        wanted = {tag: norm(vector).detach() for tag, vector in wanted.items()}
    y = np.array([wanted[tag].double().numpy() for tag in tags])
    weight, bias = reference(x, y)
    layer = model.bert.img_embedding
    np.testing.assert_allclose(layer.weight.detach().numpy(), weight.T, atol=1e-5)
    np.testing.assert_allclose(layer.bias.detach().numpy(), bias, atol=1e-5)
    explained = 1 - np.square(x @ weight + bias - y).sum() / np.square(y - y.mean(0)).sum()
    assert 0.8 < explained < 1
    assert said == f"bert.img_embedding begins at the tags of {len(x)} regions ({explained:.0%} of their variance)"

    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    own = {"bert.img_embedding.weight", "bert.img_embedding.bias"}
    assert changed == (own | {"bert.LayerNorm.weight", "bert.LayerNorm.bias"} if layernorm else own)


def test_it_is_the_same_on_all_ranks_and_for_every_batch_size(stream: Stream):
    found = []
    for batch_size, rank, ranks in ((16, 0, 1), (6, 0, 2), (6, 1, 2)):
        model = make_model()
        anchor(model, Stream(stream.corpus, stream.reader, seed=42, batch_size=batch_size, rank=rank, ranks=ranks))
        found.append(model.bert.img_embedding.weight.clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_held_out_images_are_not_looked_at(stream: Stream, samples: list[Sample]):
    only = np.flatnonzero(stream.corpus.image[:] < 20)
    said = anchor(make_model(), Stream(stream.corpus, stream.reader, seed=42, batch_size=8, only=only))
    assert f" {len(regions_of(samples[:20])[0])} regions" in said


def test_no_more_images_are_read_than_are_needed(stream: Stream):
    images = stream.first_images(7)
    assert len(set(images.tolist())) == 7
    assert images[0] == stream.corpus.image[stream.triples(0)[0]]
    assert set(stream.first_images(IMAGES).tolist()) == set(range(40)) - {3}  # that one has no text


def test_regions_without_tags_or_with_odd_numbers_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    samples = make_samples()[8:20]
    samples[0] = replace(samples[0], regions=replace(samples[0].regions, tags=[], scores=[]))
    folder = write_folder(tmp_path / "shards", samples)
    model = make_model()
    with open_stream([str(folder)], batch_size=8) as stream:
        read = stream.reader.read

        def spoiled(images: npt.NDArray[np.int64], slots: Slots) -> None:
            read(images, slots)
            slots.features[images.tolist().index(1), 2, 0] = np.inf

        monkeypatch.setattr(stream.reader, "read", spoiled)
        said = anchor(model, stream)
    count = len(regions_of(samples[1:])[0]) - 1
    assert f" {count} regions" in said
    assert model.bert.img_embedding.weight.isfinite().all()


def test_without_tags_it_stays_random(tmp_path: Path):
    samples = [replace(s, regions=replace(s.regions, tags=[], scores=[])) for s in make_samples(12)]
    folder = write_folder(tmp_path / "shards", samples)
    model = make_model()
    before = model.bert.img_embedding.weight.clone()
    with open_stream([str(folder)], batch_size=8) as stream:
        said = anchor(model, stream)
    assert said == "bert.img_embedding stays random, as no regions have tags"
    assert torch.equal(model.bert.img_embedding.weight, before)


def test_features_that_are_all_alike_say_nothing(tmp_path: Path):
    samples = [
        replace(
            s,
            image=replace(s.image, width=300, height=300),
            regions=replace(
                s.regions,
                features=np.ones_like(s.regions.features),
                boxes=np.tile(np.float32([3, 3, 90, 70]), (len(s.regions.boxes), 1)),
            ),
        )
        for s in make_samples(12)
    ]
    folder = write_folder(tmp_path / "shards", samples)
    model = make_model()
    with open_stream([str(folder)], batch_size=8) as stream:
        anchor(model, stream)
    assert model.bert.img_embedding.weight.isfinite().all()
    assert model.bert.img_embedding.weight.abs().max() < 1e-5


def test_a_run_says_where_its_regions_begin(shards: Path, tmp_path: Path):
    out = tmp_path / "run"
    small = ("--shards", shards, "--steps", 2, "--batch-size", 4, "--cache", tmp_path)
    printed = train(*small, "--out", out).stdout
    assert "all random; bert.img_embedding begins at the tags of " in printed
    again = train(*small, "--out", tmp_path / "again", "--init", out / "checkpoint-000002").stdout
    assert "random: none" in again
    assert "img_embedding" not in again
    refused = train(*small, "--out", out, "--region-init", "random")
    assert "--region-init random: the run in --out began with tags" in error_line(refused)


@pytest.mark.parametrize("flags", [("--region-init", "random"), ("--variant", "release")])
def test_random_is_as_bert_begins(shards: Path, tmp_path: Path, flags: tuple[str, ...]):
    out = tmp_path / "run"
    small = ("--shards", shards, "--steps", 2, "--batch-size", 4, "--cache", tmp_path, "--lr", 0, "--weight-decay", 0)
    printed = train(*small, "--out", out, *flags).stdout
    assert "all random; on cpu" in printed
    weight = load_file(out / "checkpoint-000002" / "model.safetensors")["bert.img_embedding.weight"]
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
