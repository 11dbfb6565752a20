"""What microsoft/Oscar's fine-tuning heads compute, step by step, under the names of its checkpoints.

ImageBertForSequenceClassification and ImageBertForMultipleChoice of oscar/modeling/modeling_bert.py, and the 2-d masks
of oscar/run_retrieval.py; without dropout.
"""

import torch
from torch import Tensor, nn

from peers.bert_img import Dense, ImageBert, Norm, Sizes


def pooled(pooler: Dense, hidden: Tensor) -> Tensor:
    return torch.tanh(pooler.dense(hidden[:, 0]))


def head(sizes: Sizes, classifier: str, labels: int, scale: int, choices: int) -> nn.Module:
    wide = choices * sizes.hidden_size
    if classifier == "linear":
        return nn.Linear(wide, labels)
    inner = scale * sizes.hidden_size
    if choices > 1 and sizes.use_img_layernorm:
        norm = Norm(inner, sizes.layer_norm_eps)
        return nn.Sequential(nn.Linear(wide, inner), nn.ReLU(), norm, nn.Linear(inner, labels))
    return nn.Sequential(nn.Linear(wide, inner), nn.ReLU(), nn.Linear(inner, labels))


class ImageBertForTasks(nn.Module):
    """Scores of classes, of each row or of neighbouring rows together."""

    def __init__(self, sizes: Sizes, classifier: str, labels: int, scale: int = 2, choices: int = 1):
        super().__init__()
        self.choices = choices
        self.bert = ImageBert(sizes)
        self.classifier = head(sizes, classifier, labels, scale, choices)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor, img_feats: Tensor) -> Tensor:
        hidden = self.bert(input_ids, token_type_ids, attention_mask, img_feats)
        vectors = pooled(self.bert.pooler, hidden)
        rows = [torch.cat(list(group)) for group in vectors.split(self.choices)]
        return self.classifier(torch.stack(rows))


def mask_2d(kind: str, caption: int, text: int, tokens: int, regions: int, most: int) -> Tensor:
    """The mask of a row for --att_mask_type: `caption` tokens up to the first [SEP], `text` in all."""
    blocks = {
        "C": range(caption),
        "L": range(caption, text),
        "R": range(tokens, tokens + regions),
    }
    mask = torch.zeros(tokens + most, tokens + most)
    pairs = [(one, one) for one in "CLR"]
    pairs += [tuple(kind), tuple(kind[::-1])] if len(kind) == 2 else []
    for one, other in pairs:
        for row in blocks[one]:
            for column in blocks[other]:
                mask[row, column] = 1
    return mask


def bce_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """The mean over rows and classes, times the number of classes."""
    likely = torch.sigmoid(scores)
    each = -(targets * torch.log(likely) + (1 - targets) * torch.log(1 - likely))
    return each.mean() * targets.shape[1]


def cross_entropy_loss(scores: Tensor, labels: Tensor) -> Tensor:
    told = [row[label] - row.logsumexp(0) for row, label in zip(scores, labels, strict=True)]
    return -torch.stack(told).mean()
