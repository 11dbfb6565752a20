"""Small but real shards: what the tests of stage 2 read."""

from pathlib import Path

import numpy as np

from oscar_common.sample import ImageRecord, Regions, Sample, Text
from oscar_shards.manifest import DetectorRecord, Layout, Manifest, PlanRecord, write_manifest
from oscar_shards.write import shard_path, write_shard

P = 24
CLASSES = ["cat", "dog", "traffic light", "person", "sofa", "pizza", "frisbee", "zebra", "hair drier", "skateboarder"]


def make_sample(number: int, rng: np.random.Generator) -> Sample:
    """Image `number`. Its features show its classes; 3 has no text, 4 no regions, 5 has 60 of them, 7 the tags of 6."""
    count = {4: 0, 5: 60, 6: 5, 7: 5}.get(number, int(rng.integers(3, 9)))
    classes = np.zeros(5, int) if number in (6, 7) else rng.integers(0, len(CLASSES), count)
    size = np.array([640, 480] if number % 2 else [300, 500], np.float32)
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * size
    features = rng.normal(0, 0.1, (count, P))
    features[np.arange(count), classes] += 3
    tags = [CLASSES[c] for c in classes]
    seen = " and a ".join(tags[: 1 + number % 12]) or "nothing"
    texts = [Text(kind="caption", source="c", id=f"{n}", text=f"Photo {n} of a {seen}, undeniably!") for n in range(3)]
    if number % 4 == 1:
        answer = ["yes", "no", "two of them"][number // 4 % 3]
        texts.append(Text(kind="qa", source="q", id="q", question=f"Is a {seen} there?", answer=answer))
    return Sample(
        key=f"image-{number:03d}",
        image=ImageRecord(
            source="test",
            id=str(number),
            path=f"{number}.jpg",
            width=int(size[0]),
            height=int(size[1]),
            sha256="0" * 64,
        ),
        regions=Regions(
            boxes=corners.reshape(count, 4).astype(np.float32),
            features=features.astype(np.float16),
            tags=tags,
            scores=np.sort(rng.uniform(size=count))[::-1].tolist(),
        ),
        texts=[] if number == 3 else texts,
    )


def write_folder(
    folder: Path, samples: list[Sample], per_shard: int = 9, feature_dim: int = P, dtype: str = "float16"
) -> Path:
    """Write samples as oscar-extract would."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [samples[i : i + per_shard] for i in range(0, len(samples), per_shard)]
    for number, part in enumerate(parts):
        write_shard(shard_path(folder, "shard", number), part, Layout(feature_dim=feature_dim, dtype=dtype))
    detector = DetectorRecord(
        name="test",
        preset="detectron2",
        config="",
        weights="w",
        weights_sha256="0",
        classes=CLASSES,
        feature_dim=feature_dim,
        dtype=dtype,
    )
    plan = PlanRecord(
        images="images",
        captions=None,
        num_images=len(samples),
        num_texts=sum(len(s.texts) for s in samples),
        images_per_shard=per_shard,
        num_shards=len(parts),
        sha256="0",
    )
    write_manifest(folder, Manifest(name="shard", detector=detector, settings={}, plan=plan))
    return folder


def make_samples(count: int = 40) -> list[Sample]:
    rng = np.random.default_rng(1)
    return [make_sample(number, rng) for number in range(count)]
