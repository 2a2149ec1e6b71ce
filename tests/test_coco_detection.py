"""COCO: its average precision against pycocotools, and the reader of its instance format."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backbench.common.base.errors import UserError
from backbench.common.data import open_detection
from backbench.common.data.layout import Report, json_id
from backbench.common.data.objects import frames
from backbench.common.data.readers.coco import read_instances
from backbench.common.metrics import coco
from backbench.common.metrics.average_precision import Boxes


def oracle(found, truth, images, classes, repeats=None):
    """pycocotools' precision as AP (classes, thresholds) of sizes all, s, m, l; image i counts repeats[i] times."""
    repeats = np.ones(images, int) if repeats is None else repeats
    annotations, results, copies = [], [], []
    for i in range(images):
        for _ in range(repeats[i]):
            copies.append(len(copies) + 1)
            for k in np.flatnonzero(truth.image == i):
                x0, y0, x1, y1 = truth.box[k].tolist()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": copies[-1],
                        "category_id": 1 + int(truth.label[k]),
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": float(truth.area[k]),
                        "iscrowd": int(truth.difficult[k]),
                    }
                )
            for k in np.flatnonzero(found.image == i):
                x0, y0, x1, y1 = found.box[k].tolist()
                results.append(
                    {
                        "image_id": copies[-1],
                        "category_id": 1 + int(found.label[k]),
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "score": float(found.score[k]),
                    }
                )
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {
            "info": {},
            "images": [{"id": i} for i in copies],
            "annotations": annotations,
            "categories": [{"id": c + 1, "name": str(c)} for c in range(classes)],
        }
        gt.createIndex()
        judge = COCOeval(gt, gt.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"][..., -1]  # thresholds, recalls, classes, sizes
    ap = np.where(precision[:, 0] < 0, np.nan, precision.mean(1))
    return ap.transpose(2, 1, 0), judge.stats


def random_case(rng, images=4, classes=3, most=60):
    """Boxes on a coarse grid of 16 pixels: overlaps tie and are exactly a threshold, scores tie, sizes vary."""

    def boxes(k):
        corner = rng.integers(0, 5, (k, 2))
        return 16.0 * np.concatenate([corner, corner + rng.integers(1, 9, (k, 2))], 1)

    k, t = rng.integers(1, most), rng.integers(0, 25)
    box = boxes(t)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) * rng.choice([1.0, 0.5], t)
    truth = Boxes(
        *(rng.integers(0, images, t), rng.integers(0, classes, t), box),
        difficult=rng.random(t) < 0.25,
        area=area,
    )
    near = rng.random(k) < 0.5
    found_box = boxes(k)
    label, image = rng.integers(0, classes, k), rng.integers(0, images, k)
    if t:
        like = rng.integers(0, t, k)
        jitter = rng.integers(-1, 2, (k, 4)) * np.array([4, 4, 4, 4])
        found_box[near] = (box[like] + jitter)[near]
        label[near], image[near] = truth.label[like][near], truth.image[like][near]
    return Boxes(image, label, found_box, score=rng.integers(1, 12, k) / 12), truth


def test_equals_pycocotools():
    rng = np.random.default_rng(0)
    with_ignored = 0
    for _ in range(40):
        found, truth = random_case(rng)
        stats = coco.match(found, truth, 4, 3)
        expected, summary = oracle(found, truth, 4, 3)
        for k, name in enumerate(coco.SIZES):
            np.testing.assert_allclose(
                coco.class_ap(stats, size=k)[0], expected[k], rtol=0, atol=1e-12, err_msg=name
            )
        values = [*coco.rescore(stats).values(), *list(coco.strata(stats).values())[1:]]
        ours = np.nan_to_num([float(np.squeeze(v)) for v in values], nan=-1)
        np.testing.assert_allclose(ours, summary[:6], rtol=0, atol=1e-9)
        with_ignored += int((stats["coco_mark"] == -1).any())
    assert with_ignored > 25


def test_weights_are_repeated_images():
    rng = np.random.default_rng(1)
    for _ in range(12):
        found, truth = random_case(rng, most=40)
        found.score = (
            rng.permutation(len(found.image)) / 64
        )  # of equal scores the copies would not stand together
        weights = np.array([[1, 2, 0, 1], [0, 1, 3, 1]])
        stats = coco.match(found, truth, 4, 3)
        for row, repeats in enumerate(weights):
            expected, summary = oracle(found, truth, 4, 3, repeats)
            for k in range(4):
                ours = coco.class_ap(stats, weights, k)[row]
                np.testing.assert_allclose(ours, expected[k], rtol=0, atol=1e-12)
            means = [value[row] for value in coco.rescore(stats, weights).values()]
            np.testing.assert_allclose(np.nan_to_num(means, nan=-1), summary[:3], rtol=0, atol=1e-12)


def test_more_than_a_hundred_of_a_class_in_an_image():
    rng = np.random.default_rng(2)
    found, truth = random_case(rng, images=1, classes=1, most=2)
    k = 250
    found = Boxes(
        np.zeros(k, int), np.zeros(k, int), truth.box[rng.integers(0, len(truth.box), k)], score=rng.random(k)
    )
    found.box[::2] += 400
    expected, _ = oracle(found, truth, 1, 1)
    np.testing.assert_allclose(coco.class_ap(coco.match(found, truth, 1, 1))[0], expected[0], atol=1e-12)
    uncut = coco.class_ap(coco.match(found, truth, 1, 1, most=k))[0]
    assert (uncut != expected[0]).any()


def test_nothing_found_and_nothing_there():
    nothing = Boxes(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), score=np.zeros(0))
    none = Boxes(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), difficult=np.zeros(0, bool))
    _, truth = random_case(np.random.default_rng(3))
    assert coco.rescore(coco.match(nothing, truth, 4, 3))["AP"].tolist() == [0]
    assert np.isnan(coco.rescore(coco.match(nothing, none, 4, 3))["AP75"]).all()
    one = Boxes(np.zeros(1, int), np.zeros(1, int), np.array([[0, 0, 9, 9.0]]), score=np.ones(1))
    assert np.isnan(coco.rescore(coco.match(one, none, 4, 3))["AP50"]).all()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")


CATEGORIES = [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}, {"id": 7, "name": "bus"}]


def thing(image, category, box, **more):
    return {"image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, **more}


def instances(folder, part, annotations, sizes=((40, 30), (30, 40)), **more):
    """A COCO folder's part: two images with ids 5 and 6 of `sizes`, and these annotations; the file."""
    images = []
    for key, (width, height) in zip((5, 6), sizes):
        name = f"{part}{key}.jpg"
        (folder / f"{part}2017").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), (key, 80, 120)).save(folder / f"{part}2017" / name)
        images.append({"id": key, "file_name": name, "width": width, "height": height})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES, **more}
    numbered = [{"id": k, **a} if isinstance(a, dict) else a for k, a in enumerate(annotations)]
    (folder / "annotations").mkdir(exist_ok=True)
    file = folder / "annotations" / f"instances_{part}2017.json"
    file.write_text(json.dumps({**content, "annotations": numbered}))
    return file


@pytest.fixture
def world(tmp_path):
    root = tmp_path / "things"
    instances(root, "train", [thing(5, 90, [1.5, 2, 10, 20.25]), thing(6, 3, [0, 0, 30, 40])])
    instances(root, "val", [thing(6, 7, [3, 4, 5, 6]), thing(5, 3, [0, 0, 9, 9], iscrowd=1)])
    return root


def test_instances(world):
    train, test = open_detection(f"coco:{world},year=2017")
    assert train.categories == [3, 7, 90] == train.take([0]).categories and test.categories == [3, 7, 90]
    assert train.name == "things" and train.classes == test.classes == ["car", "bus", "brush"]
    assert train.ids == [5, 6] and [p.name for p in train.paths] == ["train5.jpg", "train6.jpg"]
    assert [b.tolist() for b in train.boxes] == [[[1.5, 2, 11.5, 22.25]], [[0, 0, 30, 40]]]
    assert [c.tolist() for c in train.labels] == [[2], [0]] and train.sizes.tolist() == [[40, 30], [30, 40]]
    assert [d.tolist() for d in test.difficult] == [[True], [False]] and train.report == []
    assert test.report == [
        "1 × crowd region: difficult, neither right nor wrong (first: instances_val2017.json annotations[1])"
    ]
    a, b = (world / "annotations" / f"instances_{part}2017.json" for part in ("train", "val"))
    apart = open_detection(
        f"coco:train_images={world}/train2017,val_images={world}/val2017,train={a},val={b},name=x"
    )
    assert apart[0].name == "x" and apart[0].fingerprint == train.fingerprint
    chosen, _ = open_detection(f"coco:{world},classes=brush+bus")
    assert chosen.classes == ["brush", "bus"] and chosen.categories == [90, 7]
    assert [c.tolist() for c in chosen.labels] == [[0], []]
    assert chosen.report == [
        "1 × object of a class that classes= leaves out: dropped (first: instances_train2017.json annotations[1])",
        "1 × image without objects: kept, all background (first: train6.jpg)",
    ]


def test_box_rules(world):
    instances(
        world,
        "train",
        [
            thing(5, 3, [35, 20, 10, 10]),
            thing(5, 3, [50, 5, 4, 4]),
            thing(5, 3, [9, 9, -3, 4]),
            thing(5, 3, [9, 9, 0, 4]),
            thing(5, 3, [9, 9, 4, 4], iscrowd=1, segmentation={"counts": [1, 2], "size": [30, 40]}),
            thing(77, 3, [9, 9, 4, 4]),
            thing(5, 90, [-1, 0, 4, 4]),
        ],
    )
    train, _ = open_detection(f"coco:{world}")
    assert [b.tolist() for b in train.boxes] == [[[35, 20, 40, 30], [0, 0, 3, 4]], []]
    file = "instances_train2017.json annotations"
    assert train.report == [
        f"1 × annotation whose image is not listed: dropped (first: {file}[5], image 77)",
        f"1 × crowd region: left out of training (first: {file}[4])",
        f"1 × box with negative width or height: dropped (first: {file}[2])",
        f"1 × box with no area (width or height 0): dropped (first: {file}[3])",
        f"1 × box wholly outside its image: dropped (first: {file}[1])",
        f"2 × box reaches outside its image: clipped (first: {file}[0])",
        "1 × image without objects: kept, all background (first: train6.jpg)",
    ]


def test_sizes_and_rotation(world):
    file = instances(world, "train", [thing(5, 3, [1, 1, 5, 5]), thing(6, 3, [1, 1, 5, 5])])
    content = json.loads(file.read_text())
    content["images"][0] |= {"width": 30, "height": 40}
    content["images"][1] |= {"width": 99}
    file.write_text(json.dumps(content))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(world / "train2017" / "train5.jpg", exif=exif)
    train, _ = open_detection(f"coco:{world}")
    assert train.sizes.tolist() == [[30, 40], [30, 40]]
    assert train.report == [
        "1 × boxes drawn on the EXIF-turned image: read turned (first: train5.jpg)",
        "1 × wrong size in the JSON: the image's own taken (first: train6.jpg, 99 × 40 for 30 × 40)",
    ]
    content["images"][0] |= {"width": 40, "height": 30}
    del content["images"][1]["width"]
    file.write_text(json.dumps(content))
    assert open_detection(f"coco:{world}")[0].report == [
        "1 × EXIF rotation not applied: the boxes are taken as drawn on the stored pixels (first: train5.jpg)",
        "1 × JSON without size: the image's own taken (first: train6.jpg)",
    ]


def test_boxes_for_another_size_of_the_image(world):
    """Refused, or scaled when asked, truth and areas too; a turned image is scaled in the frame of its boxes."""
    file = instances(world, "train", [thing(5, 3, [2, 4, 20, 10], area=50), thing(6, 3, [0, 0, 60, 80])])
    content = json.loads(file.read_text())
    for image in content["images"]:
        image |= {"width": 60, "height": 80}
    file.write_text(json.dumps(content))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(world / "train2017" / "train5.jpg", exif=exif)
    with pytest.raises(UserError, match=r"train5.jpg: is 30 × 40, and .* for 60 × 80; .*rescale=1.*2 of 2"):
        open_detection(f"coco:{world}")
    train, _ = open_detection(f"coco:{world},rescale=1")
    assert train.sizes.tolist() == [[30, 40]] * 2
    assert [b.tolist() for b in train.boxes] == [[[1, 2, 11, 7]], [[0, 0, 30, 40]]]
    assert train.truth[0].boxes.tolist() == [[1, 2, 11, 7]] and train.truth[0].areas.tolist() == [12.5]
    assert train.problems == []


def test_ids_of_any_size(world):
    """Ids that a float64 or an int64 cannot hold are ids like any other."""
    big = {90: 2**53 + 1, 3: 2**53, 7: 2**70 + 1, 5: 2**63 + 1, 6: -(2**64)}
    for part in ("train", "val"):
        file = world / "annotations" / f"instances_{part}2017.json"
        content = json.loads(file.read_text())
        for item in [*content["images"], *content["categories"]]:
            item["id"] = big[item["id"]]
        for item in content["annotations"]:
            item |= {"image_id": big[item["image_id"]], "category_id": big[item["category_id"]]}
        file.write_text(json.dumps(content))
    train, test = open_detection(f"coco:{world}")
    assert train.classes == ["car", "brush", "bus"] and train.categories == [2**53, 2**53 + 1, 2**70 + 1]
    assert train.ids == test.ids == [2**63 + 1, -(2**64)]
    assert {type(key) for key in [*train.ids, *train.categories]} == {int}
    assert [c.tolist() for c in train.labels] == [[1], [0]] and [c.tolist() for c in test.labels] == [
        [0],
        [2],
    ]
    assert train.report == [] and read_instances(file, Report()).label.tolist() == [2, 0]


@pytest.mark.parametrize("used", [True, False])
def test_a_root_category_of_the_same_name(world, used):
    """Some exporters add category 0, named as the set is, perhaps as a class is: no annotation has it."""
    root = [{"id": 0, "name": "bus", "supercategory": "none"}, *CATEGORIES]
    for part in ("train", "val"):
        instances(world, part, [thing(5, 7 if used else 3, [0, 0, 9, 9])], categories=root)
    train, test = open_detection(f"coco:{world}")
    assert train.categories == test.categories == [3, 7, 90] and train.classes == ["car", "bus", "brush"]
    assert train.labels[0].tolist() == [1 if used else 0]
    line = "1 × category 'bus' without annotations, beside one of that name: left out (first: id 0)"
    assert line in train.report and line in test.report
    instances(world, "val", [thing(5, 7, [0, 0, 9, 9]), thing(5, 0, [0, 0, 9, 9])], categories=root)
    with pytest.raises(UserError, match=r"categories 0 and 7 are both 'bus', and both have annotations"):
        open_detection(f"coco:{world}")


FINE = thing(5, 3, [1, 1, 5, 5])


@pytest.mark.parametrize(
    "annotations, more, message",
    [
        ([], {}, "the list 'annotations' is empty"),
        ([FINE], {"categories": None}, "no list 'categories'"),
        (
            [FINE, thing(5, 4, [1, 1, 5, 5])],
            {},
            r"annotations\[1\]: category 4 is not in 'categories' \(ids 3, 7",
        ),
        ([thing(5, 3, [1, 1, 5])], {}, r"annotations\[0\]: bbox is \[1, 1, 5\]; expected"),
        ([thing(5, 3, [1, 1, 5, float("nan")])], {}, "four finite numbers"),
        ([thing(5, 3, None)], {}, "bbox is None"),
        ([thing(5, 3, [1, 1, 5, float("inf")])], {}, "four finite numbers"),
        ([thing(5, 3, [1, 1, 5, 10**400])], {}, "four finite numbers"),
        ([thing(5, 3, [1, 1, True, 5])], {}, "four finite numbers"),
        ([thing(5, 3, [1, 1, "5", 5])], {}, "four finite numbers"),
        ([thing(5, 3, [1, 1, 5, 5], area=float("nan"))], {}, "area nan; expected 0 or 1, and a number"),
        ([thing(5, 3, [1, 1, 5, 5], area=10**400)], {}, "area 1000.*; expected 0 or 1, and a number"),
        ([thing(True, 3, [1, 1, 5, 5])], {}, "'image_id' is True; expected an integer"),
        ([thing(5, [3], [1, 1, 5, 5])], {}, r"'category_id' is \[3\]; expected an integer"),
        ([thing(5.5, 3, [1, 1, 5, 5])], {}, "'image_id' is 5.5; expected an integer"),
        ([thing(2.0**53, 3, [1, 1, 5, 5])], {}, "'image_id' is 9007199254740992.0; expected an integer"),
        (
            [FINE],
            {"images": [{"id": 5, "file_name": "a\ud83d.jpg"}]},
            r"'a.ud83d.jpg', with half a surrogate",
        ),
        ([FINE], {"categories": [{"id": 3, "name": "\udc00"}]}, r"'name' is '.udc00', with half a surrogate"),
        ([thing("5", 3, [1, 1, 5, 5])], {}, "'image_id' is '5'; expected an integer, without quotes"),
        ([["a"]], {}, r"annotations\[0\]: 'image_id' is missing, found list"),
        ([thing(5, 3, [1, 1, 5, 5], iscrowd=2)], {}, "iscrowd is 2"),
        ([thing(5, 3, [1, 1, 0, 5])], {}, "no usable object"),
        ([FINE], {"categories": [*CATEGORIES, {"id": 3, "name": "van"}]}, "doubled"),
        ([FINE], {"categories": [{"id": 3, "name": "van"}]}, "category 3 is 'car', in .* 'van'"),
        ([FINE], {"categories": [{"id": 3, "name": "car"}, {"id": 4, "name": "bus"}]}, "has another id"),
        ([FINE], {"images": [{"id": 5, "file_name": "a.jpg"}] * 2}, "image id 5 is doubled"),
        ([FINE], {"images": [{"id": 5, "file_name": "a.jpg"}]}, "1 of 1 images listed there are absent"),
    ],
)
def test_bad_instances(world, annotations, more, message):
    instances(world, "train", annotations, **more)
    with pytest.raises(UserError, match=message):
        open_detection(f"coco:{world}")


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000, '{"images": [', "\xff"])
def test_bad_json(world, text):
    (world / "annotations" / "instances_train2017.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"instances_train2017.json: not valid JSON"):
        open_detection(f"coco:{world}")


def test_bad_layouts(world, tmp_path):
    for spec, message in (
        (f"{world},year=2014", "no instances_train2014.json"),
        (f"{world},classes=cat", "no category 'cat'; there are: car, bus, brush"),
        (f"{world},classes=car+car", "doubled"),
        (f"train={world}/annotations/instances_train2017.json", "no val=FILE"),
        (f"{tmp_path}/none", "no such folder"),
        (f"{world},images=nowhere", "no such folder"),
        (f"{world},train=none.json", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            open_detection(f"coco:{spec}")


def test_instances_equal_pycocotools(world):
    file = world / "annotations" / "instances_train2017.json"
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(str(file))
    ours = read_instances(file, Report())
    assert list(ours.categories) == sorted(theirs.getCatIds()) and ours.ids == theirs.getImgIds()
    for i, key in enumerate(ours.ids):
        boxes = [a["bbox"] for a in theirs.loadAnns(theirs.getAnnIds(imgIds=key))]
        assert ours.box[ours.image == i].tolist() == boxes


def test_frames():
    """The frame of boxes for every EXIF orientation and every size that a file may state."""
    for orientation in range(1, 9):
        for said, frame in (
            ([40, 30], [40, 30]),
            ([30, 40], [30, 40] if orientation >= 5 else [40, 30]),
            ([60, 80], [30, 40] if orientation >= 5 else [40, 30]),
            ([80, 60], [40, 30]),
            ([41, 30], [40, 30]),
            (None, [40, 30]),
        ):
            report = Report()
            found = frames(np.array([[40, 30, orientation]]), [said], ["a.xml"], report, "XML")
            assert found.tolist() == [frame]
            lines = " ".join(report.lines())
            turned = frame == [30, 40]
            assert ("read turned" in lines) == turned
            assert ("EXIF rotation not applied" in lines) == (orientation > 1 and not turned)
            assert ("XML without <size>" in lines) == (said is None)
    report = Report()  # a square image shows no side: the stored pixels are taken, which is said
    assert frames(np.array([[30, 30, 6]]), [[30, 30]], ["a"], report, "JSON").tolist() == [[30, 30]]
    assert "EXIF rotation not applied" in report.lines()[0]
    assert frames(np.zeros((1, 3), int), [[4, 5]], ["a"], Report(), "XML").tolist() == [[0, 0]]


@pytest.mark.parametrize(
    "value, expected",
    [
        *((7, 7), (7.0, 7), (-3.0, -3), (2**53 + 1, 2**53 + 1), (2**70, 2**70), (2.0**53, None)),
        *((1.5, None), (float("nan"), None), (float("inf"), None), (True, None), (None, None), ("a", "a")),
    ],
)
def test_json_ids(value, expected):
    found = json_id(value)
    assert found == expected and type(found) is type(expected)


def test_whole_numbers_written_as_floats_are_ids(world):
    file = world / "annotations" / "instances_train2017.json"
    before = read_instances(file, Report())
    content = json.loads(file.read_text())
    content["images"] = [{**image, "id": float(image["id"])} for image in content["images"]]
    content["annotations"] = [{**a, "image_id": float(a["image_id"])} for a in content["annotations"]]
    file.write_text(json.dumps(content))
    after = read_instances(file, Report())
    assert after.ids == before.ids and {type(key) for key in after.ids} == {int}
    assert np.array_equal(after.image, before.image)
