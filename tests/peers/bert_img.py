"""What microsoft/Oscar's BertImgForPreTraining computes, step by step, under the names of its checkpoints."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

UNSEEN = -10000.0  # added to the attention scores of padding
IGNORED = -1  # labels of tokens that are not predicted


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What its config.json says."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    img_feature_dim: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    img_layer_norm_eps: float = 1e-12
    use_img_layernorm: int = 0
    num_contrast_classes: int = 2


class Norm(nn.Module):
    """A LayerNorm, written out."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + self.eps) + self.bias


def gelu(x: Tensor) -> Tensor:
    return x * (1.0 + torch.erf(x / math.sqrt(2.0))) / 2.0


class Embeddings(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.word_embeddings = nn.Embedding(s.vocab_size, s.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(s.max_position_embeddings, s.hidden_size)
        self.token_type_embeddings = nn.Embedding(s.type_vocab_size, s.hidden_size)
        self.LayerNorm = Norm(s.hidden_size, s.layer_norm_eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(input_ids.shape[1]).repeat(len(input_ids), 1)
        words = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        return self.LayerNorm(words + self.token_type_embeddings(token_type_ids))


class SelfAttention(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.heads = s.num_attention_heads
        self.query = nn.Linear(s.hidden_size, s.hidden_size)
        self.key = nn.Linear(s.hidden_size, s.hidden_size)
        self.value = nn.Linear(s.hidden_size, s.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        queries, keys, values = (part(hidden).chunk(self.heads, -1) for part in (self.query, self.key, self.value))
        contexts = []
        for query, key, value in zip(queries, keys, values, strict=True):
            scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1]) + mask
            contexts.append(scores.softmax(-1) @ value)
        return torch.cat(contexts, -1)


class Residual(nn.Module):
    """A linear layer whose result is added to what came before, and normalised."""

    def __init__(self, inner: int, outer: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(inner, outer)
        self.LayerNorm = Norm(outer, eps)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + before)


class Dense(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.dense = nn.Linear(inner, outer)


class Attention(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.self = SelfAttention(s)
        self.output = Residual(s.hidden_size, s.hidden_size, s.layer_norm_eps)


class Layer(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.attention = Attention(s)
        self.intermediate = Dense(s.hidden_size, s.intermediate_size)
        self.output = Residual(s.intermediate_size, s.hidden_size, s.layer_norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        attended = self.attention.output(self.attention.self(hidden, mask), hidden)
        return self.output(gelu(self.intermediate.dense(attended)), attended)


class Encoder(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.layer = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))


class ImageBert(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.embeddings = Embeddings(s)
        self.encoder = Encoder(s)
        self.pooler = Dense(s.hidden_size, s.hidden_size)
        self.img_embedding = nn.Linear(s.img_feature_dim, s.hidden_size)
        if s.use_img_layernorm:
            self.LayerNorm = Norm(s.hidden_size, s.img_layer_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor,
        img_feats: Tensor,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """attention_mask: [B, L], or [B, L, L] where not all tokens see the same ones."""
        regions = self.img_embedding(img_feats)
        if hasattr(self, "LayerNorm"):
            regions = self.LayerNorm(regions)
        hidden = torch.cat([self.embeddings(input_ids, token_type_ids, position_ids), regions], 1)
        seen = attention_mask if attention_mask.dim() == 3 else attention_mask[:, None, :]
        for layer in self.encoder.layer:
            hidden = layer(hidden, (1.0 - seen) * UNSEEN)
        return hidden


class Transform(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.dense = nn.Linear(s.hidden_size, s.hidden_size)
        self.LayerNorm = Norm(s.hidden_size, s.layer_norm_eps)


class Predictions(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.transform = Transform(s)
        self.decoder = nn.Linear(s.hidden_size, s.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(s.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform.LayerNorm(gelu(self.transform.dense(hidden)))) + self.bias


class Heads(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.predictions = Predictions(s)
        self.seq_relationship = nn.Linear(s.hidden_size, s.num_contrast_classes)


class BertImgForPreTraining(nn.Module):
    """Scores of the vocabulary at all positions, regions too, and of the pair; without dropout."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.bert = ImageBert(sizes)
        self.cls = Heads(sizes)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor, img_feats: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = self.bert(input_ids, token_type_ids, attention_mask, img_feats)
        pooled = torch.tanh(self.bert.pooler.dense(hidden[:, 0]))
        return self.cls.predictions(hidden), self.cls.seq_relationship(pooled)


def losses(
    words: Tensor, pairs: Tensor, masked_lm_labels: Tensor, next_sentence_label: Tensor
) -> tuple[Tensor, Tensor]:
    """Both means; what is trained on is their sum. The labels of words are given for all positions, too."""
    chosen = [
        -F.log_softmax(scores, 0)[label]
        for scores, label in zip(words.flatten(0, 1), masked_lm_labels.flatten().tolist(), strict=True)
        if label != IGNORED
    ]
    told = [-F.log_softmax(scores, 0)[label] for scores, label in zip(pairs, next_sentence_label, strict=True)]
    return torch.stack(chosen).mean(), torch.stack(told).mean()
