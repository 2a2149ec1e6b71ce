"""WSOL recipes. Source tags as in common/base/recipe.py.

`paper` (CUB-200-2011) and `paper_imagenet` are the paper's two (section 4.2, appendix B); expect Top-1 Loc of
ResNet-50 with baseline, Mixup, Cutout, CutMix: CUB 49.41 49.30 52.78 54.81, ImageNet 46.30 45.84 46.69 47.25.
There pretraining and WSOL training use the same method:

    python wsol/finetune.py --backbone cutmix.pt --method cutmix --data cub:CUB_200_2011 --recipe paper

`tiny` is the embedded world on two CPU cores, 35 CPU seconds in fp32; Top-1 Loc around .7 (random weights .17,
shuffled predictions .03).
"""

from dataclasses import dataclass, replace

from backbench.common.base.errors import UserError
from backbench.common.base.recipe import knob
from backbench.common.classify.step import ClassifyRecipe


@dataclass(frozen=True, kw_only=True)
class WSOLRecipe(ClassifyRecipe):
    """A classifier whose layer4 has stride 1, and how its maps become boxes."""

    crop: str = knob(
        "shift", "training crop: a size² window of the image squeezed to resize²", "P", choices=("shift",)
    )
    head_lr: float = knob(10.0, "learning rate of the new classifier, as a multiple of lr", "P")
    threshold: float = knob(
        0.15,
        "foreground is above this share of the map's maximum; 0: chosen on held-out images",
        "P",
        stage="score",
    )
    holdout: float = knob(
        0.0, "share of the training images with boxes that is not trained on but chooses the threshold", "I"
    )
    pictures: int = knob(6, "best and worst localised images drawn in the run folder", "I", stage="score")
    top: int = knob(5, "predicted classes an image whose maps are kept", "I", stage="predict")

    def check(self) -> None:
        """Refuse what cannot be trained or scored. Raises UserError naming the field."""
        super().check()
        if not 0 <= self.threshold < 1:
            raise UserError(
                f"recipe: threshold={self.threshold}, it is a share of the maximum, from 0 to below 1"
            )
        if not 0 <= self.holdout < 1:
            raise UserError(f"recipe: holdout={self.holdout}, it is a share, from 0 to below 1")
        if self.threshold == 0 and self.holdout == 0:
            raise UserError(
                "recipe: threshold=0 is chosen on held-out training images, and holdout=0 holds none out: "
                "--set threshold=0.15 or --set holdout=0.1"
            )
        if self.head_lr <= 0:
            raise UserError(f"recipe: head_lr={self.head_lr}, it must be above 0")
        if self.pictures < 0:
            raise UserError(f"recipe: pictures={self.pictures}, it must be 0 or more")
        if self.top < 1:
            raise UserError(f"recipe: top={self.top}, at least the predicted class's map is needed")


PAPER = WSOLRecipe(  # CUB-200-2011
    epochs=600,  # P
    batch=32,  # P
    lr=0.001,  # P
    head_lr=10.0,  # P: .01 for the classifier
    milestones=(150, 300, 450),  # P: divided by 10 every 150
    momentum=0.9,  # P
    weight_decay=1e-4,  # P
    nesterov=False,  # I: the paper says SGD with momentum
    size=224,  # P
    resize=256,  # P
    threshold=0.15,  # P
)

PAPER_IMAGENET = replace(PAPER, epochs=20, batch=256, lr=0.01, milestones=(6, 12, 18))  # P

MINI = replace(PAPER, epochs=60, milestones=(15, 30, 45))  # I: the CUB recipe, a tenth as long

TINY = replace(
    PAPER,
    save_every=10.0,  # M: a training lasts half a minute
    epochs=0,
    iterations=32,  # M: what two cores allow; twice as many give 13 points more
    batch=24,  # M
    optimizer="adamw",  # M: SGD stays near chance in so few steps
    lr=3e-3,  # M
    head_lr=3.0,  # M
    weight_decay=0.02,  # M
    schedule="one_cycle",  # M
    milestones=(),
    size=128,  # M
    resize=144,  # M
    threshold=0.0,  # M: drawn objects are large and plain, .15 is far too low for them
    holdout=0.1,  # M
)

SMOKE = replace(TINY, iterations=6, batch=8, size=64, resize=72, holdout=0.25, log_every=2)

RECIPES = {"smoke": SMOKE, "tiny": TINY, "mini": MINI, "paper": PAPER, "paper_imagenet": PAPER_IMAGENET}
