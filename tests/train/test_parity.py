"""The released model, re-created from its facts (tests/peers/bert_img.py), and ours on its weights are one model."""

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch
from peers import bert_img
from peers.bert_img import BertImgForPreTraining, Sizes
from random_batches import FEATURES, REGIONS, VOCABULARY, random_batch
from torch import Tensor

from oscar_common.settings import Train
from oscar_train.batch import IGNORED, Batch
from oscar_train.checkpoints import checkpoint
from oscar_train.checkpoints.export import export
from oscar_train.checkpoints.init import build, open_init
from oscar_train.model.losses import evaluate
from oscar_train.model.oscar import OscarForPreTraining
from oscar_train.model.packing import pack

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
CASES = [
    pytest.param(
        size, norm, classes, position, id=f"{name}-{'LayerNorm' if norm else 'plain'}-{classes} classes-{position}-d"
    )
    for (name, size), norm, (classes, position) in product(
        (("tiny", TINY), ("four layers", SMALL)), (0, 1), ((2, 4), (2, 6), (3, 6))
    )
]


def released(size: dict[str, int], norm: int, classes: int, position: int) -> tuple[BertImgForPreTraining, Sizes]:
    """The reference with random weights: norms and biases, too, are far from 1 and 0."""
    sizes = Sizes(
        **size,
        vocab_size=len(VOCABULARY),
        img_feature_dim=FEATURES + position,
        use_img_layernorm=norm,
        img_layer_norm_eps=1e-3,  # not that of the other norms
        num_contrast_classes=classes,
    )
    model = BertImgForPreTraining(sizes)
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        one = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        parameter.data = one + 0.06 * torch.randn(parameter.shape, generator=draw)
    return model, sizes


def write(folder: Path, model: BertImgForPreTraining, sizes: Sizes) -> Path:
    """The folder that its training script would have left."""
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "config.json").write_text(json.dumps({**asdict(sizes), "hidden_act": "gelu", "torchscript": False}))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))
    return folder


def reference_scores(model: BertImgForPreTraining, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores at the masked positions, of the pairs, and both losses."""
    position = model.bert.img_embedding.in_features - FEATURES
    features = torch.cat([batch.features.float(), batch.z[..., :position]], -1)
    seen = torch.cat([batch.attention_mask, batch.region_mask], 1).float()
    words, pairs = model(batch.input_ids, batch.token_type_ids, seen, features)
    labels = batch.mlm_labels.masked_fill(batch.mlm_labels == IGNORED, bert_img.IGNORED)
    labels = torch.cat([labels, torch.full((len(labels), REGIONS), bert_img.IGNORED)], 1)
    return words[labels != bert_img.IGNORED], pairs, *bert_img.losses(words, pairs, labels, batch.match_labels)


def load(folder: Path) -> OscarForPreTraining:
    model, line = build(open_init(str(folder)), FEATURES, seed=99)
    assert line.endswith("random: none")
    return model.eval()


@pytest.mark.parametrize(("size", "norm", "classes", "position"), CASES)
def test_scores_losses_and_gradients_are_the_releases(
    tmp_path: Path, size: dict[str, int], norm: int, classes: int, position: int
):
    theirs, sizes = released(size, norm, classes, position)
    ours, batch = load(write(tmp_path, theirs, sizes)), random_batch(classes)
    expected = reference_scores(theirs, batch)
    part = pack(batch, torch.device("cpu"))
    words, pairs = ours(part)
    outcome = evaluate(words, pairs, part)
    got = (words, pairs, outcome.mlm_loss, outcome.match_loss)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    outcome.loss.backward()
    (expected[2] + expected[3]).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert all(gradient.abs().max() > 1e-4 for name, gradient in gradients.items() if ".key.bias" not in name)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients.pop(name), rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert not gradients


@pytest.mark.parametrize(("size", "norm", "classes", "position"), CASES)
def test_the_weights_come_back_unchanged(tmp_path: Path, size: dict[str, int], norm: int, classes: int, position: int):
    """From its folder into our model, from there into a checkpoint, and from that into a folder for it."""
    theirs, sizes = released(size, norm, classes, position)
    start = open_init(str(write(tmp_path, theirs, sizes)))
    ours, _ = build(start, FEATURES, seed=99)
    run = {**checkpoint.identity(Train()), "corpus": "abc"}
    checkpoint.save(tmp_path / "run", 1, run, ours, torch.optim.SGD(ours.parameters()), start.tokenizer)
    export(tmp_path / "run", "oscar", tmp_path / "out", overwrite=False)
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert list(state) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (tmp_path / "vocab.txt").read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == config | asdict(sizes)
