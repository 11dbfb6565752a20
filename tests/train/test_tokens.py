"""Texts are plain: whatever they spell, tokens of control come from the trainer alone."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from small_shards import make_samples, write_folder
from tokenizers import Tokenizer as Core

from oscar_common.errors import UsageError
from oscar_common.sample import Text
from oscar_common.wordpiece import SHIPPED, wordpiece
from oscar_train.checkpoints.checkpoint import Checkpoint, agree
from oscar_train.data.corpus import Corpus, open_corpus
from oscar_train.data.sources import open_source
from oscar_train.data.texts.ragged import Ragged, ragged
from oscar_train.data.texts.tags import TagRule
from oscar_train.data.texts.tokens import Tokenizer

SPECIAL = ["[MASK]", "[SEP]", "[CLS]", "[PAD]", "[UNK]"]
CAPTION = "[MASK] [SEP] a [CLS]"
SPELLED = ["[", "mask", "]", "[", "sep", "]", "a", "[", "cl", "##s", "]"]
PIECES = [
    *SPECIAL,
    *("[mask]", "[Mask]", "[ MASK ]", "[MASK", "MASK]", "[[MASK]]", "[unused1]", "[UNUSED7]", "##s", "[", "]", "[]"),
    *("a man", "riding", "a wave", "Two dogs.", "5\"", "don't", "T-shirt", "#1", "a" * 120, "\t", "\u00a0", "\u3000"),
    *("caf\u00e9", "Z\u00fcrich", "na\u00efve", "\u732b", "\u306d\u3053", "\ud55c\uae00", "\u043a\u043e\u0442"),
    *("\U0001f408", "\u2013", "\u201cquoted\u201d", "\u2028", "\u200b", "\ufeff", "\x00", "\ufffd", "e\u0301"),
]  # fmt: skip


def texts(count: int) -> list[str]:
    """Texts of these pieces, with and without spaces between them; half of them without brackets."""
    draw = random.Random(1)
    plain = [piece for piece in PIECES if "[" not in piece and "]" not in piece]
    return [
        draw.choice(("", " ", " ")).join(draw.choices(PIECES if number % 2 else plain, k=draw.randint(1, 8)))
        for number in range(count)
    ]


def test_texts_are_split_as_the_slow_tokenizer_splits_plain_text(tokenizer: Tokenizer):
    from transformers import BertTokenizerLegacy  # pure Python; its steps know no special tokens, only the whole does

    legacy = BertTokenizerLegacy(str(SHIPPED / "vocab.txt"))
    written = texts(4000)
    found = tokenizer(written, 10_000)
    special = {tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask}
    for row, text in enumerate(written):
        ids = found[row].tolist()
        words = legacy.basic_tokenizer.tokenize(text)
        pieces = [piece for word in words for piece in legacy.wordpiece_tokenizer.tokenize(word)]
        assert ids == legacy.convert_tokens_to_ids(pieces), text
        assert not special & set(ids), text
    lengths = [len(e.ids) for e in wordpiece().encode_batch(written, add_special_tokens=False)]
    assert lengths == found.lengths.tolist()


def test_texts_without_special_tokens_keep_their_ids(tokenizer: Tokenizer):
    written = [text for text in texts(4000) if not any(token in text for token in SPECIAL)]
    assert len(written) > 2000
    before = Core.from_str(tokenizer.backend.backend_tokenizer.to_str())  # takes special tokens for such
    ids = [e.ids for e in before.encode_batch(written, add_special_tokens=False)]
    found = tokenizer(written, 10_000)
    assert ids == [found[row].tolist() for row in range(len(written))]


def test_a_call_of_the_library_changes_nothing(tokenizer: Tokenizer):
    tokenizer.backend(CAPTION)  # which lets special tokens in again
    assert tokenizer([CAPTION], 50)[0].tolist() == [1031, 7308, 1033, 1031, 19802, 1033, 1037, 1031, 18856, 2015, 1033]


def write(folder: Path, text: str) -> Path:
    """Shards of one image, whose caption, question, answer and tag have a text in them."""
    first = make_samples(1)[0]
    qa = Text(kind="qa", source="q", id="1", question=f"Is it {text}?", answer=text)
    regions = replace(first.regions, tags=[text] * len(first.regions.tags))
    texts = [Text(kind="caption", source="c", id="0", text=text), qa]
    return write_folder(folder, [replace(first, regions=regions, texts=texts)])


def load(folder: Path, tokenizer: Tokenizer, **rule: object) -> Corpus:
    return open_corpus([open_source(str(folder), False)], tokenizer, folder / "cache", tags=TagRule(**rule))


def test_captions_questions_answers_and_tags_hold_no_special_token(tokenizer: Tokenizer, tmp_path: Path):
    corpus = load(write(tmp_path, CAPTION), tokenizer, budget=1)
    names = tokenizer.backend.convert_ids_to_tokens
    assert names(corpus.first[0].tolist()) == SPELLED
    assert names(corpus.first[1].tolist()) == ["is", "it", *SPELLED, "?"]
    assert [names(corpus.second[row].tolist()) for row in corpus.second_row.tolist()] == [SPELLED, SPELLED]


def test_tags_that_spell_special_tokens_are_those_of_the_vocabulary(tokenizer: Tokenizer, tmp_path: Path):
    corpus = load(write(tmp_path, "[SEP]"), tokenizer, vocabulary=("[sep]",), budget=1)
    assert tokenizer.backend.convert_ids_to_tokens(corpus.second[0].tolist()) == ["[", "sep", "]"]


@pytest.mark.parametrize(("text", "differs"), [("a man", False), (CAPTION, True)])
def test_ids_from_an_older_version_are_made_again_and_its_run_is_refused_only_if_they_differ(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, differs: bool
):
    def as_before(self: Tokenizer, given: Sequence[str], width: int) -> Ragged:
        core = Core.from_str(self.backend.backend_tokenizer.to_str())
        return ragged([e.ids[:width] for e in core.encode_batch(list(given), add_special_tokens=False)])

    folder = write(tmp_path, text)
    with monkeypatch.context() as older:
        older.setattr("oscar_train.data.corpus.FORMAT", 2)
        older.setattr(Tokenizer, "__call__", as_before)
        was = load(folder, tokenizer)
    assert (tokenizer.mask in was.first[0]) == differs
    now = load(folder, tokenizer)
    assert tokenizer.mask not in now.first[0]
    begun = Checkpoint(folder=tmp_path, step=3, run={"corpus": was.fingerprint}, ranks=1, threads=1, guard={}, about={})
    if not differs:
        agree(begun, {"corpus": now.fingerprint})
        return
    with pytest.raises(UsageError, match=r"an earlier version took texts that spell \[MASK\]"):
        agree(begun, {"corpus": now.fingerprint})
