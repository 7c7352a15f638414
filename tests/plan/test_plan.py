"""The arithmetic of a plan: parameters, FLOPs, lengths, layouts, what fits, what it says."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.cli import main
from argonne.config import BatchChange, BatchSection, ModelSection, Recipe
from argonne.data.dataset import open_training_data
from argonne.errors import InputError
from argonne.plan import (
    choose_setup,
    compare_plan,
    device,
    device_peak_flops,
    flops_per_token,
    make_plan,
    plan_lines,
    plan_of_run,
    running_device,
    shape_of,
)
from argonne.plan.build import steps_within, tokens_before, total_steps
from argonne.plan.devices import HALF_USE_PARAMETERS
from argonne.plan.memory import Setup, memory_of
from argonne.plan.published import MEASURED
from argonne.plan.shape import mean_keys
from argonne.presets import presets
from argonne.recipe import load_recipe, recipe_names
from argonne.report.records import read_metrics
from argonne.tokens.formats import open_tokens

ROOT = Path(__file__).parent.parent.parent
CARDS = [("h200", 1), ("h200", 3), ("a100-80gb", 8), ("rtx-4090", 1)]


@pytest.mark.parametrize("name", presets())
def test_the_arithmetic_counts_the_parameters_of_the_real_modules(name: str) -> None:
    from argonne.model.build import config_from_fields, count_parameters

    fields = presets()[name].fields
    assert shape_of(fields).parameters() == count_parameters(config_from_fields(fields))


@pytest.mark.parametrize("name", [name for name, preset in presets().items() if preset.parameters])
def test_published_totals_close(name: str) -> None:
    assert shape_of(presets()[name].fields).parameters() == presets()[name].parameters


@st.composite
def small_models(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    fields = {
        "vocab_size": draw(st.integers(5, 40)),
        "hidden_size": 2 * draw(st.integers(2, 8)),
        "num_hidden_layers": layers,
        "num_attention_heads": keys * draw(st.integers(1, 3)),
        "num_key_value_heads": keys,
        "head_dim": 2 * draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(3, 20)),
        "max_position_embeddings": 16,
        "rope_theta": 1e4,
        "position_embedding": draw(st.sampled_from(["rope", "learned"])),
        "norm_type": draw(st.sampled_from(["rms", "layer"])),
    }
    switches = (
        "mlp_gated",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "q_norm",
        "k_norm",
        "v_norm",
        "sandwich_norm",
    )
    return {**fields, **{name: draw(st.booleans()) for name in switches}}


@given(small_models())
def test_any_mixture_of_fields_counts_like_its_modules(fields: dict[str, Any]) -> None:
    from argonne.model.build import config_from_fields, count_parameters

    assert shape_of(fields).parameters() == count_parameters(config_from_fields(fields))


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_fields_that_nothing_sets_mean_what_the_config_class_says(position: str) -> None:
    from argonne.model.build import config_from_fields, count_parameters

    fields = {
        "vocab_size": 30,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "position_embedding": position,
        "rope_theta": 1e4,
    }
    assert shape_of(fields).parameters() == count_parameters(config_from_fields(fields))


@given(st.integers(1, 60), st.one_of(st.none(), st.integers(1, 70)))
def test_mean_keys_is_the_mean_of_what_each_query_sees(length: int, window: int | None) -> None:
    seen = [min(query, window or query) for query in range(1, length + 1)]
    assert mean_keys(length, window) == pytest.approx(sum(seen) / length)


def test_flops_count_head_and_window_and_not_the_look_up() -> None:
    fields = {
        "vocab_size": 100,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 4,
        "intermediate_size": 16,
    }
    full = flops_per_token(fields, 9)
    products = 2 * (4 * 8 * 8 + 3 * 8 * 16) + 100 * 8
    assert full == 6 * products + 12 * 8 * 2 * 5
    windowed = flops_per_token(
        {**fields, "layer_types": ("full_attention", "sliding_attention"), "sliding_window": 1}, 9
    )
    assert full - windowed == 12 * 8 * (5 - 1)


def test_torchs_own_counter_agrees_on_every_product_with_a_weight() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from argonne.model.build import build_model, config_from_fields

    fields = {**presets()["nano-2.5"].fields, "num_hidden_layers": 2, "layer_types": None}
    model = build_model(config_from_fields(fields), seed=1)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros((1, 64), dtype=torch.int64)).logits.sum().backward()
    counted = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    attention = (
        2 * 12 * 128 * mean_keys(64, None)
    )  # torch counts attention's products in full, the plan the half that a causal mask leaves
    assert counted == 64 * (flops_per_token(fields, 64) - attention)


@given(
    st.integers(1, 500),
    st.lists(st.tuples(st.integers(1, 80), st.integers(1, 50)), max_size=3, unique_by=lambda pair: pair[0]),
    st.integers(0, 9999),
)
def test_steps_within_is_the_largest_number_of_steps_that_the_tokens_pay_for(
    start: int, changes: list[tuple[int, int]], tokens: int
) -> None:
    batch = BatchSection(
        tokens_per_step=start, steps=tuple(BatchChange(step, per_step) for step, per_step in sorted(changes))
    )
    steps = steps_within(partial(tokens_before, batch), tokens)
    assert tokens_before(batch, steps) <= tokens < tokens_before(batch, steps + 1)


def test_a_schedule_that_does_not_fit_into_the_run_refuses_the_plan() -> None:
    told = {"train.steps": "none", "train.tokens": "40960", "schedule.warmup": "20"}
    (refusal,) = make_plan(load_recipe("nano-3.0", told)).refusals
    assert refusal.startswith("schedule.warmup: found 20 steps, more than the run's 10")


def test_a_length_that_makes_no_whole_step_is_refused() -> None:
    length = {"train.steps": "none", "train.tokens": "100"}
    with pytest.raises(InputError, match=r"100 tokens make no whole step of batch\.tokens_per_step = 4,096"):
        make_plan(load_recipe("nano-3.0", length))


def test_argonne_1_0_counts_both_batches() -> None:
    plan = make_plan(load_recipe("argonne-1.0-pretrain"), gpu="a100-80gb", gpus=8)
    assert plan.tokens == 2048 * (62_000 * 48 + 98_000 * 60)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize(("gpu", "gpus"), CARDS)
def test_every_recipe_has_a_plan_or_is_told_what_would_fit(name: str, gpu: str, gpus: int) -> None:
    recipe = load_recipe(name)
    plan = make_plan(recipe, gpu=gpu, gpus=gpus, price=2.0, name=name)
    assert plan.memory_total == pytest.approx(sum(plan.memory.values()))
    if plan.fits and recipe.train.epochs is not None:  # of data that is not here
        assert (plan.hours, plan.cost) == (None, None)
        assert any("length is in epochs" in warning for warning in plan.warnings)
        assert plan.tokens_per_second
    elif plan.fits:
        assert plan.memory_total <= (plan.memory_limit or 0)
        assert plan.hours is not None
        assert plan.cost == pytest.approx(plan.hours * gpus * 2.0)
        assert plan.tokens_per_second == pytest.approx((plan.tokens or 0) / plan.hours / 3600)
    else:
        assert plan.hours is None
        assert plan.advice
        assert "fit" in plan.advice
    text = "\n".join(plan_lines(plan))
    assert f"{plan.parameters:,}" in text
    assert ("DOES NOT FIT" in text) is not plan.fits
    json.dumps(plan.to_dict())


def test_a_recommended_layout_does_fit() -> None:
    recipe = load_recipe("argonne-3.0-pretrain")
    refused = make_plan(recipe, gpu="rtx-4090")
    assert not refused.fits
    assert "would fit on 8 x rtx-4090 (--gpus 8, --parallel.shard 8) or 1 x a100-80gb" in (refused.advice or "")
    sharded = load_recipe("argonne-3.0-pretrain", {"parallel.shard": "8"})
    assert make_plan(sharded, gpu="rtx-4090", gpus=8).refusals == []
    assert not make_plan(recipe, gpu="rtx-4090", gpus=4).fits
    assert make_plan(recipe, gpu="a100-80gb").fits


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    recipe = load_recipe("argonne-3.0-pretrain", {"train.activation_checkpointing": '"none"', "train.loss": '"full"'})
    plan = make_plan(recipe, gpu="h200")
    shape = shape_of(recipe.model, 1024)
    setup = Setup(1, 1024, "bf16", loss="full", accumulates=True)
    largest = max(
        rows
        for rows in range(1, 60)
        if memory_of(shape, dataclasses.replace(setup, rows=rows)).total <= (plan.memory_limit or 0)
    )
    assert plan.micro_rows <= largest
    assert -(-228 // plan.micro_rows) == -(-228 // largest)  # evened out over the same number of micro-batches


@given(
    st.integers(1, 8),
    st.sampled_from(["none", "every_nth", "full"]),
    st.sampled_from(["full", "chunked"]),
    st.booleans(),
)
def test_memory_grows_with_rows_and_checkpointing_never_costs_any(
    rows: int, checkpointing: str, loss: str, accumulates: bool
) -> None:
    shape = shape_of(presets()["argonne-3.0"].fields)
    setup = Setup(rows, 1024, "bf16", checkpointing, loss=loss, accumulates=accumulates)
    here = memory_of(shape, setup).total
    assert memory_of(shape, dataclasses.replace(setup, rows=rows + 1)).total > here
    assert memory_of(shape, dataclasses.replace(setup, activation_checkpointing="none")).total >= here
    assert memory_of(shape, dataclasses.replace(setup, shard=2)).total < here


@pytest.mark.parametrize(
    ("reported", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Tesla T4", None),
        ("Some Unknown Card", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_as_its_driver_names_it(reported: str, peak: float | None) -> None:
    assert device_peak_flops(reported, "bf16") == peak


def test_half_precision_without_bf16_and_fp32_as_tf32() -> None:
    assert device_peak_flops("Tesla T4", "fp16") == 65e12
    assert device_peak_flops("NVIDIA H200", "fp32") == 494.7e12


def test_a_run_on_an_unknown_card_is_planned_from_its_memory() -> None:
    recipe = load_recipe("argonne-2.5-pretrain")
    device = running_device("Some Unknown Card", 80e9)
    setup = choose_setup(recipe, device, world_size=2)
    plan = plan_of_run(recipe, setup, device, world_size=2)
    assert plan["fits"]
    assert plan["micro_rows"] == setup.rows
    assert plan["layout"]["replicate"] == 2
    assert plan["tokens_per_second"] is None


def test_what_the_recipe_names_is_not_chosen_again() -> None:
    asked = {"train.activation_checkpointing": '"full"', "train.loss": '"full"', "batch.micro": "3"}
    setup = choose_setup(load_recipe("argonne-2.5-pretrain", asked), running_device("NVIDIA H200"))
    assert (setup.rows, setup.activation_checkpointing, setup.loss) == (3, "full", "full")


def test_a_card_without_bf16_is_told_before_launch() -> None:
    with pytest.raises(InputError, match="t4 has no bf16"):
        make_plan(load_recipe("argonne-2.5-pretrain"), gpu="t4")


def test_an_unknown_device_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean 'h200'"):
        device("h2000")


def test_degrees_that_do_not_make_the_devices_are_refused() -> None:
    with pytest.raises(InputError, match="multiple of 2"):
        make_plan(load_recipe("argonne-2.5-pretrain", {"parallel.tensor": "2"}), gpu="h200", gpus=3)


def test_a_model_without_sizes_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.vocab_size: not set"):
        shape_of(ModelSection())


def test_a_continued_run_reads_the_sizes_of_the_model_it_starts_from(tmp_path: Any) -> None:
    folder = tmp_path / "run" / "final_model"
    folder.mkdir(parents=True)
    fields = {name: value for name, value in presets()["argonne-2.5"].fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    length = {
        "train.steps": "1",
        "schedule.warmup": "0",
        "schedule.kind": "constant",
        "schedule.decay": "none",
        "model.preset": "none",
    }
    recipe = load_recipe("nano-3.0", {**length, "model.init_from": json.dumps(str(tmp_path / "run"))})
    assert make_plan(recipe).parameters == 1_273_807_360
    recipe = load_recipe("nano-3.0", {**length, "model.init_from": json.dumps(str(tmp_path / "nothing"))})
    with pytest.raises(InputError, match=r"has no config\.json"):
        make_plan(recipe)


def test_passes_over_a_source_on_this_disk_are_counted(tmp_path: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"tokens": 1_000_000}))
    recipe = load_recipe("nano-3.0", {"data.sources": f'[{{ path = "{tmp_path}", max_epochs = 1.5 }}]'})
    plan = make_plan(recipe)
    assert plan.sources[0]["passes"] == pytest.approx(400 * 4096 / 1e6)
    assert any("will be refused" in warning for warning in plan.warnings)


@pytest.mark.parametrize("documents", ["packed", "first-window", "within"])
def test_a_pass_over_documents_is_counted_as_the_trainer_reads_them(
    nano: Callable[..., Recipe], tokens: Path, documents: str
) -> None:
    recipe = nano(**{"data.documents": f'"{documents}"', "train.steps": "none", "train.epochs": "2"})
    data = open_training_data(recipe.data, recipe.batch, 1)
    read = data.tokens_per_epoch
    assert (read < open_tokens(tokens).train.tokens / 2) == (documents != "packed")
    plan = make_plan(recipe)
    assert plan.steps == total_steps(recipe, data.tokens_before, lambda: read)
    assert plan.sources[0]["passes"] == pytest.approx(data.passes(plan.steps)["set"], rel=1e-3)
    assert plan.sources[0]["tokens"] == pytest.approx(read, rel=1e-3)


def test_the_released_tokens_of_a_source_are_no_passes_where_only_windows_of_documents_are_read() -> None:
    assert make_plan(load_recipe("argonne-2.5-midtrain"), name="argonne-2.5-midtrain").sources[0]["passes"] is None


def test_degrees_that_pretrain_refuses_are_told_and_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "argonne-2.5-pretrain", "--gpu", "h200", "--gpus", "2"]
    assert main([*asked, "--parallel.async_tensor", "true", "--json"]) == 2
    said = capsys.readouterr()
    assert "the run will be refused: parallel.async_tensor: found true" in said.err
    plan = json.loads(said.out)
    assert plan["refusals"][0].startswith("parallel.async_tensor: found true")
    assert any("will be refused" in warning for warning in plan["warnings"])
    assert main(asked) == 0


def test_replicas_that_fit_are_planned_and_not_shards() -> None:
    recipe = load_recipe("argonne-3.0-pretrain", {"train.activation_checkpointing": '"none"'})
    for gpus in (2, 8):
        plan = make_plan(recipe, gpu="h200", gpus=gpus)
        assert (plan.layout["replicate"], plan.refusals) == (gpus, [])


def test_a_run_whose_copy_does_not_fit_is_told_the_shard_that_does_before_it_starts() -> None:
    recipe, card = load_recipe("argonne-3.0-pretrain"), running_device("NVIDIA GeForce RTX 4090")
    with pytest.raises(InputError, match=r"would fit on 8 x rtx-4090 \(--parallel.shard 8\)"):
        choose_setup(recipe, card, world_size=8)
    sharded = load_recipe("argonne-3.0-pretrain", {"parallel.shard": "8"})
    setup = choose_setup(sharded, card, world_size=8)
    assert setup.shard == 8
    assert plan_of_run(sharded, setup, card, world_size=8)["layout"]["shard"] == 8


def test_what_does_not_fit_and_a_source_read_too_often_end_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "argonne-3.0-pretrain", "--gpu", "rtx-4090"]) == 2
    said = capsys.readouterr()
    assert "DOES NOT FIT" in said.out
    assert "will be refused" in said.err
    assert "--allow memory" in said.err
    (tmp_path / "manifest.json").write_text(json.dumps({"tokens": 1_000_000}))
    assert main(["plan", "nano-3.0", "--data.sources", f'[{{ path = "{tmp_path}" }}]']) == 2
    assert "max_epochs" in capsys.readouterr().err


def test_micro_batches_that_are_too_large_are_told_that_smaller_ones_fit() -> None:
    named = {"batch.micro": "500", "train.activation_checkpointing": '"none"', "train.loss": '"full"'}
    plan = make_plan(load_recipe("argonne-2.5-pretrain", named | {"batch.tokens_per_step": "1024000"}), gpu="h200")
    assert not plan.fits
    assert "1 x h200 with batch.micro" in (plan.advice or "")


@pytest.mark.parametrize(
    ("preset", "low", "high"), [("nano-3.0", 0.0, 0.02), ("argonne-1.5", 0.2, 0.4), ("argonne-3.0", 0.35, 0.4)]
)
def test_the_assumed_share_of_the_peak_falls_with_the_size_of_the_model(preset: str, low: float, high: float) -> None:
    recipe = load_recipe("argonne-3.0-pretrain", {"model.preset": f'"{preset}"', "model.layer_types": "none"})
    plan = make_plan(recipe, gpu="h200")
    assert plan.expected_mfu is not None
    assert low < plan.expected_mfu < high


def test_the_document_has_the_assumed_shares() -> None:
    rows = re.findall(r"^\| ([\d,]+)M \| ([\d.]+) % \|", (ROOT / "docs" / "plan.md").read_text(), re.MULTILINE)
    assert len(rows) == 7
    for millions, share in rows:
        parameters = 1e6 * float(millions.replace(",", ""))
        expected = 100 * device("h100").expected_use * parameters / (parameters + HALF_USE_PARAMETERS)
        assert float(share) == pytest.approx(expected, abs=0.06)


def test_published_hours_and_the_plans_own_errors_stand_beside_its_estimate() -> None:
    plan = make_plan(load_recipe("argonne-1.5-pretrain"), gpu="h200", gpus=8, name="argonne-1.5-pretrain")
    assert plan.published_hours == 156
    text = "\n".join(plan_lines(plan))
    assert "156 hours on 8 x a100-80gb" in text
    for measured in MEASURED:
        model = {"model.preset": f'"{measured.preset}"', "data.sequence_length": str(measured.sequence_length)}
        rows = {"batch.tokens_per_step": str(1024 * measured.sequence_length), "model.layer_types": "none"}
        again = make_plan(load_recipe("argonne-2.5-pretrain", model | rows), gpu=measured.device, gpus=measured.devices)
        ratio = (again.tokens_per_second or 0) / measured.tokens_per_second
        assert plan.past_errors[measured.release] == pytest.approx(ratio, rel=0.1)
        assert f"{plan.past_errors[measured.release]:.1f} times the {measured.tokens_per_second:,}" in text


def test_hours_that_nobody_published_are_left_out() -> None:
    plan = make_plan(load_recipe("argonne-3.0-pretrain"), name="argonne-3.0-pretrain")
    assert plan.published_hours is None
    assert "published: " not in "\n".join(plan_lines(plan))


def test_plan_against_measured_takes_what_counts_and_the_mean_of_the_session(tmp_path: Path) -> None:
    plan = make_plan(load_recipe("nano-3.0")).to_dict()

    def step(time: float, memory: float, speed: float) -> dict[str, Any]:
        speeds = {"tokens_per_second": 5 * speed, "tokens_per_second_mean": speed, "mfu": 0.5, "mfu_mean": 0.1}
        return {"event": "step", "step": 1, "time": time, "tokens": 4096, "memory_gb": memory, **speeds}

    records = [
        {"event": "start", "step": 0, "time": 0.0},
        step(10.0, 9.0, 1.0),
        {"event": "resume", "step": 0, "time": 100.0},
        step(1900.0, 0.5, 6000.0),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    metrics = read_metrics(tmp_path)
    found = {row["name"]: row for row in compare_plan(plan, metrics.records, metrics.hours)}
    assert found["memory_gb"]["measured"] == 0.5
    assert found["tokens_per_second"]["ratio"] == pytest.approx(6000.0 / plan["tokens_per_second"])
    assert (found["mfu"]["measured"], found["mfu"]["ratio"]) == (0.1, None)
    assert found["hours"]["measured"] == pytest.approx(1810 / 3600)


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; from argonne.plan import make_plan; from argonne.recipe import load_recipe; "
        "make_plan(load_recipe('nano-3.0')); "
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
