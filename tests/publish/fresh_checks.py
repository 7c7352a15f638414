"""Run as a script in a fresh process by test_fresh_process.py: what users of transformers do with two exports, offline
and with argonne blocked. Prints a line for each check that holds.

Usage: python fresh_checks.py EXPORT OTHER_EXPORT
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 1e4}


def load(folder: str) -> Any:
    how: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True, "dtype": torch.float64}
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def two_exports(folder: str, other: str, ids: torch.Tensor) -> None:
    alone = load(folder)(input_ids=ids).logits
    one, two = load(folder), load(other)
    assert type(one) is not type(two)
    assert one(input_ids=ids).logits.equal(alone)
    assert not two(input_ids=ids).logits.equal(alone)
    plain = one.generate(ids[:1, :20], **GREEDY)
    assert one.generate(ids[:1, :20], assistant_model=two, **GREEDY).equal(plain)


def outputs(folder: str, ids: torch.Tensor) -> None:
    model = load(folder)
    for out in (model(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids, return_dict=False)):
        loss = F.cross_entropy(out[1][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(out[0].double(), loss, rtol=1e-5, atol=0)  # transformers takes it in fp32


def static_cache(folder: str, ids: torch.Tensor) -> None:
    model, mask = load(folder), torch.ones_like(ids[:, :20])
    mask[0, :7] = 0
    for more in ({}, {"attention_mask": mask}):
        expected = model.generate(ids[:, :20], **GREEDY, **more)
        assert model.generate(ids[:, :20], cache_implementation="static", **GREEDY, **more).equal(expected)


def two_devices(folder: str, ids: torch.Tensor) -> None:
    model = load(folder)
    for module in (*model.model.layers[2:], model.model.norm, model.lm_head):
        add_hook_to_module(module.to("meta"), AlignDevicesHook(execution_device="meta"))
    out = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    assert out.logits.device.type == out.loss.device.type == "meta"
    assert [layer.keys.device.type for layer in out.past_key_values.layers] == ["cpu", "cpu", "meta", "meta"]
    assert model(input_ids=ids[:, :1], past_key_values=out.past_key_values).logits.shape[:2] == (2, 1)


def exported_program(folder: str, ids: torch.Tensor) -> None:
    model = load(folder)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    rows, length = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("length", min=2, max=96)
    example = {"input_ids": ids, "attention_mask": mask}
    shapes = {**{name: {0: rows, 1: length} for name in example}, "use_cache": None}
    program = torch.export.export(model, (), {**example, "use_cache": False}, dynamic_shapes=shapes).module()
    for start, stop in ((0, 40), (3, 9), (7, 33)):
        part = {name: tensor[:, start:stop].repeat(2, 1) for name, tensor in example.items()}
        seen = part["attention_mask"].bool()
        close(program(**part, use_cache=False).logits[seen], model(**part, use_cache=False).logits[seen])


def compiled(folder: str, ids: torch.Tensor) -> None:
    model = load(folder)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    positions = torch.cat([torch.arange(13), torch.arange(27)])[None].expand(2, -1)
    given = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids), "use_cache": False}
    close(whole(**given).logits, model(**given).logits)


def yarn(folder: str, ids: torch.Tensor) -> None:
    """Learned positions refuse it; rotary ones are Llama's."""
    model = load(folder)
    config = model.config
    plain = model(input_ids=ids).logits
    config.rope_parameters = dict(YARN)
    if config.position_embedding == "learned":
        try:
            config.check_architecture()
        except ValueError as error:
            if "rope_type is 'yarn'; learned positions have none" in str(error):
                return
        raise AssertionError("learned positions took rope_type yarn")
    sizes = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")
    llama = LlamaConfig(**{name: getattr(config, name) for name in sizes}, rope_parameters=dict(YARN))
    positions = torch.arange(90)[None]
    theirs = LlamaRotaryEmbedding(llama)(torch.zeros(1, dtype=torch.float64), positions)
    for own, their in zip(model.model.rotary_emb(positions, torch.float64), theirs, strict=True):
        torch.testing.assert_close(own, their[..., : own.shape[-1]], rtol=0, atol=1e-5)
    assert (model(input_ids=ids).logits - plain).abs().max() > 1e-3 * plain.abs().max()


def checkpointing(folder: str, ids: torch.Tensor) -> None:
    """1.x with the dropout that it trains with: what is run again draws the same."""
    model, plain = load(folder).train(), load(folder).train()
    model.gradient_checkpointing_enable()
    cache, losses = DynamicCache(config=model.config), []
    for one, more in ((model, {"use_cache": True, "past_key_values": cache}), (plain, {"use_cache": False})):
        torch.manual_seed(0)
        losses.append(one(input_ids=ids, labels=ids, **more).loss)
        losses[-1].backward()
    close(*losses)
    assert cache.get_seq_length() == 0
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        close(one.grad, other.grad)


def run(folder: str, other: str) -> None:
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(3))
    warnings.simplefilter("ignore")
    with torch.no_grad():
        two_exports(folder, other, ids)
        print("@@ two exports")
        for check in (outputs, static_cache, two_devices, exported_program, compiled, yarn):
            check(folder, ids)
            print(f"@@ {check.__name__.replace('_', ' ')}")
    checkpointing(folder, ids)
    print("@@ checkpointing")


if __name__ == "__main__":
    sys.modules["argonne"] = None  # type: ignore[assignment]
    run(*sys.argv[1:])
