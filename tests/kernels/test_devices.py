"""Which device is the current one while a kernel is launched; with devices that are made up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from localexit.kernels.devices import on_its_device


class Held:
    """What the launch looks at of a tensor."""

    def __init__(self, device: int | None) -> None:
        self.is_cuda, self.device = device is not None, device

    def get_device(self) -> int | None:
        return self.device


@pytest.mark.parametrize(("device", "expected"), [(None, 0), (0, 0), (3, 3)])
def test_a_launch_is_on_the_device_of_its_first_tensor(
    device: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = [0]

    @contextmanager
    def made_current(device: int) -> Iterator[None]:
        before, current[0] = current[0], device
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", made_current)
    launch = on_its_device(lambda first, other, *, third: (current[0], first, other, third))
    first = Held(device)
    assert launch(first, 1, third=2) == (expected, first, 1, 2)
    assert current == [0]
