"""Who is asked whether it computes an artifact, and what its answer is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from argonne.publish import proof
from argonne.publish.engines import DIFFERENT, EXACT, REFUSES, UNPROVEN, Standing
from argonne.publish.proof import Mismatch, ask_engines, expected_file, is_installed
from tests.model.conftest import GENERATIONS
from tests.publish.test_export import model_of

SOUND: dict[str, Any] = {"version": "mlx-lm 1", "relative_difference": 1e-7, "greedy_gap": 0.0}
PLACE = (Path("DIR"), Path("expected"))


@pytest.fixture
def found() -> dict[str, Standing]:
    return {engine: Standing(UNPROVEN, "by its sources") for engine in ("mlx", "vllm")}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with every engine; what each says."""
    said: dict[str, Any] = {"mlx": SOUND, "vllm": SOUND}
    monkeypatch.setattr(proof, "is_installed", lambda engine: True)
    monkeypatch.setattr(proof, "run_fresh", lambda artifact, expected, script, engine: said[engine])
    return said


@pytest.mark.usefixtures("answers")
def test_an_engine_that_computes_the_model_is_exact_with_its_version(found: dict[str, Standing]) -> None:
    assert ask_engines(("mlx", "vllm"), found, [], *PLACE) == {"mlx": SOUND}
    assert found["mlx"].verdict == EXACT
    assert "1.0e-07 of the largest (mlx-lm 1)" in found["mlx"].why


@pytest.mark.usefixtures("answers")
def test_what_takes_a_gpu_is_asked_where_it_is_wanted(found: dict[str, Standing]) -> None:
    assert list(ask_engines(("mlx", "vllm"), found, ["vllm"], *PLACE)) == ["mlx", "vllm"]
    assert found["vllm"].verdict == EXACT


@pytest.mark.usefixtures("answers")
def test_what_is_known_to_be_wrong_is_not_asked(found: dict[str, Standing]) -> None:
    found["mlx"] = Standing(REFUSES, "it knows no such model_type")
    assert ask_engines(("mlx",), found, [], *PLACE) == {}
    assert found["mlx"].verdict == REFUSES


@pytest.mark.parametrize("name", ["relative_difference", "greedy_gap"])
@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_another_model_stops_what_was_asked_for_and_is_said_of_what_was_not(
    name: str, value: float, found: dict[str, Standing], answers: dict[str, Any]
) -> None:
    answers["mlx"] = SOUND | {name: value}
    with pytest.raises(Mismatch, match=f"DIR: in mlx .* by {value:.1e} of the largest logit, allowed 1e-04"):
        ask_engines(("mlx",), found, ["mlx"], *PLACE)
    assert ask_engines(("mlx",), found, [], *PLACE) == {}
    assert found["mlx"].verdict == DIFFERENT
    assert found["mlx"].why.startswith("in mlx ")


def test_an_engine_that_is_not_installed_is_named_with_what_installs_it(
    found: dict[str, Standing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "is_installed", lambda engine: False)
    assert ask_engines(("mlx", "vllm"), found, ["mlx"], *PLACE) == {}
    assert found["mlx"] == Standing(
        UNPROVEN, "by its sources; not proven in mlx: it is not installed (pip install mlx-lm 'mlx[cpu]')"
    )


def test_what_is_not_there_is_not_installed() -> None:
    assert is_installed("transformers")
    assert not is_installed("vllm")


def test_the_text_expected_of_an_engine_is_greedy_whatever_the_models_settings_say() -> None:
    plain, model = model_of(GENERATIONS["2"]), model_of(GENERATIONS["2"])
    expected = proof.expectations(plain)
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.eos_token_id = int(expected["greedy_ids"][0, -1])
    assert proof.expectations(model)["greedy_ids"].equal(expected["greedy_ids"])


def test_a_process_that_fails_says_its_last_line(tmp_path: Path) -> None:
    with expected_file(model_of(GENERATIONS["2"]), {"a": 1}) as expected:
        assert json.loads(expected.with_suffix(".json").read_text()) == {"a": 1}
        with pytest.raises(Mismatch, match=r"does not load in a fresh process: \S+"):
            proof.run_fresh(tmp_path, expected)
    assert not expected.exists()
