"""Generation with real (tiny, untrained) models: stops, caches, batches, seeds, streaming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.errors import InputError
from argonne.model.build import build_model, config_from_fields
from argonne.presets import preset
from argonne.serve.engine import Engine, complete_ids, prompt_ids, stop_ids, stream_text
from argonne.serve.forward import Forward
from argonne.serve.options import SamplingOptions
from argonne.serve.sampling import Chooser, choose_together
from argonne.serve.text_stream import TextStream
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

TEXTS = [
    "Long long time ago there was a model. ",
    "Ein Mädchen sah 你好 und 🙂🙃 in der Straße. ",
    "naïve café — “quoted” … 100 €\n",
] * 30


def sampled(model: Any, tokenizer: TextTokenizer, count: int, seed: int, temperature: float = 0.8) -> str:
    """A continuation of "Long" in nucleus sampling."""
    return "".join(stream_text(model, tokenizer, "Long", SamplingOptions(count, temperature, seed=seed)))


GREEDY = SamplingOptions(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("tokenizer") / "bpe"))


def make_model(name: str = "nano-3.0", **changes: Any) -> Any:
    fields = {
        **preset(name).fields,
        "vocab_size": 300,
        "hidden_size": 32,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        **changes,
    }
    return build_model(config_from_fields(fields), seed=7).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(sliding_window=8)


def recomputed(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation without a cache: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("generation", ["nano-1.0", "nano-2.5", "nano-3.0"])
def test_cached_decoding_equals_recomputing_past_the_window(generation: str) -> None:
    window = {"sliding_window": 8} if generation == "nano-3.0" else {}
    model = make_model(generation, **window)
    prompt = [5, 9, 33, 120, 7]
    (done,) = complete_ids(model, [prompt], SamplingOptions(max_new_tokens=30, temperature=0.0), eos_ids=[])
    assert done.ids == recomputed(model, prompt, 30)
    assert done.stop == "length"


def test_a_batch_of_prompts_of_different_lengths_gives_what_each_gives_alone(model: Any) -> None:
    prompts = [[5, 9, 33, 120, 7, 8, 91, 4, 66, 3, 2, 17], [12], [40, 41, 42]]
    for options in (GREEDY, SamplingOptions(max_new_tokens=12, temperature=1.0, top_k=20, seed=3)):
        together = complete_ids(model, prompts, options, eos_ids=[])
        for row, prompt in enumerate(prompts):
            assert complete_ids(model, [prompt], options.with_seed(row), eos_ids=[])[0] == together[row]


class ForcedEos(torch.nn.Module):
    """A model that says `text` and then EOS, whatever it is asked."""

    def __init__(self, model: Any, script: list[int]) -> None:
        super().__init__()
        self.inner, self.config, self.script, self.calls = model, model.config, script, 0

    def forward(self, **inputs: Any) -> Any:
        out = self.inner(**inputs)
        out.logits = torch.full_like(out.logits, -10.0)
        out.logits[..., self.script[self.calls]] = 10.0
        self.calls += 1
        return out


def test_generation_stops_at_the_end_of_text(model: Any, tokenizer: TextTokenizer) -> None:
    said = tokenizer.encode("ago there")
    forced = ForcedEos(model, [*said, tokenizer.eos_id, 9, 9, 9])
    (done,) = complete_ids(forced, [[1, 2]], SamplingOptions(max_new_tokens=50), eos_ids=[tokenizer.eos_id])
    assert (done.ids, done.stop) == (said, "eos")
    assert forced.calls == len(said) + 1
    forced.calls = 0
    assert sampled(forced, tokenizer, 50, seed=0) == "ago there"


def test_a_row_that_has_ended_says_no_more_while_the_others_go_on(model: Any) -> None:
    (first, second) = complete_ids(model, [[5, 9], [70, 71]], GREEDY, eos_ids=[])
    end = next(token for token in first.ids[1:] if token not in second.ids)
    place = first.ids.index(end)
    ended, other = complete_ids(model, [[5, 9], [70, 71]], GREEDY, eos_ids=[end])
    assert (ended.ids, ended.stop) == (first.ids[:place], "eos")
    assert other == second


def test_generation_ends_where_the_context_is_full(model: Any) -> None:
    (done,) = complete_ids(model, [[3] * 60], SamplingOptions(max_new_tokens=50, temperature=0.0), eos_ids=[])
    assert (len(done.ids), done.stop) == (4, "context")
    with pytest.raises(InputError, match="found 64 tokens, expected fewer than the model's context of 64"):
        complete_ids(model, [[3] * 64], GREEDY, eos_ids=[])


def test_equal_seeds_are_equal_and_different_seeds_differ(model: Any, tokenizer: TextTokenizer) -> None:
    first, again, other = (sampled(model, tokenizer, 30, seed=seed, temperature=1.0) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_sampling_leaves_global_random_state_and_the_models_mode_alone(tokenizer: TextTokenizer) -> None:
    model = make_model("nano-1.0").train()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = sampled(model, tokenizer, 20, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert first == sampled(model.eval(), tokenizer, 20, seed=0), "dropout was on while sampling"
    assert not model.training


def test_a_stream_that_is_dropped_puts_the_models_mode_back(tokenizer: TextTokenizer) -> None:
    model = make_model().train()
    stream = stream_text(model, tokenizer, "Long", SamplingOptions(temperature=1.0))
    next(stream)
    stream.close()
    assert model.training


def test_an_empty_prompt_starts_a_document(tokenizer: TextTokenizer) -> None:
    assert prompt_ids(tokenizer, "") == [tokenizer.eos_id]
    assert prompt_ids(tokenizer, "Long") == tokenizer.encode("Long")


def test_the_generation_configs_stop_ids_count_beside_the_tokenizers(model: Any, tokenizer: TextTokenizer) -> None:
    model.generation_config.eos_token_id = [2, 5]
    assert stop_ids(model, tokenizer) == sorted({2, 5, tokenizer.eos_id})
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == [tokenizer.eos_id]


def test_a_model_with_broken_weights_is_refused() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="logits are not finite"):
        complete_ids(model, [[1]], GREEDY, eos_ids=[])


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": float("nan")},
    ],
)
def test_options_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))}: found .*, expected"):
        SamplingOptions(**wrong)


# -------------------------------------------------------------------------------------------------------- sampling


def choose(chooser: Chooser, logits: torch.Tensor, generated: list[int]) -> Any:
    """(id, logprobs) of one answer."""
    (found,) = choose_together([chooser], logits[None], [generated])
    return found


def draws(options: SamplingOptions, logits: torch.Tensor, count: int = 4000) -> torch.Tensor:
    """Share of each id among `count` draws from one row of logits."""
    chooser = Chooser(options)
    found = torch.tensor([choose(chooser, logits, [])[0] for _ in range(count)])
    return torch.bincount(found, minlength=len(logits)).double() / count


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    found = draws(SamplingOptions(temperature=0.5, top_p=1.0), logits)
    assert torch.allclose(found, torch.softmax(logits.double() / 0.5, 0), atol=0.03)


def test_top_k_keeps_the_k_likeliest() -> None:
    found = draws(SamplingOptions(temperature=5.0, top_k=2, top_p=1.0), torch.tensor([0.0, 3.0, 1.0, 2.0]))
    assert found[0] == found[2] == 0
    assert found[1] > 0
    assert found[3] > 0


def test_top_p_keeps_the_smallest_set_that_holds_the_mass() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    found = draws(SamplingOptions(temperature=1.0, top_p=0.7), logits)
    assert (found > 0).tolist() == [True, True, False, False]
    assert draws(SamplingOptions(temperature=1.0, top_p=0.01), logits)[0] == 1


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draws(SamplingOptions(temperature=0.0), torch.tensor([0.0, 3.0, 1.0]), count=5)[1] == 1


# ------------------------------------------------------------------------------------------------------- streaming


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_streamed_pieces_join_to_the_text_and_hold_whole_characters(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(min_value=0, max_value=299), max_size=40), context=st.integers(min_value=0, max_value=6)
)
def test_any_ids_stream_to_what_they_decode_to(tokenizer: TextTokenizer, ids: list[int], context: int) -> None:
    prompt, rest = tokenizer.encode("Straße 你")[:context], ids
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(token) for token in rest] + [stream.finish()]
    if not tokenizer.decode(prompt).endswith("\ufffd"):
        assert "".join(pieces) == tokenizer.decode([*prompt, *rest])[len(tokenizer.decode(prompt)) :]


def test_a_character_of_several_tokens_comes_out_whole(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("🜚")
    assert len(ids) == 3, "this character must be unknown to the tokenizer"
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["", "", "🜚"]


def test_half_a_character_at_the_end_is_shown_as_broken(tokenizer: TextTokenizer) -> None:
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in tokenizer.encode("🜚")[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_the_engine_streams_from_a_run_folder_on_disk(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    from argonne.model.save import save_model_folder
    from argonne.serve.engine import open_engine

    model = make_model()
    tokenizer.save(tmp_path)
    save_model_folder(model, tmp_path, eos_id=tokenizer.eos_id, bos_id=None, pad_id=tokenizer.pad_id)
    options = SamplingOptions(max_new_tokens=20, seed=5)
    text = "".join(piece for _, piece in open_engine(tmp_path, device="cpu").streams("Long", [options]))
    assert text == sampled(model, tokenizer, 20, seed=5)


def test_several_continuations_are_shown_one_after_the_other_and_read_their_prompt_once(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, once = [], Forward.__call__

    def counted(self: Forward, ids: torch.Tensor, *more: Any) -> torch.Tensor:
        read.append(ids.shape[1])
        return once(self, ids, *more)

    monkeypatch.setattr(Forward, "__call__", counted)
    options = [SamplingOptions(max_new_tokens=size, temperature=1.0, seed=size) for size in (12, 5, 8)]
    found = list(Engine(make_model(), tokenizer, Path()).streams("Long ago there was", options))
    assert [number for number, _ in found] == sorted(number for number, _ in found)
    texts = ["".join(piece for number, piece in found if number == wanted) for wanted in range(3)]
    assert len(set(texts)) == 3
    assert all(texts)
    assert len([width for width in read if width > 1]) == 1
