"""The embedded data: a small rendered world, drawn once from a seed into a cache folder."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from backbench.common.base.cache import cache_folder
from backbench.common.base.errors import UserError
from backbench.common.base.files import make_folder, read_json, write_json
from backbench.common.base.locks import locked
from backbench.common.base.progress import progress

VERSION = 3  # raise whenever a pixel, a box or a sentence changes


@dataclass(frozen=True)
class World:
    """The folders of a rendered world."""

    root: Path

    @property
    def imagenet(self) -> Path:
        """Class folders: `train/<class>/*.jpg`, `val/<class>/*.jpg`."""
        return self.root / "imagenet"

    @property
    def boxes(self) -> Path:
        """CSV `path,x0,y0,x1,y1` below `imagenet` in shares of the sides, a row an image of both splits."""
        return self.root / "imagenet_boxes.csv"

    @property
    def vocdevkit(self) -> Path:
        """VOC2007 (trainval, test) and VOC2012 (trainval)."""
        return self.root / "VOCdevkit"

    @property
    def coco(self) -> Path:
        """`train2014`, `val2014`, `annotations/captions_train.json` and `captions_val.json`."""
        return self.root / "coco"

    @property
    def cub(self) -> Path:
        """The folder that holds `images.txt`, laid out as CUB-200-2011."""
        return self.root / "CUB_200_2011"


def ensure_world(root: Path | str | None = None, *, size: str = "tiny", seed: int = 0) -> World:
    """The rendered world of a size (`tiny`, `smoke`) and seed, drawn now if the cache does not hold it.

    `root` is the cache folder: `$BACKBENCH_CACHE`, else `~/.cache/backbench`. The files depend on size and
    seed only. The world appears whole: it is drawn beside its place and renamed, under a lock, so a killed or a
    second process at the same time does no harm. Raises UserError for an unknown size, a negative seed or a
    folder that cannot be written.
    """
    if root is None:
        root = cache_folder()
    # cv2 and the drawing code are needed only when something is drawn
    from backbench.common.data.scenes.write import image_count, write_world

    total = image_count(size)
    if seed < 0:
        raise UserError(f"scenes seed {seed}: must be 0 or more")
    root = Path(root).expanduser().resolve()
    target = root / f"scenes-{size}-{seed}-v{VERSION}"
    manifest = {"format": "backbench-scenes", "version": VERSION, "size": size, "seed": seed, "images": total}
    if _holds(target, manifest):
        return World(target)
    make_folder(root, "set BACKBENCH_CACHE to a folder for the drawn images")
    with locked(root / f".{target.name}"):
        if _holds(target, manifest):  # another process drew it while this one waited
            return World(target)
        partial = root / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            with progress(desc=f"drawing the {size} world", total=total, unit="img") as bar:
                write_world(partial, size, seed, bar)
            write_json(partial / "manifest.json", manifest)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return World(target)


def _holds(target: Path, manifest: dict) -> bool:
    """Whether `target` is a finished world as `manifest` tells; a foreign or broken manifest is none."""
    try:
        return read_json(target / "manifest.json") == manifest
    except (UserError, OSError):
        return False
