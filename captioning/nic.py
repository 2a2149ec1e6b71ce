"""NIC, "Show and Tell" (Vinyals et al., CVPR 2015): a pooled image feature is an LSTM's first input."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioning.vocabulary import PAD, START
from common.trunk import Trunk, normalise

State = tuple[Tensor, Tensor]


class NIC(nn.Module):
    """Feature (D,) → caption: the feature, projected, is the LSTM's input at t = −1, `<start>` at t = 0.

    With a `trunk` it takes images and the trunk is part of what is trained; without it takes pooled features.
    """

    def __init__(
        self,
        features: int,
        words: int,
        *,
        embed: int,
        hidden: int,
        dropout: float,
        feature_bn: bool,
        trunk: Trunk | None = None,
        mean: Iterable[float] = (),
        std: Iterable[float] = (),
    ) -> None:
        super().__init__()
        self.trunk, self.mean, self.std = trunk, tuple(mean), tuple(std)
        self.project = nn.Linear(features, embed)
        # the base code's batch norm after the projection, momentum .01 (models/nic.py)
        self.norm = nn.BatchNorm1d(embed, momentum=0.01) if feature_bn else nn.Identity()
        self.embedding = nn.Embedding(words, embed)
        self.lstm = nn.LSTM(embed, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(hidden, words)
        nn.init.normal_(self.project.weight, 0.0, 0.02)  # the base code's initial weights
        nn.init.zeros_(self.project.bias)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.classify.weight, -0.1, 0.1)
        nn.init.zeros_(self.classify.bias)

    def encode(self, inputs: Tensor) -> Tensor:
        """uint8 images (n, H, W, 3), or pooled features (n, D) where there is no trunk → (n, embed)."""
        if self.trunk is not None:
            inputs = self.trunk(normalise(inputs, self.mean, self.std)).mean((2, 3))
        return self.norm(self.project(inputs.float()))

    def forward(self, inputs: Tensor, captions: Tensor) -> Tensor:
        """The mean loss of a word, the end included. `captions` (n, c, L): c captions an image, padded.

        Each image is encoded once for its c captions.
        """
        n, c, length = captions.shape
        encoded = self.encode(inputs)[:, None].expand(n, c, -1).reshape(n * c, 1, -1)
        targets = captions.reshape(n * c, length)
        before = torch.cat([targets.new_full((n * c, 1), START), targets[:, :-1]], 1)
        with torch.autocast(
            encoded.device.type, enabled=False
        ):  # the LSTM is small, and slow in bf16 on a CPU
            hidden, _ = self.lstm(torch.cat([encoded.float(), self.embedding(before)], 1))
            logits = self.classify(self.dropout(hidden[:, 1:]))
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)

    def start(self, inputs: Tensor) -> State:
        """The state (1, n, hidden) × 2 after the image, before `<start>`."""
        encoded = self.encode(inputs)
        with torch.autocast(encoded.device.type, enabled=False):
            return self.lstm(encoded.float()[:, None])[1]

    def advance(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """One word (m,) further: logits (m, words) of the next one, and the new state."""
        hidden, state = self.lstm(self.embedding(words)[:, None], state)
        return self.classify(hidden[:, 0]), state
