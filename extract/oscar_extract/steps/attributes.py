"""From kept regions to their attributes: the rules of the reference extractors.

A result is a pair [B, M, T]: attribute indices, and probabilities in descending order, of which 0 means "no attribute".
"""

import torch
from torch import Tensor

from oscar_extract.network.architecture import AttributeHead
from oscar_extract.steps.selection import Candidates, Kept

VINVL_THRESHOLD = 0.05  # POSTPROCESS_ATTRIBUTES_THRESHOLD
VINVL_MOST = 16  # MAX_NUM_ATTR_PER_OBJ


def describe_caffe(head: AttributeHead, candidates: Candidates, selected: Kept) -> tuple[Tensor, Tensor]:
    """Take the likeliest attribute, of probabilities that "none" has its share of (Caffe; MILVLG's readers)."""
    probabilities = _logits(head, candidates, selected, _likeliest(candidates, selected)).softmax(dim=-1)
    return _top(probabilities[..., :-1] if head.background else probabilities, 1)


def describe_lxmert(head: AttributeHead, candidates: Candidates, selected: Kept) -> tuple[Tensor, Tensor]:
    """Take the likeliest attribute, of probabilities without "none" (airsplay, transformers' `_predict_attrs`)."""
    logits = _logits(head, candidates, selected, _likeliest(candidates, selected))
    return _top((logits[..., :-1] if head.background else logits).softmax(dim=-1), 1)


def describe_vinvl(head: AttributeHead, candidates: Candidates, selected: Kept) -> tuple[Tensor, Tensor]:
    """Take up to 16 attributes of more than 0.05, given the class the region was kept for (VinVL's attribute head).

    VinVL pools the final boxes again. They are the proposals here, whose features are at hand.
    """
    probabilities = _logits(head, candidates, selected, selected.classes).softmax(dim=-1)[..., :-1]
    return _top(probabilities.masked_fill(probabilities <= VINVL_THRESHOLD, 0), VINVL_MOST)


def _likeliest(candidates: Candidates, selected: Kept) -> Tensor:
    """Return the class of the highest logit, the background among them, of every kept region: [B, M]."""
    return candidates.logits.argmax(dim=-1).gather(1, selected.index)


def _logits(head: AttributeHead, candidates: Candidates, selected: Kept, classes: Tensor) -> Tensor:
    images = torch.arange(len(selected.index), device=selected.index.device)[:, None]
    features = candidates.features[images, selected.index]
    logits: Tensor = head(features.flatten(0, 1), classes.flatten())
    return logits.view(*classes.shape, logits.shape[1])


def _top(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, indices = probabilities.topk(min(count, probabilities.shape[-1]), dim=-1)
    return indices, values
