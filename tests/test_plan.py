"""Plans: names and groups, commands, TOML and options, sweeps."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from planned_cells import save, smoke

from common.board import sweep
from common.board.commands import grid_of_arguments
from common.board.plan import (
    grid_of,
    jobs_of_json,
    jobs_to_json,
    name_group,
    only,
    parse_backbone,
    plan_pretrainings,
    plan_tasks,
    read_grid,
)
from common.cli import arguments
from common.errors import UserError
from common.files import write_json

pytest_plugins = ["planned_cells"]  # its fixtures


def test_files_of_a_group_are_its_pretraining_seeds(tmp_path, facts):
    files = [save(tmp_path / f"s{seed}" / "cutmix.pt", "cutmix", seed) for seed in (0, 1, 2)]
    named = name_group("mine", files, facts)
    assert [b.name for b in named] == ["mine-p0", "mine-p1", "mine-p2"] and {b.group for b in named} == {
        "mine"
    }
    plain = name_group("", files, facts)  # as the files say
    assert [(b.label, b.name, b.group) for b in plain] == [
        ("cutmix", "", ""),
        ("cutmix-p1", "", ""),
        ("cutmix-p2", "", ""),
    ]
    foreign = [save(tmp_path / name) for name in ("x.pth", "yy.pth")]
    assert [b.name for b in name_group("theirs", foreign, facts)] == ["theirs-p0", "theirs-p1"]
    assert [b.name for b in name_group("one", foreign[:1], facts)] == ["one"]
    shutil.copy(files[0], tmp_path / "copy.pt")
    with pytest.raises(UserError, match="same pretraining"):
        name_group("mine", [files[0], str(tmp_path / "copy.pt")], facts)
    with pytest.raises(UserError, match=r"absent\.pt: no such backbone file"):
        name_group("", ["absent.pt"], facts)


def test_commands_say_name_and_group_and_cells_lie_where_the_task_will_write_them(tmp_path, facts):
    files = [save(tmp_path / f"s{seed}" / "cutmix.pt", "cutmix", seed) for seed in (0, 1)]
    grid = smoke(tmp_path, seeds=2, limit=5)
    backbones = [*name_group("mine", files, facts), *name_group("", ["scratch:resnet18_half"], facts)]
    jobs = plan_tasks(grid, backbones, ["wsol", "ssd300"], facts)
    assert len(jobs) == 3 * 2 * 2 and [job.seed for job in jobs] == [0] * 6 + [1] * 6
    job = next(j for j in jobs if j.name == "wsol/cam/mine-p1/seed1")
    assert job.folder == tmp_path / "results/scenes-smoke/wsol/cam/smoke+limit=5/mine-p1/seed1"
    text = " ".join(job.command)
    assert text.startswith("wsol.finetune --backbone") and "--name mine-p1 --group mine --limit 5" in text
    assert jobs_of_json(json.loads(json.dumps(jobs_to_json(jobs)))) == jobs
    assert [j.name for j in only(jobs, "ssd300/mine-p0")] == [
        f"detection/ssd300/mine-p0/seed{k}" for k in (0, 1)
    ]
    assert len(only(jobs, "wsol/*/seed0")) == 3
    with pytest.raises(UserError, match="matches none of 12"):
        only(jobs, "nothing")
    with pytest.raises(UserError, match="two backbones are called mine-p0"):
        plan_tasks(grid, [backbones[0], backbones[0]], ["wsol"], facts)


def test_pretrainings_are_cells_that_the_transfers_wait_for(tmp_path, facts):
    jobs, backbones = plan_pretrainings(
        smoke(tmp_path, pretrain=grid_of({"pretrain": ["cutmix:seeds=2"]}).pretrain), facts
    )
    assert [job.name for job in jobs] == ["pretrain/cutmix", "pretrain/cutmix-p1"]
    assert jobs[1].writes == tmp_path / "results/pretrain/cutmix-p1/cutmix.pt"
    transfers = plan_tasks(smoke(tmp_path), backbones, ["wsol"], facts)
    assert [job.needs for job in transfers] == [job.name for job in jobs]
    assert [job.folder.parent.name for job in transfers] == ["cutmix", "cutmix-p1"]
    assert only([*jobs, *transfers], "wsol/cam/cutmix-p1/*") == [jobs[1], transfers[1]]  # with what it needs


def test_a_field_is_set_for_every_task_a_room_a_task_or_the_pretrainings(tmp_path, facts):
    fields = {"lr": 0.1, "detection": {"lr": 0.2, "batch": 2}, "ssd300.lr": 0.3, "pretrain": {"size": 48}}
    grid = smoke(
        tmp_path,
        **{k: getattr(grid_of({"set": fields, "pretrain": ["cutmix"]}), k) for k in ("set", "pretrain")},
    )
    jobs = plan_tasks(
        grid, name_group("", ["scratch:resnet18_half"], facts), ["ssd300", "faster_rcnn", "wsol"], facts
    )
    settings = {job.model: job.command[job.command.index("--set") :] for job in jobs}
    assert settings == {
        "ssd300": ("--set", "lr=0.3", "--set", "batch=2"),
        "faster_rcnn": ("--set", "lr=0.2", "--set", "batch=2"),
        "cam": ("--set", "lr=0.1"),
    }
    assert [job.folder.parts[-3] for job in jobs] == [
        "smoke+batch=2+lr=0.3",
        "smoke+batch=2+lr=0.2",
        "smoke+lr=0.1",
    ]
    (pretraining,), _ = plan_pretrainings(grid, facts)
    assert pretraining.command[-2:] == ("--set", "size=48")
    with pytest.raises(UserError, match="cam: --set rate=1: no field 'rate'"):
        plan_tasks(
            replace(grid, set={"wsol.rate": "1"}),
            name_group("", ["scratch:resnet18_half"], facts),
            ["wsol"],
            facts,
        )


def test_toml_and_options_give_the_same_grid(tmp_path, monkeypatch):
    file = tmp_path / "grid.toml"
    file.write_text(
        'recipe = "paper"\nseeds = 5\ntasks = ["wsol", "detection"]\nexecutor = "slurm"\nout = "there"\n'
        '[backbones]\ncutmix = ["a.pt", "b.pt"]\nr50 = "torchvision:resnet50"\n[pretrain]\nmixup = {seeds = 3}\n'
        '[data]\ndetection = "voc:V,year=2007"\n[set]\nlr = 0.1\nssd300.anchors = [1, 2]\n'
        '[slurm]\npartition = "gpu"\ntimeout_min = 60\n'
    )
    monkeypatch.chdir(tmp_path)
    words = (
        "run --recipe paper --seeds 5 --tasks wsol detection --executor slurm --out there "
        "--backbones cutmix=a.pt,b.pt r50=torchvision:resnet50 --pretrain mixup:seeds=3 "
        "--data detection=voc:V,year=2007 --set lr=0.1 ssd300.anchors=1,2 --slurm partition=gpu timeout_min=60"
    )
    given = grid_of_arguments(arguments("run").parse_args(words.split()))
    assert read_grid(file) == given
    beside = grid_of_arguments(arguments("run").parse_args(["run", str(file), "--seeds", "2"]))
    assert beside == replace(given, seeds=2)
    assert parse_backbone("scratch:resnet50") == ("", ("scratch:resnet50",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = ", "not valid TOML"),
        ("seed = 3", "seed: unknown; the keys are"),
        ('seeds = "3"', "a int is expected"),
        ("seeds = 0\nbackbones = ['a']", "at least 1"),
        ("seeds = 2", "no backbones"),
        ("backbones = ['a']\nexecutor = 'cloud'", "local, slurm or print"),
        ("backbones = ['a']\n[data]\nsegmentation = 'x'", "data segmentation: unknown"),
        ("backbones = ['a']\nset = ['lr=1']", r"a table, [set] is expected"),
        ("backbones = ['a']\n[set.ssd]\nlr = 1", "ssd is neither pretrain nor one of ssd300"),
        ("pretrain = ['cutmix:seeds=x']", "METHOD:seeds=N"),
    ],
)
def test_a_bad_grid_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(UserError, match=r"grid\.toml: ") as caught:
        read_grid(tmp_path / "grid.toml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_sweep_gives_every_backbone_the_same_trials_and_one_label(tmp_path, facts):
    grid = smoke(tmp_path, sweep="lr=0.1,0.01,0.001", val_share=0.25)
    backbones = name_group("mine", [save(tmp_path / "a.pth")], facts) + name_group(
        "", ["scratch:resnet18_half"], facts
    )
    trials = sweep.plan_sweep(grid, backbones, ["wsol"], facts)
    assert len(trials) == 6 and all("--val-share 0.25" in " ".join(job.command) for job in trials)
    assert {job.folder.parents[1].name for job in trials} == {
        f"smoke+lr={v}+val=0.25" for v in ("0.1", "0.01", "0.001")
    }
    assert sweep.plan_chosen(grid, backbones, ["wsol"], facts) == []  # no trial is there yet
    for number, job in enumerate(trials):
        score = [0.1, 0.1, 0.3, 0.2, 0.2, 0.25][number]
        write_json_cell(job.folder, {"metrics": {"Top-1 Loc": score}, "primary": "Top-1 Loc"})
    chosen = {job.name: job for job in sweep.plan_chosen(grid, backbones, ["wsol"], facts)}
    assert {name: job.recipe[3] for name, job in chosen.items()} == {
        "wsol/cam/mine/seed0": ("lr=0.01",),
        "wsol/cam/scratch/seed0": ("lr=0.001",),
    }
    assert {job.folder.parents[1].name for job in chosen.values()} == {"smoke+lr=best_of_0.1_0.01_0.001"}
    assert "--swept lr=0.1,0.01,0.001 --set lr=0.001" in " ".join(chosen["wsol/cam/scratch/seed0"].command)


def write_json_cell(folder: Path, content: dict) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "cell.json", content)


def test_a_bad_sweep_is_refused():
    for text in ("lr", "lr=", "lr=1", "lr=1,1", "iterations=1,2", "batch=8,16"):
        with pytest.raises(UserError, match="--sweep"):
            sweep.parse_sweep(text)


def test_held_out_images_are_training_images_and_a_key_of_their_own(facts):
    from common.transfer import hold_out

    whole = facts.data("detection", "scenes:size=smoke")
    part = facts.data("detection", "scenes:size=smoke", 0, 0.25)
    assert part["train_images"] + part["test_images"] == whole["train_images"]
    assert len({part["train"], part["test"], whole["train"], whole["test"]}) == 4
    from common.data import open_captions

    train, _ = open_captions("scenes:size=smoke")
    kept, scored = hold_out(train, 0.25)
    assert set(kept.ids).isdisjoint(scored.ids) and {*kept.ids, *scored.ids} == set(train.ids)
    for share in (0.0, 1.0, 1e-9):
        with pytest.raises(UserError, match="--val-share"):
            hold_out(train, share)
