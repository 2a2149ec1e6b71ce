"""Beam search, vectorised over images and beams."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Advance = Callable[[Tensor, State], tuple[Tensor, State]]
PENALTIES = ("none", "average", "wu")


@dataclass(frozen=True, kw_only=True)
class Beam:
    """How captions are searched for. `width` 1 is greedy decoding."""

    width: int = 5
    longest: int = 20  # words, the end included
    shortest: int = 0  # words before the end may come
    penalty: str = "none"  # one of PENALTIES
    alpha: float = 0.7  # of Wu's
    legacy: bool = (
        False  # the base code: the end is a word like any other; the best full-length beam is cut there
    )

    def scale(self, length: int) -> float:
        """What a summed log-probability of `length` words, the end included, is divided by.

        none: 1; average: the length; wu: ((5 + length) / 6)^alpha (Wu et al., 2016, equation 14).
        """
        if self.penalty == "average":
            return float(length)
        return ((5 + length) / 6) ** self.alpha if self.penalty == "wu" else 1.0


@torch.inference_mode()
def beam_search(
    advance: Advance,
    state: State,
    images: int,
    beam: Beam,
    *,
    start: int,
    end: int,
    banned: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """The best captions of `images` images: words int64 (images, longest), `end`-filled, and their scores (images,).

    `advance(words (m,), state)` returns next-word logits (m, V), which are written over, and the new state, tensors
    (1, m, …) as an LSTM's.
    A beam that ended is frozen: it keeps its place among the `width` best with its score, and costs nothing. A
    score is the summed log-probability over `beam.scale`. An image is done when no live beam can still overtake its
    best ended one; when none ended within `longest` words, its best unfinished caption is taken. `banned` words
    never come.
    """
    device, width = state[0].device, beam.width
    best_words = torch.full((images, beam.longest), end, device=device)
    best_score = torch.full((images,), -torch.inf, device=device)
    active = torch.arange(images, device=device)  # the images still searched for, by row of what follows
    words = torch.full((images, width, beam.longest), end, device=device)
    total = torch.full((images, width), -torch.inf, device=device)  # summed log-probabilities
    total[:, 0] = 0
    score = total.clone()  # the same over its scale
    live = torch.zeros(images, width, dtype=torch.bool, device=device)
    live[:, 0] = True
    last = torch.full((images,), start, device=device)  # of each live beam, in row order; `state` likewise
    for step in range(beam.longest):
        row = live.flatten().nonzero()[:, 0]
        logits, state = advance(last, state)
        value, word = _candidates(logits, step, beam, end, banned)
        kept = value.shape[1]
        sums = torch.full((len(active) * width, kept + 1), -torch.inf, device=device)
        next_word = torch.full((len(active) * width, kept + 1), end, device=device)
        sums[row, :kept] = total.flatten()[row, None] + value
        next_word[row, :kept] = word
        scores = sums / beam.scale(step + 1)
        frozen = (~live).flatten() & (score.flatten() > -torch.inf)  # has ended: one candidate, itself
        sums[:, kept] = torch.where(frozen, total.flatten(), -torch.inf)
        scores[:, kept] = torch.where(frozen, score.flatten(), -torch.inf)

        shape = (len(active), width * (kept + 1))
        score, pick = scores.view(shape).topk(width, dim=1)
        total = sums.view(shape).gather(1, pick)
        parent, slot = pick // (kept + 1), pick % (kept + 1)
        words = words.gather(1, parent[:, :, None].expand(-1, -1, beam.longest))
        chosen = next_word.view(shape).gather(1, pick)
        words[:, :, step] = chosen
        possible = score > -torch.inf
        live = possible & (slot < kept)
        if not beam.legacy:
            live &= chosen != end

        ended = torch.where(live, -torch.inf, score)  # scores by slot of the beams that have ended
        unfinished = torch.where(live, total, -torch.inf).amax(1)
        # log-probabilities only fall: the most a live beam can reach is its sum now over the largest scale
        done = (ended.amax(1) >= unfinished / beam.scale(beam.longest)) | ~live.any(1)
        if step + 1 == beam.longest:
            done[:] = True
        if done.any():
            pool = torch.where(ended.amax(1, keepdim=True) > -torch.inf, ended, score)
            top = pool.argmax(1)
            rows = done.nonzero()[:, 0]
            best_words[active[rows]] = words[rows, top[rows]]
            best_score[active[rows]] = pool[rows, top[rows]]
        keep = (~done).nonzero()[:, 0]
        if not len(keep):
            break
        position = torch.full((len(active) * width,), -1, device=device)
        position[row] = torch.arange(len(row), device=device)
        origin = position.view(len(active), width).gather(1, parent)[keep]
        active, words, total, score, live = (t[keep] for t in (active, words, total, score, live))
        last = chosen[keep][live]
        state = tuple(part.index_select(1, origin[live]) for part in state)
    return best_words, best_score


def _candidates(
    logits: Tensor, step: int, beam: Beam, end: int, banned: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and numbers (m, k) of the `width` best next words of each beam; no (m, V) softmax is made."""
    normaliser = logits.logsumexp(1, keepdim=True)
    excluded = [*banned, end] if step < beam.shortest and not beam.legacy else list(banned)
    if excluded:
        logits.index_fill_(1, torch.tensor(excluded, device=logits.device), -torch.inf)  # no copy of (m, V)
    value, word = logits.topk(min(beam.width, logits.shape[1]), dim=1)
    return value - normaliser, word
