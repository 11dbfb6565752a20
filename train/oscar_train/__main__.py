"""oscar-train: from a folder of shards to a pre-trained Oscar."""

import os
from pathlib import Path

from oscar_common.cli import run, settings_command
from oscar_common.memory import lacks_memory
from oscar_common.progress import say_next
from oscar_common.settings import Catalog, Train
from oscar_train.arguments import FEW_SHAPES, check
from oscar_train.checkpoints.run_settings import resumed
from oscar_train.training.signals import Stop, watched_signals

HELP = """Pre-train Oscar on shards made by oscar-extract.

Reads (caption, object tags, regions) triples, hides 15 % of the tokens, swaps the tags of half the triples, and trains
a BERT to find both out; --recipe and --objective name other ways. Writes checkpoints in the layout of Hugging Face,
metrics.csv and TensorBoard logs to --out.

The same command again, or --resume OUT, continues from the newest checkpoint, to the same numbers as a run that was
never stopped. SIGTERM and SIGUSR1 end a run after the step at hand, with a checkpoint and exit code 143 or 138.
"""
EXAMPLES = """  oscar-train --shards shards --out run --init random:tiny --steps 200 --lr 1e-3
  oscar-train --shards shards --out run --recipe oscar-base
  torchrun --nproc-per-node 8 -m oscar_train --shards shards --out run --recipe oscar-plus-base --precision bf16
  oscar-train --resume run
  oscar-train --shards shards --texts more.parquet --out run
  oscar-train --shards s3://bucket/coco --shards s3://bucket/cc --mix 2 --mix 1 --cache /scratch/cache --out run
  oscar-train --pipeline demo
"""


@settings_command("train", Train, HELP, EXAMPLES, resumed)
def command(settings: Train, catalog: Catalog) -> None:
    """Check the arguments, open the shards, and only then import torch."""
    out = check(settings)
    with watched_signals() as stop:
        _train(settings, out, stop)


def _train(settings: Train, out: Path, stop: Stop) -> None:
    from oscar_train.data.sources import check_together, open_source

    sources = [open_source(place, settings.skip_corrupt) for place in settings.shards]
    beside = [open_source(place, settings.skip_corrupt, "--eval-shards") for place in settings.eval_shards]
    check_together([*sources, *beside])
    from oscar_train.training.auto_batch_size import lacking
    from oscar_train.training.loop import train

    try:
        train(settings, sources, out, stop, beside)
    except Exception as error:  # each library has its own for a lack of memory
        if not lacks_memory(error):
            raise
        raise lacking(settings) from None

    if os.environ.get("RANK", "0") == "0":
        held_out = settings.eval_shards or settings.eval_fraction
        say_next(*(("oscar-evaluate", out) if held_out else ("oscar-checkpoint", "show", out)))


def main() -> None:
    """Run the command."""
    run(command, environment=FEW_SHAPES, continues=True)


if __name__ == "__main__":
    main()
