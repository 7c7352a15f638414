"""Files and back: the rotary tables, the tie, the Auto classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from argonne.model import ArgonneBaseModel, ArgonneForCausalLM

Make = Callable[..., ArgonneForCausalLM]


@pytest.mark.parametrize("generation", ["1", "2", "3-window"])
def test_save_load_logits(generation: str, make_model: Make, ids: torch.Tensor, tmp_path: Path) -> None:
    model = make_model(generation)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, ArgonneForCausalLM)
    assert again.dtype == torch.float64
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, ArgonneBaseModel)
    hidden = base(input_ids=ids).last_hidden_state
    assert torch.equal(hidden, model.model(input_ids=ids).last_hidden_state)


def test_the_rotary_tables_are_right_after_from_pretrained(make_model: Make, tmp_path: Path) -> None:
    make_model("3").save_pretrained(tmp_path)
    again = ArgonneForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = torch.tensor([1e6 ** (-2 * i / 10) for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, expected, rtol=1e-14, atol=0)
    cos, sin = again.model.rotary_emb(torch.tensor([[0, 7]]), torch.bfloat16)
    torch.testing.assert_close(cos[0, 1], (7 * expected).cos().float())
    torch.testing.assert_close(sin[0, 1], (7 * expected).sin().float())


def test_the_pieces_of_a_pipeline_make_the_whole(make_model: Make, ids: torch.Tensor) -> None:
    model = make_model("3-window")
    hidden = model.run_layers(model.embed(ids), 0, 2)
    pieces = model.head_loss(model.run_layers(hidden, 2, None), ids)
    torch.testing.assert_close(
        pieces, model(input_ids=ids, shift_labels=ids, loss_reduction="sum").loss, rtol=1e-14, atol=0
    )


def test_hidden_states_are_one_more_than_layers(make_model: Make, ids: torch.Tensor) -> None:
    out = make_model("3-window")(input_ids=ids, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    assert out.hidden_states[0].shape == (2, 40, 48)
