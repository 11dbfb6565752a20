"""How fast stage 1 is, stage by stage, beside the references' way on the same weights and images.

    python bench/extract.py --detector vg-r101 --batch-size 2

The numbers go to bench/results, a file for each detector, preset, device and precision.

Without --weights, a network of the detector's shape is made, at random but calibrated so that its scores differ from
region to region: speed does not depend on what a network has learnt. The share of the ceiling is that of the fastest
product of two square matrices that this machine makes in the same precision, measured in the same run.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torchvision
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import nms

from oscar_common.config import installed_catalog
from oscar_common.device import choose_device
from oscar_common.sample import ImageRecord, Regions, Sample
from oscar_common.settings import Detector as Entry
from oscar_extract.detect import Input, classify, collect, detect, feature_maps, load_batch, make_input
from oscar_extract.detector import Detector, build, compile_network, configure, load_config, load_detector
from oscar_extract.images import read_image
from oscar_extract.steps.nms import intersection_over_union
from oscar_extract.steps.presets import PRESETS, Preset
from oscar_extract.steps.selection import Candidates, Selection
from oscar_shards.manifest import Layout
from oscar_shards.write import write_shard

PRESET_OF = {"builtin": "detectron2", "vg-r101": "bua", "vinvl-x152": "vinvl"}
SHARD = 64  # samples in the shard whose writing is timed: what a shard costs, a sample has a share of
STAGES = ("decode", "to device", "backbone", "rpn", "head", "selection", "to host", "write")


@dataclass
class Clock:
    """Seconds by stage, a list over repetitions; on a GPU each stage waits for the one before to end."""

    device: str
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@click.command(help=__doc__)
@click.option("--detector", "name", type=click.Choice([*PRESET_OF]), default="vg-r101")
@click.option("--preset", type=click.Choice([*PRESETS]), help="[default: the detector's own]")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights instead of random ones.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder of JPEGs. [default: photos of scikit-image]")
@click.option("--device", default="auto")
@click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16"]), default="fp32")
@click.option("--batch-size", default=4)
@click.option("--batches", default=3, help="Batches that are timed, after one that warms up.")
@click.option("--reference/--no-reference", default=True, help="Run the references' way, too.")
@click.option("--compile/--no-compile", "compiled", default=False, help="torch.compile backbone and box head.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/results"), help="Folder for the numbers.")
def main(
    name: str,
    preset: str | None,
    weights: Path | None,
    images: Path | None,
    device: str,
    precision: str,
    batch_size: int,
    batches: int,
    reference: bool,
    compiled: bool,
    out: Path,
) -> None:
    device = choose_device(device)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        files = sorted(images.glob("*.jpg")) if images else sample_photos(place / "photos", batch_size)
        entry = entry_of(name, preset, weights, place, files, device)
        detector = load_detector(name, entry, device, precision)
        if compiled:
            compile_network(detector.model)
        rounds = [[files[(r * batch_size + i) % len(files)] for i in range(batch_size)] for r in range(batches + 1)]
        report = measure(detector, rounds, place, reference)
        if precision != "fp32":
            report["against_fp32"] = parity(detector, load_detector(name, entry, device, "fp32"), rounds[0])
    report |= {
        "detector": name,
        "preset": detector.preset.name,
        "weights": "given" if weights else ("the built-in" if name == "builtin" else "random, calibrated"),
        "precision": precision,
        "batch_size": batch_size,
        "compiled": compiled,
        **circumstances(device),
    }
    show(report)
    out.mkdir(parents=True, exist_ok=True)
    place = out / f"extract-{name}-{detector.preset.name}-{device}-{precision}{'-compiled' * compiled}.json"
    place.write_text(json.dumps(report, indent=1) + "\n")


def sample_photos(folder: Path, count: int) -> list[Path]:
    """Write `count` or more JPEGs of 640 x 480 pixels, cut from the photos that scikit-image carries."""
    import skimage.data

    folder.mkdir()
    names = ("astronaut", "coffee", "chelsea", "rocket")
    for n in range(max(count, 2 * len(names))):
        photo = Image.fromarray(getattr(skimage.data, names[n % len(names)])())
        turned = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if n // len(names) % 2 else photo
        turned.convert("RGB").resize((640, 480)).save(folder / f"{n:03}.jpg", quality=90)
    return sorted(folder.glob("*.jpg"))


def entry_of(name: str, preset: str | None, weights: Path | None, place: Path, files: list[Path], device: str) -> Entry:
    entry = replace(installed_catalog().detectors[name], preset=preset or PRESET_OF[name])
    if name == "vinvl-x152":
        (place / "classes.txt").write_text("".join(f"class {n}\n" for n in range(1594)))
        (place / "attributes.txt").write_text("".join(f"attribute {n}\n" for n in range(524)))
        entry = replace(entry, classes=str(place / "classes.txt"), attributes=str(place / "attributes.txt"))
    if weights or name == "builtin":
        return replace(entry, weights=str(weights) if weights else None)
    made = random_weights(name, PRESETS[entry.preset or ""], place / "random.safetensors", files[:2], device)
    return replace(entry, weights=str(made))


@torch.inference_mode()
def random_weights(name: str, preset: Preset, path: Path, files: list[Path], device: str) -> Path:
    """Make weights of a network whose activations stay in bounds and whose scores differ between regions.

    The last norm of every residual block is small; the class scores are of the features' deviation from their mean.
    """
    torch.manual_seed(0)
    cfg = configure(load_config(name, name), preset, device)
    model = build(name, cfg)
    for module_name, module in model.named_modules():
        if module_name.endswith("conv3.norm"):
            module.weight.fill_(0.2)
    torch.nn.init.normal_(model.proposal_generator.rpn_head.objectness_logits.weight, std=0.1)
    head = model.roi_heads.box_predictor.cls_score
    sketch = Detector(model=model, cfg=cfg, preset=preset, precision="fp32", record=None)  # type: ignore[arg-type]
    images = load_batch(sketch, [make_input(sketch, read_image(files[0])[0])])
    maps = feature_maps(sketch, images)
    boxes = preset.propose(model, images, maps, [make_input(sketch, read_image(files[0])[0]).target])
    features = classify(sketch, maps, boxes, []).features[0]
    mean, spread = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    weight = torch.randn_like(head.weight) * 4 / len(mean) ** 0.5 / spread
    head.weight.copy_(weight)
    head.bias.copy_(-weight @ mean)
    state = {n: t.contiguous().cpu() for n, t in model.state_dict().items() if "anchor" not in n.split(".")[1]}
    save_file({n: t for n, t in state.items() if "pixel" not in n}, path)
    return path


@torch.inference_mode()
def measure(detector: Detector, rounds: list[list[Path]], place: Path, reference: bool) -> dict[str, Any]:
    clock = Clock(detector.model.device.type)
    selection = detector.preset.selection
    for number, files in enumerate(rounds):
        if number == 1:
            clock.seconds.clear()  # the first round warmed up
        found, inputs = timed_batch(detector, files, selection, clock, place / f"shard-{number:06}.tar")
    count = len(rounds[0])
    stages = {stage: 1e3 * statistics.median(clock.seconds[stage]) / count for stage in STAGES}
    report: dict[str, Any] = {"milliseconds_per_image": {s: round(ms, 3) for s, ms in stages.items()}}
    gpu_bound = sum(ms for stage, ms in stages.items() if stage not in ("decode", "write"))
    report["images_per_second"] = {
        "detector alone": round(1e3 / gpu_bound, 2),
        "all stages in one thread": round(1e3 / sum(stages.values()), 2),
    }
    flops = count_flops(detector, inputs)
    ceiling = matrix_ceiling(detector)
    network = stages["backbone"] + stages["head"]
    report["backbone_and_head"] = {
        "gflop_per_image": round(flops / count / 1e9, 1),
        "gflop_per_second": round(flops / count / network / 1e6, 1),
        "matrix_ceiling_gflop_per_second": round(ceiling / 1e9, 1),
        "share_of_ceiling": round(flops / count / network * 1e3 / ceiling, 3),
    }
    if detector.preset.name in ("bua", "vinvl"):
        report["selection"] = compare_selection(detector, found, selection, stages["selection"])
    if reference and detector.preset.name in ("bua", "vinvl"):
        report["reference_way"] = reference_way(detector, rounds[0], selection, gpu_bound)
    return report


def timed_batch(
    detector: Detector, files: list[Path], selection: Selection, clock: Clock, tar: Path
) -> tuple[Candidates, list[Input]]:
    """Do what the job does with a batch, in one thread, with a clock on every stage."""
    model, preset = detector.model, detector.preset
    with clock.stage("decode"):
        inputs = [make_input(detector, read_image(file)[0]) for file in files]
    with clock.stage("to device"):
        images = load_batch(detector, inputs)
    with clock.stage("backbone"):
        maps = feature_maps(detector, images)
    with clock.stage("rpn"):
        proposals = preset.propose(model, images, maps, [i.target for i in inputs])
    with clock.stage("head"):
        found = classify(detector, maps, proposals, [i.target for i in inputs])
    with clock.stage("selection"):
        kept = preset.select(model.roi_heads.box_predictor, found, selection)
    with clock.stage("to host"):
        regions = collect(detector, inputs, maps, found, kept)
    records = [
        ImageRecord(source="bench", id=f.stem, path=f.name, width=i.width, height=i.height, sha256="")
        for f, i in zip(files, inputs, strict=True)
    ]
    samples = [
        Sample(key=f"{n:06}", image=record, regions=r, texts=[])
        for n, (record, r) in enumerate(zip(records, regions, strict=True))
        if isinstance(r, Regions)
    ]
    shard = [replace(sample, key=f"{sample.key}-{n}") for n in range(SHARD // len(samples)) for sample in samples]
    with clock.stage("write"):
        write_shard(tar, iter(shard), Layout(feature_dim=detector.record.feature_dim))
    clock.seconds["write"][-1] *= len(samples) / len(shard)
    return found, inputs


def count_flops(detector: Detector, inputs: list[Input]) -> int:
    """Return the floating point operations of backbone and head for a batch; a multiply-add is two."""
    model, preset = detector.model, detector.preset
    images = load_batch(detector, inputs)
    with FlopCounterMode(display=False) as backbone:
        maps = feature_maps(detector, images)
    proposals = preset.propose(model, images, maps, [i.target for i in inputs])
    with FlopCounterMode(display=False) as head:
        classify(detector, maps, proposals, [i.target for i in inputs])
    return int(backbone.get_total_flops() + head.get_total_flops())


def matrix_ceiling(detector: Detector) -> float:
    """Return the operations a second of the fastest square matrix product, in the detector's precision."""
    device = detector.model.device
    dtype = torch.bfloat16 if detector.precision == "bf16" else torch.float32
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = median_seconds(lambda a=a, b=b: a @ b, device.type, 10)  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
    return best


def median_seconds(work: Callable[[], object], device: str, repeat: int) -> float:
    clock = Clock(device)
    work()
    for _ in range(repeat):
        with clock.stage("work"):
            work()
    return statistics.median(clock.seconds["work"])


def compare_selection(detector: Detector, found: Candidates, selection: Selection, ours: float) -> dict[str, float]:
    """Time the loop over classes on the same candidates, on the CPU as the references do it."""
    host = replace(found, **{n: getattr(found, n).float().cpu() for n in ("boxes", "features", "logits", "deltas")})
    host = replace(host, valid=found.valid.cpu())
    seconds = median_seconds(lambda: loop_over_classes(detector, host), "cpu", 3)
    per_image = 1e3 * seconds / len(found.boxes)
    return {"loop_over_classes_ms": round(per_image, 2), "ours_ms": round(ours, 2), "ratio": round(per_image / ours, 1)}


def loop_over_classes(detector: Detector, found: Candidates) -> list[Tensor]:
    """The best score of each box that survives a class's NMS, class after class (MILVLG `extract_utils.py`)."""
    best = []
    for boxes, logits, target in zip(found.boxes, found.logits, found.targets, strict=True):
        scores, corners = logits.softmax(dim=-1), boxes / target.scale_x
        confidence = scores.new_zeros(len(scores))
        for index in range(scores.shape[1] - 1):
            of_class = scores[:, index]
            keep = nms(corners, of_class, 0.3)
            confidence[keep] = torch.where(of_class[keep] > confidence[keep], of_class[keep], confidence[keep])
        best.append(confidence)
    return best


def reference_way(detector: Detector, files: list[Path], selection: Selection, ours: float) -> dict[str, float]:
    """Time one image after the other in float32, with the loop over classes on the CPU: what the references do.

    The network is this project's with its norms folded, so the reference is made faster here than it is.
    """
    slow = replace(detector, precision="fp32")
    model, preset, clock = slow.model, slow.preset, Clock(slow.model.device.type)
    for file in (files * 3)[:4]:
        item = make_input(slow, read_image(file)[0])
        with clock.stage("image"):
            images = load_batch(slow, [item])
            maps = feature_maps(slow, images)
            found = classify(slow, maps, preset.propose(model, images, maps, [item.target]), [item.target])
            fields = ("boxes", "features", "logits", "deltas")
            loop_over_classes(slow, replace(found, **{n: getattr(found, n).cpu() for n in fields}))
    milliseconds = 1e3 * statistics.median(clock.seconds["image"][1:])
    return {"ms_per_image": round(milliseconds, 2), "ours_ms": round(ours, 2), "ratio": round(milliseconds / ours, 2)}


def parity(detector: Detector, exact: Detector, files: list[Path]) -> dict[str, float]:
    """Compare each region in float32 with the one that overlaps it most: share, features' cosine, agreement of tags."""
    selection, matched, cosines, tags, count = detector.preset.selection, 0, [], 0, 0
    for file in files:
        item = make_input(exact, read_image(file)[0])
        (one,), (other,) = (detect(d, [item], selection) for d in (exact, detector))
        assert isinstance(one, Regions)
        assert isinstance(other, Regions)
        overlaps = intersection_over_union(torch.tensor(np.concatenate([one.boxes, other.boxes])), plus=1)
        best, twin = overlaps[: len(one.tags), len(one.tags) :].max(dim=1)
        near = (best > 0.7).nonzero()[:, 0].tolist()
        far = twin[near].tolist()
        a, b = torch.tensor(one.features[near]).float(), torch.tensor(other.features[far]).float()
        cosines += torch.nn.functional.cosine_similarity(a, b, dim=1).tolist()
        tags += sum(one.tags[n] == other.tags[m] for n, m in zip(near, far, strict=True))
        matched, count = matched + len(near), count + len(one.tags)
    return {
        "regions_with_a_twin": round(matched / count, 4),
        "cosine_mean": round(statistics.mean(cosines), 5),
        "cosine_least": round(min(cosines), 5),
        "tags_equal": round(tags / matched, 4),
    }


def circumstances(device: str) -> dict[str, Any]:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }


def show(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['detector']}, preset {report['preset']}, {report['precision']} on {report['device']}")
    table.add_column("stage")
    table.add_column("ms an image", justify="right")
    for stage, milliseconds in report["milliseconds_per_image"].items():
        table.add_row(stage, f"{milliseconds:,.2f}")
    console = Console()
    console.print(table)
    for title in ("images_per_second", "backbone_and_head", "selection", "reference_way", "against_fp32"):
        if title in report:
            console.print(f"{title}: " + ", ".join(f"{k} {v:,}" for k, v in report[title].items()))


if __name__ == "__main__":
    main()
