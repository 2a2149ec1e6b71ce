"""Words and their numbers: built from training captions only, kept as JSON."""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from backbench.captioning.java import JavaError, one_line
from backbench.captioning.tokenizer import PUNCTUATION, Tokenizer, tokenize_references
from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json, write_json

PAD, START, END, UNK = range(4)
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
WORD = re.compile(r"\w")


@functools.cache
def _treebank():
    from nltk.tokenize import NLTKWordTokenizer  # word_tokenize's own, which needs no downloaded data

    return NLTKWordTokenizer()


def words_of(caption: str, punctuation: bool) -> list[str]:
    """A caption's words in lower case by nltk's Treebank rules; `punctuation` says whether marks are words too."""
    words = _treebank().tokenize(one_line(caption).lower())
    return words if punctuation else [w for w in words if w not in PUNCTUATION and WORD.search(w)]


def words_of_all(captions: Sequence[Sequence[str]], how: str, punctuation: bool) -> list[list[list[str]]]:
    """The words of each caption of each image: `treebank` as `words_of`, `ptb` by the evaluation's own tokenizer.

    Raises UserError when ptb is asked for and Java is missing.
    """
    if how == "treebank":
        return [[words_of(caption, punctuation) for caption in image] for image in captions]
    tokenizer = Tokenizer()
    try:
        tokens = tokenize_references(captions, "ptb", tokenizer)
    except JavaError as error:
        raise UserError(f"words=ptb: {error}; or take nltk's rules: --set words=treebank") from None
    finally:
        tokenizer.close()
    return [[[w for w in caption.split() if WORD.search(w)] for caption in image] for image in tokens]


class Vocabulary:
    """Words by number. The first four are `<pad>`, `<start>`, `<end>` and `<unk>`."""

    def __init__(self, words: Sequence[str], punctuation: bool) -> None:
        self.words, self.punctuation = [*SPECIAL, *words], punctuation
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Sequence[str], longest: int) -> list[int]:
        """Numbers of a caption's words and of `<end>`, cut to `longest`."""
        return [*(self.numbers.get(word, UNK) for word in words), END][:longest]

    def decode(self, numbers: Iterable[int]) -> str:
        """The caption of word numbers up to `<end>`, words separated by spaces."""
        words = []
        for number in numbers:
            if number == END:
                break
            if number not in (PAD, START):
                words.append(self.words[number])
        return " ".join(words)

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        write_json(path, {"format": "vocabulary-1", "punctuation": self.punctuation, "words": self.words[4:]})


def build_vocabulary(captions: Iterable[Sequence[str]], threshold: int, punctuation: bool) -> Vocabulary:
    """The words of captions (`words_of`) that occur at least `threshold` times, the most frequent first.

    Raises UserError when none does.
    """
    counts = Counter(word for words in captions for word in words)
    words = [word for word, count in counts.items() if count >= threshold and word not in SPECIAL]
    words.sort(key=lambda word: (-counts[word], word))
    if not words:
        raise UserError(f"no word occurs {threshold} times in the training captions: lower --set threshold=…")
    return Vocabulary(words, punctuation)


def load_vocabulary(path: Path) -> Vocabulary:
    """Read what `Vocabulary.save` wrote. Raises UserError for anything else."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != "vocabulary-1":
        raise UserError(f"{path}: not a vocabulary file of captioning/finetune.py")
    return Vocabulary(content["words"], content["punctuation"])
