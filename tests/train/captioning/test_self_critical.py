"""Self-critical training: what is drawn, what it is worth, and which way it pushes."""

from collections import Counter

import pytest
import torch
from transformers import BertConfig

from oscar_train.batch import Batch
from oscar_train.captioning.decoder import Decoder
from oscar_train.captioning.layout import TEXT
from oscar_train.captioning.metrics import cider_d, document_frequencies
from oscar_train.captioning.search import greedy
from oscar_train.captioning.self_critical import (
    END,
    draw_captions,
    ended_words,
    probing,
    reference_frequencies,
    repeated,
    rewards,
    unpacked,
    without_captions,
)
from oscar_train.model.oscar import OscarForPreTraining, oscar_config
from oscar_train.model.packing import pack

PAD, CLS, SEP, MASK = range(4)
FEATURES, POSITION, IMAGES, WORDS, MOST = 6, 6, 3, 9, 6
CPU = torch.device("cpu")


@pytest.fixture
def model() -> OscarForPreTraining:
    torch.manual_seed(3)
    bert = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=80,
        initializer_range=0.3,
    )
    return OscarForPreTraining(oscar_config(bert, FEATURES, POSITION)).eval()


@pytest.fixture
def batch() -> Batch:
    """Images with two tags and some regions; the caption's places are empty."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.zeros(IMAGES, TEXT, dtype=torch.int64)
    ids[:, 40:43] = torch.tensor([5, 6, SEP])
    zeros = torch.zeros(IMAGES, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        token_type_ids=(ids > 0).long(),
        attention_mask=ids > 0,
        mlm_labels=torch.full_like(ids, -100),
        features=torch.randn(IMAGES, 4, FEATURES, generator=draw),
        z=torch.rand(IMAGES, 4, POSITION, generator=draw),
        region_mask=torch.arange(4) < torch.tensor([4, 1, 2])[:, None],
        match_labels=zeros - 100,
        dropout_seeds=torch.tensor([7, 2**31 + 5, 99]),
        triples=zeros,
    )


@torch.no_grad()
def test_captions_are_drawn_by_their_probabilities_and_by_nothing_else(model: OscarForPreTraining, batch: Batch):
    """The first tokens of 1,500 captions beside the model's own shares; the same seed draws the same."""
    decoder = Decoder(model, CLS, MASK, SEP)
    context = decoder.read(pack(without_captions(batch), CPU))
    captions = draw_captions(decoder, context, batch.dropout_seeds, drawn=1500, most=MOST)
    assert captions == draw_captions(decoder, context, batch.dropout_seeds, drawn=1500, most=MOST)
    assert captions != draw_captions(decoder, context, batch.dropout_seeds + 1, drawn=1500, most=MOST)

    shares, _ = decoder.step(context, decoder.begin(context), torch.full((IMAGES, 1), CLS))
    for image, own in enumerate(captions):
        first = Counter([*caption.tokens, caption.last][0] for caption in own)
        expected = shares[image, 0].exp()
        for token in range(WORDS):
            assert first[token] / 1500 == pytest.approx(float(expected[token]), abs=0.05)


@torch.no_grad()
def test_all_tokens_at_once_are_as_likely_as_one_after_the_other(model: OscarForPreTraining, batch: Batch):
    decoder = Decoder(model, CLS, MASK, SEP)
    context = decoder.read(pack(without_captions(batch), CPU))
    captions = [image[0] for image in draw_captions(decoder, context, batch.dropout_seeds, 1, MOST)]
    predicted = [[*caption.tokens, caption.last] for caption in captions]

    packed = probing(batch, predicted, decoder, CPU)
    scores, _ = model(packed)
    tokens = scores.log_softmax(-1).gather(1, packed.masked_ids[:, None])[:, 0]
    means = [part.mean() for part in tokens.split([len(tokens) for tokens in predicted])]
    assert [float(mean) for mean in means] == pytest.approx([caption.score for caption in captions], abs=1e-5)


def test_a_step_makes_better_captions_likelier_than_worse_ones(model: OscarForPreTraining, batch: Batch):
    """Two captions of each image: token 5 alone is worth 1 more than the baseline, token 6 alone 1 less."""
    decoder = Decoder(model, CLS, MASK, SEP)
    wanted, worth = [[5, SEP], [6, SEP]] * IMAGES, torch.tensor([1.0, -1.0] * IMAGES)

    def means() -> torch.Tensor:
        packed = probing(repeated(batch, 2), wanted, decoder, CPU)
        scores, _ = model(packed)
        return scores.log_softmax(-1).gather(1, packed.masked_ids[:, None]).view(-1, 2).mean(1)

    before = means()
    (-(before * worth).mean()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
        change = means() - before
    assert (change[::2] > change[1::2]).all()
    assert float((change * worth).mean()) > 0


def test_a_caption_is_worth_its_cider_with_its_end_as_a_word():
    references = [["a dog runs", "a brown dog"], ["two cats", "cats on a mat"], ["a red bus"]]
    frequencies = reference_frequencies(references)
    words = [[[*text.split(), END] for text in texts] for texts in references]
    assert frequencies == document_frequencies(words)

    drawn = [[ended_words("A dog runs."), ended_words("a cat", has_ended=False)]] * 3
    baseline = [ended_words("a dog"), ended_words("cats"), ended_words("a bus")]
    of_drawn, of_greedy = rewards(drawn, baseline, references, frequencies)
    for image in range(3):
        scores = [
            cider_d([caption] * 3, words, frequencies)[image]
            for caption in (["a", "dog", "runs", END], ["a", "cat"], baseline[image])
        ]
        assert [*of_drawn[image], of_greedy[image]] == pytest.approx(scores)


def test_a_packed_batch_becomes_rows_again(batch: Batch):
    again = unpacked(pack(batch, CPU))
    for name in ("input_ids", "token_type_ids", "attention_mask", "region_mask", "dropout_seeds"):
        assert torch.equal(getattr(again, name), getattr(batch, name)), name
    assert torch.equal(again.features, batch.features * batch.region_mask[..., None])
    assert torch.equal(again.z, batch.z * batch.region_mask[..., None])


@torch.no_grad()
def test_a_greedy_caption_has_no_randomness(model: OscarForPreTraining, batch: Batch):
    decoder = Decoder(model, CLS, MASK, SEP)
    context = decoder.read(pack(without_captions(batch), CPU))
    assert greedy(decoder, context, MOST) == greedy(decoder, context, MOST)
