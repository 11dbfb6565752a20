"""The model is Oscar: the released names and sizes, and a forward pass checked against plain functions."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm
from transformers import BertConfig

from oscar_train.batch import IGNORED, Batch
from oscar_train.data.batch_buffer import put_text
from oscar_train.data.stream import Stream
from oscar_train.model.dropout import by_head, keep, token_bits
from oscar_train.model.losses import evaluate
from oscar_train.model.oscar import OscarForPreTraining, oscar_config, random_config
from oscar_train.model.packing import pack

VOCABULARY = 30522
CPU = torch.device("cpu")


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


Mask = Callable[
    [Tensor, int], Tensor
]  # what a dropout makes of a row's numbers [..., tokens, H or tokens], by its site


def reference(w: dict[str, Tensor], config: BertConfig, row: Batch, dropped: Mask) -> tuple[Tensor, Tensor]:
    """Oscar's forward pass from its weights alone, for a triple alone, without padding: scores of words and pair."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normal(x: Tensor, name: str, eps: float = 1e-12) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    e, words, found = "bert.embeddings", int(row.attention_mask.sum()), int(row.region_mask.sum())
    text = w[f"{e}.word_embeddings.weight"][row.input_ids[0, :words]] + w[f"{e}.position_embeddings.weight"][:words]
    text = normal(text + w[f"{e}.token_type_embeddings.weight"][row.token_type_ids[0, :words]], f"{e}.LayerNorm")
    regions = linear(torch.cat([row.features[0, :found].float(), row.z[0, :found]], -1), "bert.img_embedding")
    if config.use_img_layernorm:
        regions = normal(regions, "bert.LayerNorm", config.img_layer_norm_eps)
    hidden = dropped(torch.cat([text, regions]), 0)
    tokens, h = hidden.shape
    heads = config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        name = f"bert.encoder.layer.{layer}"
        query, key, value = (
            linear(hidden, f"{name}.attention.self.{part}").view(tokens, heads, h // heads).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        scores = dropped((query @ key.transpose(1, 2) / math.sqrt(h // heads)).softmax(-1), 3 * layer + 1)
        context = (scores @ value).transpose(0, 1).reshape(tokens, h)
        context = dropped(linear(context, f"{name}.attention.output.dense"), 3 * layer + 2)
        hidden = normal(hidden + context, f"{name}.attention.output.LayerNorm")
        inner = gelu(linear(hidden, f"{name}.intermediate.dense"))
        inner = dropped(linear(inner, f"{name}.output.dense"), 3 * layer + 3)
        hidden = normal(hidden + inner, f"{name}.output.LayerNorm")
    c = "cls.predictions"
    transformed = normal(gelu(linear(hidden[:words], f"{c}.transform.dense")), f"{c}.transform.LayerNorm")
    scores = transformed @ w[f"{e}.word_embeddings.weight"].T + w[f"{c}.bias"]
    return scores, linear(torch.tanh(linear(hidden[0], "bert.pooler.dense")), "cls.seq_relationship")


def mask_of(seed: Tensor, p: float) -> Mask:
    """Dropout of a triple; tests/train/test_dropout.py says what it must be."""

    def dropped(numbers: Tensor, site: int) -> Tensor:
        tokens = token_bits(seed, numbers.shape[-2])
        bits = by_head(tokens, len(numbers))[0] if numbers.dim() == 3 else tokens[0]
        return numbers * keep(bits, site, numbers.shape[-1], p) / (1 - p)

    return dropped


def odd_rows(stream: Stream) -> Batch:
    """A batch in which one triple was left out, another has no regions, and a third no masked token."""
    buffer = stream.buffer()
    batch = stream.batch(0, buffer)
    buffer.slots.readable[4] = False
    put_text(stream.text(0), buffer, stream.corpus.tokenizer)
    batch.region_mask[[4, 6]] = False
    batch.mlm_labels[9] = IGNORED
    return batch


def rows_alone(model: OscarForPreTraining, batch: Batch, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the masked tokens and of the pairs, and the loss, by `reference`."""
    weights, words, pairs = dict(model.named_parameters()), [], []
    for number in range(len(batch.triples)):
        row = batch.part(number, number + 1)
        scores, pair = reference(weights, model.config, row, mask_of(row.dropout_seeds, p))
        words.append(scores[row.mlm_labels[0, : len(scores)] != IGNORED])
        pairs.append(pair)
    masked, matched = batch.mlm_labels[batch.mlm_labels != IGNORED], torch.stack(pairs)
    match = cross_entropy(matched, batch.match_labels, ignore_index=IGNORED)
    return torch.cat(words), matched, cross_entropy(torch.cat(words), masked) + match


def random_model(**changes: object) -> OscarForPreTraining:
    torch.manual_seed(0)
    model = OscarForPreTraining(tiny(**changes))
    for parameter in model.parameters():  # biases and norms, too, must be seen to be used
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(("p", "image_norm", "recompute"), [(0.0, 0, False), (0.1, 0, False), (0.1, 1, True)])
def test_scores_and_gradients_are_those_of_plain_functions_on_each_triple_alone(
    stream: Stream, p: float, image_norm: int, recompute: bool
):
    rates = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
    model = random_model(use_img_layernorm=image_norm, img_layer_norm_eps=1e-5, **rates)
    model.bert.recompute = recompute
    batch = odd_rows(stream)
    part = pack(batch, CPU)
    words, pairs = model(part)
    expected = rows_alone(model, batch, p)
    loss = evaluate(words, pairs, part).loss
    for one, other in zip((words, pairs, loss), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    loss.backward()
    gradients = torch.autograd.grad(expected[2], list(model.parameters()))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("image_norm", [0, 1])
def test_losses_and_accuracies_of_an_evaluation_are_those_of_plain_functions(stream: Stream, image_norm: int):
    model, batch = random_model(use_img_layernorm=image_norm).eval(), odd_rows(stream)
    part = pack(batch, CPU)
    with torch.no_grad():
        outcome = evaluate(*model(part), part)
        words, pairs, loss = rows_alone(model, batch, 0.0)
    torch.testing.assert_close(outcome.loss, loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outcome.loss, outcome.mlm_loss + outcome.match_loss)
    right = (words.argmax(-1) == batch.mlm_labels[batch.mlm_labels != IGNORED]).float().mean()
    torch.testing.assert_close(outcome.mlm_accuracy, right, rtol=0, atol=1e-6)
    there = batch.match_labels != IGNORED
    right = (pairs.argmax(-1) == batch.match_labels)[there].float().mean()
    torch.testing.assert_close(outcome.match_accuracy, right, rtol=0, atol=1e-6)


def test_padding_and_empty_regions_are_no_tokens(stream: Stream):
    batch = stream.batch(0, stream.buffer())
    before = pack(batch, CPU)
    batch.input_ids[~batch.attention_mask] = 77
    batch.features[~batch.region_mask] = math.nan
    assert all(torch.equal(now, getattr(before, name)) for name, now in pack(batch, CPU).tensors().items())
    tokens = int(batch.attention_mask.sum() + batch.region_mask.sum())
    assert before.counts.tolist() == [(batch.mlm_labels != IGNORED).sum(), 16, tokens]
    assert len(before.input_ids) + len(before.features) == len(before.slots) == tokens
    assert before.seen.shape == (16, (batch.attention_mask.sum(1) + batch.region_mask.sum(1)).max())
    assert torch.equal(before.seen.flatten().nonzero()[:, 0], before.slots.sort().values)


def test_what_is_no_number_stays_in_its_row(stream: Stream):
    model, batch = random_model(), stream.batch(0, stream.buffer())
    batch.features[3, 0, 0] = math.nan
    pairs = model(pack(batch, CPU))[1]
    assert pairs.isfinite().all(1).logical_not().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("train", [True, False])
def test_a_batch_without_a_masked_token_has_no_masked_token_loss(stream: Stream, train: bool):
    model = OscarForPreTraining(tiny()).train(train)
    batch = stream.batch(0, stream.buffer())
    batch.mlm_labels.fill_(IGNORED)
    part = pack(batch, CPU)
    outcome = evaluate(*model(part), part)
    assert outcome.mlm_loss.item() == 0
    outcome.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_without_any_region_has_a_gradient(stream: Stream):
    model, batch = OscarForPreTraining(tiny()), stream.batch(0, stream.buffer())
    batch.region_mask.fill_(False)
    part = pack(batch, CPU)
    evaluate(*model(part), part).loss.backward()
    assert not model.bert.img_embedding.weight.grad.any()  # but is there, as ranks exchange it


def test_the_decoder_is_tied_to_the_word_embeddings():
    model = OscarForPreTraining(tiny())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
