"""Stage 2: from shards to a pre-trained Oscar.

Public are the names in `__all__`; docs/python.md shows them in use.

    open_stream                 batches of triples from folders of shards, here or behind URLs
    load_checkpoint             a trained model and its tokenizer
    pack                        a batch without its padding, which is what the model takes
    load_tokenizer              a tokenizer alone
"""

from typing import TYPE_CHECKING

from oscar_common.lazy import lazy_names

__all__ = [
    "Batch",
    "OscarForPreTraining",
    "Packed",
    "Stream",
    "Tokenizer",
    "load_checkpoint",
    "load_tokenizer",
    "open_stream",
    "pack",
]

if TYPE_CHECKING:
    from oscar_train.export import load_checkpoint
    from oscar_train.model import OscarForPreTraining
    from oscar_train.packing import Packed, pack
    from oscar_train.stream import Batch, Stream, open_stream
    from oscar_train.texts.tokens import Tokenizer, load_tokenizer
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "oscar_train.export": ["load_checkpoint"],
            "oscar_train.model": ["OscarForPreTraining"],
            "oscar_train.packing": ["Packed", "pack"],
            "oscar_train.stream": ["Batch", "Stream", "open_stream"],
            "oscar_train.texts.tokens": ["Tokenizer", "load_tokenizer"],
        },
    )
