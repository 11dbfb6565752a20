"""The command `oscar-extract`. Torch and detectron2 are imported only after the arguments are found to be good."""

import dataclasses
import importlib.util
from pathlib import Path

from oscar_common import cli
from oscar_common.device import choose_device
from oscar_common.errors import UsageError, nearest
from oscar_common.files import locked
from oscar_common.settings import Catalog, Detector, Extract

HELP = """Find regions in images and write them to shards.

Runs Faster R-CNN over every image of a folder and writes region features, boxes and tags, with the images' texts, into
webdataset tar shards that oscar-train reads. A killed run continues when the same command is given again."""

EXAMPLES = """\
  oscar-extract --images photos --out shards
  oscar-extract --images val2017 --captions captions_val2017.json --out shards
  oscar-extract --images photos --captions txt --out shards --max-boxes 36 --min-boxes 36
  oscar-extract --images photos --out shards --detector faster_rcnn.yaml --weights model_final.pkl
  oscar-extract --pipeline demo"""


@cli.settings_command("extract", Extract, HELP, EXAMPLES)
def command(settings: Extract, catalog: Catalog) -> None:
    """Check the settings, then do the job."""
    settings = with_dataset(settings, catalog)
    if settings.images is None:
        raise UsageError("no images: give --images DIR (or --dataset or --pipeline NAME)")
    if settings.out is None:
        raise UsageError("no place for the shards: give --out DIR")
    if settings.min_boxes > settings.max_boxes:
        raise UsageError(f"--min-boxes {settings.min_boxes} is more than --max-boxes {settings.max_boxes}")
    if not settings.name.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"--name {settings.name!r}: allowed are letters, digits, - and _")
    out, entry = Path(settings.out), choose_detector(settings, catalog)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: it is a file; give a folder")
    if importlib.util.find_spec("detectron2") is None:
        raise UsageError("detectron2 is not installed; install it with: python -m oscar_extract.install_detectron2")
    from oscar_extract.plan import make_plan

    plan = make_plan(Path(settings.images), settings.captions, settings.source, settings.images_per_shard)
    from oscar_extract.detector import load_detector
    from oscar_extract.job import run_job
    from oscar_extract.summary import check_rejects, print_start, print_summary

    detector = load_detector(settings.detector, entry, choose_device(settings.device))
    print_start(plan, detector, out)
    with locked(out, "--out"):
        time = run_job(plan, detector, settings, out)
    print_summary(out, plan, time)
    check_rejects(out, settings.max_reject_fraction)


def with_dataset(settings: Extract, catalog: Catalog) -> Extract:
    """Fill images, captions and source from the `datasets:` entry that `--dataset` names, unless they are given."""
    if settings.dataset is None:
        return settings
    if settings.dataset not in catalog.datasets:
        raise UsageError(f"--dataset: no dataset {settings.dataset!r}{nearest(settings.dataset, catalog.datasets)}")
    entry = catalog.datasets[settings.dataset]
    return dataclasses.replace(
        settings,
        images=settings.images or entry.images,
        captions=settings.captions or entry.captions,
        source=settings.source or entry.source or settings.dataset,
    )


def choose_detector(settings: Extract, catalog: Catalog) -> Detector:
    """Return the `detectors:` entry that `--detector` names, or one for a config file; --weights and --classes win."""
    if settings.detector in catalog.detectors:
        entry = catalog.detectors[settings.detector]
    elif settings.detector == "builtin" or Path(settings.detector).suffix in (".yaml", ".yml"):
        entry = Detector(config=settings.detector)
    else:
        known = nearest(settings.detector, {"builtin", *catalog.detectors})
        raise UsageError(f"--detector {settings.detector}: neither a .yaml config file nor a known name{known}")
    return dataclasses.replace(
        entry, weights=settings.weights or entry.weights, classes=settings.classes or entry.classes
    )


def main() -> None:
    """Run the command line."""
    cli.run(command)


if __name__ == "__main__":
    main()
