"""Where the files of a set in COCO's layout stand: named by options, or found by COCO's names."""

from dataclasses import dataclass
from pathlib import Path

from backbench.common.base.errors import UserError
from backbench.common.data.layout import found, need_folder
from backbench.common.data.registry import DataSpec

PLAIN_NAMES = ("images", "train", "val", "train2014", "val2014", "train2017", "val2017", "JPEGImages")


@dataclass(frozen=True)
class CocoLayout:
    """The files of one spec. `stem` begins the annotation files' names, `years` end them, the preferred one first."""

    spec: DataSpec
    root: Path | None
    stem: str
    years: tuple[str, ...]
    expected: str  # the layout, in words

    def annotation_file(self, part: str) -> Path:
        """The JSON of a part (train, val …). Raises UserError when it is neither named nor found."""
        if part in self.spec.options:
            return self._named(part)
        if self.root is None:
            raise UserError(
                f"--data {self.spec}: no {part}=FILE; write {self.spec.kind}:images=DIR,train=A.json,val=B.json"
            )
        year = self.spec.options.get("year", "")
        for suffix in (year,) if year else self.years:
            path = self.root / "annotations" / f"{self.stem}_{part}{suffix}.json"
            if path.is_file():
                return path
        within = self.root / "annotations" if (self.root / "annotations").is_dir() else self.root
        wanted = f"{self.stem}_{part}{year or '*'}.json"
        raise UserError(f"{within}: has no {wanted} ({found(within)}); expected {self.expected}")

    def image_folder(self, part: str, file: Path) -> Path:
        """The folder of the images of a part's JSON. Raises UserError when it is neither named nor found."""
        images = f"the images of {file}"
        for key in (f"{part}_images", "images"):
            if key in self.spec.options:
                return need_folder(self._named(key), images)
        if self.root is None:
            raise UserError(f"--data {self.spec}: no images=DIR (or {part}_images=DIR); where are {images}?")
        suffix = file.stem.removeprefix(f"{self.stem}_{part}")
        for name in (f"{part}{suffix}", *(f"{part}{year}" for year in self.years), "images"):
            if (self.root / name).is_dir():
                return need_folder(self.root / name, images)
        raise UserError(
            f"{self.root}: no folder with {images} ({found(self.root)}); expected {self.expected}, or give images="
        )

    def _named(self, key: str) -> Path:
        path = Path(self.spec.options[key])
        return self.root / path if self.root and not path.exists() else path
