"""What readers share: which files and folders are data, what must be there, and the list of rules that fired."""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from backbench.common.base.cache import need_text
from backbench.common.base.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif")
HALF = re.compile("[\ud800-\udfff]")
# what systems keep beside files, in lower case: macOS, Windows, Synology, QNAP, ext4
SYSTEM = {
    "__macosx",
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("@eadir", "#recycle", "#snapshot", "@__thumb", "@recycle"),
    "lost+found",
}

AnySet = TypeVar("AnySet")  # of common.data.types, which has `report` and `problems`


class Report:
    """Counts, per rule that fired, how often and where first: the lines go into the run's report."""

    def __init__(self) -> None:
        self._rules: dict[str, list] = {}
        self._wrong: set[str] = set()

    def note(self, rule: str, where: str, count: int = 1) -> None:
        """Count `rule`; `where` (file, object) is kept of the first."""
        self._rules.setdefault(rule, [0, printable(where)])[0] += count

    def problem(self, rule: str, where: str, count: int = 1) -> None:
        """As `note`, of a rule that changes what is scored: `backbench verify` does not call such a set fine."""
        self._wrong.add(rule)
        self.note(rule, where, count)

    def lines(self) -> list[str]:
        """One line a rule: `3 × box reaches outside its image: clipped (first: 000012.xml object 2)`."""
        return [_line(rule, *fired) for rule, fired in self._rules.items()]

    def on(self, part: AnySet) -> AnySet:
        """The set with these lines after those it has."""
        problems = [*part.problems, *self.problems()]
        return replace(part, report=[*part.report, *self.lines()], problems=problems)

    def problems(self) -> list[str]:
        """Those of `lines` that are problems."""
        return [_line(rule, *fired) for rule, fired in self._rules.items() if rule in self._wrong]


def _line(rule: str, count: int, where: str) -> str:
    return f"{count} × {rule} (first: {where})"


def printable(text: str) -> str:
    """`text`, with what UTF-8 cannot hold (bytes of a file name in another encoding) as `\\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_data(name: str) -> bool:
    """Whether a file or folder of this name can be data: not hidden (`.thumbs`, `._a.jpg`), no system's own."""
    return not name.startswith(".") and name.lower() not in SYSTEM


def list_folder(
    folder: Path,
    root: Path,
    report: Report,
    endings: tuple[str, ...] = EXTENSIONS,
    other: str = "file that is no image: ignored",
) -> tuple[list[Path], list[Path]]:
    """The images (or files of other `endings`) and the folders right inside `folder`, each in the order of names.

    Everything else is ignored and noted, by its path below `root`; `other` is the rule for files.
    """
    with os.scandir(folder) as entries:
        inside = {entry.name for entry in entries if _is_folder(entry)}
    files, folders = [], []
    # iterdir, because Path(folder, name) takes five times as long on a million files
    for path in sorted(folder.iterdir(), key=attrgetter("name")):
        name = path.name
        if not is_data(name):
            report.note("hidden or system file or folder: ignored", path.relative_to(root).as_posix())
        elif name in inside:
            folders.append(path)
        elif name.lower().endswith(endings):
            files.append(path)
        else:
            report.note(other, path.relative_to(root).as_posix())
    return files, folders


def files_below(
    folder: Path,
    root: Path,
    report: Report,
    endings: tuple[str, ...] = EXTENSIONS,
    above: tuple[tuple[int, int], ...] = (),
) -> Iterator[Path]:
    """The images (or files of other `endings`) at any depth, a folder's own before those of its folders.

    Links are followed. UserError for one that leads back to a folder `above` it. Notes as `list_folder`.
    """
    stat = folder.stat()
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        raise UserError(f"{folder}: a link back to a folder that holds it; remove the link")
    files, folders = list_folder(folder, root, report, endings)
    yield from files
    for each in folders:
        yield from files_below(each, root, report, endings, (*above, here))


def class_names(folder: Path, layout: str, report: Report) -> list[str]:
    """The names of the class folders right inside `folder`, sorted. UserError, saying the `layout`, without one."""
    folders = list_folder(folder, folder.parent, report, (), "file beside the class folders: ignored")[1]
    if not folders:
        raise UserError(f"{folder}: has no class folder ({found(folder)}); expected {layout}")
    return [path.name for path in folders]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def found(folder: Path, most: int = 8) -> str:
    """The first entries of a folder, for messages: `found: a/, b/, c.txt and 12 more`."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"found: {', '.join(names[:most]) or 'nothing'}{more}"


def need_folder(path: Path | str, expected: str) -> Path:
    """`path` as a folder with something in it. UserError, saying what was expected there, when it is not."""
    need_text(path)
    path = Path(path)
    if not path.exists():
        parent = f" ({path.parent}: {found(path.parent)})" if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such folder{parent}; expected {expected}")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; expected {expected}")
    if next(path.iterdir(), None) is None:
        raise UserError(f"{path}: the folder is empty; expected {expected}")
    return path


def need_present(listed: Path | str, what: str, paths: Collection[Path]) -> None:
    """UserError naming the first of `paths` that is absent, their count, and the file that lists them."""
    # one listing a folder: a stat of each would take minutes on a network disk
    names = {folder: set() for folder in {path.parent for path in paths}}
    for folder, there in names.items():
        if folder.is_dir():
            there.update(entry.name for entry in folder.iterdir())
    absent = [path for path in paths if path.name not in names[path.parent]]
    if absent:
        raise UserError(
            f"{listed}: {len(absent)} of {len(paths)} {what} listed there are absent (first: {absent[0]}); add "
            "them, or take their lines out"
        )


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, stripped. UserError when it is absent or no text."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text file; it should be UTF-8") from None


def short_name(text: str) -> str:
    """A name fit for a path and a table: letters, digits, dot, plus, dash and underscore."""
    name = re.sub(r"[^A-Za-z0-9.+_-]+", "-", text).strip("-.")
    if not name:
        raise UserError(f"'{text}': no usable name for the data; give one with name=")
    return name


def json_lists(content: Any, keys: Sequence[str], file: Path, form: str) -> list[list[Any]]:
    """The lists `keys` of a JSON object. UserError when one is absent, no list, or empty."""
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            held = (
                f"keys {', '.join(map(str, content))}"
                if isinstance(content, dict)
                else type(content).__name__
            )
            raise UserError(f"{file}: has no list '{key}' (found {held}); expected {form}")
        if not content[key]:
            raise UserError(f"{file}: the list '{key}' is empty")
    return [content[key] for key in keys]


def json_id(value: Any) -> int | str | None:
    """An id in a JSON file: text, or a whole number as int, which some writers give as 1.0; None for anything else.

    So is a float from 2⁵³ on: it may stand for another id, rounded.
    """
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def json_field(item: Any, key: str, kind: type, where: str) -> Any:
    """The value `key` of a JSON object: of `kind` int an id, as a whole number of any size; of `kind` str text.

    UserError when it is absent, of another type, or no text that a file can hold (half a surrogate pair).
    """
    value = item.get(key) if isinstance(item, dict) else None
    found = json_id(value) if kind is int else value
    if not isinstance(found, kind):
        keys = f"keys {', '.join(map(str, item))}" if isinstance(item, dict) else type(item).__name__
        held = repr(value) if value is not None else f"missing, found {keys}"
        expected = "text" if kind is str else "an integer" + ", without quotes" * isinstance(value, str)
        raise UserError(f"{where}: '{key}' is {held[:200]}; expected {expected}")
    if kind is str and HALF.search(found):
        raise UserError(f"{where}: '{key}' is {found[:100]!a}, with half a surrogate pair, which is no text")
    return found


def whole_text(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair (`"\\ud83d"` in JSON): no file can hold one."""
    return HALF.sub("\ufffd", text)
