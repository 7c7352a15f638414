"""The benchmarks measure what they say: the harness's arithmetic, and that each contestant runs at a tiny size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from argonne.stages.trial import timed_steps
from benchmarks import decode, harness, packing, reference, render, serving, start_up, train_step
from benchmarks.all import MODULES
from benchmarks.harness import Benchmark, Column, markdown, measure, save, write_table
from benchmarks.own_loop import make_recipe

TINY = {
    "vocab": 64,
    "hidden": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "mlp": 64,
    "length": 16,
    "rows": 2,
    "steps": 2,
}
FACTS = {
    "cpu": "a CPU",
    "cores": "2",
    "python": "3",
    "torch": "2",
    "transformers": "5",
    "date": "today",
    "commit": "abc",
}


def make_benchmark(**changes: object) -> Benchmark:
    values = {
        "name": "toy",
        "module": "toy",
        "contestants": {"ours": lambda point: {}, "theirs": lambda point: {}},
        "points": {"small": "Small"},
        "columns": (Column("speed", "tokens/s"), Column("memory", "MB")),
        "relative_to": "theirs",
    }
    return Benchmark(**{**values, **changes})  # type: ignore[arg-type]


def record(point: str = "small", commit: str = "abc", **rounds: list[float]) -> dict[str, object]:
    results = {name: [{"speed": speed, "memory": 10.0} for speed in speeds] for name, speeds in rounds.items()}
    return {
        "command": "python -m toy",
        "points": {point: {"machine": {**FACTS, "commit": commit}, "rounds": 3, "results": results}},
    }


def test_the_table_shows_median_spread_and_ratio() -> None:
    table = markdown(make_benchmark(), record(ours=[300, 200, 100], theirs=[90, 100, 400]))
    assert "| ours | 200 (100 to 300) | 10 (10 to 10) | 2.00x |" in table
    assert "| theirs | 100 (90 to 400) | 10 (10 to 10) | 1.00x |" in table
    assert "python -m toy" in table


def test_where_less_is_better_the_ratio_turns_round() -> None:
    table = markdown(make_benchmark(higher_is_better=False), record(ours=[2], theirs=[1]))
    assert "| ours | 2 (2 to 2) | 10 (10 to 10) | 0.50x |" in table


def test_the_share_of_the_limit_stands_beside_the_rate() -> None:
    table = markdown(make_benchmark(limit="theirs"), record(ours=[25], theirs=[100]))
    assert "| ours | 25 (25 to 25) | 10 (10 to 10) | 0.25x | 25 % |" in table
    assert "| of the limit |" in table


def test_points_measured_one_by_one_end_in_one_table_each_with_its_commit(tmp_path: Path) -> None:
    benchmark = make_benchmark(points={"small": "Small", "large": "Large"})
    save(benchmark, record("large", commit="first", ours=[1], theirs=[2]), tmp_path)
    save(benchmark, record("small", commit="second", ours=[3], theirs=[4]), tmp_path)
    joined = save(benchmark, record("large", commit="third", ours=[5], theirs=[6]), tmp_path)
    assert joined == json.loads((tmp_path / "toy.json").read_text())
    assert [(point, found["machine"]["commit"]) for point, found in joined["points"].items()] == [
        ("small", "second"),
        ("large", "third"),
    ]
    table = markdown(benchmark, joined)
    assert (
        table.index("**Small**") < table.index("commit second") < table.index("**Large**") < table.index("commit third")
    )


def test_a_contestant_that_failed_is_in_the_table() -> None:
    assert "| ours | failed |" in markdown(make_benchmark(), record(ours=[], theirs=[1]))


def test_rounds_are_interleaved_forwards_and_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def child(benchmark: Benchmark, name: str, point: str) -> dict[str, float] | None:
        order.append(name)
        return None if name == "theirs" else {"speed": 1.0, "memory": 1.0}

    monkeypatch.setattr(harness, "_run_child", child)
    results, failures = measure(make_benchmark(), ["ours", "theirs"], ["small"], 3)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert failures == 3
    assert len(results["small"]["ours"]) == 3


def test_a_table_replaces_only_what_stands_between_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- toy begin -->\nold\n<!-- toy end -->\nafter\n")
    write_table(document, "toy", "new")
    assert document.read_text() == "before\n<!-- toy begin -->\nnew\n<!-- toy end -->\nafter\n"
    with pytest.raises(ValueError, match="no markers"):
        write_table(document, "other", "new")


def test_the_documents_have_a_place_for_every_table() -> None:
    text = harness.DOCUMENT.read_text()
    for name in (*MODULES, "mfu"):
        assert f"<!-- {name} begin -->" in text
        assert f"<!-- {name} end -->" in text


@pytest.mark.parametrize("preset", ["nano-2.5", "nano-3.0"])
def test_the_own_loop_trains_the_shape_it_is_given(preset: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))
    after: list[int] = []
    seconds = timed_steps(make_recipe(preset, TINY), ids, tmp_path, 2, after_first=lambda: after.append(1))
    assert seconds > 0
    assert after == [1]


@pytest.mark.parametrize("contestant", ["LlamaForCausalLM, plain loop", "LlamaForCausalLM, fused AdamW"])
def test_the_llama_contestants_run(contestant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_step.SHAPES, "tiny", TINY)
    found = train_step.BENCHMARK.contestants[contestant]("tiny")
    assert found["tokens_per_second"] > 0
    assert found["peak_mb"] > 10


def test_the_hugging_face_contestant_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="the Hugging Face Trainer needs accelerate")
    monkeypatch.setitem(train_step.SHAPES, "tiny", TINY)
    assert train_step.hugging_face_trainer("tiny")["tokens_per_second"] > 0


def test_llama_and_2x_have_the_same_number_of_parameters() -> None:
    from argonne.model.build import config_from_fields, count_parameters
    from argonne.stages.start import architecture_fields

    for shape in (*train_step.SHAPES.values(), TINY):
        if shape["vocab"] < 10_000:
            ours = count_parameters(config_from_fields(architecture_fields(make_recipe("nano-2.5", shape).model)))
            assert ours == sum(parameter.numel() for parameter in train_step.llama(shape).parameters())


def test_a_command_is_timed_to_its_end() -> None:
    assert 0 < start_up.seconds([Path(sys.executable).name, "-c", "pass"])["seconds"] < 60


def test_a_benchmark_without_its_data_says_so_and_is_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert harness.main(make_benchmark(needs=tmp_path / "none.jsonl"), ["--rounds", "1"]) == 0
    assert "toy: not measured, " in capsys.readouterr().err


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small rows and a few generated conversations for the benchmark of packing."""
    monkeypatch.setattr(render, "documents", lambda: [f"{number} is a number. " * 20 for number in range(9)])
    render.write(tmp_path / "few.jsonl", 40)
    for name, value in {"CONVERSATIONS": tmp_path / "few.jsonl", "CACHE": tmp_path, "EVERY": 1, "ROWS": 2}.items():
        monkeypatch.setattr(packing, name, value)


@pytest.mark.usefixtures("few")
def test_padding_and_packing_go_once_through_the_same_conversations_within_the_same_budget() -> None:
    account = packing.open_data().rendered[0].account
    padded, packed = list(packing.padded()), list(packing.packed())
    assert sum(count for _, count in padded) == account.trained_tokens
    assert sum(count for _, count in packed[:-1]) < account.trained_tokens <= sum(count for _, count in packed)
    for micro, count in (*padded, *packed):
        assert micro["input_ids"].numel() <= packing.ROWS * packing.LENGTH
        assert int((micro["shift_labels"] >= 0).sum()) == count
    assert len(padded) > len(packed)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("contestant", packing.BENCHMARK.contestants)
def test_both_ways_to_batch_conversations_run(contestant: str) -> None:
    found = packing.BENCHMARK.contestants[contestant]("oasst")
    assert found["rate"] > 0
    assert 0 < found["share"] < 100


def test_messages_become_rows_by_both_ways_at_the_number_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: Path
) -> None:
    monkeypatch.setattr(render, "documents", lambda: [f"{number} is a number. " * 20 for number in range(9)])
    monkeypatch.setattr(render, "tokenizer_folder", lambda: tokenizer_folder)
    render.write(tmp_path / "few.jsonl", 30)
    monkeypatch.setattr(render, "source", lambda count: tmp_path / "few.jsonl")
    made = render.benchmark(30)
    assert list(made.points) == ["30"]
    for contestant in list(made.contestants)[:3]:
        found = made.contestants[contestant]("30")
        assert found["rate"] == pytest.approx(30 / found["seconds"])
    assert made.flags == " --conversations 30"


@pytest.fixture
def few_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small rows, few steps and a few generated pairs for the benchmark of the reference."""

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": said("user", f"What is {n} + 1?"),
            "chosen": said("assistant", f"{n + 1}"),
            "rejected": said("assistant", f"The answer is {n + 1}, I think"),
        }
        for n in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"model.hidden_size": "32", "model.num_hidden_layers": "2", "model.intermediate_size": "64"}
    values = {"LENGTH": 256, "ROWS": 2, "WORDS": 400, "STEPS": 2, "CACHE": tmp_path / "cache"}
    shapes = {"whole": {**small, "train.loss": "full", "model.vocab_size": "400"}}
    for name, value in {**values, "PAIRS": tmp_path / "pairs.jsonl", "SHAPES": shapes}.items():
        monkeypatch.setattr(reference, name, value)


@pytest.mark.usefixtures("few_pairs")
@pytest.mark.parametrize("contestant", [reference.CACHED, reference.LIVE])
def test_both_ways_to_have_a_reference_run(contestant: str) -> None:
    found = reference.BENCHMARK.contestants[contestant]("whole")
    assert found["rate"] > 0
    assert ("pass" in found) == (contestant == reference.CACHED)


@pytest.mark.campaign
@pytest.mark.usefixtures("few_pairs")
def test_trl_tunes_on_the_pairs_of_the_benchmark() -> None:
    assert reference.trl("whole")["rate"] > 0


def test_clients_at_once_are_served_whole_and_timed() -> None:
    found = serving.measure(3, 6, tokens=2)
    assert found["rate"] > 0
    assert 0 < found["first"] <= found["slow"]


def test_a_contestant_that_takes_no_part_at_a_point_is_not_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[tuple[str, str]] = []
    monkeypatch.setattr(
        harness, "_run_child", lambda benchmark, name, point: run.append((name, point)) or {"speed": 1.0}
    )
    benchmark = make_benchmark(
        points={"small": "Small", "large": "Large"}, takes_part=lambda name, point: (name, point) != ("ours", "large")
    )
    results, failures = measure(benchmark, ["ours", "theirs"], ["small", "large"], 1)
    assert run == [("ours", "small"), ("theirs", "small"), ("theirs", "large")]
    assert list(results["large"]) == ["theirs"]
    assert failures == 0


@pytest.fixture
def tiny_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "tiny-2.x"):
        monkeypatch.setitem(decode.SIZES, name, (32, 2, 4, 2, 64, 2048))
    monkeypatch.setattr(decode, "NEW", 4)
    monkeypatch.setattr(decode, "bytes_a_second", lambda: 1e10)


@pytest.mark.usefixtures("tiny_decode")
def test_the_engine_and_transformers_give_as_many_tokens_and_the_same() -> None:
    assert list(decode.benchmark(["tiny"], [1, 8]).points) == ["tiny-1", "tiny-8"]
    for name, contestant in decode.BENCHMARK.contestants.items():
        if decode.takes_part(name, "tiny-8"):
            assert contestant("tiny-8")["rate"] > 0
    model, rows = decode.build("tiny"), decode.prompts(3)
    assert decode.engine(model, rows, 4) == decode.transformers(model, rows, 4) == 12


@pytest.mark.usefixtures("tiny_decode")
@pytest.mark.skipif(bool(decode.MISSING), reason="llama_cpp is not installed (pip install llama-cpp-python)")
def test_llama_cpp_answers_several_prompts_at_once_as_the_model_does() -> None:
    from benchmarks.llama_cpp_engine import Engine, generate

    model, rows = decode.build("tiny-2.x"), decode.prompts(3)
    found = generate(Engine(model, "f32", 3, decode.PROMPT + 4), rows, 4)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert found == model.generate(torch.tensor(rows), **settings)[:, decode.PROMPT :].tolist()
    for name in decode.LLAMA_CPP:
        assert decode.BENCHMARK.contestants[name]("tiny-2.x-8")["rate"] > 0
    assert not decode.takes_part("llama.cpp f32", "tiny-8")


@pytest.mark.usefixtures("tiny_decode")
def test_the_memorys_limit_is_what_reading_every_weight_once_allows() -> None:
    weights = decode.read_weights(decode.build("tiny-2.x"))
    assert weights == 2048 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert decode.limit("tiny-2.x-8", decode.FP32)["rate"] == pytest.approx(8 * 1e10 / (4 * weights))
    found = decode.measure(decode.engine, "tiny-2.x-8", decode.INT8)
    assert found["share"] == pytest.approx(100 * found["rate"] / (8 * 1e10 / weights))
