"""The Penn Treebank tokenizer of the COCO caption evaluation, through one Java process, and its stand-in without."""

import functools
from collections.abc import Callable, Sequence

from backbench.captioning.java import JavaError, JavaLines, find_jar, one_line
from backbench.common.base.cache import cache_folder
from backbench.common.base.errors import UserError
from backbench.common.base.files import digest, read_json, write_json

# what pycocoevalcap's PTBTokenizer drops; it compares lower-cased tokens, so brackets (-lrb-) in fact stay
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
BEGIN, END = "backbenchbegin", "backbenchend"
# the tokenizer writes when 16 kB of output have gathered: empty lines behind the last sentence push it out
PADDING = [""] * 20_000


class Tokenizer:
    """The tokenizer of the COCO caption evaluation, through Java; `tokenize_plain` is its stand-in."""

    def __init__(self, timeout: float = 120.0) -> None:
        self._timeout = timeout
        self._java: JavaLines | None = None

    def start(self) -> None:
        """Start Java in the background. Raises JavaError when it is not there."""
        if self._java is None:
            jar, main = (
                find_jar("tokenizer", "stanford-corenlp-3.4.1.jar"),
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
