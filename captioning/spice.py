"""SPICE (Anderson et al., ECCV 2016), where the user supplies it: its parser is a download of 400 MB.

The jar is `spice-1.0.jar` with Stanford's CoreNLP 3.6.0 jars in `lib/` beside it, as on its authors' page.
"""

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from backbench.captioning.java import JavaError, find_java, one_line
from backbench.common.base.errors import UserError

MEMORY = "-Xmx8G"  # what its authors ask for
HOURS = 6


class Spice:
    """SPICE's F-score of every image by one run of its jar."""

    def __init__(self, jar: Path) -> None:
        self.jar = jar

    @classmethod
    def given(cls, jar: Path | str | None) -> Self | None:
        """SPICE of `jar`, else of `$BACKBENCH_SPICE`, else None. Raises UserError when the file is not there."""
        path = jar or os.environ.get("BACKBENCH_SPICE")
        if not path:
            return None
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; SPICE is spice-1.0.jar with its lib/ folder beside it")
        return cls(Path(path).resolve())

    def __call__(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """F-scores (n,) of n tokenised captions; the corpus score is their mean. Raises JavaError."""
        entries = [
            {"image_id": i, "test": caption, "refs": list(refs)}
            for i, (caption, refs) in enumerate(zip(hypotheses, references))
        ]
        with tempfile.TemporaryDirectory() as folder:
            asked, answered = Path(folder, "captions.json"), Path(folder, "scores.json")
            asked.write_text(json.dumps(entries), encoding="utf-8")
            command = [find_java(), MEMORY, "-jar", str(self.jar), str(asked)]
            command += ["-out", str(answered), "-subset", "-silent"]
            try:
                done = subprocess.run(
                    command, cwd=folder, capture_output=True, timeout=HOURS * 3600, check=False
                )
            except OSError as error:
                raise JavaError(f"{command[0]} cannot be started ({error.strerror})") from None
            except subprocess.TimeoutExpired:
                raise JavaError(f"SPICE's Java gave no answer in {HOURS} hours") from None
            if done.returncode or not answered.exists():
                said = one_line(done.stderr.decode("utf-8", "replace"))[-300:]
                raise JavaError(f"SPICE's Java ended with code {done.returncode}: … {said}")
            scores = {
                entry["image_id"]: entry["scores"]["All"]["f"]
                for entry in json.loads(answered.read_text(encoding="utf-8"))
            }
        values = np.array([float(scores[i]) for i in range(len(entries))])
        if any(map(math.isnan, values)):
            raise JavaError(f"SPICE gave no number for image {int(np.isnan(values).argmax())}")
        return values
