"""The training loop: step s is a function of the model after step s - 1, the shards and the settings alone."""

import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from oscar_common.errors import OperationError, Stopped
from oscar_common.files import locked
from oscar_common.settings import Train
from oscar_train import checkpoint, run_folder
from oscar_train.checkpoint import Checkpoint
from oscar_train.corpus import Corpus
from oscar_train.guard import Guard
from oscar_train.metrics import Log, Row, open_log
from oscar_train.objectives import choose_objective
from oscar_train.ranks import Ranks, joined
from oscar_train.signals import Stop
from oscar_train.sources import Source, warn
from oscar_train.step import Result, Workshop, gradient, open_workshop, rate, rehearse, update
from oscar_train.stream import Stream, open_stream
from oscar_train.texts.tags import TagRule, tag_rule
from oscar_train.texts.tokens import Tokenizer
from oscar_train.weights import build, open_init

NOTHING = 20  # steps without any image after which a run ends


@dataclass(frozen=True)
class Run:
    """A run under way. identity: what a rerun must have in common with it. log: of the first rank only."""

    settings: Train
    out: Path
    identity: dict[str, object]
    stream: Stream
    shop: Workshop
    guard: Guard
    log: Log | None

    def say(self, line: str) -> None:
        """Print one line for people, once for all ranks."""
        if self.log is not None:
            self.log.say(line)


def train(settings: Train, sources: list[Source], out: Path, stop: Stop) -> None:
    """Train to the end, from the newest checkpoint in `out` or from the beginning.

    Raises:
        UsageError: --init, --shards or what is in `out` does not fit.
        OperationError: too many steps that had to be skipped, a shard or disk that fails.
        Stopped: by a signal.
    """
    tags = tag_rule(settings)
    with joined(settings.device) as ranks, locked(out, "--out") if ranks.first else nullcontext():
        identity = checkpoint.identity(settings)
        last = _newest(out, settings.overwrite, ranks)
        checkpoint.agree(last, identity)  # before the texts are read, which may take minutes
        start = open_init(settings.init if last is None else str(last.folder))
        with _stream(settings, sources, tags, start.tokenizer, ranks) as stream:
            identity["corpus"] = stream.corpus.fingerprint
            checkpoint.agree(last, identity)
            if last is not None and last.step == settings.steps:
                if ranks.first:
                    print(f"complete: all {last.step} steps are done; the model is in {last.folder}")
                return
            model, origin = build(
                start,
                stream.corpus.feature_dim,
                settings.seed,
                classes=choose_objective(settings).classes,
                image_layernorm=settings.image_layernorm,
            )
            if ranks.first:
                checkpoint.check_space(out, model)
                if settings.overwrite:
                    checkpoint.sweep(out, everything=True)
                run_folder.write_settings(out, settings)
            shop = open_workshop(model.to(ranks.device), settings, ranks)
            guard = Guard(settings.spike, settings.max_skipped)
            with _open_log(out, last, settings, ranks) as log:
                run = Run(settings, out, identity, stream, shop, guard, log)
                run.say(describe(stream.corpus))
                if settings.tags == "ground-truth" and ranks.first and not stream.corpus.ground_truth:
                    warn("--tags ground-truth: no image of --shards has any; all q are tags of the detector")
                run.say(f"{origin if last is None else last.folder}; on {_place(ranks)}")
                _train(run, last, stop)


def _newest(out: Path, overwrite: bool, ranks: Ranks) -> Checkpoint | None:
    """Return the newest whole checkpoint, which the first rank looks for."""
    last = None
    if ranks.first:
        checkpoint.sweep(out)
        last, damages = (None, []) if overwrite else checkpoint.newest(out)
        for damage in damages:
            warn(f"{damage}; going on from {last.folder}" if last else damage)
    step = int(ranks.total(torch.tensor(0 if last is None else last.step, device=ranks.device)))
    return last if ranks.first or not step else checkpoint.at(out, step)


def _stream(
    settings: Train, sources: list[Source], tags: TagRule, tokenizer: Tokenizer, ranks: Ranks
) -> AbstractContextManager[Stream]:
    return open_stream(
        sources,
        batch_size=settings.batch_size,
        seed=settings.seed,
        tokenizer=tokenizer,
        objective=choose_objective(settings),
        tags=tags,
        texts=settings.texts,
        mix=settings.mix,
        window=settings.shuffle_window,
        rank=ranks.rank,
        ranks=ranks.size,
        threads=settings.read_threads,
        cache=settings.cache,
        cache_size=settings.cache_size,
        skip_corrupt=settings.skip_corrupt,
        pin=ranks.device.type == "cuda",
    )


def _open_log(out: Path, last: Checkpoint | None, settings: Train, ranks: Ranks) -> AbstractContextManager[Log | None]:
    if not ranks.first:
        return nullcontext()
    return open_log(out, last.step if last else 0, settings.steps, settings.log_every)


def _place(ranks: Ranks) -> str:
    return f"{ranks.device}" if ranks.size == 1 else f"{ranks.size} x {ranks.device.type}"


def _train(run: Run, last: Checkpoint | None, stop: Stop) -> None:
    """Do the steps that are left, and say where the result is."""
    done, steps = last.step if last else 0, run.settings.steps
    rehearse(run.shop, run.stream.room().batch)
    if last is not None:
        checkpoint.load(last, run.shop.model, run.shop.optimizer, run.shop.ranks.size)
        run.guard.restore(last.guard)
        run.say(f"going on after step {done} of {steps}, from {last.folder}")
    began = lap = time.monotonic()
    nothing = 0
    with stop.deferred():
        for step, batch in enumerate(run.stream.batches(done, steps), done + 1):
            result = gradient(run.shop, batch, stop.cause is not None)
            nothing = 0 if result.triples else nothing + 1
            if nothing == NOTHING:
                raise OperationError(
                    f"step {step}: no image of {NOTHING} steps could be read, all were skipped; are the --shards there?"
                )
            _finish(run, step, result)
            if run.log is not None and (step % run.settings.log_every == 0 or step == steps):
                run.log.add(_row(run, step, result, time.monotonic() - lap))
            if step % run.settings.checkpoint_every == 0 or step == steps or result.stopped:
                _save(run, step)
                if step < steps and (result.stopped or (stop.cause and run.shop.ranks.size == 1)):
                    run.shop.ranks.gather()
                    saved = f"after step {step}, which is saved; the same command again continues"
                    raise Stopped(saved, stop.cause or signal.SIGTERM)  # it may have reached other ranks alone
            lap = time.monotonic()
    seconds = time.monotonic() - began
    pace = (steps - done) * run.settings.batch_size / seconds
    folder = checkpoint.folder(run.out, steps)
    run.say(f"done: {steps - done} steps in {seconds:.0f} s, {pace:.1f} samples/s; the model is in {folder}")


def _finish(run: Run, step: int, result: Result) -> None:
    """Take the step that a gradient is there for, or skip it."""
    fault = run.guard.fault(result.loss, result.norm)
    if not fault:
        update(run.shop, rate(run.settings, step))
        return
    ranks, size = run.shop.ranks, len(result.finite)
    odd = torch.zeros(run.settings.batch_size, dtype=torch.int32, device=ranks.device)
    odd[ranks.rank * size : (ranks.rank + 1) * size] = torch.from_numpy(~result.finite).int().to(ranks.device)
    suspects = ranks.total(odd).bool().tolist()
    keys = run.stream.keys(step - 1)
    chosen = [key for key, suspect in zip(keys, suspects, strict=True) if suspect] if any(suspects) else keys
    run.guard.skip(step, fault, list(dict.fromkeys(chosen)), aloud=ranks.first)


def _row(run: Run, step: int, result: Result, seconds: float) -> Row:
    return Row(
        step=step,
        epoch=run.stream.epoch(step - 1),
        loss=result.loss,
        mlm_loss=result.mlm_loss,
        match_loss=result.match_loss,
        mlm_accuracy=result.mlm_accuracy,
        match_accuracy=result.match_accuracy,
        lr=rate(run.settings, step),
        grad_norm=result.norm,
        skipped=run.settings.batch_size - result.triples,
        skipped_steps=run.guard.skipped,
        samples_per_second=run.settings.batch_size / seconds,
    )


def describe(corpus: Corpus) -> str:
    """Say what is trained on."""
    textless = corpus.textless
    without = f"; {textless:,} images have no text and are left out" if textless else ""
    truth = f"; q are ground-truth tags of {corpus.ground_truth:,} images" if corpus.ground_truth else ""
    return f"{len(corpus):,} triples of {len(corpus.images.shard) - textless:,} images{without}{truth}"


def _save(run: Run, step: int) -> None:
    """Write a checkpoint, by the first rank."""
    if run.log is None:
        return
    run.log.settle()  # first: metrics.csv must not end before a checkpoint that a rerun goes on from
    checkpoint.save(
        run.out,
        step,
        run.identity,
        run.shop.model,
        run.shop.optimizer,
        run.stream.corpus.tokenizer,
        ranks=run.shop.ranks.size,
        guard=run.guard.state(),
    )
    checkpoint.prune(run.out, run.settings.keep)
