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
    from oscar_train.batch import Batch
    from oscar_train.checkpoints.export import load_checkpoint
    from oscar_train.data.stream import Stream, open_stream
    from oscar_train.data.texts.tokens import Tokenizer, load_tokenizer
    from oscar_train.model.oscar import OscarForPreTraining
    from oscar_train.model.packing import Packed, pack
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "oscar_train.batch": ["Batch"],
            "oscar_train.checkpoints.export": ["load_checkpoint"],
            "oscar_train.data.stream": ["Stream", "open_stream"],
            "oscar_train.data.texts.tokens": ["Tokenizer", "load_tokenizer"],
            "oscar_train.model.oscar": ["OscarForPreTraining"],
            "oscar_train.model.packing": ["Packed", "pack"],
        },
    )
