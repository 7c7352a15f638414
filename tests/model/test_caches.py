"""Cached decoding equals recomputing, in every cache class, past the window, with padding on the left, through
`generate` too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from argonne.model import ArgonneForCausalLM
from argonne.model.attention import segments_of
from argonne.model.fused import Segments

Make = Callable[..., ArgonneForCausalLM]
CACHES: dict[str, Callable[[ArgonneForCausalLM], Any]] = {
    "by default": lambda model: None,
    "dynamic, sliding": lambda model: DynamicCache(config=model.config),
    "dynamic, plain": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
}
GENERATIONS = ["1", "2", "3", "3-window"]


@torch.no_grad()
def decode(model: ArgonneForCausalLM, ids: torch.Tensor, cache: Any, cuts: list[int], **kwargs: Any) -> torch.Tensor:
    """Logits of `ids` fed in pieces that end at `cuts`."""
    start, parts = 0, []
    for stop in cuts:
        mask = kwargs["attention_mask"][:, :stop] if "attention_mask" in kwargs else None
        out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, attention_mask=mask)
        cache, start = out.past_key_values, stop
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("implementation", ["argonne", "sdpa", "eager"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_cached_equals_recomputed_beyond_the_window(
    generation: str, cache: str, implementation: str, make_model: Make, ids: torch.Tensor
) -> None:
    model = make_model(generation)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(implementation)
    one_by_one = decode(model, ids, CACHES[cache](model), [5, *range(6, 41)])
    torch.testing.assert_close(one_by_one, expected, rtol=0, atol=1e-10)
    in_pieces = decode(model, ids, CACHES[cache](model), [15, 22, 40])
    torch.testing.assert_close(in_pieces, expected, rtol=0, atol=1e-10)


def test_a_cache_comes_by_either_name(make_model: Make, ids: torch.Tensor) -> None:
    """`generate` of transformers 5.24 and later calls it `cache`; unseen, each token would be written from the last."""
    model = make_model("3-window")
    cache = DynamicCache()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        model(input_ids=ids[:, :20], cache=cache)
        assert cache.get_seq_length() == 20
        found = model(input_ids=ids[:, 20:], cache=cache).logits
    torch.testing.assert_close(found, expected[:, 20:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", ["argonne", "sdpa", "eager"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_left_padded_batch_equals_its_rows_alone(
    generation: str, implementation: str, make_model: Make, ids: torch.Tensor
) -> None:
    model = make_model(generation)
    model.set_attn_implementation(implementation)
    lengths = [40, 23]
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        batch[row, -length:], mask[row, -length:] = ids[row, :length], 1
    with torch.no_grad():
        together = model(input_ids=batch, attention_mask=mask).logits
    cached = decode(model, batch, None, [24, *range(25, 41)], attention_mask=mask)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = model(input_ids=ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together[row, -length:], alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(cached[row, -length:], alone, rtol=0, atol=1e-10)


def test_the_padding_of_a_row_is_one_segment_whatever_its_positions() -> None:
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :7] = False
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    segments = segments_of(positions, mask, (2, 12), torch.device("cpu"))
    assert isinstance(segments, Segments)
    assert segments.lengths == (7, 5, 12)
    mask[1, 9:] = False
    segments = segments_of(
        torch.tensor([[0] * 8 + [0, 1, 0, 1], [0, 1, 2, 0, 1, 2, 3, 4, 5, 1, 1, 1]]), mask, (2, 12), torch.device("cpu")
    )
    assert isinstance(segments, Segments)
    assert segments.lengths == (7, 1, 2, 2, 3, 6, 3)  # documents within the text of a padded row are kept apart too


def test_a_mask_with_holes_hides_exactly_its_tokens(make_model: Make, ids: torch.Tensor) -> None:
    model = make_model("2")
    mask = torch.ones_like(ids)
    mask[:, [3, 4, 11]] = 0
    positions = torch.arange(40)[None].expand_as(ids)
    changed = ids.clone()
    changed[:, [3, 4, 11]] = 5
    found, other = (model(input_ids=x, attention_mask=mask, position_ids=positions).logits for x in (ids, changed))
    torch.testing.assert_close(found[mask.bool()], other[mask.bool()], rtol=0, atol=1e-12)
    assert (found - model(input_ids=ids).logits)[:, 12:].abs().max() > 1e-3
    model.set_attn_implementation("eager")
    stock = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[mask.bool()], stock[mask.bool()], rtol=0, atol=1e-10)


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_generate_gives_each_prompt_of_a_padded_batch_its_own_text(
    generation: str, cache: str | None, make_model: Make, ids: torch.Tensor
) -> None:
    model = make_model(generation)
    lengths = [20, 13]
    batch, mask = torch.zeros(2, 20, dtype=torch.int64), torch.zeros(2, 20, dtype=torch.int64)
    for row, length in enumerate(lengths):
        batch[row, -length:], mask[row, -length:] = ids[row, :length], 1
    settings: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 18,
        "pad_token_id": 0,
        "cache_implementation": cache,
    }
    together = model.generate(batch, attention_mask=mask, **settings)
    for row, length in enumerate(lengths):
        text = ids[row : row + 1, :length]
        for _ in range(18):  # without any cache
            with torch.no_grad():
                text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], 1)
        assert together[row, 20:].tolist() == text[0, length:].tolist()


def test_generation_stops_at_the_end_token(make_model: Make, ids: torch.Tensor) -> None:
    model = make_model("3-window")
    free = model.generate(ids[:1, :5], do_sample=False, max_new_tokens=12, pad_token_id=0)[0]
    end = int(free[8])
    stopped = model.generate(ids[:1, :5], do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=end)[0]
    first = free[5:].tolist().index(end)
    assert stopped.tolist() == free[: 5 + first + 1].tolist()


@pytest.mark.parametrize("implementation", ["argonne", "sdpa", "eager"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_packed_rows_are_separate_under_every_implementation(
    generation: str, implementation: str, make_model: Make, ids: torch.Tensor
) -> None:
    model = make_model(generation)
    model.set_attn_implementation(implementation)
    positions = torch.cat([torch.arange(13), torch.arange(27)])[None].expand_as(ids)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for part in (slice(0, 13), slice(13, 40)):
            alone = model(input_ids=ids[:, part], use_cache=False).logits
            torch.testing.assert_close(packed[:, part], alone, rtol=0, atol=1e-10)


def test_learned_positions_end_with_their_table_cached_or_not(make_model: Make) -> None:
    model = make_model("1", max_position_embeddings=20)
    ids = torch.ones(1, 21, dtype=torch.int64)
    model(input_ids=ids[:, :20])
    with pytest.raises(
        ValueError, match="position 20 is beyond the table of learned positions: max_position_embeddings is 20"
    ):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="position 20 is beyond"):
        model.generate(ids[:, :18], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert (
        model.generate(ids[:, :18], max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == 21
    )  # the last one is never fed
