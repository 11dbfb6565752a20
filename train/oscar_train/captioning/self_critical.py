"""Self-critical training (Rennie et al. 2017, arXiv 1612.00563): captions that score better than the greedy one, in
CIDEr-D, become likelier, and others less likely.

As in microsoft/Oscar (oscar/utils/caption_evaluate.py, ScstRewardCriterion), several captions of an image are drawn,
and a caption's log-probability is the mean of its tokens'. Unlike there, words are those of the metric, captions are
drawn without dropout, and [SEP] counts as a word only where there is one, so that a caption that does not end loses.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from oscar_train.batch import IGNORED, Batch
from oscar_train.captioning.attention import as_caption
from oscar_train.captioning.decoder import Context, Decoder
from oscar_train.captioning.layout import CAPTION, TEXT
from oscar_train.captioning.metrics import DocumentFrequencies, cider_d, document_frequencies
from oscar_train.captioning.search import MOST_TOKENS, Caption, step_by_step
from oscar_train.captioning.words import split_words
from oscar_train.model.dropout import token_bits
from oscar_train.model.packing import Packed, pack

DRAWN = 5  # captions of each image
END = "[SEP]"  # as a word
PROBES = CAPTION // 2  # the place where probes begin; before them stand a caption's tokens

assert MOST_TOKENS < PROBES


def draw_captions(
    decoder: Decoder, context: Context, seeds: Tensor, drawn: int = DRAWN, most: int = MOST_TOKENS
) -> list[list[Caption]]:
    """Draw captions of each image token by token, each token by its probability.

    Args:
        seeds: int64 [B] in [0, 2^32): what is drawn for an image is a function of its seed and of the model.
    """
    bits = token_bits(seeds, drawn * most).view(len(seeds), drawn, most)
    uniform = (bits.double() + 2**31) / 2**32

    def choose(log_probabilities: Tensor, step: int) -> Tensor:
        cumulative = log_probabilities.exp().double().cumsum(-1)
        threshold = uniform[:, :, step, None] * cumulative[..., -1:]
        last = cumulative.shape[-1] - 1
        return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp(max=last)

    return step_by_step(decoder, context, choose, drawn, most)


def ended_words(caption: str, has_ended: bool = True) -> list[str]:
    """Return the words of a caption, and the one that stands for its end if it has one."""
    return [*split_words(caption), *[END] * has_ended]


def reference_frequencies(references: Sequence[Sequence[str]]) -> DocumentFrequencies:
    """Return the document frequencies of the captions of images, from which rewards are computed."""
    return document_frequencies([[ended_words(text) for text in texts] for texts in references])


def rewards(
    drawn: Sequence[Sequence[list[str]]],
    greedy: Sequence[list[str]],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies,
) -> tuple[list[list[float]], list[float]]:
    """Return the CIDEr-D of each drawn caption, and of the greedy caption, of each image.

    Args:
        drawn, greedy: the `ended_words` of captions.
        references: the captions of each image, as they are written.
    """
    of_drawn: list[list[float]] = []
    of_greedy: list[float] = []
    for captions, baseline, texts in zip(drawn, greedy, references, strict=True):
        words = [ended_words(text) for text in texts]
        *scores, last = cider_d([*captions, baseline], [words] * (len(captions) + 1), frequencies)
        of_drawn.append(scores)
        of_greedy.append(last)

    return of_drawn, of_greedy


def probing(batch: Batch, tokens: Sequence[Sequence[int]], decoder: Decoder, device: torch.device) -> Packed:
    """Return a batch that asks for each token of a caption after the tokens before it, all at once.

    In the caption's places stand [CLS] and the tokens, and from the 21st on a [MASK] for each token, which no other
    token sees. What is predicted is `masked_ids`, caption after caption.

    Args:
        batch: B images with their tags and regions, whatever the captions.
        tokens: those of B captions that were predicted, [SEP] among them: at most 19.
    """
    ids, present = batch.input_ids.clone(), batch.attention_mask.clone()
    labels = torch.full_like(ids, IGNORED)
    present[:, :CAPTION] = False

    for row, row_tokens in enumerate(tokens):
        count = len(row_tokens)
        ids[row, :count] = torch.tensor([decoder.first, *row_tokens[:-1]])
        ids[row, PROBES : PROBES + count] = decoder.mask
        labels[row, PROBES : PROBES + count] = torch.tensor(row_tokens)
        present[row, :count] = present[row, PROBES : PROBES + count] = True

    asked = {"input_ids": ids, "attention_mask": present, "mlm_labels": labels}
    packed = pack(replace(batch, **asked), device)
    place = packed.position_ids
    is_probe = (place >= PROBES) & (place < CAPTION)
    positions = torch.where(is_probe, place - PROBES + 1, place)

    return as_caption(replace(packed, position_ids=positions), is_probe)


def unpacked(packed: Packed) -> Batch:
    """Return a packed batch of captioning as rows again, on the CPU: 70 places of text, then the regions."""
    rows, length = packed.seen.shape
    row, place = (packed.slots // length).cpu(), (packed.slots % length).cpu()
    text = len(packed.input_ids)
    words, regions = row[:text].bincount(minlength=rows), row[text:].bincount(minlength=rows)
    in_text = row[:text], packed.position_ids.cpu()
    in_regions = row[text:], place[text:] - words[row[text:]]

    def filled(where: tuple[Tensor, Tensor], width: int, values: Tensor) -> Tensor:
        empty = torch.zeros(rows, width, *values.shape[1:], dtype=values.dtype)
        return empty.index_put(where, values.cpu())

    most = int(regions.max())
    ids = filled(in_text, TEXT, packed.input_ids)
    return Batch(
        input_ids=ids,
        token_type_ids=filled(in_text, TEXT, packed.token_type_ids),
        attention_mask=filled(in_text, TEXT, torch.ones(text, dtype=torch.bool)),
        mlm_labels=torch.full_like(ids, IGNORED),
        features=filled(in_regions, most, packed.features),
        z=filled(in_regions, most, packed.z),
        region_mask=torch.arange(most) < regions[:, None],
        match_labels=packed.match_labels.cpu(),
        dropout_seeds=packed.dropout_seeds.cpu(),
        triples=packed.match_labels.cpu(),
    )


def without_captions(batch: Batch) -> Batch:
    """Return the images of a batch with their tags alone."""
    present = batch.attention_mask.clone()
    present[:, :CAPTION] = False
    return replace(batch, attention_mask=present)


def repeated(batch: Batch, times: int) -> Batch:
    """Return each row of a batch so many times, one after the other."""
    return Batch(**{f.name: getattr(batch, f.name).repeat_interleave(times, 0) for f in fields(Batch)})
