"""Backbone files and cells that a grid plans, finished as far as cell.json says; fixtures for the test modules that
name this one as a plugin, after importing from it (PYTEST_DONT_REWRITE).
"""

from pathlib import Path

import pytest
import torch

from backbench.common.backbones.load import load_backbone, save_backbone
from backbench.common.backbones.resnet import Classifier
from backbench.common.base.files import write_json
from backbench.common.grid.facts import Facts
from backbench.common.grid.plan import Grid, Job, expected_inputs, name_group, plan_tasks
from backbench.common.grid.status import look_at
from backbench.common.run.keys import stage_keys


def save(path: Path, method: str | None = None, seed: int | None = None) -> str:
    """A tiny backbone file of ours, or a plain state dict."""
    backbone = load_backbone("scratch:resnet18_half", seed=len(path.name) * 100 + (seed or 0))
    for name, buffer in backbone.trunk.named_buffers():
        if name.endswith("running_mean"):
            buffer += 0.1  # trained batch norm
    classifier = Classifier(backbone.trunk, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    if method is None:
        torch.save(classifier.torchvision_state(), path)
    else:
        save_backbone(path, classifier, arch="resnet18_half", num_classes=4, method=method, seed=seed)
    return str(path)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Where facts are remembered between the tests: reading the recipes takes seconds."""
    return tmp_path_factory.mktemp("facts") / "facts.json"


@pytest.fixture
def facts(memory):
    return Facts(memory)


def smoke(tmp_path, **more) -> Grid:
    return Grid(recipe="smoke", out=tmp_path / "results", **more)


@pytest.fixture
def finished(tmp_path, facts):
    """A planned cell of a file of ours that is finished as far as its cell.json says: (job, file)."""
    file = Path(save(tmp_path / "cutmix.pt", "cutmix", 0))
    (job,) = plan_tasks(smoke(tmp_path), name_group("", [str(file)], facts), ["wsol"], facts)
    finish(job, facts)
    return job, file


def finish(job: Job, facts: Facts, **changes) -> None:
    inputs = expected_inputs(job, facts)
    cell = {
        "keys": stage_keys(inputs),
        "inputs": inputs,
        "code": facts.code(job.room),
        "eval_precision": "fp32",
        "cost": {"train_s": 30.0},
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / "cell.json", cell | changes)


def look(job, tmp_path, facts):
    return look_at([job], tmp_path / "results" / "grid", facts)[0]
