"""The released heads for tasks, re-created (tests/peers/bert_img_tasks.py), and ours on their weights are one model."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peers import bert_img_tasks
from peers.bert_img import Sizes
from peers.bert_img_tasks import ImageBertForTasks, mask_2d
from random_batches import FEATURES, REGIONS, TOKENS, VOCABULARY, random_batch
from torch import Tensor

from oscar_train.batch import IGNORED, Batch
from oscar_train.checkpoints.export import export
from oscar_train.model.packing import pack
from oscar_train.predict.model import TaskModel, open_model
from oscar_train.tasks import nlvr2, retrieval, vqa
from oscar_train.tasks.classifier import choose_attention

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
HEADS = {
    "retrieval": ("linear", 2, 2, 1, 0),
    "vqa": ("linear", 7, 2, 1, 0),
    "vqa of two layers": ("mlp", 7, 3, 1, 1),
    "nlvr2": ("mlp", 2, 3, 2, 0),
    "nlvr2 of Oscar+": ("mlp", 2, 2, 2, 1),
}
KINDS = {"full": "CLR", "text-image": "CR", "text-tags": "CL", "tags-image": "LR"}


def released(folder: Path, classifier: str, labels: int, scale: int, choices: int, norm: int) -> ImageBertForTasks:
    """The reference with random weights, in the folder that its training script would have left."""
    sizes = Sizes(**TINY, vocab_size=len(VOCABULARY), img_feature_dim=FEATURES + 6, use_img_layernorm=norm)
    model = ImageBertForTasks(sizes, classifier, labels, scale, choices)
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        one = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        parameter.data = one + 0.06 * torch.randn(parameter.shape, generator=draw)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({**asdict(sizes), "hidden_act": "gelu", "num_labels": labels}))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))
    return model


def two_texts(batch: Batch) -> Batch:
    """The batch with the token types of two texts, one after the other."""
    lengths = batch.attention_mask.sum(1, keepdim=True)
    types = (torch.arange(TOKENS) >= (lengths // 2).clamp(min=1)) & batch.attention_mask
    return replace(batch, token_type_ids=types.long())


def reference(model: ImageBertForTasks, batch: Batch, kind: str) -> Tensor:
    features = torch.cat([batch.features.float(), batch.z], -1)
    seen = torch.cat([batch.attention_mask, batch.region_mask], 1).float()
    if kind != "CLR":
        text, regions = batch.attention_mask.sum(1).tolist(), batch.region_mask.sum(1).tolist()
        captions = (batch.attention_mask & (batch.token_type_ids == 0)).sum(1).tolist()
        masks = [mask_2d(kind, c, t, TOKENS, r, REGIONS) for c, t, r in zip(captions, text, regions, strict=True)]
        seen = torch.stack(masks)
    return model(batch.input_ids, batch.token_type_ids, seen, features)


def opened(folder: Path) -> TaskModel:
    return open_model(folder, "retrieval", "cpu")


@pytest.mark.parametrize("name", HEADS)
def test_heads_score_as_the_releases_do(tmp_path: Path, name: str):
    theirs, batch = released(tmp_path, *HEADS[name]), two_texts(random_batch(2))
    scores = opened(tmp_path).scores(batch)
    torch.testing.assert_close(scores, reference(theirs, batch, "CLR"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", KINDS)
def test_each_attention_is_the_releases_mask(tmp_path: Path, attention: str):
    theirs, batch = released(tmp_path, *HEADS["retrieval"]), two_texts(random_batch(2))
    model = opened(tmp_path)
    model.network.bert.attention = choose_attention(attention)
    expected = reference(theirs, batch, KINDS[attention])
    torch.testing.assert_close(model.scores(batch), expected, rtol=0, atol=1e-5)
    if attention != "full":
        assert not torch.allclose(expected, reference(theirs, batch, "CLR"), atol=1e-5)


def test_what_is_not_seen_has_no_gradient(tmp_path: Path):
    """Of text-tags no region counts, of text-image no tag."""
    released(tmp_path, *HEADS["retrieval"])
    network, batch = opened(tmp_path).network, two_texts(random_batch(2))
    network.bert.attention = choose_attention("text-tags")
    network(pack(batch, CPU)).sum().backward()
    assert network.bert.img_embedding.weight.grad.abs().max() == 0
    network.zero_grad()
    network.bert.attention = choose_attention("text-image")
    network(pack(batch, CPU)).sum().backward()
    types = network.bert.embeddings.token_type_embeddings.weight.grad
    assert types[1].abs().max() == 0 < types[0].abs().max()
    assert network.bert.img_embedding.weight.grad.abs().max() > 0


def test_losses_are_the_releases(tmp_path: Path):
    draw = torch.Generator().manual_seed(1)
    batch = random_batch(2)
    labels = torch.tensor([1, 0, 1, 1, 0, 1])
    scores = torch.randn(6, 2, generator=draw)
    sums, finite = retrieval.criterion(scores, pack(replace(batch, match_labels=labels), CPU))
    torch.testing.assert_close(sums[1] / 6, bert_img_tasks.cross_entropy_loss(scores, labels))
    assert sums[3] == sum(int(row.argmax() == label) for row, label in zip(scores, labels, strict=True))
    assert finite.tolist() == [True] * 3

    pairs = torch.tensor([1, IGNORED, 0, IGNORED, 1, IGNORED])
    sums, _ = nlvr2.criterion(scores[:3], pack(replace(batch, match_labels=pairs), CPU))
    torch.testing.assert_close(sums[1] / 3, bert_img_tasks.cross_entropy_loss(scores[:3], pairs[::2]))


def test_soft_targets_are_in_the_loss_as_in_the_release():
    draw = torch.Generator().manual_seed(1)
    targets = vqa.Targets(
        names=("yes", "no", "2"),
        first={},
        classes=torch.tensor([[0, 2], [1, -1], [-1, -1]]),
        soft=torch.tensor([[0.3, 0.6], [1.0, 0.0], [0.0, 0.0]]),
        official=torch.zeros(3, 2),
    )
    rows = torch.tensor([1, 0, IGNORED, 0, 1, 0])
    table = torch.tensor([[0.3, 0.0, 0.6], [0.0, 1.0, 0.0]])
    scores = torch.randn(6, 3, generator=draw)
    packed = pack(replace(random_batch(2), match_labels=rows), CPU)
    sums, _ = vqa.criterion(scores, packed, targets=targets, loss="bce")
    known = rows != IGNORED
    expected = bert_img_tasks.bce_loss(scores[known], table[rows[known]])
    torch.testing.assert_close(sums[1] / 5, expected)
    best = [float(table[row][scores[n].argmax()]) for n, row in enumerate(rows.tolist()) if row != IGNORED]
    torch.testing.assert_close(sums[3], torch.tensor(sum(best)))


@pytest.mark.parametrize("name", HEADS)
def test_a_released_head_comes_back_unchanged(tmp_path: Path, name: str):
    theirs = released(tmp_path, *HEADS[name])
    export(tmp_path, "oscar", tmp_path / "out", overwrite=False)
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert list(state) == list(theirs.state_dict())
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(state[key], tensor), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kind, labels, scale, choices, _ = HEADS[name]
    wanted = {"num_labels": labels, "classifier": kind, "num_choice": choices}
    assert config == config | wanted
    assert kind == "linear" or config["cls_hidden_scale"] == scale
