"""The order of a foreign classifier's classes: by name, as asked for, or assumed and refused where another fits."""

import argparse
import gc
import json

import numpy as np
import pytest
import torch
from conftest import fails, write_class_folders
from PIL import Image
from torchvision.models import resnet18
from torchvision.transforms import v2

from backbench.common.backbones.load import IMAGENET_MEAN, IMAGENET_STD
from backbench.common.base.files import read_json
from backbench.pretrain import class_order, evaluate, robustness
from backbench.pretrain.class_order import ClassOrder, better_order, match_classes, read_class_names

NUMBERS = tuple(map(str, range(12)))
SMALL = ["--set", "size=32", "--set", "resize=32"]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Folders 0 … 11 of 4 images each, and the state dict of a classifier in numeric order that is always right."""
    root = write_class_folders(
        tmp_path_factory.mktemp("numbered") / "data", per_class=4, classes=NUMBERS, side=32
    )
    paths = [path for name in NUMBERS for path in sorted((root / "val" / name).iterdir())]
    transform = v2.Compose(
        [v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    )
    images = torch.stack([v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)(transform(Image.open(p))) for p in paths])
    torch.manual_seed(0)
    model = resnet18(num_classes=12)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    head, model.fc = model.fc, torch.nn.Identity()
    with torch.no_grad():
        features = model.eval()(images).double()
    features -= (centre := features.mean(0))
    targets = torch.eye(12, dtype=torch.float64).repeat_interleave(4, 0)
    weight = torch.linalg.lstsq(features, targets, driver="gelsd").solution.T
    head.weight.data, head.bias.data = weight.float(), -(weight @ centre).float()
    model.fc = head
    return root, model.state_dict()


def command(root, file, out, *more):
    return ["--backbone", str(file), "--data", f"folder:{root}", "--out", str(out), *SMALL, *more]


def refused(main, given, *parts):
    """As `fails`; the run that the error's traceback holds is let go of, as when a process ends."""
    message = fails(lambda: main(given), *parts)
    gc.collect()
    return message


def cell_of(out):
    return read_json(next(out.rglob("cell.json")))


def test_a_classifier_in_numeric_order_is_refused_and_right_when_asked_for(numbered, tmp_path, capsys):
    root, state = numbered
    file = tmp_path / "theirs.pth"
    torch.save(state, file)
    given = command(root, file, tmp_path)
    refused(evaluate.main, given, str(file), "16.7 % of 48", "--class-order numeric gives 100.0 %", "data")
    assert not list(tmp_path.rglob("cell.json"))
    predictions = next(tmp_path.rglob("predictions.npz"))
    written = predictions.stat().st_mtime_ns
    evaluate.main([*given, "--class-order", "numeric"])
    cell = cell_of(tmp_path)
    assert cell["metrics"]["top-1"] == 1 and "class order: numeric, as asked for" in cell["notes"]
    assert cell["inputs"]["score"]["class_order"] and predictions.stat().st_mtime_ns == written
    evaluate.main([*given, "--class-order", "data"])
    cell = cell_of(tmp_path)
    assert cell["metrics"]["top-1"] == 2 / 12 and "class_order" not in cell["inputs"]["score"]
    assert "are the classes numbered so? --class-order numeric gives 100.0 %" in " ".join(cell["notes"])
    assert "are the classes numbered so?" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names",
    [
        {"class_to_idx": {name: i for i, name in enumerate(NUMBERS)}},
        {"classes": list(NUMBERS)},
        {"meta": {"CLASSES": NUMBERS}, "classes": 12},
        {"args": argparse.Namespace(class_names=list(NUMBERS), lr=0.1)},
        {"config": {"id2label": dict(enumerate(NUMBERS))}},
    ],
)
def test_the_names_in_a_foreign_file_say_which_output_is_which_class(numbered, tmp_path, names):
    root, state = numbered
    torch.save({"state_dict": state, **names}, tmp_path / "theirs.pth")
    evaluate.main(command(root, tmp_path / "theirs.pth", tmp_path))
    cell = cell_of(tmp_path)
    assert cell["metrics"]["top-1"] == 1 and "checkpoint's own names" in " ".join(cell["notes"])
    assert "class_order" in cell["inputs"]["score"]


def test_names_of_other_classes_or_two_lists_of_names_are_refused(numbered, tmp_path):
    root, state = numbered
    letters = list("abcdefghijkl")
    torch.save({"state_dict": state, "classes": letters}, tmp_path / "other.pth")
    given = command(root, tmp_path / "other.pth", tmp_path)
    fails(
        lambda: evaluate.main(given), "does not know class '0' (12 of the data's 12)", "it knows a, b, c, d"
    )
    evaluate.main([*given, "--class-order", "numeric"])
    assert "its own names are not the data's" in " ".join(cell_of(tmp_path)["notes"])
    torch.save({"state_dict": state, "classes": letters, "class_names": list(NUMBERS)}, tmp_path / "two.pth")
    fails(
        lambda: evaluate.main(command(root, tmp_path / "two.pth", tmp_path)),
        "names its classes differently under classes and class_names",
    )


def test_every_labelled_test_of_robustness_follows_the_order(numbered, tmp_path):
    root, state = numbered
    torch.save(state, tmp_path / "theirs.pth")
    small = ["--set", "holes=2", "--set", "lambdas=2", "--set", "pairs=8"]
    given = [*command(root, tmp_path / "theirs.pth", tmp_path), *small, "--tests"]
    for test in ("fgsm", "occlusion", "between"):
        refused(robustness.main, [*given, test], "--class-order numeric gives 100.0 %")
    assert not list(tmp_path.rglob("cell.json"))
    robustness.main([*given, "all", "--class-order", "numeric"])
    cells = {cell["identity"]["model"]: cell for cell in map(read_json, tmp_path.rglob("cell.json"))}
    assert cells["fgsm"]["metrics"]["top-1 clean"] == 1
    keyed = {
        test: [s for s in cell["inputs"] if "class_order" in cell["inputs"][s]]
        for test, cell in cells.items()
    }
    assert keyed == {"fgsm": ["predict"], "occlusion": ["score"], "between": ["score"], "ood": []}
    assert all(
        "class order: numeric, as asked for" in cells[test]["notes"] for test in keyed if test != "ood"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "\ufeffdog\ncat\r\n\nfox\n"),
        ("list.json", '["dog", "cat", "fox"]'),
        ("to.json", '{"cat": 1, "dog": 0, "fox": 2}'),
        ("of.json", '{"2": "fox", "0": "dog", "1": "cat"}'),
        ("imagenet.json", '{"0": ["n1", "dog"], "1": ["n2", "cat"], "2": ["n3", "fox"]}'),
        ("config.json", '{"arch": "resnet18", "id2label": {"0": "dog", "1": "cat", "2": "fox"}}'),
    ],
)
def test_a_file_of_names_in_every_usual_form(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    classes = ["cat", "dog", "fox"]
    assert read_class_names(tmp_path / name, classes) == ["dog", "cat", "fox"]
    order = match_classes({"num_classes": 3}, classes, "any", str(tmp_path / name))
    assert order.index.tolist() == [1, 0, 2] and order.notes == (f"class order: {name}, as asked for",)
    order = match_classes({"num_classes": 3}, ["fox", "dog"], "any", str(tmp_path / name))
    assert order.index.tolist() == [2, 0]  # part of its classes


def test_a_bad_order_is_refused(tmp_path):
    classes, three = ["cat", "dog", "fox"], {"num_classes": 3}
    for text, parts in {
        "cat\ndog\ncat": ("class 'cat' is there twice",),
        "cat\ndog": ("names 2 classes and classifies 3",),
        "cat\ndog\nwolf": ("does not know class 'fox'",),
        "": ("no class in it",),
    }.items():
        (tmp_path / "names.txt").write_text(text)
        fails(lambda: match_classes(three, classes, "any", str(tmp_path / "names.txt")), "names.txt", *parts)
    (tmp_path / "x.json").write_text('{"lr": 0.1}')
    fails(lambda: match_classes(three, classes, "any", str(tmp_path / "x.json")), "no class names")
    fails(lambda: match_classes(three, classes, "any", "alphabetic"), "no such file, and none of data")
    fails(lambda: match_classes(three, classes, "any", "numeric"), "no class has a number")
    fails(
        lambda: match_classes({"num_classes": 5}, classes, "any", "lexicographic"),
        "has 5 classes, the data 3",
    )


def test_an_order_is_in_the_key_only_where_it_is_another_than_the_files():
    classes = ["1", "10", "2"]
    assumed = match_classes({"num_classes": 3}, classes, "any")
    assert not assumed.stated and not assumed.key and "does not name its classes" in assumed.notes[0]
    for asked, keyed in (("data", False), ("lexicographic", False), ("numeric", True)):
        assert bool(match_classes({"num_classes": 3}, classes, "any", asked).key) == keyed
    own = {"num_classes": 3, "classes": ["2", "1", "10"]}
    order = match_classes(own, classes, "any")
    assert order.index.tolist() == [1, 2, 0] and order.stated and not order.key and not order.notes
    against = match_classes(own, classes, "any", "data")
    assert against.key and "its own names give another order" in against.notes[0]


def test_an_order_that_is_only_noise_or_a_weak_classifiers_is_not_suspected():
    rng = np.random.default_rng(0)
    for classes, images, right in (
        (2, 200, 0.5),
        (10, 100, 0.1),
        (10, 1000, 0.3),
        (100, 300, 0.02),
        (3, 9, 0.4),
    ):
        labels = np.sort(rng.integers(0, classes, images))
        order = ClassOrder(np.arange(classes), [str(i) for i in range(classes)], classes, False)
        for _ in range(20):
            guessed = rng.integers(0, classes, images)
            predicted = np.where(rng.random(images) < right, labels, guessed)
            assert better_order(order, predicted, labels) is None
        assert better_order(order, np.zeros(images, int), labels) is None  # always the same answer
    pair = np.arange(20)
    pair[:2] = 1, 0  # two of twenty classes exchanged are 10 %
    labels = np.repeat(np.arange(20), 10)
    order = ClassOrder(np.arange(20), [str(i) for i in range(20)], 20, False)
    assert better_order(order, pair[labels], labels).tolist() == pair.tolist()


def test_an_order_without_a_name_is_described(numbered, tmp_path):
    root, state = numbered
    turn = np.roll(np.arange(12), 5)
    turned = {k: v[turn] if k.startswith("fc.") else v for k, v in state.items()}
    torch.save(turned, tmp_path / "theirs.pth")
    given = command(root, tmp_path / "theirs.pth", tmp_path)
    message = refused(evaluate.main, given, "100.0 %", "no named order does", "--class-order FILE")
    assert '0 "7", 1 "8", 2 "9"' in message
    (tmp_path / "names.json").write_text(json.dumps([NUMBERS[i] for i in turn]))
    evaluate.main([*given, "--class-order", str(tmp_path / "names.json")])
    assert cell_of(tmp_path)["metrics"]["top-1"] == 1
    assert class_order.NAMED == ("data", "lexicographic", "numeric")
