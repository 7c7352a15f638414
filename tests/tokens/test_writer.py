"""What a shard cannot hold is refused, never wrapped round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from argonne.errors import InputError
from argonne.tokens.writer import ShardWriter


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "wrong"), [("uint16", None, 70_000), ("uint32", 1000, 1000), ("uint32", None, -1)]
)
def test_an_id_that_is_none_is_an_error_that_names_it(
    dtype: str, vocab_size: int | None, wrong: int, tmp_path: Path
) -> None:
    writer = ShardWriter(tmp_path, "tokens-00000", dtype, vocab_size=vocab_size)
    writer.add(np.array([5, 999]), np.array([2]), 4)
    with pytest.raises(InputError, match=f"tokens-00000.bin: id {wrong:,} is not among"):
        writer.extend(np.array([1, wrong]))
    writer.abort()
    assert not list(tmp_path.iterdir())
