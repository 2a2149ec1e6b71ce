"""WSOL: maps proved against logits, boxes against plain loops."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.errors import UserError
from common.trunk import Classifier, Trunk
from wsol import boxes, cam


@pytest.mark.parametrize("arch", ["resnet18_half", "resnet50"])
def test_mean_of_the_map_plus_bias_is_the_logit(arch):
    torch.manual_seed(0)
    model = Classifier(Trunk(arch), 7).double().eval()
    model.trunk.unstride("layer4")
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    labels = torch.tensor([4, 0, 6])
    with torch.no_grad():
        features = model.trunk(images)
        assert features.shape[2:] == (4, 6)  # stride 16
        logits, classes, maps = cam.predict(model, features, labels, top=5)
        torch.testing.assert_close(logits, model(images), rtol=1e-12, atol=1e-12)
    assert classes[:, 0].tolist() == labels.tolist()
    assert torch.equal(classes[:, 1:], logits.topk(5).indices)
    expected = maps.mean((2, 3)) + model.fc.bias[classes]
    torch.testing.assert_close(expected, logits.gather(1, classes), rtol=1e-12, atol=1e-12)


def test_maps_equal_a_plain_loop():
    torch.manual_seed(0)
    features, weight = torch.rand(2, 3, 4, 5), torch.randn(6, 3)
    classes = torch.tensor([[5, 1], [0, 0]])
    maps = cam.class_maps(features, weight, classes)
    for n in range(2):
        for k in range(2):
            for y in range(4):
                for x in range(5):
                    value = sum(weight[classes[n, k], c] * features[n, c, y, x] for c in range(3))
                    assert maps[n, k, y, x] == pytest.approx(float(value), abs=1e-6)


def test_layer4_unstrided_gives_14_by_14_with_the_same_weights():
    plain, model = Trunk("resnet50"), Trunk("resnet50")
    model.unstride("layer4")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert model.strides["layer4"] == 16
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 2048, 14, 14)


def test_compact_maps_survive_storing(tmp_path):
    rng = np.random.default_rng(0)
    maps = (rng.normal(size=(3, 2, 5, 5)) * 1e-3 + 1000).astype(np.float32)  # a small range far from 0
    maps[1, 1] = 7
    stored = cam.compact(np.array(["a", "b", "c"]), np.arange(6).reshape(3, 2), maps)
    stored.save(tmp_path / "maps.npz", rank=np.array([0, 1, 2]))
    loaded, more = cam.load_maps(tmp_path / "maps.npz")
    assert loaded.maps.dtype == np.float16 and loaded.ids.tolist() == ["a", "b", "c"]
    assert more["rank"].tolist() == [0, 1, 2]
    span = (loaded.high - loaded.low)[:, :, None, None]
    error = np.abs(loaded.low[:, :, None, None].astype(float) + span * loaded.maps.astype(float) - maps)
    assert (error <= span * 2.0**-11).all()  # half a step of float16 just below 1
    assert (loaded.maps[1, 1] == 0).all() and loaded.low[1, 1] == loaded.high[1, 1] == 7


def test_a_map_that_is_not_finite_names_the_image():
    maps = np.zeros((2, 1, 2, 2), np.float32)
    maps[1, 0, 1, 1] = np.inf
    with pytest.raises(UserError, match="image second"):
        cam.compact(np.array(["first", "second"]), np.zeros((2, 1), int), maps)


def test_upsampling_equals_torch_and_a_loop():
    maps = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    up = np.stack([boxes.upsample(image, 24) for image in maps])
    expected = F.interpolate(torch.from_numpy(maps)[:, None], (24, 24), mode="bilinear")[:, 0]
    np.testing.assert_allclose(up, expected.numpy(), atol=1e-6)
    y, x = (5 + 0.5) / 8 - 0.5, (20 + 0.5) / 6 - 0.5
    rows = maps[0, 0] * (1 - y) + maps[0, 1] * y
    assert up[0, 5, 20] == pytest.approx(rows[2] * (3 - x) + rows[3] * (x - 2), abs=1e-6)


def region_loop(mask):
    """The box of the largest 8-connected region by flood fill; of equals the topmost, then leftmost."""
    height, width = mask.shape
    seen, found = np.zeros_like(mask), []
    for start in zip(*np.nonzero(mask)):
        if seen[start]:
            continue
        seen[start], stack, region = True, [start], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            for v in range(max(y - 1, 0), min(y + 2, height)):
                for u in range(max(x - 1, 0), min(x + 2, width)):
                    if mask[v, u] and not seen[v, u]:
                        seen[v, u] = True
                        stack.append((v, u))
        ys, xs = zip(*region)
        found.append((-len(region), min(ys), min(xs), max(ys), max(xs)))
    if not found:
        return [0, 0, 0, 0]
    _, top, left, bottom, right = min(found)
    return [left, top, right + 1, bottom + 1]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_largest_region_equals_a_flood_fill(share):
    rng = np.random.default_rng(int(share * 10))
    for _ in range(100):
        mask = rng.random((9, 12)) < share
        assert list(boxes.largest_region_box(mask)) == region_loop(mask)


def test_rules_of_the_largest_region():
    mask = np.zeros((8, 8), bool)
    assert boxes.largest_region_box(mask) == (0, 0, 0, 0)
    mask[7, 7] = True
    assert boxes.largest_region_box(mask) == (7, 7, 8, 8)  # half-open
    mask[6, 6] = True
    assert boxes.largest_region_box(mask) == (6, 6, 8, 8)  # 8-connected
    mask[0:1, 0:2] = True
    assert boxes.largest_region_box(mask) == (0, 0, 2, 1)  # of equals the topmost
    mask[5, 5] = True
    assert boxes.largest_region_box(mask) == (5, 5, 8, 8)  # most pixels, whatever its place or box
    assert boxes.largest_region_box(np.ones((8, 8), bool)) == (0, 0, 8, 8)
    ring = np.ones((9, 9), bool)
    ring[1:8, 1:8] = False
    assert boxes.largest_region_box(ring) == (0, 0, 9, 9)
    assert boxes.largest_region_box(~ring) == (1, 1, 8, 8)
    ring[2:7, 2:7] = True
    ring[0, :5] = ring[:5, 0] = False
    assert boxes.largest_region_box(ring) == (2, 2, 7, 7)  # an island of 25 pixels in a ring of 23


def test_boxes_from_maps_equal_the_image_by_image_way():
    rng = np.random.default_rng(1)
    maps = rng.random((20, 5, 5)).astype(np.float16)
    thresholds = np.array([0.15, 0.5, 0.9])
    found = boxes.boxes_from_maps(maps, 40, thresholds)
    assert found.shape == (len(maps), 3, 4)
    for number, image in enumerate(maps):
        up = boxes.upsample(image, 40).astype(np.float64)
        scaled = (up - up.min()) / (up.max() - up.min())
        for column, threshold in enumerate(thresholds):
            assert found[number, column].tolist() == region_loop(scaled > threshold)
    np.testing.assert_array_equal(boxes.boxes_from_maps(maps, 40, 0.5), found[:, 1])


def test_a_constant_map_gives_the_empty_box():
    maps = np.stack([np.full((4, 4), 0.3), np.eye(4)]).astype(np.float32)
    assert boxes.boxes_from_maps(maps, 4, 0.15).tolist() == [[0, 0, 0, 0], [0, 0, 4, 4]]
    assert boxes.boxes_from_maps(maps[:1], 37, 0.15).tolist() == [[0, 0, 0, 0]]  # whatever rounding leaves
    assert boxes.boxes_from_maps(maps[1:], 4, 1.0).tolist() == [
        [0, 0, 0, 0]
    ]  # nothing lies above the maximum


def test_a_box_does_not_depend_on_scale_or_offset_of_the_map():
    maps = np.random.default_rng(2).integers(0, 64, (6, 7, 7)).astype(np.float32)
    first = boxes.boxes_from_maps(maps, 56, 0.3)
    np.testing.assert_array_equal(first, boxes.boxes_from_maps(maps * 4 - 128, 56, 0.3))


def test_true_boxes_in_the_crop():
    shares = np.array([[0.0, 0, 1, 1], [0.25, 0.5, 0.5, 0.75], [0.0, 0, 0.0625, 1], [0.0, 0, 0.07, 1]])
    found = boxes.to_crop(shares, 256, 224)
    np.testing.assert_allclose(found[:2], [[0, 0, 224, 224], [48, 112, 112, 176]])
    np.testing.assert_allclose(found[2:], [[0, 0, 256 * 0.07 - 16, 224]])  # the third lies outside the crop
    assert boxes.to_crop(shares[2:3], 256, 224).shape == (0, 4)
    np.testing.assert_allclose(boxes.to_crop(shares[1], 224, 224), [[56, 112, 112, 168]])  # no crop
