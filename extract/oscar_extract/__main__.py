"""The command `oscar-extract`. Torch and detectron2 are imported only after the arguments are found to be good."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import click

from oscar_common import cli
from oscar_common.config import installed_catalog
from oscar_common.errors import UsageError, nearest
from oscar_common.files import check_output_folder
from oscar_common.progress import say_next
from oscar_common.settings import Catalog, Detector, Extract
from oscar_extract.folder.job_file import FIXED, read_job, resumed
from oscar_extract.folder.stopping import STOP
from oscar_extract.network.download import zoo_config
from oscar_shards.manifest import FILE as MANIFEST
from oscar_shards.manifest import JOB_FILE, LEFT_OUT_FILE, MISSING_FILE, PLAN_FILE

OWN_FILES = (MANIFEST, PLAN_FILE, JOB_FILE, LEFT_OUT_FILE, MISSING_FILE)  # by these it knows its own folder

HELP = """Find regions in images and write them to shards.

Runs Faster R-CNN over every image of a folder or of published datasets and writes region features, boxes and tags, with
the images' texts, into webdataset tar shards that oscar-train reads. A killed run continues when the same command is
given again. Any number of processes, on any nodes that see the folder, work at one job: oscar-extract --resume OUT.
SIGTERM and SIGUSR1 end a process with exit code 143 or 138; the shard that it has in work is given back."""

EXAMPLES = """\
  oscar-extract --images photos --out shards
  oscar-extract --images val2017 --captions captions_val2017.json --out shards
  oscar-extract --images photos --captions txt --out shards --max-boxes 36 --min-boxes 36
  oscar-extract --images list.parquet --out shards
  oscar-extract --dataset coco,vqa,gqa,vg-qa --root data --exclude test_ids.txt --dry-run
  oscar-extract --dataset cc --root cc3m --out shards --workers 8
  oscar-extract --dataset flickr30k --root flickr30k --out shards --scheduler tcp://head:8786
  oscar-extract --images photos --out shards --detector vg-r101 --min-boxes 36 --max-boxes 36
  oscar-extract --images photos --out shards --detector vg-r101 --weights from_caffe_attr.pkl --preset lxmert
  oscar-extract --images photos --out shards --detector vinvl-x152 --weights vinvl_vg_x152c4.pth --classes labelmap.json
  oscar-extract --images photos --out shards --detector COCO-Detection/faster_rcnn_R_50_FPN_3x
  oscar-extract --images photos --out shards --detector faster_rcnn.yaml --weights model_final.pkl
  oscar-extract --images photos --out shards --plan-only
  oscar-extract --resume shards
  oscar-extract --resume shards --check --json
  oscar-extract --pipeline demo"""


@cli.settings_command("extract", Extract, HELP, EXAMPLES, resumed, settled=FIXED)
def command(settings: Extract, catalog: Catalog) -> None:
    """Check the settings, make the plan or take the one that is there, then have it done."""
    joins = click.get_current_context().params.get("resume") is not None
    if settings.check:
        _check(settings, joins)
        return

    with STOP.watched():
        if joins:
            _join(settings)
        else:
            _begin(settings, catalog)


def _begin(settings: Extract, catalog: Catalog) -> None:
    """Do what settings say: estimate a job, plan it, or do it."""
    from oscar_extract.sources.request import make_request

    request = make_request(settings, catalog)
    check(settings)
    entry = choose_detector(settings, catalog)
    needs_detector = not settings.plan_only and settings.rate is None
    if needs_detector:
        _need_detectron2()

    from oscar_extract.plan import plan_of

    plan = plan_of(request, settings)
    from oscar_extract.messages import Job
    from oscar_extract.run import dry_run, run, write_job

    job = Job(out=Path(settings.out or ".").absolute(), settings=settings, entry=entry)
    if settings.dry_run:
        dry_run(job, plan)
        print("next: the same command without --dry-run", file=sys.stderr)
    elif settings.plan_only:
        write_job(job, plan)
        say_next("oscar-extract", "--resume", settings.out)
    else:
        run(job, plan)
        photos = ["--images", settings.images] if settings.images and Path(settings.images).is_dir() else []
        say_next("oscar-shards", "show", settings.out, *photos)


def _join(settings: Extract) -> None:
    """Work at the job of a folder, beside whoever else does."""
    check(settings)
    _need_detectron2()
    out = Path(settings.out or ".")
    _, entry = read_job(out)
    from oscar_extract.messages import Job
    from oscar_extract.plan import joined_plan
    from oscar_extract.run import run
    from oscar_extract.sources.remote import cache_of

    run(Job(out=out.absolute(), settings=settings, entry=entry), joined_plan(out, cache_of(settings)), joins=True)


def _check(settings: Extract, joins: bool) -> None:
    """Print how far the job of a folder is.

    Raises:
        OperationError: it is not complete.
    """
    if not joins:
        raise UsageError("--check: it goes with --resume OUT")

    from oscar_extract.folder.progress import as_json, check_complete, print_progress, progress_of

    progress = progress_of(Path(settings.out or "."))
    if settings.json:
        print(json.dumps(as_json(progress)))
    else:
        print_progress(progress)

    check_complete(progress)


def _need_detectron2() -> None:
    if importlib.util.find_spec("detectron2") is None:
        raise UsageError("detectron2 is not installed; install it with: python -m oscar_extract.install_detectron2")


def check(settings: Extract) -> None:
    """Refuse settings that cannot be, before anything is looked at.

    Raises:
        UsageError: in one line.
    """
    if settings.out is None and not settings.dry_run:
        raise UsageError("no place for the shards: give --out DIR")
    if settings.rate is not None and not settings.dry_run:
        raise UsageError(f"--rate {settings.rate:g}: it goes with --dry-run")
    if settings.plan_only and settings.dry_run:
        raise UsageError("--plan-only writes the plan, --dry-run writes nothing: give one of them")
    if settings.json:
        raise UsageError("--json: it goes with --resume OUT --check")
    if settings.min_boxes is not None and settings.max_boxes is not None and settings.min_boxes > settings.max_boxes:
        raise UsageError(f"--min-boxes {settings.min_boxes} is more than --max-boxes {settings.max_boxes}")
    if not settings.name.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"--name {settings.name!r}: allowed are letters, digits, - and _")
    if settings.scheduler and settings.workers:
        raise UsageError(
            "--workers is for this machine; with --scheduler its own workers do the work: give one of them"
        )

    if settings.out is not None and not settings.dry_run:
        check_output_folder(Path(settings.out), "--out", OWN_FILES)


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
    chosen = dataclasses.replace(entry, **{name: flag for name, flag in flags.items() if flag is not None})
    if chosen.config == "builtin" and chosen.weights is None and chosen.preset not in (None, "detectron2"):
        raise UsageError(
            f"--preset {chosen.preset}: the built-in detector follows detectron2; leave --preset out, or give another "
            "--detector"
        )

    return chosen


def main() -> None:
    """Run the command line."""
    cli.run(command, continues=True)


if __name__ == "__main__":
    main()
