"""Captioning of microsoft/Oscar, re-created (tests/peers/captioning.py), and ours on its weights are one model."""

from dataclasses import fields
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from peers import captioning as peer
from peers.captioning import BertForImageCaptioning, Example, Sizes, tensorise
from torch import Tensor
from transformers import BertConfig

from oscar_train.batch import IGNORED, Batch
from oscar_train.captioning.attention import as_caption
from oscar_train.captioning.constraints import FREE
from oscar_train.captioning.decoder import Decoder
from oscar_train.captioning.network import OscarForCaptioning, criterion
from oscar_train.captioning.search import beam_search, greedy
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.model.dropout import TripleDropout
from oscar_train.model.oscar import OscarForPreTraining, oscar_config
from oscar_train.model.packing import Packed, pack

PAD, CLS, SEP, MASK = range(4)
WORDS = 60
FEATURES, POSITION = 10, 6
CPU = torch.device("cpu")
SIZES = Sizes(
    vocab_size=WORDS,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=64,
    img_feature_dim=FEATURES + POSITION,
    max_position_embeddings=80,
)


@pytest.fixture(scope="module")
def theirs() -> BertForImageCaptioning:
    model = BertForImageCaptioning(SIZES)
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        one = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        parameter.data = one + 0.25 * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.fixture(scope="module")
def ours(theirs: BertForImageCaptioning) -> OscarForPreTraining:
    bert = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=80,
    )
    model = OscarForPreTraining(oscar_config(bert, FEATURES, POSITION)).eval()
    rest = model.load_state_dict(theirs.state_dict(), strict=False)
    assert rest.unexpected_keys == []
    assert all(".seq_relationship." in name for name in rest.missing_keys)
    return model


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Images with many and few regions and labels, captions long and short."""
    draw = torch.Generator().manual_seed(11)

    def numbers(count: int) -> list[int]:
        return torch.randint(4, WORDS, (count,), generator=draw).tolist()

    sizes = [(38, 29, 50), (1, 0, 1), (12, 5, 9), (20, 29, 3), (7, 1, 30)]
    return [
        tensorise(
            numbers(words), numbers(labels), torch.randn(regions, SIZES.img_feature_dim, generator=draw), CLS, SEP
        )
        for words, labels, regions in sizes
    ]


def packed(examples: list[Example], labels: Tensor | None = None, caption: bool = True) -> Packed:
    """The same images and captions as a batch of ours; captions may be left out."""
    rows, regions = len(examples), max(len(example.img_feats) for example in examples)
    ids = torch.stack([example.input_ids for example in examples])
    kind = torch.stack([example.token_type_ids for example in examples])
    present = torch.stack([example.attention_mask.diagonal()[: peer.TEXT] > 0 for example in examples])
    if not caption:
        present[:, : peer.CAPTION] = False

    img_feats = torch.zeros(rows, regions, SIZES.img_feature_dim)
    for row, example in enumerate(examples):
        img_feats[row, : len(example.img_feats)] = example.img_feats
    counts = torch.tensor([len(example.img_feats) for example in examples])
    batch = {
        "input_ids": ids,
        "token_type_ids": kind,
        "attention_mask": present,
        "mlm_labels": torch.full_like(ids, IGNORED) if labels is None else labels,
        "features": img_feats[..., :FEATURES],
        "z": img_feats[..., FEATURES:],
        "region_mask": torch.arange(regions) < counts[:, None],
    }
    return pack(Batch(**{f.name: batch.get(f.name, torch.zeros(rows, dtype=torch.int64)) for f in fields(Batch)}), CPU)


def masked(examples: list[Example]) -> tuple[list[Example], Tensor]:
    """Each third token of the captions becomes [MASK]; labels are what was there."""
    labels = torch.full((len(examples), peer.TEXT), IGNORED)
    changed = []
    for row, example in enumerate(examples):
        ids = example.input_ids.clone()
        for place in range(1, peer.CAPTION, 3):
            if ids[place] != PAD:
                labels[row, place], ids[place] = int(ids[place]), MASK
        changed.append(Example(ids, example.token_type_ids, example.attention_mask, example.img_feats))
    return changed, labels


def test_scores_and_gradients_are_the_releases(
    theirs: BertForImageCaptioning, ours: OscarForPreTraining, examples: list[Example]
):
    examples, labels = masked(examples)
    expected = torch.cat(
        [
            theirs(
                example.input_ids[None],
                example.token_type_ids[None],
                example.attention_mask[None],
                example.img_feats[None],
                torch.arange(peer.TEXT)[None],
            )[0][labels[row] != IGNORED]
            for row, example in enumerate(examples)
        ]
    )
    words, _ = ours(as_caption(packed(examples, labels)))
    torch.testing.assert_close(words, expected, rtol=0, atol=2e-5)

    wanted = torch.randn(words.shape, generator=torch.Generator().manual_seed(1))
    (words * wanted).sum().backward()
    (expected * wanted).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-3)
    ours.zero_grad()
    theirs.zero_grad()


def test_tags_and_regions_never_see_the_caption(ours: OscarForPreTraining, examples: list[Example]):
    batch = as_caption(packed(examples))
    is_caption = torch.cat([batch.token_type_ids == 0, torch.zeros(len(batch.features), dtype=torch.bool)])
    hidden = ours.bert.embed(batch).detach()

    def last_states(changed: Tensor) -> Tensor:
        ours.bert.embed = lambda _: changed  # type: ignore[method-assign]
        try:
            return ours.bert(batch)
        finally:
            del ours.bert.embed

    with torch.no_grad():
        before = last_states(hidden)
        after = last_states(torch.where(is_caption[:, None], hidden + 1, hidden))
    assert torch.equal(before[~is_caption], after[~is_caption])
    assert not torch.isclose(before[is_caption], after[is_caption]).all(1).any()


def test_probes_predict_what_mask_predicts_after_the_same_beginning(
    ours: OscarForPreTraining, theirs: BertForImageCaptioning, examples: list[Example]
):
    """All tokens of a caption at once, as self-critical training asks for them."""
    example = examples[2]
    words = example.input_ids[:8].tolist()
    ids = torch.cat([example.input_ids[:8], torch.full((7,), MASK), example.input_ids[peer.CAPTION :]])
    positions = torch.tensor([*range(8), *range(1, 8), *range(peer.CAPTION, peer.TEXT)])
    present = torch.cat([torch.ones(15), example.attention_mask.diagonal()[peer.CAPTION : peer.TEXT]]) > 0
    probes = torch.zeros(len(ids), dtype=torch.bool)
    probes[8:15] = True

    batch = packed([example])
    kind = torch.zeros_like(ids)
    kind[15:] = 1
    length = int(present.sum()) + len(example.img_feats)
    changed = Packed(
        **{
            **vars(batch),
            "input_ids": ids[present],
            "token_type_ids": kind[present],
            "position_ids": positions[present],
            "seen": torch.ones(1, length, dtype=torch.bool),
            "slots": torch.arange(length),
            "masked": torch.arange(8, 15),
        }
    )
    with torch.no_grad():
        scores, _ = ours(as_caption(changed, probes[present]))
        expected = torch.cat([peer.next_scores(theirs, example, [words[:n]], MASK) for n in range(1, 8)])
    torch.testing.assert_close(scores.log_softmax(-1), expected, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def decoder(ours: OscarForPreTraining) -> Decoder:
    return Decoder(ours, CLS, MASK, SEP)


@torch.no_grad()
def test_greedy_captions_are_the_releases(theirs: BertForImageCaptioning, decoder: Decoder, examples: list[Example]):
    captions = greedy(decoder, decoder.read(packed(examples, caption=False)))
    for caption, example in zip(captions, examples, strict=True):
        tokens, score = peer.greedy(theirs, example, CLS, SEP, MASK)
        assert caption.tokens == tokens
        assert caption.score == pytest.approx(score, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 4])
def test_captions_of_beam_search_are_the_releases(
    theirs: BertForImageCaptioning, decoder: Decoder, examples: list[Example], beams: int
):
    context = decoder.read(packed(examples, caption=False))
    captions = beam_search(decoder, context, [FREE] * len(examples), beams=beams, most=7)
    for caption, example in zip(captions, examples, strict=True):
        tokens, score = peer.beam_search(theirs, example, CLS, SEP, MASK, beams, most=8)
        assert caption.tokens == tokens
        assert caption.score == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_losses_are_the_releases(ours: OscarForPreTraining, examples: list[Example], label_smoothing: float):
    """Summed, where the release has a mean; and a row whose scores are no numbers is named."""
    examples, labels = masked(examples)
    batch = as_caption(packed(examples, labels))
    with torch.no_grad():
        words, _ = ours(batch)
    sums, finite = criterion(words, batch, label_smoothing)
    expected = peer.loss(words, batch.masked_ids, label_smoothing) * len(words)
    torch.testing.assert_close(sums[0], expected, rtol=1e-5, atol=1e-4)
    assert sums[1:].tolist() == [0, int((words.argmax(1) == batch.masked_ids).sum()), 0]
    assert finite.all()

    words[-1, 3] = torch.nan
    assert criterion(words, batch)[1].tolist() == [True, True, True, True, False]


def test_the_network_trains_on_masks_and_writes_captions(
    ours: OscarForPreTraining, decoder: Decoder, examples: list[Example]
):
    """In training its scores are those of the model with captioning's attention; else it returns greedy captions."""
    network = OscarForCaptioning(ours.config, cast(Tokenizer, decoder_ids(decoder)))
    network.load_state_dict(ours.state_dict())
    network.train()
    for module in network.modules():
        if isinstance(module, TripleDropout):
            module.p = 0.0
    changed, labels = masked(examples)
    batch = packed(changed, labels)
    torch.testing.assert_close(network(batch), ours(as_caption(batch))[0])
    assert not any(p.requires_grad for p in network.bert.pooler.parameters())

    network.eval()
    written = network(packed(examples, caption=False))
    best = greedy(decoder, decoder.read(packed(examples, caption=False)))
    assert [[token for token in row if token >= 0] for row in written.tolist()] == [caption.tokens for caption in best]


def decoder_ids(decoder: Decoder) -> SimpleNamespace:
    """The special tokens of a vocabulary without a tokenizer."""
    return SimpleNamespace(cls=decoder.first, mask=decoder.mask, sep=decoder.end)
