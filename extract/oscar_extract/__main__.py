"""The command `oscar-extract`. Torch and detectron2 are imported only after the arguments are found to be good."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from oscar_common import cli
from oscar_common.config import installed_catalog
from oscar_common.device import choose_device
from oscar_common.errors import UsageError, nearest
from oscar_common.files import locked
from oscar_common.settings import Catalog, Detector, Extract
from oscar_extract.download import zoo_config

if TYPE_CHECKING:
    from oscar_extract.selection import Selection

HELP = """Find regions in images and write them to shards.

Runs Faster R-CNN over every image of a folder and writes region features, boxes and tags, with the images' texts, into
webdataset tar shards that oscar-train reads. A killed run continues when the same command is given again."""

EXAMPLES = """\
  oscar-extract --images photos --out shards
  oscar-extract --images val2017 --captions captions_val2017.json --out shards
  oscar-extract --images photos --captions txt --out shards --max-boxes 36 --min-boxes 36
  oscar-extract --images photos --out shards --detector vg-r101 --min-boxes 36 --max-boxes 36
  oscar-extract --images photos --out shards --detector vg-r101 --weights from_caffe_attr.pkl --preset lxmert
  oscar-extract --images photos --out shards --detector vinvl-x152 --weights vinvl_vg_x152c4.pth --classes labelmap.json
  oscar-extract --images photos --out shards --detector COCO-Detection/faster_rcnn_R_50_FPN_3x
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
    if settings.min_boxes is not None and settings.max_boxes is not None and settings.min_boxes > settings.max_boxes:
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
    from oscar_extract.detector import compile_network, load_detector
    from oscar_extract.job import run_job
    from oscar_extract.summary import check_rejects, print_start, print_summary

    detector = load_detector(settings.detector, entry, choose_device(settings.device), settings.precision)
    if settings.compile:
        compile_network(detector.model)
    selection = choose_selection(settings, detector.preset.selection)
    print_start(plan, detector, out)
    with locked(out, "--out"):
        time = run_job(plan, detector, selection, settings, out)
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
    """Return the `detectors:` entry that `--detector` names, or one for the model zoo or a file; flags win over it."""
    known = installed_catalog().detectors | catalog.detectors
    if settings.detector in known:
        entry = known[settings.detector]
    elif zoo_config(settings.detector) or Path(settings.detector).suffix in (".yaml", ".yml"):
        entry = Detector(config=settings.detector)
    else:
        hint = nearest(settings.detector, known)
        raise UsageError(
            f"--detector {settings.detector}: not a .yaml config file, not in detectron2's model zoo, "
            f"and not a known name{hint}"
        )
    flags = {name: getattr(settings, name) for name in ("weights", "classes", "attributes", "preset")}
    return dataclasses.replace(entry, **{name: flag for name, flag in flags.items() if flag is not None})


def choose_selection(settings: Extract, preset: "Selection") -> "Selection":
    """Return how many regions are kept: what the preset keeps, but for what is given."""
    least, most, threshold = settings.min_boxes, settings.max_boxes, settings.score_threshold
    return dataclasses.replace(
        preset,
        min_boxes=min(preset.min_boxes, most or preset.max_boxes) if least is None else least,
        max_boxes=max(preset.max_boxes, least or 0) if most is None else most,
        score_threshold=preset.score_threshold if threshold is None else threshold,
    )


def main() -> None:
    """Run the command line."""
    cli.run(command)


if __name__ == "__main__":
    main()
