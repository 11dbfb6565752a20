"""BERT's WordPiece: the vocabulary that ships, and a tokenizer of it that loads neither torch nor transformers."""

from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "vocab"  # bert-base-uncased


def wordpiece() -> Any:
    """Return the `tokenizers.Tokenizer` of bert-base-uncased; it splits as transformers does."""
    from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

    return BertWordPieceTokenizer(str(SHIPPED / "vocab.txt"), lowercase=True)
