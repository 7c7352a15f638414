"""Whatever lm-evaluation-harness can measure, asked of a model through the engine here: tasks `lm_eval:NAME`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from argonne.errors import InputError, first_line
from argonne.evaluate.answers import answering
from argonne.evaluate.choices import in_tokens
from argonne.evaluate.requests import AnswerRequest, Score, ScoreRequest
from argonne.evaluate.scorer import scoring
from argonne.serve.engine import to_the_end, tokenizer_of
from argonne.serve.options import SamplingOptions

if TYPE_CHECKING:
    from argonne.model.load import LoadedModel

PREFIX = "lm_eval:"
TOKENS = 256  # of an answer whose task does not say


def by_harness(
    model_path: str | Path,
    tasks: Sequence[str],
    include: Path | None = None,
    shots: int | None = None,
    *,
    limit: int | None = None,
    device: str = "auto",
    int8: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Results of the harness' tasks of these names in the form of argonne.evaluate.run: each number with its standard
    error. include: a folder of task files beside the harness' own. progress: as in argonne.evaluate.run. Raises
    InputError for tasks that it does not know, or whose data it cannot get.
    """
    from argonne.model.load import load_model
    from argonne.parallel.mesh import choose_device
    from argonne.serve.quantize import quantize

    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError(
            f"--tasks {PREFIX}..: needs lm_eval, which is not installed; install argonne[lm-eval]"
        ) from None
    names = [task.removeprefix(PREFIX) for task in tasks]
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=include is None)
    if not {*names} <= {*manager.all_tasks} and include is not None:  # to list its own takes half a minute
        manager = TaskManager(include_path=str(include))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise InputError(
            f"--tasks {PREFIX}{unknown[0]}: lm-evaluation-harness has no such task; `lm-eval ls tasks` lists them, and "
            "--data names a folder of others"
        )
    loaded = load_model(model_path, device=choose_device(device))
    parameters = loaded.model.num_parameters()
    if int8:
        quantize(loaded.model)
    engine = harness_engine(loaded, Path(model_path), progress)
    how: dict[str, Any] = {"num_fewshot": shots, "limit": limit, "log_samples": False}
    try:
        found = simple_evaluate(engine, tasks=names, task_manager=manager, **how)
    except OSError as error:
        raise InputError(
            f"--tasks {','.join(tasks)}: the data cannot be had ({first_line(error)}); fetch it where a network is"
        ) from None
    assert found is not None
    values = {
        f"{PREFIX}{name}": _numbers(row, found["n-samples"].get(name, {}).get("effective"))
        for name, row in {**found["results"], **found.get("groups", {})}.items()
    }
    return {"model": str(model_path), "folder": str(loaded.folder), "parameters": parameters, "tasks": values}


def _numbers(row: dict[str, Any], questions: int | None) -> dict[str, Any]:
    """The harness names a number "acc,none" and its error "acc_stderr,none"."""
    told = {name: value for name, value in row.items() if "," in name and "_stderr," not in name}
    return {
        "questions": questions,
        "measures": {
            name.removesuffix(",none"): {
                "value": value,
                "standard_error": error if isinstance(error := row.get(name.replace(",", "_stderr,")), float) else None,
            }
            for name, value in told.items()
        },
    }


def lines(task: str, values: dict[str, Any]) -> list[str]:
    """The numbers of a task for a person."""
    size = "" if values["questions"] is None else f" of {values['questions']:,} questions"
    return [
        f"{task}: {name} {one['value']:.4f}"
        + ("" if one["standard_error"] is None else f" ± {one['standard_error']:.4f}")
        + size
        for name, one in values["measures"].items()
    ]


def options_of(tokens: int, how: Mapping[str, Any], number: int) -> SamplingOptions:
    """Of a task's generation settings. Raises InputError for one that would do nothing here."""
    known = {"temperature", "top_p", "top_k"}
    if unknown := sorted({*how} - known):
        raise InputError(f"generation_kwargs.{unknown[0]}: is not known here; leave it out of the task's file")
    return SamplingOptions(tokens, **{"top_p": 1.0, **how}, seed=number)


def harness_engine(loaded: LoadedModel, name: Path, progress: Callable[[int, int], None] | None = None) -> Any:
    """The model as the harness asks one; a class made here, because its base is the harness'."""
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    words, context = tokenizer_of(loaded, name), int(loaded.model.config.max_position_embeddings)
    stops = words.stop_ids

    class Engine(LM):
        def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
            found = to_the_end(scoring(loaded.model, requests, progress=progress))
            return [found[number] for number in range(len(requests))]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            asked = [request.args for request in requests]
            written, _ = in_tokens(asked, words, context)
            for number, (before, after) in enumerate(asked):
                if not before:  # as the first words of a document
                    ids = np.array([words.eos_id, *words.encode(after)])
                    written[number] = ScoreRequest(ids[-context - 1 :])
            return [(float(one.log_probabilities.sum()), bool(one.greedy.all())) for one in self.score(written)]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            windows, owners = [], []
            for number, request in enumerate(requests):
                ids = words.encode(request.args[0])
                for pair in get_rolling_token_windows(ids, words.eos_id, context, 1):
                    before, after = make_disjoint_window(pair)
                    windows.append(ScoreRequest(np.array([*before, *after]), len(before)))
                    owners.append(number)
            sums = [0.0] * len(requests)
            for number, one in zip(owners, self.score(windows), strict=True):
                sums[number] += float(one.log_probabilities.sum())
            return sums

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            written = []
            for number, request in enumerate(requests):
                before, how = request.args[0], normalize_gen_kwargs(request.args[1], TOKENS)
                until, tokens = tuple(filter(None, how.pop("until"))), how.pop("max_gen_toks")
                how.pop("do_sample")  # without it the temperature is 0
                options = options_of(tokens, how, number)
                if tokens >= context:
                    raise InputError(f"max_gen_toks: found {tokens}, expected less than the context of {context:,}")
                ids = np.array(words.encode(before)[-(context - tokens) :])
                written.append(AnswerRequest(ids, options, stops, until))
            found = to_the_end(answering(loaded.model, written, tokenizer=words, progress=progress))
            answers = []
            for number, request in enumerate(written):
                text = words.decode(found[number].ids, skip_special_tokens=True)
                answers.append(min((text.partition(stop)[0] for stop in request.stop_texts), key=len, default=text))
            return answers

    return Engine()
