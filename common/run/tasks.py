"""The tasks the grid starts, as command lines: `common` never imports one."""

from dataclasses import dataclass

from backbench.common.base.errors import UserError


@dataclass(frozen=True)
class Task:
    """How a task is started, and where its cells lie."""

    module: str
    arguments: tuple[str, ...]
    room: str  # the folder of its code, and the reader of its data
    model: str


TASKS = {
    "ssd300": Task("detection.finetune", ("--detector", "ssd300"), "detection", "ssd300"),
    "faster_rcnn": Task("detection.finetune", ("--detector", "faster_rcnn"), "detection", "faster_rcnn"),
    "captioning": Task("captioning.finetune", (), "captioning", "nic"),
    "wsol": Task("wsol.finetune", (), "wsol", "cam"),
}
ROOMS = {"detection": ("ssd300", "faster_rcnn"), "captioning": ("captioning",), "wsol": ("wsol",)}
READERS = {  # the `open_*` of common.data that reads a room's data
    "classification": "open_classification",
    "detection": "open_detection",
    "captioning": "open_captions",
    "wsol": "open_localisation",
}


def expand_tasks(names: list[str]) -> list[str]:
    """`all`, rooms (detection) and tasks (ssd300) → tasks, each once. Raises UserError for any other name."""
    found: list[str] = []
    for name in names:
        if name != "all" and name not in ROOMS and name not in TASKS:
            raise UserError(f"--tasks {name}: unknown; use all, {', '.join(ROOMS)} or {', '.join(TASKS)}")
        found += TASKS if name == "all" else ROOMS.get(name, (name,))
    return list(dict.fromkeys(found))
