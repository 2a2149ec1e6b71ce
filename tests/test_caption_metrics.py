"""Caption metrics on arrays against pycocoevalcap."""

import random

import numpy as np
import pytest

from backbench.common.metrics import captions as metrics

WORDS = [
    "a",
    "the",
    "dog",
    "cat",
    "man",
    "woman",
    "red",
    "small",
    "runs",
    "sits",
    "jumps",
    "on",
    "in",
    "with",
    "grass",
    "ball",
    "park",
    ",",
    "'s",
    "near",
    "two",
    "of",
    "water",
]
ADVERSARIAL = [
    ("", ["a dog", ""]),
    ("dog", ["dog"]),
    ("a a a a a a a a", ["a a", "the a a a"]),
    ("café naïve 😀 日本", ["café 日本", "naïve"]),
    (", ' ;", [", ;", "a ,"]),
    (" ".join(WORDS) * 40, [" ".join(reversed(WORDS)) * 10, "a"]),
    ("a man sits on the grass", ["a man sits on the grass", "a man sits on the grass"]),
    ("1\xa01/2 dogs run", ["1\xa01/2 dogs", "dogs"]),  # a token of the PTB tokenizer holds a space
    ("a cat", ["", ""]),
]


def some_captions(n: int, seed: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)

    def sentence():
        return " ".join(rng.choices(WORDS, k=rng.randint(3, 14)))

    references = [[sentence() for _ in range(rng.randint(1, 7))] for _ in range(n)]
    captions = [rng.choice(r) if rng.random() < 0.2 else sentence() for r in references]
    return captions, references


def oracle(captions, references) -> tuple[dict, dict]:
    """pycocoevalcap's corpus and per-image scores."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth, result = dict(enumerate(references)), {i: [c] for i, c in enumerate(captions)}
    bleu, bleus = Bleu(4).compute_score(truth, result, verbose=0)
    corpus, single = {}, {}
    for k in range(4):
        corpus[f"BLEU-{k + 1}"], single[f"BLEU-{k + 1}"] = bleu[k], np.array(bleus[k])
    corpus["ROUGE-L"], single["ROUGE-L"] = Rouge().compute_score(truth, result)
    corpus["CIDEr"], single["CIDEr"] = Cider().compute_score(truth, result)
    return corpus, single


def assert_equal_to_oracle(captions, references):
    images = metrics.statistics(captions, references)
    corpus, single = oracle(captions, references)
    ours, ours_single = metrics.rescore(images), metrics.per_image(images)
    for name, value in corpus.items():
        assert ours[name][0] == pytest.approx(value, abs=1e-9), name
        np.testing.assert_allclose(ours_single[name], single[name], atol=1e-9, rtol=0, err_msg=name)


@pytest.mark.parametrize("n", [2, 60, 300])
def test_metrics_equal_pycocoevalcap(n):
    assert_equal_to_oracle(*some_captions(n, seed=n))


def test_metrics_equal_pycocoevalcap_on_adversarial_captions():
    captions, references = zip(*ADVERSARIAL)
    assert_equal_to_oracle(list(captions), list(references))


@pytest.mark.parametrize("caption, references", [a for a in ADVERSARIAL if any(a[1])], ids=range(8))
def test_one_image_alone(caption, references):
    assert_equal_to_oracle([caption], [references])
    assert metrics.rescore(metrics.statistics([caption], [references]))["CIDEr"][0] == 0


def test_weights_are_copies_of_images():
    captions, references = some_captions(40, seed=1)
    images = metrics.statistics(captions, references)
    images["meteor"] = np.random.default_rng(0).integers(1, 9, (40, 23)).astype(float)
    counts = np.random.default_rng(1).integers(0, 4, (5, 40))
    scores = metrics.rescore(images, counts)
    assert set(scores) == set(metrics.NAMES)
    for row, weights in enumerate(counts):
        drawn = np.repeat(np.arange(40), weights)
        copied = metrics.rescore({k: v[drawn] for k, v in images.items()})
        for name in metrics.NAMES:
            assert scores[name][row] == pytest.approx(copied[name][0], abs=1e-12)


def test_an_image_without_references_is_refused():
    with pytest.raises(ValueError, match="each needs one"):
        metrics.statistics(["a", "b"], [["a"], []])
