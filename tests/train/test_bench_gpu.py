"""The bench of a GPU: its page is made of its numbers, and without a GPU it says so."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from oscar_common.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module


def test_the_page_in_docs_is_the_one_made_of_the_numbers(bench: Any):
    assert (ROOT / "docs" / "benchmarks.md").read_text() == bench("page").page()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_ends_in_one_line(bench: Any, tmp_path: Path):
    result = CliRunner().invoke(bench("gpu").main, ["--out", str(tmp_path)], standalone_mode=False)
    assert isinstance(result.exception, UsageError)
    assert "no GPU that torch can use" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_results_of_several_parts_become_one_report(bench: Any):
    report: dict[str, Any] = {"training": {"base": {"eager": {"waited": 0.1}}}}
    bench("gpu").merge(report, {"training": {"base": {"compiled": {"waited": 0.2}}}, "ceiling": 7})
    assert report == {"training": {"base": {"eager": {"waited": 0.1}, "compiled": {"waited": 0.2}}}, "ceiling": 7}


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "matrix products"),
        ("_backward", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedOptimizer>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies from the host"),
        ("triton_poi_fused_gelu_view_5", "LayerNorm, GELU, sums, casts and the rest"),
    ],
)
def test_kernels_are_grouped_by_what_they_do(bench: Any, kernel: str, group: str):
    assert bench("gpu").group_of(kernel) == group
