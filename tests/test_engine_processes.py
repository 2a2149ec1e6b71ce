"""Several processes, a compiler, TensorBoard: training gives the same numbers with and without."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, wait_until
from test_engine import RECIPE as ADAM
from test_engine import Points, Stop, dying, evaluate, network, step
from test_engine import run as run_any

from backbench.common.base.errors import UserError
from backbench.common.engine import read_log, train

ROOT = Path(__file__).resolve().parents[1]
# Adam would blow up the rounding that is all the gradient of a bias ahead of batch norm
RECIPE = replace(ADAM, optimizer="sgd")
PROCESS = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from test_engine import EVALUATED, Points, network, step
from test_engine_processes import RECIPE
from backbench.common.run import cell
from backbench.common.engine import pick_device, rank, train
from dataclasses import replace
from torch import nn

out, device = Path(sys.argv[1]), pick_device("cpu")

def run(name, model, step=step, recipe=RECIPE, **options):
    (out / name).mkdir(exist_ok=True)
    train(model, step, Points(), recipe, folder=out / name, key="k", seed=1, device=device, **options)

def signalled(model, batch, rng):
    if batch["progress"] > 0.4 and rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return step(model, batch, rng)

def spoiled(model, batch, rng):
    return {{name: loss * (float("nan") if rank() else 1) for name, loss in step(model, batch, rng).items()}}

clear = cell._clear
cell.code_hash("wsol")  # now, for it takes as long as the wait below
cell._clear = lambda folder: (time.sleep(1), clear(folder))
names = dict(task="wsol", data="d", model="m", recipe_label="r", train_fingerprint="a", test_fingerprint="b")
options = dict(recipe=RECIPE, backbone=None, seed=0, restart=True, identity=cell.Identity("d", "t", "m", "r", "b", 0))
cell.open_run(out / "restarted", **names, **options)
(out / f"found{{rank()}}").write_text(str((out / "restarted" / "weights.pt").exists()))
run("linear", network()[0:1])
run("begun_by_one", network())
run("evaluated", network(), **EVALUATED)
try:
    run("begun_by_two", network(), signalled)
except SystemExit as stop:
    (out / f"code{{rank()}}").write_text(str(stop.code))
try:
    run("spoiled", network(), spoiled, replace(RECIPE, iterations=1))
except Exception as error:
    (out / f"error{{rank()}}").write_text(f"{{type(error).__name__}}: {{error}}")
run("endless", network(), recipe=replace(RECIPE, iterations=1_000_000))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes under torchrun left of six trainings; the last was told to end by a SIGTERM to torchrun."""
    out = tmp_path_factory.mktemp("two")
    with pytest.raises(Stop):
        run(out / "begun_by_one", dying(25), replace(RECIPE, save_every=0.0))
    (out / "restarted").mkdir()
    for name in ("recipe.json", "weights.pt"):
        (out / "restarted" / name).touch()
    script = out / "script.py"
    script.write_text(PROCESS.format(root=str(ROOT), tests=str(ROOT / "tests")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (out / "stderr").open("wb") as stderr:
        job = subprocess.Popen(
            [*command, str(script), str(out)], stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        wait_until(lambda: read_log(out / "endless"), job)
        job.send_signal(signal.SIGTERM)
        (out / "code").write_text(str(job.wait(PATIENCE)))
    finally:
        job.kill()
    return out


def run(folder, step=step, recipe=RECIPE, **options):
    return run_any(folder, step, recipe, **options)


def weights(folder):
    return torch.load(folder / "weights.pt", weights_only=True)["model"]


def assert_close(one, other):
    """Equal to the rounding of sums; running statistics aside."""
    for name in one:
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def test_two_processes_equal_one_that_accumulates_twice(two, tmp_path):
    model = network()[0:1]
    train(model, step, Points(), RECIPE, folder=tmp_path, key="k", seed=1, device=torch.device("cpu"))
    assert_close(weights(two / "linear"), model.state_dict())
    for one, other in zip(read_log(tmp_path), read_log(two / "linear"), strict=True):
        assert {**one, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=1e-3)


def test_no_process_finds_what_a_restart_removes(two):
    assert (two / "found0").read_text() == (two / "found1").read_text() == "False"


def test_another_number_of_processes_goes_on(two, tmp_path):
    whole = run(tmp_path / "whole")
    assert_close(weights(two / "begun_by_one"), whole)
    cost = torch.load(two / "begun_by_one" / "weights.pt", weights_only=True)["cost"]
    assert cost["processes"] == [1, 2]
    stated = [line for line in (two / "stderr").read_text().splitlines() if "going on with" in line]
    assert len(stated) == 1 and "2 processes, before it were 1" in stated[0] and "process 0" in stated[0]
    losses = [[line["loss"] for line in read_log(f)] for f in (tmp_path / "whole", two / "begun_by_one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_signal_to_one_process_stops_all_and_one_process_finishes(two, tmp_path, capsys):
    assert (two / "code0").read_text() == (two / "code1").read_text() == "75"
    state = torch.load(two / "begun_by_two" / "resume.pt", weights_only=True)
    assert state["iteration"] == 14 and state["processes"] == [2]
    assert_close(run(two / "begun_by_two"), run(tmp_path / "whole"))
    assert "going on with 1 processes, before it were 2" in capsys.readouterr().err


def test_process_0_evaluates_for_all(two, tmp_path):
    lines = [line["eval"] for line in read_log(two / "evaluated") if "eval" in line]
    best = torch.load(two / "evaluated" / "best.pt", weights_only=True)
    assert len(lines) == 5 and best["value"] == max(line["score"] for line in lines)
    model = network().eval()
    model.load_state_dict(best["model"])
    assert evaluate(model)["weight"] == best["metrics"]["weight"]


def test_a_loss_that_one_process_spoils_stops_all(two):
    assert (
        (two / "error1").read_text().startswith("UserError: the loss is not finite at iteration 0 (loss=nan)")
    )
    assert "not finite in another process" in (two / "error0").read_text()
    assert not list((two / "spoiled").glob("*.pt"))


def test_sigterm_to_torchrun_saves(two):
    state = torch.load(two / "endless" / "resume.pt", weights_only=True)
    assert int((two / "code").read_text()) != 0
    assert state["iteration"] > 0 and state["iteration"] % RECIPE.log_every == 0


def test_compiled_training_equals_eager(tmp_path):
    recipe = replace(RECIPE, iterations=12, log_every=4, precision="fp32")
    eager = run(tmp_path / "eager", recipe=recipe)
    try:
        compiled = run(tmp_path / "compiled", recipe=recipe, compile=True)
    except UserError as error:
        pytest.skip(str(error))
    assert compiled.keys() == eager.keys()
    assert_close(compiled, eager)
    losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    costs = [
        torch.load(tmp_path / n / "weights.pt", weights_only=True)["cost"] for n in ("eager", "compiled")
    ]
    assert [cost["compiled"] for cost in costs] == [False, True]


def test_no_compiler_is_one_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nin many lines")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(
        UserError, match=r"--compile: .*for cpu here \(No working C\+\+ compiler found\)"
    ) as caught:
        run(tmp_path / "a", compile=True)
    assert "\n" not in str(caught.value)


def test_tensorboard_goes_on_where_the_log_does(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"evaluate": evaluate, "every": 10, "tensorboard": True}
    with pytest.raises(Stop):
        run(tmp_path / "a", dying(50), replace(RECIPE, save_every=1e9, iterations=30), **options)
    recipe = replace(RECIPE, save_every=0.0)
    with pytest.raises(Stop):
        run(tmp_path / "a", dying(40), recipe, **options)
    run(tmp_path / "a", recipe=recipe, **options)
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    for name in ("loss", "lr"):
        logged = [(line["iteration"], line[name]) for line in read_log(tmp_path / "a") if name in line]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [at for at, _ in shown] == [at for at, _ in logged] == [7, 14, 21, 28, 30]
        assert [v for _, v in shown] == pytest.approx([v for _, v in logged])
    assert [event.step for event in events.Scalars("eval/score")] == [10, 20, 30]


def test_a_missing_tensorboard_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--tensorboard: .*pip install 'backbench\[tensorboard\]'"):
        run(tmp_path / "a", tensorboard=True)
