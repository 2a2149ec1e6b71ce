"""The training loop: exact resume after any death, streams that depend on nothing but their key, guards."""

import errno
import json
import multiprocessing
import os
import signal
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from backbench.common.base.errors import UserError
from backbench.common.base.progress import progress
from backbench.common.base.recipe import Recipe, override, parser
from backbench.common.classify.step import ClassifyRecipe, make_step
from backbench.common.engine import loop, pick_device, read_log, resolve_precision, train
from backbench.common.engine.loader import MicroBatches, Positions, make_loader
from backbench.common.engine.optim import make_optimizer, make_schedulers, wrap
from backbench.common.engine.state import Log
from backbench.common.engine.streams import SAMPLE, STEP, Order, StepStreams, Streams, stream, torch_seed


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


def evaluate(model):
    """A metric that rises and falls, and draws that must not be missed."""
    assert not model.training
    torch.rand(3), np.random.rand()  # noqa: NPY002
    weight = model[0].weight.double().sum().item()
    return {"score": np.sin(40 * weight), "weight": weight}


EVALUATED = {"evaluate": evaluate, "every": 7, "best": "score"}


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


@pytest.mark.parametrize("name", ["resume", "best"])
def test_states_of_another_run_are_refused(tmp_path, name):
    with pytest.raises(Stop):
        run(tmp_path / "a", dying(30), **EVALUATED)
    with pytest.raises(UserError, match=rf"{name}\.pt: belongs to another run.*--restart"):
        run(tmp_path / "a", key="other", **(EVALUATED if name == "best" else {}))


def test_a_damaged_state_is_one_line(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "resume.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"resume\.pt: damaged .*--restart"):
        run(tmp_path / "a")


def test_seed_changes_the_result_and_workers_do_not(tmp_path):
    one = run(tmp_path / "a")
    assert equal(one, run(tmp_path / "b", workers=2))
    assert not equal(one, run(tmp_path / "c", seed=2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_saves_and_asks_to_be_requeued(tmp_path, number, workers):
    calls = []

    def signalled(model, batch, rng):
        calls.append(0)
        if len(calls) == 21:
            children = multiprocessing.active_children()
            assert len(children) == workers
            for process in (*[child.pid for child in children], os.getpid()):
                os.kill(process, number)
        return step(model, batch, rng)

    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "a", signalled, workers=workers)
    assert stop.value.code == 75 and not multiprocessing.active_children()
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


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**70 + 5])
def test_streams_of_a_batch_are_those_of_its_samples(seed):
    draws = [(index % 3, 104_729 * index) for index in range(20)]
    for few in (draws, draws[:3]):
        together = Streams(seed, few)
        for one, key in zip(together, few, strict=True):
            assert one.bit_generator.state == stream(SAMPLE, seed, *key).bit_generator.state
    steps = StepStreams(seed, range(2, 5))
    for key in ((0, 2), (63, 4), (64, 3), (1000, 2), (5, 3)):
        rng, number = steps.at(*key)
        assert rng.random() == stream(STEP, seed, *key).random() and number == torch_seed(STEP, seed, *key)
    assert Streams(seed, draws)[-1].random() == stream(SAMPLE, seed, *draws[-1]).random()


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


def test_the_shortest_one_cycles():
    for length in (1, 2, 3, 6, 7):
        seen = rates(Recipe(iterations=length, lr=0.1, schedule="one_cycle"), 50)[:, 0]
        assert seen.max() == pytest.approx(0.1)
    with pytest.raises(UserError, match="warmup=7, no shorter than the whole training: 7 iterations"):
        rates(Recipe(iterations=7, lr=0.1, schedule="one_cycle", warmup=7), 50)


def test_recipe_settings_are_checked():
    changed = override(RECIPE, ["lr=0.5", "milestones=1,2.5", "nesterov=true"])
    assert changed.milestones == (1.0, 2.5)
    assert override(changed, ["milestones=none"]).milestones == ()  # as the help writes it
    for setting, message in {
        "lr": "write it as field=value",
        "learning_rate=1": "no field 'learning_rate'",
        "batch=x": "batch takes a whole number",
        "lr=fast": "lr takes a number",
        "nesterov=maybe": "nesterov takes true or false",
        "milestones=1,x": "milestones takes numbers like 10,20, or none",
        "lr=-1": "above 0",
        "lr=nan": "lr=nan, it must be finite",
        "milestones=2,-1": "milestones=2,-1, it must be 0 or more",
        "weight_decay=-0.1": "weight_decay=-0.1, it must be 0 or more",
        "micro_batch=-4": "micro_batch=-4, it must be 0 or more",
        "log_every=0": "log_every=0, it must be 1 or more",
        "optimizer=lion": "choose one of sgd, adam, adamw",
        "micro_batch=3": "no multiple of micro_batch=3",
        "iterations=0": "either epochs or iterations",
    }.items():
        with pytest.raises(UserError, match=message):
            override(RECIPE, [setting])
    with pytest.raises(UserError, match="nesterov=true needs momentum"):
        override(RECIPE, ["optimizer=sgd", "nesterov=true", "momentum=0"])


@pytest.mark.parametrize("text", ["-1", "1.5", "x", ""])
def test_a_seed_is_a_whole_number_from_0_on(text, capsys):
    with pytest.raises(SystemExit):
        parser("", {"tiny": RECIPE}, "tiny").parse_args(["--seed", text])
    assert f"argument --seed: {text}: a whole number from 0 on is needed" in capsys.readouterr().err


def test_uneven_processes_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("backbench.common.engine.loop.world", lambda: 3)
    with pytest.raises(
        UserError, match=r"3 processes cannot share 2 micro-batches .* --set batch=… that 3 div"
    ):
        run(tmp_path / "a")
    monkeypatch.setattr("backbench.common.engine.loop.world", lambda: 4)
    with pytest.raises(UserError, match=r"4 processes cannot share 2 micro-batches .* --set micro_batch=2 "):
        run(tmp_path / "a")


def test_a_bar_in_a_file_is_lines(capsys, monkeypatch):
    monkeypatch.delenv("BACKBENCH_QUIET", raising=False)
    with progress(desc="going", total=3, mininterval=0) as bar, progress(desc="inner", total=1, leave=False):
        for _ in range(3):
            bar.update()
            bar.set_postfix_str("loss 2", refresh=False)
    text = capsys.readouterr().err
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert len(set(lines)) == len(lines) and all(line.startswith(("going: ", "inner: ")) for line in lines)
    assert "3/3" in lines[-1] and lines[-1].endswith("loss 2]")


def test_engine_equals_a_plain_loop(tmp_path):
    recipe = override(RECIPE, ["schedule=constant", "clip_grad=0.5", "log_every=10", "precision=fp32"])
    found = run(tmp_path / "a", recipe=recipe)
    model, data, order, losses = network().train(), Points(), Order(50, 1), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=1e-4, fused=True)
    for iteration in range(30):
        for micro in range(2):
            draws = order.at(iteration * 8 + micro * 4, 4)
            batch = data.batch([i for _, i in draws], [stream(SAMPLE, 1, *draw) for draw in draws])
            sequence = np.random.SeedSequence((2, 1, iteration, micro))
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
            loss = step(model, batch, np.random.default_rng(sequence))["loss"]
            (loss / 2).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert equal(found, model.state_dict())
    logged = [line["loss"] for line in read_log(tmp_path / "a")]
    assert logged == pytest.approx(np.reshape(losses, (3, 20)).mean(1), rel=1e-6)


def test_evaluation_changes_nothing_and_keeps_the_best(tmp_path):
    plain = run(tmp_path / "plain")
    assert equal(plain, run(tmp_path / "a", **EVALUATED))
    curve = {line["iteration"]: line["eval"]["score"] for line in read_log(tmp_path / "a") if "eval" in line}
    assert list(curve) == [7, 14, 21, 28, 30]
    best = torch.load(tmp_path / "a" / "best.pt", weights_only=True)
    assert best["iteration"] == max(curve, key=curve.get) and best["value"] == max(curve.values())
    model = network().eval()
    model.load_state_dict(best["model"])
    assert evaluate(model) == best["metrics"]
    assert next(line for line in read_log(tmp_path / "a") if "loss" in line).keys() == {
        *("iteration", "epoch", "lr", "loss", "seconds")
    }


@pytest.mark.parametrize("at", [13, 27, 41, 59])
def test_killed_runs_have_the_same_best_and_the_same_curve(tmp_path, at):
    run(tmp_path / "whole", **EVALUATED)
    recipe = override(RECIPE, ["save_every=1e9" if at == 41 else "save_every=0"])
    with pytest.raises(Stop):
        run(tmp_path / "cut", dying(at), recipe, **EVALUATED)
    run(tmp_path / "cut", **EVALUATED)
    curves = [[line for line in read_log(tmp_path / n) if "eval" in line] for n in ("whole", "cut")]
    assert curves[0] == curves[1]
    one, two = (torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("whole", "cut"))
    assert equal(one.pop("model"), two.pop("model")) and one == two


def test_only_the_end_is_evaluated_when_no_interval_is_given(tmp_path):
    run(tmp_path / "a", evaluate=evaluate)
    assert [line["iteration"] for line in read_log(tmp_path / "a") if "eval" in line] == [30]
    assert not (tmp_path / "a" / "best.pt").exists()
    with pytest.raises(UserError, match="best=top-1: not measured; choose one of score, weight"):
        run(tmp_path / "b", evaluate=evaluate, best="top-1")


def test_modules_frozen_by_their_own_train_stay_frozen_after_an_evaluation(tmp_path):
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    model, seen = nn.Sequential(nn.Linear(6, 8), Frozen(8), nn.Linear(8, 1)), set()

    def watched(model, batch, rng):
        seen.add((model.training, model[1].training))
        return step(model, batch, rng)

    device = torch.device("cpu")
    train(*(model, watched, Points(), RECIPE), folder=tmp_path, key="k", seed=1, device=device, **EVALUATED)
    assert seen == {(True, False)} and not model[1].running_mean.any()


def test_a_step_is_given_what_the_data_adds_on_the_device_and_the_progress(tmp_path):
    class Resident(Points):
        def on_device(self, batch, device):
            return {**batch, "x": batch["x"].to(device) + 1}

    seen = []

    def watched(model, batch, rng):
        seen.append(batch["progress"])
        assert batch["ids"] and torch.equal(batch["x"].sum(1) > batch["y"] + 4, torch.ones(4, dtype=bool))
        return step(model, batch, rng)

    device = torch.device("cpu")
    train(network(), watched, Resident(), RECIPE, folder=tmp_path, key="k", seed=1, device=device)
    assert seen == [iteration / 30 for iteration in range(30) for _ in range(2)]


class Pictures:
    """A classifier's data."""

    def __len__(self):
        return 16

    def batch(self, indices, rngs):
        generator = torch.Generator().manual_seed(indices[0])
        images = torch.randint(256, (len(indices), 32, 32, 3), dtype=torch.uint8, generator=generator)
        return {"images": images, "labels": torch.tensor(indices) % 4, "ids": indices}


SYNCING = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__")


def classify(folder, method, device="cpu", **settings):
    recipe = ClassifyRecipe(
        **{
            "iterations": 12,
            "batch": 8,
            "micro_batch": 4,
            "method": method,
            "log_every": 4,
            "save_every": 1e9,
        },
        **{"schedule": "one_cycle", "precision": "fp32", **settings},
    )
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )
    step = make_step(recipe, 4, (0.5,) * 3, (0.2,) * 3)
    train(model, step, Pictures(), recipe, folder=folder, key="k", seed=0, device=torch.device(device))
    return [line["loss"] for line in read_log(folder)]


@contextmanager
def in_plain_steps(monkeypatch, enter, leave):
    """Call `enter` after the first log line, `leave` where the engine may wait for the device and at the end."""
    fetch, finish = loop._Training._fetch, loop._Training.finish

    def excused(self):
        leave()
        try:
            return fetch(self)
        finally:
            enter()

    def ended(self):
        leave()
        return finish(self)

    monkeypatch.setattr(loop._Training, "_fetch", excused)
    monkeypatch.setattr(loop._Training, "finish", ended)
    yield
    leave()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["baseline", "mixup", "cutout", "cutmix"])
def test_no_step_waits_for_the_device(tmp_path, monkeypatch, method, optimizer):
    """Counted: whatever moves a tensor's value to the host, in every step, logging apart."""
    calls, counting = [], [False]

    def counted(name, original):
        def call(self, *args, **kwargs):
            if counting[0]:
                calls.append(name)
            return original(self, *args, **kwargs)

        return call

    for name in SYNCING:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    switch = [lambda: counting.__setitem__(0, True), lambda: counting.__setitem__(0, False)]
    with in_plain_steps(monkeypatch, *switch):
        assert len(classify(tmp_path, method, optimizer=optimizer, clip_grad=1.0)) == 3
        assert calls == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["baseline", "mixup", "cutout", "cutmix"])
def test_no_step_waits_for_the_gpu(tmp_path, monkeypatch, method, precision):
    def mode(name):
        return lambda: torch.cuda.set_sync_debug_mode(name)

    with in_plain_steps(monkeypatch, mode("error"), mode("default")):
        assert len(classify(tmp_path, method, "cuda", precision=precision, clip_grad=1.0)) == 3


def test_bf16_is_close_to_fp32(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        (tmp_path / precision).mkdir()
        losses[precision] = classify(tmp_path / precision, "cutmix", precision=precision)
    assert losses["bf16"] != losses["fp32"] and losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    with pytest.raises(UserError, match="precision=fp16 needs a GPU"):
        classify(tmp_path, "cutmix", precision="fp16")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    whole, saves = run(tmp_path / "whole"), []

    def full(state, file):
        saves.append(0)
        if len(saves) == 9:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(state, file)

    original = torch.save
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"resume\.pt: no space left on its disk"):
        run(tmp_path / "a")
    monkeypatch.setattr(torch, "save", original)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["log.jsonl", "resume.pt"]
    assert torch.load(tmp_path / "a" / "resume.pt", weights_only=True)["iteration"] == 8
    assert equal(whole, run(tmp_path / "a"))


def test_the_loss_scaler_accumulates_clips_and_skips_what_overflows(monkeypatch):
    """fp16's wrapper, which a GPU would use, with the CPU's loss scaler; powers of two scale exactly."""
    amp = "mmengine.optim.optimizer.amp_optimizer_wrapper"
    monkeypatch.setattr(f"{amp}.is_cuda_available", lambda: True)
    monkeypatch.setattr(f"{amp}.GradScaler", partial(torch.amp.GradScaler, "cpu", init_scale=2.0**10))
    recipe = override(RECIPE, ["optimizer=sgd", "precision=fp16", "clip_grad=0.5"])
    models = nn.Linear(6, 1), nn.Linear(6, 1)
    models[1].load_state_dict(models[0].state_dict())
    wrapper = wrap(make_optimizer(models[0], recipe), recipe, torch.device("cuda"), 2)
    plain = torch.optim.SGD(models[1].parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    wrapper.initialize_count_status(nn.Identity(), 0, 12)
    for number in range(12):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        with wrapper.optim_context(models[0]):
            assert not torch.is_autocast_enabled("cuda")  # the engine's own ends before the backward pass
            wrapper.update_params(models[0](x).square().sum(), zero_kwargs={"set_to_none": True})
        (models[1](x).square().sum() / 2).backward()
        if number % 2:
            nn.utils.clip_grad_norm_(models[1].parameters(), 0.5)
            plain.step()
            plain.zero_grad()
    for one, other in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(one, other)
    before = models[0].weight.detach().clone()
    wrapper.initialize_count_status(nn.Identity(), 0, 2)
    for factor in (float("inf"), 1.0):
        wrapper.update_params(models[0](torch.ones(4, 6)).sum() * factor)
    assert torch.equal(models[0].weight, before) and wrapper.loss_scaler.get_scale() == 2.0**9


def test_devices_that_are_not_there_are_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"--device cuda:2: not on this machine \(2 GPUs\)"):
        pick_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UserError, match="process 3 has no GPU, there are 2"):
        pick_device()


def test_bf16_is_chosen_only_where_the_gpu_multiplies_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_precision("auto", torch.device("cuda")) == "fp32"  # a V100 or T4 emulates it, slowly


def test_a_log_shorter_than_its_checkpoint_says_is_not_filled_with_zeros(tmp_path):
    log = Log(tmp_path, tensorboard=False)
    log.path.write_bytes(b'{"iteration": 1}\n')
    log.open(100, 4)
    log.write({"iteration": 5})
    assert [line["iteration"] for line in read_log(tmp_path)] == [1, 5]
