"""What features stored as int8 cost: their error, and the losses of the same short pre-training on them.

    python bench/int8.py --shards runs/shards

The samples of a folder of float16 shards are written again as int8. Then the same pre-training is done on both, once
for each seed; a seed decides order, masks and new weights alike for both, so its two runs make a pair. How far the
losses of a pair lie apart means something only beside how far those of two seeds do. The numbers go to
bench/results/int8.json.

With --checkpoint, a model that was trained already is asked about the same batches in both forms instead, without
dropout: how far its losses move is the effect of the rounding alone. Its losses with all features 0 ("nothing") say how
much it has learnt to look at them. That is added to the file.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from oscar_common.sample import Sample
from oscar_shards.manifest import Layout, write_manifest
from oscar_shards.quantise import dequantise, quantise
from oscar_shards.read import ShardFolder, open_folder, read_samples
from oscar_shards.write import write_shard
from oscar_train.checkpoints.init import build, open_init
from oscar_train.data.stream import open_stream
from oscar_train.model.losses import evaluate
from oscar_train.model.packing import pack

DTYPES = ("float16", "int8")
LOSSES = ("mlm_loss", "match_loss")
LAST = 50  # steps whose mean loss is compared


@click.command(help=__doc__)
@click.option("--shards", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of float16 shards.")
@click.option("--init", default="random:tiny", show_default=True, help="As oscar-train's.")
@click.option("--steps", default=300, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--warmup-steps", default=30, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="Do not train; ask this model.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results"), help="Folder for the numbers.")
def main(shards: Path, init: str, out: Path, seeds: int, checkpoint: Path | None, **settings: Any) -> None:
    if checkpoint is not None:
        ask(shards, checkpoint, settings["batch_size"], out)
        return
    with tempfile.TemporaryDirectory() as place:
        folders = {"float16": shards, "int8": Path(place, "int8")}
        report: dict[str, Any] = {"features": features(open_folder(shards), folders["int8"])}
        report |= {"init": init, **settings, "losses_of_the_last_steps": LAST}
        arguments = [
            "--init",
            init,
            *(str(part) for n, v in settings.items() for part in (f"--{n}".replace("_", "-"), v)),
        ]
        runs = [
            {"seed": seed, "dtype": dtype}
            | run(["--shards", str(folders[dtype]), *arguments, "--seed", str(seed)], Path(place, f"{dtype}-{seed}"))
            for seed in range(seeds)
            for dtype in DTYPES
        ]
    report |= {"runs": runs, "compared": {loss: compare(runs, loss) for loss in LOSSES}, **circumstances()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "int8.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def features(folder: ShardFolder, out: Path) -> dict[str, Any]:
    """Write the samples of a folder as int8; return the features' error (root mean square, relative) and the bytes."""
    out.mkdir()
    layout = Layout(feature_dim=folder.manifest.detector.feature_dim, dtype="int8")
    errors: list[tuple[float, float]] = []  # squares of an image's errors, and of its features
    images = 0
    for tar in folder.tars:
        samples = list(read_samples(tar))
        write_shard(out / tar.name, samples, layout)
        errors += [squares(sample) for sample in samples if len(sample.regions.tags)]
        images += len(samples)
    write_manifest(out, replace(folder.manifest, detector=replace(folder.manifest.detector, dtype="int8")))
    wrong, whole = np.array(errors).T
    sizes = {
        dtype: {
            "tar_bytes": sum(tar.stat().st_size for tar in tars),
            "features_bytes": int(sum(np.sum(opened.table[n].fill_null(0).to_numpy()) for n in ARRAYS)),
        }
        for dtype, opened in (("float16", folder), ("int8", open_folder(out)))
        for tars in [opened.tars]
    }
    return {
        "detector": folder.manifest.detector.name,
        "feature_dim": layout.feature_dim,
        "images": images,
        "regions": int(np.sum(folder.table["num_boxes"].to_numpy())),
        "relative_rms_error": {
            "overall": float(np.sqrt(wrong.sum() / whole.sum())),
            "mean_of_images": float(np.sqrt(wrong / whole).mean()),
            "worst_image": float(np.sqrt(wrong / whole).max()),
        },
        "bytes": sizes,
    }


ARRAYS = ("features_bytes", "scales_bytes")


def squares(sample: Sample) -> tuple[float, float]:
    exact = sample.regions.features.astype(np.float64)
    error = dequantise(*quantise(sample.regions.features)) - exact
    return float(np.square(error).sum()), float(np.square(exact).sum())


def run(arguments: list[str], out: Path) -> dict[str, float]:
    """Pre-train once, by the command; return the mean losses and accuracies of the last steps."""
    line = [sys.executable, "-m", "oscar_train", *arguments, "--out", str(out), "--checkpoint-every", "1000000"]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))[-LAST:]
    names = (*LOSSES, "mlm_accuracy", "match_accuracy", "samples_per_second")
    return {name: statistics.fmean(float(row[name]) for row in rows) for name in names}


def ask(shards: Path, checkpoint: Path, batch_size: int, out: Path) -> None:
    """Add to the report what a trained model's losses are on the same batches with either kind of features."""
    with tempfile.TemporaryDirectory() as place:
        features(open_folder(shards), Path(place, "int8"))
        folders = (shards, Path(place, "int8"))
        losses = {d: batch_losses(f, checkpoint, batch_size) for d, f in zip(DTYPES, folders, strict=True)}
    losses["nothing"] = batch_losses(shards, checkpoint, batch_size, blank=True)
    report = json.loads((out / "int8.json").read_text()) if (out / "int8.json").exists() else {}
    report["same_weights"] = {
        "checkpoint": str(checkpoint),
        "batches": LAST,
        "batch_size": batch_size,
        **{
            name: {
                "mean": {dtype: float(found[:, column].mean()) for dtype, found in losses.items()},
                "mean_difference": float((losses["int8"] - losses["float16"])[:, column].mean()),
                "largest_difference_of_a_batch": float(np.abs(losses["int8"] - losses["float16"])[:, column].max()),
            }
            for column, name in enumerate(LOSSES)
        },
        **circumstances(),
    }
    (out / "int8.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["same_weights"], indent=1))


@torch.inference_mode()
def batch_losses(shards: Path, checkpoint: Path, batch_size: int, blank: bool = False) -> npt.NDArray[np.float64]:
    """Return masked token loss and contrastive loss of some batches, [batches, 2]; `blank`: all features are 0."""
    start = open_init(str(checkpoint))
    losses = []
    with open_stream([str(shards)], batch_size=batch_size, seed=1000, tokenizer=start.tokenizer) as stream:
        model = build(start, stream.corpus.feature_dim, 0)[0].eval()
        for batch in stream.batches(0, LAST):
            shown = replace(batch, features=torch.zeros_like(batch.features)) if blank else batch
            packed = pack(shown, torch.device("cpu"))
            words, pairs = model(packed)
            outcome = evaluate(words, pairs, packed)
            losses.append([outcome.mlm_loss.item(), outcome.match_loss.item()])
    return np.array(losses)


def compare(runs: list[dict[str, Any]], loss: str) -> dict[str, Any]:
    """Return each dtype's losses over seeds, how far int8's lie above float16's seed by seed, and the seeds' spread."""
    of = {dtype: [r[loss] for r in runs if r["dtype"] == dtype] for dtype in DTYPES}
    pairs = [b - a for a, b in zip(*of.values(), strict=True)]
    return {
        "mean": {dtype: statistics.fmean(values) for dtype, values in of.items()},
        "spread_of_seeds": {dtype: statistics.stdev(values) for dtype, values in of.items() if len(values) > 1},
        "int8_less_float16": pairs,
        "mean_difference": statistics.fmean(pairs),
    }


def circumstances() -> dict[str, Any]:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "command": " ".join(["python", *(a if a.startswith("bench/") else Path(a).name for a in sys.argv)]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[2], 1),  # of the last 15 minutes
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def show(report: dict[str, Any]) -> None:
    console, found = Console(), report["features"]
    error, sizes = found["relative_rms_error"], found["bytes"]
    console.print(
        f"{found['images']:,} images, {found['regions']:,} regions of {found['feature_dim']} numbers: error "
        f"{error['overall']:.3%} overall, {error['mean_of_images']:.3%} an image, {error['worst_image']:.3%} the "
        f"worst; tars {sizes['float16']['tar_bytes']:,} → {sizes['int8']['tar_bytes']:,} bytes"
    )
    table = Table("", *DTYPES, "difference by seed", "spread of seeds")
    for loss, said in report["compared"].items():
        pairs = ", ".join(f"{d:+.4f}" for d in said["int8_less_float16"])
        spread = " / ".join(f"{s:.4f}" for s in said["spread_of_seeds"].values())
        table.add_row(loss, *(f"{said['mean'][dtype]:.4f}" for dtype in DTYPES), pairs, spread)
    console.print(table)


if __name__ == "__main__":
    main()
