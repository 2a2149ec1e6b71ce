"""Detection recipes. Source tags as in common/base/recipe.py.

`paper`, VOC07+12 → VOC07 test, mAP of ResNet-50 with baseline, Mixup, Cutout, CutMix (one run each; ±1.4 between
two runs of one configuration): ssd300 76.7, 76.6, 76.8, 77.6; faster_rcnn 75.6, 73.9, 75.0, 76.7.
`c4_moco`, the field's transfer protocol, VOC07+12 → VOC07 test, supervised ResNet-50: AP50 81.3, AP 53.5, AP75 58.8
(SD .2, .2, .4). Its batch norm is synchronised: under torchrun on GPUs that of all processes' micro-batches (8 GPUs:
--set micro_batch=2); in one process that of its micro-batch, all 16 images. Gradients accumulated over smaller ones are
not the same; the run notes it. Not reproduced: its re-estimated statistics before the test, half-pixel RoIAlign, and an
L1 proposal loss.
`fpn` has the parts and test settings of torchvision's Faster R-CNN and detectron2's VOC schedule. `torchvision` is its
reference training of SSD300, 120 epochs. No figure of these three is known for this code.
`tiny`: the embedded world, about 40 CPU seconds a training; mAP of a backbone with top-1 .67: ssd300 .62,
faster_rcnn .55 (one seed, 150 images); of random weights .27 and .14, chance .05–.08.
"""

from dataclasses import dataclass, replace

from backbench.common.base.errors import UserError
from backbench.common.base.recipe import Recipe, knob

LEVELS = 5  # of the pyramid: layer1 to layer4, and layer4 once more at half the resolution
NECKS = ("c4", "fpn")
FREEZE = ("none", "stem", "layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(Recipe):
    """What both detectors have."""

    freeze: str = knob(
        "none", "last of the trunk's stages that are not trained; never on scratch", "B", choices=FREEZE
    )
    freeze_bn: bool = knob(False, "the trunk's batch norm keeps its statistics; never on scratch", "B")
    keep_difficult: bool = knob(True, "train on objects marked difficult", "B")
    score: float = knob(0.01, "detections below this score are dropped", "B", stage="predict")
    nms: float = knob(
        0.45, "IoU above which the lesser of two detections of a class goes", "B", stage="predict"
    )
    top: int = knob(200, "detections kept of an image", "B", stage="predict")
    test_batch: int = knob(32, "images a prediction step", "I", stage="predict")

    def check(self) -> None:
        """Refuse what cannot be trained. Raises UserError naming the field."""
        super().check()
        for name in ("top", "test_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"recipe: {name}={getattr(self, name)}, it must be at least 1")
        if not 0 < self.nms <= 1 or not 0 <= self.score < 1:
            raise UserError(f"recipe: nms={self.nms}, score={self.score}; nms is in (0, 1], score in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class SSDRecipe(DetectionRecipe):
    """SSD300."""

    topology: str = knob(
        "layer3",
        "maps of the trunk: layer2 and layer3, or layer2 and layer4 dilated (the SSD authors' ResNet script)",
        "I",
        choices=("layer3", "layer4_dilated"),
    )
    l2norm: float = knob(
        20.0, "layer2's features scaled to this length at first, as conv4_3's; 0: as they are", "B"
    )
    extra_width: float = knob(1.0, "width of the extra maps, as a factor on 512, 256, 256, 256", "B")
    extra_bn: bool = knob(False, "batch norm in the extra maps", "B")
    head_std: float = knob(0.0, "heads start from a normal distribution of this width; 0: Xavier's", "B")
    match_iou: float = knob(0.5, "IoU with an object from which a prior is positive", "B")
    negatives: float = knob(3.0, "hard negatives for each positive", "B")
    expand: float = knob(4.0, "largest factor of the expansion on a mean canvas; 1: none", "B")
    crop: bool = knob(True, "IoU crops", "B")
    aug: str = knob(
        "ssd",
        "whose crops: the paper's, or ssd.pytorch's, whose IoU constraint never fires and which has no .5",
        "P",
        choices=("ssd", "ssd_pytorch"),
    )
    photometric: bool = knob(True, "photometric distortion", "B")
    candidates: int = knob(400, "of a class, boxes that enter NMS", "X", stage="predict")

    def check(self) -> None:
        """Refuse what cannot be trained. Raises UserError naming the field."""
        super().check()
        if self.expand < 1:
            raise UserError(f"recipe: expand={self.expand}, it is a factor of at least 1")
        if self.extra_bn and (self.micro_batch or self.batch) < 2:
            raise UserError("recipe: extra_bn needs batches of 2 or more: the last map is one pixel")


@dataclass(frozen=True, kw_only=True)
class FasterRCNNRecipe(DetectionRecipe):
    """Faster R-CNN."""

    neck: str = knob(
        "c4", "c4: layer4 is each region's head; fpn: a feature pyramid and two layers", "B", choices=NECKS
    )
    short_side: int = knob(600, "pixels of the image's short side", "B")
    short_sides: tuple[int, ...] = knob((), "short sides that training draws from; empty: short_side", "B")
    long_side: int = knob(1000, "most pixels of the long side", "B")
    anchors: tuple[float, ...] = knob(
        (128.0, 256.0, 512.0), "side lengths in pixels, each × ½, 1, 2; fpn: one a level, five", "B"
    )
    roi_size: int = knob(7, "RoIAlign's output side, the input of the head", "B")
    sampling: int = knob(2, "RoIAlign's samples a cell and side; 0: as many as pixels", "X")
    head_bn: bool = knob(
        False,
        "c4: one more batch norm behind layer4, as in the MoCo protocol; then batch norm sees the micro-batches of all "
        "GPUs at once (SyncBN), in one process its own micro-batch alone",
        "B",
    )
    fpn_width: int = knob(256, "fpn: channels of the pyramid", "X")
    head_width: int = knob(1024, "fpn: width of the head's two layers", "X")
    decay_biases: bool = knob(False, "weight decay on biases too; never on batch norm", "B")
    rpn_batch: int = knob(256, "anchors of an image in the proposal loss", "B")
    roi_batch: int = knob(256, "regions of an image in the second stage, a quarter objects", "B")
    proposals_before: int = knob(12000, "proposals before NMS, training", "B")
    proposals_after: int = knob(2000, "proposals after NMS, training", "B")
    test_proposals_before: int = knob(6000, "proposals before NMS, test", "B", stage="predict")
    test_proposals_after: int = knob(300, "proposals after NMS, test", "B", stage="predict")

    def check(self) -> None:
        """Refuse what cannot be trained. Raises UserError naming the field."""
        super().check()
        if not self.anchors or min(self.anchors) <= 0:
            raise UserError("recipe: anchors are side lengths above 0, as in anchors=128,256,512")
        if self.neck == "fpn" and len(self.anchors) != LEVELS:
            raise UserError(
                f"recipe: {len(self.anchors)} anchors, neck=fpn has one for each of {LEVELS} levels: "
                "--set anchors=32,64,128,256,512"
            )
        if self.neck == "fpn" and self.head_bn:
            raise UserError("recipe: head_bn=true belongs to neck=c4: fpn's head has no layer4")
        for side in (self.short_side, *self.short_sides):
            if not 16 <= side <= self.long_side:
                raise UserError(
                    f"recipe: short side {side}, long_side={self.long_side}; at least 16, long not below"
                )


SSD_PAPER = SSDRecipe(
    iterations=120_000,  # P
    batch=32,  # P
    lr=1e-3,  # P
    schedule="step",
    milestones=(80_000, 100_000),  # P
    momentum=0.9,  # B
    weight_decay=5e-4,  # B
    warmup=0,  # B
)
SSD_TORCHVISION = replace(
    SSD_PAPER,
    iterations=0,
    epochs=120,  # X
    lr=2e-3,  # X
    milestones=(80, 110),  # X
)
SSD_MINI = replace(
    SSD_PAPER,
    iterations=12_000,  # I: a tenth of the paper; not measured
    milestones=(8_000, 10_000),  # I
    warmup=500,  # I
)
SSD_TINY = SSDRecipe(
    save_every=10.0,  # M: a training lasts half a minute
    iterations=64,  # M
    batch=6,  # M
    optimizer="adamw",  # M: plain SGD stays near chance in so few steps
    lr=2e-3,  # M
    weight_decay=0.02,  # M
    schedule="one_cycle",  # M
    freeze="layer1",  # M: a third of the time
    l2norm=0.0,  # M: with 20 and Xavier's heads half of the training only brings the logits down
    head_std=0.01,  # M
    extra_width=0.5,  # M: as the half-width trunk
    extra_bn=True,  # M
    expand=1.0,  # M: one pass over less than the data overfits nothing: mAP .62, with crops and colours .28
    crop=False,  # M
    photometric=False,  # M
    top=50,  # M
    log_every=10,
)
SSD_SMOKE = replace(
    SSD_TINY,
    iterations=3,
    batch=2,
    extra_width=0.25,
    expand=4.0,
    crop=True,
    photometric=True,
    top=20,
    log_every=1,
)

FRCNN_PAPER = FasterRCNNRecipe(
    iterations=120_000,  # P
    batch=8,  # P
    lr=0.01,  # P
    schedule="step",
    milestones=(100_000,),  # P
    momentum=0.9,  # B
    weight_decay=1e-4,  # B: none on biases
    freeze="layer1",  # B
    freeze_bn=True,  # B
    score=0.0,  # B
    nms=0.3,  # B
    top=100,  # B
    test_batch=8,
)
FRCNN_MOCO = FasterRCNNRecipe(
    iterations=24_000,  # X, as all of it: detectron2's pascal_voc_R_50_C4_24k with MoCo's Base-RCNN-C4-BN
    batch=16,
    lr=0.02,
    schedule="step",
    milestones=(18_000, 22_000),
    warmup=100,
    momentum=0.9,
    weight_decay=1e-4,
    decay_biases=True,
    freeze="none",
    freeze_bn=False,
    head_bn=True,
    short_side=800,
    short_sides=tuple(range(480, 801, 32)),
    long_side=1333,
    anchors=(32.0, 64.0, 128.0, 256.0, 512.0),
    roi_size=14,
    sampling=0,
    roi_batch=512,
    test_proposals_after=1000,
    score=0.05,
    nms=0.5,
    top=100,
    test_batch=8,
)
FRCNN_FPN = replace(
    FRCNN_MOCO,
    neck="fpn",
    iterations=18_000,  # X: detectron2's PascalVOC faster_rcnn_R_50_FPN; the parts and what follows are torchvision's
    milestones=(12_000, 16_000),
    freeze="layer1",
    freeze_bn=True,
    head_bn=False,
    roi_size=7,
    sampling=2,
    proposals_before=2000,
    test_proposals_before=1000,
)
FRCNN_MINI = replace(
    FRCNN_PAPER,
    iterations=9_000,  # I: a thirteenth of the paper; not measured
    milestones=(7_500,),  # I
    warmup=500,  # I
)
FRCNN_TINY = FasterRCNNRecipe(
    save_every=10.0,  # M: a training lasts half a minute
    iterations=64,  # M
    batch=6,  # M
    optimizer="adamw",  # M
    lr=1e-3,  # M
    weight_decay=0.02,  # M
    schedule="one_cycle",  # M
    freeze="layer1",  # M
    short_side=224,  # M: at 192 with 20 regions mAP .45, in the same time
    long_side=224,  # M
    anchors=(51.0, 82.0, 121.0),  # M
    roi_size=5,  # M
    sampling=1,  # M
    rpn_batch=64,  # M
    roi_batch=16,  # M: layer4 on regions is half of the time
    proposals_before=400,  # M
    proposals_after=100,  # M
    test_proposals_before=300,  # M
    test_proposals_after=40,  # M
    score=0.01,
    nms=0.3,  # B
    top=50,  # M
    test_batch=16,
    log_every=10,
)
FRCNN_SMOKE = replace(
    FRCNN_TINY,
    iterations=3,
    batch=2,
    short_side=96,
    long_side=96,
    anchors=(22.0, 35.0, 52.0),
    log_every=1,
    top=20,
)

RECIPES: dict[str, dict[str, DetectionRecipe]] = {
    "ssd300": {
        "smoke": SSD_SMOKE,
        "tiny": SSD_TINY,
        "mini": SSD_MINI,
        "paper": SSD_PAPER,
        "torchvision": SSD_TORCHVISION,
    },
    "faster_rcnn": {
        "smoke": FRCNN_SMOKE,
        "tiny": FRCNN_TINY,
        "mini": FRCNN_MINI,
        "paper": FRCNN_PAPER,
        "c4_moco": FRCNN_MOCO,
        "fpn": FRCNN_FPN,
    },
}
