"""A batch, and the sizes it is made of: what the stream gives and the model takes."""

from dataclasses import dataclass, fields

from torch import Tensor

MAX_TEXT = 32  # tokens of w and q together: 35 less [CLS] and two [SEP]
MAX_W = MAX_TEXT + 1  # `[CLS] w [SEP]`, a text without tags, has room for one more, as in the released code
MAX_TOKENS = MAX_TEXT + 3
IGNORED = -100  # label of a token that is not to be predicted; what torch's cross entropy leaves out
MAX_REGIONS = 50  # the first ones: those the detector is surest of
BOX = 6  # numbers in z: x1/W, y1/H, x2/W, y2/H, w/W, h/H


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B triples. Its memory is used again once the next batch is asked for: copy what is to be kept.

    input_ids, token_type_ids, mlm_labels (-100: not to be predicted): int64 [B, 35]. attention_mask: bool [B, 35].
    features: float16 [B, 50, P]. z: float32 [B, 50, 6]. region_mask: bool [B, 50]. match_labels: int64 [B], of the
    objective's classes. dropout_seeds: int64 [B] in [0, 2^32). triples: int64 [B], their numbers in the corpus.

    Tasks other than pre-training may have other lengths, several rows for a triple, and labels of their own.

    A triple whose image was skipped is in no loss: it has no regions and no text but [CLS], and its labels are -100.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    mlm_labels: Tensor
    features: Tensor
    z: Tensor
    region_mask: Tensor
    match_labels: Tensor
    dropout_seeds: Tensor
    triples: Tensor

    def part(self, begin: int, end: int) -> "Batch":
        """Return some rows; they are the same memory."""
        return Batch(**{f.name: getattr(self, f.name)[begin:end] for f in fields(self)})
