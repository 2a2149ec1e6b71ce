"""Result files of detection, COCO's and VOC's, and detection/evaluate.py on a VOC-layout folder."""

import json
import shutil

import numpy as np
import pytest

from backbench.common.base.errors import UserError
from backbench.common.data import open_detection
from backbench.common.metrics.average_precision import Boxes
from backbench.detection import evaluate
from backbench.detection.results import image_index, read_results, read_voc_results, write_results

pytest_plugins = ["shapes"]  # its fixtures


class TestResults:
    def test_round_trip(self, tmp_path):
        rng = np.random.default_rng(0)
        low = rng.uniform(0, 50, (20, 2))
        found = Boxes(
            np.sort(rng.integers(0, 3, 20)),
            rng.integers(0, 4, 20),
            np.hstack([low, low + rng.uniform(1, 90, (20, 2))]),
            rng.random(20),
        )
        write_results(tmp_path / "r.json", found, ["a", "b/c", "d"])
        back = read_results(tmp_path / "r.json", ["a", "b/c", "d"], 4)
        assert np.array_equal(back.image, found.image) and np.array_equal(back.label, found.label)
        assert (
            np.abs(back.box - found.box).max() <= 0.0101 and np.abs(back.score - found.score).max() <= 5.1e-7
        )
        first = json.loads((tmp_path / "r.json").read_text())[0]
        assert set(first) == {"image_id", "category_id", "bbox", "score"}
        assert first["category_id"] == found.label[0] + 1

    def test_empty(self, tmp_path):
        nothing = Boxes(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))
        write_results(tmp_path / "r.json", nothing, ["a"])
        assert len(read_results(tmp_path / "r.json", ["a"], 1).image) == 0

    def test_image_numbers(self):
        assert image_index(["000012", "2008_000001"])[12] == 0
        assert image_index(["000012", "2008_000001"])[2008000001] == 1
        assert 1 not in image_index(["a1", "b1"])

    def test_ids_stay_integers(self, tmp_path):
        ids, categories = [2**53, 2**53 + 1, -5, 5, 2**70], [2**64, -1, 2**53 + 1]
        one = np.arange(5)
        found = Boxes(one, one % 3, np.tile([0, 0, 9, 9.0], (5, 1)), np.full(5, 0.5))
        write_results(tmp_path / "r.json", found, ids, categories)
        entries = json.loads((tmp_path / "r.json").read_text())
        assert [e["image_id"] for e in entries] == ids
        assert [e["category_id"] for e in entries] == [*categories, *categories[:2]]
        back = read_results(tmp_path / "r.json", ids, 3, categories)
        assert back.image.tolist() == found.image.tolist() and back.label.tolist() == found.label.tolist()

    def test_ids_as_others_write_them(self, tmp_path):
        """1.0 is 1; true is no number, a float that may be rounded no id."""
        entry = {"category_id": 2.0, "bbox": [0, 0, 1, 1], "score": 1}

        def read(image, ids, **more):
            (tmp_path / "r.json").write_text(json.dumps([{"image_id": image, **entry, **more}]))
            back = read_results(tmp_path / "r.json", ids, 2)
            return back.image[0], back.label[0]

        assert read(7.0, [6, 7]) == read("7", [6, 7]) == read(7, ["img6", "img7"]) == (1, 1)
        for image, ids in (
            (True, [1]),
            (float(2**53), [2**53]),
            (7.5, [7]),
            (5, [-5]),
            (None, [1]),
            (1, ["m²1", "²"]),
        ):
            with pytest.raises(UserError, match="image_id is none of this set's"):
                read(image, ids)
        with pytest.raises(UserError, match="category_id is none of"):
            read(1, [1], category_id=True)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            (
                {"image_id": "x", "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1},
                "detection 1: .*image_id is none of this set's \\(as 'a' is one",
            ),
            (
                {"image_id": "a", "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1},
                "none of the classes' \\(1, 2\\)",
            ),
            ({"image_id": "a", "category_id": 1, "bbox": [0, 0, -1, 1], "score": 1}, "not negative"),
            ({"image_id": "a", "category_id": 1, "bbox": [0, 0, 1], "score": 1}, "detection 1"),
            ({"image_id": "a", "category_id": 1, "bbox": [0, 0, 1, 1]}, "detection 1: .*each is {"),
            ({"image_id": "a", "category_id": 1, "bbox": 5, "score": 1}, "detection 1: .*each is {"),
            ({"image_id": "a", "category_id": 1, "bbox": [5], "score": 1}, "detection 1: .*each is {"),
            ({"image_id": "a", "category_id": 1, "bbox": [10**400, 0, 1, 1], "score": 1}, "each is {"),
            (
                {"image_id": "a", "category_id": [1], "bbox": [0, 0, 1, 1], "score": 1},
                "none of the classes' ",
            ),
            (
                {"image_id": "a", "category_id": "1", "bbox": [0, 0, 1, 1], "score": 1},
                "none of the classes' \\(1, 2\\)",
            ),
            (
                {"image_id": "a", "category_id": 1, "bbox": [0, 0, 1, 1], "score": float("nan")},
                "finite numbers",
            ),
            ({"image_id": "a", "category_id": 1, "bbox": [0, 0, 1, 1], "score": None}, "finite numbers"),
            (["a"], "detection 1"),
        ],
    )
    def test_bad_entries(self, tmp_path, entry, message):
        (tmp_path / "r.json").write_text(json.dumps([entry]))
        with pytest.raises(UserError, match=message):
            read_results(tmp_path / "r.json", ["a"], 2)


class TestEvaluate:
    def perfect(self, devkit):
        """Truth as COCO results of every test image, difficult objects included."""
        images = open_detection(f"voc:{devkit}")[1]
        return images, [
            {
                "image_id": name,
                "category_id": int(c) + 1,
                "bbox": [*b[:2].tolist(), *(b[2:] - b[:2]).tolist()],
                "score": 0.9,
            }
            for name, boxes, labels in zip(images.ids, images.boxes, images.labels)
            for b, c in zip(boxes, labels)
        ]

    def test_json_and_text_files(self, devkit, backbone, tmp_path, capsys):
        images, entries = self.perfect(devkit)
        entries[0]["bbox"] = [0, 0, 5, 5]  # a miss
        (tmp_path / "found.json").write_text(json.dumps(entries))
        folder = tmp_path / "comp"
        folder.mkdir()
        for c, name in enumerate(images.classes):
            lines = []
            for e in entries:
                x, y, w, h = e["bbox"]
                if e["category_id"] == c + 1:
                    lines.append(f"{e['image_id']} {e['score']} {x + 1} {y + 1} {x + w} {y + h}")
            (folder / f"comp3_det_test_{name}.txt").write_text("\n".join(lines))
        scores = []
        for source in (tmp_path / "found.json", folder):
            arguments = [
                "--devkit",
                str(devkit),
                "--detections",
                str(source),
                "--json",
                str(tmp_path / "s.json"),
            ]
            assert evaluate.main(arguments) == 0
            scores.append(json.loads((tmp_path / "s.json").read_text()))
        assert scores[0] == scores[1]
        assert images.classes == ["ball", "cube"]
        assert scores[0]["AP_11point"]["cube"] == pytest.approx(1)
        assert scores[0]["classes"]["cube"]["objects"] == 1  # one of the two is difficult
        # of four balls three are found, one of the four claims is wrong and all tie: order of the images
        assert scores[0]["AP_area"]["ball"] == pytest.approx(3 / 4 * 3 / 4)
        assert scores[0]["mAP_area"] == pytest.approx((1 + 9 / 16) / 2)
        assert "| ball | " in capsys.readouterr().out

    def test_text_files_name_images_with_spaces(self, tmp_path):
        (tmp_path / "comp3_det_test_cat.txt").write_text("my cat 1 0.5 1 1 3 3\nmy cat 0.25 2 2 3 3\n")
        found = read_voc_results(tmp_path, "test", ["my cat", "my cat 1"], ["cat"])
        assert found.image.tolist() == [1, 0] and found.score.tolist() == [0.5, 0.25]
        assert found.box.tolist() == [[0, 0, 3, 3], [1, 1, 3, 3]]

    def test_text_files_are_not_rounded_again(self, devkit, tmp_path):
        """Two scores that differ in their fifth decimal: py-faster-rcnn's evaluator ranks the surer first."""
        entry = next(e for e in self.perfect(devkit)[1] if e["category_id"] == 1)
        x, y, w, h = entry["bbox"]
        hit, miss = f"{x + 1} {y + 1} {x + w} {y + h}", "1 1 3 3"
        (tmp_path / "comp").mkdir()
        lines = [f"{entry['image_id']} 0.50001 {miss}", f"{entry['image_id']} 0.50002 {hit}"]
        (tmp_path / "comp" / "comp3_det_test_ball.txt").write_text("\n".join(lines))
        found = []
        for preset in ("voc-devkit", "py-faster-rcnn", "detectron2", "ssd.pytorch"):
            arguments = ["--devkit", str(devkit), "--detections", str(tmp_path / "comp"), "--preset", preset]
            assert evaluate.main([*arguments, "--json", str(tmp_path / "s.json")]) == 0
            found.append(json.loads((tmp_path / "s.json").read_text())["AP_area"]["ball"])
        assert found == [pytest.approx(1 / 4)] * 4  # one of four balls, found first

    def test_bad_input(self, devkit, backbone, tmp_path):
        base = ["--devkit", str(devkit), "--detections"]
        with pytest.raises(UserError, match="no such file"):
            evaluate.main([*base, str(tmp_path / "none.json")])
        with pytest.raises(UserError, match=r"no comp3_det_test_CLASS.txt of a class of ball, cube .found: "):
            evaluate.main([*base, str(tmp_path)])
        (tmp_path / "comp3_det_test_ball.txt").write_text("000006 0.5 1 2 3\n")
        with pytest.raises(UserError, match=r"line 1: .* is not"):
            evaluate.main([*base, str(tmp_path)])
        (tmp_path / "comp3_det_test_ball.txt").write_text("000001 0.5 1 2 3 4\n")
        with pytest.raises(UserError, match="'000001' is not in the split"):
            evaluate.main([*base, str(tmp_path)])
        for line, message in (
            ("000006,0.5,1,2,3,4", "is not"),
            ("000006 nan 1 2 3 4", "is not"),
            ("000006 0.5 5 2 3 4", "line 1: .*xmax or ymax lies before"),
        ):
            (tmp_path / "comp3_det_test_ball.txt").write_text(line)
            with pytest.raises(UserError, match=message):
                evaluate.main([*base, str(tmp_path)])
        (tmp_path / "comp4_det_test_ball.txt").touch()
        with pytest.raises(UserError, match="both of class ball"):
            evaluate.main([*base, str(tmp_path)])

    def test_scores_that_cannot_be_written(self, devkit, backbone, tmp_path):
        (tmp_path / "found.json").write_text("[]")
        base = ["--devkit", str(devkit), "--detections", str(tmp_path / "found.json"), "--json"]
        for target in (tmp_path, tmp_path / "none" / "s.json"):
            with pytest.raises(UserError, match=f"{target}: cannot be written"):
                evaluate.main([*base, str(target)])

    def test_text_files_of_odd_content(self, devkit, backbone, tmp_path, capsys):
        """Empty files, a class without one, boxes of no width, boxes that seem to count from 0."""
        base = [
            "--devkit",
            str(devkit),
            "--detections",
            str(tmp_path / "comp"),
            "--json",
            str(tmp_path / "s.json"),
        ]
        (tmp_path / "comp").mkdir()
        (tmp_path / "comp/comp4_det_test_cube.txt").write_text("\n")
        assert evaluate.main(base) == 0
        assert json.loads((tmp_path / "s.json").read_text())["mAP_11point"] == 0
        assert "no file, so no detections, of ball" in capsys.readouterr().err
        (tmp_path / "comp/comp4_det_test_ball.txt").write_text("000006 0.5 3 3 2 9\n")
        assert evaluate.main(base) == 0 and "from 0?" not in capsys.readouterr().err
        (tmp_path / "comp/comp4_det_test_ball.txt").write_text("000006 0.5 0 3 2 9\n")
        assert evaluate.main(base) == 0 and "1 × box begins before pixel 1" in capsys.readouterr().err

    def test_devkits(self, devkit, backbone, tmp_path, capsys):
        """One folder, the same named with its year, a VOCdevkit with years, and the folder above it."""
        kit = tmp_path / "up" / "VOCdevkit"
        for year in ("2007", "2012"):
            shutil.copytree(devkit, kit / f"VOC{year}")
        (kit / "VOC2012/ImageSets/Main/test.txt").unlink()
        (kit / "VOC2012/ImageSets/Main/trainval.txt").write_text("000000\n000001\n")

        def size(path, *more):
            (tmp_path / "found.json").write_text("[]")
            arguments = ["--devkit", str(path), "--detections", str(tmp_path / "found.json"), *more]
            evaluate.main([*arguments, "--json", str(tmp_path / "s.json")])
            return json.loads((tmp_path / "s.json").read_text())["images"]

        assert size(devkit) == size(kit / "VOC2007") == size(kit / "VOC2007", "--year", "2007") == 4
        assert (
            size(kit, "--year", "2007")
            == size(kit)
            == size(kit.parent)
            == size(kit, "--year", "2007+2012")
            == 4
        )
        # VOC2012's test has no published annotations, its other splits have
        assert size(kit, "--year", "2007+2012", "--split", "trainval") == 6 + 2
        assert size(kit, "--year", "2012", "--split", "trainval") == 2
        assert "in training" not in capsys.readouterr().err
        for path, more, message in (
            (kit, ("--year", "2012"), "no such split 'test'.*--split"),
            (kit / "VOC2007", ("--year", "2012"), "year= is for a VOCdevkit"),
            (kit, ("--year", "2010"), "has no VOC2010"),
        ):
            with pytest.raises(UserError, match=message):
                size(path, *more)
