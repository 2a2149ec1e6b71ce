"""NIC, "Show and Tell" (Vinyals et al., CVPR 2015): a pooled image feature is an LSTM's first input."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbench.captioning.vocabulary import PAD, START
from backbench.common.backbones.resnet import Trunk, normalise

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

    def forward(
        self, inputs: Tensor, captions: Tensor, groups: Sequence[tuple[Tensor, int]] | None = None
    ) -> Tensor:
        """The mean loss of a word, the end included. `captions` (n, c, L): c captions an image, padded.

        Each image is encoded once for its c captions. `groups` are numbers (k,) of captions of similar length, 0 to
        n·c − 1, and the longest one's length: each group is read by itself, so that little padding is computed. The
        loss is the same to rounding: dropout is drawn as for one group.
        """
        n, c, length = captions.shape
        encoded, captions = self.encode(inputs).float(), captions.flatten(0, 1)
        if groups is None:
            groups = [(torch.arange(n * c, device=captions.device), length)]
        targets = [captions[rows, :longest] for rows, longest in groups]
        before = torch.cat([F.pad(words[:, :-1], (1, 0), value=START).flatten() for words in targets])
        # the LSTM is small, and slow in bf16 on a CPU
        with torch.autocast(encoded.device.type, enabled=False):
            kept = self.dropout(encoded.new_ones(length, n * c, self.lstm.hidden_size)).transpose(0, 1)
            embedded = self.embedding(before).split([words.numel() for words in targets])
            hidden = []
            for (rows, longest), words in zip(groups, embedded):
                first = encoded[rows // c, None]
                read, _ = self.lstm(torch.cat([first, words.view(len(rows), longest, -1)], 1))
                hidden.append((read[:, 1:] * kept[rows, :longest]).flatten(0, 1))
            logits = self.classify(torch.cat(hidden))
            wanted = torch.cat([words.flatten() for words in targets])
            return F.cross_entropy(logits, wanted, ignore_index=PAD)

    def start(self, inputs: Tensor) -> State:
        """The state (1, n, hidden) × 2 after the image, before `<start>`."""
        encoded = self.encode(inputs)
        with torch.autocast(encoded.device.type, enabled=False):
            return self.lstm(encoded.float()[:, None])[1]

    def advance(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """One word (m,) further: logits (m, words) of the next one, and the new state."""
        hidden, state = self.lstm(self.embedding(words)[:, None], state)
        return self.classify(hidden[:, 0]), state
