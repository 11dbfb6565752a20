"""The model is Oscar: the released names and sizes, and a forward pass checked against plain functions."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm
from transformers import BertConfig

from oscar_train.losses import evaluate
from oscar_train.model import OscarForPreTraining, oscar_config, random_config
from oscar_train.sampling.triples import IGNORED
from oscar_train.stream import Batch, Stream

VOCABULARY = 30522


def tiny(**changes: object) -> BertConfig:
    config = random_config("tiny", VOCABULARY)
    for name, value in changes.items():
        setattr(config, name, value)
    return oscar_config(config, 24)


@pytest.mark.parametrize(
    ("size", "changes", "parameters", "keys"),
    [
        ("base", {}, 111_684_668, 209),
        ("base", {"num_contrast_classes": 3, "use_img_layernorm": 1}, 111_686_973, 211),
        ("large", {}, 338_330_428, 401),
        ("large", {"num_contrast_classes": 3, "use_img_layernorm": 1}, 338_333_501, 403),
    ],
)
def test_parameter_counts_are_the_releases(size: str, changes: dict[str, object], parameters: int, keys: int):
    config = random_config(size, VOCABULARY)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = OscarForPreTraining(oscar_config(config, 2048))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == keys


def test_names_are_the_releases():
    with torch.device("meta"):
        names = set(OscarForPreTraining(tiny(use_img_layernorm=1)).state_dict())
    both = ("weight", "bias")
    expected = {f"bert.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")}
    parts = ["embeddings.LayerNorm", "pooler.dense", "img_embedding", "LayerNorm"]
    for layer in range(2):
        parts += [f"encoder.layer.{layer}.attention.self.{n}" for n in ("query", "key", "value")]
        parts += [f"encoder.layer.{layer}.attention.output.{n}" for n in ("dense", "LayerNorm")]
        parts += [f"encoder.layer.{layer}.intermediate.dense"]
        parts += [f"encoder.layer.{layer}.output.{n}" for n in ("dense", "LayerNorm")]
    expected |= {f"bert.{part}.{n}" for part in parts for n in both}
    expected |= {f"cls.predictions.transform.{part}.{n}" for part in ("dense", "LayerNorm") for n in both}
    expected |= {"cls.predictions.bias", "cls.predictions.decoder.weight"}
    expected |= {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}
    assert names == expected


def reference(w: dict[str, Tensor], config: BertConfig, batch: Batch) -> tuple[Tensor, Tensor]:
    """Oscar's forward pass from its weights alone: scores at all text positions, and of the pairs."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normal(x: Tensor, name: str, eps: float = 1e-12) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    e = "bert.embeddings"
    text = (
        w[f"{e}.word_embeddings.weight"][batch.input_ids]
        + w[f"{e}.position_embeddings.weight"][: batch.input_ids.shape[1]]
    )
    text = normal(text + w[f"{e}.token_type_embeddings.weight"][batch.token_type_ids], f"{e}.LayerNorm")
    regions = linear(torch.cat([batch.features.float(), batch.z], -1), "bert.img_embedding")
    if config.use_img_layernorm:
        regions = normal(regions, "bert.LayerNorm", config.img_layer_norm_eps)
    hidden = torch.cat([text, regions], 1)
    seen = torch.cat([batch.attention_mask, batch.region_mask], 1)
    b, t, h = hidden.shape
    heads = config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        name = f"bert.encoder.layer.{layer}"
        query, key, value = (
            linear(hidden, f"{name}.attention.self.{part}").view(b, t, heads, h // heads).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(h // heads)
        scores[~seen[:, None, None].expand_as(scores)] = -math.inf
        context = (scores.softmax(-1) @ value).transpose(1, 2).reshape(b, t, h)
        hidden = normal(
            hidden + linear(context, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm"
        )
        inner = gelu(linear(hidden, f"{name}.intermediate.dense"))
        hidden = normal(hidden + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    c = "cls.predictions"
    transformed = normal(gelu(linear(hidden[:, :35], f"{c}.transform.dense")), f"{c}.transform.LayerNorm")
    words = transformed @ w[f"{e}.word_embeddings.weight"].T + w[f"{c}.bias"]
    return words, linear(torch.tanh(linear(hidden[:, 0], "bert.pooler.dense")), "cls.seq_relationship")


@pytest.mark.parametrize("image_norm", [0, 1])
def test_the_forward_pass_and_losses_are_those_of_plain_functions(stream: Stream, image_norm: int):
    torch.manual_seed(0)
    config = tiny(use_img_layernorm=image_norm, img_layer_norm_eps=1e-5)
    model = OscarForPreTraining(config).eval()
    for parameter in model.parameters():  # biases and norms, too, must be seen to be used
        parameter.data += 0.05 * torch.randn_like(parameter)
    batch = stream.batch(0, stream.room())
    with torch.no_grad():
        words, pairs = model(batch)
        all_words, expected_pairs = reference(model.state_dict(), config, batch)
    masked = batch.mlm_labels != IGNORED
    torch.testing.assert_close(words, all_words[masked], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pairs, expected_pairs, rtol=1e-4, atol=1e-4)
    outcome = evaluate(words, pairs, batch)
    mlm = cross_entropy(
        all_words.reshape(-1, VOCABULARY), batch.mlm_labels.reshape(-1)
    )  # ignores -100, mean of the rest
    match = torch.stack([-p.log_softmax(0)[y] for p, y in zip(expected_pairs, batch.match_labels, strict=True)]).mean()
    torch.testing.assert_close(outcome.mlm_loss, mlm, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outcome.match_loss, match, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outcome.loss, mlm + match, rtol=1e-4, atol=1e-4)
    right = (all_words.argmax(-1) == batch.mlm_labels)[masked].float().mean()
    torch.testing.assert_close(outcome.mlm_accuracy, right, rtol=0, atol=1e-6)
    assert outcome.match_accuracy == (expected_pairs.argmax(-1) == batch.match_labels).float().mean()


def test_padding_and_empty_regions_change_nothing(stream: Stream):
    torch.manual_seed(0)
    model = OscarForPreTraining(tiny()).eval()
    batch = stream.batch(0, stream.room())
    with torch.no_grad():
        before = model(batch)
        batch.input_ids[~batch.attention_mask] = 77
        batch.features[~batch.region_mask] = 9.0
        after = model(batch)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_without_a_masked_token_has_no_masked_token_loss(stream: Stream):
    model = OscarForPreTraining(tiny())
    batch = stream.batch(0, stream.room())
    batch.mlm_labels.fill_(IGNORED)
    outcome = evaluate(*model(batch), batch)
    assert outcome.mlm_loss.item() == 0
    outcome.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_decoder_is_tied_to_the_word_embeddings():
    model = OscarForPreTraining(tiny())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
