"""Batches of random numbers, for models whose scores are compared."""

from dataclasses import fields

import torch
from torch import Tensor

from oscar_train.batch import IGNORED, Batch

FEATURES, TOKENS, REGIONS = 18, 35, 50
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{n}" for n in range(395))]


def random_batch(classes: int, rows: int = 6) -> Batch:
    """Texts and regions of all lengths: the first row is full, the second as short as can be."""
    draw = torch.Generator().manual_seed(3)

    def numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=draw)

    words, regions = numbers(TOKENS, rows) + 1, numbers(REGIONS, rows) + 1
    words[0], regions[0], words[1], regions[1] = TOKENS, REGIONS, 3, 1
    seen = torch.arange(TOKENS) < words[:, None]
    chosen = seen & (torch.rand(rows, TOKENS, generator=draw) < 0.2)
    chosen[:, 1] = seen[:, 1]
    batch = {
        "input_ids": numbers(len(VOCABULARY), rows, TOKENS) * seen,
        "token_type_ids": numbers(2, rows, TOKENS) * seen,
        "attention_mask": seen,
        "mlm_labels": numbers(len(VOCABULARY), rows, TOKENS).where(chosen, torch.tensor(IGNORED)),
        "features": torch.randn(rows, REGIONS, FEATURES, generator=draw).half(),
        "z": torch.rand(rows, REGIONS, 6, generator=draw),
        "region_mask": torch.arange(REGIONS) < regions[:, None],
        "match_labels": torch.arange(rows) % classes,
    }
    return Batch(**{f.name: batch.get(f.name, torch.zeros(rows, dtype=torch.int64)) for f in fields(Batch)})
