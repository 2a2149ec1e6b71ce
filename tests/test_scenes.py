"""The embedded world: layouts, boxes held against the pixels, captions against the scene, the cache."""

import csv
import json
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbench.common.base.errors import UserError
from backbench.common.base.files import file_digest
from backbench.common.data.scenes import VERSION, World, ensure_world
from backbench.common.data.scenes.compose import BIG, SMALL
from backbench.common.data.scenes.draw import COLOURS, SETTINGS, Scene, Thing, paint, render
from backbench.common.data.scenes.grammar import PLACES
from backbench.common.data.scenes.shapes import CLASSES, KINDS, REACH
from backbench.common.data.scenes.write import SIZES, caption_scene, difficult, portrait_scene, voc_scene

ROOT = Path(__file__).resolve().parents[1]
SMOKE = SIZES["smoke"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return ensure_world(tmp_path_factory.mktemp("cache"), size="smoke", seed=3)


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): file_digest(path) for path in sorted(root.rglob("*")) if path.is_file()
    }


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def test_imagenet_layout(world):
    counts = SMOKE["imagenet"]
    for split in ("train", "val"):
        folders = sorted((world.imagenet / split).iterdir())
        assert [folder.name for folder in folders] == sorted(CLASSES)
        assert {len(list(folder.glob("*.jpg"))) for folder in folders} == {counts[split] // len(CLASSES)}
    with world.boxes.open() as file:
        rows = list(csv.DictReader(file))
    images = {str(path.relative_to(world.imagenet)) for path in world.imagenet.rglob("*.jpg")}
    assert {row["path"] for row in rows} == images and len(rows) == len(images)
    for row in rows:
        x0, y0, x1, y1 = (float(row[key]) for key in ("x0", "y0", "x1", "y1"))
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
    row = next(row for row in rows if row["path"] == "val/bell/bell_00001.jpg")
    _, picture, seen = portrait_scene(3, "imagenet_val", 1, counts["pixels"])
    assert np.allclose(
        [float(row[key]) * counts["pixels"] for key in ("x0", "y0", "x1", "y1")], seen.box, atol=1e-3
    )
    with Image.open(world.imagenet / row["path"]) as image:  # the JPEG is the drawing, colours in order
        assert np.abs(np.asarray(image.convert("RGB"), float) - picture).mean() < 12


def test_voc_layout(world):
    for year, splits in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        folder = world.vocdevkit / f"VOC{year}"
        names = {path.stem: path.read_text().split() for path in (folder / "ImageSets/Main").iterdir()}
        assert sorted(names["train"] + names["val"]) == names["trainval"]
        listed = [name for split in splits for name in names[split]]
        assert len(set(listed)) == sum(SMOKE["voc"][f"{year}_{split}"] for split in splits)
        for part in ("JPEGImages", "Annotations"):
            assert {path.stem for path in (folder / part).iterdir()} == set(listed)
        for split in splits:
            for index, name in enumerate(names[split]):
                scene, _, seen = voc_scene(3, f"voc_{year}_{split}", index, SMOKE["voc"]["pixels"])
                root = ElementTree.parse(folder / "Annotations" / f"{name}.xml").getroot()
                with Image.open(folder / "JPEGImages" / root.findtext("filename")) as image:
                    assert image.size == (scene.width, scene.height)
                assert [int(root.findtext(f"size/{key}")) for key in ("width", "height", "depth")] == [
                    *image.size,
                    3,
                ]
                objects = root.findall("object")
                assert [thing.kind for thing in scene.things] == [o.findtext("name") for o in objects] != []
                for one, o in zip(seen, objects, strict=True):
                    x0, y0, x1, y1 = (
                        int(o.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")
                    )
                    assert (x0 - 1, y0 - 1, x1, y1) == one.box and 1 <= x0 <= x1 <= scene.width
                    assert 1 <= y0 <= y1 <= scene.height
                    assert int(o.findtext("truncated")) == one.truncated
                    assert int(o.findtext("difficult")) == difficult(scene, one)


def test_caption_layout(world):
    seen_ids = set()
    for split in ("train", "val"):
        content = json.loads((world.coco / "annotations" / f"captions_{split}.json").read_text())
        assert content["info"] and len(content["images"]) == SMOKE["captions"][split]
        files = {path.name for path in (world.coco / f"{split}2014").iterdir()}
        assert {image["file_name"] for image in content["images"]} == files
        ids = [image["id"] for image in content["images"]]
        assert not seen_ids & set(ids) and len(set(ids)) == len(ids)
        seen_ids |= set(ids)
        assert len({a["id"] for a in content["annotations"]}) == 5 * len(ids)
        for index, number in enumerate(ids):
            five = [a["caption"] for a in content["annotations"] if a["image_id"] == number]
            assert five == caption_scene(3, f"captions_{split}", index, SMOKE["captions"]["pixels"])[3]


def test_cub_layout(world):
    names = ("images", "image_class_labels", "train_test_split", "bounding_boxes", "classes")
    table = {name: lines(world.cub / f"{name}.txt") for name in names}
    assert [name for _, name in table["classes"]] == [f"{k:03d}.{name}" for k, name in enumerate(CLASSES, 1)]
    count = SMOKE["cub"]["train"] + SMOKE["cub"]["test"]
    numbers = [str(n) for n in range(1, count + 1)]
    assert all([row[0] for row in table[name]] == numbers for name in names[:4])
    assert sum(row[1] == "1" for row in table["train_test_split"]) == SMOKE["cub"]["train"]
    classes = dict(table["classes"])
    for (_, path), (_, label), box in zip(
        table["images"], table["image_class_labels"], table["bounding_boxes"], strict=True
    ):
        assert path.startswith(classes[label] + "/")
        x, y, w, h = map(float, box[1:])
        with Image.open(world.cub / "images" / path) as image:
            assert 0 <= x < x + w <= image.width and 0 <= y < y + h <= image.height


def extents(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


@pytest.mark.parametrize("kind", CLASSES)
def test_box_is_the_extent_of_the_object_alone(kind):
    """Including turned and cut ones: the box is the clipped extent of the mask, and nothing is cut at REACH."""
    for k in range(12):
        x, y = (48, 40) if k % 2 else (14, 70)
        thing = Thing(kind, "red", x, y, 12.5 + 2 * k, 0.5 * k - 3, k % 3 == 0, k)
        _, cover, left, top = paint(thing)
        assert (
            max(x - left, left + cover.shape[1] - x, y - top, top + cover.shape[0] - y) < REACH * thing.radius
        )
        whole = np.zeros((400, 400), bool)
        whole[150 + top : 150 + top + cover.shape[0], 150 + left : 150 + left + cover.shape[1]] = cover >= 0.5
        _, (seen,) = render(Scene(96, 80, "sand", (thing,), seed=k))
        inside = whole[150 : 150 + 80, 150 : 150 + 96]
        assert seen.box == extents(inside)
        assert (seen.whole, seen.inside, seen.visible) == (whole.sum(), inside.sum(), inside.sum())
        assert seen.truncated == (inside.sum() < whole.sum())


def test_boxes_are_where_pixels_change():
    """An oracle that knows nothing of masks: draw the scene without the object and compare the pictures."""
    checked = hidden = 0
    for index in range(12):
        scene, picture, seen = voc_scene(5, "voc_2007_test", index, 200)
        for number, one in enumerate(seen):
            others = scene.things[:number] + scene.things[number + 1 :]
            without, _ = render(replace(scene, things=others))
            changed = np.abs(picture.astype(int) - without).max(2) > 0
            outer = np.array(extents(changed))
            assert np.abs(outer - one.box).max() <= 2  # pixels covered by less than half change too
            inner = extents(np.abs(picture.astype(int) - without).max(2) > 40)
            assert np.abs(np.array(inner) - one.box).max() <= 3
            assert abs(changed.sum() - one.visible) < 0.25 * one.visible + 20
            checked += 1
            hidden += one.visible < one.inside
    assert checked > 20 and hidden > 3


def test_flags_are_truthful():
    flags = []
    for index in range(60):
        scene, _, seen = voc_scene(1, "voc_2012_trainval", index, 120)
        for thing, one in zip(scene.things, seen, strict=True):
            x0, y0, x1, y1 = one.box
            if one.truncated:  # then it touches the border, if nothing hides it
                touches = x0 == 0 or y0 == 0 or x1 == scene.width or y1 == scene.height
                assert touches or one.visible < one.inside
            tiny = thing.radius < 0.07 * min(scene.width, scene.height)
            if tiny or one.visible / one.inside < 0.45:
                assert difficult(scene, one)
            elif one.visible > 0.75 * one.whole:
                assert not difficult(scene, one)
            flags.append((one.truncated, difficult(scene, one), len(seen)))
    truncated, hard, counts = np.array(flags).T
    assert 0.03 < truncated.mean() < 0.4 and 0.01 < hard.mean() < 0.2 and set(counts) == {1, 2, 3, 4}


def test_colour_tells_nothing_of_kind():
    pairs = [
        (thing.kind, thing.colour)
        for index in range(150)
        for thing in voc_scene(0, "voc_2012_trainval", index, 64)[0].things
    ]
    assert all(len({colour for kind, colour in pairs if kind == name}) > 5 for name in CLASSES)


def test_every_outline_and_texture_has_two_kinds():
    """An outline or a texture alone leaves a class open; together, like the small part, they tell it."""
    outlines, textures, _, parts, _ = zip(*KINDS.values(), strict=True)
    assert len(CLASSES) == len(set(parts)) == len(set(zip(outlines, textures, strict=True))) == 10
    assert all(column.count(one) == 2 for column in (outlines, textures) for one in column)


NUMBER = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
GROUP = re.compile(
    rf"(a|an|one|two|three|four) (?:(small|little|big|large) )?(?:({'|'.join(COLOURS)}) )?"
    rf"({'|'.join(CLASSES)}|thing)(?:e?s)?\b"
)


def holds(sentence: str, scene: Scene) -> bool:
    """Whether each claim of a caption is true of the scene, from the words and the geometry alone."""
    side = min(scene.width, scene.height)
    things = scene.things

    def fitting(size: str | None, colour: str | None, kind: str) -> list[Thing]:
        return [
            t
            for t in things
            if kind in (t.kind, "thing")
            and colour in (t.colour, None)
            and (
                size is None
                or (t.radius < SMALL * side if size in ("small", "little") else t.radius > BIG * side)
            )
        ]

    def number(word: str) -> int:
        return NUMBER[word]

    for place, phrase in PLACES.items():
        if sentence.endswith(phrase):
            if place != scene.setting:
                return False
            sentence = sentence.removesuffix(phrase).strip()
    if relation := re.fullmatch(
        r"(.+) is (to the left of|to the right of|above|below|behind|in front of) (.+)", sentence
    ):
        one, word, other = relation.groups()
        pairs = [
            (a, b)
            for a, b in permutations(range(len(things)), 2)
            if things[a] in fitting(*GROUP.fullmatch(one).groups()[1:])
            and things[b] in fitting(*GROUP.fullmatch(other).groups()[1:])
        ]
        return any(related(scene, a, word, b) for a, b in pairs)
    if same := re.fullmatch(r"all (\w+) things are (\w+)", sentence):
        return number(same[1]) == len(things) and all(t.colour == same[2] for t in things)
    if some := re.fullmatch(r"(\w+) things and (\w+) of them are (\w+)", sentence):
        return number(some[1]) == len(things) and number(some[2]) == sum(t.colour == some[3] for t in things)
    if what := re.fullmatch(r"the (\w+) is (?:(small|big) and )?(\w+)", sentence):
        return things == tuple(fitting(what[2], what[3], what[1]))
    if what := re.fullmatch(r"only one thing can be seen and it is an? (\w+)", sentence):
        return [t.kind for t in things] == [what[1]]
    sentence = sentence.removeprefix("a picture of ").removesuffix(" and nothing else")
    sentence = re.sub(r"^there (is|are) ", "", sentence)
    phrases = re.split(r", | and | with ", sentence)
    groups = [GROUP.fullmatch(phrase) for phrase in phrases]
    assert all(groups), f"not understood: {sentence}"
    # groups are exhaustive: together they name each thing once
    left = list(things)
    for match in sorted(groups, key=lambda match: [match[2] is None, match[3] is None]):
        count, *what = match.groups()
        found = [t for t in fitting(*what) if t in left][: number(count)]
        if len(found) < number(count):
            return False
        for t in found:
            left.remove(t)
    return not left


def related(scene: Scene, a: int, word: str, b: int) -> bool:
    one, other = scene.things[a], scene.things[b]
    dx, dy = other.x - one.x, other.y - one.y
    if word in ("behind", "in front of"):
        back, front = (a, b) if word == "behind" else (b, a)
        if back > front:
            return False
        alone = replace(scene, blades=0, things=(scene.things[back],))
        pair = replace(alone, things=(scene.things[back], scene.things[front]))
        return render(pair)[1][0].visible < 0.97 * render(alone)[1][0].visible
    return {
        "to the left of": dx > 24 and dx > abs(dy),
        "to the right of": -dx > 24 and -dx > abs(dy),
        "above": dy > 24 and dy > abs(dx),
        "below": -dy > 24 and -dy > abs(dx),
    }[word]


def test_captions_are_true_and_different():
    used = set()
    for index in range(150):
        scene, _, seen, sentences = caption_scene(7, "captions_train", index, 96)
        assert len(sentences) == len(set(sentences)) == 5
        for sentence in sentences:
            assert holds(sentence, scene), (sentence, scene)
            used |= set(sentence.replace(",", "").split())
        assert all(one.visible >= 0.6 * one.whole for one in seen) or len(seen) == 1
    assert 60 <= len(used) <= 100
    assert {"behind", "front", "left", "right", "above", "below", "four", "small", "large", *COLOURS} <= used


def test_the_caption_check_can_fail():
    things = (Thing("fish", "red", 20, 50, 20), Thing("bell", "blue", 75, 50, 27))
    scene = Scene(96, 96, "snow", things)
    for true in ("a red fish and a blue bell in the snow", "a red fish is to the left of a big blue bell"):
        assert holds(true, scene)
    for false in (
        "a red fish and a blue bell on the sand",
        "a red fish and a green bell",
        "two fish and a bell",
        "a red fish",
        "a small red fish and a bell",
        "there are three things in the snow",
        "a red fish is to the right of a big blue bell",
        "a red fish is behind a blue bell",
        "all two things are red",
        "the fish is red",
    ):
        assert not holds(false, scene), false


def test_same_seed_same_bytes(world, tmp_path):
    want = digests(world.root)
    assert digests(ensure_world(tmp_path, size="smoke", seed=3).root) == want
    other = digests(ensure_world(tmp_path, size="smoke", seed=4).root)
    assert set(other) == set(want)
    assert not any(other[name] == want[name] for name in want if name.endswith(".jpg"))


def test_images_do_not_depend_on_order():
    late = portrait_scene(0, "cub_test", 17, 64)[1]
    for index in range(3):
        portrait_scene(0, "cub_test", index, 64)
    assert np.array_equal(late, portrait_scene(0, "cub_test", 17, 64)[1])
    assert not np.array_equal(late, portrait_scene(0, "cub_train", 17, 64)[1])


def test_second_call_touches_nothing(world, monkeypatch):
    def state():
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in [*world.root.parent.rglob("*")]
        }

    def write(*args):
        raise AssertionError("it draws again")

    monkeypatch.setattr("backbench.common.data.scenes.write.write_world", write)
    before = state()
    assert ensure_world(world.root.parent, size="smoke", seed=3) == world
    assert state() == before


def test_unknown_manifest_is_drawn_again(tmp_path, monkeypatch):
    drawn = []

    def write(root, size, seed, bar):
        drawn.append(root)
        (root / "one.jpg").write_bytes(b"fresh")

    monkeypatch.setattr("backbench.common.data.scenes.write.write_world", write)
    root = ensure_world(tmp_path, size="smoke").root
    for number, spoil in enumerate(
        (
            lambda path: path.write_text(
                json.dumps({**json.loads(path.read_text()), "version": VERSION + 1})
            ),
            lambda path: path.write_text("{"),
            lambda path: path.write_text("[]"),
            lambda path: path.unlink(),
        ),
        2,
    ):
        spoil(root / "manifest.json")
        (root / "one.jpg").write_bytes(b"old")
        (root / "stray.jpg").write_bytes(b"old")
        for _ in range(2):
            assert ensure_world(tmp_path, size="smoke").root == root
        assert len(drawn) == number
        assert (root / "one.jpg").read_bytes() == b"fresh" and not (root / "stray.jpg").exists()


COMMAND = "import sys; from backbench.common.data.scenes import ensure_world; ensure_world(sys.argv[1], size='smoke')"


def start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", COMMAND, str(folder)], cwd=ROOT, stderr=subprocess.DEVNULL)


KILLED = f"""
import os, signal
from pathlib import Path

write_bytes = Path.write_bytes

def killed(path, data):
    write_bytes(path, data)
    if path.suffix == ".jpg":
        os.kill(os.getpid(), signal.SIGKILL)

Path.write_bytes = killed
{COMMAND}
"""


def test_killed_while_drawing(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    target = tmp_path / f"scenes-smoke-0-v{VERSION}"
    assert list(tmp_path.rglob("*.jpg")) and not target.exists()
    ensure_world(tmp_path, size="smoke")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [target.name]
    assert len(list(target.rglob("*.jpg"))) == json.loads((target / "manifest.json").read_text())["images"]


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("backbench.common.data.scenes.write._write_cub", full)
        ensure_world(tmp_path, size="smoke")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_two_processes_at_once(tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert (
        len(list(folders[0].rglob("*.jpg")))
        == json.loads((folders[0] / "manifest.json").read_text())["images"]
    )


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="'huge' is unknown; one of smoke, tiny"):
        ensure_world(tmp_path, size="huge")
    with pytest.raises(UserError, match="seed -1"):
        ensure_world(tmp_path, size="smoke", seed=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write there .*; set BACKBENCH_CACHE"):
        ensure_world(tmp_path / "file" / "cache", size="smoke")


def test_settings_have_their_phrases():
    assert set(PLACES) == set(SETTINGS)
