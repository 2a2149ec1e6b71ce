"""The first losses of one smoke training per task, pinned: a refactoring that moves a number shows here."""

import importlib

import pytest

from backbench.common.engine import read_log

STEPS = (
    "--set",
    "precision=fp32",
    "--set",
    "epochs=0",
    "--set",
    "iterations=3",
    "--set",
    "log_every=1",
    "--set",
    "lr=0.00001",
)
SCRATCH = ("--backbone", "scratch:resnet18_half")
GOLDEN = {
    "pretrain": (
        ("pretrain.run", "--method", "cutmix", "--arch", "resnet18_half"),
        [2.507251, 2.247735, 2.64728],
    ),
    "ssd300": (("detection.finetune", *SCRATCH, "--detector", "ssd300"), [16.671471, 16.46137, 17.761941]),
    "faster_rcnn": (
        ("detection.finetune", *SCRATCH, "--detector", "faster_rcnn"),
        [3.376462, 3.741311, 3.193708],
    ),
    "captioning": (("captioning.finetune", *SCRATCH), [4.110862, 4.11307, 4.111085]),
    "wsol": (("wsol.finetune", *SCRATCH, "--method", "mixup"), [2.316955, 2.367369, 2.363105]),
}


@pytest.mark.parametrize("task", GOLDEN)
def test_first_losses(task, tmp_path):
    (module, *arguments), losses = GOLDEN[task]
    main = importlib.import_module(module).main
    assert main([*arguments, "--recipe", "smoke", *STEPS, "--limit", "16", "--out", str(tmp_path)]) in (
        0,
        None,
    )
    log = next(path for path in tmp_path.rglob("log.jsonl"))
    found = [line["loss"] for line in read_log(log.parent) if "loss" in line]
    assert found == pytest.approx(losses, rel=1e-4)
