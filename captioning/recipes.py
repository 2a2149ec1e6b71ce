"""Captioning recipes. Source tags as in common/base/recipe.py; B is stevehuanghe/image_captioning.

`paper` is the paper's NIC on COCO 2014 (appendix C): expect BLEU-4 22.9, METEOR 22.8, CIDEr 71.2 of the baseline
ResNet-50, 24.9, 23.1, 77.6 of CutMix; training sees features only, so 100 epochs take hours, not days, on one GPU:

    python captioning/finetune.py --backbone cutmix.pt --data captions:COCO --recipe paper

`modern` is what the field does today: a wider model, five captions an image together, then the encoder trained
too. `mini` is for a thousand images and a CPU (Flickr8k: some minutes). `tiny` is the embedded world on two CPU
cores, some fifteen seconds: CIDEr around .8, a constant caption .4.
"""

from dataclasses import dataclass, replace

from backbench.captioning.beam import PENALTIES, Beam
from backbench.common.base.errors import UserError
from backbench.common.base.recipe import Recipe, knob


@dataclass(frozen=True, kw_only=True)
class CaptionRecipe(Recipe):
    """NIC: what it looks like, what it sees, how it is trained, decoded and scored."""

    embed: int = knob(100, "width of word vectors and of the projected image feature", "B")
    hidden: int = knob(300, "width of the LSTM", "B")
    dropout: float = knob(0.1, "dropout before the word classifier", "B")
    feature_bn: bool = knob(True, "batch norm behind the projection of the image feature", "B")
    threshold: int = knob(4, "occurrences in training captions that make a word", "B")
    punctuation: bool = knob(True, "whether punctuation marks are words", "B")
    words: str = knob(
        "treebank",
        "what splits training captions: nltk's Treebank rules, or ptb, the evaluation's tokenizer, through Java",
        "B",
        choices=("treebank", "ptb"),
    )
    group: bool = knob(
        False, "true: an item is an image with all its captions; false: an image with one caption", "B"
    )
    train_longest: int = knob(50, "words of a training caption, the end included; the rest is cut off", "I")
    resize: int = knob(256, "images are squeezed to resize²", "B")
    size: int = knob(224, "and cropped to size²", "B")
    views: int = knob(
        10,
        "crops an image whose features a frozen encoder gives, one drawn each epoch: the centre, its mirror image, "
        "then random crops, every other one mirrored",
        "I",
    )
    encoder_epochs: float = knob(
        0.0, "length of a second phase that trains the encoder too, batch norm frozen", "P: none"
    )
    encoder_lr: float = knob(0.0, "the encoder's learning rate where it is trained, as a multiple of lr", "I")
    second_lr: float = knob(0.1, "learning rate of the second phase, as a multiple of lr", "I")
    scratch_resize: int = knob(0, "resize for a scratch encoder, trained with images; 0: as resize", "I")
    scratch_size: int = knob(0, "size for a scratch encoder, trained with images; 0: as size", "I")
    beam: int = knob(20, "beams an image", "P", stage="predict")
    longest: int = knob(20, "words of a caption, the end included", "B", stage="predict")
    shortest: int = knob(0, "words of a caption before it may end", "I", stage="predict")
    penalty: str = knob(
        "none",
        "what a beam's log-probability is divided by: 1, its length, or Wu's ((5 + length)/6)^alpha",
        "B",
        stage="predict",
        choices=PENALTIES,
    )
    alpha: float = knob(0.7, "exponent of Wu's length penalty", "X", stage="predict")
    end: str = knob(
        "frozen",
        "a beam that ended is frozen, or (legacy) goes on as in the base code, its end a word like any other",
        "I",
        stage="predict",
        choices=("frozen", "legacy"),
    )
    emit_unk: bool = knob(False, "whether a caption may hold <unk>", "I", stage="predict")
    test_batch: int = knob(64, "images a prediction step", "I", stage="predict")
    tokenizer: str = knob(
        "auto",
        "ptb (the COCO evaluation's, through Java), plain (nltk's Treebank rules), or ptb where there is Java",
        "X",
        stage="score",
        choices=("auto", "ptb", "plain"),
    )

    @property
    def search(self) -> Beam:
        """The beam search."""
        return Beam(
            width=self.beam,
            longest=self.longest,
            shortest=self.shortest,
            penalty=self.penalty,
            alpha=self.alpha,
            legacy=self.end == "legacy",
        )

    def crop(self, scratch: bool) -> tuple[int, int]:
        """(resize, size) in pixels for a scratch encoder or for any other."""
        if not scratch:
            return self.resize, self.size
        return self.scratch_resize or self.resize, self.scratch_size or self.size

    def check(self) -> None:
        """Refuse what cannot be trained or decoded. Raises UserError naming the field."""
        super().check()
        for name in ("embed", "hidden", "threshold", "views", "beam", "longest", "train_longest", "size"):
            if getattr(self, name) < 1:
                raise UserError(f"recipe: {name}={getattr(self, name)}, it must be at least 1")
        if self.words == "ptb" and self.punctuation:
            raise UserError("recipe: words=ptb drops punctuation: --set punctuation=false")
        if self.alpha < 0:  # Wu's penalty would fall with length, and the search could not stop early
            raise UserError(f"recipe: alpha={self.alpha}, it must not be negative")
        if not 0 <= self.dropout < 1:
            raise UserError(f"recipe: dropout={self.dropout}, it is a share, from 0 to below 1")
        for resize, size in (self.crop(False), self.crop(True)):
            if size > resize:
                raise UserError(
                    f"recipe: size={size} is larger than resize={resize}, nothing could be cropped"
                )
        if self.feature_bn and (self.micro_batch or self.batch) < 2:
            raise UserError("recipe: feature_bn=true needs two images a micro-batch: --set feature_bn=false")
        if self.encoder_epochs > 0 and not self.encoder_lr > 0:
            raise UserError("recipe: encoder_epochs trains the encoder, give its rate: --set encoder_lr=0.1")


PAPER = CaptionRecipe(
    epochs=100,  # P
    batch=20,  # P
    optimizer="adam",  # B
    lr=1e-3,  # P, B
    weight_decay=0.0,  # B
    schedule="constant",  # B
    encoder_lr=1.0,  # I: only a scratch encoder is trained
)

MODERN = replace(
    PAPER,
    epochs=30,  # X: with five captions an image together, an epoch holds five times the captions
    batch=64,  # X
    embed=512,  # X: as in Show and Tell (section 4.3.1)
    hidden=512,  # X
    dropout=0.5,  # X
    threshold=5,  # X: Karpathy & Fei-Fei (2015)
    punctuation=False,  # X: the evaluation drops it
    group=True,  # X
    lr=5e-4,  # X
    schedule="one_cycle",  # X
    clip_grad=5.0,  # X
    encoder_epochs=10,  # I
    encoder_lr=0.1,  # I
    beam=5,  # X
    penalty="average",  # X
)

MINI = replace(
    MODERN,
    epochs=30,  # I
    batch=32,  # I
    lr=1e-3,  # I
    embed=256,  # I
    hidden=256,  # I
    threshold=3,  # I: a thousand images hold few words five times
    views=4,  # I
    encoder_epochs=0,  # I
)

TINY = replace(
    MODERN,
    save_every=10.0,  # M: a training lasts half a minute
    epochs=5,  # M
    batch=16,  # M: batches of 32 train too few steps
    optimizer="adamw",  # M
    lr=0.012,  # M: CIDEr .45, .55, .72, .72 at .002, .004, .012, .016
    embed=128,  # M
    hidden=128,  # M
    dropout=0.1,  # M
    threshold=2,  # M
    views=1,  # M
    resize=96,  # M
    size=96,  # M
    scratch_resize=64,  # M
    scratch_size=56,  # M
    encoder_epochs=0,  # M
    encoder_lr=0.1,  # M
    shortest=9,  # M: or it says "there are two things …" of every image; scratch then scores .6, and .3 with this
)

SMOKE = replace(TINY, epochs=0, iterations=6, batch=8, resize=64, size=64, embed=32, hidden=32, beam=2)

RECIPES = {"paper": PAPER, "modern": MODERN, "mini": MINI, "tiny": TINY, "smoke": SMOKE}
