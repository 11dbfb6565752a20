"""Numbers of shards: as counted by hand, over many shards with little memory, and as a page."""

import json
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from browser import look, needs_chromium
from PIL import Image
from small_shards import CLASSES, make_samples, write_folder
from support import error_line, run_here
from transformers import BertTokenizerFast

from oscar_common.wordpiece import SHIPPED, wordpiece
from oscar_shards.__main__ import command
from oscar_shards.index import index_path
from oscar_shards.pages.lengths import LIMIT, Lengths
from oscar_shards.pages.plots import binned, sparkline
from oscar_shards.pages.report import facts, measure
from oscar_shards.read import open_folder, tars_at
from oscar_shards.stats import Stats, count, quantile
from oscar_train.batch import MAX_TEXT

REPORT = Path(__file__).parents[2] / "tools" / "demo_report.py"
SAMPLES = make_samples()
METRICS = """step,epoch,loss,mlm_loss,match_loss,mlm_accuracy,match_accuracy,lr,samples_per_second
1,0,11,10.3,0.7,0,0.5,1e-4,9
2,0,10,9.4,0.6,0.1,0.6,1e-4,9
"""
EVALUATION = """step,words_loss,words_accuracy,tags_loss,tags_accuracy,match_loss,match_accuracy
1,10.3,0,,,0.7,0.5
2,9.4,0.1,9.5,0.1,0.6,0.6
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("stats") / "shards", SAMPLES)


@pytest.fixture(scope="module")
def bert() -> BertTokenizerFast:
    return BertTokenizerFast.from_pretrained(str(SHIPPED))


def test_the_numbers_are_those_of_the_samples(folder):
    found = measure([folder])
    stats = found.stats
    per_image = [len(s.regions.boxes) for s in SAMPLES]
    assert (stats.images, stats.shards, stats.regions) == (40, 5, sum(per_image))
    assert stats.regions_of_image == Counter(per_image)
    assert stats.tags == Counter(t for s in SAMPLES for t in s.regions.tags)
    assert stats.triples == Counter(f"{t.source}, {t.kind}" for s in SAMPLES for t in s.texts)
    assert stats.images_without_text == sum(not s.texts for s in SAMPLES)
    scores = np.float32([score for s in SAMPLES for score in s.regions.scores])
    assert stats.scores.tolist() == np.histogram(scores, 20, (0, 1))[0].tolist()
    assert stats.bytes == sum(p.stat().st_size for p in folder.glob("*.tar"))
    assert stats.index_bytes == sum(index_path(p).stat().st_size for p in folder.glob("*.tar"))
    assert (count(tars_at(folder)).tags, count(tars_at(folder)).regions) == (stats.tags, stats.regions)
    assert dict(facts(found))["tags"].endswith(f"{len(CLASSES) - len(stats.tags)} of the vocabulary's 10 never occur")


def test_tokens_are_those_that_training_counts(folder, bert):
    lengths = measure([folder]).lengths
    of_tags = {s.key: len(bert.tokenize(" ".join(s.regions.tags))) for s in SAMPLES}
    assert lengths.tags == Counter(of_tags.values())
    texts = [(s, t) for s in SAMPLES for t in s.texts]
    words = [len(bert.tokenize(t.text or t.question)) for _, t in texts]
    others = [len(bert.tokenize(t.answer)) if t.answer else of_tags[s.key] for s, t in texts]
    assert lengths.words.tolist() == words
    assert lengths.triples.tolist() == [a + b for a, b in zip(words, others, strict=True)]
    assert LIMIT == MAX_TEXT


@pytest.mark.parametrize(
    "text",
    ["Héllo WÖRLD, unaffable!", "中文字 mixed in", "a\u0000b\ufffdc\td", "naïve café №5 ½", "🙂 ok", "x" * 150, ""],
)
def test_words_are_split_as_transformers_does(bert, text):
    assert wordpiece().encode(text, add_special_tokens=False).tokens == bert.tokenize(text)


def test_a_sample_of_many_texts_is_spaced_evenly_over_all_shards(folder):
    table = open_folder(folder).table
    whole, sample = Lengths(), Lengths(sample=20)
    for tar in range(5):
        part = table.filter(pa.compute.equal(table["shard"], tar))
        whole.add(part)
        sample.add(part)
    assert sample.stride == 8
    assert sample.words.tolist() == whole.words[::8].tolist()
    assert sample.triples.tolist() == whole.triples[::8].tolist()
    assert sample.tags == whole.tags
    assert sample.seen == whole.seen == len(whole.words)


def test_the_terminal_gets_a_table(folder):
    done = run_here(command, "stats", folder)
    assert done.returncode == 0, done.stderr
    for said in ("40 in 5 shards", "preset detectron2", "c, caption", "zebra", "more than the 32", "▁"):
        assert said in done.stdout
    assert "\x1b" not in done.stdout


def test_several_paths_and_foreign_tars_add_up(folder, tmp_path):
    bare = tmp_path / "bare.tar"
    bare.write_bytes((folder / "shard-000000.tar").read_bytes())
    found = measure([folder, folder / "shard-000001.tar", bare])
    assert (found.stats.images, found.stats.shards) == (49, 6)
    assert len(found.detectors) == 1
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(b"no tar")
    done = run_here(command, "stats", folder, damaged)
    assert (done.returncode, "damaged.tar" in error_line(done)) == (2, True)


def test_torch_is_not_loaded(folder):
    code = (
        f"from oscar_shards.pages.report import measure; from pathlib import Path; measure([Path({str(folder)!r})])\n"
    )
    code += "import sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_memory_does_not_grow_with_the_shards(tmp_path):
    write_folder(tmp_path / "s", make_samples(30), per_shard=30)
    (tar,) = tars_at(tmp_path / "s")
    for number in range(150):
        copy = tmp_path / f"x-{number:06d}.tar"
        copy.hardlink_to(tar)
        index_path(copy).hardlink_to(index_path(tar))
    tars = sorted(tmp_path.glob("x-*.tar"))
    measure(tars[:20])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert measure(tars).stats.images == 4500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


def test_quantiles_and_bins():
    assert [quantile(Counter([1, 2, 2, 3, 10]), q) for q in (0, 0.25, 0.5, 0.75, 1)] == [1, 2, 2, 3, 10]
    assert [quantile(Counter(), 0.5), Stats().regions_max, Stats().regions_mean] == [0, 0, 0]
    assert binned(Counter({0: 1, 3: 2})) == [("0", 1), ("1", 0), ("2", 0), ("3", 2)]
    wide = binned(Counter({0: 1, 99: 2, 10**9: 5}))
    assert (len(wide) <= 40, sum(n for _, n in wide)) == (True, 8)
    assert sparkline([("a", 0), ("b", 1), ("c", 800)]) == " ▁█"
    assert (binned(Counter()), sparkline([])) == ([], "")


@needs_chromium
def test_in_a_browser_every_bar_is_there_and_says_its_count(folder, tmp_path):
    page = tmp_path / "stats.html"
    done = run_here(command, "stats", folder, "--html", page)
    assert done.returncode == 0, done.stderr
    found = look(
        page,
        """
        const panels = [...document.querySelectorAll(".panel:has(svg)")].map((panel) => ({
          name: panel.querySelector("h2").textContent,
          titles: [...panel.querySelectorAll("title")].map((t) => t.textContent),
          bars: [...panel.querySelectorAll("g rect:not(.track)")].map((r) => r.getBoundingClientRect())
            .map((r) => [r.width, r.height]),
        }));
        return { panels, wide: document.documentElement.scrollWidth - innerWidth };
        """,
    )
    panels = {p["name"]: p for p in found["panels"]}
    stats = measure([folder]).stats
    assert panels["tags"]["titles"] == [f"{tag}: {n:,} regions" for tag, n in stats.tags.most_common(30)]
    widths = np.array([w for w, _ in panels["tags"]["bars"]])
    counts = np.array([n for _, n in stats.tags.most_common(30)])
    assert np.allclose(widths / widths[0], counts / counts[0], atol=0.01)
    heights = np.array([h for _, h in panels["scores"]["bars"]])
    assert np.allclose(heights / heights.max(), stats.scores / stats.scores.max(), atol=0.02)
    assert {"regions an image", "tokens of a text", "tokens of an image's tags", "tokens of a triple"} <= set(panels)
    assert found["wide"] <= 0


def test_names_from_shards_are_text_in_page_and_table(tmp_path):
    samples = make_samples(3)
    evil = "[red]<script>alert(1)</script>\x1b[31m"
    samples[1].regions.tags[0] = evil
    write_folder(tmp_path / "s", samples)
    done = run_here(command, "stats", tmp_path / "s", "--html", tmp_path / "p.html")
    assert "[red]<script>" in done.stdout
    assert "\x1b" not in done.stdout
    content = (tmp_path / "p.html").read_text()
    assert "&lt;script&gt;alert(1)" in content
    assert "<script>alert" not in content


def test_the_demos_report_is_one_page_with_photos_statistics_and_curves(tmp_path):
    samples = make_samples(8)
    write_folder(tmp_path / "shards", samples)
    (tmp_path / "images").mkdir()
    for sample in samples:
        Image.new("RGB", (64, 48), "gray").save(tmp_path / "images" / sample.image.path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.csv").write_text(METRICS)
    (tmp_path / "train" / "evaluation.csv").write_text(EVALUATION)
    subprocess.run([sys.executable, REPORT, tmp_path], check=True, capture_output=True)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == page.count("<img ") == 8
    assert "Photo 0 of a " in page
    assert "8 in 1 shard" in page
    assert "masked token loss" in page
    assert "words_accuracy, held out" in page
    assert json.dumps(page).count("Content-Security-Policy") == 1
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing is loaded from elsewhere
