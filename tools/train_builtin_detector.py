#!/usr/bin/env python3
"""Train, resume, evaluate and export the built-in detector on the CPU.

DATA is a folder with instances_train.json, instances_eval.json (COCO format) and images/. OUT receives
checkpoint.pth (written every --save-every iterations, and picked up again by the next call) and log.jsonl.
Order, scales and flips are a function of (seed, iteration), so a run that was stopped goes on as if it had not been.
"""

import ctypes
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG = Path(__file__).parents[1] / "extract" / "oscar_extract" / "builtin" / "config.yaml"
Records = list[dict[str, Any]]


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: else the kernel zeroes fresh pages for every step, at half the speed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        for option, value in ((m_trim_threshold, -1), (m_mmap_max, 0), (m_arena_max, 2)):
            libc.mallopt(option, value)


def load_config(freeze: int, size: int | None) -> Any:
    from detectron2.config import get_cfg

    import oscar_extract.network.backbone  # noqa: F401  registers the backbone

    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIG))
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze
    if size:
        cfg.INPUT.MIN_SIZE_TEST = size
        cfg.INPUT.MAX_SIZE_TEST = round(size * 1.4)
    return cfg


def load_records(data: Path, split: str) -> Records:
    """Register ``instances_SPLIT.json`` as detectron2 dataset ``boxed_SPLIT`` and return its photos."""
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances

    name = f"boxed_{split}"
    register_coco_instances(name, {}, str(data / f"instances_{split}.json"), str(data / "images"))
    records: Records = DatasetCatalog.get(name)
    return records


class Batches:
    """Batch ``i`` as a pure function of (seed, i): repeat-factor sampling, photos of like shape together."""

    def __init__(self, records: Records, cfg: Any, batch: int, sizes: list[int], seed: int) -> None:
        from detectron2.data.samplers import RepeatFactorTrainingSampler as Sampler

        self.records = [r for r in records if any(not a.get("iscrowd") for a in r["annotations"])]
        self.cfg, self.batch, self.sizes, self.seed = cfg, batch, sizes, seed
        self.factors = Sampler.repeat_factors_from_category_frequency(self.records, 0.03).numpy()
        self.per_epoch = int(self.factors.sum()) // batch
        self.epoch, self.order = -1, np.empty((0, batch), int)

    def plan(self, epoch: int) -> np.ndarray:
        """Indices of one epoch, [batches, batch]."""
        rng = np.random.default_rng((self.seed, epoch))
        counts = np.floor(self.factors + rng.random(len(self.factors))).astype(int)
        order = np.repeat(np.arange(len(counts)), counts)
        rng.shuffle(order)
        order = np.resize(order, self.per_epoch * self.batch)
        shape = np.array([r["width"] / r["height"] for r in self.records])
        chunks = np.array_split(order, max(1, len(order) // (8 * self.batch)))
        order = np.concatenate([chunk[np.argsort(shape[chunk], kind="stable")] for chunk in chunks])
        return rng.permutation(order.reshape(-1, self.batch))

    def __getitem__(self, iteration: int) -> list[dict[str, Any]]:
        from detectron2.data import DatasetMapper
        from detectron2.data import transforms as tr

        if iteration // self.per_epoch != self.epoch:
            self.epoch = iteration // self.per_epoch
            self.order = self.plan(self.epoch)
        np.random.seed([self.seed, iteration])  # detectron2's augmentations draw from numpy's global generator,
        torch.manual_seed(self.seed * 1_000_003 + iteration)  # its samplers of anchors and regions from torch's
        size = int(np.random.choice(self.sizes))
        augmentations = [
            tr.RandomApply(tr.RandomCrop("relative_range", (0.6, 0.6)), 0.4),
            tr.ResizeShortestEdge([size, size], round(size * 1.4)),
            tr.RandomFlip(),
            tr.RandomBrightness(0.8, 1.2),
            tr.RandomContrast(0.8, 1.2),
            tr.RandomSaturation(0.7, 1.3),
        ]
        mapper = DatasetMapper(True, augmentations=augmentations, image_format=self.cfg.INPUT.FORMAT)
        return [mapper(self.records[i]) for i in self.order[iteration % self.per_epoch]]


def build(cfg: Any) -> nn.Module:
    from detectron2.modeling import build_model

    model: nn.Module = build_model(cfg)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # torch's stubs lack it


def make_optimizer(model: nn.Module, rate: float, trunk_rate: float) -> torch.optim.AdamW:
    """AdamW with three rates: trunk, what --init already knows (FPN, RPN, box head, classes), ten times that for boxes.

    The wide fully connected layers forget the classes that they start with if they learn as fast as a new layer should.
    """
    peaks = {"bottom_up": trunk_rate, "bbox_pred": 10 * rate}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            peak = next((peak for part, peak in peaks.items() if part in name), rate)
            decay = 0.0 if parameter.ndim == 1 or "fpn_" in name else 0.02
            groups.setdefault((peak, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "peak": peak, "weight_decay": decay} for (peak, decay), p in groups.items()], lr=rate
    )


def keep_proposals(model: Any) -> None:
    """Leave RPN, and the FPN channels 80 to 84 that it reads, as --init has them: they are good from the start."""
    model.proposal_generator.requires_grad_(False)
    kept = torch.arange(80, 85)
    for name, parameter in model.backbone.named_parameters():
        if name.startswith("fpn_"):
            parameter.register_hook(lambda gradient: gradient.index_fill(0, kept, 0.0))


def schedule(iteration: int, iterations: int, warmup: int = 100) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to 0."""
    return min(1.0, (iteration + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / iterations)))


def update_average(average: dict[str, Tensor], model: nn.Module, iteration: int) -> None:
    """Exponential moving average of the parameters, over about 500 iterations."""
    keep = min(0.998, (iteration + 1) / (iteration + 10))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                average[name].lerp_(parameter, 1 - keep)


def evaluate(model: nn.Module, cfg: Any, data: Path, out: Path) -> dict[str, float]:
    """COCO box AP on instances_eval.json as COCOEvaluator prints it, and the seconds an image."""
    from detectron2.data import DatasetMapper, build_detection_test_loader
    from detectron2.data import transforms as tr
    from detectron2.evaluation import COCOEvaluator, inference_on_dataset

    name = "boxed_eval"
    records = load_records(data, "eval")
    resize = tr.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    mapper = DatasetMapper(False, augmentations=[resize], image_format=cfg.INPUT.FORMAT)
    evaluator = COCOEvaluator(name, ("bbox",), False, output_dir=str(out), use_fast_impl=False)
    loader = build_detection_test_loader(records, mapper=mapper, num_workers=0)
    model.eval()
    inputs = [mapper(record) for record in records[:50]]
    with torch.inference_mode():
        model(inputs[:1])
        start = time.perf_counter()
        for item in inputs:
            model([item])
    seconds = (time.perf_counter() - start) / len(inputs)
    result = dict(inference_on_dataset(model, loader, evaluator)["bbox"])
    result["seconds_per_image"] = seconds
    return result


def export(state: dict[str, Tensor], path: Path) -> None:
    """Write every parameter and persistent buffer as float16."""
    save_file({name: value.detach().half().contiguous() for name, value in state.items()}, path)
    click.echo(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


def save(path: Path, **content: Any) -> None:
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def train(model: nn.Module, batches: Batches, out: Path, options: dict[str, Any]) -> None:
    """Run from OUT's checkpoint (or from 0) to ``iterations``; leave the averaged weights in ``model``."""
    from detectron2.utils.events import EventStorage

    if not options["proposals"]:
        keep_proposals(model)
    optimizer = make_optimizer(model, options["rate"], options["trunk_rate"])
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    checkpoint, start = out / "checkpoint.pth", 0
    if options["resume"] and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average, start = saved["average"], saved["iteration"]
        if len(saved["optimizer"]["state"]) == sum(len(g["params"]) for g in optimizer.param_groups):
            optimizer.load_state_dict(saved["optimizer"])
        click.echo(f"resumed at iteration {start}")
    model.train()
    begun, last, losses = time.perf_counter(), options["iterations"], {}
    with EventStorage(start), open(out / "log.jsonl", "a") as log:
        for i in range(start, last):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(i, last)
            with torch.autocast("cpu", torch.bfloat16, enabled=options["bfloat16"]):
                losses = model(batches[i])
            optimizer.zero_grad()
            torch.stack([v for k, v in losses.items() if options["proposals"] or "rpn" not in k]).sum().backward()
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 5.0)
            optimizer.step()
            update_average(average, model, i)
            if i % 20 == 0:
                line = {k: round(v.item(), 4) for k, v in losses.items()}
                log.write(json.dumps({"iteration": i, "seconds": round(time.perf_counter() - begun, 1), **line}) + "\n")
                log.flush()
            if (i + 1) % options["save_every"] == 0 or i + 1 == last:
                content = {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                save(checkpoint, iteration=i + 1, **content)
    model.load_state_dict(average, strict=False)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for checkpoint and log.")
@click.option("--iterations", default=3000, show_default=True, help="Where the cosine ends, counted from the start.")
@click.option("--batch", default=8, show_default=True)
@click.option("--sizes", default="224,256,288,320,352", show_default=True, help="Shorter sides to train at, pixels.")
@click.option("--rate", default=1e-4, show_default=True, help="Peak learning rate of FPN, box head and classes.")
@click.option("--trunk-rate", default=2e-5, show_default=True, help="Peak learning rate of the trunk.")
@click.option("--freeze", default=6, show_default=True, help="Trunk parts to freeze: 0 none to 6 all.")
@click.option("--proposals/--no-proposals", default=False, help="Train RPN too; advisable if the trunk is.")
@click.option("--bfloat16/--float32", default=False, help="Autocast: faster where the CPU has AMX or AVX512-BF16.")
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", default=100, show_default=True)
@click.option("--resume/--no-resume", default=True, help="Go on from OUT's checkpoint if there is one (the default).")
@click.option("--init", type=click.Path(exists=True, path_type=Path), help="Initial weights, safetensors.")
@click.option("--size", type=int, help="Shorter side to evaluate at; the config's if not given.")
@click.option("--export", "export_path", type=click.Path(path_type=Path), help="Write the weights to this file.")
@click.option("--blend", default=1.0, show_default=True, help="Share of the trained weights; the rest is --init's.")
@click.option("--eval-only", is_flag=True, help="Evaluate OUT's checkpoint, or --init without one; do not train.")
def main(data: Path, out: Path, init: Path | None, export_path: Path | None, eval_only: bool, **options: Any) -> None:
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    cfg = load_config(options["freeze"], options["size"])
    model = build(cfg)
    if init:
        model.load_state_dict({k: v.float() for k, v in load_file(init).items()}, strict=False)
    if not eval_only:
        sizes = [int(size) for size in options["sizes"].split(",")]
        batches = Batches(load_records(data, "train"), cfg, options["batch"], sizes, options["seed"])
        train(model, batches, out, options)
    elif (not init or options["blend"] < 1) and (out / "checkpoint.pth").exists():
        saved = torch.load(out / "checkpoint.pth", weights_only=True)
        model.load_state_dict(saved["model"])
        model.load_state_dict(saved["average"], strict=False)
    if init and options["blend"] < 1:
        begun = load_file(init)
        model.load_state_dict({k: begun[k].float().lerp(v, options["blend"]) for k, v in model.state_dict().items()})
    if export_path:
        export(model.state_dict(), export_path)
        model.load_state_dict({k: v.float() for k, v in load_file(export_path).items()})
    result = evaluate(model, cfg, data, out)
    click.echo(json.dumps({k: round(v, 3) for k, v in result.items()}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
