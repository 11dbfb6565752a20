"""Searches against trying out every caption, with a vocabulary of 12 tokens and captions of at most 4."""

from itertools import count

import pytest
import torch
from peers.captioning import BertForImageCaptioning, Example, Sizes, next_scores, tensorise
from transformers import BertConfig

from oscar_train.batch import Batch
from oscar_train.captioning.constraints import FREE, Phrase, build_machine
from oscar_train.captioning.decoder import Context, Decoder
from oscar_train.captioning.search import beam_search, greedy, step_by_step
from oscar_train.model.oscar import OscarForPreTraining, oscar_config
from oscar_train.model.packing import pack

PAD, CLS, SEP, MASK = range(4)
WORDS, MOST, ALL = 12, 4, 12**4
FEATURES, POSITION, IMAGES = 6, 6, 3
SHAPE = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

# Two words; a word of two tokens or another word; three constraints, one of which begins like another ends
CONSTRAINTS = [
    [[(5,)], [(9,)]],
    [[(6, 7), (8,)]],
    [[(4, 5)], [(5, 6)], [(10,)]],
    [[(6, 6, 7)], [(6,)]],
]

Captions = dict[tuple[int, ...], float]


@pytest.fixture(scope="module", params=[(0.4, 9), (0.6, 6)], ids=["long captions", "short captions"])
def theirs(request: pytest.FixtureRequest) -> BertForImageCaptioning:
    sizes = Sizes(**SHAPE, intermediate_size=32, img_feature_dim=FEATURES + POSITION, max_position_embeddings=80)
    model = BertForImageCaptioning(sizes)
    draw = torch.Generator().manual_seed(request.param[1])
    for name, parameter in model.named_parameters():
        one = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        parameter.data = one + request.param[0] * torch.randn(parameter.shape, generator=draw)
    model.cls.predictions.bias.data[:] = 0
    return model


@pytest.fixture(scope="module")
def images() -> list[Example]:
    draw = torch.Generator().manual_seed(2)
    return [
        tensorise([], [4, 5, 6][:n], torch.randn(2 + n, FEATURES + POSITION, generator=draw), CLS, SEP)
        for n in range(IMAGES)
    ]


@pytest.fixture(scope="module")
def decoder(theirs: BertForImageCaptioning) -> Decoder:
    bert = BertConfig(**SHAPE, intermediate_size=32, max_position_embeddings=80)
    model = OscarForPreTraining(oscar_config(bert, FEATURES, POSITION)).eval()
    model.load_state_dict(theirs.state_dict(), strict=False)
    return Decoder(model, CLS, MASK, SEP)


@pytest.fixture(scope="module")
def context(decoder: Decoder, images: list[Example]) -> Context:
    text = torch.stack([image.input_ids for image in images])
    img_feats = torch.nn.utils.rnn.pad_sequence([image.img_feats for image in images], batch_first=True)
    counts = torch.tensor([len(image.img_feats) for image in images])
    tags = torch.stack([image.token_type_ids for image in images])
    zeros = torch.zeros(IMAGES, dtype=torch.int64)
    batch = Batch(
        input_ids=text,
        token_type_ids=tags,
        attention_mask=tags > 0,
        mlm_labels=torch.full_like(text, -100),
        features=img_feats[..., :FEATURES],
        z=img_feats[..., FEATURES:],
        region_mask=torch.arange(img_feats.shape[1]) < counts[:, None],
        match_labels=zeros,
        dropout_seeds=zeros,
        triples=zeros,
    )
    with torch.no_grad():
        return decoder.read(pack(batch, torch.device("cpu")))


@pytest.fixture(scope="module")
def every_caption(theirs: BertForImageCaptioning, images: list[Example]) -> list[Captions]:
    """The best score of every caption of each image: one that is cut may be so in twelve ways."""
    found: list[Captions] = []
    with torch.no_grad():
        for image in images:
            captions: Captions = {}
            beginnings = [((), 0.0)]
            for length in range(1, MOST + 1):
                longer = []
                rows = next_scores(theirs, image, [[CLS, *words] for words, _ in beginnings], MASK).tolist()
                for (words, total), scores in zip(beginnings, rows, strict=True):
                    for token, score in enumerate(scores):
                        if token == SEP or length == MOST:
                            captions[words] = max(captions.get(words, -1e9), (total + score) / length)
                        else:
                            longer.append(((*words, token), total + score))
                beginnings = longer
            found.append(captions)
    return found


def mentions(caption: tuple[int, ...], phrases: list[Phrase]) -> bool:
    return any(caption[begin : begin + len(phrase)] == phrase for phrase in phrases for begin in range(len(caption)))


@torch.no_grad()
def test_a_beam_of_all_beginnings_finds_the_best_caption(
    decoder: Decoder, context: Context, every_caption: list[Captions]
):
    for caption, captions in zip(beam_search(decoder, context, beams=ALL, most=MOST), every_caption, strict=True):
        best = max(captions, key=captions.__getitem__)
        assert tuple(caption.tokens) == best
        assert caption.score == pytest.approx(captions[best], abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("constraints", "required"), [*((some, 2) for some in CONSTRAINTS), (CONSTRAINTS[2], 1)])
def test_constrained_beams_find_the_best_caption_that_satisfies_the_constraints(
    decoder: Decoder, context: Context, every_caption: list[Captions], constraints: list[list[Phrase]], required: int
):
    machines = [build_machine(constraints, required)] * IMAGES
    for caption, captions in zip(
        beam_search(decoder, context, machines, beams=ALL, most=MOST), every_caption, strict=True
    ):
        satisfied = {words: sum(mentions(words, phrases) for phrases in constraints) for words in captions}
        least = min(required, len(constraints), max(satisfied.values()))
        best = max((words for words in captions if satisfied[words] >= least), key=captions.__getitem__)
        assert tuple(caption.tokens) == best
        assert caption.score == pytest.approx(captions[best], abs=1e-5)
        assert caption.satisfied == satisfied[best]


@torch.no_grad()
def test_each_image_has_its_own_constraints_and_few_beams_satisfy_them(decoder: Decoder, context: Context):
    words = [[[(5,)], [(9,)]], [], [[(6, 7)]]]
    machines = [build_machine(constraints) if constraints else FREE for constraints in words]
    captions = beam_search(decoder, context, machines, beams=2, most=9)
    assert [caption.satisfied for caption in captions] == [2, 0, 1]
    for caption, constraints in zip(captions, words, strict=True):
        assert all(mentions(tuple(caption.tokens), phrases) for phrases in constraints)
    alone = beam_search(decoder, context, beams=2, most=9)
    assert captions[1].tokens == alone[1].tokens


@torch.no_grad()
def test_what_cannot_be_satisfied_is_satisfied_as_far_as_it_can(decoder: Decoder, context: Context):
    machine = build_machine([[(5,)], [(6, 7, 8, 9)]])
    captions = beam_search(decoder, context, [machine] * IMAGES, beams=3, most=MOST)
    assert [caption.satisfied for caption in captions] == [1] * IMAGES


def test_a_machine_counts_the_constraints_that_a_text_satisfies():
    """Beside looking for the phrases in the text, on every text of five tokens."""
    for constraints in CONSTRAINTS:
        machine = build_machine(constraints)
        for number in range(6**5):
            text = tuple(4 + number // 6**place % 6 for place in range(5))
            state = 0
            for token in text:
                state = machine.next(state, token)
            assert machine.satisfied[state] == sum(mentions(text, phrases) for phrases in constraints), (text, state)


@torch.no_grad()
def test_one_drawn_token_at_a_time_scores_as_it_was_drawn(decoder: Decoder, context: Context):
    """Two captions of each image, of tokens that are given; a greedy one among them is the greedy one."""
    best = greedy(decoder, context, MOST)
    steps = count()

    def choose(scores: torch.Tensor, step: int) -> torch.Tensor:
        assert step == next(steps)
        return torch.stack([scores[:, 0].argmax(-1), torch.full((IMAGES,), [5, 6, SEP, 7][step])], 1)

    captions = step_by_step(decoder, context, choose, 2, MOST)
    assert [pair[0].tokens for pair in captions] == [caption.tokens for caption in best]
    assert [pair[0].score for pair in captions] == pytest.approx([caption.score for caption in best], abs=1e-5)
    assert [pair[1].tokens for pair in captions] == [[5, 6]] * IMAGES
