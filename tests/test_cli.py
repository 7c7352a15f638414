"""The command line as a contract: verbs, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from argonne.cli import begin, command, data, main
from argonne.stages import pretrain
from argonne.train.trainer import Outcome

PUBLISHED = {
    "argonne-1.0": 275_827_680,
    "argonne-1.5": 356_516_640,
    "argonne-2.0": 4_918_072_800,
    "argonne-2.0-early": 5_558_579_200,
    "argonne-2.5": 1_273_807_360,
    "argonne-3.0": 2_882_162_688,
    "argonne-4.0": 1_038_492_672,
}
SMALL = [
    *(
        "--model.vocab_size",
        "512",
        "--model.hidden_size",
        "32",
        "--model.num_hidden_layers",
        "2",
        "--model.intermediate_size",
        "64",
    ),
    *("--model.num_attention_heads", "2", "--model.num_key_value_heads", "1", "--model.head_dim", "16"),
    *(
        "--data.sequence_length",
        "32",
        "--batch.tokens_per_step",
        "128",
        "--schedule.warmup",
        "0",
        "--train.threads",
        "1",
    ),
    *("--log.tensorboard", "false", "--log.every_steps", "1", "--checkpoint.sample_tokens", "2", "--eval.windows", "2"),
]
HEAVY = {"torch", "transformers", "numpy", "pyarrow", "matplotlib", "tokenizers", "safetensors"}


def sources(tokens: Path, max_epochs: int = 9) -> list[str]:
    return ["--data.sources", f"[{{ path = {json.dumps(str(tokens))}, max_epochs = {max_epochs} }}]"]


def loaded_modules(*arguments: str) -> set[str]:
    """The modules of a process that ran `argonne` with these arguments."""
    code = f"""
import sys
from argonne.cli import main
try:
    main({list(arguments)!r})
except SystemExit:
    pass
print("MODULES", *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize(
    "arguments", [("--help",), ("pretrain", "--help"), ("prepare", "--help"), ("pretrain", "nano-3.0", "--dry-run")]
)
def test_help_and_dry_run_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    found = loaded_modules(*arguments)
    assert "argonne" in found
    assert found & HEAVY == set()


def test_help_loads_no_more_of_the_package_than_the_command() -> None:
    found = {name for name in loaded_modules("--help") if name.startswith("argonne.")}
    assert found == {"argonne.cli", "argonne.cli.command", "argonne.errors"}


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    verbs = ("demo", "models", "tokenizer", "prepare", "inspect", "pretrain", "continue", "generate", "eval", "report")
    assert [verb for verb in verbs if f"    {verb} " not in said and f"    {verb}\n" not in said] == []


def test_help_of_a_training_verb_lists_every_recipe_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    from argonne.keys import all_keys

    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    said = capsys.readouterr().out
    assert [
        path for path, item in all_keys().items() if f"--{path} " not in said or item.metadata["meaning"] not in said
    ] == []


def test_models_json_prints_the_published_totals_counted_from_modules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row["parameters"] for row in json.loads(capsys.readouterr().out)}
    assert {name: rows[name] for name in PUBLISHED} == PUBLISHED


def test_a_dry_run_prints_a_recipe_that_runs_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argonne.recipe import load_recipe

    assert main(["pretrain", "nano-3.0", "--dry-run", "--optim.lr", "1e-4", "--run", str(tmp_path / "run")]) == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    assert load_recipe(str(tmp_path / "printed.toml")) == load_recipe("nano-3.0", {"optim.lr": "1e-4"})
    assert not (tmp_path / "run").exists()


def check_shaped_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """generate with a form, a stop text, and several answers of seeds in order."""

    def said(*more: str) -> str:
        assert main(["generate", str(run), "--prompt", "Chapter", "--max-new-tokens", "60", *more]) == 0
        return capsys.readouterr().out

    schema = run.parent / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 2}')
    assert isinstance(json.loads(said("--json-schema", str(schema)).removeprefix("Chapter")), list)
    assert said("--choices", " yes", " no") in ("Chapter yes\n", "Chapter no\n")
    assert said("--regex", " [ab]{3}", "--n", "2", "--seed", "4") == "".join(
        said("--regex", " [ab]{3}", "--seed", seed) for seed in ("4", "5")
    )
    assert said("--regex", "aab", "--stop", "b") == "Chapteraa\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["VERB", "argonne --help"]),
        (["pretrian", "nano-3.0"], ["'pretrian'", "did you mean 'pretrain'?"]),
        (["models", "--jsn"], ["models: ", "'--jsn'", "argonne models --help"]),
        (["models", "extra"], ["'extra'"]),
        (["generate", "runs/x", "--promt", "One"], ["--prompt", "'--promt' is not known, did you mean '--prompt'?"]),
        (["generate", "runs/x", "--prompt", "One", "--top-k", "few"], ["--top-k", "'few'"]),
        (
            ["generate", "runs/x", "--prompt", "One", "--max-new-tokens", "0"],
            ["max_new_tokens", "found 0", "at least 1"],
        ),
        (["generate", "runs/x", "--prompt", "One", "--regex", "a", "--choices", "b"], ["--choices", "--regex"]),
        (
            ["generate", "runs/x", "--prompt", "One", "--json-schema", "none.json"],
            ["--json-schema none.json", "no JSON"],
        ),
        (["generate", "runs/x", "--prompt", "One", "--n", "0"], ["--n: found 0"]),
        (
            ["generate", "runs/x", "--prompt", "One", "--n", "2", "--temperature", "0"],
            ["--n: found 2", "all would be one"],
        ),
        (["generate", "runs/x", "--prompt", "One", "--stop", ""], ["stop: found an empty text"]),
        (["prepare", "--input", "a", "--out", "b", "--format", "binn"], ["--format", "'binn'", "train.bin"]),
        (["prepare", "--input", "a", "--out", "b", "--part", "3/2"], ["--part", "3/2", "K/N"]),
        (["pretrain"], ["RECIPE", "argonne pretrain --help"]),
        (["report", "nowhere"], ["nowhere", "metrics.jsonl"]),
        (["eval", "nowhere"], ["nowhere", "no such file or folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("argonne: ")
    assert captured.err.count("\n") == 1
    assert [part for part in parts if part not in captured.err] == []


def test_an_interrupt_is_exit_code_1_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(begin, "list_models", interrupted)
    assert main(["models"]) == 1
    assert capsys.readouterr().err == "argonne: interrupted\n"


def test_from_text_to_a_report_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(
            f"Chapter {number}. The {number}th day was like the one before, and nobody came." for number in range(300)
        )
    )
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    options = ("--train-tokenizer", "320", "--hold-out", "0.2", "--split", "blank-lines", "--workers", "1")
    assert main(["prepare", "--input", str(text), "--out", str(tokens), *options]) == 0
    assert capsys.readouterr().out.strip() == str(tokens)

    assert main(["pretrain", "nano-3.0", "--run", str(run), "--train.steps", "4", *SMALL, *sources(tokens)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for said in ("sdpa-", "learning rate at steps", "step 4/4", "bits per byte", "checkpoint_step_4"):
        assert said in captured.err

    assert main(["generate", str(run), "--prompt", "Chapter", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("Chapter")
    assert (
        main(
            [
                "generate",
                str(run / "checkpoint_last"),
                "--prompt",
                "Chapter",
                "--max-new-tokens",
                "5",
                "--temperature",
                "0",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == first

    check_shaped_answers(run, capsys)
    assert main(["eval", str(run), "--tasks", "bpb", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["tasks"]["bpb"]
    assert 0 < measured["bits_per_byte"] < 20
    assert measured["bytes"] > 0

    for path, kind in (
        (tokens, "tokens"),
        (run, "run"),
        (run / "checkpoint_step_4", "checkpoint"),
        (run / "final_model", "exported model"),
    ):
        assert main(["inspect", str(path), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["kind"], facts["problems"]) == (kind, [])
    assert main(["inspect", str(tokens / "tokenizer")]) == 0
    assert "vocab_size: 320" in capsys.readouterr().out

    assert main(["report", str(run)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == run / "report.html"
    assert "<html" in page.read_text()


def test_sigterm_leaves_a_checkpoint_a_marker_and_exit_code_3(tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["pretrain", "nano-3.0", "--run", str(run), "--train.steps", "100000", *SMALL, *sources(tokens, 1000)]
    with subprocess.Popen([sys.executable, "-m", "argonne", *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step") and "held-out" not in line:
                break
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait() == 3
    marker = json.loads((run / "STOPPED").read_text())
    manifest = json.loads((run / "manifest.json").read_text())
    assert marker["reason"] == "SIGTERM"
    assert marker["run_id"] == manifest["run_id"]
    assert (run / f"checkpoint_step_{marker['step']}" / "state.json").is_file()
    assert f"stopped at step {marker['step']}" in said
    assert "the same command resumes it" in said
    assert "Traceback" not in said
    assert not (run / "COMPLETE").exists()
    assert not (run / "final_model").exists()


def test_a_finished_run_and_a_worker_of_torchrun_need_no_token_set_at_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens may be gone after the end; with data.reader = "rank-0" other nodes never have them."""
    reached: list[Path] = []

    def run(recipe: object, folder: Path, **options: object) -> pretrain.RunResult:
        reached.append(folder)
        return pretrain.RunResult(folder, Outcome(1, "complete"))

    monkeypatch.setattr(pretrain, "run", run)
    command = ["pretrain", "nano-3.0", "--data.sources", str(tmp_path / "gone"), "--run"]
    assert main([*command, str(tmp_path / "new")]) == 2
    assert main([*command, str(tmp_path)]) == 0
    monkeypatch.setenv("RANK", "1")
    assert main([*command, str(tmp_path / "new")]) == 0
    assert reached == [tmp_path, tmp_path / "new"]


def test_a_worker_of_torchrun_that_was_asked_to_stop_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code 3 would end, or start again, the others of it."""
    stopped = pretrain.RunResult(tmp_path, Outcome(1, "SIGTERM"))
    monkeypatch.setattr(pretrain, "run", lambda recipe, folder, **options: stopped)
    assert main(["pretrain", "nano-3.0", "--run", str(tmp_path)]) == 3
    monkeypatch.setenv("RANK", "1")
    assert main(["pretrain", "nano-3.0", "--run", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("stopped at step 1 (SIGTERM)") == 2


def test_a_repeated_input_adds_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(data, "prepare_tokens", lambda arguments: given.append(arguments.input))
    assert (
        main(
            [
                "prepare",
                "--input",
                "a.txt",
                "--input",
                "b.txt",
                "c.txt",
                "--train-tokenizer",
                "300",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert given == [["a.txt", "b.txt", "c.txt"]]


def test_the_package_runs_as_a_module_so_that_torchrun_can_start_it() -> None:
    done = subprocess.run([sys.executable, "-m", "argonne", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("argonne ")


COMPLETE = """
source <(PY -m argonne completion bash)
complete_line() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    "$(complete -p argonne | sed 's/.*-F \\([^ ]*\\).*/\\1/')" argonne "${!#}"
    echo "${COMPREPLY[@]}"
}
complete_line argonne pretr
complete_line argonne prepare --hold
complete_line argonne pretrain nano-3.0-con
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_verbs_flags_and_recipes() -> None:
    script = COMPLETE.replace("PY", sys.executable)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pretrain", "--hold-out", "nano-3.0-continue"]


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "SECONDS_A_LINE", 0.0)
    with command.progress_bar("requests") as progress:
        for count in (0, 1_000, 2_000):
            progress(count, 14_042)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("requests: 1,000 of 14,042, ")
    assert lines[1].startswith("requests: 2,000 of 14,042, ")
    assert lines[1].endswith(" s left")


def test_plan_measures_on_this_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "nano-3.0", *SMALL[:-4], "--measure"]
    for flag in (["--gpu", "h200"], ["--gpus", "2"], ["--price", "3"]):
        assert main([*asked, *flag]) == 2
        assert f"{flag[0]}: --measure runs on one device of this machine" in capsys.readouterr().err
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {trial["precision"] for trial in found["measured"]} == {"fp32", "bf16"}
    assert sum(trial["chosen"] for trial in found["measured"]) == 1
    assert all(trial["tokens_per_second"] > 0 for trial in found["measured"])


def test_a_line_that_is_wider_than_the_terminal_is_cut_between_words_under_its_text() -> None:
    line = "  micro-batch    4 rows x 2 a device (the largest that fits, evened out), loss chunked"
    assert command.folded(line, 60).split("\n") == [
        "  micro-batch    4 rows x 2 a device (the largest that fits,",
        "                 evened out), loss chunked",
    ]
    assert command.folded("  note: so it is that words go on here", 24).split("\n")[1].startswith("        ")
    assert command.folded(line, len(line)) == line
    long = "x" * 100
    assert command.folded(long, 60) == long
