"""Plans: names and groups, commands, TOML and options, sweeps."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import fails
from planned_cells import save, smoke

from backbench.common.base.errors import UserError
from backbench.common.base.files import fitting_name, write_json
from backbench.common.cli.commands import grid_of_arguments
from backbench.common.cli.main import arguments
from backbench.common.grid import sweep
from backbench.common.grid.plan import (
    grid_of,
    name_group,
    only,
    parse_backbone,
    plan_pretrainings,
    plan_tasks,
    read_grid,
)
from backbench.common.grid.plan_file import jobs_of_json, jobs_to_json
from backbench.common.run.cell import Identity

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


def test_paths_of_a_grid_count_from_its_file_and_those_of_options_from_where_they_are_given(
    tmp_path, monkeypatch
):
    (tmp_path / "plans").mkdir()
    text = 'backbones = ["a.pt"]\nout = "there"\n[data]\nwsol = "folder:pets"\n'
    (tmp_path / "plans" / "grid.toml").write_text(text, encoding="utf-8-sig")  # with a byte-order mark
    monkeypatch.chdir(tmp_path)
    grid = grid_of_arguments(arguments("run").parse_args(["run", "plans/grid.toml"]))
    assert Path.cwd() == tmp_path and grid.out == tmp_path / "plans/there"
    assert grid.backbones == (("", (str(tmp_path / "plans/a.pt"),)),)
    assert grid.data == {"wsol": f"folder:{tmp_path}/plans/pets"}
    options = ["--out", "here", "--backbones", "b.pt", "--data", "detection=voc:V"]
    grid = grid_of_arguments(arguments("run").parse_args(["run", "plans/grid.toml", *options]))
    assert grid.out == tmp_path / "here" and grid.data == {"detection": f"voc:{tmp_path}/V"}
    assert grid.backbones == (("", (str(tmp_path / "b.pt"),)),)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert grid_of({"backbones": ["a"], "out": "~/r"}).out == tmp_path / "home/r"


def test_a_backbone_is_the_file_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = (
        "runs/epoch=99-step=1000.ckpt",
        "epoch=5.ckpt",
        "a,b.pt",
        "c.pt",
        "ünï code.pt",
        "-x.pt",
        "g=1,2.pt",
    )
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
        assert parse_backbone(name) == ("", (name,))
    several = ("epoch=5.ckpt", "a,b.pt", "scratch:resnet50", "c.pt", "ünï code.pt")
    assert parse_backbone(",".join(several)) == ("", several)
    assert parse_backbone("mine=" + ",".join(several)) == ("mine", several)
    assert parse_backbone("mine=runs/epoch=99-step=1000.ckpt") == ("mine", names[:1])
    assert parse_backbone("mine=a.pt,c.pt,") == (
        "mine",
        ("a.pt", "c.pt"),
    )  # a.pt is not there: its loading says so
    assert parse_backbone("runs/epoch=1.ckpt") == ("", ("runs/epoch=1.ckpt",))
    Path("5.ckpt").touch()
    fails(lambda: parse_backbone("epoch=5.ckpt"), "is it epoch=5.ckpt or 5.ckpt of epoch?", "./")
    assert parse_backbone("./epoch=5.ckpt") == ("", ("./epoch=5.ckpt",))
    assert parse_backbone("epoch=./5.ckpt") == ("epoch", ("./5.ckpt",))
    fails(lambda: parse_backbone("mine="), "no file in it")
    for group in ("..", "a/b", "-g"):
        fails(
            lambda group=group: grid_of({"backbones": {group: "c.pt"}}),
            f"backbones {group}: cannot name a group",
        )


def test_a_plan_of_files_with_odd_names(tmp_path, facts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "epoch=99-step=1000.ckpt")
    save(tmp_path / "99-step=1000.ckpt", "cutmix", 3)
    Path("99-step=1000.ckpt").rename("other.pt")
    grid = grid_of({"backbones": ["epoch=99-step=1000.ckpt", "mine=other.pt"], "recipe": "smoke"})
    backbones = [one for group, specs in grid.backbones for one in name_group(group, specs, facts)]
    assert [(b.spec, b.group, b.label) for b in backbones] == [
        (str(tmp_path / "epoch=99-step=1000.ckpt"), "", "epoch=99-step=1000"),
        (str(tmp_path / "other.pt"), "mine", "mine"),
    ]


def test_many_settings_give_a_folder_whose_name_fits(tmp_path, facts):
    """The cell stands where the plan says, and where names fitted before they are what they were."""
    fields = [
        f"{name}=1.0000000000" for name in ("lr", "momentum", "gamma", "weight_decay", "clip_grad", "head_lr")
    ]
    for settings in (fields[:5], fields + ["milestones=" + "1+" * 90]):
        grid = smoke(tmp_path, set=dict(one.split("=") for one in settings))
        (job,) = plan_tasks(grid, name_group("", ["scratch:resnet18_half"], facts), ["wsol"], facts)
        label = "+".join(["smoke", *sorted(settings)])
        identity = Identity("scenes-smoke", "wsol", "cam", label, "scratch", 0)
        assert job.folder == tmp_path / "results" / identity.path
        name = job.folder.parts[-3]
        assert (name == label) == (len(label) <= 255) and len(name.encode()) <= 255
        job.folder.mkdir(parents=True)
    assert name.startswith("smoke+clip_grad=1.0") and fitting_name(name) == name
    assert fitting_name("ä" * 127) == "ä" * 127 and len(fitting_name("ä" * 128).encode()) <= 255
    assert fitting_name("x" * 300) != fitting_name("x" * 301)


def test_a_swept_field_with_a_list_of_values_is_left_out_of_the_label_whole(tmp_path, facts):
    grid = smoke(tmp_path, sweep="milestones=1+2,1+3", set={"lr": "0.1"})
    backbones = name_group("", ["scratch:resnet18_half"], facts)
    (job,) = plan_tasks(grid, backbones, ["wsol"], facts, ("milestones=1+3",), swept=grid.sweep)
    assert job.folder.parents[1].name == "smoke+lr=0.1+milestones=best_of_1+2_1+3"


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
    assert {name: job.recipe[4] for name, job in chosen.items()} == {
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
    from backbench.common.run.transfer import hold_out

    whole = facts.data("detection", "scenes:size=smoke")
    part = facts.data("detection", "scenes:size=smoke", 0, 0.25)
    assert part["train_images"] + part["test_images"] == whole["train_images"]
    assert len({part["train"], part["test"], whole["train"], whole["test"]}) == 4
    from backbench.common.data import open_captions

    train, _ = open_captions("scenes:size=smoke")
    kept, scored = hold_out(train, 0.25)
    assert set(kept.ids).isdisjoint(scored.ids) and {*kept.ids, *scored.ids} == set(train.ids)
    for share in (0.0, 1.0, 1e-9):
        with pytest.raises(UserError, match="--val-share"):
            hold_out(train, share)
