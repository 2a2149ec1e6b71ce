"""What a data set is, in 16 digits: names, sizes and the content of annotation files."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from backbench.common.base.cache import file_stat, remember
from backbench.common.base.errors import UserError
from backbench.common.base.files import digest


def fingerprint(settings: Any, ids: Sequence[Any], paths: Sequence[Path], annotations: Sequence[Path]) -> str:
    """The fingerprint of a set: its reader's `settings` (JSON-able), image ids, image file sizes in bytes,
    and the content of its annotation files. It does not depend on where the folder lies.

    Contents of images are not read; see `content_digest` for that. Memoised where files are read.
    """
    sizes = [file_stat(path).st_size for path in paths]
    return digest("set 1", settings, [str(i) for i in ids], sizes, content_digest(annotations))


def content_digest(paths: Sequence[Path]) -> str:
    """One digest of the contents of `paths`, in order. Memoised: unchanged files are not read again.

    Raises UserError naming a file that cannot be read.
    """

    def compute() -> str:
        sha = sha256()
        for path in paths:
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from None
            sha.update(len(data).to_bytes(8, "little") + data)
        return sha.hexdigest()[:16]

    return remember("content 1", paths, compute) if paths else ""
