"""Oscar's model: a BERT over `[CLS] w [SEP] q [SEP]` and image regions, with the masked-token and the contrastive head.

Parameter names are those of the released checkpoints (microsoft/Oscar), so weights go both ways.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, BertConfig
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertEncoder,
    BertPooler,
    BertPredictionHeadTransform,
    BertSelfAttention,
)

from oscar_train.arguments import SIZES
from oscar_train.batch import BOX
from oscar_train.model import fused
from oscar_train.model.dropout import Tokens, TripleDropout, set_tokens, token_bits
from oscar_train.model.packing import Packed

ATTENTION = "triples"  # the name under which transformers finds `attend`


def random_config(size: str, vocab_size: int) -> BertConfig:
    """Return the configuration of `random:SIZE`: base and large are BERT's, the others for trying things out."""
    layers, hidden, heads = SIZES[size]
    return BertConfig(
        vocab_size=vocab_size,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )


def oscar_config(bert: BertConfig, feature_dim: int, position: int = BOX) -> BertConfig:
    """Add Oscar's fields to a BERT configuration; those it has already stay.

    Args:
        bert: is changed.
        feature_dim: of the regions, P.
        position: how many numbers of z the model takes, 4 (x1/W, y1/H, x2/W, y2/H) or 6 (w/W and h/H, too).
    """
    bert.img_feature_dim, bert.region_position = feature_dim + position, position
    for name, default in (
        ("img_feature_type", "faster_r-cnn"),
        ("use_img_layernorm", 0),
        ("img_layer_norm_eps", 1e-12),
        ("num_contrast_classes", 2),
    ):
        setattr(bert, name, getattr(bert, name, default))

    bert.architectures = ["OscarForPreTraining"]
    bert._attn_implementation = ATTENTION
    return bert


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    slots: Tensor,
    places: Tensor | None,
    groups: Tensor,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' BERT asks for it: packed [1, heads, N, D] to [1, N, heads, D].

    On a GPU it is a kernel of ours. Elsewhere it is written out in training, because torch's own takes no mask for its
    dropout.

    Args:
        mask: [B, 1, 1, L] or [B, 1, L, L], what is added to the scores of the rows.
        slots: int64 [N], where the tokens are in the rows.
        places: int32 [B, L], which token stands where, for the kernel.
        groups: `Packed.groups`, for the kernel.
    """
    if places is not None:
        packed = (heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value))
        dropout = module.dropout
        p = dropout.p if module.training else 0.0
        bits, site = dropout.tokens.in_rows, dropout.offset
        return fused.attention(*packed, places, bits, site, groups, p, scaling)[None], None

    query, key, value = (_in_rows(each, mask, slots) for each in (query, key, value))
    if module.training and module.dropout.p:
        weights = (query * scaling @ key.transpose(2, 3) + mask).softmax(-1)
        hidden = module.dropout(weights.to(value.dtype)) @ value
    else:
        hidden = scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype), scale=scaling)

    return hidden.transpose(1, 2).flatten(0, 1).index_select(0, slots)[None], None


def _in_rows(packed: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
    """Return packed [1, heads, N, D] as rows [B, heads, L, D], with 0 where there is no token."""
    tokens, rows, length = packed[0].transpose(0, 1), mask.shape[0], mask.shape[3]
    flat = tokens.new_zeros(rows * length, *tokens.shape[1:]).index_copy(0, slots, tokens)
    return flat.view(rows, length, *tokens.shape[1:]).transpose(1, 2)


AttentionInterface.register(ATTENTION, attend)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Which tokens of a row see which, where not every token sees every other.

    A row has three blocks: the first text with [CLS] and its [SEP] (token type 0), the second text (token type 1), and
    the regions. sees: whether a token of block i sees those of block j, for sees[i][j]. causal: whether those of the
    first block see of it only themselves and those before.
    """

    sees: tuple[tuple[bool, bool, bool], ...] = ((True,) * 3,) * 3
    causal: bool = False


class OscarModel(nn.Module):
    """The encoder of text and regions.

    recompute: whether the backward pass computes activations again. attention: None where every token sees every other.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)
        self.img_embedding = nn.Linear(config.img_feature_dim, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.use_img_layernorm = bool(config.use_img_layernorm)
        if self.use_img_layernorm:
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.img_layer_norm_eps)

        self.recompute = False
        self.attention: Attention | None = None
        self._tokens = Tokens()
        self.embeddings.dropout = nn.Identity()  # type: ignore[assignment]  # ours is that of text and regions together
        self._of_tokens = _make_dropouts_stateless(self, self._tokens)
        _make_norms_narrow(self)

    def forward(self, batch: Packed) -> Tensor:
        """Return the last hidden states of the N tokens, [N, H].

        `Packed.groups` says which see each other, or `attention`, where there is one.
        """
        if self.attention is not None:
            batch = replace(batch, groups=grouped(self.attention, batch))

        hidden = self.embed(batch)
        unseen = _unseen(batch, hidden.dtype)
        places = _places(batch) if self._fused(batch) else None

        for layer in self.encoder.layer:
            attending = partial(layer, slots=batch.slots, places=places, groups=batch.groups)
            if self.recompute and self.training:
                hidden = checkpoint(attending, hidden, unseen, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = attending(hidden, unseen)

        tokens: Tensor = hidden.flatten(0, 1)
        return tokens

    def embed(self, batch: Packed) -> Tensor:
        """Return what the first layer gets, [1, N, H].

        A region is Linear([v'; z]), with a LayerNorm if the configuration has it (Oscar section 3; VinVL's code), and
        has neither position nor token type. Of z it is the first 4 numbers or all 6, as the weights are wide.
        """
        in_rows = token_bits(batch.dropout_seeds, batch.seen.shape[1])
        set_tokens(self._tokens, self._of_tokens, in_rows, in_rows.flatten().index_select(0, batch.slots))
        text = self.embeddings(*(each[None] for each in (batch.input_ids, batch.token_type_ids, batch.position_ids)))
        z = batch.z[:, : self.img_embedding.in_features - batch.features.shape[1]]
        regions = self.img_embedding(torch.cat([batch.features.to(text.dtype), z.to(text.dtype)], -1))
        if self.use_img_layernorm:
            regions = self.LayerNorm(regions)

        hidden: Tensor = self.dropout(torch.cat([text, regions[None]], 1))
        return hidden

    def _fused(self, batch: Packed) -> bool:
        config = self.encoder.config
        return fused.fits(batch.slots.device, batch.seen.shape[1], config.hidden_size // config.num_attention_heads)


def grouped(attention: Attention, batch: Packed) -> Tensor:
    """Return `Packed.groups` of the tokens of a batch: a bit for each block, or for each place of a causal one."""
    regions = torch.full_like(batch.token_type_ids[:1], 2).expand(len(batch.features))
    block = torch.cat([batch.token_type_ids, regions])
    visible = [sum(1 << other for other, sees in enumerate(row) if sees) for row in attention.sees]
    query, key = torch.tensor(visible, device=block.device)[block], 1 << block
    if attention.causal:
        place = batch.slots % batch.seen.shape[1]
        group_bits = (8 << place).where(block == 0, 0)  # above the bits of the three blocks
        key = group_bits.where(block == 0, key)
        sees_first = torch.tensor([row[0] for row in attention.sees], device=block.device)[block]
        every = torch.full_like(query, -8).where(sees_first, 0)
        query = query & 6 | torch.where(block == 0, (2 * group_bits - 8).where(sees_first, 0), every)

    groups = query.new_zeros(2, batch.seen.numel()).index_copy(1, batch.slots, torch.stack([query, key]))
    return groups.view(2, *batch.seen.shape)


def _unseen(batch: Packed, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores in rows: 0, or the least number where one token does not see the other.

    [B, 1, 1, L], or [B, 1, L, L] where not all tokens of a row see the same ones.
    """
    sees = batch.seen[:, None, None, :]
    if batch.groups.shape[2]:
        query, key = batch.groups[0, :, None, :, None], batch.groups[1, :, None, None, :]
        itself = torch.eye(key.shape[-1], dtype=torch.bool, device=key.device)
        sees = sees & ((query & key != 0) | itself)
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)


def _places(batch: Packed) -> Tensor:
    """Return which token stands where in the rows, int32 [B, L]; -1 where there is none."""
    tokens = torch.arange(len(batch.slots), dtype=torch.int32, device=batch.slots.device)
    nothing = torch.full(batch.seen.shape, -1, dtype=torch.int32, device=batch.slots.device)
    return nothing.flatten().index_copy(0, batch.slots, tokens).view(batch.seen.shape)


def _make_dropouts_stateless(model: OscarModel, tokens: Tokens) -> tuple[TripleDropout, ...]:
    """Replace every dropout by one whose masks belong to the triples; return those of packed tokens."""
    site, of_tokens = count(), []
    for module in list(model.modules()):
        for name, child in module.named_children():
            if not isinstance(child, nn.Dropout):
                continue
            dropout = TripleDropout(child.p, tokens, next(site), model.encoder.config.hidden_size)
            setattr(module, name, dropout)
            if not isinstance(module, BertSelfAttention):
                of_tokens.append(dropout)

    return tuple(of_tokens)


class NarrowLayerNorm(nn.LayerNorm):
    """A LayerNorm that computes in float32 under autocast, as torch's does, but returns numbers of autocast's type.

    Residuals are then half as large, and nothing has to be narrowed before each of the matrix products that read them.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` normalised, in autocast's type if there is one."""
        normed = super().forward(input)
        device = input.device.type
        return normed.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normed


def _make_norms_narrow(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.LayerNorm:
                setattr(module, name, NarrowLayerNorm(list(child.normalized_shape), eps=child.eps))


class MaskedTokenHead(nn.Module):
    """Scores of the vocabulary for a token. The decoder's weight is the word embedding's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Score hidden states [M, H]: [M, vocabulary]."""
        return self.decoder(self.transform(hidden)) + self.bias  # type: ignore[no-any-return]


class PreTrainingHeads(nn.Module):
    """The two heads, under the names that BERT gave them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.predictions = MaskedTokenHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, config.num_contrast_classes)


class OscarForPreTraining(nn.Module):
    """Oscar with its two pre-training heads. `config`: BertConfig with the fields of `oscar_config`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = OscarModel(config)
        self.cls = PreTrainingHeads(config)
        self.apply(partial(initialise, deviation=config.initializer_range))
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Return scores of the M masked tokens, [M, vocabulary], in row-major order, and of the pairs, [B, classes].

        The head over 30,522 words is the expensive part, so only the masked tokens go through it.
        """
        hidden = self.bert(batch)
        words = self.cls.predictions(hidden.index_select(0, batch.masked))
        pooled = self.bert.pooler(hidden.index_select(0, batch.first)[:, None])
        return words, self.cls.seq_relationship(pooled)


def initialise(module: nn.Module, deviation: float) -> None:
    """Set BERT's initial values: N(0, 0.02), biases 0, LayerNorms the identity."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=deviation)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
