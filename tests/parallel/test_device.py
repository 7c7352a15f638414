"""The device that a name asks for."""

from __future__ import annotations

import pytest
import torch

from argonne.errors import InputError
from argonne.parallel.mesh import choose_device


@pytest.mark.parametrize("device", ["gpu", "cuda:one", "cuda:99", "tpu"])
def test_a_device_that_is_not_here_is_named_with_the_key_that_asked_for_it(device: str) -> None:
    with pytest.raises(InputError, match=f"^device: found '{device}'"):
        choose_device(device)
    with pytest.raises(InputError, match=f"^train.device: found '{device}'"):
        choose_device(device, where="train.device")


def test_auto_takes_what_is_here() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")


def test_a_worker_takes_its_own_card_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == choose_device("cuda", 1) == torch.device("cuda", 1)
    assert choose_device("cuda:0", 1) == torch.device("cuda", 0)
    with pytest.raises(InputError, match="found 'cuda:2', but torch sees 2 such devices here"):
        choose_device("cuda", 2)
