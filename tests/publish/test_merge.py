"""Averages of weights: the numbers, what is carried along, what has no average, a grid measured on a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.cli import main
from argonne.errors import InputError
from argonne.evaluate.run import evaluate
from argonne.evaluate.sweep import sweep
from argonne.layout import CHAT_TEMPLATE
from argonne.model.build import build_model, config_from_fields
from argonne.model.load import load_model
from argonne.model.save import save_model_folder
from argonne.presets import preset
from argonne.publish.merge import open_mixer, parse_parts
from argonne.report.inspect import inspect_path
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

TEXTS = ["Long long time ago there was a model. ", "Ein Mädchen sah 你好.\n"] * 30
Save = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(train_tokenizer(TEXTS, 330, tmp_path_factory.mktemp("tokenizer") / "bpe"))


@pytest.fixture
def save(tokenizer: TextTokenizer, tmp_path: Path) -> Save:
    """Makes a small model folder: `save("a", seed=1, hidden_size=16)`."""

    def make(name: str, *, seed: int = 1, words: TextTokenizer = tokenizer, dtype: Any = None, **sizes: Any) -> str:
        small = {"vocab_size": 330, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64, **sizes}
        model = build_model(config_from_fields({**preset("nano-3.0").fields, **small}), seed=seed)
        folder = tmp_path / name
        folder.mkdir()
        words.save(folder)
        save_model_folder(model, folder, eos_id=words.eos_id, pad_id=words.pad_id, dtype=dtype)
        return str(folder)

    return make


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder).model.state_dict())


def test_the_average_is_that_of_every_tensor(save: Save, tmp_path: Path) -> None:
    a, b = save("a", seed=1), save("b", seed=2)
    open_mixer([a, b]).save(tmp_path / "out", [0.85, 0.15])
    one, other = weights(a), weights(b)
    for name, tensor in weights(tmp_path / "out").items():
        expected = (0.85 * one[name].double() + 0.15 * other[name].double()).to(tensor.dtype)
        assert torch.equal(tensor, expected), name


def test_a_weight_of_one_gives_the_model_itself_bit_for_bit(save: Save, tmp_path: Path) -> None:
    a, b = save("a", seed=1, dtype=torch.bfloat16), save("b", seed=2, dtype=torch.bfloat16)
    open_mixer([a, b]).save(tmp_path / "out", [1.0, 0.0])
    assert all(torch.equal(tensor, weights(a)[name]) for name, tensor in weights(tmp_path / "out").items())


def test_the_folder_says_what_it_is_made_of_and_carries_the_chat_template(save: Save, tmp_path: Path) -> None:
    a, b = save("a", seed=1), save("b", seed=2)
    (Path(b) / CHAT_TEMPLATE).write_text("{{ messages }}")
    open_mixer([a, b]).save(tmp_path / "out", [0.5, 0.5])
    assert (tmp_path / "out" / CHAT_TEMPLATE).read_text() == "{{ messages }}"
    assert inspect_path(tmp_path / "out")["average_of"] == [
        f"0.5 x {a} (run None, step None)",
        f"0.5 x {b} (run None, step None)",
    ]


@pytest.mark.parametrize(
    ("sizes", "told"),
    [({"hidden_size": 16}, "hidden_size is 16, but 32"), ({"rope_theta": 77.0}, r"rope_theta is 77\.0")],
)
def test_models_of_other_shapes_have_no_average(save: Save, sizes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        open_mixer([save("a"), save("b", **sizes)])


def test_models_of_other_tokenizers_or_templates_have_no_average(save: Save, tmp_path: Path) -> None:
    other = load_tokenizer(train_tokenizer(["Something else entirely. "] * 40, 330, tmp_path / "other"))
    with pytest.raises(InputError, match="its tokenizer"):
        open_mixer([save("a"), save("b", words=other)])
    c, d = save("c"), save("d")
    for folder in (c, d):
        (Path(folder) / CHAT_TEMPLATE).write_text(folder)
    with pytest.raises(InputError, match="chat template"):
        open_mixer([c, d])


def test_a_model_named_twice_is_refused(save: Save) -> None:
    a = save("a")
    with pytest.raises(InputError, match="named twice"):
        open_mixer([a, save("b"), f"{a}/../a"])


def test_tokenizers_are_compared_and_carried_where_the_first_model_has_none(save: Save, tmp_path: Path) -> None:
    other = load_tokenizer(train_tokenizer(["Something else entirely. "] * 40, 330, tmp_path / "other"))
    a, b, c = save("a"), save("b"), save("c", words=other)
    for file in Path(a).glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=f"c: its tokenizer .* is not that of {b}"):
        open_mixer([a, b, c])
    open_mixer([a, b]).save(tmp_path / "out", [0.5, 0.5])
    folder = load_model(tmp_path / "out").tokenizer_folder
    assert folder is not None
    assert load_tokenizer(folder).fingerprint == load_tokenizer(b).fingerprint


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a:0.5", "b:0.4"], r"sum to 0\.9"),
        (["a:0.5", "b"], "MODEL:WEIGHT"),
        (["a:0.5", "b:half"], "MODEL:WEIGHT"),
        (["a:nan", "b:1"], "finite"),
    ],
)
def test_weights_that_make_no_average_are_refused(words: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_parts(words)


def test_a_model_with_damaged_weights_is_refused(save: Save) -> None:
    a, b = save("a"), save("b")
    mixer_of = load_model(b)
    with torch.no_grad():
        next(iter(mixer_of.model.parameters()))[0, 0] = torch.nan
    mixer_of.model.save_pretrained(b)
    with pytest.raises(InputError, match="NaN"):
        open_mixer([a, b])


def test_a_grid_is_measured_and_its_ends_are_the_models(save: Save, tmp_path: Path) -> None:
    a, b = save("a", seed=1), save("b", seed=2)
    text = tmp_path / "text.txt"
    text.write_text("".join(TEXTS))
    found = sweep(open_mixer([a, b]), "bpb", 4, text)
    assert [point["weight"] for point in found["grid"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for model, point in ((b, found["grid"][0]), (a, found["grid"][-1])):
        assert point["value"] == evaluate(model, ["bpb"], text)["tasks"]["bpb"]["bits_per_byte"]
    best = min(found["grid"], key=lambda point: point["value"])
    assert found["best"] == best["weight"]


def test_the_command_averages_and_sweeps(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save("a", seed=1), save("b", seed=2)
    text = tmp_path / "text.txt"
    text.write_text("".join(TEXTS))

    def argonne(*words: str) -> int:
        return main(list(words))

    assert argonne("merge", f"{a}:0.85", f"{b}:0.15", "--out", str(tmp_path / "out")) == 0
    assert json.loads((tmp_path / "out" / "argonne_merge.json").read_text())["merged"][1]["weight"] == 0.15
    assert argonne("merge", f"{a}:0.85", f"{b}:0.15", "--out", str(tmp_path / "out")) == 2
    assert argonne("merge", f"{a}:0.85", f"{b}:0.15") == 2
    named_twice = f"{tmp_path}/./a"
    for words in ((f"{a}:0.5", f"{b}:0.4"), (f"{a}:0.5", f"{named_twice}:0.5"), (f"{a}:1",), (f"{a}:0.5", b)):
        assert argonne("merge", *words, "--out", str(tmp_path / "none")) == 2, words
    assert argonne("merge", a, b, named_twice, "--sweep", "bpb") == 2
    assert argonne("merge", f"{a}:0.5", f"{save('c', hidden_size=16)}:0.5", "--out", str(tmp_path / "none")) == 2
    assert not (tmp_path / "none").exists()
    sweep_words = ("merge", a, b, "--sweep", "bpb", "--grid", "2", "--data", str(text))
    capsys.readouterr()
    assert argonne(*sweep_words, "--out", str(tmp_path / "best")) == 0
    assert capsys.readouterr().out.count("#") > 3
    assert (tmp_path / "best" / "config.json").is_file()
    assert argonne("merge", a, b, "--sweep", "probes") == 2
    assert argonne(*sweep_words, "--out", str(tmp_path / "best")) == 2  # told before anything is measured
    assert argonne("merge", f"{a}:0.5", f"{b}:0.5", "--grid", "3", "--out", str(tmp_path / "other")) == 2
