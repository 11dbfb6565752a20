"""A batch without its padding: what of it the model computes on, and where each token belongs.

Rows have 44 tokens of at most 85 or so. Which are there is looked up here, on the host: a GPU that were asked would let
the host wait for the answer.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from oscar_train.batch import IGNORED, Batch

ALIGNMENT = 16  # bytes, of what a GPU reads


@dataclass(frozen=True, kw_only=True)
class Packed:
    """B triples as N = T + R tokens: the T text tokens of all rows, row after row, then their R regions.

    input_ids, token_type_ids, position_ids: int64 [T]. features: float16 [R, P]. z: float32 [R, 6].
    match_labels, dropout_seeds: int64 [B], as in `Batch`. first: int64 [B], which tokens are [CLS].
    masked, masked_ids: int64 [M], which tokens are to be predicted, and what they were.

    Attention needs rows again, [B, L], the text of each before its regions; L is the longest one's length.
    seen: bool [B, L], where there is a token. slots: int64 [N], where each token is in the rows, flat.
    groups: int64 [2, B, L], sets of bits, those of queries and those of keys: a token sees itself, and those whose key
    has a bit in common with its query. [2, B, 0] where every token sees every other.

    counts: float32 [3], the masked tokens M, the triples that are not skipped, and N.

    filler: how many of T, R and M are filler (see `Grid`), which `counts` leaves out. Filler tokens stand in rows of
    their own after the B rows of triples, so that `seen` and `dropout_seeds` are longer than B by these rows.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    features: Tensor
    z: Tensor
    match_labels: Tensor
    dropout_seeds: Tensor
    first: Tensor
    masked: Tensor
    masked_ids: Tensor
    seen: Tensor
    slots: Tensor
    groups: Tensor
    counts: Tensor
    filler: tuple[int, int, int] = (0, 0, 0)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are tensors, by their names."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The multiples that T and R (tokens), and M (masked) are filled up to, so that batches have few shapes.

    A shape that came before can be replayed (`graphs.py`).
    """

    tokens: int
    masked: int


def grid_for(triples: int) -> Grid:
    """Return the grid for a batch: wide enough for a dozen of shapes, with some 2 % of filler."""
    return Grid(tokens=64 * max(1, round(triples / 48)), masked=64 * max(1, round(triples / 128)))


def pack(batch: Batch, device: torch.device, grid: Grid | None = None) -> Packed:
    """Return a batch without padding, on a device; copies from pinned memory may still be under way.

    Args:
        batch: with padding.
        device: where the result is.
        grid: what it is filled up to; None adds no filler.
    """
    text, regions = batch.attention_mask, batch.region_mask
    # Chosen by number: torch takes 6 ms for each choice by a mask, which a GPU would be waiting for
    of_text, of_regions = _numbers(text), _numbers(regions)
    is_present = torch.cat([text, regions], 1)
    lengths, place = is_present.sum(1), is_present.cumsum(1) - 1

    longest = is_present.shape[1] if grid else int(lengths.max())
    rows = torch.arange(longest) < lengths[:, None]
    slots = place + torch.arange(len(rows))[:, None] * rows.shape[1]
    width = text.shape[1]
    slots_of_text = _chosen(slots[:, :width], of_text)
    slots_of_regions = _chosen(slots[:, width:], of_regions)

    words, labels = text.sum(1), _chosen(batch.mlm_labels, of_text)
    masked = _numbers(labels != IGNORED)
    right = (batch.match_labels != IGNORED).sum()
    small = {
        "input_ids": _chosen(batch.input_ids, of_text),
        "token_type_ids": _chosen(batch.token_type_ids, of_text),
        "position_ids": of_text % width,
        "z": batch.z.flatten(0, 1).index_select(0, of_regions),
        "match_labels": batch.match_labels,
        "dropout_seeds": batch.dropout_seeds,
        "first": words.cumsum(0) - words,
        "masked": masked,
        "masked_ids": labels.index_select(0, masked),
        "seen": rows,
        "slots": torch.cat([slots_of_text, slots_of_regions]),
        "groups": torch.zeros(2, len(text), 0, dtype=torch.int64),
        "counts": torch.tensor([len(masked), int(right), int(lengths.sum())], dtype=torch.float32),
    }

    filler = (0, 0, 0)
    if grid:
        filler = (-len(of_text) % grid.tokens, -len(of_regions) % grid.tokens, -len(masked) % grid.masked)
        small |= _with_filler(small, filler, grid, slots_of_text, slots_of_regions)
        of_regions = _filled(of_regions, filler[1])

    # A gather of features is better done there: here it would copy them once more
    features = _copied(batch.features, device).flatten(0, 1)
    features = features.index_select(0, _copied(of_regions, device))
    return Packed(features=features, filler=filler, **copied_together(small, device))


def _with_filler(
    small: dict[str, Tensor], filler: tuple[int, int, int], grid: Grid, slots_of_text: Tensor, slots_of_regions: Tensor
) -> dict[str, Tensor]:
    """Return those of the tensors that filler makes longer.

    No loss reaches a filler token, and no token of a triple sees one, so its gradient is 0.
    """
    texts, regions, masked = filler
    triples, length = small["seen"].shape

    # Always as many rows, for the shapes' sake
    rows = -(-2 * grid.tokens // length)
    places = torch.arange(rows * length).view(rows, length)
    slots = triples * length + places.flatten()[: texts + regions]

    return {
        "input_ids": _filled(small["input_ids"], texts),
        "token_type_ids": _filled(small["token_type_ids"], texts),
        "position_ids": _filled(small["position_ids"], texts),
        "z": _filled(small["z"], regions),
        "masked": _filled(small["masked"], masked),
        "masked_ids": _filled(small["masked_ids"], masked, IGNORED),
        "dropout_seeds": _filled(small["dropout_seeds"], rows),
        "seen": torch.cat([small["seen"], places < texts + regions]),
        "slots": torch.cat([slots_of_text, slots[:texts], slots_of_regions, slots[texts:]]),
    }


def _filled(tensor: Tensor, count: int, value: int = 0) -> Tensor:
    """Return a tensor with `count` rows more, all of one value."""
    return torch.cat([tensor, tensor.new_full((count, *tensor.shape[1:]), value)])


def _numbers(mask: Tensor) -> Tensor:
    """Return where a mask is true, int64, counted row after row."""
    return mask.flatten().nonzero()[:, 0]


def _chosen(table: Tensor, numbers: Tensor) -> Tensor:
    """Return those of a table's numbers [B, L] that are counted in `numbers`, row after row."""
    return table.flatten().index_select(0, numbers)


def copied_together(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return small tensors on a device. To a GPU they go as one buffer: each copy of its own would cost a call."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    buffer = torch.empty(sum(map(_room, tensors.values())), dtype=torch.uint8, pin_memory=True)
    for part, tensor in zip(_parts(buffer, tensors), tensors.values(), strict=True):
        part.copy_(tensor)

    on_device = buffer.to(device, non_blocking=True)
    return dict(zip(tensors, _parts(on_device, tensors), strict=True))


def _parts(buffer: Tensor, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Return the parts of a buffer, uint8, that are for tensors, with their types and shapes."""
    begins = accumulate(map(_room, tensors.values()), initial=0)
    return [
        buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for begin, tensor in zip(begins, tensors.values(), strict=False)
    ]


def _room(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes in a buffer; it begins at a multiple of 16."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without a wait: that takes pinned memory. It may be there already."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
