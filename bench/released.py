"""The released training step of microsoft/Oscar, re-created from its facts: model, optimizer and what a step does.

Everything is as its code has it, run on today's torch: a batch padded to 35 + 50, attention written out, GELU written
out, torch's dropout, the head over the vocabulary at all 85 positions, AdamW as pytorch-transformers has it, a loss
that is read after each step. Its LayerNorm is apex' fused one, or else written out: here it is torch's fused one, which
is faster than either. Parameter names are those of its checkpoints.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmax

UNSEEN = -10000.0  # added to the attention scores of padding
UNLABELLED = -1
CLIP = 10.0


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class Embeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        words = self.word_embeddings(input_ids) + self.position_embeddings(places)
        hidden: Tensor = self.dropout(self.LayerNorm(words + self.token_type_embeddings(token_type_ids)))
        return hidden


class SelfAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden: Tensor, unseen: Tensor) -> Tensor:
        query, key, value = (self.split(part(hidden)) for part in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1]) + unseen
        context = torch.matmul(self.dropout(softmax(scores, -1)), value)
        return context.permute(0, 2, 1, 3).contiguous().flatten(2)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).permute(0, 2, 1, 3)


class Residual(nn.Module):
    """A linear layer whose result is added to what came before, and normalised."""

    def __init__(self, inner: int, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        hidden: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + before)
        return hidden


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Residual(config.hidden_size, config)


class Dense(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, outer)


class Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Dense(config.hidden_size, config.intermediate_size)
        self.output = Residual(config.intermediate_size, config)

    def forward(self, hidden: Tensor, unseen: Tensor) -> Tensor:
        attended = self.attention.output(self.attention.self(hidden, unseen), hidden)
        out: Tensor = self.output(gelu(self.intermediate.dense(attended)), attended)
        return out


class Encoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class ImageBert(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Dense(config.hidden_size, config.hidden_size)
        self.img_embedding = nn.Linear(config.img_feature_dim, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, seen: Tensor, regions: Tensor) -> Tensor:
        unseen = (1.0 - seen[:, None, None, :].to(self.img_embedding.weight.dtype)) * UNSEEN
        embedded = self.dropout(self.img_embedding(regions))
        hidden = torch.cat([self.embeddings(input_ids, token_type_ids), embedded], 1)
        for layer in self.encoder.layer:
            hidden = layer(hidden, unseen)
        return hidden


class Transform(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(gelu(self.dense(hidden)))
        return out


class Predictions(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        scores: Tensor = self.decoder(self.transform(hidden)) + self.bias
        return scores


class Heads(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.predictions = Predictions(config)
        self.seq_relationship = nn.Linear(config.hidden_size, config.num_contrast_classes)


class BertImgForPreTraining(nn.Module):
    """Returns the loss. Its weights are those of one of our models, as `config` is, without a LayerNorm on regions."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.bert = ImageBert(config)
        self.cls = Heads(config)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        seen: Tensor,
        masked_lm_labels: Tensor,
        next_sentence_label: Tensor,
        regions: Tensor,
    ) -> Tensor:
        """Labels of tokens are given for all 85 positions, and -1 where there is nothing to predict."""
        hidden = self.bert(input_ids, token_type_ids, seen, regions)
        words = self.cls.predictions(hidden)
        pairs = self.cls.seq_relationship(torch.tanh(self.bert.pooler.dense(hidden[:, 0])))
        mlm_loss = cross_entropy(words.flatten(0, 1), masked_lm_labels.flatten(), ignore_index=UNLABELLED)
        return mlm_loss + cross_entropy(pairs, next_sentence_label, ignore_index=UNLABELLED)


class AdamW(torch.optim.Optimizer):
    """One parameter after the other, one operation after the other, and the weights decay after the step."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group)

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        assert gradient is not None
        if not state:
            state |= {"step": 0, "first": torch.zeros_like(parameter), "second": torch.zeros_like(parameter)}
        state["step"] += 1
        state["first"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = state["second"].sqrt().add_(group["eps"])
        corrected = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(state["first"], root, value=-group["lr"] * corrected)
        if group["weight_decay"]:
            parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])


def make_optimizer(model: nn.Module, lr: float) -> AdamW:
    """As the script does it: no decay for biases and LayerNorms, which are found by name."""
    spared: tuple[list[Tensor], list[Tensor]] = [], []
    for name, parameter in model.named_parameters():
        spared[name.endswith("bias") or "LayerNorm" in name].append(parameter)
    return AdamW([{"params": spared[0], "weight_decay": 0.01}, {"params": spared[1], "weight_decay": 0.0}], lr)
