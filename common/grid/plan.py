"""The plan of a grid: what is asked for, on the command line or in a TOML file, and the jobs it comes to."""

import contextlib
import dataclasses
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from backbench.common.base.errors import UserError
from backbench.common.base.files import file_and_choice, fitting_name, user_path
from backbench.common.data.registry import parse_data
from backbench.common.grid.facts import Facts, backbone_file
from backbench.common.run.keys import stage_inputs
from backbench.common.run.tasks import TASKS

ROOMS = ("detection", "captioning", "wsol", "classification")


@dataclass(frozen=True)
class Backbone:
    """One backbone of a grid. `writer` names the job that writes its file, "" where it is there already."""

    spec: str
    name: str = ""  # "": as the weights say
    group: str = ""
    writer: str = ""
    label: str = ""  # what it will be called in results, where no file says it yet


@dataclass(frozen=True)
class Job:
    """One cell to compute: a command, where its cell will be, and what its keys are made of."""

    name: str
    command: tuple[str, ...]
    room: str  # the folder of its code, "classification" for pretraining
    folder: Path
    model: str = ""
    data: str = ""
    recipe: tuple[Any, ...] = ()  # what `Facts.recipes` takes
    backbone: str = ""  # a spec, "" for pretraining
    writes: Path | None = None  # the backbone file it leaves
    seed: int = 0
    limit: int = 0
    val_share: float = 0.0
    needs: str = ""  # the job that writes its backbone file
    restart: bool = False  # replace what its folder holds

    @property
    def kind(self) -> str:
        """What takes about the same time: its name without backbone and seed."""
        return (
            self.name.split("/")[0] if self.room == "classification" else "/".join(self.name.split("/")[:2])
        )

    def ready(self) -> bool:
        """Whether its backbone file, if it has one, is there."""
        file = backbone_file(self.backbone) if self.backbone else None
        return file is None or file.exists()


@dataclass(frozen=True)
class Pretraining:
    """`--pretrain METHOD:seeds=N`."""

    method: str
    seeds: int = 1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is asked for. `backbones` are (group or "", specs); `data` maps rooms to specs.

    `set` maps recipe fields to values: `FIELD`, of every task, or `WHERE.FIELD`, WHERE a task, a room or `pretrain`.
    """

    backbones: tuple[tuple[str, tuple[str, ...]], ...] = ()
    pretrain: tuple[Pretraining, ...] = ()
    pretrain_recipe: str = ""
    pretrain_arch: str = ""
    tasks: tuple[str, ...] = ("all",)
    data: dict[str, str] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    seeds: int = 1
    recipe: str = "tiny"
    out: Path = Path("results")
    limit: int = 0
    sweep: str = ""
    val_share: float = 0.2
    executor: str = "local"
    slots: int = 1
    slurm: dict[str, Any] = field(default_factory=dict)

    def data_of(self, room: str) -> str:
        """The data spec of a room: as given, else the embedded world."""
        recipe = (self.pretrain_recipe or self.recipe) if room == "classification" else self.recipe
        return self.data.get(room) or ("scenes:size=smoke" if recipe == "smoke" else "scenes")

    def settings_of(self, task: str, more: Sequence[str] = ()) -> tuple[str, ...]:
        """`field=value` of a task or of `pretrain`: those of every task, its room's, its own, `more`; a later wins."""
        made: dict[str, str] = {}
        for where in (task,) if task == "pretrain" else ("", TASKS[task].room, task):
            prefix = f"{where}." if where else ""
            made |= {k.removeprefix(prefix): v for k, v in self.set.items() if k.rpartition(".")[0] == where}
        made |= dict(setting.split("=", 1) for setting in more)
        return tuple(f"{name}={value}" for name, value in made.items())


def read_grid(file: Path) -> Grid:
    """A grid from TOML: the options of `backbench run` as keys, tables [backbones], [data], [set], [pretrain],
    [slurm].

    Paths in it count from its folder. Raises UserError naming the file and the key for anything unknown or misshapen.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid TOML ({error})") from None
    try:
        with contextlib.chdir(file.absolute().parent):
            return grid_of({key.replace("-", "_"): value for key, value in content.items()})
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def grid_of(content: dict[str, Any]) -> Grid:
    """A grid of plain values, its paths made absolute. Raises UserError naming the key."""
    known = {f.name: f for f in dataclasses.fields(Grid)}
    made: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{key}: unknown; the keys are {', '.join(known)}")
        default = getattr(Grid(), key)
        wanted = Path if isinstance(default, Path) else type(default)
        if wanted is Path and isinstance(value, str):
            value = user_path(value)
        elif wanted is float and isinstance(value, int):
            value = float(value)
        elif key == "tasks" and isinstance(value, str):
            value = [value]
        if wanted is tuple:
            value = _tuples(key, value)
        elif key == "set" and isinstance(value, dict):
            value = _flat(value)
        if not isinstance(value, wanted) or isinstance(value, bool):
            form = f"a table, [{key}]" if wanted is dict else f"a {wanted.__name__}"
            raise UserError(f"{key} = {value!r}: {form} is expected")
        made[key] = value
    grid = Grid(**made)
    for room in grid.data:
        if room not in ROOMS:
            raise UserError(f"data {room}: unknown; it is one of {', '.join(ROOMS)}")
    grid = replace(
        grid,
        out=grid.out.expanduser().absolute(),
        data={room: str(parse_data(str(spec)).absolute()) for room, spec in grid.data.items()},
        backbones=tuple((group, tuple(map(absolute_spec, specs))) for group, specs in grid.backbones),
    )
    for group, _ in grid.backbones:
        if "/" in group or group in (".", "..") or group.startswith("-"):
            raise UserError(
                f"backbones {group}: cannot name a group, whose results stand in a folder of that name"
            )
    for key in grid.set:
        place = key.rpartition(".")[0]
        if place not in ("", "pretrain", *TASKS, *(task.room for task in TASKS.values())):
            raise UserError(f"set {key}: {place} is neither pretrain nor one of {', '.join(TASKS)}")
    for key, least in (("seeds", 1), ("limit", 0), ("slots", 1)):
        if getattr(grid, key) < least:
            raise UserError(f"{key} = {getattr(grid, key)}: at least {least} is needed")
    if grid.executor not in ("local", "slurm", "print"):
        raise UserError(f"executor {grid.executor}: unknown; it is local, slurm or print")
    if not grid.backbones and not grid.pretrain:
        raise UserError("no backbones: give --backbones, --pretrain or both")
    return grid


def _tuples(key: str, value: Any) -> tuple:
    if key == "backbones" and isinstance(value, dict):
        return tuple((k, (v,) if isinstance(v, str) else tuple(v)) for k, v in value.items())
    if key == "backbones" and isinstance(value, list):
        return tuple(parse_backbone(str(text)) for text in value)
    if key == "pretrain" and isinstance(value, dict):
        return tuple(_pretraining(k, v if isinstance(v, dict) else {"seeds": v}) for k, v in value.items())
    if key == "pretrain" and isinstance(value, list):
        return tuple(parse_pretrain(str(text)) for text in value)
    if key == "tasks" and isinstance(value, list | tuple):
        return tuple(map(str, value))
    raise UserError(f"{key} = {value!r}: a table or a list is expected")


def _flat(table: dict[str, Any]) -> dict[str, str]:
    """`[set.ssd300]` tables as `ssd300.lr`, values as `--set` reads them."""
    made: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            made |= {f"{key}.{name}": text for name, text in _flat(value).items()}
        else:
            made[key] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return made


def parse_backbone(text: str) -> tuple[str, tuple[str, ...]]:
    """`[GROUP=]SPEC[,SPEC …]` → (group or "", specs).

    A file's own name may hold `=` and `,`: the text is read so that all its files are there. Raises UserError where it
    can be read so in two ways.
    """
    group, equals, rest = text.partition("=")
    named = bool(equals) and "/" not in group  # what holds a / is a path
    plain = [("", specs) for specs in _readings(text.split(","))]
    grouped = [(group, specs) for specs in _readings(rest.split(","))] if named else []
    found = [one for one in (*plain, *grouped) if one[1]]
    if len(found) > 1:
        ways = " or ".join(f"{' and '.join(specs)}{f' of {name}' * bool(name)}" for name, specs in found)
        raise UserError(
            f"--backbones {text}: is it {ways}? All are there; write ./ before the name of a file, or [backbones] in a "
            "TOML file"
        )
    if not found:  # something is not there, which its loading says
        specs = rest if named else text
        found = [(group if named else "", tuple(spec for spec in specs.split(",") if spec))]
    if not found[0][1]:
        raise UserError(f"--backbones {text}: no file in it; write [GROUP=]FILE[,FILE …]")
    return found[0]


def _readings(pieces: list[str]) -> list[tuple[str, ...]]:
    """The ways to join what stands between commas to specs of which every file is there."""
    if not any(pieces):
        return [()]
    if not pieces[0]:
        return _readings(pieces[1:])
    found = []
    for count in range(1, len(pieces) + 1):
        head = ",".join(pieces[:count])
        file = backbone_file(head)
        if (file is None and count == 1) or (file is not None and file.is_file()):
            found += [(head, *tail) for tail in _readings(pieces[count:])]
    return found


def absolute_spec(spec: str) -> str:
    """A backbone spec that names the same file, and the same weights in it, from any folder."""
    file = backbone_file(spec)
    return str(file.absolute()) + spec[len(file_and_choice(spec)[0]) :] if file else spec


def parse_pretrain(text: str) -> Pretraining:
    """`METHOD` or `METHOD:seeds=N`."""
    method, _, rest = text.partition(":")
    options = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    return _pretraining(method, options)


def _pretraining(method: str, options: dict[str, Any]) -> Pretraining:
    seeds = str(options.get("seeds", 1))
    if set(options) - {"seeds"} or not seeds.isdecimal() or int(seeds) < 1:
        raise UserError(f"pretrain {method}: write METHOD:seeds=N, N at least 1")
    return Pretraining(method, int(seeds))


def plan_pretrainings(grid: Grid, facts: Facts) -> tuple[list[Job], list[Backbone]]:
    """A job a method and pretraining seed, and the backbones they will leave."""
    recipe = grid.pretrain_recipe or grid.recipe
    arch = grid.pretrain_arch or ("resnet18_half" if recipe in ("smoke", "tiny") else "resnet50")
    jobs, backbones = [], []
    for pretraining in grid.pretrain:
        for seed in range(pretraining.seeds):
            label = f"{pretraining.method}-p{seed}" if seed else pretraining.method
            jobs.append(
                pretrain_job(
                    pretraining.method,
                    grid.out.absolute() / "pretrain" / label,
                    recipe=recipe,
                    arch=arch,
                    data=grid.data_of("classification"),
                    seed=seed,
                    limit=grid.limit,
                    settings=grid.settings_of("pretrain"),
                )
            )
            file = str(jobs[-1].writes)
            backbones.append(Backbone(file, group=pretraining.method, writer=jobs[-1].name, label=label))
    return jobs, backbones


def pretrain_job(
    method: str,
    folder: Path,
    *,
    recipe: str,
    arch: str,
    data: str,
    seed: int = 0,
    limit: int = 0,
    settings: tuple[str, ...] = (),
) -> Job:
    """A pretraining into `folder`, whose backbone file is METHOD.pt."""
    command = ("pretrain.run", "--method", method, "--recipe", recipe, "--arch", arch)
    command += ("--data", data, "--out", str(folder))
    command += ("--seed", str(seed)) if seed else ()
    command += ("--limit", str(limit)) if limit else ()
    command += tuple(part for setting in settings for part in ("--set", setting))
    return Job(
        f"pretrain/{folder.name}",
        command,
        "classification",
        folder,
        model=arch,
        data=data,
        recipe=("pretrain", arch, recipe, settings, (f"method={method}",)),
        writes=folder / f"{method}.pt",
        seed=seed,
        limit=limit,
    )


def name_group(group: str, specs: Sequence[str], facts: Facts) -> list[Backbone]:
    """The backbones of one group: without a name as their files say, else GROUP or GROUP-p0, GROUP-p1 …

    Several files are pretraining seeds: told apart by the seeds they state, else by their order. Raises UserError
    when two of them are the same weights or state the same seed.
    """
    specs = [absolute_spec(spec) for spec in specs]
    found = [facts.backbone(spec) for spec in specs]
    seen: dict[Any, str] = {}
    for spec, fact in zip(specs, found) if len(specs) > 1 else ():
        marks = [fact["fingerprint"]] + (
            [f"seed {fact['pretrain_seed']}"] if fact["pretrain_seed"] is not None else []
        )
        for mark in marks:
            if mark in seen:
                raise UserError(
                    f"{group or fact['group']}: {seen[mark]} and {spec} are the same pretraining ({mark}); "
                    "a group's files are different seeds of one method"
                )
            seen[mark] = spec
    if not group:
        return [Backbone(spec, label=fact["label"]) for spec, fact in zip(specs, found)]
    if len(specs) == 1:
        return [Backbone(specs[0], group, group, label=group)]
    seeds = [fact["pretrain_seed"] for fact in found]
    numbers = range(len(specs)) if None in seeds else seeds
    names = [f"{group}-p{number}" for number in numbers]
    return [Backbone(spec, name, group, label=name) for spec, name in zip(specs, names)]


def plan_tasks(
    grid: Grid,
    backbones: Iterable[Backbone],
    tasks: list[str],
    facts: Facts,
    settings: tuple[str, ...] = (),
    *,
    swept: str = "",
    val_share: float = 0.0,
) -> list[Job]:
    """One job a seed, backbone and task. `settings` are `field=value` for every cell, beside the grid's own.

    With `swept` (FIELD=A,B,C) cells say that FIELD was chosen so; with `val_share` they are measured on held-out
    training images.
    """
    out, backbones = grid.out.absolute(), list(backbones)
    asked = {task: grid.settings_of(task, settings) for task in tasks}
    recipes = {task: _recipe(task, grid.recipe, asked[task], swept) for task in tasks}
    labels = dict(zip(tasks, (found["label"] for found in facts.recipes(list(recipes.values())))))
    jobs: dict[str, Job] = {}
    for seed in range(grid.seeds):
        for backbone in backbones:
            for name in tasks:
                task, data = TASKS[name], grid.data_of(TASKS[name].room)
                command = (task.module, *task.arguments, "--backbone", backbone.spec, "--data", data)
                command += ("--recipe", grid.recipe, "--seed", str(seed), "--out", str(out))
                for option, value in (
                    ("--name", backbone.name),
                    ("--group", backbone.group if backbone.name else ""),
                    ("--limit", grid.limit),
                    ("--val-share", val_share),
                    ("--swept", swept),
                ):
                    command += (option, str(value)) if value else ()
                command += tuple(part for setting in asked[name] for part in ("--set", setting))
                label = _cell_label(labels[name], swept, grid.limit, val_share)
                place = facts.data(task.room, data, grid.limit)["name"]
                parts = (place, task.room, task.model, label, backbone.label, f"seed{seed}")
                path = Path(*map(fitting_name, parts))
                shown = f"{task.room}/{task.model}/{backbone.label}/seed{seed}"
                if shown in jobs:
                    raise UserError(
                        f"two backbones are called {backbone.label} ({jobs[shown].backbone}, {backbone.spec}); "
                        "name them: --backbones NAME=FILE OTHER=FILE"
                    )
                jobs[shown] = Job(
                    shown,
                    command,
                    task.room,
                    out / path,
                    model=task.model,
                    data=data,
                    recipe=recipes[name],
                    backbone=backbone.spec,
                    seed=seed,
                    limit=grid.limit,
                    val_share=val_share,
                    needs=backbone.writer,
                )
    return list(jobs.values())


def _recipe(task: str, name: str, settings: tuple[str, ...], swept: str) -> tuple[Any, ...]:
    """What `Facts.recipes` takes; the field that was swept is no part of the label."""
    field_name = swept.partition("=")[0]
    chosen = tuple(one for one in settings if swept and one.partition("=")[0] == field_name)
    return TASKS[task].room, TASKS[task].model, name, tuple(s for s in settings if s not in chosen), chosen


def _cell_label(label: str, swept: str, limit: int, val_share: float) -> str:
    """The recipe's part of a cell's path, as `common.run.transfer` and `Identity.path` write it."""
    if swept:
        field_name, _, values = swept.partition("=")
        label += f"+{field_name}=best_of_{values.replace(',', '_')}"
    label += f"+limit={limit}" if limit else ""
    return label + (f"+val={val_share:g}" if val_share else "")


def expected_inputs(job: Job, facts: Facts) -> dict[str, Any]:
    """What the job's keys must be made of today; see `common.run.keys`. Its backbone file must be there."""
    data = facts.data(job.room, job.data, job.limit, job.val_share)
    return stage_inputs(
        task=job.room,
        model=job.model,
        fields=facts.recipes([job.recipe])[0]["fields"],
        train_fingerprint=data["train"],
        test_fingerprint=data["test"],
        backbone=facts.backbone(job.backbone)["fingerprint"] if job.backbone else None,
        seed=job.seed,
        limit=job.limit,
    )


def only(jobs: list[Job], pattern: str) -> list[Job]:
    """The jobs whose name matches, and those they need. Raises UserError when none does."""
    chosen = [job for job in jobs if fnmatch(job.name, pattern) or fnmatch(job.name, f"*{pattern}*")]
    if not chosen:
        raise UserError(f"--only {pattern}: matches none of {len(jobs)} cells, e.g. {jobs[0].name}")
    names = {job.name for job in chosen} | {job.needs for job in chosen}
    return [job for job in jobs if job.name in names]
