"""Token ids as text for people: word pieces joined, hyphens and apostrophes as they are written."""

import re
from collections.abc import Sequence

from oscar_train.data.texts.tokens import Tokenizer

_HYPHEN = re.compile(r"(?<=\w) - (?=\w)")
_APOSTROPHE = re.compile(r"(?<=\w) ' (?=(?:s|t|m|d|re|ve|ll)\b)")
_BEFORE = re.compile(r" (?=[.,;:!?])")
_NUMBER = re.compile(r"(?<=\d)([.,:]) (?=\d)")


def spell(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Return the text of token ids; special tokens are left out."""
    text: str = tokenizer.backend.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for pattern, instead in ((_HYPHEN, "-"), (_APOSTROPHE, "'"), (_BEFORE, ""), (_NUMBER, r"\1")):
        text = pattern.sub(instead, text)
    return text.strip()
