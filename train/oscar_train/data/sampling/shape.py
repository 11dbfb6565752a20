"""The shape of the rows that a sample becomes in a batch."""

from dataclasses import dataclass

from oscar_train.batch import MAX_REGIONS, MAX_TOKENS


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a sample (a caption or a question of the corpus) takes in a batch.

    rows: rows of a sample, side by side in the batch. labels: how many of these have a label. tokens: the most text
    tokens of a row, [CLS] and each [SEP] included. regions: the most regions of a row.
    """

    rows: int = 1
    labels: int = 1
    tokens: int = MAX_TOKENS
    regions: int = MAX_REGIONS

    @property
    def text(self) -> int:
        """The most tokens of both texts of a row together: all but [CLS] and two [SEP]."""
        return self.tokens - 3


PAIR = Shape()  # of pre-training
