"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300): 57 subjects, four answers each, from its own CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from argonne.errors import InputError
from argonne.evaluate.choices import MultipleChoice, Question
from argonne.evaluate.own_files import data_of
from argonne.evaluate.requests import TaskContext

LETTERS = "ABCD"
EXAMPLES = 5  # of each subject, in dev/
# The four parts of the paper's table. What is in none of these is "other".
PARTS = {
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "social sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
}
PART_OF = {subject: part for part, subjects in PARTS.items() for subject in subjects.split()}


class Mmlu(MultipleChoice):
    """0 examples in the prompt unless --shots asks for up to 5; the letter of the answer is scored."""

    name = "mmlu"
    normalised = False
    shots = EXAMPLES

    def together(self, group: str) -> str:
        return PART_OF.get(group, "other")

    def questions(self, context: TaskContext) -> Iterator[Question]:
        folder = data_of(self.name, context)
        files = sorted((folder / "test").glob("*_test.csv"))
        if not files:
            raise InputError(f"--data {folder}: no test/*_test.csv; give the folder of MMLU's own files (test/, dev/)")
        for file in files:
            subject = file.name.removesuffix("_test.csv")
            head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
            if context.shots:
                examples = rows_of_csv(folder / "dev" / f"{subject}_dev.csv")[: context.shots]
                head += "".join(f"{_asked(row)} {row[5]}\n\n" for row in examples)
            for row in rows_of_csv(file):
                prompt = head + _asked(row)
                pairs = tuple((prompt, f" {letter}") for letter in LETTERS)
                yield Question(pairs, LETTERS.index(row[5]), (1, 1, 1, 1), subject, tuple(row[:5]))


def _asked(row: list[str]) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0].strip()}\n{choices}Answer:"


def rows_of_csv(file: Path) -> list[list[str]]:
    """Question, four choices, letter."""
    try:
        with open(file, encoding="utf-8", newline="") as stream:
            rows = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); give MMLU's own files") from None
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in LETTERS or not row[5]:
            raise InputError(f"{file}: row {number}: expected a question, four choices and one of A to D")
    return rows
