"""An image must not be trained on and scored."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from backbench.common.base.errors import UserError
from backbench.common.base.files import file_digest
from backbench.common.data.types import CaptionSet, DetectionSet, ImageSet

AnySet = TypeVar("AnySet", ImageSet, DetectionSet, CaptionSet)


def refuse_copies(train: ImageSet, scored: ImageSet) -> None:
    """UserError when a file of both sets has the same name and the same content, or is the same file."""
    copies = find_copies(train, scored)
    if copies:
        raise UserError(
            f"{copies[0][0]}: is to be scored and is also the training image {copies[0][1]} "
            f"({len(copies)} such images); remove one of the two"
        )


def find_copies(train: AnySet, scored: AnySet) -> list[tuple[Path, Path]]:
    """(scored image, training image) wherever the two are one file, or have the same name and the same content."""
    by_name: dict[str, list[Path]] = {}
    names = {path.name for path in scored.paths}
    for path in train.paths:
        if path.name in names:
            by_name.setdefault(path.name, []).append(path)
    return [
        (one, other)
        for one in scored.paths
        for other in by_name.get(one.name, [])
        if one.stat().st_size == other.stat().st_size and file_digest(one) == file_digest(other)
    ]


def note_of_both(train: AnySet, test: AnySet) -> tuple[AnySet, AnySet]:
    """The two sets, the test set's report and problems saying how many images stand in both."""
    both = set(train.paths) & set(test.paths)
    if both:
        line = f"{len(both)} × image is in training and in the test set (first: {min(both).name})"
        test = replace(test, report=[*test.report, line], problems=[*test.problems, line])
    return train, test
