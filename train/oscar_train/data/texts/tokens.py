"""The WordPiece tokenizer: the one that lies with the initial weights, else bert-base-uncased's, which is shipped."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oscar_common.errors import UsageError, reason
from oscar_common.files import digest, replacing
from oscar_common.wordpiece import SHIPPED
from oscar_train.data.texts.ragged import Ragged, concatenated, ragged

FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CHUNK = 20_000  # texts tokenised at once; bounds the memory that the tokenizer's Python objects take


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A BERT tokenizer and the ids that a sequence is built with."""

    backend: Any  # transformers' BertTokenizerFast
    pad: int
    cls: int
    sep: int
    mask: int
    size: int

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes tokens."""
        ids = (self.pad, self.cls, self.sep, self.mask, self.size)
        return digest((self.backend.backend_tokenizer.to_str(), ids))

    @cached_property
    def continues(self) -> npt.NDArray[np.bool_]:
        """Which tokens belong to the word before (of BERT's those with ##), bool [size]."""
        is_continuation = np.zeros(self.size, bool)
        is_continuation[[number for token, number in self._vocabulary.items() if token.startswith("##")]] = True
        return is_continuation

    @cached_property
    def words(self) -> npt.NDArray[np.int32]:
        """The tokens that texts are made of: not the special ones, [unused7] or others in brackets; int32 [n]."""
        special = set(self.backend.all_special_tokens)
        numbers = [
            number
            for token, number in self._vocabulary.items()
            if token not in special and not (token.startswith("[") and token.endswith("]"))
        ]
        return np.sort(np.array(numbers, np.int32))

    @property
    def _vocabulary(self) -> dict[str, int]:
        """The tokens, without those that the library adds of itself."""
        vocabulary: dict[str, int] = self.backend.backend_tokenizer.get_vocab(with_added_tokens=False)
        return vocabulary

    def __call__(self, texts: Sequence[str], width: int) -> Ragged:
        """Tokenise texts; at most `width` tokens of each are kept.

        None of them is a special token: a text that spells one, "[MASK]", is a bracket, a word and a bracket.
        """
        core = self.backend.backend_tokenizer
        core.encode_special_tokens = True  # as text; said each time, since calls of the backend itself unset it
        chunks = (list(texts[i : i + CHUNK]) for i in range(0, len(texts), CHUNK))
        encoded = (core.encode_batch_fast(chunk, add_special_tokens=False) for chunk in chunks)
        return concatenated(ragged([e.ids[:width] for e in chunk]) for chunk in encoded)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, vocab.txt among them (Oscar's fine-tuning code reads that one)."""
        self.backend.save_pretrained(folder)
        vocabulary = sorted(self.backend.get_vocab().items(), key=lambda entry: entry[1])
        with replacing(folder / "vocab.txt") as file:
            file.write("".join(f"{token}\n" for token, _ in vocabulary).encode())


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder brings its own tokenizer."""
    return any((folder / name).is_file() for name in FILES[:2])


def load_tokenizer(folder: Path | None) -> Tokenizer:
    """Open the tokenizer of a model folder, or the shipped bert-base-uncased vocabulary if there is none.

    Raises:
        UsageError: its files cannot be read, or it lacks one of [PAD], [CLS], [SEP], [MASK].
    """
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]  # an alias since 5.0

    if folder is None or not has_tokenizer(folder):
        folder = SHIPPED

    try:
        backend = BertTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # the tokenizer's libraries raise bare Exception for files they cannot read
        raise UsageError(f"--init {folder}: its tokenizer cannot be read ({reason(error)}); repair vocab.txt") from None

    for name in ("is_local", "local_files_only", "name_or_path"):  # where it came from is no property of a tokenizer
        backend.init_kwargs.pop(name, None)

    backend.backend_tokenizer.no_truncation()
    backend.backend_tokenizer.no_padding()
    names = {"pad": backend.pad_token, "cls": backend.cls_token, "sep": backend.sep_token, "mask": backend.mask_token}
    # Without the tokens that the library adds of itself where a vocabulary lacks them
    vocabulary = backend.backend_tokenizer.get_vocab(with_added_tokens=False)
    if missing := [str(token) for token in names.values() if token not in vocabulary]:
        raise UsageError(f"--init {folder}: the vocabulary has no {', '.join(missing)}: it is not BERT's")

    return Tokenizer(
        backend=backend, size=max(vocabulary.values()) + 1, **{n: vocabulary[token] for n, token in names.items()}
    )
