"""Detectors on a GPU find what they find on a CPU, in any batch, and a lack of memory halves the batch."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oscar_common.sample import Regions
from oscar_common.settings import Detector as Entry
from oscar_extract.detect import Input, detect, make_input
from oscar_extract.detector import Detector, load_detector
from oscar_extract.images import read_image
from oscar_extract.out_of_memory import Limit, detect_within

pytestmark = pytest.mark.gpu

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield import_module("extract")


@pytest.fixture(scope="module")
def photos(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files: list[Path] = bench.sample_photos(tmp_path_factory.mktemp("gpu") / "photos", 8)
    return files[:8]


@pytest.fixture(scope="module", params=["builtin", "vg-r101", "vinvl-x152"])
def entry(
    request: pytest.FixtureRequest, bench: Any, photos: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Entry]:
    """A detector's name, and its entry with weights: random ones where none come with the package."""
    place = tmp_path_factory.mktemp("weights")
    return request.param, bench.entry_of(request.param, None, None, place, photos, "cuda")


@pytest.fixture(scope="module")
def detector(entry: tuple[str, Entry]) -> Detector:
    return load_detector(*entry, "cuda")


def inputs_of(detector: Detector, photos: list[Path]) -> list[Input]:
    return [make_input(detector, read_image(photo)[0]) for photo in photos]


def one_by_one(detector: Detector, photos: list[Path]) -> list[Regions]:
    selection = detector.preset.selection
    return [detect(detector, [item], selection)[0] for item in inputs_of(detector, photos)]


def twins(regions: Regions, others: Regions) -> tuple[float, float]:
    """Return the share of regions that others have, too, and by how much their features differ, relative to a norm.

    The same region is one of the same class, no side of which is further off than 0.05 pixels.
    """
    matched, worst = 0, 0.0
    for box, tag, feature in zip(regions.boxes, regions.tags, regions.features.astype(np.float32), strict=True):
        distances = np.abs(others.boxes - box).max(1)
        close = [index for index in np.flatnonzero(distances < 0.05) if others.tags[index] == tag]
        if close:
            matched += 1
            other = others.features[min(close, key=lambda index: distances[index])].astype(np.float32)
            worst = max(worst, float(np.linalg.norm(feature - other) / np.linalg.norm(feature)))
    return matched / len(regions.tags), worst


def test_the_gpu_finds_what_the_cpu_finds(entry: tuple[str, Entry], detector: Detector, photos: list[Path]):
    on_cpu = load_detector(*entry, "cpu")
    for regions, others in zip(one_by_one(on_cpu, photos[:2]), one_by_one(detector, photos[:2]), strict=True):
        share, difference = twins(regions, others)
        assert share > 0.95
        assert difference < 1e-3


def test_a_batch_is_its_images(detector: Detector, photos: list[Path]):
    together = detect(detector, inputs_of(detector, photos), detector.preset.selection)
    for regions, others in zip(one_by_one(detector, photos), together, strict=True):
        share, difference = twins(regions, others)
        assert share > 0.95
        assert difference < 1e-3


def test_bf16_is_close(entry: tuple[str, Entry], detector: Detector, photos: list[Path], bench: Any):
    half = load_detector(*entry, "cuda", "bf16")
    exact = load_detector(*entry, "cuda")
    parity = bench.parity(half, exact, photos[:4])
    assert parity["regions_with_a_twin"] > 0.7
    assert parity["cosine_mean"] > 0.99


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    detector: Detector, photos: list[Path], capsys: pytest.CaptureFixture[str]
):
    inputs, selection = inputs_of(detector, photos) * 4, detector.preset.selection

    def peak(count: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        detect(detector, inputs[:count], selection)
        return torch.cuda.max_memory_allocated()

    small, large = peak(8), peak(32)
    total = torch.cuda.get_device_properties(0).total_memory
    if large < 1.3 * small:
        pytest.fail(f"a batch of 32 takes no more than one of 8: {small} and {large} bytes")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((small + large) / 2 / total)
    try:
        limit = Limit(images=32)
        regions = detect_within(limit, detector, inputs, selection)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert limit.images < 32
    assert "out of memory at 32 images" in capsys.readouterr().err
    for one, other in zip(regions, one_by_one(detector, photos) * 4, strict=True):
        assert one is not None
        assert twins(other, one)[0] > 0.95
