"""Which tokens see each other when a caption is written: microsoft/Oscar's attention for captioning.

A token of the caption sees the tokens of the caption up to itself, all tags and all regions. Tags and regions see each
other and never the caption (oscar/run_captioning.py, CaptionTensorizer). So what is computed of tags and regions stays
the same while the caption grows.
"""

from dataclasses import replace

import torch
from torch import Tensor

from oscar_train.model.packing import Packed

LONGEST = 62  # tokens of a caption, [CLS] and [SEP] included: each has a bit of an int64
CONTEXT = 1  # the bit of tags and regions


def as_caption(batch: Packed, probes: Tensor | None = None) -> Packed:
    """Return the same batch with the attention of captioning.

    The caption is the text of token type 0; its positions are below `LONGEST`.

    Args:
        batch: whose text is `[CLS] caption [SEP]`, then the tags.
        probes: bool [T], text tokens that no other token sees, each in the place of one of the caption's, which it
            does not see. They ask for a token of the caption whose later tokens are known.
    """
    of_caption = batch.token_type_ids == 0
    own_bits = torch.where(of_caption, 2 << batch.position_ids.where(of_caption, 0), CONTEXT)
    query = torch.where(of_caption, 2 * own_bits - 1, CONTEXT)  # its own bit and all below
    key = own_bits
    if probes is not None:
        query, key = torch.where(probes, own_bits - 1, query), torch.where(probes, 0, key)

    text, regions = torch.stack([query, key]), own_bits.new_full((2, len(batch.features)), CONTEXT)
    groups = own_bits.new_zeros(2, batch.seen.numel()).index_copy(1, batch.slots, torch.cat([text, regions], 1))
    return replace(batch, groups=groups.view(2, *batch.seen.shape))
