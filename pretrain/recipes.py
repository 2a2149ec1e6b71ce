"""Pretraining recipes. Source tags as in common/recipe.py.

`paper`: 300 epochs of ImageNet on 4 GPUs; ResNet-50 top-1 error 23.68 (baseline), 22.58 (Mixup), 22.93 (Cutout),
21.40 (CutMix, published version; 21.60 in v1), ±.11–.18 over seeds.
`tiny`: the embedded world on one CPU core, a minute; top-1 .74, Mixup .61, Cutout .64, CutMix .59 (under-trained).
"""

from dataclasses import replace

from common.classify import ClassifyRecipe

PAPER = ClassifyRecipe(
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

MINI = ClassifyRecipe(  # I: 10 classes at 128 px (Imagenette), meant for minutes a method on one GPU; not measured
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
)

TINY = ClassifyRecipe(
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

RECIPES = {"smoke": SMOKE, "tiny": TINY, "mini": MINI, "paper": PAPER}
