"""The job: a plan and a detector to a folder of shards, one whole shard after the other."""

import hashlib
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import detectron2
import numpy as np
import PIL
import torch
import torchvision

import oscar_common
from oscar_common.errors import UsageError
from oscar_common.progress import Meter, meter
from oscar_common.sample import ImageRecord, Regions, Sample
from oscar_common.settings import Extract
from oscar_extract.detector import Detector
from oscar_extract.images import RefusedImage, read_image
from oscar_extract.memory import Limit, detect_within
from oscar_extract.plan import Plan, PlannedImage
from oscar_extract.regions import Input, make_input
from oscar_extract.selection import Selection
from oscar_extract.sources import readable
from oscar_shards.manifest import FILE, Manifest, read_manifest, write_manifest
from oscar_shards.write import Reject, rejects_path, remove_shards, shard_path, write_shard

T = TypeVar("T")
PENDING_BATCHES = 16  # images of odd shapes that may wait for company, in batches ...
PENDING_BYTES = 1 << 30  # ... and in bytes of pixels, as Caffe's resize begins with those of the original
SOFTWARE = (oscar_common, torch, torchvision, detectron2, PIL, np)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A decoded image, ready for the detector."""

    planned: PlannedImage
    input: Input
    record: ImageRecord


def run_job(plan: Plan, detector: Detector, selection: Selection, settings: Extract, out: Path) -> str:
    """Write all shards of the plan that are not in `out` yet, and say how long it took.

    Raises:
        UsageError: `out` holds shards of another detector, plan or settings.
    """
    prepare(out, make_manifest(plan, detector, selection, settings), settings.overwrite)
    tars = [shard_path(out, settings.name, n) for n in range(plan.record.num_shards)]
    todo = [n for n, tar in enumerate(tars) if not _done(tar, settings.retry_rejects)]
    done = plan.record.num_images - sum(len(plan.shard(n)) for n in todo)
    limit = Limit(images=settings.batch_size)
    with meter("images", plan.record.num_images, done) as progress:
        for number in todo:
            items = counted(extract(plan, number, detector, selection, settings, limit), progress)
            write_shard(tars[number], items, detector.record.feature_dim)
    return f"{progress.seconds:,.0f} s, {progress.rate:.1f} images/s" if todo else "nothing was left to do"


def counted(items: Iterable[Sample | Reject], progress: Meter) -> Iterator[Sample | Reject]:
    """Pass items on and show each as progress."""
    for item in items:
        progress.advance(done=1, rejects=isinstance(item, Reject))
        yield item


def _done(tar: Path, retry_rejects: bool) -> bool:
    return tar.exists() and not (retry_rejects and rejects_path(tar).exists())


def make_manifest(plan: Plan, detector: Detector, selection: Selection, settings: Extract) -> Manifest:
    """Return what manifest.json will say. Nothing in it depends on time, place or chance."""
    return Manifest(
        name=settings.name,
        detector=detector.record,
        settings=asdict(selection) | {name: getattr(settings, name) for name in ("batch_size", "precision", "compile")},
        plan=plan.record,
        software={"python": platform.python_version(), "device": str(detector.model.device.type)}
        | {module.__name__: module.__version__ for module in SOFTWARE},
    )


def prepare(out: Path, manifest: Manifest, overwrite: bool) -> None:
    """Make `out` ready: new, continued, or (with `overwrite`) emptied of its shards."""
    if overwrite:
        remove_shards(out)
    if (out / FILE).exists():
        _check_same(out, read_manifest(out, "--out"), manifest)
    elif any(out.glob("*.tar")):
        raise UsageError(
            f"--out {out}: it holds tars but no {FILE}, so they are not this command's; give another --out"
        )
    else:
        write_manifest(out, manifest)


def _check_same(out: Path, there: Manifest, here: Manifest) -> None:
    """Refuse to mix shards of two detectors, plans or settings, naming both sides."""

    def refuse(what: str, old: object, new: object) -> None:
        raise UsageError(
            f"--out {out}: holds shards of {what} {old}, this is {new}; give another --out, or --overwrite"
        )

    if there.name != here.name:
        refuse("name", there.name, here.name)
    if there.detector != here.detector:
        refuse("detector", _describe(there), _describe(here))
    for name, value in here.settings.items():
        if there.settings.get(name) != value:
            refuse(name, there.settings.get(name), value)
    for name, value in asdict(here.plan).items():
        old = asdict(there.plan)[name]
        if old != value and name not in ("images", "captions"):  # the same content may lie elsewhere now
            refuse(f"plan: {name}", old, value)


def _describe(manifest: Manifest) -> str:
    detector = manifest.detector
    config = hashlib.sha256(detector.config.encode()).hexdigest()
    hashes = f"{detector.weights} {detector.weights_sha256[:12]}, config {config[:12]}, preset {detector.preset}"
    return f"{detector.name} ({hashes})"


def extract(
    plan: Plan, number: int, detector: Detector, selection: Selection, settings: Extract, limit: Limit
) -> Iterator[Sample | Reject]:
    """Yield the samples and rejects of one shard, in an order that depends on the images and the batch size alone."""
    batches = in_batches(load_all(plan, number, detector, settings), settings.batch_size)
    work = partial(detect_batch, detector, selection, limit)
    # A GPU detects in the next batch while this one is written; on a CPU that would only take cores from the network.
    found = map(work, batches) if detector.model.device.type == "cpu" else one_ahead(work, batches)
    for items in found:
        yield from items


def one_ahead(work: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """Yield `work` of each item in turn, done in a thread that is one item ahead."""
    with ThreadPoolExecutor(1) as worker:
        ahead: deque[Future[T]] = deque()
        for item in items:
            ahead.append(worker.submit(work, item))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def detect_batch(
    detector: Detector, selection: Selection, limit: Limit, batch: list[Loaded] | Reject
) -> list[Sample | Reject]:
    """Find the regions of a batch and return its samples, and rejects where there is nothing to store."""
    if isinstance(batch, Reject):
        return [batch]
    found = detect_within(limit, detector, [image.input for image in batch], selection)
    return [_sample_or_reject(image, regions) for image, regions in zip(batch, found, strict=True)]


def _sample_or_reject(image: Loaded, regions: Regions | None) -> Sample | Reject:
    if regions is None:
        message = f"{image.record.width}x{image.record.height} pixels alone need more memory than there is"
        return Reject(path=image.record.path, reason="out-of-memory", message=message)
    if not regions.tags:
        return Reject(path=image.record.path, reason="no-regions", message="the detector proposes no region")
    return Sample(key=image.planned.key, image=image.record, regions=regions, texts=image.planned.texts)


def load_all(plan: Plan, number: int, detector: Detector, settings: Extract) -> Iterator[Loaded | Reject]:
    """Decode and resize a shard's images in threads, a bounded number ahead, and yield them in the plan's order.

    The threads go on while the detector works: two batches are ahead of it.
    """
    count = 2 * max(settings.decode_threads, settings.batch_size)
    with ThreadPoolExecutor(settings.decode_threads) as pool:
        images = iter(plan.shard(number))
        ahead = deque(pool.submit(load, plan, i, detector) for i in islice(images, count))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(load, plan, i, detector) for i in islice(images, 1))


def load(plan: Plan, image: PlannedImage, detector: Detector) -> Loaded | Reject:
    """Decode and resize one image; one that cannot be used becomes a reject with its reason."""
    try:
        pixels, sha256 = read_image(plan.folder / image.path)
        prepared = make_input(detector, pixels)
    except RefusedImage as refused:
        return Reject(path=readable(image.path), reason=refused.reason, message=str(refused))
    height, width = pixels.shape[:2]
    record = ImageRecord(
        source=plan.source, id=image.id, path=readable(image.path), width=width, height=height, sha256=sha256
    )
    return Loaded(planned=image, input=prepared, record=record)


def in_batches(items: Iterable[Loaded | Reject], size: int) -> Iterator[list[Loaded] | Reject]:
    """Group images of equal resized shape, up to `size` of them; rejects pass at once.

    When too many wait, the group that has waited longest goes as it is.
    """
    waiting: dict[tuple[int, int], list[Loaded]] = {}
    images = size_in_bytes = 0
    for item in items:
        if isinstance(item, Reject):
            yield item
            continue
        shape = (item.input.target.height, item.input.target.width)
        group = waiting.setdefault(shape, [])
        group.append(item)
        images, size_in_bytes = images + 1, size_in_bytes + item.input.pixels.nbytes
        ready = shape if len(group) == size else None
        if images > PENDING_BATCHES * size or size_in_bytes > PENDING_BYTES:
            ready = ready or next(iter(waiting))
        if ready:
            batch = waiting.pop(ready)
            images, size_in_bytes = images - len(batch), size_in_bytes - sum(i.input.pixels.nbytes for i in batch)
            yield batch
    yield from waiting.values()
