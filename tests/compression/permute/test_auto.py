"""Groups that nobody wrote down: found, tried, and only those whose order a file can hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from src.compression.permute.auto import groups_by_following


class WithTable(nn.Module):
    """Channels that meet a table which is computed when the network is built, and is in no state dict."""

    def __init__(self, equal: bool, persistent: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        table = torch.ones(16) if equal else torch.arange(16) / 16
        self.register_buffer("table", table, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu() * self.table).relu())


@pytest.mark.parametrize(("equal", "persistent", "n"), [(False, False, 1), (True, False, 2), (False, True, 2)])
def test_a_table_that_no_file_holds_keeps_its_order(equal: bool, persistent: bool, n: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    model = WithTable(equal, persistent).eval()
    groups, notes = groups_by_following(model, lambda net: net(x))
    assert len(groups) == n
    assert any("table which no file holds" in note for note in notes) == (n == 1)
    with torch.no_grad():
        wanted = model(x)
        for group in groups:
            group.apply(model, group.random(torch.Generator().manual_seed(1)))
        assert torch.allclose(model(x), wanted, atol=1e-6)
        again = WithTable(equal, persistent).eval()
        again.load_state_dict(model.state_dict())
        assert torch.allclose(again(x), wanted, atol=1e-6)


def test_what_was_not_followed_is_said() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.aside = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.second(x) if not self.training else self.aside(x)

    torch.manual_seed(0)
    x = torch.randn(2, 8)
    groups, notes = groups_by_following(Aside(), lambda net: net(x))
    assert len(groups) == 1
    assert any("aside" in note and "no part of the pass" in note for note in notes)
