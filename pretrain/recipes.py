"""Pretraining recipes. Source tags as in common/base/recipe.py.

`paper`: 300 epochs of ImageNet on 4 GPUs; ResNet-50 top-1 error 23.68 (baseline), 22.58 (Mixup), 22.93 (Cutout),
21.40 (CutMix, published version; 21.60 in v1), ±.11–.18 over seeds. ResNet-101, ResNet-152 and ResNeXt-101 alike.
`paper_cifar`: 300 epochs of CIFAR-10 or -100 on 2 GPUs; CIFAR-100 top-1 error of PyramidNet-200 16.45 (baseline),
15.63 (Mixup), 16.53 (Cutout), 14.23 (CutMix; 14.47 in the published version); `paper_cifar_resnet110` is ResNet-110's.

    python pretrain/run.py --recipe paper --method cutmix --data folder:ILSVRC
    python pretrain/run.py --recipe paper_cifar --arch pyramidnet200 --method cutmix --data cifar100:DIR

`mini`: Imagenette's size, minutes a method on one GPU; not measured.
`tiny`: the embedded world on one CPU core, a minute; top-1 .74, Mixup .61, Cutout .64, CutMix .59 (under-trained).
"""

from dataclasses import dataclass, replace
from typing import Any

from backbench.common.backbones.load import IMAGENET_MEAN, IMAGENET_STD
from backbench.common.base.errors import UserError
from backbench.common.base.recipe import EVAL_PRECISIONS, Fields, knob
from backbench.common.data.decode import BACKENDS
from backbench.pretrain.regularizers import RegularizedRecipe


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(RegularizedRecipe):
    """A classifier trained from random weights."""

    mean: tuple[float, ...] = knob(IMAGENET_MEAN, "subtracted from RGB/255", "C")
    std: tuple[float, ...] = knob(IMAGENET_STD, "RGB/255 less mean is divided by it", "C")
    val_share: float = knob(
        0.0, "share of the training images that is not trained on but chooses the best epoch", "I"
    )
    eval_every: float = knob(
        0.0, "epochs between evaluations on that share; 0: once, at the end", "I", stage="train"
    )

    def check(self) -> None:
        """Refuse what cannot be trained. Raises UserError naming the field."""
        super().check()
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError("recipe: mean and std are three numbers each, std above 0, as in std=0.2,0.2,0.2")
        if not 0 <= self.val_share < 1:
            raise UserError(f"recipe: val_share={self.val_share}, it is a share, from 0 to below 1")
        if self.eval_every and not self.val_share:
            raise UserError(
                "recipe: eval_every needs images to evaluate on that are not the test's: --set val_share=0.05"
            )


PAPER = PretrainRecipe(
    epochs=300,  # P
    batch=256,  # P
    micro_batch=64,  # C: four GPUs, each with batch-norm and mixing statistics of its own
    lr=0.1,  # P
    schedule="step",  # P
    milestones=(75, 150, 225),  # P
    nesterov=True,  # C
    weight_decay=1e-4,  # C: on all parameters
    colour="code",  # C: the code that gave the paper's figures jitters colours, its text does not say so
)

PAPER_CIFAR = PretrainRecipe(
    epochs=300,  # P
    batch=64,  # P
    micro_batch=32,  # C: two GPUs, each with batch-norm and mixing statistics of its own
    lr=0.25,  # P
    schedule="step",  # P
    milestones=(150, 225),  # P
    nesterov=True,  # C
    weight_decay=1e-4,  # C: on all parameters
    probability=0.5,  # C, A: of mixing a batch; not in the paper
    size=32,  # P
    resize=32,  # P
    crop="pad",  # P: RandomCrop 32 after 4 pixels of padding
    mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),  # C: CIFAR-10's, for both
    std=(63.0 / 255, 62.1 / 255, 66.7 / 255),  # C
)

PAPER_CIFAR_RESNET110 = replace(PAPER_CIFAR, lr=0.1, probability=1.0)  # A

MINI = PretrainRecipe(  # I: 10 classes at 128 px (Imagenette), meant for minutes a method on one GPU; not measured
    epochs=40,  # I
    batch=128,  # I
    optimizer="sgd",  # P
    lr=0.1,  # I
    nesterov=True,  # C
    weight_decay=5e-4,  # I
    schedule="one_cycle",  # I
    size=112,  # I
    resize=128,  # I: the files' own size
    crop="random_resized",
    cache="short",  # I: decoded once
    resize_backend="torch",  # I: antialiased, twice as fast as PIL's, within 2 of 255
)

TINY = PretrainRecipe(
    save_every=10.0,  # M: a training lasts half a minute
    iterations=250,  # M: what two cores allow
    batch=40,  # M
    optimizer="adamw",  # M: plain SGD stays near chance in so few steps
    lr=3e-3,  # M
    weight_decay=0.02,  # M
    schedule="one_cycle",  # M
    size=56,  # M
    resize=64,  # M: the files' own size
    crop="shift",  # M
)

SMOKE = replace(TINY, iterations=6, batch=8, size=32, resize=36, log_every=2)

RECIPES = {
    "smoke": SMOKE,
    "tiny": TINY,
    "mini": MINI,
    "paper": PAPER,
    "paper_cifar": PAPER_CIFAR,
    "paper_cifar_resnet110": PAPER_CIFAR_RESNET110,
}

TESTS = ("fgsm", "occlusion", "between", "ood")  # of pretrain/robustness.py
ONLY = {  # the tests a field belongs to; one that is not here belongs to all
    "epsilon": ("fgsm",),
    "fill": ("occlusion",),
    "holes": ("occlusion", "between"),
    "lambdas": ("between",),
    "pairs": ("between",),
    "ood_images": ("ood",),
}


@dataclass(frozen=True, kw_only=True)
class RobustnessRecipe(Fields):
    """How a trained classifier is tested (paper, section 4.4 and appendix E): one test's part of it names its cell."""

    test: str = knob("", "", "", stage="")  # --tests says which
    size: int = knob(224, "side of the test images in pixels; unless set, as the file was trained", "P")
    resize: int = knob(256, "short side before the centre crop; unless set, as the file was trained", "C")
    resize_backend: str = knob(
        "pil", "as in pretraining; unless set, as the file was trained", "P", choices=BACKENDS
    )
    epsilon: float = knob(8.0, "FGSM: what is added to or taken off each pixel, of 255", "I")
    fill: str = knob(
        "mean",
        "occlusion: what a hidden pixel is. mean: zero after normalisation, as Cutout's; black: zero before",
        "I",
        choices=("mean", "black"),
    )
    holes: int = knob(
        14, "steps of the central hole's side from 0 to the whole image; 14: by 16 pixels of 224", "I"
    )
    lambdas: int = knob(10, "in-between: steps of Mixup's λ from 0 to 1", "I")
    pairs: int = knob(50_000, "in-between: pairs of different images, drawn from the seed", "P")
    ood_images: int = knob(
        10_000, "out of distribution: noise images of a kind, and at most so many of a folder", "X"
    )
    test_batch: int = knob(128, "images a prediction step", "I", stage="predict")
    precision: str = knob(
        "fp32",
        "arithmetic of forward passes",
        "I",
        stage="predict",
        choices=EVAL_PRECISIONS,
    )

    @property
    def eval_precision(self) -> str:
        """`precision`: nothing is trained here."""
        return self.precision

    def stage_fields(self, stage: str) -> dict[str, Any]:
        """The fields of a stage's key, without those of other tests.

        fp32 stands in the keys as it always did: as fp32 in FGSM's, as "auto" in the others'.
        """
        mine = super().stage_fields(stage)
        if mine.get("precision") == "fp32" and self.test != "fgsm":
            mine["precision"] = "auto"
        return {k: v for k, v in mine.items() if self.test in ONLY.get(k, (self.test,))}

    def check(self) -> None:
        """Refuse what cannot be tested. Raises UserError naming the field."""
        super().check()
        if not 1 <= self.size <= self.resize:
            raise UserError(
                f"recipe: size={self.size} and resize={self.resize}, nothing could be cropped; 1 ≤ size ≤ resize"
            )
        if not 0 <= self.epsilon <= 255:
            raise UserError(f"recipe: epsilon={self.epsilon:g}, it is of 255: from 0 to 255")
        for name in ("holes", "lambdas", "pairs", "ood_images", "test_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"recipe: {name}={getattr(self, name)}, at least 1 is needed")


ROBUSTNESS = {
    "smoke": RobustnessRecipe(holes=2, lambdas=2, pairs=20, ood_images=16),
    "tiny": RobustnessRecipe(holes=7, lambdas=5, pairs=1_000, ood_images=500),
    "mini": RobustnessRecipe(holes=7, lambdas=5, pairs=5_000, ood_images=2_000),
    "paper": RobustnessRecipe(),
}
