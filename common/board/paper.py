"""The paper's results (CutMix, arXiv 1905.04899), as data: version, table, and where it contradicts itself.

Values are in per cent; classification is 100 less the printed error. v1 is the arXiv text; where the published version
(v2) differs, a note says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass

METHODS = ("baseline", "mixup", "cutout", "cutmix")  # the paper's order


@dataclass(frozen=True)
class PaperColumn:
    """One score by method. `data`: what it was measured on; `names`: our names of that data begin so."""

    task: str
    model: str
    metric: str
    data: str
    names: tuple[str, ...]
    source: str
    values: Mapping[str, float]
    notes: tuple[str, ...] = ()
    arch: str = "resnet50"
    recipe: str = "paper"


@dataclass(frozen=True)
class PaperValue:
    """What the paper reports beside a score. `comparable`: same data, network and the paper's recipe."""

    value: float  # a fraction
    source: str
    data: str
    comparable: bool
    notes: tuple[str, ...]


_TOP1 = (
    "The paper gives CutMix's ImageNet top-1 error as 21.60 in v1 and 21.40 in v2; "
    "top-1 here is 100 less v1's error."
)
_TABLE_1 = (
    "Table 1's row \"transfer learning with SSD\" is Table 10's Faster R-CNN column, "
    "and has Cutout at 75.1 against 75.0."
)
_COCO = (
    "On COCO detection the author reports Faster R-CNN AP 33.27 / 34.18 / 34.28 / 35.16 "
    "(baseline, Mixup, Cutout, CutMix), where Mixup and Cutout help; on VOC they do not."
)
_ROUGE = "ROUGE-L 44.7 of the baseline may be a misprint: the other three lie between 47.9 and 49.0."
_LOC = "The official README prints CutMix's ImageNet localisation as 46.25, the paper as 47.25."
_SPLIT = (
    'The paper trains captions on "120K trainval" and tests on "40K test" images of COCO: '
    "read as it stands, val2014 would be in both."
)

_CIFAR = "The paper means three runs' best epochs; CutMix is 14.23 in v1, 14.47 in v2."
_QUOTED = (
    "DropBlock's ImageNet row is quoted from its own paper (270 epochs), not trained by the CutMix authors."
)

_VOC, _COCO_DATA, _CUB, _IMAGENET = "VOC07+12 → VOC07 test", "COCO 2014", "CUB-200-2011", "ImageNet"


def _four(*values: float) -> dict[str, float]:
    return dict(zip(METHODS, values))


_NIC = (
    ("BLEU-1", _four(61.4, 61.6, 63.0, 64.2), (_SPLIT,)),
    ("BLEU-2", _four(43.8, 44.1, 45.3, 46.3), (_SPLIT,)),
    ("BLEU-3", _four(31.4, 31.6, 32.6, 33.6), (_SPLIT,)),
    ("BLEU-4", _four(22.9, 23.2, 24.0, 24.9), (_SPLIT,)),
    ("METEOR", _four(22.8, 22.9, 22.6, 23.1), (_SPLIT,)),
    ("ROUGE-L", _four(44.7, 47.9, 48.2, 49.0), (_SPLIT, _ROUGE)),
    ("CIDEr", _four(71.2, 72.2, 74.1, 77.6), (_SPLIT,)),
)

# network, data, its name in our paths, recipe, table, method → (top-1 error, top-5 error)
_PRETRAINING = (
    (
        *("resnet50", _IMAGENET, ("imagenet", "ilsvrc"), "paper", "v1, Table 3"),
        {
            "baseline": (23.68, 7.05),
            "cutout": (22.93, 6.66),
            "stochdepth": (22.46, 6.27),
            "mixup": (22.58, 6.40),
            "manifold_mixup": (22.50, 6.21),
            "dropblock": (21.87, 5.98),
            "feature_cutmix": (21.80, 6.06),
            "cutmix": (21.60, 5.90),
        },
        (_TOP1, _QUOTED),
    ),
    (
        *("resnet101", _IMAGENET, ("imagenet", "ilsvrc"), "paper", "v1, Table 4"),
        *({"baseline": (21.87, 6.29), "cutmix": (20.17, 5.24)}, ()),
    ),
    (
        *("resnext101_32x4d", _IMAGENET, ("imagenet", "ilsvrc"), "paper", "v1, Table 4"),
        *({"baseline": (21.18, 5.57), "cutmix": (19.47, 5.03)}, ()),
    ),
    (
        *("pyramidnet200", "CIFAR-100", ("cifar100",), "paper_cifar", "v1, Table 5"),
        {
            "baseline": (16.45, 3.69),
            "stochdepth": (15.86, 3.33),
            "label_smoothing": (16.73, 3.37),
            "cutout": (16.53, 3.65),
            "cutout+label_smoothing": (15.61, 3.88),
            "dropblock": (15.73, 3.26),
            "dropblock+label_smoothing": (15.16, 3.86),
            "mixup": (15.63, 3.99),
            "manifold_mixup": (16.14, 4.07),
            "cutout+mixup": (15.46, 3.42),
            "cutout+manifold_mixup": (15.09, 3.35),
            "shakedrop": (15.08, 2.72),
            "cutmix": (14.23, 2.75),
            "cutmix+shakedrop": (13.81, 2.29),
        },
        (_CIFAR,),
    ),
    (
        *("pyramidnet110", "CIFAR-100", ("cifar100",), "paper_cifar", "v1, Table 6"),
        *({"baseline": (19.85, 4.66), "cutmix": (17.97, 3.83)}, (_CIFAR,)),
    ),
    (
        *("resnet110", "CIFAR-100", ("cifar100",), "paper_cifar_resnet110", "v1, Table 6"),
        *({"baseline": (23.14, 5.95), "cutmix": (20.11, 4.43)}, (_CIFAR,)),
    ),
    (
        *("pyramidnet200", "CIFAR-10", ("cifar10",), "paper_cifar", "v1, Table 7"),
        {
            "baseline": (3.85, None),
            "cutout": (3.10, None),
            "mixup": (3.09, None),
            "manifold_mixup": (3.15, None),
            "cutmix": (2.88, None),
        },
        (_CIFAR,),
    ),
)

# The first column of a (task, model, metric) is the reference for data the paper did not use.
COLUMNS: tuple[PaperColumn, ...] = (
    *(
        PaperColumn(
            *("classification", arch, metric, data, names, source),
            {method: round(100 - errors[k], 2) for method, errors in rows.items() if errors[k] is not None},
            tuple(note for note in notes if k == 0 or note is not _TOP1),
            *(arch, recipe),
        )
        for arch, data, names, recipe, source, rows, notes in _PRETRAINING
        for k, metric in enumerate(("top-1", "top-5"))
    ),
    PaperColumn(
        *("detection", "ssd300", "mAP", _VOC, ("voc0712",), "v1, Table 10"),
        *(_four(76.7, 76.6, 76.8, 77.6), (_TABLE_1,)),
    ),
    PaperColumn(
        *("detection", "faster_rcnn", "mAP", _VOC, ("voc0712",), "v1, Table 10"),
        *(_four(75.6, 73.9, 75.0, 76.7), (_TABLE_1, _COCO)),
    ),
    *(
        PaperColumn("captioning", "nic", metric, _COCO_DATA, ("coco",), "v1, Table A2", values, notes)
        for metric, values, notes in _NIC
    ),
    PaperColumn(
        *("wsol", "cam", "Top-1 Loc", _CUB, ("cub",), "v1, Table 9"),
        _four(49.41, 49.30, 52.78, 54.81),
    ),
    PaperColumn(
        *("wsol", "cam", "Top-1 Loc", _IMAGENET, ("imagenet", "ilsvrc"), "v1, Table 9"),
        *(_four(46.30, 45.84, 46.69, 47.25), (_LOC,)),
        recipe="paper_imagenet",
    ),
)


def reference(
    task: str, model: str, metric: str, method: str, *, data: str, arch: str, recipe: str
) -> PaperValue | None:
    """The paper's value for a method in the column of this task, model and metric; None where it has none.

    `data`, `arch`, `recipe` are the cell's: they decide which of several columns is quoted and whether the two numbers
    may be compared at all.
    """
    name = data.lower()
    columns = sorted(
        (
            c
            for c in COLUMNS
            if (c.task, c.metric) == (task, metric)
            and (c.model == model or task == "classification")
            and method in c.values
        ),
        key=lambda c: (not _same_data(c, name), c.arch != arch),  # stable: else the order above
    )
    if not columns:
        return None
    column = columns[0]
    return PaperValue(
        value=round(column.values[method] / 100, 4),
        source=column.source,
        data=column.data,
        comparable=_same_data(column, name) and arch == column.arch and recipe == column.recipe,
        notes=tuple(note for note in column.notes if note is not _QUOTED or method == "dropblock"),
    )


def _same_data(column: PaperColumn, name: str) -> bool:
    """Whether a data set's name is one of the column's: imagenet1k and ilsvrc2012 are, imagenette is not."""
    for known in column.names:
        if name.startswith(known):
            following = name[len(known) : len(known) + 1]
            return not (following.isalpha() if known[-1].isalpha() else following.isdigit())
    return False
