"""NIC's loss and its beam search, against plain loops."""

import numpy as np
import pytest
import torch

from backbench.captioning.beam import Beam, beam_search
from backbench.captioning.nic import NIC
from backbench.captioning.vocabulary import END, PAD, START, UNK, Vocabulary


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
        {"width": 5, "penalty": "average", "shortest": 3},
        {"width": 5, "penalty": "wu", "shortest": 3, "longest": 5},
        {"width": 5, "legacy": True},
        {"width": 5, "legacy": True, "penalty": "average", "shortest": 3},
        {"width": 5, "longest": 1},
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
    assert len(lengths) > 1 or options.get("shortest") == 12 or beam.longest == 1
    assert not options.get("legacy") or min(lengths) < beam.longest  # it does end, and is cut there


def test_beam_search_of_a_model_that_never_ends_gives_the_best_unfinished_caption():
    nic = make_nic()
    nic.classify.bias.data[END] = -1e6
    state = nic.start(torch.randn(3, 8))
    words, scores = beam_search(nic.advance, state, 3, Beam(width=3, longest=5), start=START, end=END)
    assert not (words == END).any()
    assert torch.isfinite(scores).all()


def test_greedy_is_beam_search_of_width_one():
    nic = make_nic(seed=2)
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        state, word, greedy = nic.start(features), torch.full((4,), START), []
        for _ in range(7):
            logits, state = nic.advance(word, state)
            word = logits.argmax(1)
            greedy.append(word)
        words, _ = beam_search(
            nic.advance, nic.start(features), 4, Beam(width=1, longest=7), start=START, end=END
        )
    vocabulary = Vocabulary([str(i) for i in range(26)], punctuation=False)
    assert [vocabulary.decode(w) for w in words.tolist()] == [
        vocabulary.decode(w) for w in torch.stack(greedy, 1).tolist()
    ]


def test_five_captions_of_an_image_cost_one_encoding_and_the_loss_of_five_items():
    nic = make_nic(sharp=1.0)
    features, captions = torch.randn(3, 8), torch.randint(4, 30, (3, 5, 6))
    captions[:, :, -1] = END
    captions[0, 1, 3:] = PAD
    captions[2, 4] = PAD  # an image with four captions
    encoded = []
    handle = nic.project.register_forward_hook(lambda *a: encoded.append(len(a[1][0])))
    together = nic(features, captions)
    handle.remove()
    assert encoded == [3]
    words, total = 0, 0.0
    for image in range(3):
        for caption in captions[image]:
            if (length := int((caption != PAD).sum())) > 0:
                total += nic(features[image, None], caption[None, None, :length]).item() * length
                words += length
    assert together.item() == pytest.approx(total / words, rel=1e-5)


def test_reading_captions_by_length_changes_neither_loss_nor_gradients_nor_dropout():
    from backbench.captioning.data import GROUP, _groups

    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 13, (30, 5))
    lengths[3, 4] = 0  # an image with four captions
    captions = np.where(np.arange(12) < lengths[:, :, None], rng.integers(4, 30, (30, 5, 12)), PAD)
    groups = _groups(lengths.reshape(-1))
    assert sorted(row for rows, _ in groups for row in rows.tolist()) == [r for r in range(150) if r != 19]
    assert all(len(rows) >= GROUP for rows, _ in groups[:-1]) and len(groups) > 3
    read = sum(len(rows) * longest for rows, longest in groups)
    assert lengths.sum() <= read < 1.15 * lengths.sum() < 0.7 * captions.size
    nic = make_nic(sharp=1.0).train()
    nic.dropout.p = 0.5
    features, found = torch.randn(30, 8), []
    for by_length in (None, groups):
        torch.manual_seed(1)
        nic.zero_grad()
        loss = nic(features, torch.from_numpy(captions), by_length)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in nic.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_decoder_seen_step_by_step():
    nic = make_nic(sharp=1.0)
    feature, caption = torch.randn(1, 8), [7, 12, 5, END]
    state, word, total = nic.start(feature), torch.tensor([START]), 0.0
    for target in caption:
        logits, state = nic.advance(word, state)
        total -= torch.log_softmax(logits[0], 0)[target].item()
        word = torch.tensor([target])
    assert nic(feature, torch.tensor([[caption]])).item() == pytest.approx(total / 4, rel=1e-5)
