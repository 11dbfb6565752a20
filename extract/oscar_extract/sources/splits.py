"""Karpathy's splits of COCO and Flickr30k, by which downstream validation and test images are known."""

from typing import Any

from oscar_common.tables import reading
from oscar_extract.sources.inventory import Inventory
from oscar_extract.sources.place import Place, read_json, split_of

# As Karpathy and Fei-Fei (2015) published them
FILES = {"coco": ("dataset_coco.json",), "flickr30k": ("dataset_flickr30k.json", "dataset_flickr8k.json")}


def karpathy_splits(inventory: Inventory) -> dict[str, dict[str, str]]:
    """Return the split of every image ("coco/139") in dataset_coco.json and dataset_flickr30k.json, if there."""
    return {family: {image: split for image, split, *_ in _entries(inventory, family)} for family in FILES}


def karpathy_texts(place: Place, family: str) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Return images (dataset, image, name, split) and texts of the wanted splits from Karpathy's file itself."""
    images: list[tuple[Any, ...]] = []
    texts: list[tuple[Any, ...]] = []
    for image, split, name, sentences in _entries(place.inventory, family):
        images.append((place.name, image, name, split))
        if split in place.splits:
            texts += [(image, "caption", family, number, sentence, None, None) for number, sentence in sentences]

    return images, texts


def _entries(inventory: Inventory, family: str) -> list[tuple[str, str, str, list[tuple[str, str]]]]:
    """Return ("coco/139", split, file name, [(id, caption)]) of each image."""
    entries = []
    for path in inventory.annotations:
        if path.name in FILES[family]:
            with reading(path, "--root"):
                for entry in read_json(path, dict, "raw", "sentid")["images"]:
                    name = str(entry["filename"])
                    number = int(entry["cocoid"]) if family == "coco" else name.rpartition(".")[0] or name
                    sentences = [(str(s.get("sentid", "")), str(s["raw"])) for s in entry.get("sentences", [])]
                    entries.append((f"{family}/{number}", split_of(str(entry["split"])), name, sentences))

    return entries
