"""What microsoft/Oscar does for captioning (run_captioning.py, modeling_bert.py, modeling_utils.py), from its facts.

Its model is `BertForImageCaptioning`; it decodes without any cache here, one image after the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peers.bert_img import ImageBert, Predictions, Sizes

TEXT, CAPTION = 70, 40  # --max_seq_length, --max_seq_a_length
MOST = 20  # --max_gen_length


class Heads(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.predictions = Predictions(sizes)


class BertForImageCaptioning(nn.Module):
    """Scores of the vocabulary at all places of the text; without dropout."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.bert = ImageBert(sizes)
        self.cls = Heads(sizes)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor, img_feats: Tensor, positions: Tensor
    ) -> Tensor:
        hidden = self.bert(input_ids, token_type_ids, attention_mask, img_feats, positions)
        return self.cls.predictions(hidden[:, : input_ids.shape[1]])


@dataclass(frozen=True)
class Example:
    """One image with one caption, as CaptionTensorizer lays them out: text of 70 places, then the regions."""

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    img_feats: Tensor


def tensorise(caption: list[int], labels: list[int], img_feats: Tensor, cls: int, sep: int) -> Example:
    """Lay out token ids: [CLS] caption [SEP] in the first 40 places, labels [SEP] from the 41st on."""
    text = torch.zeros(TEXT, dtype=torch.int64)
    kind = torch.zeros(TEXT, dtype=torch.int64)
    first = [cls, *caption[: CAPTION - 2], sep]
    second = [*labels[: TEXT - CAPTION - 1], sep]
    text[: len(first)] = torch.tensor(first)
    text[CAPTION : CAPTION + len(second)] = torch.tensor(second)
    kind[CAPTION : CAPTION + len(second)] = 1

    length = TEXT + len(img_feats)
    mask = torch.zeros(length, length)
    context = [*range(CAPTION, CAPTION + len(second)), *range(TEXT, length)]
    for query in range(len(first)):
        for key in [*range(query + 1), *context]:
            mask[query, key] = 1
    for query in context:
        for key in context:
            mask[query, key] = 1
    return Example(text, kind, mask, img_feats)


def loss(scores: Tensor, target: Tensor, label_smoothing: float = 0.0, drop_worst_ratio: float = 0.0) -> Tensor:
    """The mean Kullback-Leibler divergence from smoothed labels, of all masked tokens but the worst ones."""
    classes = scores.shape[1]
    losses = []
    for row, label in zip(scores, target, strict=True):
        wanted = torch.full((classes,), label_smoothing / (classes - 1))
        wanted[label] = 1 - label_smoothing
        entropy = torch.special.entr(wanted).sum()
        losses.append(-(wanted * row.log_softmax(0)).sum() - entropy)
    kept = sorted(losses, key=float)[: int(len(losses) * (1 - drop_worst_ratio))]
    return torch.stack(kept).mean()


def next_scores(model: BertForImageCaptioning, example: Example, written: list[list[int]], mask: int) -> Tensor:
    """Log-probabilities [n, vocabulary] of the token after each of n beginnings, all as long, [CLS] first.

    [MASK] stands after what is written; the rest of the caption's places is left out.
    """
    n, rows = len(written[0]) + 1, len(written)
    places = [*range(n), *range(CAPTION, len(example.attention_mask))]
    text = [place for place in places if place < TEXT]
    ids = torch.tensor([[*ids, mask, *example.input_ids[CAPTION:].tolist()] for ids in written])
    attention = example.attention_mask[places][:, places].clone()
    attention[:n, :n] = torch.ones(n, n).tril()
    attention[:n, n:] = example.attention_mask[CAPTION, CAPTION:]
    scores = model(
        ids,
        example.token_type_ids[text].expand(rows, -1),
        attention.expand(rows, -1, -1),
        example.img_feats.expand(rows, -1, -1),
        torch.tensor(text).expand(rows, -1),
    )
    return scores[:, n - 1].log_softmax(-1)


def greedy(
    model: BertForImageCaptioning, example: Example, cls: int, sep: int, mask: int, most: int = MOST
) -> tuple[list[int], float]:
    """The likeliest token each time; the caption without [CLS] and [SEP], and the mean log-probability."""
    written, total = [cls], []
    while len(written) < most:
        scores = next_scores(model, example, [written], mask)[0]
        token = int(scores.argmax())
        written.append(token)
        total.append(float(scores[token]))
        if token == sep:
            break
    return written[1:-1], sum(total) / len(total)


def beam_search(
    model: BertForImageCaptioning, example: Example, cls: int, sep: int, mask: int, beams: int, most: int = MOST
) -> tuple[list[int], float]:
    """Beams as there: the best 2 x beams continuations in turn, those that end are hypotheses of their mean."""
    live = [([cls], 0.0)]
    best: tuple[float, list[int]] = (-float("inf"), [])
    while live:
        candidates = []
        for written, total in live:
            scores = next_scores(model, example, [written], mask)[0]
            candidates += [(total + float(score), written, token) for token, score in enumerate(scores)]
        candidates.sort(key=lambda candidate: -candidate[0])
        live = []
        for total, written, token in candidates[: 2 * beams]:
            if token == sep or len(written) + 1 == most:
                best = max(best, (total / len(written), written))
            else:
                live.append(([*written, token], total))
            if len(live) == beams:
                break
    return best[1][1:], best[0]
