"""The training loop: step s is a function of the model after step s - 1, the shards and the settings alone."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import nn
from torch.optim import AdamW

from oscar_common.device import choose_device
from oscar_common.errors import OperationError
from oscar_common.files import locked
from oscar_common.settings import Train
from oscar_train import checkpoint
from oscar_train.checkpoint import Checkpoint
from oscar_train.corpus import Corpus
from oscar_train.draws import dropout_seed
from oscar_train.metrics import Log, Row, open_log
from oscar_train.model import OscarForPreTraining
from oscar_train.objective import Outcome, evaluate
from oscar_train.sources import Source, warn
from oscar_train.stream import Batch, Stream, open_stream
from oscar_train.tokens import Tokenizer
from oscar_train.triples import IGNORED
from oscar_train.weights import build, open_init

NOTHING = 20  # steps without any image after which a run ends


class Stopped(OperationError):
    """A signal ended the run between two steps; exits as the signal itself would have."""

    def __init__(self, cause: signal.Signals, step: int) -> None:
        super().__init__(f"stopped by {cause.name}; step {step} is saved; the same command again continues")
        self.exit_code = 128 + cause  # type: ignore[misc]


@dataclass(frozen=True)
class Run:
    """A run under way. identity: what a rerun must have in common with it."""

    settings: Train
    out: Path
    identity: dict[str, object]
    stream: Stream
    model: OscarForPreTraining
    optimizer: AdamW
    device: torch.device
    log: Log


def train(settings: Train, sources: list[Source], out: Path) -> None:
    """Train to the end, from the newest checkpoint in `out` or from the beginning.

    Raises:
        UsageError: --init, --shards or what is in `out` does not fit.
        OperationError: a loss that is no number, a shard or disk that fails, or a signal.
    """
    device = torch.device(choose_device(settings.device))
    with locked(out, "--out"):
        checkpoint.sweep(out)
        last, damages = (None, []) if settings.overwrite else checkpoint.newest(out)
        identity = checkpoint.identity(settings)
        checkpoint.agree(last, identity)  # before the texts are read, which may take minutes
        start = open_init(settings.init)
        with _stream(settings, sources, start.tokenizer, device) as stream:
            identity["corpus"] = stream.corpus.fingerprint
            checkpoint.agree(last, identity)
            for damage in damages:
                warn(f"{damage}; going on from {last.folder}" if last else damage)
            if last is not None and last.step == settings.steps:
                print(f"complete: all {last.step} steps are done; the model is in {last.folder}")
                return
            model, origin = build(start, stream.corpus.feature_dim, settings.seed)
            checkpoint.check_space(out, model)
            if settings.overwrite:
                checkpoint.sweep(out, everything=True)
            model.to(device)
            optimizer = make_optimizer(model, settings)
            with open_log(out, last.step if last else 0, settings.steps, settings.log_every) as log:
                log.say(describe(stream.corpus))
                log.say(f"{origin}; on {device}")
                _train(Run(settings, out, identity, stream, model, optimizer, device, log), last)


def _stream(
    settings: Train, sources: list[Source], tokenizer: Tokenizer, device: torch.device
) -> AbstractContextManager[Stream]:
    return open_stream(
        sources,
        batch_size=settings.batch_size,
        seed=settings.seed,
        tokenizer=tokenizer,
        texts=settings.texts,
        mix=settings.mix,
        window=settings.shuffle_window,
        threads=settings.read_threads,
        cache=settings.cache,
        cache_size=settings.cache_size,
        skip_corrupt=settings.skip_corrupt,
        pin=device.type == "cuda",
    )


def _train(run: Run, last: Checkpoint | None) -> None:
    """Do the steps that are left, and say where the result is."""
    done, steps = last.step if last else 0, run.settings.steps
    if last is not None:
        checkpoint.load(last, run.model, run.optimizer)
        run.log.say(f"going on after step {done} of {steps}, from {last.folder}")
    began = lap = time.monotonic()
    nothing = 0
    with stop_signals() as stopped:
        for step, batch in enumerate(run.stream.batches(done, steps), done + 1):
            nothing = 0 if (batch.match_labels != IGNORED).any() else nothing + 1
            if nothing == NOTHING:
                raise OperationError(
                    f"step {step}: no image of {NOTHING} steps could be read, all were skipped; are the --shards there?"
                )
            outcome = _step(run, step, batch)
            if step % run.settings.log_every == 0 or step == steps:
                run.log.add(_row(run, step, batch, outcome, time.monotonic() - lap))
            if step % run.settings.checkpoint_every == 0 or step == steps or stopped:
                last = _save(run, step)
            if stopped and step < steps:
                raise Stopped(stopped[0], step)
            lap = time.monotonic()
    assert last is not None  # at least one step was left, and the last step is always saved
    seconds = time.monotonic() - began
    rate = (steps - done) * run.settings.batch_size / seconds
    run.log.say(f"done: {steps - done} steps in {seconds:.0f} s, {rate:.1f} samples/s; the model is in {last.folder}")


def _step(run: Run, step: int, batch: Batch) -> Outcome:
    """Set what belongs to the step, counted from 1 (learning rate, dropout's seed), and do it."""
    for group in run.optimizer.param_groups:
        group["lr"] = _rate(run.settings, step)
    torch.manual_seed(dropout_seed(run.settings.seed, step))
    return update(run.model, run.optimizer, batch.to(run.device), run.settings.max_grad_norm, step)


def _rate(settings: Train, step: int) -> float:
    return settings.lr * schedule(step - 1, settings.warmup_steps, settings.steps)


def _row(run: Run, step: int, batch: Batch, outcome: Outcome, seconds: float) -> Row:
    return Row(
        step=step,
        epoch=run.stream.epoch(step - 1),
        loss=outcome.loss.item(),
        mlm_loss=outcome.mlm_loss.item(),
        match_loss=outcome.match_loss.item(),
        mlm_accuracy=outcome.mlm_accuracy.item(),
        match_accuracy=outcome.match_accuracy.item(),
        lr=_rate(run.settings, step),
        skipped=int((batch.match_labels == IGNORED).sum()),
        samples_per_second=run.settings.batch_size / seconds,
    )


def update(model: OscarForPreTraining, optimizer: AdamW, batch: Batch, max_grad_norm: float, step: int) -> Outcome:
    """Forward, backward, clip, AdamW. A `max_grad_norm` of 0 does not clip.

    Raises:
        OperationError: the loss or the gradient is not finite; the model is as it was before.
    """
    model.train()
    words, pairs = model(batch)
    outcome = evaluate(words, pairs, batch)
    optimizer.zero_grad()
    outcome.loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    if not math.isfinite(outcome.loss.item() + norm.item()):
        raise OperationError(
            f"step {step}: loss {outcome.loss.item():.4g} and gradient norm {norm.item():.4g} are not both finite; "
            "try a smaller --lr or more --warmup-steps, or look for damaged features in --shards"
        )
    optimizer.step()
    return outcome


def schedule(step: int, warmup: int, total: int) -> float:
    """Return the factor of the learning rate at a step counted from 0.

    It rises linearly to 1 in `warmup` steps, then falls linearly, to reach 0 after the last step.
    """
    return (step + 1) / (warmup + 1) if step < warmup else (total - step) / (total - warmup)


def make_optimizer(model: nn.Module, settings: Train) -> AdamW:
    """Return AdamW without weight decay on biases and LayerNorms (every parameter with one dimension)."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def describe(corpus: Corpus) -> str:
    """Say what is trained on."""
    textless = corpus.textless
    without = f"; {textless:,} images have no text and are left out" if textless else ""
    return f"{len(corpus):,} triples of {len(corpus.images.shard) - textless:,} images{without}"


def _save(run: Run, step: int) -> Checkpoint:
    run.log.settle()  # first: metrics.csv must not end before a checkpoint that a rerun goes on from
    made = checkpoint.save(run.out, step, run.identity, run.model, run.optimizer, run.stream.corpus.tokenizer)
    checkpoint.prune(run.out, run.settings.keep)
    return made


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGTERM and SIGINT in a list, for the loop to see after the step; a second one acts at once."""
    arrived: list[signal.Signals] = []
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(signal.Signals(number))
        restore()

    for each in before:
        signal.signal(each, note)
    try:
        yield arrived
    finally:
        restore()
