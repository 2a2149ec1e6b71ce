"""The report: one whole offline file with everything in it."""

import re
from html.parser import HTMLParser

import cv2
import numpy as np
from synthetic_cells import backbone, write_cell

from backbench.common.board.cells import load_cells
from backbench.common.data.thumbnails import read_truth, write_thumbnails
from backbench.common.report import charts
from backbench.common.report.gallery import DISAGREED, DRAWN, choose, gallery, quality
from backbench.common.report.html import write_report
from backbench.common.report.table import make_board

pytest_plugins = ["synthetic_cells"]  # its fixtures


class Page(HTMLParser):
    """Checks that tags nest, and collects what could reach out of the file."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text, self.ids = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action", "srcset")]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_whole_offline_file(cells, board, tmp_path):
    path = tmp_path / "report.html"
    write_report(cells, board, path)
    source = path.read_text()
    page = Page()
    page.feed(source)
    page.close()
    text = " ".join(" ".join(page.text).split())
    assert not page.open and len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://|@import|url\(", source)
    for link in page.links:
        assert link.startswith("data:image/") or link.removeprefix("#") in page.ids, link[:60]
    for row in board.rows:
        assert source.count(f"</span></span>{row.label}") > 5
        for column in board.columns:
            assert f"{100 * board.primary(row, column).score.value:.1f}" in text
    assert "Not a result." in text and "test images only" in text
    assert "Table 1's row" in text
    clear = [
        m.difference.low > 0 or m.difference.high < 0
        for r in board.rows
        for c in board.columns
        if (m := board.primary(r, c)).difference
    ]
    assert source.count("<strong>+") + source.count("<strong>−") == sum(clear)
    shown = [len(gallery(board, column, number)[0]) for number, column in enumerate(board.columns)]
    photos = 4 * (shown[0] + shown[1] + shown[3]) + shown[2]  # captions share one picture
    assert source.count('class="photo"') == photos and max(shown) <= DISAGREED + DRAWN
    assert source.count('class="box truth"') == photos - shown[2]  # one true box an image, none for captions
    assert source.count(", drawn<") == 4 * DRAWN
    assert source.count("most disagreed about<") == sum(shown) - 4 * DRAWN > 4
    assert source.count('<details class="cell">') == 16 and source.count('<details class="source-of"') == 16
    # a loss and an error curve a backbone and column; mean and classes of two detectors; two rules of CAM
    assert source.count("<polyline") == 2 * 16 + 2 * 4 * (1 + 3) + 2 * 4
    assert "top-1 error while training" in text and "largest, IoU .5" in text and "1-grams right" in text
    assert "best centred box" in text and "How stable is the order?" in text and "booktabs" in text
    assert "a ball on the table" in text and "IoU 0.70" in text
    assert len(source) < 2e6
    write_report(cells, board, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_a_report_needs_no_pictures_logs_or_predictions(tmp_path):
    for name in ("baseline", "cut<b>"):
        folder = write_cell(tmp_path, "detection", "ssd300", backbone(name), skill=0.5)
        for file in ("predictions.json", "log.jsonl", "report.json", "provenance.json"):
            (folder / file).unlink()
    cells = load_cells(tmp_path)
    write_report(cells, make_board(cells, replicates=20), tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    assert "cut&lt;b&gt;" in source and "cut<b>" not in source
    assert "<polyline" not in source and 'class="photo"' not in source


def test_images_are_chosen_by_disagreement_then_by_hash(cells):
    names = [f"image {i}" for i in range(30)]
    same = dict.fromkeys(names, 0.5)
    other = {**same, "image 7": 0.9, "image 3": 0.6}
    found = choose(names, [same, other])
    assert [name for name, apart in found.items() if apart] == ["image 7", "image 3"]
    assert len(found) == 2 + DRAWN and found == choose(names[::-1], [same, other])
    drawn = [name for name, apart in choose(names, []).items() if not apart]
    assert [n for n in drawn if n in names] == drawn and len(drawn) == DRAWN
    cell = next(c for c in cells if c.identity.model == "ssd300" and c.identity.group == "cutmix")
    values, stats = quality(cell), cell.images()
    image = int(stats["image"][stats["mark"] == 1][0])
    assert set(values.values()) <= {0.0, 1.0} and values[cell.ids[image]] in (0.0, 1.0)


def test_charts_leave_out_what_cannot_be_drawn():
    series = [("a", 0, [1, 2, 3], [0.5, float("nan"), 2.0]), ("b", 1, [1, 2], [None, -1.0])]
    chart = charts.curves(series, "loss")
    assert chart.count("<polyline") == 1 and "nan" not in chart
    assert charts.curves([("a", 0, [1], [0.0])], "loss") is None
    straight = charts.curves([("a", 0, [0, 1], [0.0, 100.0])], "share", log=False)
    assert ">0<" in straight and ">100<" in straight


def test_true_boxes_travel_with_the_thumbnails(tmp_path):
    rng, paths = np.random.default_rng(0), []
    for i in range(3):
        paths.append(tmp_path / f"{i}.jpg")
        cv2.imwrite(str(paths[-1]), rng.integers(0, 255, (30, 40, 3)).astype(np.uint8))
    ids, sizes = ["a", "b", "c"], np.array([[40, 30]] * 3)
    boxes = [np.array([[0.0, 0, 40, 30]]), np.zeros((0, 4)), np.array([[10.0, 15, 20, 30], [0, 0, 4, 3]])]
    path = write_thumbnails(tmp_path / "pixels", ids, paths, frames=sizes, boxes=boxes)
    found = read_truth(path)
    np.testing.assert_allclose(found["c"], [[0.25, 0.5, 0.5, 1.0], [0, 0, 0.1, 0.1]], atol=1e-6)
    assert found["a"].tolist() == [[0, 0, 1, 1]] and found["b"].shape == (0, 4)
    shares = write_thumbnails(tmp_path / "shares", ids, paths, boxes=[b / [40, 30, 40, 30] for b in boxes])
    np.testing.assert_allclose(read_truth(shares)["c"], found["c"], atol=1e-6)
    assert read_truth(write_thumbnails(tmp_path / "none", ids, paths)) == {}
