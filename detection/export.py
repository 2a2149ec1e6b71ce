"""Write a trained SSD300 as ONNX, with everything but the choice of its detections.

    python detection/export.py --run results/VOC/detection/ssd300/paper/cutmix/seed0 --out ssd300.onnx

Input `images`: float32 (N, 3, 300, 300), the whole picture squeezed to that size, RGB/255 less the mean, over the
deviation. Outputs: `boxes` (N, 8732, 4), corners x0, y0, x1, y1 as shares of the picture, and `scores` (N, 8732, C), a
probability for each class. What is left to do: a least score, non-maximum suppression for each class. The file's
metadata holds mean, std, the classes, and the run's score, nms, candidates and top. Faster R-CNN is not exported: its
number of regions depends on the picture.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import argparse
import io
import json
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from backbench.common.base.arguments import Parser
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import make_folder, write_atomic
from backbench.detection.build import load_detector
from backbench.detection.matching import decode
from backbench.detection.ssd import SSD300


class Raw(nn.Module):
    """SSD300 from normalised images to all its boxes and scores."""

    def __init__(self, model: SSD300) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (N, 3, 300, 300) → boxes (N, 8732, 4) as shares of the image, scores (N, 8732, classes)."""
        offsets, logits = self.model.outputs(images)
        return decode(offsets, self.model.priors).clamp(0, 1), logits.softmax(-1)[..., 1:]


def main(argv: list[str] | None = None) -> int:
    """Arguments → model → ONNX file."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--run", required=True, type=Path, help="folder of a finished detection/finetune.py")
    made.add_argument("--out", required=True, type=Path, help="the ONNX file to write")
    args = made.parse_args(argv)
    model, recipe, classes = load_detector(args.run.expanduser())
    if not isinstance(model, SSD300):
        raise UserError(f"--run {args.run}: is a Faster R-CNN; only ssd300 is exported")
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it and says so at length
    except ImportError:
        raise UserError("needs onnx and onnxscript (pip install 'backbench[onnx]')") from None
    out = args.out.expanduser()
    make_folder(out.parent)
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Raw(model).eval(),
            (torch.zeros(2, 3, 300, 300),),
            dynamo=True,
            input_names=["images"],
            output_names=["boxes", "scores"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    facts = {"classes": classes, "mean": list(model.mean), "std": list(model.std)}
    facts |= {name: getattr(recipe, name) for name in ("score", "nms", "candidates", "top")}
    program.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    write_atomic(out, lambda file: file.write(program.model_proto.SerializeToString()))
    print(f"session = onnxruntime.InferenceSession({str(out)!r})  # 'images' → 'boxes', 'scores'")
    return 0


if __name__ == "__main__":
    run_main(main)
