"""An image must not be trained on and scored."""

from pathlib import Path

from common.data.types import ImageSet
from common.errors import UserError
from common.files import file_digest


def refuse_copies(train: ImageSet, scored: ImageSet) -> None:
    """UserError when a file of both sets has the same name and the same content, or is the same file."""
    by_name: dict[str, list[Path]] = {}
    names = {path.name for path in scored.paths}
    for path in train.paths:
        if path.name in names:
            by_name.setdefault(path.name, []).append(path)
    copies = [
        (one, other)
        for one in scored.paths
        for other in by_name.get(one.name, [])
        if one.stat().st_size == other.stat().st_size and file_digest(one) == file_digest(other)
    ]
    if copies:
        raise UserError(
            f"{copies[0][0]}: is to be scored and is also the training image {copies[0][1]} "
            f"({len(copies)} such images); remove one of the two"
        )
