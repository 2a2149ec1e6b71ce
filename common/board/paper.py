"""The paper's results (CutMix, arXiv 1905.04899), as data: version, table, and where it contradicts itself.

Values are in per cent, of ResNet-50. v1 is the arXiv text; the published version (v2) differs in CutMix's ImageNet
error, and is quoted where it does.
"""

from dataclasses import dataclass

METHODS = ("baseline", "mixup", "cutout", "cutmix")  # the paper's order


@dataclass(frozen=True)
class PaperColumn:
    """One score of the four methods. `data`: what it was measured on; `names`: our names of that data begin so."""

    task: str
    model: str
    metric: str
    data: str
    names: tuple[str, ...]
    source: str
    values: tuple[float, float, float, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperValue:
    """What the paper reports beside a score. `comparable`: same data, network and the `paper` recipe."""

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

_VOC, _COCO_DATA, _CUB, _IMAGENET = "VOC07+12 → VOC07 test", "COCO 2014", "CUB-200-2011", "ImageNet"
_NIC = (
    ("BLEU-1", (61.4, 61.6, 63.0, 64.2), (_SPLIT,)),
    ("BLEU-2", (43.8, 44.1, 45.3, 46.3), (_SPLIT,)),
    ("BLEU-3", (31.4, 31.6, 32.6, 33.6), (_SPLIT,)),
    ("BLEU-4", (22.9, 23.2, 24.0, 24.9), (_SPLIT,)),
    ("METEOR", (22.8, 22.9, 22.6, 23.1), (_SPLIT,)),
    ("ROUGE-L", (44.7, 47.9, 48.2, 49.0), (_SPLIT, _ROUGE)),
    ("CIDEr", (71.2, 72.2, 74.1, 77.6), (_SPLIT,)),
)

# The first column of a (task, model, metric) is the reference for data the paper did not use.
COLUMNS: tuple[PaperColumn, ...] = (
    PaperColumn(
        *("classification", "resnet50", "top-1", _IMAGENET, ("imagenet", "ilsvrc"), "v1, Table 3"),
        *((76.32, 77.42, 77.07, 78.40), (_TOP1,)),
    ),
    PaperColumn(
        *("classification", "resnet50", "top-5", _IMAGENET, ("imagenet", "ilsvrc"), "v1, Table 3"),
        (92.95, 93.60, 93.34, 94.10),
    ),
    PaperColumn(
        *("detection", "ssd300", "mAP", _VOC, ("voc0712",), "v1, Table 10"),
        *((76.7, 76.6, 76.8, 77.6), (_TABLE_1,)),
    ),
    PaperColumn(
        *("detection", "faster_rcnn", "mAP", _VOC, ("voc0712",), "v1, Table 10"),
        *((75.6, 73.9, 75.0, 76.7), (_TABLE_1, _COCO)),
    ),
    *(
        PaperColumn("captioning", "nic", metric, _COCO_DATA, ("coco",), "v1, Table A2", values, notes)
        for metric, values, notes in _NIC
    ),
    PaperColumn(
        *("wsol", "cam", "Top-1 Loc", _CUB, ("cub",), "v1, Table 9"),
        (49.41, 49.30, 52.78, 54.81),
    ),
    PaperColumn(
        *("wsol", "cam", "Top-1 Loc", _IMAGENET, ("imagenet", "ilsvrc"), "v1, Table 9"),
        *((46.30, 45.84, 46.69, 47.25), (_LOC,)),
    ),
)


def reference(
    task: str, model: str, metric: str, method: str, *, data: str, arch: str, recipe: str
) -> PaperValue | None:
    """The paper's value for a method in the column of this task, model and metric; None where it has none.

    `data`, `arch`, `recipe` are the cell's: they decide which of two data sets is quoted and whether the two numbers
    may be compared at all.
    """
    if method not in METHODS:
        return None
    columns = [
        c
        for c in COLUMNS
        if (c.task, c.metric) == (task, metric) and (c.model == model or task == "classification")
    ]
    if not columns:
        return None
    name = data.lower()
    same = [c for c in columns if name.startswith(c.names) and not name.startswith("imagenette")]
    column = (same or columns)[0]
    return PaperValue(
        value=round(column.values[METHODS.index(method)] / 100, 4),
        source=column.source,
        data=column.data,
        comparable=bool(same) and arch == "resnet50" and recipe == "paper",
        notes=column.notes,
    )
