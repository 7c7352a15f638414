"""What users of transformers count on in any model: several copies of the code in one process, outputs by place, static
caches, a model split by a `device_map`, the Trainer's labels, attention weights, export and compile.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.nn import functional as F
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.loss.loss_utils import ForCausalLMLoss

from argonne.model import ArgonneForCausalLM
from argonne.model.save import save_model_folder

Make = Callable[..., ArgonneForCausalLM]
GENERATIONS = ["1", "2", "3-window"]


# --- copies of the code


def exported(model: ArgonneForCausalLM, folder: Path) -> Any:
    """The model as an export brings it: with its own copy of the code."""
    folder.mkdir()
    save_model_folder(model, folder, eos_id=None)
    name = f"modeling_argonne.{type(model).__name__}"
    code: Any = get_class_from_dynamic_module(name, str(folder))
    return code.from_pretrained(folder).eval()


def test_two_exports_in_one_process_run_by_their_own_code(make_model: Make, ids: torch.Tensor, tmp_path: Path) -> None:
    models = [make_model("3-window", seed=seed) for seed in (0, 1)]
    one, other = (exported(model, tmp_path / f"export{number}") for number, model in enumerate(models))
    assert len({type(model).__module__ for model in (one, other, models[0])}) == 3
    for model, copy in zip(models, (one, other), strict=True):
        assert torch.equal(copy(input_ids=ids).logits, model(input_ids=ids).logits)
        assert copy.attention_paths() == model.attention_paths()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    alone = models[0].generate(ids[:1, :20], **settings)
    assert torch.equal(one.generate(ids[:1, :20], assistant_model=other, **settings), alone)


# --- outputs by place


@pytest.mark.parametrize("generation", GENERATIONS)
def test_outputs_come_as_loss_logits_cache(generation: str, make_model: Make, ids: torch.Tensor) -> None:
    model = make_model(generation)
    out = model(input_ids=ids, labels=ids, use_cache=True, output_hidden_states=True)
    assert list(out) == ["loss", "logits", "past_key_values", "hidden_states"]
    assert out[0] is out.loss
    assert out[1] is out.logits
    parts = model(input_ids=ids, labels=ids, use_cache=True, return_dict=False)
    assert parts[0].dim() == 0
    assert parts[1].shape == (*ids.shape, 97)
    assert model(input_ids=ids, use_cache=True, return_dict=False)[0].shape == (*ids.shape, 97)
    summed = model(input_ids=ids, shift_labels=ids, return_token_log_probs=True, return_dict=False, use_cache=False)
    assert [part.shape for part in summed] == [(), ids.shape]
    model.config.return_dict = False
    assert isinstance(model(input_ids=ids), tuple)
    assert isinstance(model.model(input_ids=ids), tuple)


# --- static caches


@pytest.mark.parametrize("length", [1, 5, 20])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("generation", ["1", "2", "3", "3-window"])
def test_generate_with_a_static_cache_is_generate(
    generation: str, padded: bool, length: int, make_model: Make, ids: torch.Tensor
) -> None:
    model = make_model(generation)
    mask = torch.ones_like(ids[:, :length])
    if padded:
        mask[0, : length // 2] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 14, "pad_token_id": 0}
    expected = model.generate(ids[:, :length], **settings)
    assert torch.equal(model.generate(ids[:, :length], cache_implementation="static", **settings), expected)


# --- a model split by a device_map


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", ["argonne", "sdpa"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_layer_on_another_device_gets_everything_there(
    generation: str, implementation: str, packed: bool, make_model: Make, ids: torch.Tensor
) -> None:
    """The second half lies on `meta`, as a second GPU would: accelerate's hook moves what each module is given."""
    model = make_model(generation)
    model.set_attn_implementation(implementation)
    for module in (*model.model.layers[2:], model.model.norm, model.lm_head):
        add_hook_to_module(module.to("meta"), AlignDevicesHook(execution_device="meta"))
    more: dict[str, Any] = {}
    if packed:
        more["position_ids"] = torch.cat([torch.arange(13), torch.arange(27)])[None]
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    more = more if packed and implementation == "sdpa" else {**more, "attention_mask": mask}
    out = model(input_ids=ids, labels=ids, use_cache=True, **more)
    assert out.logits.device.type == out.loss.device.type == "meta"
    devices = [layer.keys.device.type for layer in out.past_key_values.layers]
    assert devices == ["cpu", "cpu", "meta", "meta"]
    step = model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    assert step.logits.shape == (2, 1, 97)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_model_kept_partly_on_disk_computes_the_same(
    generation: str, make_model: Make, ids: torch.Tensor, tmp_path: Path
) -> None:
    from accelerate import dispatch_model

    model = make_model(generation)
    loss, logits = model(input_ids=ids, labels=ids, use_cache=False).to_tuple()
    places = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    devices = {f"model.{name}": place for name, place in places.items()}
    devices |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    devices["lm_head"] = "cpu" if model.config.tie_word_embeddings else "disk"
    split = dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    found = split(input_ids=ids, labels=ids, use_cache=False)
    torch.testing.assert_close(found.logits, logits, rtol=0, atol=0)
    torch.testing.assert_close(found.loss, loss, rtol=0, atol=0)
    if model.config.tie_word_embeddings:
        own = split(input_ids=ids, shift_labels=ids, loss_reduction="sum", use_cache=False).loss
        expected = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=0)
    else:
        with pytest.raises(ValueError, match="lm_head is offloaded"):
            split(input_ids=ids, shift_labels=ids, use_cache=False)


# --- labels


@pytest.mark.parametrize("generation", GENERATIONS)
def test_shift_labels_mean_what_they_mean_in_transformers(generation: str, make_model: Make, ids: torch.Tensor) -> None:
    model = make_model(generation, dtype=torch.float32)
    logits = model(input_ids=ids, use_cache=False).logits
    targets = ids.roll(-1, 1).masked_fill(torch.rand(ids.shape) < 0.3, -100)
    for items in (None, 7, torch.tensor(7)):
        how: dict[str, Any] = {"shift_labels": targets, "num_items_in_batch": items}
        theirs = ForCausalLMLoss(logits, None, 97, **how)
        alone = model(input_ids=ids, use_cache=False, **how)
        torch.testing.assert_close(alone.loss, theirs)
        assert alone.logits is None
        both = model(input_ids=ids, labels=ids, use_cache=False, **how)  # as the Trainer under context parallelism
        torch.testing.assert_close(both.loss, theirs)
        torch.testing.assert_close(both.logits, logits)
    summed = model(input_ids=ids, shift_labels=targets, loss_reduction="sum", use_cache=False).loss
    torch.testing.assert_close(summed, ForCausalLMLoss(logits, None, 97, shift_labels=targets, num_items_in_batch=1))
    both = model(input_ids=ids, labels=ids, shift_labels=targets, loss_reduction="sum", use_cache=False)
    torch.testing.assert_close(both.loss, summed)


# --- attention weights


@pytest.mark.parametrize("generation", ["1", "2", "3", "3-window"])
def test_eager_attention_gives_its_weights(generation: str, make_model: Make, ids: torch.Tensor) -> None:
    model = make_model(generation)
    model.set_attn_implementation("eager")
    out = model(input_ids=ids, output_attentions=True)
    assert [weights.shape for weights in out.attentions] == [(2, 6, 40, 40)] * 4
    for weights, kind in zip(out.attentions, model.config.layer_types, strict=True):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        window = 9 if kind == "sliding_attention" else 40
        seen = torch.ones(40, 40, dtype=torch.bool).tril().triu(1 - window)
        assert torch.equal(weights > 0, seen.expand_as(weights))
    assert model(input_ids=ids, output_attentions=True, return_dict=False)[-1][0].shape == (2, 6, 40, 40)
    made = model.generate(
        ids[:, :6],
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    assert [step[0].shape[2] for step in made.attentions] == [6, 1, 1]


@pytest.mark.parametrize("implementation", ["argonne", "sdpa"])
def test_attention_weights_of_a_kernel_that_keeps_none_are_refused(
    implementation: str, make_model: Make, ids: torch.Tensor
) -> None:
    model = make_model("2")
    model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=f"output_attentions.*{implementation}.*attn_implementation='eager'"):
        model(input_ids=ids, output_attentions=True)


# --- export and compile


PACKED = torch.cat([torch.arange(13), torch.arange(27)])[None].expand(2, -1)
LEFT = torch.ones(2, 40, dtype=torch.int64)
LEFT[0, :6] = 0
INPUTS: dict[str, dict[str, Any]] = {
    "ids alone": {},
    "a padding mask": {"attention_mask": LEFT},
    "a mask of ones": {"attention_mask": torch.ones_like(LEFT)},
    "documents": {"position_ids": PACKED},
    "documents and a mask of ones": {"position_ids": PACKED, "attention_mask": torch.ones_like(LEFT)},
    "positions of a padded row": {"position_ids": (LEFT.cumsum(-1) - 1).clamp_min(0), "attention_mask": LEFT},
}


def real(tensor: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """What is computed for tokens that are no padding."""
    return tensor[inputs.get("attention_mask", torch.ones_like(LEFT)).bool()]


TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2}
TRACED = {"1": TWO_LAYERS, "3-window": {**TWO_LAYERS, "layer_types": ["full_attention", "sliding_attention"]}}
# Seconds each: two are ordinary tests, the others a campaign.
ORDINARY = {("1", "documents"), ("3-window", "positions of a padded row")}
TRACED_INPUTS = [
    pytest.param(*case, marks=[] if case in ORDINARY else pytest.mark.campaign)
    for case in itertools.product(TRACED, INPUTS)
]


@pytest.mark.parametrize(("generation", "inputs"), TRACED_INPUTS)
def test_the_whole_model_compiles_without_a_break(
    generation: str, inputs: str, make_model: Make, ids: torch.Tensor
) -> None:
    model, given = make_model(generation, **TRACED[generation]), INPUTS[inputs]
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False, **given).logits
        found = torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids, use_cache=False, **given).logits
    torch.testing.assert_close(real(found, given), real(expected, given), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("generation", "inputs"), TRACED_INPUTS)
def test_an_exported_program_takes_any_length(
    generation: str, inputs: str, make_model: Make, ids: torch.Tensor
) -> None:
    model, given = make_model(generation, **TRACED[generation]), INPUTS[inputs]
    rows, length = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("length", min=2, max=96)
    example = {"input_ids": ids, **given}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model,
            (),
            {**example, "use_cache": False},
            dynamic_shapes={**{name: {0: rows, 1: length} for name in example}, "use_cache": None},
        )
        for start, stop in ((0, 40), (3, 9), (7, 33)):
            part = {name: tensor[:, start:stop] for name, tensor in example.items()}
            part = {name: tensor.repeat(2, 1) for name, tensor in part.items()}
            expected = model(**part, use_cache=False).logits
            found = program.module()(**part, use_cache=False).logits
            seen = part.get("attention_mask", torch.ones_like(part["input_ids"])).bool()
            torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-10)


# --- gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stride", [1, 3])
def test_recomputation_goes_the_way_that_transformers_was_asked_for(
    reentrant: bool, stride: int, make_model: Make, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, plain), asked = (make_model("3-window").train() for _ in range(2)), []

    def checkpoint(layer: torch.nn.Module, *given: Any, **how: Any) -> Any:
        asked.append((layer, how["use_reentrant"]))
        return torch.utils.checkpoint.checkpoint(layer, *given, **how)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", checkpoint)
    kwargs = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs, every_n_layers=stride)
    model(input_ids=ids, labels=ids).loss.backward()
    assert asked == [(layer, reentrant) for layer in model.model.layers[::stride]]
    plain(input_ids=ids, labels=ids).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("how", ["gradient_checkpointing_enable", "configure_training"])
def test_recomputation_and_a_cache_do_not_go_together(how: str, make_model: Make, ids: torch.Tensor) -> None:
    from transformers import DynamicCache

    model = make_model("3-window").train()
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    getattr(model, how)(**({"activation_checkpointing": "full"} if how == "configure_training" else {}))
    cache = DynamicCache(config=model.config)
    with pytest.warns(UserWarning, match="incompatible with gradient checkpointing"):
        out = model(input_ids=ids, labels=ids, use_cache=True, past_key_values=cache)
    out.loss.backward()
    assert cache.get_seq_length() == 0
    assert out.past_key_values is None
    torch.testing.assert_close(out.loss, expected)
    model.eval()
    assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 40
