"""The network of tasks that classify: Oscar's encoder and a fresh head on the pooled [CLS].

Names and shapes are those of microsoft/Oscar's ImageBertForSequenceClassification and ImageBertForMultipleChoice, so
fine-tuned checkpoints go both ways.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig

from oscar_common.errors import UsageError
from oscar_common.settings import Finetune
from oscar_train.checkpoints.init import Start, build_for
from oscar_train.checkpoints.tensor_names import CLASSIFIER, REGIONS
from oscar_train.model.dropout import keep, token_bits
from oscar_train.model.oscar import Attention, OscarModel, initialise
from oscar_train.model.packing import Packed

POOLED = 4096  # the place of this dropout in the network; those of the encoder have smaller numbers
BLOCKS = {"full": (), "text-image": ((0, 2),), "text-tags": ((0, 1),), "tags-image": ((1, 2),)}


class OscarForClassification(nn.Module):
    """Oscar with a head for classes. `config`: a BertConfig with the fields of `classifier_config`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.bert = OscarModel(config)
        self.bert.attention = choose_attention(config.attention)
        self.classifier = make_head(config)
        self.apply(partial(initialise, deviation=config.initializer_range))

    def forward(self, batch: Packed) -> Tensor:
        """Return the scores of classes, [B / num_choice, num_labels]; neighbouring rows are the choices of a sample."""
        hidden = self.bert(batch)
        pooled = self.bert.pooler(hidden.index_select(0, batch.first)[:, None])
        pooled = self._dropped(pooled, batch.dropout_seeds)
        scores: Tensor = self.classifier(pooled.view(len(pooled) // self.config.num_choice, -1))
        return scores

    def _dropped(self, pooled: Tensor, seeds: Tensor) -> Tensor:
        """Apply dropout that belongs to the row, as all of the encoder's does."""
        share = self.config.hidden_dropout_prob
        if not self.training or not share:
            return pooled
        is_kept = keep(token_bits(seeds, 1)[:, 0], POOLED, pooled.shape[1], share)
        return torch.where(is_kept, pooled / (1 - share), 0.0)


def make_head(config: Any) -> nn.Module:
    """Return the head that a configuration says: one layer, or two with a ReLU (and a LayerNorm, as Oscar+ has it)."""
    width = config.num_choice * config.hidden_size
    if config.classifier == "linear":
        return nn.Linear(width, config.num_labels)

    inner = config.cls_hidden_scale * config.hidden_size
    has_norm = config.num_choice > 1 and config.use_img_layernorm
    norm = [nn.LayerNorm(inner, eps=config.layer_norm_eps)] if has_norm else []
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), *norm, nn.Linear(inner, config.num_labels))


def choose_attention(name: str) -> Attention | None:
    """Return which blocks see which: one of `oscar_common.settings.ATTENTIONS`."""
    if name == "full":
        return None
    sees = [[i == j for j in range(3)] for i in range(3)]
    for one, other in BLOCKS[name]:
        sees[one][other] = sees[other][one] = True
    return Attention(sees=tuple((a, b, c) for a, b, c in sees))


def classifier_config(
    config: BertConfig,
    labels: int,
    *,
    loss: str,
    attention: str = "full",
    classifier: str = "linear",
    scale: int = 2,
    choices: int = 1,
) -> BertConfig:
    """Add what a head needs to an Oscar's configuration, under the names that microsoft/Oscar uses.

    Args:
        config: is changed.
        labels: how many classes there are.
        loss: what it is trained with, `sfmx` (cross-entropy) or `bce`.
        attention: one of `oscar_common.settings.ATTENTIONS`.
        classifier: `linear` or `mlp`.
        scale: the inner size of an `mlp`, in hidden sizes.
        choices: rows of a sample that are classified together.
    """
    config.num_labels, config.loss_type, config.attention = labels, loss, attention
    config.classifier, config.cls_hidden_scale, config.num_choice = classifier, scale, choices
    config.architectures = ["OscarForClassification"]
    return config


def build_classifier(
    settings: Finetune, labels: int, start: Start, feature_dim: int, begin: Any, **head: Any
) -> tuple[OscarForClassification, str]:
    """Make the network of a task; see `oscar_train.checkpoints.init.build` and, for `head`, `classifier_config`.

    Raises:
        UsageError: the model has fewer positions than --text-length.
    """
    positions = start.config.max_position_embeddings
    if positions < settings.text_length:
        raise UsageError(f"--text-length {settings.text_length}: {start.place} has {positions} positions; give fewer")

    def network(config: BertConfig) -> OscarForClassification:
        if settings.dropout is not None:
            config.hidden_dropout_prob = settings.dropout
        return OscarForClassification(classifier_config(config, labels, attention=settings.attention, **head))

    return build_for(settings, start, feature_dim, begin, network=network)


def is_classifier(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights are those of an Oscar with a head of this module."""
    return f"{REGIONS}.weight" in weights and any(name.startswith(CLASSIFIER) for name in weights)


def head_shapes(config: Any, weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the tensors of a fine-tuned model, in the order of its files; `config` gets the fields of its head."""
    with torch.device("meta"):
        network = OscarForClassification(with_head(config, weights))
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def with_head(config: Any, weights: Mapping[str, Tensor]) -> Any:
    """Complete a configuration by what the weights of its head show: released folders say little of it."""
    names = [name.removeprefix(CLASSIFIER) for name in weights if name.startswith(CLASSIFIER)]
    layers = sorted({name.rpartition(".")[0] for name in names})  # "" of a single layer
    first, last = (weights[f"{CLASSIFIER}{layer}.weight".replace("..", ".")] for layer in (layers[0], layers[-1]))
    return classifier_config(
        config,
        len(last),
        loss=getattr(config, "loss_type", "sfmx"),
        attention=getattr(config, "attention", "full"),
        classifier="mlp" if len(layers) > 1 else "linear",
        scale=len(first) // config.hidden_size if len(layers) > 1 else 2,
        choices=first.shape[1] // config.hidden_size,
    )
