"""captioning/evaluate.py: files in, scores and a report out, bad files refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_caption_metrics import some_captions

from backbench.captioning.evaluate import main as evaluate
from backbench.common.base.errors import UserError
from backbench.common.metrics import captions as metrics


@pytest.fixture
def files(tmp_path):
    captions, references = some_captions(12, seed=5)
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(12)],
        "annotations": [
            {"id": 100 * i + k, "image_id": i, "caption": r}
            for i, refs in enumerate(references)
            for k, r in enumerate(refs)
        ],
    }
    results = [{"image_id": i, "caption": c} for i, c in enumerate(captions)]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    (tmp_path / "results.json").write_text(json.dumps(results[::-1]))
    return tmp_path, results


def test_evaluate_writes_a_report(files, monkeypatch):
    from PIL import Image

    folder, results = files
    monkeypatch.setenv("BACKBENCH_JAVA", "none")
    (folder / "images").mkdir()
    for i in range(12):
        Image.new("RGB", (600, 400), (20 * i, 0, 0)).save(folder / "images" / f"{i}.jpg")
    fixed = ["--annotations", str(folder / "annotations.json"), "--results", str(folder / "results.json")]
    fixed += ["--report", str(folder / "report"), "--images", str(folder / "images")]
    assert evaluate(fixed) == 0
    report = json.loads((folder / "report" / "report.json").read_text())
    best = report["best"][0]
    assert best["CIDEr"] == max(entry["CIDEr"] for entry in report["best"])
    assert best["caption"] in [entry["caption"] for entry in results]
    with Image.open(folder / "report" / best["picture"]) as picture:
        assert picture.size == (320, 213)
    shown = (folder / "report" / "report.md").read_text()
    assert f"![]({best['picture']})" in shown and best["references"][0] in shown
    assert report["captions"]["images"] == 12 and report["captions"]["mean words"] > 0
    (folder / "images" / "3.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 12 images listed there are absent .*3\.jpg"):
        evaluate(fixed)


def test_odd_ids_and_captions_are_scored_as_they_are_meant(files, monkeypatch):
    """2⁵³ and 2⁵³ + 1 are two images, 1.0 is 1, and half a surrogate pair is U+FFFD on both sides."""
    folder, results = files
    monkeypatch.setenv("BACKBENCH_JAVA", "none")
    key_of = {0: 2**53, 1: 2**53 + 1, 2: 2**70}
    content = json.loads((folder / "annotations.json").read_text())
    for entry in [*content["annotations"], *results]:
        entry["image_id"] = key_of.get(entry["image_id"], float(entry["image_id"]))
    content["annotations"][0]["caption"] = results[0]["caption"] = "a cat \ud83d sits"
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(results))
    fixed = ["--annotations", str(folder / "annotations.json"), "--results", str(folder / "results.json")]
    assert evaluate([*fixed, "--per-image", str(folder / "single.json")]) == 0
    single = json.loads((folder / "single.json").read_text())
    assert [entry["image_id"] for entry in single] == [2**53, 2**53 + 1, 2**70, *range(3, 12)]
    assert single[0]["caption"] == "a cat \ufffd sits" and single[0]["ROUGE-L"] == 1


def test_evaluate_script(files):
    folder, _ = files
    command = [sys.executable, str(Path(__file__).parents[1] / "captioning" / "evaluate.py")]
    command += ["--annotations", "annotations.json", "--results", "results.json"]
    command += ["--json", "scores.json", "--per-image", "single.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    scores = json.loads((folder / "scores.json").read_text())
    assert list(scores) == list(metrics.NAMES)
    assert f"{100 * scores['CIDEr']:.2f}" in done.stdout and "Penn Treebank" in done.stdout
    assert 0 < scores["METEOR"] < 1
    single = json.loads((folder / "single.json").read_text())
    assert [entry["image_id"] for entry in single] == list(range(12))
    assert np.mean([entry["CIDEr"] for entry in single]) == pytest.approx(scores["CIDEr"])


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda r: [*r, {"image_id": 99, "caption": "a"}],
            r"image 99 without a reference in .*annotations\.json",
        ),
        (
            lambda r: [{**e, "image_id": str(e["image_id"])} for e in r],
            r"image '0', '1', '2' and 9 more without a ref",
        ),
        (lambda r: r[2:], r"image 0, 1 of .*annotations\.json without a caption"),
        (lambda r: [*r, r[0]], "image 0 given twice"),
        (lambda r: [], "holds no captions"),
        (lambda r: {"captions": r}, "holds a dict, expected a list"),
        (lambda r: [{"image_id": 0}], r"entry 0 \(image 0\) has no text under 'caption'"),
        (lambda r: ["a"], "entry 0: 'image_id' is missing; expected an integer or text"),
        (lambda r: [{**r[0], "image_id": True}, *r[1:]], "entry 0: 'image_id' is True"),
        (lambda r: [{**r[0], "image_id": 2.0**53}, *r[1:]], "entry 0: 'image_id' is 9007199254740992.0"),
    ],
)
def test_evaluate_refuses_bad_results(files, change, message):
    folder, results = files
    (folder / "bad.json").write_text(json.dumps(change(results)))
    with pytest.raises(UserError, match=message):
        evaluate(["--annotations", str(folder / "annotations.json"), "--results", str(folder / "bad.json")])


def test_evaluate_checks_where_it_writes_before_it_scores(files, monkeypatch):
    folder, _ = files
    monkeypatch.setenv("BACKBENCH_JAVA", "none")
    fixed = ["--annotations", str(folder / "annotations.json"), "--results", str(folder / "results.json")]
    assert evaluate([*fixed, "--json", str(folder / "new" / "scores.json")]) == 0
    assert (folder / "new" / "scores.json").is_file()
    monkeypatch.setattr("backbench.captioning.evaluate.Scorer", None)
    with pytest.raises(UserError, match=r"results\.json"):
        evaluate([*fixed, "--per-image", str(folder / "results.json" / "single.json")])
    with pytest.raises(UserError, match="give --report DIR too"):
        evaluate([*fixed, "--images", str(folder)])


def test_evaluate_refuses_other_files(files):
    folder, _ = files
    (folder / "bad.json").write_text("not json")
    arguments = ["--annotations", str(folder / "annotations.json"), "--results", str(folder / "bad.json")]
    with pytest.raises(UserError, match="not valid JSON"):
        evaluate(arguments)
    with pytest.raises(UserError, match="has no list 'annotations'"):
        evaluate(["--annotations", str(folder / "results.json"), "--results", str(folder / "results.json")])


@pytest.mark.parametrize("java", ["none", ""])
def test_half_a_surrogate_pair_is_replaced_and_said(files, monkeypatch, capsys, java):
    folder, results = files
    monkeypatch.setenv("BACKBENCH_JAVA", java) if java else monkeypatch.delenv("BACKBENCH_JAVA", False)
    results[3]["caption"] += " \ud83d"
    (folder / "results.json").write_text(json.dumps(results))
    fixed = ["--annotations", str(folder / "annotations.json"), "--results", str(folder / "results.json")]
    assert evaluate([*fixed, "--report", str(folder / "r"), "--per-image", str(folder / "i.json")]) == 0
    line = (
        f"1 × caption with half a surrogate pair: U+FFFD in its place (first: {folder}/results.json: entry 3)"
    )
    assert line in capsys.readouterr().out
    assert line in json.loads((folder / "r" / "report.json").read_text())["notes"]
    assert json.loads((folder / "i.json").read_text())[3]["caption"].endswith(" \ufffd")
