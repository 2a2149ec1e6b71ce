"""All caption metrics on n images × 5 references against pycocoevalcap, called scorer by scorer.

    python tests/benchmarks/bench_captions.py --full --annotations captions_train.json --json captions.json

Each run is a process of its own; the two sides take turns and the fastest run of each counts. `cold` is one system,
nothing cached; `second` is another system, with words of its own, against the same references: scored by the same
Scorer, or by a new process that finds the cache of the first; pycocoevalcap does all its work again. Memory is the
highest sum of resident memory of a process and its Java, sampled. Sentences are those of --annotations (any COCO
caption file), a tenth of their words replaced to make enough of them; without it, words drawn by Zipf's law.

    python tests/benchmarks/bench_captions.py --parity results.json --annotations captions_test.json

compares scores instead of times, corpus by corpus and image by image: of captions in COCO's results format, of each
image's first caption against its other ones, and of the next image's first caption.
"""

import argparse
import gzip
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCORES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


def main() -> None:
    """Make the captions, run both sides in turn, print the ratios."""
    args = arguments().parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](json.loads(args.data.read_text()))))
        return
    if args.parity:
        print_parity(args.annotations, args.parity)
        return
    images = args.images or (5000 if args.full else 300)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "captions.json")
        data.write_text(json.dumps(make_captions(images, args.annotations)))
        best: dict[str, float] = {}
        for run in range(args.runs):
            cache = str(Path(folder, f"cache{run}"))
            found = {side: run_side(side, data, cache) for side in ("ours", "again", "theirs")}
            for side, times in found.items():
                for name, value in times.items():
                    if name != "scores":
                        best[f"{side} {name}"] = min(value, best.get(f"{side} {name}", value))
            compare(found)
    result = {"images": images, "runs": args.runs, **best, **ratios(best)}
    for name, value in result.items():
        print(f"{name:42} {value:.4g}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--full", action="store_true", help="5,000 images instead of 300")
    made.add_argument("--images", type=int, default=0)
    made.add_argument("--runs", type=int, default=3)
    made.add_argument("--annotations", type=Path, help="COCO caption annotations to take sentences from")
    made.add_argument("--json", type=Path, metavar="FILE")
    made.add_argument("--parity", type=Path, metavar="RESULTS", help="compare scores, not times")
    made.add_argument("--side", help=argparse.SUPPRESS)
    made.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    return made


def make_captions(images: int, annotations: Path | None) -> dict:
    """References (five an image) and two systems' captions; the second has words that nothing before it had."""
    rng = random.Random(0)
    if annotations:
        by_image: dict = {}
        for entry in json.loads(annotations.read_text())["annotations"]:
            by_image.setdefault(entry["image_id"], []).append(entry["caption"])
        sources = [sentences for sentences in by_image.values() if len(sentences) >= 5]
        words = [word for image in sources for sentence in image for word in sentence.split()]
    else:
        known = table_words()
        rng.shuffle(known)
        words = [word for rank, word in enumerate(known[500:8500], 1) for _ in range(max(1, 4000 // rank))]
        sources = [
            [" ".join(rng.choices(words, k=rng.randint(7, 14))) for _ in range(5)] for _ in range(images)
        ]
    new = sorted(set(table_words()) - {word.lower() for word in words})

    def changed(sentence: str, pool: list[str], share: float) -> str:
        return " ".join(rng.choice(pool) if rng.random() < share else word for word in sentence.split())

    pick = [sources[i % len(sources)] for i in range(images)]
    first = [changed(rng.choice(image), words, 0.3) for image in pick]
    second = [changed(rng.choice(image), words, 0.3) for image in pick]
    return {
        "references": [[changed(sentence, words, 0.1) for sentence in image[:5]] for image in pick],
        "first": first,
        "second": [changed(caption, new[:500], 0.01) for caption in second],
    }


def table_words() -> list[str]:
    """Single words of METEOR's paraphrase table, so that made-up captions load it as real ones do."""
    folder = Path(importlib.util.find_spec("pycocoevalcap").submodule_search_locations[0])
    with gzip.open(folder / "meteor" / "data" / "paraphrase-en.gz", "rt", encoding="utf-8") as table:
        lines = itertools.islice(table, 1, 9_000_000, 3 * 30)
        return sorted({line.strip() for line in lines if line.strip().isalpha() and line.isascii()})


def run_side(side: str, data: Path, cache: str) -> dict:
    """One run in a process of its own: what it timed, its wall time and its peak memory in MB."""
    environment = os.environ | {"BACKBENCH_CACHE": cache, "BACKBENCH_QUIET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--side", side, "--data", str(data)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    peak: list[int] = [0]
    threading.Thread(target=watch, args=(process, peak), daemon=True).start()
    began = time.monotonic()
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{side} ended with code {process.returncode}")
    return json.loads(output.splitlines()[-1]) | {"process": time.monotonic() - began, "MB": peak[0]}


def watch(process: subprocess.Popen, peak: list[int]) -> None:
    """Keep the highest sum of resident memory of a process and its descendants, in MB."""
    while process.poll() is None:
        pages, family = 0, {process.pid}
        for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                if int(stat.parent.name) in family or int(fields[1]) in family:
                    family.add(int(stat.parent.name))
                    pages += int(fields[21])
            except (OSError, IndexError):
                continue
        peak[0] = max(peak[0], pages * os.sysconf("SC_PAGE_SIZE") // 2**20)
        time.sleep(0.05)


def ours(data: dict) -> dict:
    """Tokenizer and arrays alone, then with METEOR from cold, then a second system by the same scorer."""
    from backbench.captioning.scoring import Scorer
    from backbench.captioning.tokenizer import Tokenizer
    from backbench.common.metrics import captions as metrics

    began = time.monotonic()
    tokenizer = Tokenizer()
    flat = [sentence for image in data["references"] for sentence in image]
    tokens = tokenizer([*data["first"], *flat])
    tokenised = time.monotonic()
    rest = iter(tokens[len(data["first"]) :])
    references = [[next(rest) for _ in image] for image in data["references"]]
    metrics.rescore(metrics.statistics(tokens[: len(data["first"])], references))
    without = time.monotonic()
    tokenizer.close()
    start = time.monotonic()
    with Scorer(data["references"]) as scorer:
        scores = [score(scorer, data["first"])]
        cold = time.monotonic()
        scores.append(score(scorer, data["second"]))
        second = time.monotonic()
    return {
        "tokens": tokenised - began,
        "without METEOR": without - began,
        "cold": cold - start,
        "second": second - cold,
        "scores": scores,
    }


def again(data: dict) -> dict:
    """A second system in a new process, which finds what the first one cached."""
    from backbench.captioning.scoring import Scorer

    start = time.monotonic()
    with Scorer(data["references"]) as scorer:
        scores = [score(scorer, data["second"])]
        return {"second": time.monotonic() - start, "scores": scores}


def score(scorer, captions: list[str]) -> dict[str, float]:
    """All corpus scores of one system."""
    from backbench.common.metrics.captions import rescore

    return {name: float(value[0]) for name, value in rescore(scorer.statistics(captions)).items()}


def print_parity(annotations: Path, results: Path) -> None:
    """Every score by both sides, and the largest difference of an image's, as Markdown."""
    from backbench.captioning.scoring import Scorer
    from backbench.common.metrics.captions import per_image, rescore

    by_image: dict = {}
    for entry in json.loads(annotations.read_text())["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry["caption"])
    said = {entry["image_id"]: entry["caption"] for entry in json.loads(results.read_text())}
    references = list(by_image.values())
    first = [image[0] for image in references]
    systems = {
        f"captions of {results.name}": ([said[key] for key in by_image], references),
        "an image's own first caption, against its others": (first, [image[1:] for image in references]),
        "the next image's first caption": ([*first[1:], first[0]], references),
    }
    java_on_path()
    for what, (captions, truth) in systems.items():
        theirs = their_scores(truth, captions)
        with Scorer(truth) as scorer:
            images = scorer.statistics(captions)
        ours, single = rescore(images), per_image(images)
        print(f"\n{what}: {len(captions)} images, {sum(map(len, truth))} references\n")
        print(
            "| metric × 100 | pycocoevalcap | backbench | corpus: difference | images: largest difference |"
        )
        print("|---|---|---|---|---|")
        for name in SCORES:
            corpus, other = float(ours[name][0]), theirs["scores"][name]
            gap = max(abs(a - b) for a, b in zip(single[name], theirs["images"][name], strict=True))
            print(
                f"| {name} | {100 * other:.6f} | {100 * corpus:.6f} | {abs(corpus - other):.1e} | {gap:.1e} |"
            )


def theirs(data: dict) -> dict:
    """pycocoevalcap for both systems."""
    java_on_path()
    first = their_scores(data["references"], data["first"])
    second = their_scores(data["references"], data["second"])
    return {
        "tokens": first["tokens"],
        "without METEOR": sum(first[name] for name in ("tokens", "BLEU", "ROUGE-L", "CIDEr")),
        "METEOR": first["METEOR"],
        "cold": first["all"],
        "second": second["all"],
        "scores": [first["scores"], second["scores"]],
    }


def java_on_path() -> None:
    """pycocoevalcap runs `java`."""
    from backbench.captioning.java import find_java

    os.environ["PATH"] = f"{Path(find_java()).parent}:{os.environ['PATH']}"


def their_scores(references: list[list[str]], captions: list[str]) -> dict:
    """pycocoevalcap's tokenizer and scorers, one after the other, each timed; scores of the corpus and of images."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    began = clock = time.monotonic()
    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({i: [{"caption": r} for r in image] for i, image in enumerate(references)})
    result = tokenizer.tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    times, scores, images = {"tokens": time.monotonic() - clock}, {}, {}
    for name, scorer in (
        ("BLEU", Bleu(4)),
        ("ROUGE-L", Rouge()),
        ("CIDEr", Cider()),
        ("METEOR", None),
    ):
        clock = time.monotonic()
        scorer = scorer or Meteor()  # starts Java
        value, single = scorer.compute_score(truth, result, *([0] if name == "BLEU" else []))
        times[name] = time.monotonic() - clock
        scores |= {f"BLEU-{k + 1}": v for k, v in enumerate(value)} if name == "BLEU" else {name: value}
        images |= {f"BLEU-{k + 1}": v for k, v in enumerate(single)} if name == "BLEU" else {name: single}
    return times | {"all": time.monotonic() - began, "scores": scores, "images": images}


def compare(found: dict) -> None:
    """Both sides, and a new process, give the same scores."""
    for ours, theirs in zip(
        found["ours"]["scores"] + found["again"]["scores"],
        found["theirs"]["scores"] + found["theirs"]["scores"][1:],
        strict=True,
    ):
        for name in SCORES:
            if abs(ours[name] - theirs[name]) > 1e-9:
                raise SystemExit(f"{name}: {ours[name]} is not pycocoevalcap's {theirs[name]}")


def ratios(best: dict[str, float]) -> dict[str, float]:
    """How many times faster, and smaller, than pycocoevalcap."""
    return {
        "× without METEOR": best["theirs without METEOR"] / best["ours without METEOR"],
        "× cold": best["theirs cold"] / best["ours cold"],
        "× second system, same scorer": best["theirs second"] / best["ours second"],
        "× second system, new process": best["theirs second"] / best["again second"],
        "× memory": best["theirs MB"] / best["ours MB"],
    }


SIDES = {"ours": ours, "again": again, "theirs": theirs}

if __name__ == "__main__":
    main()
