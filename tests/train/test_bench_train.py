"""The bench of training steps: every way trains, and the released step does the work that ours does."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
WAYS = [f"{kind}-{precision}" for precision in ("fp32", "bf16") for kind in ("ours", "release", "visualbert")]
ABLATION = [f"ours-fp32-{twist}" for twist in ("padded", "everywhere", "unfused", "accumulate", "recompute")]


class Inline:
    """A worker in this process: to start one for each way takes a minute."""

    def __init__(self, way: str, answers: Iterator[dict[str, Any]], lines: list[str]) -> None:
        self.way, self._answers, self._lines = way, answers, lines

    def answer(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(json.dumps(next(self._answers)))
        return content

    def ask(self, *words: object) -> Any:
        self._lines.append(" ".join(map(str, words)))
        return self.answer()


@contextmanager
def inline(command: str, job: Any, *rest: str) -> Iterator[Inline]:
    lines: list[str] = []
    answers = import_module("steps").answers(command, job, iter(lambda: lines.pop(0), None), *rest)
    yield Inline(job.way, answers, lines)
    answers.close()


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        module = import_module("train")
        patch.setattr(module, "started", inline)
        yield module


@pytest.fixture(scope="module")
def report(bench: Any, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "report.json"
    line = f"--shards {shards} --sizes tiny --device cpu --threads 1 --warmup 1 --rounds 1 --steps 1 --out {out}"
    bench.main.main([*line.split(), "--batch-sizes", "8", "--ways", ",".join(WAYS)], standalone_mode=False)
    content: dict[str, Any] = json.loads(out.read_text())
    return content


@pytest.mark.slow
def test_every_way_is_measured(report: dict[str, Any]) -> None:
    found = report["sizes"]["tiny"]
    assert list(found["ways"]) == WAYS
    assert {*ABLATION, "ours-bf16"} == found["ablation"].keys()
    for way in found["ways"].values():
        assert way["samples_per_second"]["median"] > 0
        assert way["of_ceiling"] > 0  # the ceiling is measured at another time, when others may be working
        assert way["peak_gb"] > 0
        assert math.isfinite(way["last_loss"])
    for precision in ("fp32", "bf16"):
        ours = found["ways"][f"ours-{precision}"]
        assert {f"to_release-{precision}", f"to_visualbert-{precision}", "waited"} < ours.keys()
        assert (found["goal"][f"ours-{precision}"] == "met") == (ours[f"to_release-{precision}"] >= 1.3)


@pytest.mark.slow
def test_the_released_step_does_the_same_work_as_ours(report: dict[str, Any]) -> None:
    """On the same weights and batch, without dropout, to rounding; and nothing of ours is far from fp32."""
    found = report["sizes"]["tiny"]["numerics"]
    assert found["release-fp32"]["loss_difference"] < 1e-6
    assert found["release-fp32"]["norm_difference"] < 1e-5
    assert found["release-fp32"]["gradient_cosine"] > 1 - 1e-9
    assert 0 < found["ours-bf16"]["loss_difference"] < 1e-2
    assert found["ours-bf16"]["gradient_cosine"] > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ours-fp32", "release-fp32", "visualbert-fp32"])
def test_each_model_learns(bench: Any, shards: Path, tmp_path: Path, way: str) -> None:
    steps = import_module("steps")
    job = steps.Job(
        way=way, size="tiny", batch_size=8, shards=[str(shards)], cache=str(tmp_path), device="cpu", threads=1
    )
    with bench.started("serve", job) as worker:
        first, last = worker.answer()["loss"], worker.ask(0, 8)["loss"]
    assert last < first - 0.1


def test_the_released_optimizer_is_adamw(bench: Any) -> None:
    """It decays after the step instead of before it: of the second order in the learning rate."""
    import torch

    theirs, ours = (torch.nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    one = import_module("released").make_optimizer(theirs, 1e-3)
    groups = [{"params": [ours.weight], "weight_decay": 0.01}, {"params": [ours.bias], "weight_decay": 0.0}]
    other = torch.optim.AdamW(groups, lr=1e-3)
    for seed in range(4):
        gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
        for model, optimizer in ((theirs, one), (ours, other)):
            model.weight.grad, model.bias.grad = gradient.clone(), gradient[:, 0].clone()
            optimizer.step()
    for expected, got in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_command_makes_shards_and_starts_processes(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    line = "--sizes tiny --images 40 --regions 20 --rounds 1 --ways ours-fp32,ours-fp32-compile,release-fp32"
    command = [sys.executable, BENCH / "train.py", *line.split(), "--no-ablation", "--out", out, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["sizes"]["tiny"]
    assert found["per_sample"]["regions"] == 20
    assert found["numerics"]["ours-fp32-compile"]["gradient_cosine"] > 0.9999
    assert found["ways"]["ours-fp32-compile"]["samples_per_second"]["median"] > 0
