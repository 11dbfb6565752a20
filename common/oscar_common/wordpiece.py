"""BERT's WordPiece: the vocabulary that ships, and a tokenizer of it that loads neither torch nor transformers."""

from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "vocab"  # bert-base-uncased


def wordpiece() -> Any:
    """Return the `tokenizers.Tokenizer` of bert-base-uncased; it splits as transformers does.

    Texts are plain: one that spells a special token, "[MASK]", is a bracket, a word and a bracket.
    """
    from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

    made = BertWordPieceTokenizer(str(SHIPPED / "vocab.txt"), lowercase=True)
    made._tokenizer.encode_special_tokens = True
    return made
