"""The job: one shard after the other, from the plan to whole files, in whatever process that happens."""

import hashlib
import platform
import resource
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from time import monotonic
from typing import Any, TypeVar

import detectron2
import numpy as np
import PIL
import torch
import torchvision

import oscar_common
from oscar_common.device import choose_device
from oscar_common.errors import OperationError, reason
from oscar_common.sample import ImageRecord, Regions, Sample
from oscar_common.settings import Detector as Entry
from oscar_common.settings import Extract
from oscar_extract.decoding import Decoders, Journal, journal
from oscar_extract.detect import Input, make_input
from oscar_extract.detector import Detector, compile_network, load_detector
from oscar_extract.folder.finish import TakenOver, finish_shard
from oscar_extract.folder.take import holding
from oscar_extract.images import RefusedImage, decode, decode_apart, read_bytes
from oscar_extract.messages import DeviceFailure, Done, Job, OpenShard, Survey, Trial
from oscar_extract.out_of_memory import Limit, detect_within
from oscar_extract.plan import PlannedImage, read_shard_plan
from oscar_extract.sizing import image_bytes
from oscar_extract.sources.duplicates import locate
from oscar_extract.sources.remote import Root, cache_of, opened
from oscar_extract.steps.selection import Selection, choose_selection
from oscar_shards.manifest import Manifest, PlanRecord, read_manifest
from oscar_shards.write import Reject, shard_path, unfit_numbers

T = TypeVar("T")
PENDING_BATCHES = 16  # images of odd shapes that may wait for company, in batches ...
PENDING_BYTES = 1 << 30  # ... and in bytes of pixels, as Caffe's resize begins with those of the original
ACCELERATOR_ERROR: tuple[type[Exception], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))
SOFTWARE = (oscar_common, torch, torchvision, detectron2, PIL, np)


@contextmanager
def device_failures() -> Iterator[None]:
    """Turn the many ways in which torch says that a GPU has failed into DeviceFailure."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, ACCELERATOR_ERROR) or any(s in str(error) for s in ("CUDA error", "cuDNN error"))):
            raise
        raise DeviceFailure(
            f"the GPU of {platform.node()} failed: {reason(error)}; the same command again continues"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Equipment:
    """A detector that is loaded, the selection of its regions, and how many images a batch may have."""

    detector: Detector
    selection: Selection
    limit: Limit


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A decoded image, ready for the detector."""

    planned: PlannedImage
    input: Input
    record: ImageRecord


def equip(job: Job) -> Equipment:
    """Load the detector, once in a process.

    Raises:
        UsageError: see `load_detector`.
    """
    chosen = {field.name: getattr(job.settings, field.name) for field in fields(EquipmentKey)}
    return _equip(job.entry, EquipmentKey(**chosen))


@dataclass(frozen=True, kw_only=True)
class EquipmentKey:
    """The settings that decide what a process is equipped with; see `oscar_common.settings.Extract`."""

    detector: str
    device: str
    precision: str
    compile: bool
    batch_size: int
    dtype: str
    min_boxes: int | None
    max_boxes: int | None
    score_threshold: float | None


@lru_cache(maxsize=1)
def _equip(entry: Entry, key: EquipmentKey) -> Equipment:
    detector = load_detector(key.detector, entry, choose_device(key.device), key.precision)
    detector = replace(detector, record=replace(detector.record, dtype=key.dtype))
    if key.compile:
        compile_network(detector.model)

    selection = choose_selection(
        detector.preset.selection,
        least=key.min_boxes,
        most=key.max_boxes,
        threshold=key.score_threshold,
    )
    return Equipment(detector=detector, selection=selection, limit=Limit(images=key.batch_size))


@device_failures()
def survey(job: Job, trial: Trial) -> Survey:
    """Load the detector and find regions in some of the images, in this process."""
    tools = equip(job)
    loaded = (
        i for p in trial.images if isinstance(i := _load(tools.detector, trial.roots, p, job, trial.apart), Loaded)
    )
    regions = 0
    marks = [(monotonic(), 0)]  # when each part was done, and how many images with it

    for part in detect_ahead(job, tools, loaded):
        marks.append((monotonic(), marks[-1][1] + len(part)))
        regions += sum(len(i.regions.tags) for i in part if isinstance(i, Sample))
        if marks[-1][0] - marks[min(len(marks) - 1, job.threads)][0] > trial.seconds or not trial.seconds:
            break

    images = marks[-1][1]
    record = tools.detector.record
    return Survey(
        manifest=make_manifest(trial.plan, tools, job.settings),
        device=str(tools.detector.model.device.type),
        images_per_second=pace(marks, job.threads),
        bytes_per_image=image_bytes(regions / max(images, 1), record.feature_dim, record.dtype),
        memory=peak_memory(),
    )


def pace(marks: list[tuple[float, int]], threads: int) -> float:
    """Return images per second, without the warm-up if the sample is long enough.

    The first part of each thread is the warm-up. When it ends, the threads have already begun the next parts, which
    would inflate the rate of a short sample; so a sample of fewer than five parts per thread is counted whole.

    Args:
        marks: (seconds, images done so far) at the start and after each part.
        threads: the number of parts in work at once.
    """
    (began, before), (ended, images) = marks[threads if len(marks) > 4 * threads else 0], marks[-1]
    return (images - before) / max(ended - began, 1e-9)


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_manifest(plan: PlanRecord, tools: Equipment, settings: Extract) -> Manifest:
    """Return what manifest.json will say. Nothing in it depends on time, place or chance."""
    return Manifest(
        name=settings.name,
        detector=tools.detector.record,
        settings=asdict(tools.selection)
        | {name: getattr(settings, name) for name in ("batch_size", "precision", "compile")},
        plan=plan,
        software={"python": platform.python_version(), "device": str(tools.detector.model.device.type)}
        | {module.__name__: str(module.__version__) for module in SOFTWARE},  # torch's is of a type of its own
    )


@device_failures()
def extract_shard(job: Job, open_shard: OpenShard, tell: Callable[[int, int], None]) -> Done:
    """Take a shard and write it, and tell how many images, and rejects among them, are done so far.

    Raises:
        OperationError: this worker's detector is not the manifest's.
        DeviceFailure: its GPU has failed.
        OSError: the disk is full, or refuses.
    """
    tools = equip(job)
    manifest = read_manifest(job.out, "--out")
    if manifest.detector != tools.detector.record:
        raise OperationError(
            f"{platform.node()} has another detector than {job.out}/manifest.json says; give all workers the same "
            "software and weights"
        )

    tar = shard_path(job.out, job.settings.name, open_shard.shard)
    images = rejects = 0
    with holding(job.out, tar, open_shard) as held:
        if held is None:
            return Done(shard=open_shard.shard, images=0, rejects=0, memory=peak_memory(), taken=False)

        def counted(items: Iterable[Sample | Reject]) -> Iterator[Sample | Reject]:
            nonlocal images, rejects
            for item in items:
                if held.is_lost:
                    raise TakenOver
                rejects += isinstance(item, Reject)
                images += 1
                tell(images, rejects)
                yield item

        roots, planned = read_shard_plan(job.out, open_shard.shard, cache_of(job.settings))
        with journal(tar) as record:
            items = with_twins(counted(extract(job, tools, roots, planned, record)), planned)
            is_taken = finish_shard(held, open_shard, items, manifest.layout)

    return Done(shard=open_shard.shard, images=images, rejects=rejects, memory=peak_memory(), taken=is_taken)


def extract(
    job: Job, tools: Equipment, roots: list[Root], planned: list[PlannedImage], record: Journal
) -> Iterator[Sample | Reject]:
    """Yield the samples and rejects of one shard, in an order that depends on the images and the batch size alone."""
    settings = job.settings

    def load(number: int) -> Loaded | Reject:
        return _load(tools.detector, roots, planned[number], job, number in record.suspects)

    decoders = Decoders(load, settings.decode_threads, settings.image_timeout, record)
    count = 2 * max(settings.decode_threads, settings.batch_size)  # two batches are ahead of the detector
    numbers = range(len(planned))
    late = f"decoding takes longer than --image-timeout {settings.image_timeout:g} s"
    loaded = (
        image or Reject(path=planned[n].path, reason="timeout", message=late)
        for n, image in zip(numbers, decoders.map(numbers, count), strict=True)
    )

    for items in detect_ahead(job, tools, loaded):
        yield from items


def with_twins(items: Iterable[Sample | Reject], planned: list[PlannedImage]) -> Iterator[Sample | Reject]:
    """Pass items on; files of the same bytes as a refused image are refused with it, each by its name."""
    also = {image.path: image.also for image in planned if image.also}
    for item in items:
        yield item
        if isinstance(item, Reject):
            for path in also.get(item.path, []):
                yield Reject(path=path, reason=item.reason, message=item.message)


def detect_ahead(job: Job, tools: Equipment, loaded: Iterable[Loaded | Reject]) -> Iterator[list[Sample | Reject]]:
    """Yield what is found in batch after batch, by threads that are ahead of the one that takes it.

    On a CPU torch works with one core in each of them: sums come out the same to the last bit however many there are,
    which is not so for torch's own threads, and two images at once are faster than one with two. A GPU has one thread,
    and so has a compiled network, which must not be compiled by two at a time.
    """
    on_cpu = tools.detector.model.device.type == "cpu"
    threads = job.threads if on_cpu and not job.settings.compile else 1
    prepare = partial(torch.set_num_threads, 1) if on_cpu else None
    return ahead(partial(detect_batch, tools), in_batches(loaded, job.settings.batch_size), threads, prepare)


def ahead(
    work: Callable[[Any], T], items: Iterable[Any], threads: int, prepare: Callable[[], None] | None = None
) -> Iterator[T]:
    """Yield `work` of each item in turn, done by threads that are so many items ahead."""
    with ThreadPoolExecutor(threads, initializer=prepare) as pool:
        pending: deque[Future[T]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # if nobody takes them any more


def detect_batch(tools: Equipment, batch: list[Loaded] | Reject) -> list[Sample | Reject]:
    """Find the regions of a batch and return its samples, and rejects where there is nothing to store."""
    if isinstance(batch, Reject):
        return [batch]
    results = detect_within(tools.limit, tools.detector, [image.input for image in batch], tools.selection)
    return [_sample_or_reject(image, regions) for image, regions in zip(batch, results, strict=True)]


def _sample_or_reject(image: Loaded, regions: Regions | RefusedImage | None) -> Sample | Reject:
    if regions is None:
        message = f"{image.record.width}x{image.record.height} pixels alone need more memory than there is"
        return Reject(path=image.record.path, reason="out-of-memory", message=message)
    if isinstance(regions, RefusedImage):
        return Reject(path=image.record.path, reason=regions.reason, message=str(regions))
    if not regions.tags:
        return Reject(path=image.record.path, reason="no-regions", message="the detector proposes no region")
    if unfit := unfit_numbers(regions):
        return Reject(path=image.record.path, reason=unfit[0], message=unfit[1])

    return Sample(key=image.planned.key, image=image.record, regions=regions, texts=image.planned.texts)


def _load(detector: Detector, roots: list[Root], image: PlannedImage, job: Job, apart: bool) -> Loaded | Reject:
    """Decode and resize one image; one that cannot be used becomes a reject with its reason."""
    try:
        file, offset, size = locate(roots, image.root, image.path, image.raw, image.offset, image.size)
        with opened(file) as path:
            content = read_bytes(path, offset, size)
        pixels = decode_apart(content, job.settings.image_timeout) if apart else decode(content)
        prepared = make_input(detector, pixels)
    except RefusedImage as refused:
        return Reject(path=image.path, reason=refused.reason, message=str(refused))

    height, width = pixels.shape[:2]
    record = ImageRecord(
        source=image.source,
        id=image.id,
        path=image.path,
        width=width,
        height=height,
        sha256=hashlib.sha256(content).hexdigest(),
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
