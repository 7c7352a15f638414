"""A recipe made small: what changes, what stays, and that each thing still happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from argonne.config import CHAT_STAGES
from argonne.data.chat import ChatTemplate
from argonne.errors import InputError
from argonne.evaluate.probes import QUESTIONS, questions_of
from argonne.keys import batches
from argonne.recipe import load_recipe, recipe_names
from argonne.rehearse.shrink import QUESTION, RANKS, STEPS, moments, period_of, shrink, write_small
from argonne.tokens.tokenizer import load_tokenizer

# All that a rehearsal may change.
CHANGES = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("layer_types", "sliding_window", "sequence_length", "tokens_per_step", "warmup", "decay", "tokens", "epochs"),
    *("steps", "every_steps", "windows", "sample_tokens", "probes", "return_memory"),
}


@pytest.mark.parametrize("name", recipe_names())
def test_the_small_recipe_reads_back_from_its_file_with_what_a_person_wrote_still_so(name: str, tmp_path: Path) -> None:
    for overrides in ({}, {"optim.lr": "1e-4", "checkpoint.every_steps": "500"}):
        small = shrink(load_recipe(name, overrides))
        again = load_recipe(str(write_small(name, small, tmp_path / name)))
        assert again == small.recipe
        assert again.given - {"base"} == set(overrides)


@pytest.mark.parametrize("name", recipe_names())
def test_every_other_key_stays(name: str) -> None:
    recipe = load_recipe(name)
    small = shrink(recipe)
    assert {path.rpartition(".")[2] for path in small.changed} <= CHANGES
    assert (small.recipe.train.steps or 0) <= STEPS
    if recipe.model.init_from is None:
        model, real = small.recipe.model, recipe.model
        assert model.num_attention_heads * real.num_key_value_heads == (
            real.num_attention_heads * model.num_key_value_heads
        )
        assert (model.head_dim, model.vocab_size) == (real.head_dim, real.vocab_size)
        assert set(model.layer_types) == set(real.layer_types)
        assert period_of(model.layer_types) == period_of(real.layer_types)
    else:
        assert small.recipe.model == recipe.model, "of given weights the sizes are theirs to say"
    if recipe.stage in CHAT_STAGES:
        assert small.recipe.data.sequence_length == min(recipe.data.sequence_length, 1024)


def test_a_change_of_batch_and_rate_happens_within_the_few_steps() -> None:
    small = shrink(load_recipe("argonne-1.0-pretrain")).recipe
    (change,), (rate,) = small.batch.steps, small.schedule.steps
    assert change.step == rate.step == 5  # 62,000 of 160,000, of 12
    rows = [tokens // length for _, _, tokens, length in batches(small.batch, small.data.sequence_length)]
    assert rows == [4, 5]  # 48 and 60


def test_moments_keep_their_order_and_stay_within_the_run() -> None:
    assert moments([0, 1, 2, 50, 99], 100, 12) == [0, 1, 2, 6, 11]
    assert moments([100], 100, 12) == [12]


def test_degrees_are_kept_as_far_as_ranks_go_and_each_rank_has_rows() -> None:
    recipe = load_recipe("nano-3.0", {"parallel.shard": "2"})
    small = shrink(recipe, workers=4).recipe
    assert (small.parallel.replicate, small.parallel.shard, small.parallel.nproc) == (0, 2, 4)
    assert small.batch.tokens_per_step // small.data.sequence_length % 4 == 0
    large = shrink(load_recipe("nano-3.0", {"parallel.shard": "8", "parallel.replicate": "2"}), workers=16)
    assert (large.recipe.parallel.replicate, large.recipe.parallel.shard) == (2, 2)
    assert large.recipe.parallel.nproc == RANKS
    assert any("workers" in said for said in large.untold)


@pytest.mark.parametrize(("schedule", "least"), [("1f1b", 4), ("interleaved", 8)])
def test_a_pipeline_keeps_layers_for_its_stages_micro_batches_for_its_workers_and_a_tied_head(
    schedule: str, least: int
) -> None:
    told = {"parallel.pipeline": "4", "parallel.schedule": schedule, "model.num_hidden_layers": "12"}
    for micro, rows in (("auto", "1"), ("2", "1")):
        small = shrink(load_recipe("nano-3.0", {**told, "batch.micro": micro}), workers=4).recipe
        assert small.model.num_hidden_layers == least
        assert small.model.tie_word_embeddings
        assert (small.parallel.pipeline, small.parallel.nproc, small.batch.micro) == (4, 4, int(rows))
        assert small.batch.tokens_per_step // small.data.sequence_length >= 4


def test_a_pipeline_with_too_few_micro_batches_stays_one() -> None:
    told = {"parallel.pipeline": "4", "batch.micro": "16", "batch.tokens_per_step": "4096"}  # one of 16 rows
    small = shrink(load_recipe("nano-3.0", told), workers=4).recipe
    assert small.batch.micro == small.batch.tokens_per_step // small.data.sequence_length == 4


def test_a_person_s_own_sizes_of_given_weights_are_made_small_too() -> None:
    given = {"model.init_from": "runs/other", "model.hidden_size": "256", "model.num_hidden_layers": "12"}
    small = shrink(load_recipe("nano-3.0-continue", given))
    assert small.changed["model.hidden_size"] == (256, 32)
    assert small.changed["model.num_hidden_layers"] == (12, 4)


def test_answers_that_surely_fit_are_made_few_and_others_stay_for_the_run_to_refuse() -> None:
    assert shrink(load_recipe("argonne-3.0-cot-sft")).changed["checkpoint.sample_tokens"] == (700, 8)
    for tokens in ("1000", "2000"):  # of a context of 1,024
        told = {"checkpoint.sample_tokens": tokens}
        assert "checkpoint.sample_tokens" not in shrink(load_recipe("nano-3.0-sft", told)).changed


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_no_question_of_the_probes_takes_more_tokens_than_are_left_for_it(name: str, tokens: Path) -> None:
    """With any tokenizer: a token is a byte at least."""
    tokenizer = load_tokenizer(tokens / "tokenizer")
    for question in questions_of(ChatTemplate(tokenizer, name), QUESTIONS):
        assert len(tokenizer.decode(question.prompt).encode()) <= QUESTION


def test_places_of_the_user_are_left_alone() -> None:
    told = {"chat.cache": "cache", "log.wandb": "project", "stop.wall_time": "12h"}
    small = shrink(load_recipe("nano-3.0-sft", told))
    assert (small.recipe.chat.cache, small.recipe.log.wandb, small.recipe.stop.wall_time) == (None, None, None)
    assert "Weights & Biases" in small.untold


def test_a_length_without_a_whole_step_is_the_recipe_s_own_error() -> None:
    with pytest.raises(InputError, match="make no whole step"):
        shrink(load_recipe("nano-3.0", {"train.tokens": "10"}))
