"""Where an earlier run stood in its data: its next window exactly, or the beginning of the data, and only when that was
asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.config import Recipe
from argonne.data.dataset import open_training_data
from argonne.data.loader import Loader
from argonne.errors import InputError
from argonne.legacy.export_pt import export_pt
from argonne.legacy.position import carried_position
from argonne.legacy.training import TrainingFile
from argonne.recipe import load_recipe
from argonne.stages.pretrain import run
from argonne.train.checkpoint import LAST
from tests.legacy.family import ROWS, T, earlier_file, opened, sources, tokens_of
from tests.train.helpers import curve

Nano = Callable[..., Recipe]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_tokens_position_and_counters_carry_over_whatever_the_batch_was(data: st.DataObject, one_file: Path) -> None:
    stream = tokens_of(one_file)
    rows = data.draw(st.integers(1, (len(stream) - 1) // T - ROWS), label="rows read so far")
    steps = data.draw(st.integers(1, rows), label="steps so far")
    base = data.draw(st.sampled_from([(0, 0), (7, 7 * 1000 + 3)]), label="steps and tokens of other data before")
    content = {
        "data_position": rows * T,
        "dataset_base_global_step": base[0],
        "dataset_base_tokens_processed": base[1],
        "block_size": T,
    }
    file = TrainingFile(Path("checkpoint.pt"), base[0] + steps, base[1] + rows * T, content, {}, None, [])
    source = f'[{{ path = "{one_file}", max_epochs = 2 }}]'
    keys = {"data.sources": source, "data.sequence_length": str(T), "batch.tokens_per_step": str(ROWS * T)}
    recipe = load_recipe("nano-3.0", keys)
    carried = carried_position(file, recipe, from_start=False)
    found = open_training_data(recipe.data, recipe.batch, recipe.seed, state=json.loads(json.dumps(carried.state)))
    assert (found.tokens_before(file.step), found.rows(file.step)) == (file.tokens, ROWS)
    loader = Loader(found, 0, 1, ROWS, prefetch=0)
    batch = loader.batch(file.step).micro_batches[0]
    loader.close()
    expected = stream[rows * T : (rows + ROWS) * T + 1].astype(np.int64)
    assert np.array_equal(batch["input_ids"].numpy().ravel(), expected[:-1])
    assert np.array_equal(batch["shift_labels"].numpy().ravel(), expected[1:])


def unsuited(in_order: Nano, short_file: Path, one_file: Path) -> dict[str, tuple[Recipe, dict[str, Any], str]]:
    """Recipes and files whose position means nothing together: (recipe, content of the file, words of the message)."""
    plain = in_order()
    rows = {"current_file_idx": 7, "position_in_file": 1234}
    return {
        "other length": (
            in_order(**{"data.sequence_length": "64"}),
            {"block_size": T},
            "rows of 32 tokens, the recipe says 64",
        ),
        "a mixture": (in_order(**sources(one_file, short_file)), {}, "not one token file"),
        "another order": (in_order(**{"data.order": "shuffled"}), {}, "shuffled"),
        "file and row": (plain, {"data_position": rows}, "current_file_idx = 7, position_in_file = 1234"),
        "a later pass": (plain, {"data_position": 256}, "not the first pass"),
        "off the grid": (plain, {"data_position": 776, "tokens_processed": 776}, "no multiple"),
        "a longer file": (plain, {"dataset_num_tokens": 20_839_021_454}, "20,839,021,454 tokens"),
        "beyond the end": (plain, {"data_position": 32 * 10**6, "tokens_processed": 32 * 10**6}, "has only"),
        "no position": (plain, {"data_position": None}, "no count of tokens"),
    }


def test_a_position_that_means_nothing_in_the_data_needs_data_from_start(
    in_order: Nano, short_file: Path, one_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint_step_3.pt"
    for name, (recipe, content, words) in unsuited(in_order, short_file, one_file).items():
        earlier_file(path, recipe, **content)
        file = opened(path, recipe)
        with pytest.raises(InputError, match="--data-from-start") as refused:
            carried_position(file, recipe, from_start=False)
        assert words in str(refused.value), name
        carried = carried_position(file, recipe, from_start=True)
        data = open_training_data(recipe.data, recipe.batch, recipe.seed, state=carried.state)
        assert data.tokens_before(3) == file.tokens, name
        assert data.mixture.positions(3).get(data.sources[0].tokens.fingerprint) is None, name


def test_with_data_from_start_the_counters_go_on_and_the_data_begins(
    in_order: Nano, tokens: Path, tmp_path: Path
) -> None:
    recipe = in_order(**sources(tokens), **{"train.steps": "5"})
    earlier_file(tmp_path / "checkpoint_step_3.pt", recipe, data_position={"current_file_idx": 7})
    run(
        recipe, tmp_path / "new", resume_from=tmp_path / "checkpoint_step_3.pt", data_from_start=True, stop_after_step=4
    )
    run(recipe, tmp_path / "new", resume_from=tmp_path / "checkpoint_step_3.pt", data_from_start=True)
    assert [(record["step"], record["tokens"]) for record in curve(tmp_path / "new")] == [
        (4, 4 * ROWS * T),
        (5, 5 * ROWS * T),
    ]
    places = json.loads((tmp_path / "new" / LAST / "state.json").read_text())["data"]["positions"]
    assert [place["used"] for place in places.values()] == [2 * ROWS * T]


def test_passes_over_the_data_do_not_say_where_a_run_on_new_data_ends(in_order: Nano, tmp_path: Path) -> None:
    recipe = in_order(**{"train.steps": "none", "train.epochs": "1"})
    earlier_file(tmp_path / "checkpoint_step_3.pt", recipe)
    with pytest.raises(InputError, match=r"train\.epochs.*train\.tokens"):
        carried_position(opened(tmp_path / "checkpoint_step_3.pt", recipe), recipe, from_start=True)


def test_the_flag_without_such_a_file_is_refused(in_order: Nano, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--data-from-start: is for --resume-from checkpoint_step_<N>\.pt"):
        run(in_order(), tmp_path / "new", data_from_start=True)


def test_a_mixture_is_exported_with_its_places_and_goes_on_from_the_start_only(
    in_order: Nano, short_file: Path, one_file: Path, tmp_path: Path
) -> None:
    recipe = in_order(**sources(one_file, short_file))
    run(recipe, tmp_path / "cut", stop_after_step=4)
    facts = export_pt(tmp_path / "cut", tmp_path / "exported")
    assert sorted(facts["data_position"].values()) == ["pass 0, 512", "pass 0, 512"]
    assert "--data-from-start" in facts["messages"][0]
    with pytest.raises(InputError, match="--data-from-start"):
        run(recipe, tmp_path / "new", resume_from=Path(facts["path"]))
    run(recipe, tmp_path / "new", resume_from=Path(facts["path"]), data_from_start=True, stop_after_step=5)
    assert [record["step"] for record in curve(tmp_path / "new")] == [5]
