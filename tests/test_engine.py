"""The training loop: exact resume after any death, streams that depend on nothing but their key, guards."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.engine import train
from common.engine.loader import MicroBatches, Positions, make_loader
from common.engine.loop import make_optimizer, make_schedulers
from common.engine.streams import SAMPLE, Order, stream
from common.errors import UserError
from common.recipe import Recipe, override

ROOT = Path(__file__).resolve().parents[1]


class Points:
    """A regression problem with noise from each sample's own stream."""

    workers = 0

    def __init__(self, count: int = 50) -> None:
        self.x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices, rngs):
        noise = torch.tensor([rng.normal() for rng in rngs], dtype=torch.float32)
        return {
            "x": self.x[indices] + 0.1 * noise[:, None],
            "y": self.x[indices].sum(1),
            "ids": [str(i) for i in indices],
        }


def step(model, batch, rng):
    shift = float(rng.normal()) * 0.01
    return {"loss": ((model(batch["x"])[:, 0] - batch["y"] + shift) ** 2).mean()}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))


RECIPE = Recipe(
    iterations=30,
    batch=8,
    micro_batch=4,
    lr=0.05,
    optimizer="adamw",
    schedule="one_cycle",
    save_every=0.0,
    log_every=7,
)


def run(folder, step=step, recipe=RECIPE, key="k", seed=1, **kw):
    folder.mkdir(exist_ok=True)
    model = network()
    train(model, step, Points(), recipe, folder=folder, key=key, seed=seed, device=torch.device("cpu"), **kw)
    return model.state_dict()


def equal(one, two):
    return all(torch.equal(one[k], two[k]) for k in one)


class Stop(Exception):
    """Stands for a death between two steps."""


def dying(at):
    calls = []

    def wrapped(model, batch, rng):
        calls.append(0)
        if len(calls) > at:
            raise Stop
        return step(model, batch, rng)

    return wrapped


@pytest.mark.parametrize("at", [1, 14, 33, 59])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resume_is_bit_equal_at_any_iteration(tmp_path, at, optimizer):
    recipe = override(RECIPE, [f"optimizer={optimizer}", "schedule=step", "milestones=10,20", "warmup=3"])
    whole = run(tmp_path / "whole", recipe=recipe)
    with pytest.raises(Stop):
        run(tmp_path / "cut", dying(at), recipe)
    assert equal(whole, run(tmp_path / "cut", recipe=recipe))
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / name / "log.jsonl").open()
        ]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1] and logs[0][-1]["iteration"] == 30
    assert not (tmp_path / "cut" / "resume.pt").exists()


def test_a_finished_training_is_only_loaded(tmp_path):
    whole = run(tmp_path / "a")
    assert equal(whole, run(tmp_path / "a", dying(0)))


def test_another_key_is_refused(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(UserError, match=r"weights\.pt: belongs to another run"):
        run(tmp_path / "a", key="other")


def test_a_damaged_state_is_one_line(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "resume.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"resume\.pt: damaged .*--restart"):
        run(tmp_path / "a")


def test_seed_changes_the_result_and_workers_do_not(tmp_path):
    one = run(tmp_path / "a")
    assert equal(one, run(tmp_path / "b", workers=2))
    assert not equal(one, run(tmp_path / "c", seed=2))


def test_sigterm_saves_and_asks_to_be_requeued(tmp_path):
    def terminated(model, batch, rng, calls=[]):  # noqa: B006
        calls.append(0)
        if len(calls) == 21:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, batch, rng)

    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", terminated)
    assert stop.value.code == 75
    assert torch.load(tmp_path / "a" / "resume.pt", weights_only=True)["iteration"] == 11
    assert equal(run(tmp_path / "whole"), run(tmp_path / "a"))


def test_loss_that_is_not_finite_names_losses_and_images(tmp_path):
    def bad(model, batch, rng):
        values = step(model, batch, rng)
        spoiled = values["loss"] * (np.nan if "7" in batch["ids"] else 1.0)
        return {"loss_box": spoiled, "loss_cls": values["loss"]}

    with pytest.raises(
        UserError, match=r"not finite at iteration \d+ \(loss_box=nan, loss_cls=[\d.]+\).*\b7\b"
    ):
        run(tmp_path / "a", bad)
    assert not (tmp_path / "a" / "weights.pt").exists()


def test_order_is_a_permutation_an_epoch_and_needs_no_replay():
    order = Order(10, seed=3)
    draws = order.at(0, 40)
    for epoch in range(4):
        assert sorted(i for e, i in draws if e == epoch) == list(range(10))
    assert Order(10, seed=3).at(23, 5) == draws[23:28]
    assert len({tuple(i for e, i in draws if e == epoch) for epoch in range(4)}) == 4


def test_streams_are_distinct_over_epochs_and_samples():
    draws = {stream(SAMPLE, 0, epoch, index).random() for epoch in range(20) for index in range(50)}
    assert len(draws) == 1000


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_workers(workers):
    batches = MicroBatches(Points(), 8, 4, seed=5)
    loaded = list(make_loader(batches, Positions(3, 9, range(2)), workers, pin=False))
    expected = [batches[(iteration, micro)] for iteration in range(3, 9) for micro in range(2)]
    assert all(
        torch.equal(a["x"], b["x"]) and a["ids"] == b["ids"] for a, b in zip(loaded, expected, strict=True)
    )


def rates(recipe, images, factors=(1.0,)):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": f} for f in factors]
    optimizer = make_optimizer(nn.Identity(), recipe, groups)
    schedulers, seen = make_schedulers(optimizer, recipe, images), []
    for _ in range(recipe.length(images)):
        seen.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return np.array(seen)


def test_published_schedules():
    imagenet = rates(Recipe(epochs=300, batch=10, lr=0.1, milestones=(75, 150, 225)), 20)[:, 0]
    assert imagenet[[0, 149, 150, 299, 300, 449, 450, 599]] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4]
    )
    cifar = rates(Recipe(epochs=300, batch=10, lr=0.25, milestones=(150, 225)), 10)[:, 0]
    assert cifar[[149, 150, 224, 225, 299]] == pytest.approx([0.25, 0.025, 0.025, 0.0025, 0.0025])


def test_one_cycle_and_group_factors():
    seen = rates(Recipe(iterations=100, lr=0.1, schedule="one_cycle"), 50, factors=(1.0, 0.1))
    assert seen[:, 1] == pytest.approx(seen[:, 0] / 10)
    assert seen[:, 0].argmax() == pytest.approx(30, abs=1) and seen.max() == pytest.approx(0.1)
    assert seen[0, 0] < 0.001 and seen[-1, 0] < 0.001


def test_recipe_settings_are_checked():
    assert override(RECIPE, ["lr=0.5", "milestones=1,2.5", "nesterov=true"]).milestones == (1.0, 2.5)
    for setting, message in {
        "lr": "write it as field=value",
        "learning_rate=1": "no field 'learning_rate'",
        "batch=x": "'x' is no int",
        "lr=-1": "above 0",
        "optimizer=lion": "choose one of sgd, adam, adamw",
        "micro_batch=3": "no multiple of micro_batch=3",
        "iterations=0": "either epochs or iterations",
    }.items():
        with pytest.raises(UserError, match=message):
            override(RECIPE, [setting])


PROCESS = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from test_engine import RECIPE, Points, network, step
from common.engine import pick_device, train, is_main
device = pick_device("cpu")
model = network()[0:1]
train(model, step, Points(), RECIPE, folder=Path(sys.argv[1]), key="k", seed=1, device=device)
"""


def test_two_processes_equal_one_that_accumulates_twice(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESS.format(root=str(ROOT), tests=str(ROOT / "tests")))
    weights = []
    for name, command in {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    }.items():
        (tmp_path / name).mkdir()
        subprocess.run(
            [*command, str(script), str(tmp_path / name)], check=True, capture_output=True, timeout=120
        )
        weights.append(torch.load(tmp_path / name / "weights.pt", weights_only=True)["model"])
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)


def test_uneven_processes_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("common.engine.loop.world", lambda: 3)
    with pytest.raises(UserError, match="3 processes cannot share 2 micro-batches"):
        run(tmp_path / "a")
