"""A network of words: no images, and weights that are tied and recurrent."""

from __future__ import annotations

from torch import Tensor, nn


class Words(nn.Module):
    """An embedding that is tied to the last layer, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.out = nn.Linear(16, 32, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(words))[0])
