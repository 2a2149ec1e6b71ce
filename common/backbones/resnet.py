"""The Trunk: a ResNet body as ordered stages that declare their channels and strides.

State-dict keys equal torchvision's (`conv1`, `bn1`, `layer1` … `layer4`), so weights of the field map one to one.
Heads address stages by name and read `channels` and `strides`; none of them knows a ResNet's insides.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")

# arch: block, blocks a stage, planes of layer1, groups, base width of a group
ARCHS: dict[str, tuple[type[nn.Module], tuple[int, int, int, int], int, int, int]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64, 1, 64),
    "resnet18_half": (BasicBlock, (2, 2, 2, 2), 32, 1, 64),  # half width: the embedded world's network
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64, 1, 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64, 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64, 1, 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 64, 1, 64),
    "resnext101_32x4d": (Bottleneck, (3, 4, 23, 3), 64, 32, 4),
}


class Trunk(nn.Module):
    """A ResNet body without its classifier.

    `channels[stage]` is the number of a stage's output channels, `strides[stage]` its total stride in input pixels.
    With `stride_in_1x1` a bottleneck strides its first 1×1 convolution, as Caffe's ResNets do, not its 3×3; the
    state dict is the same.
    """

    def __init__(self, arch: str, stride_in_1x1: bool = False) -> None:
        super().__init__()
        block, blocks, planes, groups, base_width = ARCHS[arch]
        self.arch = arch
        self.conv1 = nn.Conv2d(3, planes, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.channels, self.strides = {"stem": planes}, {"stem": 4}
        inplanes = planes
        for number, stage in enumerate(STAGES[1:]):
            stride = 1 if number == 0 else 2
            width = planes * 2**number
            setattr(self, stage, _stage(block, inplanes, width, blocks[number], stride, groups, base_width))
            inplanes = width * block.expansion
            self.channels[stage] = inplanes
            self.strides[stage] = self.strides[STAGES[number]] * stride
        self._frozen: set[str] = set()
        self._bn_frozen = False
        if stride_in_1x1:
            self.swap_strides()
        for module in self.modules():  # as torchvision initialises
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def run(self, x: Tensor, start: str = "stem", stop: str = "layer4") -> Tensor:
        """Run the stages from `start` to `stop`, both included, on `start`'s input. (N, C, H, W) → (N, C', H', W')."""
        for stage in STAGES[STAGES.index(start) : STAGES.index(stop) + 1]:
            if stage == "stem":
                x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            else:
                x = getattr(self, stage)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalised → layer4's features."""
        return self.run(x)

    def features(self, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """The outputs of the named stages, running no further than the last of them."""
        names = set(names)
        found: dict[str, Tensor] = {}
        for stage in STAGES:
            x = self.run(x, stage, stage)
            if stage in names:
                found[stage] = x
            if len(found) == len(names):
                break
        return found

    def modules_of(self, stage: str) -> list[nn.Module]:
        """The modules that make up a stage."""
        return [self.conv1, self.bn1] if stage == "stem" else [getattr(self, stage)]

    def drop_after(self, stage: str) -> None:
        """Remove the stages behind `stage`, so that they are neither trained nor stored."""
        for later in STAGES[STAGES.index(stage) + 1 :]:
            setattr(self, later, nn.Identity())
            del self.channels[later], self.strides[later]

    @property
    def has_1x1(self) -> bool:
        """Whether its blocks are bottlenecks, whose stride may stand in the 1×1 or in the 3×3 convolution."""
        return ARCHS[self.arch][0] is Bottleneck

    def swap_strides(self) -> None:
        """Move every bottleneck's stride from its 3×3 to its first 1×1 convolution, or back."""
        for stage in STAGES[1:]:
            block = getattr(self, stage)[0]
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride

    def unstride(self, stage: str, dilate: bool = False) -> None:
        """Give a stage stride 1, its weights unchanged.

        With `dilate` the blocks after the first get dilation 2, as torchvision's `replace_stride_with_dilation`.
        """
        for number, block in enumerate(getattr(self, stage)):
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
                    if dilate and number > 0 and module.kernel_size == (3, 3):
                        module.dilation = module.padding = (2, 2)
        before = self.strides[STAGES[STAGES.index(stage) - 1]]
        factor = self.strides[stage] // before
        for later in STAGES[STAGES.index(stage) :]:
            if later in self.strides:
                self.strides[later] //= factor

    def freeze(self, upto: str | None) -> None:
        """Freeze all stages up to and including `upto`: no gradients, batch norm in eval mode for good."""
        if upto is None:
            return
        for stage in STAGES[: STAGES.index(upto) + 1]:
            self._frozen.add(stage)
            for module in self.modules_of(stage):
                module.requires_grad_(False)
        self.train(self.training)

    def freeze_bn(self) -> None:
        """Freeze every batch norm: stored statistics, no gradients on its weight and bias."""
        self._bn_frozen = True
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Trunk":
        """Set the mode; frozen parts stay in eval mode."""
        super().train(mode)
        for stage in self._frozen:
            for module in self.modules_of(stage):
                module.eval()
        if self._bn_frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def _stage(
    block, inplanes: int, planes: int, blocks: int, stride: int, groups: int, base_width: int
) -> nn.Sequential:
    downsample = None
    if stride != 1 or inplanes != planes * block.expansion:
        downsample = nn.Sequential(
            nn.Conv2d(inplanes, planes * block.expansion, 1, stride=stride, bias=False),
            nn.BatchNorm2d(planes * block.expansion),
        )
    layers = [block(inplanes, planes, stride, downsample, groups, base_width)]
    layers += [
        block(planes * block.expansion, planes, 1, None, groups, base_width) for _ in range(blocks - 1)
    ]
    return nn.Sequential(*layers)


class Classifier(nn.Module):
    """A Trunk, global average pooling and one linear layer: torchvision's ResNet, with its state-dict names."""

    def __init__(self, trunk: Trunk, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.fc = nn.Linear(trunk.channels["layer4"], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) → logits (N, num_classes)."""
        return self.fc(self.trunk(x).mean((2, 3)))

    def torchvision_state(self) -> dict[str, Tensor]:
        """The state dict under torchvision's names: the body's keys and `fc.weight`, `fc.bias`."""
        return {
            **self.trunk.state_dict(),
            "fc.weight": self.fc.weight.detach(),
            "fc.bias": self.fc.bias.detach(),
        }


def normalise(images: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """uint8 images (N, H, W, 3) or (N, 3, H, W) → float32 (N, 3, H, W), RGB/255 less `mean`, over `std`."""
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    # the compiler looks through a cache, with a warning
    constant = _constant.__wrapped__ if torch.compiler.is_compiling() else _constant
    mean, std = (constant(tuple(v), images.device) for v in (mean, std))
    return images.float().sub_(mean).div_(std)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept on the device: making it there anew would wait for the device at every step."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1) * 255
