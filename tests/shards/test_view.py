"""Pictures of regions: what is drawn is what is stored, and a page is one file."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from small_shards import make_samples, write_folder

from oscar_shards.read import open_folder
from oscar_shards.view import draw_regions, draw_row, photo_of

REPORT = Path(__file__).parents[2] / "tools" / "demo_report.py"
METRICS = """step,epoch,loss,mlm_loss,match_loss,mlm_accuracy,match_accuracy,lr,samples_per_second
1,0,11,10.3,0.7,0,0.5,1e-4,9
2,0,10,9.4,0.6,0.1,0.6,1e-4,9
"""


def test_a_box_is_drawn_where_it_is():
    photo = Image.new("RGB", (200, 100), "white")
    drawn = np.asarray(draw_regions(photo, np.array([[20, 30, 180, 90]], np.float32), ["cat"], [0.9]))
    changed = (drawn != 255).any(-1)
    assert changed[90, 100]  # the lower edge
    assert changed[60, 20]  # the left edge
    assert not changed[60, 100]  # inside
    assert not changed[95:].any()
    assert not np.asarray(photo).min() < 255  # the photo itself stays as it was


def test_boxes_follow_the_photo_to_its_shown_size_and_low_scores_are_left_out(tmp_path):
    folder = open_folder(write_folder(tmp_path / "s", make_samples(3)))
    row = folder.table.to_pylist()[1]  # 640 x 480
    Image.new("RGB", (1280, 960), "white").save(tmp_path / row["path"])
    assert photo_of(row, tmp_path).size == (640, 480)
    assert photo_of(row, None).getpixel((5, 5)) == (221, 221, 221)
    assert np.asarray(draw_row(folder, row, tmp_path, min_score=1.1)).min() == 255
    assert np.asarray(draw_row(folder, row, tmp_path, min_score=0.0)).min() < 255


def test_the_report_is_one_page_with_photos_statistics_and_curves(tmp_path):
    samples = make_samples(8)
    write_folder(tmp_path / "shards", samples)
    (tmp_path / "images").mkdir()
    for sample in samples:
        Image.new("RGB", (64, 48), "gray").save(tmp_path / "images" / sample.image.path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.csv").write_text(METRICS)
    subprocess.run([sys.executable, REPORT, tmp_path], check=True, capture_output=True)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 8
    assert "Photo 0 of a " in page
    assert "8 in 1 shards" in page
    assert "masked token loss" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing is loaded from elsewhere
