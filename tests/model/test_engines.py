"""A stand-in for an inference engine's Transformers backend: what vLLM and SGLang ask of the class,
and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import AttentionInterface

from argonne.model import ArgonneForCausalLM

Make = Callable[..., ArgonneForCausalLM]


class EngineAttention:
    """One layer's attention of the engine: it owns the keys of all running sequences and knows the layer's window from
    the config.
    """

    def __init__(self, config: Any, layer: int) -> None:
        self.window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
        self.called_with: dict[str, Any] = {}

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, lengths: list[int]
    ) -> torch.Tensor:
        """(T, heads, D) of several sequences one after the other."""
        outputs = []
        for queries, keys, values in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
            i = torch.arange(len(queries))
            seen = i[:, None] >= i[None]
            if self.window is not None:
                seen &= i[:, None] - i[None] < self.window
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * scaling
            outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
        return torch.cat(outputs)


def engine_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    attention_instances: dict[int, EngineAttention],
    lengths: list[int],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert attention_mask is None  # the engine has its own
    assert module.is_causal
    own = attention_instances[module.layer_idx]
    own.called_with = kwargs
    flat = [x.transpose(1, 2)[0] for x in (query, key, value)]
    return own.forward(*flat, scaling, lengths)[None], None


@pytest.mark.parametrize("generation", ["1", "2", "3", "3-window"])
def test_an_engine_with_its_own_attention_and_head_gets_the_same_logits(
    generation: str, make_model: Make, ids: torch.Tensor, tmp_path: Path
) -> None:
    reference = make_model(generation)
    reference.save_pretrained(tmp_path)
    AttentionInterface.register("engine", engine_attention)
    config = AutoConfig.from_pretrained(tmp_path)
    config._attn_implementation = "engine"
    base = AutoModel.from_pretrained(tmp_path, config=config).eval()
    assert base._supports_attention_backend
    instances = {layer: EngineAttention(config, layer) for layer in range(config.num_hidden_layers)}
    lengths = [23, 17, 40]
    sequences = [ids[0, :23], ids[0, 23:], ids[1]]
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        hidden = base(
            input_ids=torch.cat(sequences)[None],
            position_ids=positions[None],
            use_cache=False,
            return_dict=False,
            attention_instances=instances,
            lengths=lengths,
        )[0][0]
        head = reference.lm_head.weight  # the engine builds its own head and reads the cap by its config name
        logits = hidden @ head.T
        if config.final_logit_softcapping:
            logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        for found, sequence in zip(logits.split(lengths), sequences, strict=True):
            torch.testing.assert_close(found, reference(input_ids=sequence[None]).logits[0], rtol=0, atol=1e-11)
    assert all(instance.called_with["sliding_window"] == instance.window for instance in instances.values())


def test_embeddings_may_come_from_the_engine(make_model: Make, ids: torch.Tensor) -> None:
    model = make_model("3-window")
    with torch.no_grad():
        given = model.model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state
        assert torch.equal(given, model.model(input_ids=ids).last_hidden_state)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model.model(input_ids=ids, inputs_embeds=given)


@pytest.mark.parametrize("generation", ["1", "3-window"])
def test_the_parallel_plans_name_modules_that_exist(generation: str, make_model: Make) -> None:
    model = make_model(generation)
    modules = {name for name, _ in model.model.named_modules()}
    for pattern in model.config.base_model_tp_plan:
        assert pattern.replace("*", "0") in modules
    for name in model.config.base_model_pp_plan:
        assert name in modules
    assert set(model._tied_weights_keys) <= set(model.state_dict())


@pytest.mark.parametrize("generation", ["1", "2", "3-window"])
def test_generate_is_the_same_under_the_stock_attention(generation: str, make_model: Make, ids: torch.Tensor) -> None:
    model = make_model(generation, dtype=torch.float32)
    one = model.generate(ids[:1, :9], do_sample=False, max_new_tokens=12, pad_token_id=0)
    model.set_attn_implementation("sdpa")
    other = model.generate(ids[:1, :9], do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert torch.equal(one, other)


def test_each_layer_compiles_alone_without_a_break(make_model: Make, ids: torch.Tensor) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    model = make_model("3-window", dtype=torch.float32)
    expected = model(input_ids=ids, shift_labels=ids, loss_reduction="sum", use_cache=False).loss
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    found = model(input_ids=ids, shift_labels=ids, loss_reduction="sum", use_cache=False).loss
    torch.testing.assert_close(found, expected)


def test_auto_classes_find_the_published_names(make_model: Make, tmp_path: Path) -> None:
    from argonne.model import ArgonneModel
    from argonne.model.modeling_argonne import Argonne1ForCausalLM

    assert ArgonneModel is ArgonneForCausalLM
    make_model("1").save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is Argonne1ForCausalLM
