"""The ways to take a training step, each in a process of its own, which works when it is told to; see train.py."""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import released
from oscar_common.settings import Train
from oscar_train.batch import BOX, IGNORED, Batch
from oscar_train.checkpoints.init import build, open_init
from oscar_train.data.stream import Stream, open_stream
from oscar_train.model.oscar import OscarForPreTraining
from oscar_train.objectives import choose_objective
from oscar_train.ranks import Ranks
from oscar_train.training.schedule import rate
from oscar_train.training.step import (
    Report,
    Share,
    TrainState,
    gradient,
    make_optimizer,
    make_train_state,
    share,
    shares,
    take,
)

KINDS = ("ours", "release", "visualbert")
TWISTS = {
    "compile": "torch.compile",
    "graphs": "steps recorded and replayed (CUDA graphs)",
    "compiledgraphs": "both",
    "padded": "rows filled up to 35 + 50, as if padding were tokens",
    "everywhere": "the head over the vocabulary at all text tokens",
    "unfused": "the release's AdamW, one operation after the other",
    "accumulate": "a batch in 4 parts",
    "recompute": "activations computed again in the backward pass",
}
SWITCHES: dict[str, dict[str, Any]] = {
    "compile": {"compile": True},
    "graphs": {"cuda_graphs": True},
    "compiledgraphs": {"compile": True, "cuda_graphs": True},
    "accumulate": {"accumulate": 4},
    "recompute": {"activation_checkpointing": True},
}
ENDLESS = 10**9


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process does. way: KIND-PRECISION or KIND-PRECISION-TWIST. warmup: steps before the first that counts."""

    way: str = ""
    size: str = ""
    batch_size: int = 0
    shards: list[str]
    cache: str
    device: str
    threads: int
    warmup: int = 1

    @property
    def kind(self) -> str:
        return self.way.split("-")[0]

    @property
    def precision(self) -> str:
        return self.way.split("-")[1]

    @property
    def twist(self) -> str:
        return "".join(self.way.split("-")[2:])

    def settings(self) -> Train:
        """Return the settings that `oscar-train` would have."""
        return Train(
            init=f"random:{self.size}",
            batch_size=self.batch_size,
            steps=ENDLESS,
            precision=self.precision,
            **SWITCHES.get(self.twist, {}),
        )


@dataclass(frozen=True, kw_only=True)
class Lap:
    """Some steps after each other. waited: seconds of all, for the stream. loss: of the last step. peak_gb: so far."""

    seconds: float
    waited: float
    steps: int
    loss: float
    peak_gb: float


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """supply: yields so many batches, with the seconds that each was waited for. step: trains on one.

    loss: tells it from what the step returned.
    """

    supply: Callable[[int], Iterable[tuple[Any, float]]]
    step: Callable[[Any], Any]
    loss: Callable[[Any], float]
    device: torch.device

    def lap(self, lead: int, steps: int) -> Lap:
        """Take `lead` steps, and then those that are timed."""
        batches, waited = iter(self.supply(lead + steps)), 0.0
        for batch, _ in islice(batches, lead):
            self.step(batch)
        synchronize(self.device)
        start = time.perf_counter()
        for batch, seconds in batches:
            result = self.step(batch)
            waited += seconds
        synchronize(self.device)
        seconds = time.perf_counter() - start
        return Lap(seconds=seconds, waited=waited, steps=steps, loss=self.loss(result), peak_gb=peak(self.device))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device) -> float:
    """Return the most memory in GB: tensors on the GPU, or all of the process, imports included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def make_model(job: Job, feature_dim: int, dropout: float = 0.1) -> OscarForPreTraining:
    """Make our model as `oscar-train` does, on the device."""
    start = open_init(f"random:{job.size}")
    start.config.hidden_dropout_prob = start.config.attention_probs_dropout_prob = dropout
    model: OscarForPreTraining
    model, _ = build(start, feature_dim, 0, classes=choose_objective(Train()).classes)
    return model.to(job.device)


def make_released(job: Job, feature_dim: int, dropout: float = 0.1) -> released.BertImgForPreTraining:
    """Make the released model with the weights of ours."""
    ours = make_model(job, feature_dim, dropout)
    model = released.BertImgForPreTraining(ours.config)
    model.load_state_dict(ours.state_dict())
    return model.to(job.device)


def make_visualbert(job: Job, feature_dim: int) -> nn.Module:
    """Make transformers' VisualBERT of the same size, with its own embeddings of regions and its own head."""
    from transformers import VisualBertConfig, VisualBertForPreTraining

    bert = open_init(f"random:{job.size}").config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = VisualBertConfig(**{n: getattr(bert, n) for n in names}, visual_embedding_dim=feature_dim + BOX)
    torch.manual_seed(0)
    model: nn.Module = VisualBertForPreTraining(config)
    return model.to(job.device)


def regions_of(batch: Batch) -> Tensor:
    return torch.cat([batch.features.float(), batch.z], -1)


def labels_of(batch: Batch, ignored: int) -> Tensor:
    """Return the labels of all positions, regions too, as the peers take them."""
    labels = batch.mlm_labels.masked_fill(batch.mlm_labels == IGNORED, ignored)
    return pad(labels, (0, batch.region_mask.shape[1]), value=ignored)


def for_release(batch: Batch) -> dict[str, Tensor]:
    return {
        "input_ids": batch.input_ids.clone(),
        "token_type_ids": batch.token_type_ids.clone(),
        "seen": torch.cat([batch.attention_mask, batch.region_mask], 1).long(),
        "masked_lm_labels": labels_of(batch, released.UNLABELLED),
        "next_sentence_label": batch.match_labels.clone(),
        "regions": regions_of(batch),
    }


def for_visualbert(batch: Batch) -> dict[str, Tensor]:
    return {
        "input_ids": batch.input_ids.clone(),
        "token_type_ids": batch.token_type_ids.clone(),
        "attention_mask": batch.attention_mask.long(),
        "visual_embeds": regions_of(batch),
        "visual_attention_mask": batch.region_mask.long(),
        "labels": labels_of(batch, IGNORED),
        "sentence_image_labels": batch.match_labels.clone(),
    }


def open_ours(job: Job, stream: Stream) -> Trainer:
    """What `oscar-train` does: its stream, its steps, each of which is read while the next one is under way."""
    settings, device = job.settings(), torch.device(job.device)
    train_state = make_train_state(make_model(job, stream.corpus.feature_dim), settings, Ranks(0, 1, device))
    if job.twist == "unfused":
        theirs = released.make_optimizer(train_state.model, settings.lr)
        train_state = replace(train_state, optimizer=theirs)  # type: ignore[arg-type]  # all that is asked of it is a step
    work = shares(train_state, twisted(stream.batches(0, ENDLESS), job.twist))
    numbers, under_way = count(1), deque[Report]()

    def step(one: Share) -> Report:
        under_way.append(take(train_state, one, rate(settings, next(numbers))))
        if len(under_way) > 1:
            under_way.popleft().read()
        return under_way[-1]

    def supply(steps: int) -> Iterator[tuple[Share, float]]:
        return ((one, one.waited) for one in islice(work, steps))

    return Trainer(supply=supply, step=step, loss=lambda report: report.read().loss, device=device)


def twisted(batches: Iterator[Batch], twist: str) -> Iterator[Batch]:
    for batch in batches:
        if twist == "padded":
            batch.attention_mask.fill_(True)
            batch.region_mask.fill_(True)
        if twist == "everywhere":
            batch.mlm_labels.copy_(batch.input_ids.where(batch.attention_mask, IGNORED))
        yield batch


def open_release(job: Job, stream: Stream) -> Trainer:
    model = make_released(job, stream.corpus.feature_dim)
    optimizer = released.make_optimizer(model, job.settings().lr)
    return open_peer(job, stream, for_release, lambda inputs: model(**inputs), model, optimizer)


def open_visualbert(job: Job, stream: Stream) -> Trainer:
    model = make_visualbert(job, stream.corpus.feature_dim)
    optimizer = make_optimizer(model, job.settings())
    return open_peer(job, stream, for_visualbert, lambda inputs: model(**inputs).loss, model, optimizer)


def open_peer(
    job: Job,
    stream: Stream,
    prepare: Callable[[Batch], dict[str, Tensor]],
    loss_of: Callable[[dict[str, Tensor]], Tensor],
    model: nn.Module,
    optimizer: Optimizer,
) -> Trainer:
    """The released loop, for any model. Its batches are those of our stream, made before the clock starts."""
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / ENDLESS)
    buffer, numbers = stream.buffer(), count()
    model.train()

    def step(inputs: dict[str, Tensor]) -> float:
        there = {name: tensor.to(job.device, non_blocking=True) for name, tensor in inputs.items()}
        with torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bf16"):
            loss = loss_of(there)
        loss.backward()
        value = loss.item()
        clip_grad_norm_(model.parameters(), released.CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return value

    def supply(steps: int) -> list[tuple[dict[str, Tensor], float]]:
        return [(prepare(stream.batch(next(numbers), buffer)), 0.0) for _ in range(steps)]

    return Trainer(supply=supply, step=step, loss=float, device=torch.device(job.device))


OPENERS = {"ours": open_ours, "release": open_release, "visualbert": open_visualbert}


@dataclass(kw_only=True)
class Passed:
    """What one forward and backward pass came to."""

    loss: float
    norm: float
    gradients: dict[str, Tensor] = field(repr=False)

    def beside(self, plain: "Passed") -> dict[str, float]:
        """Compare with a plain pass."""
        pairs = [(self.gradients[name].double(), tensor.double()) for name, tensor in plain.gradients.items()]
        product, own, other = (sum(float((p[a] * p[b]).sum()) for p in pairs) for a, b in ((0, 1), (0, 0), (1, 1)))
        return {
            "loss": self.loss,
            "loss_difference": abs(self.loss / plain.loss - 1),
            "norm_difference": abs(self.norm / plain.norm - 1),
            "gradient_cosine": product / (own * other) ** 0.5,
        }


def pass_ours(train_state: TrainState, batch: Batch) -> Passed:
    means, _, _ = gradient(train_state, share(train_state, batch))
    return Passed(loss=means[0].item(), norm=means[-1].item(), gradients=gradients_of(train_state.model))


def pass_released(model: nn.Module, batch: Batch, device: str) -> Passed:
    model.train()
    loss = model(**{name: tensor.to(device) for name, tensor in for_release(batch).items()})
    loss.backward()
    norm = clip_grad_norm_(model.parameters(), released.CLIP)
    return Passed(loss=loss.item(), norm=norm.item(), gradients=gradients_of(model))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def numerics(job: Job, stream: Stream, precisions: list[str], compiled: bool) -> dict[str, dict[str, float]]:
    """Compare what leaves exactness with a plain pass in fp32 of the same weights, batch and dropout.

    The release has other dropout, so it is compared without any: that shows that it does the same work.
    """
    batch = stream.batch(0, stream.buffer())
    alone, ranks, found = replace(job, way="ours-fp32"), Ranks(0, 1, torch.device(job.device)), {}
    plain = pass_ours(make_train_state(make_model(alone, stream.corpus.feature_dim, 0), alone.settings(), ranks), batch)
    theirs = pass_released(make_released(alone, stream.corpus.feature_dim, 0), batch, job.device)
    found["release-fp32"] = theirs.beside(plain)
    del theirs
    model = make_model(alone, stream.corpus.feature_dim)
    plain = pass_ours(make_train_state(model, alone.settings(), ranks), batch)
    twists = ["", "-compile"] if compiled else [""]
    for way in [f"ours-{precision}{twist}" for twist in twists for precision in precisions]:
        if way != "ours-fp32":
            train_state = make_train_state(model, replace(job, way=way).settings(), ranks)
            found[way] = pass_ours(train_state, batch).beside(plain)
    return found


def answers(command: str, job: Job, lines: Iterable[str], *rest: str) -> Iterator[dict[str, Any]]:
    """Yield what a process says."""
    torch.set_num_threads(job.threads)
    pin = job.device == "cuda"
    with open_stream(job.shards, batch_size=job.batch_size, cache=job.cache, pin=pin) as stream:
        if command == "numerics":
            yield numerics(job, stream, rest[0].split(","), bool(rest[1]))
        else:
            yield from serve(job, stream, lines)


def serve(job: Job, stream: Stream, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Warm up, then run a lap for each line that comes: how many steps before, and how many with the clock."""
    trainer = OPENERS[job.kind](job, stream)
    yield asdict(trainer.lap(0, job.warmup))
    forget_peak(trainer.device)
    for line in lines:
        lead, steps = map(int, line.split())
        yield asdict(trainer.lap(lead, steps))


def main(command: str, job: Job, *rest: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for content in answers(command, job, sys.stdin, *rest):
        print(json.dumps(content), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Job(**json.loads(sys.argv[2])), *sys.argv[3:])
