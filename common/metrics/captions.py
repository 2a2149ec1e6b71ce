"""Caption metrics on arrays: BLEU-1…4, METEOR, ROUGE-L and CIDEr-D (the field's "CIDEr"), with image weights.

`statistics` turns captions into per-image sufficient statistics once; `rescore` turns those and any number of
weightings of the images into scores. Scores are fractions (CIDEr 1.43 is a paper's 143) and equal
pycocoevalcap's on the same tokenised sentences. METEOR's statistics come from its jar (captioning/meteor.py).
"""

from collections.abc import Mapping, Sequence

import numpy as np

NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")  # and SPICE, where it is given
ORDERS = 4  # n-grams of 1 to 4 words, in BLEU and in CIDEr
SIGMA = 6.0  # CIDEr-D's Gaussian length penalty (Vedantam et al., CVPR 2015, section 5)
BETA = 1.2  # ROUGE-L's weight of recall, as the COCO evaluation sets it
# METEOR 1.5 for English (Denkowski & Lavie, WMT 2014, table 1): parameters, weights of its four matchers
ALPHA, FRAG_BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MATCHERS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase


def statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Per-image sufficient statistics of n captions against their references.

    Sentences are tokenised already, words separated by single spaces. Returns `bleu_matches` (n, 4) clipped
    n-gram matches, `bleu_lengths` (n, 2) lengths in words of the caption and of the closest reference (the
    shorter one of two equally close), `rouge` (n,) and `cider` (n,), its document frequencies of all n images.
    Raises ValueError when an image has no reference.
    """
    n = len(hypotheses)
    if n == 0 or len(references) != n or not all(len(r) for r in references):
        raise ValueError(f"{n} captions, {len(references)} lists of references: each needs one, not empty")
    sentences = [*hypotheses, *(reference for image in references for reference in image)]
    counts = np.array([len(image) for image in references])
    image = np.concatenate([np.arange(n), np.repeat(np.arange(n), counts)])
    ids, lengths = _word_ids([s.split() for s in sentences])
    first = np.cumsum(counts) - counts  # of each image's references
    distance = np.abs(lengths[n:] - lengths[image[n:]])
    longest = lengths.max() + 1
    closest = np.minimum.reduceat(distance * longest + lengths[n:], first) % longest
    matches, cider = _ngram_scores(ids, lengths, image, counts)
    return {
        "bleu_matches": matches.astype(np.int32),
        "bleu_lengths": np.stack([lengths[:n], closest], 1).astype(np.int32),
        "rouge": _rouge([s.split(" ") for s in sentences], image, first),
        "cider": cider,
    }


def _word_ids(sentences: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """All words, one after the other, as integers; and each sentence's length."""
    table: dict[str, int] = {}
    lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
    ids = (table.setdefault(word, len(table)) for words in sentences for word in words)
    return np.fromiter(ids, np.int64, int(lengths.sum())), lengths


def _ngram_scores(
    ids: np.ndarray, lengths: np.ndarray, image: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """BLEU's clipped matches (n, 4) and CIDEr-D (n,). Sentences 0…n-1 are captions, the rest references."""
    n, sentences = len(counts), len(lengths)
    sentence = np.repeat(np.arange(sentences), lengths)
    stop = np.cumsum(lengths)[sentence]  # where each word's sentence ends
    start, gram, words = np.arange(len(ids)), ids, int(ids.max(initial=0)) + 1
    matches, similarity = np.zeros((n, ORDERS), np.int64), np.zeros(sentences - n)
    for order in range(1, ORDERS + 1):
        if order > 1:
            keep = start + order <= stop[start]
            start = start[keep]
            gram = np.unique(gram[keep] * words + ids[start + order - 1], return_inverse=True)[1]
        kinds = int(gram.max(initial=0)) + 1
        pair, count = np.unique(sentence[start] * kinds + gram, return_counts=True)
        owner, kind = pair // kinds, pair % kinds
        ours = owner < n
        hypothesis, wanted = pair[ours], image[owner[~ours]] * kinds + kind[~ours]
        at = np.searchsorted(hypothesis, wanted)
        hit = np.append(hypothesis, -1)[at] == wanted  # this n-gram of a reference is in its image's caption
        at = at[hit]
        most = np.zeros(len(hypothesis), np.int64)
        np.maximum.at(most, at, count[~ours][hit])
        matches[:, order - 1] = np.bincount(owner[ours], np.minimum(most, count[ours]), n)

        document_frequency = np.bincount(np.unique(wanted) % kinds, minlength=kinds)
        weight = count * (np.log(float(n)) - np.log(np.maximum(1, document_frequency)))[kind]
        norm = np.sqrt(np.bincount(owner, weight**2, sentences))
        weight_h, weight_r, owner_r = weight[ours][at], weight[~ours][hit], owner[~ours][hit] - n
        cosine = np.bincount(owner_r, np.minimum(weight_h, weight_r) * weight_r, sentences - n)
        scale = norm[image[n:]] * norm[n:]
        similarity += np.divide(cosine, scale, out=np.zeros(len(scale)), where=scale != 0)
    bigrams = np.maximum(0, lengths - 1)  # pycocoevalcap's length of a sentence
    similarity *= np.exp(-((bigrams[image[n:]] - bigrams[n:]) ** 2) / (2 * SIGMA**2))
    return matches, 10 * np.bincount(image[n:], similarity / ORDERS, n) / counts


def _rouge(sentences: list[list[str]], image: np.ndarray, first: np.ndarray) -> np.ndarray:
    """ROUGE-L (n,): the F-measure of the best precision and best recall among the references (Lin, 2004)."""
    n = len(first)
    ids, lengths = _word_ids(sentences)
    offset = np.cumsum(lengths) - lengths
    caption = image[n:]
    common = np.zeros(len(caption))
    order = np.lexsort([lengths[n:], lengths[caption]])
    for chunk in np.array_split(order, max(1, len(order) // 4096)):  # of similar lengths: little padding
        a = _padded(ids, offset[n + chunk], lengths[n + chunk], -1)
        b = _padded(ids, offset[caption[chunk]], lengths[caption[chunk]], -2)
        common[chunk] = _common_subsequence(a, b)
    precision = np.maximum.reduceat(common / lengths[caption], first)
    recall = np.maximum.reduceat(common / lengths[n:], first)
    both = (precision > 0) & (recall > 0)
    score = (1 + BETA**2) * precision * recall
    return np.divide(score, recall + BETA**2 * precision, out=np.zeros(n), where=both)


def _padded(ids: np.ndarray, offset: np.ndarray, lengths: np.ndarray, pad: int) -> np.ndarray:
    """Sentences as columns: (longest, m) word ids, filled up with `pad`."""
    row = np.arange(lengths.max())[:, None]
    inside = row < lengths
    return np.where(inside, ids[np.where(inside, offset + row, 0)], pad)


def _common_subsequence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Lengths (m,) of the longest common subsequences of m pairs of columns, (la, m) and (lb, m)."""
    table = np.zeros((len(a) + 1, a.shape[1]), np.int32)
    for (
        word
    ) in b:  # one row of the usual dynamic programme for all pairs; the running maximum is its third rule
        np.maximum(table[1:], (table[:-1] + 1) * (a == word), out=table[1:])
        np.maximum.accumulate(table, axis=0, out=table)
    return table[-1]


def rescore(images: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Corpus scores (R,) by name under R weightings of the images.

    `images` holds what `statistics` returns and, where they could be scored, `meteor` (n, 23) and `spice` (n,).
    `weights` (R, n) are non-negative (a bootstrap's draw counts); None: every image once, R = 1. CIDEr's document
    frequencies stay fixed.
    """
    lengths, matches = images["bleu_lengths"], images["bleu_matches"]
    n = len(lengths)
    weights = np.ones((1, n)) if weights is None else np.asarray(weights, float)
    columns = [matches, _guesses(lengths[:, 0]), lengths, images["rouge"][:, None], images["cider"][:, None]]
    totals = weights @ np.concatenate(columns, 1).astype(float)
    scores = _bleu(totals[:, :4], totals[:, 4:8], totals[:, 8], totals[:, 9])
    if "meteor" in images:
        scores["METEOR"] = meteor_score(weights @ images["meteor"])
    total = weights.sum(1)
    scores["ROUGE-L"], scores["CIDEr"] = totals[:, 10] / total, totals[:, 11] / total
    if "spice" in images:
        scores["SPICE"] = weights @ images["spice"] / total
    return scores


def per_image(images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each image's own scores (n,) by name, of the arrays that `rescore` takes."""
    lengths = images["bleu_lengths"]
    scores = _bleu(images["bleu_matches"], _guesses(lengths[:, 0]), lengths[:, 0], lengths[:, 1])
    if "meteor" in images:
        scores["METEOR"] = meteor_score(images["meteor"])
    if "spice" in images:
        scores["SPICE"] = images["spice"]
    return scores | {"ROUGE-L": images["rouge"], "CIDEr": images["cider"]}


def _guesses(lengths: np.ndarray) -> np.ndarray:
    return np.maximum(0, lengths[:, None] - np.arange(ORDERS))


def _bleu(
    matches: np.ndarray, guesses: np.ndarray, length: np.ndarray, closest: np.ndarray
) -> dict[str, np.ndarray]:
    """BLEU-1…4 of statistics (m, 4), (m, 4), (m,), (m,): geometric means of precisions × brevity penalty.

    The tiny constants are pycocoevalcap's: they make an impossible precision 0 and divide nothing by 0.
    """
    precision = np.cumprod((matches + 1e-15) / (guesses + 1e-9), axis=1)
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return {f"BLEU-{k}": precision[:, k - 1] ** (1 / k) * brevity for k in range(1, ORDERS + 1)}


def meteor_counts(raw: np.ndarray) -> np.ndarray:
    """The statistics (n, 23) by which captions enter METEOR's corpus score, of those its jar prints for each.

    A caption and reference that match whole, in one piece, count as no chunk at all: alone and in the corpus.
    """
    matched = raw[:, 4:20].reshape(-1, 4, 2, 2).sum((1, 2))
    whole = (matched == raw[:, 0:2]).all(1) & (raw[:, 20] == 1)
    counts = raw.copy()
    counts[whole, 20] = 0
    return counts


def meteor_score(stats: np.ndarray) -> np.ndarray:
    """METEOR 1.5 for English (...,) of statistics (..., 23) from `meteor_counts`, per image or summed over images.

    The statistics are caption length, reference length, function words of both, then for each of four matchers
    the matched content words of caption and reference and the matched function words of both, then chunks and
    matched words of both (Denkowski & Lavie, 2014, section 3; held against the jar's own scores in the tests).
    """
    stats = np.asarray(stats, float)
    length, function = stats[..., 0:2], stats[..., 2:4]
    matched = stats[..., 4:20].reshape(*stats.shape[:-1], 4, 2, 2)  # matcher, content or function, side
    weighted = DELTA * matched[..., 0, :] + (1 - DELTA) * matched[..., 1, :]
    weighted = (weighted * MATCHERS[:, None]).sum(-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = weighted / (DELTA * (length - function) + (1 - DELTA) * function)
        mean = 1 / ((1 - ALPHA) / share[..., 0] + ALPHA / share[..., 1])
        fragments = stats[..., 20] / (stats[..., 21:23].sum(-1) / 2)
        score = mean * (1 - GAMMA * fragments**FRAG_BETA)
    return np.where(np.isfinite(score), np.maximum(score, 0), 0)
