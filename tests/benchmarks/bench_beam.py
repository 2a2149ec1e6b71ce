"""Beam search over images × beams at once against the usual loop: one image, one beam and one word at a time.

    python tests/benchmarks/bench_beam.py --full --json beam.json
    python tests/benchmarks/bench_beam.py --full --device cuda

The paper's beam: 20 beams, 20 words, with NIC's sizes (embed 100, LSTM 300) and a vocabulary of COCO's (about 9,000
words); the weights are random and sharpened, so that captions end at different lengths. `frozen`: a beam that ended
keeps its place and costs nothing, on every side; `legacy`: no beam ends, as in the base code. `by image` is the better
kind of loop, which gives all beams of an image to the LSTM together. Captions are compared; the sides take turns, the
fastest counts.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from backbench.captioning.beam import Beam, beam_search
from backbench.captioning.nic import NIC
from backbench.captioning.vocabulary import END, PAD, START, UNK

BANNED = [PAD, START, UNK]


def main() -> None:
    """Make the model, let both sides search in turn, print the ratios."""
    args = arguments().parse_args()
    device = torch.device(args.device)
    images, words = (32, 9000) if args.full else (8, 2000)
    torch.manual_seed(0)
    nic = NIC(2048, words, embed=100, hidden=300, dropout=0.0, feature_bn=False).to(device).eval()
    for parameter in nic.parameters():
        parameter.data.mul_(4)
    nic.classify.bias.data[END] = 1.2  # captions of about ten words
    features = torch.randn(images, 2048, device=device)
    result: dict[str, float | int | str] = {"images": images, "words": words, "device": device.type}
    for mode in ("frozen", "legacy"):
        beam = Beam(width=20, longest=20, legacy=mode == "legacy")
        times: dict[str, list[float]] = {"batched": [], "loop": [], "by image": []}
        found = {}
        for _ in range(args.runs):
            for name in times:
                began = clock(device)
                search = batched if name == "batched" else partial(loop, together=name == "by image")
                found[name] = search(nic, features, beam)
                times[name].append(clock(device) - began)
        same = (found["batched"] == found["loop"]).all(1) & (found["batched"] == found["by image"]).all(1)
        fastest = {name: min(values) for name, values in times.items()}
        lengths = (found["batched"] != END).sum(1).float()
        result |= {
            f"{mode}: batched, s": fastest["batched"],
            f"{mode}: loop, s": fastest["loop"],
            f"{mode}: loop by image, s": fastest["by image"],
            f"{mode}: ×": fastest["loop"] / fastest["batched"],
            f"{mode}: × of the loop by image": fastest["by image"] / fastest["batched"],
            f"{mode}: images a second": images / fastest["batched"],
            f"{mode}: captions identical": f"{int(same.sum())} of {images}",
            f"{mode}: mean words": lengths.mean().item(),
        }
    for name, value in result.items():
        print(f"{name:32} {value if isinstance(value, str | int) else f'{value:.4g}'}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--full", action="store_true", help="32 images and 9,000 words instead of 8 and 2,000")
    made.add_argument("--runs", type=int, default=3)
    made.add_argument("--device", default="cpu")
    made.add_argument("--json", type=Path, metavar="FILE")
    return made


def clock(device: torch.device) -> float:
    """Seconds: of the wall once a GPU is idle, of the processor on a CPU, which other load disturbs less."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def batched(nic: NIC, features: Tensor, beam: Beam) -> Tensor:
    """Ours: words (n, longest)."""
    state = nic.start(features)
    return beam_search(nic.advance, state, len(features), beam, start=START, end=END, banned=BANNED)[0]


@torch.inference_mode()
def loop(nic: NIC, features: Tensor, beam: Beam, together: bool) -> Tensor:
    """One image after the other, a Python list of beams, a sort of all their candidates each word."""
    rows = []
    for feature in features:
        state = nic.start(feature[None])
        beams: list[tuple[float, list[int], tuple[Tensor, ...] | None]] = [(0.0, [], state)]
        for _ in range(beam.longest):
            live = [b for b in beams if b[2] is not None]
            if not live:
                break
            ended = max((b[0] for b in beams if b[2] is None), default=-float("inf"))
            if ended >= max(b[0] for b in live):  # no live beam can win
                break
            last = torch.tensor([b[1][-1] if b[1] else START for b in live], device=features.device)
            if together:
                state = tuple(torch.cat([b[2][k] for b in live], 1) for k in range(2))
                logits, state = nic.advance(last, state)
            else:
                steps = [nic.advance(last[k : k + 1], b[2]) for k, b in enumerate(live)]
                logits = torch.cat([step[0] for step in steps])
                state = tuple(torch.cat([step[1][k] for step in steps], 1) for k in range(2))
            scores = torch.log_softmax(logits, 1)
            scores[:, BANNED] = -float("inf")
            values, words = scores.topk(beam.width, 1)
            candidates = [b for b in beams if b[2] is None]
            for row, (total, said, _) in enumerate(live):
                here = tuple(part[:, row : row + 1] for part in state)
                for value, word in zip(values[row].tolist(), words[row].tolist()):
                    ends = word == END and not beam.legacy
                    candidates.append((total + value, [*said, word], None if ends else here))
            candidates.sort(key=lambda candidate: -candidate[0])
            beams = candidates[: beam.width]
        ended = [b for b in beams if b[2] is None]
        words = max(ended or beams, key=lambda b: b[0])[1]
        rows.append(words + [END] * (beam.longest - len(words)))
    return torch.tensor(rows, device=features.device)


if __name__ == "__main__":
    main()
