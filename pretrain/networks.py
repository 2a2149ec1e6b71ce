"""Every network that can be pretrained: the ImageNet family of `common.backbones` and the paper's CIFAR networks.

The CIFAR networks' attributes carry the names of the official code (`conv1`, `bn1`, `layer1` … `layer3`, `fc`, and
`bn_final` of a PyramidNet), so its checkpoints map key by key. The last module of a block's residual branch is `bn3`
(ResNet) or `bn4` (PyramidNet): what acts on branches hooks there.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from backbench.common.backbones.load import read_backbone_file
from backbench.common.backbones.resnet import ARCHS, Classifier, Trunk
from backbench.common.base.errors import UserError

EXPANSION = 4  # output channels of a bottleneck by those of its 3×3


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016, section 4.2) with bottleneck blocks: depth 9n + 2, widths 16, 32, 64.

    Bottlenecks are what the paper's ResNet-110 has (official code, `--bottleneck`).
    """

    def __init__(self, arch: str, depth: int, num_classes: int) -> None:
        super().__init__()
        self.arch = arch
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        inplanes = 16
        for number in range(3):
            planes, stride = 16 * 2**number, 1 if number == 0 else 2
            outplanes = planes * EXPANSION
            downsample = nn.Sequential(
                nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False), nn.BatchNorm2d(outplanes)
            )
            blocks = [Bottleneck(inplanes, planes, stride, downsample)]
            blocks += [Bottleneck(outplanes, planes) for _ in range(_blocks(depth) - 1)]
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
            inplanes = outplanes
        self.fc = nn.Linear(inplanes, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W), 32 × 32 in the paper → logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))

    def torchvision_state(self) -> dict[str, Tensor]:
        """The state dict, as `save_backbone` stores it."""
        return {key: value.detach() for key, value in self.state_dict().items()}


class PyramidBlock(nn.Module):
    """A PyramidNet bottleneck: BN, 1×1, BN, ReLU, 3×3, BN, ReLU, 1×1, BN; no ReLU first, none after the sum.

    The shortcut has no weights: average pooling where the stride is 2, zeros for the channels it lacks (Han et al.
    2017, figure 6d and section 3.3).
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * EXPANSION, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(planes * EXPANSION)
        self.relu = nn.ReLU(inplace=True)
        # ceil: as the strided 3×3 rounds an odd side
        self.downsample = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) → (N, 4 · planes, H / stride, W / stride)."""
        out = self.conv1(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.bn4(self.conv3(self.relu(self.bn3(out))))
        shortcut = self.downsample(x)
        return out + F.pad(shortcut, (0, 0, 0, 0, 0, out.shape[1] - shortcut.shape[1]))


class PyramidNet(nn.Module):
    """PyramidNet for CIFAR (Han et al. 2017): every bottleneck is wider than the one before, by `alpha` in all."""

    def __init__(self, arch: str, depth: int, alpha: int, num_classes: int) -> None:
        super().__init__()
        self.arch = arch
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        count = _blocks(depth)
        inplanes, width = 16, 16.0
        for number in range(3):
            blocks = []
            for k in range(count):
                width += alpha / (3 * count)
                blocks.append(PyramidBlock(inplanes, round(width), 2 if number and k == 0 else 1))
                inplanes = round(width) * EXPANSION
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.bn_final = nn.BatchNorm2d(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(inplanes, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W), 32 × 32 in the paper → logits (N, num_classes)."""
        x = self.bn1(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.relu(self.bn_final(x)).mean((2, 3)))

    def torchvision_state(self) -> dict[str, Tensor]:
        """The state dict, as `save_backbone` stores it."""
        return {key: value.detach() for key, value in self.state_dict().items()}


def _blocks(depth: int) -> int:
    return (depth - 2) // 9  # three convolutions a bottleneck, three stages


def _initialise(network: nn.Module) -> None:
    for (
        module
    ) in network.modules():  # as the official code: N(0, 2 / (k² · out)); batch norm's default is 1, 0
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet110": partial(CifarResNet, "resnet110", 110),
    "pyramidnet110": partial(PyramidNet, "pyramidnet110", 110, 64),
    "pyramidnet200": partial(PyramidNet, "pyramidnet200", 200, 240),
}
ALL_ARCHS = (*ARCHS, *NETWORKS)


def build(arch: str, num_classes: int) -> nn.Module:
    """A network with random weights (of torch's generator): one of `ALL_ARCHS`. UserError for another name."""
    if arch in ARCHS:
        return Classifier(Trunk(arch), num_classes)
    if arch not in NETWORKS:
        raise UserError(f"--arch {arch}: no such network; choose one of {', '.join(ALL_ARCHS)}")
    return NETWORKS[arch](num_classes)


def load_network(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """A whole network with its classifier from a backbone file, and the file's facts.

    Raises UserError for any other file and for weights that are not those of the network the file names.
    """
    content = read_backbone_file(path)
    facts = {key: value for key, value in content.items() if key != "state_dict"}
    absent = [key for key in ("arch", "num_classes", "state_dict") if key not in content]
    if absent:
        raise UserError(f"{path}: has no '{absent[0]}'; pretrain/run.py writes whole files")
    if facts["arch"] not in ALL_ARCHS:
        raise UserError(
            f"{path}: its network {facts['arch']} is none of {', '.join(ALL_ARCHS)}: update backbench"
        )
    network = build(facts["arch"], facts["num_classes"])
    state = content["state_dict"]
    if isinstance(network, Classifier):
        state = {key if key.startswith("fc.") else f"trunk.{key}": value for key, value in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"{path}: its weights are not a {facts['arch']} of {facts['num_classes']} classes ({first[:160]})"
        ) from None
    return network, facts
