"""Small but real shards for tasks: captions, questions, and statements about pairs of images."""

from dataclasses import replace
from pathlib import Path

from small_shards import make_samples, write_folder

from oscar_common.sample import Sample, Text


def with_questions(samples: list[Sample]) -> list[Sample]:
    """Each image with the question what its first tag is."""
    made = []
    for number, sample in enumerate(samples):
        answer = (sample.regions.tags or ["nothing"])[0]
        question = Text(kind="qa", source="q", id=f"q{number}", question="What is that?", answer=answer)
        made.append(replace(sample, texts=[*sample.texts, question]))
    return made


def paired(samples: list[Sample]) -> list[Sample]:
    """Pairs of images; the left one has a statement about both."""
    made = []
    for number, sample in enumerate(samples):
        pair, side = divmod(number, 2)
        key = f"train-{pair}-0-img{side}"
        answer = "True" if pair % 3 else "False"
        statement = Text(kind="qa", source="nlvr2", id=f"train-{pair}-0", question="Both show one.", answer=answer)
        image = replace(sample.image, id=key, path=f"{key}.png")
        made.append(replace(sample, key=key, image=image, texts=[] if side else [statement]))
    return made


def write_task_shards(task: str, folder: Path) -> Path:
    """The shards that a task is tried on."""
    samples = make_samples(24)
    form = {"retrieval": lambda same: same, "vqa": with_questions, "gqa": with_questions, "nlvr2": paired}[task]
    return write_folder(folder, form(samples))
