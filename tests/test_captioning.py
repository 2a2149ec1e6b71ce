"""The captioning room: vocabulary, model, beam search, the scripts end to end."""

from pathlib import Path

import pytest
import torch

from captioning.beam import Beam, beam_search
from captioning.nic import NIC
from captioning.vocabulary import (
    END,
    PAD,
    START,
    UNK,
)

ROOT = Path(__file__).resolve().parents[1]


def make_nic(words: int = 30, seed: int = 0, sharp: float = 12.0, end: float = 0.0) -> NIC:
    torch.manual_seed(seed)
    nic = NIC(8, words, embed=6, hidden=10, dropout=0.0, feature_bn=False).eval()
    for parameter in nic.parameters():  # far from uniform, so that beams differ and end at different lengths
        parameter.data.mul_(sharp)
    nic.classify.bias.data[END] += end
    return nic


def plain_beam(nic: NIC, features: torch.Tensor, beam: Beam, banned=()) -> list[tuple[list[int], float]]:
    """One image, one beam, one word at a time; no early stop. The reference for `beam_search`."""
    results = []
    for feature in features:
        beams = [([], 0.0, nic.start(feature[None]), False)]  # words, sum, state, ended
        scores = [0.0]
        for step in range(beam.longest):
            candidates = []
            for (words, total, state, ended), score in zip(beams, scores):
                if ended:
                    candidates.append((score, (words, total, state, True)))
                    continue
                last = torch.tensor([words[-1] if words else START])
                logits, new = nic.advance(last, state)
                for word, value in enumerate(torch.log_softmax(logits[0].double(), 0).tolist()):
                    if word in banned or (word == END and step < beam.shortest and not beam.legacy):
                        continue
                    sum_ = total + value
                    ends = word == END and not beam.legacy
                    candidates.append((sum_ / beam.scale(step + 1), ([*words, word], sum_, new, ends)))
            candidates.sort(key=lambda c: -c[0])
            scores = [score for score, _ in candidates[: beam.width]]
            beams = [candidate for _, candidate in candidates[: beam.width]]
        pool = [(s, b) for s, b in zip(scores, beams) if b[3]] or list(zip(scores, beams))
        score, best = max(pool, key=lambda p: p[0])
        results.append((best[0] + [END] * (beam.longest - len(best[0])), score))
    return results


@pytest.mark.parametrize(
    "options",
    [
        {"width": 1},
        {"width": 5},
        {"width": 20},
        {"width": 40, "longest": 6},
        {"width": 5, "penalty": "average"},
        {"width": 7, "penalty": "wu", "alpha": 0.9},
        {"width": 5, "shortest": 4},
        {"width": 5, "shortest": 12},  # more than the longest: nothing ends
        {"width": 5, "legacy": True},
    ],
    ids=str,
)
def test_beam_search_equals_the_plain_one(options):
    beam = Beam(**{"longest": 9, **options})
    lengths = set()
    for seed in range(4):
        nic = make_nic(seed=seed, end=3.0 if beam.legacy else 0.0)
        features = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
        banned = (PAD, START, UNK)
        with torch.inference_mode():
            words, scores = beam_search(
                nic.advance, nic.start(features), 6, beam, start=START, end=END, banned=banned
            )
            expected = plain_beam(nic, features, beam, banned)
        for row, score, (wanted, value) in zip(words.tolist(), scores.tolist(), expected):
            assert row == wanted
            assert score == pytest.approx(value, rel=1e-5)
            lengths.add(row.index(END) if END in row else len(row))
            assert not set(banned) & set(row)
    assert len(lengths) > 1 or options.get("shortest") == 12


def test_beam_search_of_a_model_that_never_ends_gives_the_best_unfinished_caption():
    nic = make_nic()
    nic.classify.bias.data[END] = -1e6
    state = nic.start(torch.randn(3, 8))
    words, scores = beam_search(nic.advance, state, 3, Beam(width=3, longest=5), start=START, end=END)
    assert not (words == END).any()
    assert torch.isfinite(scores).all()
