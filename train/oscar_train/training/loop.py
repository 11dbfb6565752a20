"""The training loop: step s is a function of the model after step s - 1, the shards and the settings alone."""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from oscar_common.errors import Stopped
from oscar_common.files import locked
from oscar_common.progress import plural, warn
from oscar_common.settings import AUTO, Train
from oscar_train.arguments import check_ranks
from oscar_train.checkpoints import checkpoint, run_settings
from oscar_train.checkpoints.checkpoint import Checkpoint
from oscar_train.checkpoints.init import open_init
from oscar_train.data.sources import Source, manifest_sha256
from oscar_train.data.stream import Stream, open_stream
from oscar_train.data.texts.tags import TagRule, tag_rule
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.evaluation.in_training import HeldOut, holding_out, is_due
from oscar_train.evaluation.measure import Answering, Interrupted, answer
from oscar_train.logs.log import Log, open_log
from oscar_train.logs.provenance import record_start
from oscar_train.model.flops import count
from oscar_train.objectives import choose_region_init
from oscar_train.ranks import Ranks, joined
from oscar_train.tasks import pretraining
from oscar_train.tasks.task import Evaluation, Task
from oscar_train.training.auto_batch_size import check_part, check_weights, largest_batch
from oscar_train.training.region_init import anchor
from oscar_train.training.reports import Reports, Run
from oscar_train.training.schedule import rate
from oscar_train.training.signals import Stop
from oscar_train.training.step import check_graphs, make_train_state, rehearse, shares, take

MakeTask = Callable[[Any, Sequence[Source], Tokenizer], Task]


def train(
    settings: Train,
    sources: list[Source],
    out: Path,
    stop: Stop,
    eval_sources: Sequence[Source] = (),
    make_task: MakeTask = pretraining.make_task,
) -> None:
    """Train to the end, from the newest checkpoint in `out` or from the beginning.

    Args:
        make_task: what is trained; a function of (settings, all sources, tokenizer).

    Raises:
        UsageError: --init, --shards or what is in `out` does not fit.
        OperationError: too many steps that had to be skipped, a shard or disk that fails.
        Stopped: by a signal.
    """
    tags = tag_rule(settings)
    with joined(settings.device) as ranks, locked(out, "--out") if ranks.first else nullcontext():
        check_graphs(settings, ranks)
        last = _newest(out, settings.overwrite, ranks)
        if settings.batch_size == AUTO and last is not None:
            settings = replace(settings, batch_size=last.run["batch_size"])
            check_ranks(settings)

        checkpoint.agree(last, checkpoint.identity(settings))  # before the texts are read, which may take minutes
        start = open_init(settings.init if last is None else str(last.folder))
        feature_dim = sources[0].manifest.detector.feature_dim
        task = make_task(settings, [*sources, *eval_sources], start.tokenizer)
        check_weights(settings, start, feature_dim, ranks, task)
        if settings.batch_size == AUTO:
            batch_size = largest_batch(settings, start, feature_dim, ranks, _triples(settings, sources), task)
            settings = replace(settings, batch_size=batch_size)

        with (
            holding_out(settings, eval_sources, tags, start.tokenizer, task) as held,
            _stream(settings, sources, tags, start.tokenizer, ranks, held) as stream,
        ):
            identity = {**checkpoint.identity(settings), **task.identity, "corpus": stream.fingerprint}
            checkpoint.agree(last, identity)
            if last is not None and last.step == settings.steps:
                if ranks.first:
                    print(f"complete: all {last.step} steps are done; the model is in {last.folder}")
                return

            evaluation = held.evaluation(stream)
            begin = partial(anchor, stream=stream) if choose_region_init(settings) == "tags" else None
            model, origin = task.build(start, feature_dim, begin)
            if ranks.first:
                _prepare(out, settings, model)
                record_start(
                    out,
                    step=last.step if last else 0,
                    device=ranks.device,
                    ranks=ranks.size,
                    shards=sources,
                    eval_shards=eval_sources,
                )

            train_state = make_train_state(model.to(ranks.device), settings, ranks, task)
            with _open_log(out, last, settings, task, evaluation, ranks) as log:
                about = {"tags": asdict(tags), "shards": list(map(manifest_sha256, sources)), **task.about}
                run = Run(settings, out, identity, about, stream, train_state, evaluation, log)
                run.say(describe(stream, evaluation))
                if settings.tags == "ground-truth" and ranks.first and not stream.corpus.ground_truth:
                    warn("--tags ground-truth: no image of --shards has any; all q are tags of the detector")

                run.say(f"{origin if last is None else last.folder}; on {_place(ranks)}")
                _train(run, last, stop)


def _triples(settings: Train, sources: list[Source]) -> int:
    """Return about how many triples are trained on, before the texts are read."""
    texts = sum(source.manifest.plan.num_texts for source in sources)
    return int(texts * (1 - settings.eval_fraction))


def _prepare(out: Path, settings: Train, model: Any) -> None:
    """Make the run folder ready."""
    checkpoint.check_space(out, model)
    if settings.overwrite:
        checkpoint.sweep(out, everything=True)
    run_settings.write_settings(out, settings)


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
    settings: Train, sources: list[Source], tags: TagRule, tokenizer: Tokenizer, ranks: Ranks, held: HeldOut
) -> AbstractContextManager[Stream]:
    return open_stream(
        sources,
        batch_size=settings.batch_size,
        seed=settings.seed,
        tokenizer=tokenizer,
        shape=held.task.shape,
        composer=held.task.composer,
        tags=tags,
        texts=settings.texts,
        mix=settings.mix,
        window=settings.shuffle_window,
        only=held.trained,
        rank=ranks.rank,
        ranks=ranks.size,
        threads=settings.read_threads,
        cache=settings.cache,
        cache_size=settings.cache_size,
        skip_corrupt=settings.skip_corrupt,
        pin=ranks.device.type == "cuda",
    )


def _open_log(
    out: Path, last: Checkpoint | None, settings: Train, task: Task, evaluation: Evaluation | None, ranks: Ranks
) -> AbstractContextManager[Log | None]:
    if not ranks.first:
        return nullcontext()

    return open_log(
        out,
        last.step if last else 0,
        settings.steps,
        settings.log_every,
        shown=task.shown,
        evaluation=evaluation.names if evaluation is not None else (),
        wandb=settings.wandb,
        config=asdict(settings),
    )


def _place(ranks: Ranks) -> str:
    return f"{ranks.device}" if ranks.size == 1 else f"{ranks.size} x {ranks.device.type}"


def _train(run: Run, last: Checkpoint | None, stop: Stop) -> None:
    """Do the steps that are left, and say where the result is."""
    done, steps = last.step if last else 0, run.settings.steps
    check_part(run.train_state, run.stream)
    rehearse(run.train_state, run.stream.buffer().batch)
    if last is not None:
        checkpoint.load(last, run.train_state.model, run.train_state.optimizer, run.train_state.ranks.size)
        run.train_state.guard.restore(last.guard)
        run.say(f"going on after step {done} of {steps}, from {last.folder}")

    began = time.monotonic()
    with stop.deferred():
        _go_on(run, done, stop)

    seconds = time.monotonic() - began
    pace = (steps - done) * run.settings.batch_size / seconds
    folder = checkpoint.folder(run.out, steps)
    run.say(f"done: {plural(steps - done, 'step')} in {seconds:.0f} s, {pace:.1f} samples/s; the model is in {folder}")


def _go_on(run: Run, done: int, stop: Stop) -> None:
    """Do the steps after the first `done`; what each came to is read while the next one is under way."""
    settings, alone = run.settings, run.train_state.ranks.size == 1
    if _lacks_evaluation(run, done) and _evaluate(run, done, stop):
        raise Stopped(f"before step {done + 1}; the same command again continues", stop.cause or signal.SIGTERM)

    reports = Reports(run)
    for step, work in enumerate(shares(run.train_state, run.stream.batches(done, settings.steps)), done + 1):
        report = take(run.train_state, work, rate(settings, step), stop.cause is not None)
        reports.add(step, report, count(work.parts))
        stopped = reports.read(left=1) or (alone and stop.cause is not None)

        evaluates = run.evaluation is not None and is_due(settings, step)
        saves = step % settings.checkpoint_every == 0 or step == settings.steps
        if not (stopped or evaluates or saves):
            continue

        stopped = reports.read() or stopped
        if evaluates and not stopped:
            stopped = _evaluate(run, step, stop)

        if stopped or saves:
            _save(run, step)

        if step < settings.steps and (stopped or (alone and saves and stop.cause)):
            _stop_after(run, step, stop)

        reports.rested()


def _stop_after(run: Run, step: int, stop: Stop) -> NoReturn:
    """End the run after a step that is saved, on all ranks together.

    Raises:
        Stopped: always; with SIGTERM as its cause if the signal reached other ranks alone.
    """
    run.train_state.ranks.gather()
    raise Stopped(f"after step {step}, which is saved; the same command again continues", stop.cause or signal.SIGTERM)


def _lacks_evaluation(run: Run, step: int) -> bool:
    """Whether a run that goes on was stopped before, or while, what it had learned was asked."""
    if run.evaluation is None or not is_due(run.settings, step):
        return False
    lacks = run.log is not None and run.log.evaluated < step
    return bool(run.train_state.ranks.total(torch.tensor(float(lacks), device=run.train_state.ranks.device)))


def _evaluate(run: Run, step: int, stop: Stop) -> bool:
    """Evaluate after a step and log the result; return whether a rank was asked to stop meanwhile."""
    assert run.evaluation is not None
    settings, ranks = run.settings, run.train_state.ranks
    answering = Answering(
        forward=partial(answer, run.train_state.model, settings.precision),
        ranks=ranks,
        size=max(1, settings.batch_size // ranks.size // settings.accumulate),
        stopped=lambda: stop.cause is not None,
    )

    try:
        values = run.evaluation.measure(answering)
    except Interrupted:
        return True

    if run.log is not None:
        run.log.add_evaluation(step, values, f"step {step}/{settings.steps}  {run.evaluation.line(values)}")

    return False


def describe(stream: Stream, evaluation: Evaluation | None = None) -> str:
    """Say what is trained on, and what is held out."""
    corpus, textless = stream.corpus, stream.corpus.textless
    triples, images = len(corpus), len(corpus.images.shard) - textless
    if stream.only is not None:
        triples, images = len(stream.only), len(np.unique(corpus.image[stream.only]))

    without = f"; left out: {plural(textless, 'image')} without text" if textless else ""
    truth = f"; q are ground-truth tags of {corpus.ground_truth:,} images" if corpus.ground_truth else ""
    suffix = f"; evaluated on {evaluation.description}" if evaluation is not None else ""
    return f"{plural(triples, 'triple')} of {plural(images, 'image')}{without}{truth}{suffix}"


def _save(run: Run, step: int) -> None:
    """Write a checkpoint, by the first rank."""
    if run.log is None:
        return

    run.log.settle()  # first: metrics.csv must not end before a checkpoint that a rerun goes on from
    checkpoint.save(
        run.out,
        step,
        run.identity,
        run.train_state.model,
        run.train_state.optimizer,
        run.stream.corpus.tokenizer,
        ranks=run.train_state.ranks.size,
        guard=run.train_state.guard.state(),
        about=run.about,
    )
    checkpoint.prune(run.out, run.settings.keep, step)
