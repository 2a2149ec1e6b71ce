"""Captions against references: one tokenizer for both, METEOR beside, Java started while predictions are made."""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np

from backbench.captioning.java import JavaError, find_java
from backbench.captioning.meteor import Meteor
from backbench.captioning.spice import Spice
from backbench.captioning.tokenizer import Tokenizer, tokenize_plain, tokenize_references
from backbench.common.base.errors import UserError
from backbench.common.metrics import captions as metrics


class Scorer:
    """Scores any number of systems against the same references. A context manager: it owns Java processes.

    `notes` says which tokenizer scored and why METEOR could not be had. `tokenizer` is `ptb` (raises UserError without
    Java), `plain`, or `auto`: ptb where there is Java. SPICE is scored where its jar is given, as `spice` or in
    `$BACKBENCH_SPICE`.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        tokenizer: str = "auto",
        timeout: float = 120.0,
        spice: Path | str | None = None,
    ) -> None:
        self.raw, self.asked = references, tokenizer
        self.references: list[list[str]] = []  # tokenised
        self.notes: list[str] = []
        self._ptb, self._meteor = Tokenizer(timeout), Meteor(timeout)
        self._spice = Spice.given(spice)
        self._tokenize = tokenize_plain
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, words: Iterable[str] = ()) -> None:
        """Tokenise the references in the background; start METEOR too where `words`, those of captions, are known."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._prepare, args=(list(words),), daemon=True)
            self._thread.start()

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        """Captions as the references were tokenised."""
        self._wait()
        try:
            return self._tokenize(captions)
        except JavaError as error:
            self._without_ptb(error)
            return self._tokenize(captions)

    def statistics(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """The per-image statistics that `common.metrics.captions.rescore` takes, of one raw caption an image."""
        tokens = self.tokenize(captions)
        with ThreadPoolExecutor(2) as pool:  # they wait for Java
            jobs = {"meteor": pool.submit(self._meteor, tokens, self.references)}
            if self._spice:
                jobs["spice"] = pool.submit(self._spice, tokens, self.references)
            found = metrics.statistics(tokens, self.references)
        for name, job in jobs.items():
            try:
                found[name] = job.result()
            except JavaError as error:
                self._note(f"{name.upper()} n/a: {error}")
        return found

    def close(self) -> None:
        """End the Java processes."""
        if self._thread is not None:
            self._thread.join()
        self._ptb.close()
        self._meteor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self) -> None:
        self.start()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _prepare(self, words: list[str]) -> None:
        try:
            self._tokenize_all()
            if words:
                sentences = [sentence for image in self.references for sentence in image]
                self._meteor.start([*words, *self._tokenize(words)], sentences)
        except JavaError:
            return  # asked again, it says so again
        except BaseException as error:  # for the thread that waits
            self._failure = error

    def _tokenize_all(self) -> None:
        if self.asked != "plain":
            try:
                find_java()
                self.references = tokenize_references(self.raw, "ptb", self._ptb)
                self._tokenize = self._ptb
                self._note("tokenizer: Penn Treebank (Stanford, through Java)")
                return
            except JavaError as error:
                self._without_ptb(error)
                return
        self._plainly("asked for")

    def _without_ptb(self, error: JavaError) -> None:
        if self.asked == "ptb":
            raise UserError(f"tokenizer=ptb: {error}; or choose tokenizer=plain") from None
        self._plainly(str(error))

    def _plainly(self, why: str) -> None:
        self.notes = [note for note in self.notes if not note.startswith("tokenizer:")]
        self._note(f"tokenizer: nltk's Treebank rules ({why})")
        self._tokenize = tokenize_plain
        self.references = tokenize_references(self.raw, "plain", tokenize_plain)

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)
