"""What a model would write next: log-probabilities of the next token, for any number of beginnings of each caption.

As in microsoft/Oscar, [MASK] stands where the next token is to be, and its prediction is that token. Keys and values of
tags, regions and the tokens that stand fast are computed once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.model.oscar import OscarForPreTraining
from oscar_train.model.packing import Packed


@dataclass(frozen=True)
class Keys:
    """Keys and values of one layer: [..., heads, n, D], for n tokens."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Context:
    """B images as the layers see them: the keys and values of their tags and regions, [B, heads, C, D].

    unseen: [B, 1, 1, C], what is added to scores: 0, or the least number where there is no token.
    """

    layers: list[Keys]
    unseen: Tensor

    def __len__(self) -> int:
        return len(self.unseen)


@dataclass(frozen=True)
class Beginnings:
    """G beginnings of the caption of each of B images: the keys and values of their n tokens, [B, G, heads, n, D]."""

    layers: list[Keys]

    @property
    def length(self) -> int:
        """How many tokens each has."""
        return self.layers[0].keys.shape[3]


@dataclass(frozen=True)
class Decoder:
    """Asks a model, which is in eval mode, for captions token by token.

    first, mask, end: the ids of [CLS], [MASK] and [SEP].
    """

    model: OscarForPreTraining
    first: int
    mask: int
    end: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.cls.predictions.bias.device

    def read(self, batch: Packed) -> Context:
        """Look at B images: the batch has their tags, in the places that training has them in, and their regions."""
        packed = self.model.bert.embed(batch)[0]
        rows, length = batch.seen.shape
        flat = packed.new_zeros(rows * length, packed.shape[1]).index_copy(0, batch.slots, packed)
        hidden = flat.view(rows, length, -1)
        unseen = torch.zeros(batch.seen.shape, dtype=hidden.dtype, device=hidden.device)
        unseen = unseen.masked_fill(~batch.seen, torch.finfo(hidden.dtype).min)[:, None, None, :]

        layers = []

        for layer in self._layers():
            query, own = _projected(layer, hidden)
            layers.append(own)
            scores = query @ own.keys.mT + unseen
            hidden = _completed(layer, hidden, scores.softmax(-1) @ own.values)

        return Context(layers, unseen)

    def begin(self, context: Context, beginnings: int = 1) -> Beginnings:
        """Return beginnings without any token, G of each image."""
        empty = [
            Keys(*(part[:, None, :, :0].expand(-1, beginnings, -1, -1, -1) for part in (layer.keys, layer.values)))
            for layer in context.layers
        ]
        return Beginnings(empty)

    def step(
        self, context: Context, beginnings: Beginnings, tokens: Tensor, parents: Tensor | None = None
    ) -> tuple[Tensor, Beginnings]:
        """Lengthen beginnings by a token, and predict the one after it.

        Args:
            tokens: int64 [B, G], the new tokens; [CLS] comes first.
            parents: int64 [B, G], which of the image's beginnings each lengthens; None: each its own.

        Returns:
            Log-probabilities float32 [B, G, vocabulary], and the longer beginnings.
        """
        position, longer = beginnings.length, []
        hidden = self._embedded(tokens, position)  # [B, G, 2, H], the token and [MASK]
        for layer, of_images, before in zip(self._layers(), context.layers, beginnings.layers, strict=True):
            query, own = _projected(layer, hidden)
            kept = before if parents is None else _chosen(before, parents)
            keys = torch.cat([kept.keys, own.keys], 3)
            values = torch.cat([kept.values, own.values], 3)
            longer.append(Keys(keys[:, :, :, :-1], values[:, :, :, :-1]))  # without [MASK]
            hidden = _completed(layer, hidden, _attended(query, of_images, context.unseen, keys, values))

        scores: Tensor = self.model.cls.predictions(hidden[:, :, 1])
        return log_softmax(scores.float(), -1), Beginnings(longer)

    def _embedded(self, tokens: Tensor, position: int) -> Tensor:
        """Embed tokens [B, G] at a position, and [MASK] after each: [B, G, 2, H]."""
        pairs = torch.stack([tokens, torch.full_like(tokens, self.mask)], -1)
        positions = torch.tensor([position, position + 1], device=tokens.device).expand(pairs.shape)
        flat = (pairs.flatten(0, 1), torch.zeros_like(pairs).flatten(0, 1), positions.flatten(0, 1))
        embedded: Tensor = self.model.bert.embeddings(*flat)
        return embedded.view(*pairs.shape, -1)

    def _layers(self) -> Iterator[Any]:
        return iter(self.model.bert.encoder.layer)


def _projected(layer: Any, hidden: Tensor) -> tuple[Tensor, Keys]:
    """Return the scaled queries, and the keys and values, of tokens [..., n, H]: [..., heads, n, D] each."""
    attention = layer.attention.self
    query, key, value = (
        part(hidden).unflatten(-1, (-1, attention.attention_head_size)).transpose(-2, -3)
        for part in (attention.query, attention.key, attention.value)
    )
    return query * attention.scaling, Keys(key, value)


def _attended(query: Tensor, images: Keys, unseen: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Let a token and the [MASK] after it see their image, the tokens before them, and themselves.

    Args:
        query: [B, G, heads, 2, D].
        images: [B, heads, C, D].
        unseen: [B, 1, 1, C].
        keys, values: [B, G, heads, n + 2, D], of the beginning, the token and [MASK].

    Returns:
        [B, G, heads, 2, D].
    """
    rows, beginnings, heads, two, size = query.shape
    together = query.transpose(1, 2).reshape(rows, heads, beginnings * two, size)  # so that images are not copied
    to_images = together @ images.keys.mT + unseen
    to_images = to_images.view(rows, heads, beginnings, two, -1).transpose(1, 2)
    to_caption = query @ keys.mT
    to_caption[..., 0, -1] = torch.finfo(to_caption.dtype).min  # the token does not see [MASK]

    weights = torch.cat([to_images, to_caption], -1).softmax(-1)
    to_image, to_text = weights.split([to_images.shape[-1], to_caption.shape[-1]], -1)
    of_image = (to_image.transpose(1, 2).flatten(2, 3) @ images.values).view(rows, heads, beginnings, two, size)
    attended: Tensor = of_image.transpose(1, 2) + to_text @ values

    return attended


def _completed(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    """Return what a layer makes of tokens [..., n, H] and what they attended to, [..., heads, n, D]."""
    joined = attended.transpose(-2, -3).flatten(-2)
    output: Tensor = layer.feed_forward_chunk(layer.attention.output(joined, hidden))
    return output


def _chosen(layer: Keys, parents: Tensor) -> Keys:
    """Return the keys and values [B, G, heads, n, D] of some beginnings of each image."""
    rows = torch.arange(len(parents), device=parents.device)[:, None]
    return Keys(layer.keys[rows, parents], layer.values[rows, parents])


def decoder_of(model: OscarForPreTraining, tokenizer: Tokenizer) -> Decoder:
    """Return what decodes with a model and its tokenizer."""
    return Decoder(model, tokenizer.cls, tokenizer.mask, tokenizer.sep)
