"""Run as a script in a fresh process by test_other_trainers.py: what users of TRL and transformers do with the final
model of a fine-tuning run, offline and with argonne blocked. Prints one JSON object.

Usage: python other_trainers.py MODEL CONVERSATIONS FOLDER REFERENCE PAIRS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

MICRO_ROWS, MICRO_BATCHES = 2, 4


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """A short run on the CPU; `MICRO_BATCHES` micro-batches a step, whose numbers of trained tokens differ."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": MICRO_ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **more,
    }


def first_step(trainer: Any) -> dict[str, float]:
    """The loss before anything is learned, and the tokens that it is divided by."""
    counts: list[int] = []
    counted = trainer._get_num_items_in_batch

    def count(*given: Any) -> Any:
        found = counted(*given)
        counts.append(int(found))
        return found

    trainer._get_num_items_in_batch = count
    return {"loss": float(trainer.train().training_loss), "tokens": counts[0]}


def run(model_folder: str, conversations: str, folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = load_dataset("json", data_files=conversations, split="train", cache_dir=str(folder / "cache"))
    step = range(MICRO_ROWS * MICRO_BATCHES)

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True, dtype=torch.float32)

    def sft(rows: Any, name: str, **more: Any) -> Any:
        how = SFTConfig(**settings(folder / name, max_steps=1), max_length=None, assistant_only_loss=True, **more)
        return SFTTrainer(model=model(), args=how, train_dataset=rows.select(step), processing_class=tokenizer)

    def last_answer(row: Any) -> dict[str, Any]:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}

    pairs = data.map(last_answer, remove_columns=["messages"])
    found: dict[str, Any] = {
        "trl, assistant": first_step(sft(data, "assistant")),
        "trl, assistant in the completion": first_step(sft(pairs, "completion", completion_only_loss=True)),
    }

    def labelled(row: Any) -> dict[str, Any]:
        how: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
        out: Any = tokenizer.apply_chat_template(row["messages"], **how)
        marked = zip(out["input_ids"], out["assistant_masks"], strict=True)
        return {"input_ids": out["input_ids"], "labels": [token if trained else -100 for token, trained in marked]}

    rows = data.map(labelled, remove_columns=["messages"])

    def trainer(name: str, **more: Any) -> Any:
        return Trainer(
            model=model(),
            args=TrainingArguments(**settings(folder / name, **more)),
            train_dataset=rows if more["max_steps"] > 1 else rows.select(step),
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        )

    found["transformers"] = first_step(trainer("one", max_steps=1))
    return {**found, **four_steps(trainer, folder)}


def four_steps(trainer: Any, folder: Path) -> dict[str, str]:
    """Where the weights lie: of four steps in one go, of the two from its checkpoint on in other objects, and there."""
    whole = trainer("whole", max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    again = trainer("again", max_steps=4)
    half = folder / "whole" / "checkpoint-2"
    again.train(resume_from_checkpoint=str(half))
    assert again.state.global_step == 4
    for name, one in (("whole", whole), ("again", again)):
        one.save_model(str(folder / name / "end"))
    return {"whole": str(folder / "whole" / "end"), "resumed": str(folder / "again" / "end"), "half": str(half)}


def preference(model_folder: str, reference_folder: str, pairs: str, folder: Path) -> dict[str, float]:
    """The loss of one step of DPO against another model. As texts with the turn end for the end of text, so that a
    completion has no newline behind it.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.eos_token = "<|im_end|>"
    data = load_dataset("json", data_files=pairs, split="train", cache_dir=str(folder / "cache"))

    def asked(row: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": row["prompt"]}]
        return {**row, "prompt": tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)}

    def model(where: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True, dtype=torch.float32)

    one = {"per_device_train_batch_size": len(data), "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer = DPOTrainer(
        model=model(model_folder),
        ref_model=model(reference_folder),
        args=DPOConfig(**{**settings(folder / "dpo"), **one}, max_length=None, beta=0.1),
        train_dataset=data.map(asked),
        processing_class=tokenizer,
    )
    return {"loss": float(trainer.train().training_loss), "pairs": len(data)}


if __name__ == "__main__":
    sys.modules["argonne"] = None  # type: ignore[assignment]
    made = run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    made["trl, pairs"] = preference(sys.argv[1], sys.argv[4], sys.argv[5], Path(sys.argv[3]))
    print("@@" + json.dumps(made))
