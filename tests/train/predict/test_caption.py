"""`oscar-predict caption`, with a model of random weights: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_shards import P, make_samples, write_folder
from support import error_line, run_here

from oscar_common.settings import Train
from oscar_train.checkpoints import checkpoint
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.model.oscar import OscarForPreTraining, oscar_config, random_config
from oscar_train.predict.captions import caption
from oscar_train.predict_command import command


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("captions") / "shards", make_samples(7))


def save_model(folder: Path, tokenizer: Tokenizer, feature_dim: int = P, **about: object) -> Path:
    """A checkpoint of random weights."""
    torch.manual_seed(1)
    config = random_config("tiny", tokenizer.size)
    config.initializer_range = 0.2  # so that it has opinions
    model = OscarForPreTraining(oscar_config(config, feature_dim))
    settings = {**checkpoint.identity(Train()), "corpus": "abc"}
    checkpoint.save(folder, 3, settings, model, torch.optim.SGD(model.parameters()), tokenizer, about=about)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return save_model(tmp_path_factory.mktemp("captions") / "run", tokenizer, task="caption")


def predict(*arguments: object):
    return run_here(command, "caption", *arguments)


def test_each_photo_has_its_line_in_json_on_a_page_and_from_python(run: Path, shards: Path, tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (300, 500), "red").save(photos / "2.jpg")
    page, file = tmp_path / "captions.html", tmp_path / "captions.json"

    done = predict("--model", run, "--shards", shards, "--images", photos, "--html", page, "--json", file, "--score")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    captions = [tuple(line.split(": ", 1)) for line in lines[:7]]
    assert [name for name, _ in captions] == [f"{number}.jpg" for number in range(7)]
    assert lines[7].startswith("6 photos: bleu_4 ")  # one has no caption to compare with

    content = json.loads(file.read_text())
    assert [(row["path"], row["caption"]) for row in content["captions"]] == captions
    assert content["scores"].keys() >= {"bleu_4", "cider_d", "rouge_l"}
    text = page.read_text()
    assert text.count("<figure>") == 7
    assert text.count("data:image/jpeg") == 1

    again = [(photo.name, photo.caption) for photo in caption(run, shards=shards)]
    assert again == captions


def test_captions_mention_what_they_are_asked_to(run: Path, shards: Path):
    done = predict("--model", run, "--shards", shards, "--mention", "hot dog", "--mention", "cat|cats", "--beams", 2)
    assert done.returncode == 0, done.stderr
    captions = [line.split(": ", 1)[1] for line in done.stdout.splitlines()]
    assert all("hot dog" in text and ("cat" in text) for text in captions)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "RUN"], "error: no photos: give a folder of them, --images DIR, or what oscar-extract wrote"),
        (["--model", "nope", "--shards", "SHARDS"], "error: --model nope: no such folder; give that of a model or"),
        (["--model", "RUN", "--images", "nope"], "error: --images nope: no such folder; give a folder of photos"),
        (["--model", "RUN", "--shards", "nope"], "error: --shards nope: no such folder; give one made by"),
        (["--model", "RUN", "--images", "RUN", "--score"], "error: --score: compares with the captions in --shards"),
        (["--model", "RUN", "--shards", "SHARDS", "--mention", "a|"], "error: --mention 'a|': an empty word; give a"),
    ],
)
def test_bad_input_gets_one_line(run: Path, shards: Path, arguments: list[str], line: str):
    places = {"RUN": run, "SHARDS": shards}
    done = predict(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert error_line(done).startswith(line)


def test_a_model_that_was_not_trained_to_write_is_refused(shards: Path, tokenizer: Tokenizer, tmp_path: Path):
    done = predict("--model", save_model(tmp_path / "run", tokenizer), "--shards", shards)
    assert done.returncode == 2
    assert "pre-trained only; make one with: oscar-finetune caption --init" in error_line(done)


def test_a_model_for_other_features_is_refused(shards: Path, tokenizer: Tokenizer, tmp_path: Path):
    done = predict("--model", save_model(tmp_path / "run", tokenizer, 40, task="caption"), "--shards", shards)
    assert done.returncode == 2
    assert f"is for regions of 40 features, these photos' have {P}" in error_line(done)
