"""detection/export.py: the ONNX file against the detector it was made of."""

import json

import numpy as np
import pytest
import torch

from backbench.common.backbones.load import Backbone
from backbench.common.backbones.resnet import Trunk, normalise
from backbench.common.base.errors import UserError
from backbench.detection import export
from backbench.detection.build import load_detector, make_model, write_facts
from backbench.detection.matching import decode
from backbench.detection.recipes import RECIPES

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def trained(folder, detector):
    """A run folder with a detector of random weights."""
    torch.manual_seed(0)
    backbone = Backbone(Trunk("resnet18_half"), "resnet18_half", "a", "a", "", "", "", mean=MEAN, std=STD)
    recipe = RECIPES[detector]["smoke"]
    model = make_model(backbone.trunk, recipe, 2, MEAN, STD)
    folder.mkdir()
    torch.save({"model": model.state_dict()}, folder / "weights.pt")
    write_facts(folder, detector, backbone, ["ball", "cube"], recipe)
    return folder


def test_onnxruntime_finds_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run, out = trained(tmp_path / "run", "ssd300"), tmp_path / "new" / "ssd.onnx"
    assert export.main(["--run", str(run), "--out", str(out)]) == 0
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    facts = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert facts["classes"] == ["ball", "cube"] and facts["nms"] == 0.45 and facts["top"] == 20
    images = torch.randint(
        0, 256, (3, 300, 300, 3), dtype=torch.uint8
    )  # another batch than it was traced with
    model = load_detector(run)[0].eval()
    with torch.inference_mode():
        offsets, logits = model(images)
        x = normalise(images, facts["mean"], facts["std"]).numpy()
    boxes, scores = session.run(None, {"images": x})
    assert boxes.shape == (3, 8732, 4) and scores.shape == (3, 8732, 2)
    np.testing.assert_allclose(scores, logits.softmax(-1)[..., 1:].numpy(), atol=1e-4)
    np.testing.assert_allclose(boxes, decode(offsets, model.priors).clamp(0, 1).numpy(), atol=1e-4)


def test_bad_input(tmp_path):
    run = trained(tmp_path / "run", "faster_rcnn")
    for folder, message in ((run, "only ssd300 is exported"), (tmp_path / "none", "no weights.pt in it")):
        with pytest.raises(UserError, match=message):
            export.main(["--run", str(folder), "--out", str(tmp_path / "x.onnx")])
    ssd = trained(tmp_path / "ssd", "ssd300")
    with pytest.raises(UserError, match="is a folder"):
        export.main(["--run", str(ssd), "--out", str(tmp_path)])
