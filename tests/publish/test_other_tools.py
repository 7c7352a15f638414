"""Other people's tools take the exported nano model as it is: TRL, PEFT, lm-evaluation-harness (development extra)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.model.build import build_model, config_from_fields
from argonne.model.save import save_model_folder
from argonne.presets import presets

pytestmark = pytest.mark.campaign
SENTENCES = [
    f"the {a} sees the {b} near the {c} ."
    for a in ("cat", "dog", "fox")
    for b in ("hen", "cow", "owl")
    for c in ("barn", "lake")
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}{% if add_generation_prompt "
    "%}<|assistant|> {% endif %}"
)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh nano 3.0 model folder, window and all, with a word tokenizer and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("nano") / "model"
    folder.mkdir()
    words = sorted({word for line in SENTENCES for word in line.split()})
    vocabulary = {word: index for index, word in enumerate(["<|end|>", "<|user|>", "<|assistant|>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<unk>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    fields = {**presets()["nano-3.0"].fields, "vocab_size": len(vocabulary), "sliding_window": 8}
    save_model_folder(build_model(config_from_fields(fields), seed=0), folder, eos_id=0)
    return folder


@pytest.fixture
def quiet(tmp_path: Path) -> dict[str, Any]:
    """Settings of a short CPU run of the transformers Trainer family."""
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 12,
        "per_device_train_batch_size": 6,
        "learning_rate": 3e-3,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_trains_it(nano: Path, quiet: dict[str, Any], packing: bool) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(nano, trust_remote_code=True)
    data = Dataset.from_list([{"text": f"{line} <|end|>"} for line in SENTENCES])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**quiet, max_length=32, packing=packing),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(nano),
    )
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.7 * found[0]


def test_dpo_trainer_trains_it(nano: Path, quiet: dict[str, Any]) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(nano, trust_remote_code=True)
    pairs = [
        {"prompt": "the cat sees", "chosen": " the hen near the barn .", "rejected": " the owl near the lake ."}
        for _ in range(24)
    ]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**quiet, max_length=32),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(nano),
    )
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.7 * found[0]


def test_lora_adapters_fit_it_and_survive_a_file(nano: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(nano, trust_remote_code=True)
    ids = torch.randint(0, base.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(nano, trust_remote_code=True), tmp_path)
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, adapted)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)


def test_lm_evaluation_harness_scores_it_as_the_model_does(nano: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    harness = HFLM(pretrained=str(nano), device="cpu", dtype="float32", batch_size=3, trust_remote_code=True)
    pairs = [("the cat sees", f" the {word} near the barn .") for word in ("hen", "cow", "owl")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index) for index, pair in enumerate(pairs)
    ]
    found = [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(nano, trust_remote_code=True).eval(),
        AutoTokenizer.from_pretrained(nano),
    )
    for (context, continuation), score in zip(pairs, found, strict=True):
        whole = tokenizer(context + continuation, return_tensors="pt").input_ids
        start = len(tokenizer(context).input_ids)
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=whole).logits[0, :-1], -1)
        expected = log_p.gather(1, whole[0, 1:, None])[start - 1 :].sum()
        assert abs(score - expected.item()) < 1e-4


def test_transformers_trainer_with_its_own_gradient_checkpointing(nano: Path, quiet: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    ids = torch.randint(0, 10, (24, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    curves = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(nano, trust_remote_code=True)
        trainer = Trainer(
            model=model, args=TrainingArguments(**quiet, gradient_checkpointing=checkpointing), train_dataset=rows
        )
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0][-1] < 0.9 * curves[0][0]
    for a, b in zip(*curves, strict=True):
        assert abs(a - b) < 1e-4 * a
