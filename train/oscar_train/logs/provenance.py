"""starts.jsonl of a run folder: when, where and with what the run was started, and each time that it went on."""

import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from oscar_common import __version__
from oscar_common.files import replacing
from oscar_train.data.sources import Source, manifest_sha256

FILE = "starts.jsonl"
LIBRARIES = ("torch", "transformers", "numpy")


def record_start(
    out: Path,
    *,
    step: int,
    device: torch.device,
    ranks: int,
    shards: Sequence[Source],
    eval_shards: Sequence[Source] = (),
) -> None:
    """Add a line about this start of the command.

    Args:
        out: the run folder.
        step: the one that it goes on from, 0 at first.
        device: of this rank.
        ranks: how many there are.
        shards: what is trained on.
        eval_shards: what is held out beside it.
    """
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "device": device_name(device),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "versions": {"oscar-pretrain": __version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
        "shards": [_described(source) for source in shards],
        "eval_shards": [_described(source) for source in eval_shards],
    }
    path = out / FILE
    before = path.read_bytes() if path.exists() else b""

    with replacing(path) as file:
        file.write(before + json.dumps(line, ensure_ascii=False).encode() + b"\n")


def device_name(device: torch.device) -> str:
    """Return what a GPU or this machine's CPU is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _described(source: Source) -> dict[str, Any]:
    return {
        "place": source.place if source.folder is None else str(source.folder.resolve()),
        "manifest_sha256": manifest_sha256(source),
        "images": source.manifest.plan.num_images,
        "weights_sha256": source.manifest.detector.weights_sha256,
    }
