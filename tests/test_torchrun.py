"""Variables of a launcher that were left in the environment are one line, before anything is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import fails

from backbench.common.engine import pick_device, torchrun
from backbench.common.engine.torchrun import Launch, join, launch

ROOT = Path(__file__).resolve().parents[1]
WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (
            {"WORLD_SIZE": "4"},
            "WORLD_SIZE=4 is set in the environment, RANK and MASTER_ADDR and MASTER_PORT not: ",
        ),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment: a whole number from 1 on is needed; "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment"),
        ({**WHOLE, "MASTER_PORT": ""}, "WORLD_SIZE=2 is set in the environment, MASTER_PORT not"),
        ({**WHOLE, "RANK": "2"}, "RANK='2' in the environment: a whole number from 0 to 1 is needed"),
        ({**WHOLE, "MASTER_PORT": "http"}, "MASTER_PORT='http' in the environment"),
        ({**WHOLE, "LOCAL_RANK": "x"}, "LOCAL_RANK='x' in the environment"),
    ],
)
def test_variables_that_make_no_sense_are_one_line(monkeypatch, left, said):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    fails(
        lambda: pick_device("cpu"), said, "unset WORLD_SIZE for one process, or start several with torchrun"
    )


def test_one_process_needs_no_other_variable():
    assert launch({}) == launch({"RANK": "x"}) == launch({"WORLD_SIZE": "1"}) == Launch()
    assert launch({**WHOLE, "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "a"}) == Launch(1, 2, 1, True)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_come_are_not_waited_for_without_a_word(monkeypatch, capsys, rank):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for name, value in {**WHOLE, "RANK": str(rank), "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torchrun, "OTHERS_SECONDS", 1)
    fails(
        lambda: join(launch(), torch.device("cpu")),
        "WORLD_SIZE=2: the other processes did not come to localhost:",
    )
    assert f"waiting at localhost:{port} for the other processes (RANK={rank}" in capsys.readouterr().err


def test_a_leftover_ends_a_training_before_it_writes(tmp_path):
    command = [sys.executable, "pretrain/run.py", "--recipe", "smoke", "--out", str(tmp_path / "run")]
    env = {**os.environ, "WORLD_SIZE": "4"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: WORLD_SIZE=4 ")
        and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()
