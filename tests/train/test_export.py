"""Exports are what microsoft/Oscar's fine-tuning and Hugging Face read, and come back to the bit."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import contents, error_line, run_here
from torch import Tensor
from transformers import BertForPreTraining, BertModel

from oscar_common.settings import Train
from oscar_train.checkpoints import checkpoint
from oscar_train.checkpoints.command import command
from oscar_train.checkpoints.init import build, open_init
from oscar_train.checkpoints.tensor_names import WORDS
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.model.oscar import random_config

oscar_checkpoint = partial(run_here, command)
RUN = {**checkpoint.identity(Train()), "corpus": "abc"}
CLASSES = {2: ("polluted", "matched"), 3: ("matched", "wrong w", "wrong q")}


def save(out: Path, tokenizer: Tokenizer, step: int = 7, classes: int = 3, norm: bool = True) -> Path:
    """A checkpoint of a run, with random weights, and norms and biases that are not 1 and 0."""
    model, _ = build(open_init("random:tiny"), 24, 1, classes=CLASSES[classes], image_layernorm=norm)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return checkpoint.save(out, step, RUN, model, torch.optim.SGD(model.parameters()), tokenizer).folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A run with one checkpoint; not to be changed."""
    out = tmp_path_factory.mktemp("run")
    save(out, tokenizer)
    return out


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    BertForPreTraining(random_config("tiny", 30522)).save_pretrained(folder)
    return folder


def export(source: Path, form: str, out: Path, *flags: str) -> str:
    done = oscar_checkpoint("export", source, "--format", form, "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def names(norm: bool) -> list[str]:
    """Oscar's state dict of two layers, in its order."""
    both = ("weight", "bias")
    found = [f"bert.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")]
    found += [f"bert.embeddings.LayerNorm.{n}" for n in both]
    for layer in range(2):
        inside = [f"attention.self.{n}" for n in ("query", "key", "value")]
        inside += ["attention.output.dense", "attention.output.LayerNorm", "intermediate.dense"]
        inside += ["output.dense", "output.LayerNorm"]
        found += [f"bert.encoder.layer.{layer}.{part}.{n}" for part in inside for n in both]
    found += [f"bert.{part}.{n}" for part in ("pooler.dense", "img_embedding", *["LayerNorm"] * norm) for n in both]
    found += ["cls.predictions.bias"]
    found += [f"cls.predictions.transform.{part}.{n}" for part in ("dense", "LayerNorm") for n in both]
    return [*found, "cls.predictions.decoder.weight", "cls.seq_relationship.weight", "cls.seq_relationship.bias"]


@pytest.mark.parametrize(("classes", "norm"), [(2, False), (3, True)])
def test_oscar_gets_its_keys_in_its_order_and_every_field(
    tmp_path: Path, tokenizer: Tokenizer, classes: int, norm: bool
):
    made, out = save(tmp_path / "run", tokenizer, classes=classes, norm=norm), tmp_path / "out"
    export(tmp_path / "run", "oscar", out)
    files = {"config.json", "pytorch_model.bin", "vocab.txt", "tokenizer_config.json", "export.json"}
    assert {p.name for p in out.iterdir()} == files
    assert not zipfile.is_zipfile(out / "pytorch_model.bin")
    state, before = torch.load(out / "pytorch_model.bin", weights_only=True), load_file(made / "model.safetensors")
    assert type(state) is OrderedDict
    assert list(state) == names(norm)
    assert all(torch.equal(state[n], t) and state[n].is_contiguous() for n, t in before.items())
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert json.loads((out / "config.json").read_text()) == {
        **{"vocab_size": 30522, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 512, "hidden_act": "gelu", "hidden_dropout_prob": 0.1},
        **{"attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512, "type_vocab_size": 2},
        **{"initializer_range": 0.02, "layer_norm_eps": 1e-12},
        **{"img_feature_dim": 30, "img_feature_type": "faster_r-cnn", "use_img_layernorm": int(norm)},
        **{"img_layer_norm_eps": 1e-12, "num_contrast_classes": classes, "contrast_classes": list(CLASSES[classes])},
        **{"finetuning_task": None, "num_labels": 2, "output_attentions": False, "output_hidden_states": False},
        **{"pruned_heads": {}, "torchscript": False},
    }
    assert (out / "vocab.txt").read_bytes() == (made / "vocab.txt").read_bytes()


def test_the_way_back_is_the_same_bits(tmp_path: Path, run: Path):
    """Checkpoint, oscar, hf, oscar; and --init takes each."""
    made, out = run / "checkpoint-000007", [tmp_path / name for name in ("1-oscar", "2-hf", "3-oscar", "4-hf")]
    export(run, "oscar", out[0])
    export(out[0], "hf", out[1])
    export(out[1], "oscar", out[2])
    export(made, "hf", out[3])
    for name in ("model.safetensors", "vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        assert (out[1] / name).read_bytes() == (out[3] / name).read_bytes() == (made / name).read_bytes(), name
    assert (out[3] / "config.json").read_bytes() == (made / "config.json").read_bytes()
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        assert (out[0] / name).read_bytes() == (out[2] / name).read_bytes(), name
    before = load_file(made / "model.safetensors")
    for folder in out:
        model, line = build(open_init(str(folder)), 24, seed=9, classes=CLASSES[3])
        assert line.endswith("parameters; random: none")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tensors_that_are_parts_of_one_memory_are_written_alone(tmp_path: Path, run: Path):
    export(run, "oscar", tmp_path / "first")
    state = torch.load(tmp_path / "first" / "pytorch_model.bin", weights_only=True)
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    views = {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}
    torch.save(views, tmp_path / "first" / "pytorch_model.bin")
    export(tmp_path / "first", "oscar", tmp_path / "second")
    path = tmp_path / "second" / "pytorch_model.bin"
    again = torch.load(path, weights_only=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert again["cls.predictions.decoder.weight"].data_ptr() == again[WORDS].data_ptr()
    size = 4 * sum(tensor.numel() for name, tensor in state.items() if "decoder" not in name)
    assert size < path.stat().st_size < size + 50_000


def test_stock_transformers_opens_the_text_side(tmp_path: Path, tokenizer: Tokenizer):
    save(tmp_path / "run", tokenizer, classes=2)
    export(tmp_path / "run", "hf", tmp_path / "hf")
    before = load_file(tmp_path / "hf" / "model.safetensors")
    for model, prefix in (
        (BertModel.from_pretrained(tmp_path / "hf"), "bert."),
        (BertForPreTraining.from_pretrained(tmp_path / "hf"), ""),
    ):
        state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
        common = state.keys() & before.keys()
        assert len(common) == len(before) - (4 if prefix == "" else 4 + 8)  # regions and LayerNorm; the heads
        assert all(torch.equal(state[name], before[name]) for name in common)


def test_half_precision_becomes_exact_float32(tmp_path: Path, run: Path):
    export(run, "oscar", tmp_path / "half")
    path = tmp_path / "half" / "pytorch_model.bin"
    half = {name: tensor.half() for name, tensor in torch.load(path).items()}
    torch.save(half, path)
    assert "dtype       float16" in oscar_checkpoint("show", tmp_path / "half").stdout
    export(tmp_path / "half", "oscar", tmp_path / "out")
    for name, tensor in torch.load(tmp_path / "out" / "pytorch_model.bin").items():
        assert torch.equal(tensor, half[name].float())


def test_what_the_source_lacks_is_said_and_not_made_up(tmp_path: Path, bert: Path):
    said = export(bert, "oscar", tmp_path / "bert")
    assert "not in it, as the source has none: bert.img_embedding (2 tensors)\n" in said
    state = torch.load(tmp_path / "bert" / "pytorch_model.bin")
    assert list(state) == [name for name in names(False) if "img_embedding" not in name]
    tuned: dict[str, Tensor] = {name: tensor for name, tensor in state.items() if not name.startswith("cls.")}
    torch.save({**tuned, "classifier.weight": torch.ones(2, 2)}, tmp_path / "bert" / "pytorch_model.bin")
    said = export(tmp_path / "bert", "hf", tmp_path / "tuned")
    assert "cls.predictions (1 tensor), " in said
    assert said.endswith("left out: classifier (1 tensor)\n")
    assert load_file(tmp_path / "tuned" / "model.safetensors").keys() == {*tuned, "cls.predictions.decoder.weight"}


def test_show_says_what_it_is(run: Path, bert: Path, tmp_path: Path):
    done = oscar_checkpoint("show", run)
    assert done.returncode == 0
    assert dict(line.split(maxsplit=1) for line in done.stdout.replace("image norm", "norm").splitlines()) == {
        "format": "checkpoint of oscar-train",
        "step": "7",
        "parameters": f"{4_437_436 + 2 * 128 + 129:,}",
        "sizes": "2 layers, hidden 128, 2 heads, inner 512, 512 positions",
        "features": "24 and 6 of the box",
        "norm": "LayerNorm, eps 1e-12",
        "classes": "3 (matched, wrong w, wrong q)",
        "vocabulary": "30,522 entries, 30,522 rows",
        "dtype": "float32",
        "whole": "yes, by size and hash",
        "missing": "none",
        "extra": "none",
    }
    shown = oscar_checkpoint("show", bert).stdout
    for line in (
        "format      BERT, without regions, in model.safetensors",
        "classes     2 (matched, polluted, as in the releases)",
        "whole       unknown: only oscar-train's checkpoints have seals",
        "missing     bert.img_embedding (2 tensors)",
    ):
        assert f"{line}\n" in shown


def test_the_newest_whole_checkpoint_of_a_run_counts(run: Path, tmp_path: Path):
    out = Path(shutil.copytree(run, tmp_path / "run"))
    later = Path(shutil.copytree(out / "checkpoint-000007", out / "checkpoint-000009"))
    with (later / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    done = oscar_checkpoint("show", out)
    assert "step        7\n" in done.stdout
    assert "checkpoint-000009 is damaged (model.safetensors has 1000 bytes" in done.stderr
    damaged = oscar_checkpoint("show", later)
    assert damaged.returncode == 1
    assert "is damaged (model.safetensors has 1000 bytes, written were" in error_line(damaged)
    shutil.rmtree(out / "checkpoint-000007")
    none = oscar_checkpoint("export", out, "--format", "hf", "--out", tmp_path / "x")
    assert none.returncode == 1
    assert "none of its checkpoints is whole" in error_line(none)
    assert not (tmp_path / "x").exists()


def test_what_is_no_model_is_one_line(tmp_path: Path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.yaml").write_text("steps: 3\n")
    for folder, message in (
        (tmp_path / "begun", "a run without any checkpoint yet"),
        (tmp_path, "neither a model nor a run"),
        (tmp_path / "none", "no such folder"),
    ):
        done = oscar_checkpoint("export", folder, "--format", "oscar", "--out", tmp_path / "out")
        assert done.returncode == 2
        assert error_line(done).startswith(f"error: FOLDER {folder}: {message}; give")


def test_only_an_export_is_replaced(run: Path, tmp_path: Path):
    out = tmp_path / "out"
    export(run, "hf", out)
    refused = oscar_checkpoint("export", run, "--format", "oscar", "--out", out)
    assert refused.returncode == 2
    assert "not empty; give another --out, or --overwrite" in error_line(refused)
    export(run, "oscar", out, "--overwrite")
    assert not (out / "model.safetensors").exists()
    (out / "notes.txt").write_text("mine")
    for name in ("bert", "tuned"):  # somebody's BERT; an export into which fine-tuning has written its model
        shutil.copytree(out, tmp_path / name, ignore=lambda *_: ["notes.txt"])
    (tmp_path / "bert" / "export.json").unlink()
    with (tmp_path / "tuned" / "pytorch_model.bin").open("r+b") as file:
        file.write(b"tuned")
    before = contents(tmp_path) | contents(run)
    for place, message in (
        (out, "is no export (notes.txt is in it)"),
        (run, "is no export (no export.json in it)"),
        (run / "checkpoint-000007", "is no export (no export.json in it)"),
        (tmp_path / "bert", "is no export (no export.json in it)"),
        (tmp_path / "tuned", "is no export (pytorch_model.bin changed)"),
        (out / "notes.txt", "a file; give a folder"),
    ):
        done = oscar_checkpoint("export", run, "--format", "hf", "--out", place, "--overwrite")
        assert done.returncode == 2
        assert message in error_line(done)
    assert contents(tmp_path) | contents(run) == before
    (out / "notes.txt").unlink()
    done = oscar_checkpoint("export", out, "--format", "hf", "--out", out, "--overwrite")
    assert "the model itself; give another --out" in error_line(done)


@pytest.mark.parametrize("form", ["oscar", "hf"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    run: Path, tmp_path: Path, disk: Callable[[str], Path], form: str
):
    place = disk("20m")  # an export takes 18 or 34
    if form == "hf":
        export(run, "oscar", place / "out")
    else:
        (place / "filler").write_bytes(bytes(8 << 20))
    before = contents(place)
    done = oscar_checkpoint("export", run, "--format", form, "--out", place / "out", "--overwrite")
    assert done.returncode == 1
    assert "No space left on device" in error_line(done)
    assert "free some space" in error_line(done)
    assert contents(place) == before


def test_arguments_are_checked_before_torch_is_imported():
    code = "import sys, oscar_train.checkpoints.command; assert not {'torch', 'transformers'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


REAL = """
import sys, types
repo, export, out = sys.argv[1:]
sys.path[:0] = [repo, f"{repo}/transformers"]
for name in ("transformers", "sacremoses", "oscar.utils.cbs"):  # its submodule goes by this name; the others are unused
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__getattr__ = lambda attribute: None
sys.modules["transformers"].__path__ = [f"{repo}/transformers"]
import torch
from oscar.modeling import modeling_bert as oscar
from transformers.pytorch_transformers import BertConfig, BertTokenizer
config = BertConfig.from_pretrained(export, num_labels=2, finetuning_task="retrieval")
for name in ("loss_type", "freeze_embedding", "label_smoothing", "drop_worst_ratio", "drop_worst_after", "tie_weights"):
    setattr(config, name, 0)
found = {"tokens": BertTokenizer.from_pretrained(export, do_lower_case=True).tokenize("Two Dogs' [MASK] déjà-vu")}
for model in (oscar.BertForImageCaptioning, oscar.BertImgForPreTraining, oscar.ImageBertForSequenceClassification):
    made, told = model.from_pretrained(export, config=config, output_loading_info=True)
    found[model.__name__] = (made.state_dict(), told["missing_keys"], told["error_msgs"])
torch.save(found, out)
"""


def test_the_real_oscar_loads_an_export(run: Path, tmp_path: Path, tokenizer: Tokenizer):
    """Its own classes, with its submodule `transformers` (pytorch-transformers 1.0) in the checkout."""
    repo = os.environ.get("OSCAR_REPO", "")
    if not (Path(repo) / "transformers" / "pytorch_transformers").is_dir():
        pytest.skip("OSCAR_REPO names no checkout of microsoft/Oscar with its submodules")
    export(run, "oscar", tmp_path / "out")
    line = [sys.executable, "-W", "ignore", "-c", REAL, repo, str(tmp_path / "out"), str(tmp_path / "found")]
    done = subprocess.run(line, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found, before = torch.load(tmp_path / "found"), load_file(run / "checkpoint-000007" / "model.safetensors")
    assert found.pop("tokens") == tokenizer.backend.tokenize("Two Dogs' [MASK] déjà-vu")
    for name, (state, missing, errors) in found.items():
        assert not errors
        assert all(key.startswith("classifier") for key in missing), name
        assert all(torch.equal(state[key], before[key]) for key in state.keys() & before.keys())
        assert len(state.keys() & before.keys()) >= 43
    assert found["BertImgForPreTraining"][0].keys() == before.keys()
