"""A small VOC-layout folder and a backbone file as fixtures, for the tests of detection."""

import cv2
import numpy as np
import pytest
import torch

from backbench.common.backbones.load import save_backbone
from backbench.common.backbones.resnet import Classifier, Trunk

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def devkit(tmp_path):
    """A small VOC-layout folder with two classes of its own."""
    root, rng = tmp_path / "shapes", np.random.default_rng(0)
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    names = [f"{k:06d}" for k in range(10)]
    for k, name in enumerate(names):
        width, height = ((80, 60), (60, 80))[k % 2]
        image, objects = rng.integers(0, 60, (height, width, 3)).astype(np.uint8), []
        for label in ("ball", "cube")[: 1 + k % 2]:
            x, y = rng.integers(0, 30, 2)
            image[y : y + 25, x : x + 25] = (220, 40, 40) if label == "ball" else (40, 40, 220)
            objects.append(
                f"<object><name>{label}</name><difficult>{int(k == 9 and label == 'cube')}</difficult><bndbox>"
                f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 25}</xmax><ymax>{y + 25}</ymax></bndbox></object>"
            )
        cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), image[..., ::-1])
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>{size}{''.join(objects)}</annotation>"
        )
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(names[:6]))
    (root / "ImageSets/Main/test.txt").write_text("\n".join(names[6:]))
    return root


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    """A backbone file with statistics that count as trained."""
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")
    torch.manual_seed(0)
    model = Classifier(Trunk("resnet18_half"), 3)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    facts = {"arch": "resnet18_half", "num_classes": 3, "method": "cutmix", "seed": 5}
    save_backbone(tmp_path / "cutmix.pt", model, **facts, mean=list(MEAN), std=list(STD))
    return tmp_path / "cutmix.pt"


def finetune_args(devkit, backbone, out, detector, *more):
    """A smoke training of two iterations as arguments."""
    return [
        *(
            "--backbone",
            str(backbone),
            "--detector",
            detector,
            "--data",
            f"voc:{devkit}",
            "--recipe",
            "smoke",
        ),
        *("--set", "iterations=2", "--set", "precision=fp32", "--out", str(out), "--device", "cpu", *more),
    ]
