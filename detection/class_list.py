"""What the class numbers of a result file mean: of a run its own list, of others' what --classes or the devkit says."""

from collections.abc import Sequence
from pathlib import Path

from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json
from backbench.common.data.readers.voc import VOC_CLASSES, split_classes
from backbench.common.data.registry import DataSpec

MODEL = "model.json"


def given_classes(text: str) -> list[str]:
    """The names of `--classes a+b`. Raises UserError for an empty or a doubled one."""
    names = text.split("+")
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"--classes {text}: has an empty or a doubled name")
    return names


def run_classes(results: Path) -> tuple[list[str], list[int] | None] | None:
    """Classes and category ids (None: 1, 2, …) of the run whose predictions.json this is; None of any other file."""
    facts = results.parent / MODEL
    if results.name != "predictions.json" or not facts.is_file():
        return None
    content = read_json(facts)
    classes = content.get("classes") if isinstance(content, dict) else None
    return (list(classes), content.get("category_ids")) if classes else None


def devkit_classes(spec: DataSpec, split: str, used: Sequence[str], numbered: bool) -> list[str]:
    """The classes of a VOC-layout folder whose `split` is scored and has objects of the classes `used`.

    VOC's 20 in their order when no other name occurs, else the names of the training and the test split, sorted, as
    training numbers them. Where the scored split is neither of the two, or there is no training split, others' numbers
    (`numbered`) could mean anything: UserError. Names alone need no order: then all of them.
    """
    train = next((s for s in ("trainval", "train") if split_classes(spec, s) is not None), None)
    test = next((s for s in ("test", "val") if split_classes(spec, s) is not None), None)
    known = {name for s in (train, test) if s for name in split_classes(spec, s)}
    names = known | set(used)
    if names <= set(VOC_CLASSES):
        return list(VOC_CLASSES)
    if numbered and (train is None or known < names):
        lacks = (
            "no trainval.txt and no train.txt beside it" if train is None else f"classes beyond {train}.txt's"
        )
        raise UserError(
            f"{spec.path}: split {split} has {lacks}, so what a category_id counts is unknown; give the detector's "
            f"classes in their order, e.g. --classes {'+'.join(sorted(names))}"
        )
    return sorted(names)
