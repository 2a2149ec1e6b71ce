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

OOD_METRICS = ("TNR@95", "AUROC", "detection accuracy")
# Table A3: set → method (in the order above) → OOD_METRICS; Table 12 is the unweighted mean over the seven
OOD_SETS = {
    "tiny_imagenet_crop": ((43.0, 88.9, 81.3), (22.6, 71.6, 69.8), (30.5, 85.6, 79.0), (57.1, 92.4, 85.0)),
    "tiny_imagenet_resize": ((29.8, 84.2, 77.0), (12.3, 56.8, 61.0), (22.0, 82.8, 77.1), (55.4, 91.9, 84.5)),
    "lsun_crop": ((34.6, 86.5, 79.5), (22.9, 76.3, 72.3), (33.2, 85.7, 78.5), (47.6, 90.3, 82.8)),
    "lsun_resize": ((34.3, 86.4, 79.0), (13.0, 59.0, 61.8), (23.7, 84.0, 78.4), (62.8, 93.7, 86.7)),
    "isun": ((32.0, 85.1, 77.8), (11.8, 57.0, 61.0), (22.2, 82.8, 76.8), (60.1, 93.0, 85.7)),
    "uniform": ((0.0, 89.2, 89.2), (0.0, 0.8, 50.0), (0.0, 35.6, 59.1), (100.0, 99.8, 99.7)),
    "gaussian": ((10.4, 90.7, 89.9), (0.0, 23.4, 50.5), (0.0, 24.3, 50.0), (100.0, 99.7, 99.0)),
}
OOD_MEAN = ((26.3, 87.3, 82.0), (11.8, 49.3, 60.9), (18.8, 68.7, 71.3), (69.0, 94.4, 89.1))


def _ood() -> tuple[PaperColumn, ...]:
    """Table 12, then Table A3 set by set."""
    tables = {"": (OOD_MEAN, "v1, Table 12")}
    tables |= {f" {name}": (rows, "v1, Table A3") for name, rows in OOD_SETS.items()}
    return tuple(
        PaperColumn(
            *("robustness", "ood", metric + suffix, "CIFAR-100, PyramidNet-200", ("cifar100",), source),
            _four(*(row[k] for row in rows)),
            arch="pyramidnet200",
        )
        for suffix, (rows, source) in tables.items()
        for k, metric in enumerate(OOD_METRICS)
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
    PaperColumn(
        *("robustness", "fgsm", "top-1 attacked", _IMAGENET, ("imagenet", "ilsvrc"), "v1, Table 11"),
        _four(8.2, 24.4, 11.5, 31.0),
    ),
    *_ood(),
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
