"""The captioning room: vocabulary, recipes, cached features, the script end to end."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbench.captioning.vocabulary import END, START, UNK, build_vocabulary, load_vocabulary, words_of
from backbench.common.backbones.load import save_backbone
from backbench.common.backbones.resnet import Classifier, Trunk
from backbench.common.base.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_vocabulary(tmp_path):
    captions = ["A dog, a cat.", "the dog isn't here", "a bird"]
    words = [words_of(c, punctuation=False) for c in captions]
    assert words[0] == ["a", "dog", "a", "cat"]
    assert words_of(captions[0], punctuation=True) == ["a", "dog", ",", "a", "cat", "."]
    assert words_of("isn't it (small)", punctuation=False) == ["is", "n't", "it", "small"]
    vocabulary = build_vocabulary(words, threshold=2, punctuation=False)
    assert vocabulary.words == ["<pad>", "<start>", "<end>", "<unk>", "a", "dog"]
    assert vocabulary.encode(["a", "bird", "dog"], longest=9) == [4, UNK, 5, END]
    assert vocabulary.encode(["a", "bird", "dog"], longest=2) == [4, UNK]
    assert vocabulary.decode([START, 5, 4, END, 5]) == "dog a"
    vocabulary.save(tmp_path / "v.json")
    assert load_vocabulary(tmp_path / "v.json").words == vocabulary.words
    with pytest.raises(UserError, match="lower --set threshold"):
        build_vocabulary(words, threshold=9, punctuation=False)
    (tmp_path / "w.json").write_text("[]")
    with pytest.raises(UserError, match="not a vocabulary file"):
        load_vocabulary(tmp_path / "w.json")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """`write_walls`' pictures and captions, and a small backbone file."""
    root = write_walls(tmp_path_factory.mktemp("coco"))
    torch.manual_seed(0)
    classifier = Classifier(Trunk("resnet18_half"), 4).train()
    for _ in range(3):  # batch-norm statistics that are not their initial values
        classifier(torch.randn(8, 3, 32, 32))
    facts = {"arch": "resnet18_half", "num_classes": 4, "method": "baseline", "seed": 0, "size": 32}
    save_backbone(root / "baseline.pt", classifier, **facts)
    return root


def write_walls(root: Path) -> Path:
    """16 + 8 pictures of one colour, with captions that name it."""
    (root / "images").mkdir(parents=True)
    colours = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 200), "white": (240, 240, 240)}
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 8)):
        images, annotations = [], []
        for i in range(count):
            name, colour = list(colours.items())[i % 4]
            pixels = np.clip(rng.normal(colour, 20, (40 + i, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{part}{i}.png")
            images.append({"id": 7 * i + 1, "file_name": f"{part}{i}.png"})
            for k, form in enumerate(("a {} wall", "the wall is {}", "there is a {} wall .")):
                annotations.append({"id": 10 * i + k, "image_id": 7 * i + 1, "caption": form.format(name)})
        (root / f"{part}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root


def command(coco: Path, out: Path, *more: str, recipe: str = "smoke") -> list[str]:
    data = f"captions:images={coco / 'images'},train={coco / 'train.json'},val={coco / 'val.json'},name=walls"
    script = str(ROOT / "captioning" / "finetune.py")
    fixed = ["--recipe", recipe, "--data", data, "--out", str(out), "--device", "cpu"]
    return [sys.executable, script, *fixed, *("--set", "resize=32", "--set", "size=32"), *more]


def cell_files(out: Path) -> dict[str, bytes]:
    """What must be the same byte for byte however often a run was killed."""
    names = ("predictions.json", "vocabulary.json", "images.npz", "log.jsonl")
    found = {p.name: p.read_bytes() for p in out.rglob("*") if p.name in names}
    found["log.jsonl"] = b"".join(
        json.dumps({k: v for k, v in json.loads(line).items() if k != "seconds"}).encode()
        for line in found["log.jsonl"].splitlines()
    )
    cell = json.loads(next(out.rglob("cell.json")).read_text())
    return found | {"scores": json.dumps([cell["metrics"], cell["chance"], cell["keys"]]).encode()}


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("BACKBENCH_QUIET", "1")
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_JAVA", "none")


LEARN = ("--set", "iterations=60", "--set", "lr=0.03", "--set", "shortest=0", "--set", "threshold=1")


KILLED = """
import os, signal
from backbench.captioning.finetune import main
from backbench.common.engine import loop

save = loop._Training.save

def killed(self):
    save(self)
    if self.iteration == 7:
        os.kill(os.getpid(), signal.SIGKILL)

loop._Training.save = killed
main()
"""


def test_finetune_learns_colours_and_goes_on_after_a_kill(coco, tmp_path, quiet, capsys):
    from backbench.captioning.finetune import main

    backbone = ("--backbone", str(coco / "baseline.pt"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(coco, whole, *backbone, *LEARN)[2:]) == 0
    folder = next(whole.rglob("cell.json")).parent
    cell = json.loads((folder / "cell.json").read_text())
    assert cell["metrics"]["CIDEr"] > 2 * cell["chance"]["CIDEr"] > 0
    assert cell["metrics"]["METEOR"] is None
    assert any(note.startswith("METEOR n/a") for note in cell["notes"])
    predictions = json.loads((folder / "predictions.json").read_text())
    assert [p["image_id"] for p in predictions] == [7 * i + 1 for i in range(8)]
    assert len({p["caption"] for p in predictions}) >= 3
    report = (folder / "report.md").read_text()
    assert "| CIDEr |" in report and "The worst captions" in report
    shown = json.loads((folder / "report.json").read_text())["worst"]
    assert all((folder / entry["picture"]).is_file() and entry["picture"] in report for entry in shown)
    check_predict(coco, folder, predictions, tmp_path, capsys)

    slow = ("--set", "save_every=0")  # a checkpoint after every iteration
    arguments = command(coco, killed, *backbone, *LEARN, *slow)[2:]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(killed.rglob("resume.pt"))
    assert not list(killed.rglob("weights.pt"))
    assert main(command(coco, killed, *backbone, *LEARN)[2:]) == 0
    assert cell_files(killed) == cell_files(whole)
    weights = [torch.load(next(out.rglob("weights.pt")))["model"] for out in (whole, killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    capsys.readouterr()
    assert main(command(coco, whole, *backbone, *LEARN)[2:]) == 0
    assert "finished already" in capsys.readouterr().out


def check_predict(coco: Path, folder: Path, predictions: list, tmp_path: Path, capsys) -> None:
    """predict.py says of the test images what the run said of them, from the run folder alone."""
    from PIL import Image

    from backbench.captioning.predict import main

    pictures = sorted((coco / "images").glob("val*.png"))
    fixed = ["--run", str(folder), *map(str, pictures), "--device", "cpu"]
    capsys.readouterr()
    written = ["--pictures", str(tmp_path / "said"), "--json", str(tmp_path / "said.json")]
    assert main([*fixed, *written]) == 0
    rows = json.loads((tmp_path / "said.json").read_text())
    assert [row["caption"] for row in rows] == [entry["caption"] for entry in predictions]
    assert all(row["score"] < 0 for row in rows)
    printed = capsys.readouterr().out
    assert f"{pictures[0]}: {rows[0]['caption']} ({rows[0]['score']:.3f})" in printed
    with Image.open(tmp_path / "said" / "val3.jpg") as picture:
        assert picture.width == 320 and picture.height > 320 * 43 / 48  # the picture, and its caption below
    assert main([*fixed, "--set", "longest=2", "--json", str(tmp_path / "short.json")]) == 0
    short = json.loads((tmp_path / "short.json").read_text())
    assert max(len(row["caption"].split()) for row in short) <= 2
    for arguments, message in (
        ([*fixed, "--set", "hidden=3"], "only its search can be changed"),
        (["--run", str(tmp_path), str(pictures[0])], "has no model.json"),
        (["--run", str(folder), str(tmp_path / "no.jpg")], "no such file"),
        (["--run", str(folder), str(coco / "val.json")], "not a readable image"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)


@pytest.fixture
def run_here(coco, tmp_path, quiet, capsys):
    """Run finetune in this process → its cell."""
    from backbench.captioning.finetune import main

    def run(*more: str) -> dict:
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        assert main([*command(coco, out)[2:], *more]) == 0
        return json.loads(next(out.rglob("cell.json")).read_text())

    return run


def test_a_scratch_encoder_is_trained_and_the_cell_says_so(run_here):
    cell = run_here(
        "--backbone", "scratch:resnet18_half", "--set", "scratch_resize=36", "--set", "scratch_size=32"
    )
    assert any("scratch: the encoder is trained" in note for note in cell["notes"])


def test_a_second_phase_trains_the_encoder_too(run_here, coco, tmp_path):
    from backbench.common.backbones.load import load_backbone

    backbone = str(coco / "baseline.pt")
    cell = run_here("--backbone", backbone, "--set", "encoder_epochs=1", "--set", "lr=0.01")
    assert cell["cost"]["iterations"] == 6 + 2
    state = torch.load(next(tmp_path.rglob("second/weights.pt")))["model"]
    before = load_backbone(backbone).trunk.state_dict()
    assert not torch.equal(state["trunk.layer4.0.conv1.weight"], before["layer4.0.conv1.weight"])
    assert torch.equal(state["trunk.layer4.0.bn1.running_mean"], before["layer4.0.bn1.running_mean"])
    from backbench.captioning.captioner import load_captioner

    captioner = load_captioner(
        next(tmp_path.rglob("model.json")).parent
    )  # the trained encoder, not the backbone's
    after = captioner.model.trunk.state_dict()["layer4.0.conv1.weight"]
    assert torch.equal(after, state["trunk.layer4.0.conv1.weight"])


def test_captions_of_broken_weights_are_refused(run_here, coco, tmp_path):
    from backbench.captioning.captioner import decode, load_captioner

    run_here("--backbone", str(coco / "baseline.pt"))
    captioner = load_captioner(next(tmp_path.rglob("model.json")).parent)
    images = torch.zeros(2, captioner.crop[1], captioner.crop[1], 3, dtype=torch.uint8)
    said = decode(captioner.model, images, captioner.recipe, captioner.vocabulary)
    assert len(said[0]) == 2 and np.isfinite(said[1]).all()
    for parameter in captioner.model.lstm.parameters():
        parameter.data.mul_(float("inf"))
    with pytest.raises(UserError, match="scores are not finite"):
        decode(captioner.model, images, captioner.recipe, captioner.vocabulary)


def test_one_caption_an_item_as_the_paper(run_here, coco):
    cell = run_here("--backbone", str(coco / "baseline.pt"), "--set", "group=false", "--set", "end=legacy")
    assert cell["metrics"]["BLEU-1"] >= 0


def test_cached_features_equal_the_encoder_run_on_the_same_crops(coco, quiet):
    from backbench.captioning.data import BLOCK, pooled_features
    from backbench.captioning.recipes import RECIPES
    from backbench.common.backbones.load import load_backbone
    from backbench.common.backbones.resnet import normalise
    from backbench.common.base.recipe import override
    from backbench.common.data.decode import Fit, read_rgb

    recipe = override(RECIPES["smoke"], ["resize=40", "size=32", "precision=fp32"])
    backbone = load_backbone(str(coco / "baseline.pt"))
    paths = sorted((coco / "images").glob("val*.png"))
    features = pooled_features(backbone, paths, recipe, torch.device("cpu"), 4, "fp32")
    assert features.shape == (8, 4, 256) and len(paths) * 4 <= BLOCK
    image = Fit(40, 40)(read_rgb(paths[3]))
    crops = np.stack([image[4:36, 4:36], image[4:36, 4:36][:, ::-1]])
    backbone.trunk.eval()
    with torch.inference_mode():
        direct = backbone.trunk(normalise(torch.from_numpy(crops), backbone.mean, backbone.std)).mean((2, 3))
    np.testing.assert_allclose(features[3, :2], direct.numpy(), rtol=1e-4, atol=1e-5)
    assert len(np.unique(features[3], axis=0)) == 4  # four different crops
    backbone.trunk.forward = None  # the second time nothing is computed
    again = pooled_features(backbone, paths, recipe, torch.device("cpu"), 4, "fp32")
    np.testing.assert_array_equal(again, features)


def test_training_on_cached_features_equals_training_through_the_encoder_on_the_same_crops(
    coco, tmp_path, quiet
):
    from backbench.captioning.data import CaptionItems, _views, pooled_features
    from backbench.captioning.finetune import make_model, step
    from backbench.captioning.recipes import RECIPES
    from backbench.common.backbones.load import load_backbone
    from backbench.common.base.recipe import override
    from backbench.common.data import open_captions
    from backbench.common.data.decode import Fit, read_rgb
    from backbench.common.engine import train

    settings = ["resize=40", "size=32", "precision=fp32", "iterations=8", "dropout=0.2", "threshold=1"]
    recipe = override(RECIPES["smoke"], settings)
    spec = f"captions:images={coco / 'images'},train={coco / 'train.json'},val={coco / 'val.json'}"
    images, _ = open_captions(spec)
    backbone, cpu = load_backbone(str(coco / "baseline.pt")), torch.device("cpu")
    words = [[words_of(caption, False) for caption in captions] for captions in images.captions]
    vocabulary = build_vocabulary((w for image in words for w in image), 1, False)
    features = pooled_features(backbone, images.paths, recipe, cpu, 4, "fp32")

    class Crops(CaptionItems):
        """The views themselves, drawn as their features are."""

        def _input(self, image, rng):
            pixels = Fit(40, 40)(read_rgb(self.images.paths[image]))
            return _views(pixels, image, recipe, 4)[rng.integers(4)]

    losses = []
    for items, with_trunk in (
        (CaptionItems(images, words, vocabulary, recipe, features=features), False),
        (Crops(images, words, vocabulary, recipe, crop=(40, 32)), True),
    ):
        model = make_model(recipe, backbone, vocabulary, 0, with_trunk=with_trunk)
        if with_trunk:
            model.trunk.requires_grad_(False)
            model.trunk.freeze_bn()
        folder = tmp_path / str(with_trunk)
        folder.mkdir()
        recipe_ = override(recipe, ["log_every=1"])
        train(model, step, items, recipe_, folder=folder, key="same", seed=3, device=cpu)
        losses.append([json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()])
    assert len(losses[0]) == 8 and len(set(losses[0])) == 8
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_words_by_the_evaluation_s_tokenizer(monkeypatch):
    from backbench.captioning.vocabulary import words_of_all

    captions = [["A man's T-shirt, isn't it?", "two (2) dogs"], ["..."]]
    found = words_of_all(captions, "ptb", False)
    assert found == [
        [["a", "man", "'s", "t-shirt", "is", "n't", "it"], ["two", "-lrb-", "2", "-rrb-", "dogs"]],
        [[]],
    ]
    assert words_of_all(captions, "treebank", True)[1] == [["..."]]
    monkeypatch.setenv("BACKBENCH_JAVA", "none")
    with pytest.raises(UserError, match="words=ptb: no Java"):
        words_of_all([["never seen before"]], "ptb", False)


@pytest.mark.parametrize(
    "settings, message",
    [
        (["size=300"], "nothing could be cropped"),
        (["beam=0"], "beam=0, it must be at least 1"),
        (["penalty=max"], "choose one of none, average, wu"),
        (["dropout=1"], "a share"),
        (["alpha=-1"], "must not be negative"),
        (["batch=1"], "feature_bn"),
        (["words=ptb"], "words=ptb drops punctuation"),
        (["encoder_lr=0", "encoder_epochs=1"], "give its rate"),
    ],
)
def test_recipes_that_cannot_work_are_refused(settings, message):
    from backbench.captioning.recipes import RECIPES
    from backbench.common.base.recipe import override

    with pytest.raises(UserError, match=message):
        override(RECIPES["paper"], settings)
