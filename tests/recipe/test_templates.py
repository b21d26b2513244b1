"""One template for training and evaluation: the tokens that are scored are the tokens that are trained."""

import json

import pytest
import torch
from datasets import Dataset
from models import lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from paths import BASE, TASKS
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from echo_trainer.evaluation import evaluate_task
from echo_trainer.evaluation.tasks import commonsense_task, prompt_completion_task
from echo_trainer.rendering.forms import RowOptions
from echo_trainer.rendering.prompts import parts_of
from echo_trainer.rendering.rendering import Rendering
from echo_trainer.templates import TEMPLATES, instruction_and_answer

ROWS = json.loads((TASKS / "social_i_qa-test.json").read_text(encoding="utf-8"))
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_what_is_scored_is_what_is_trained(template, tmp_path):
    """The summed loss of the answer tokens that SFTTrainer makes equals `nll`, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = CHAT
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=1024)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None),
        train_dataset=Dataset.from_list([TEMPLATES[template](row) for row in ROWS]),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    task = commonsense_task("social_i_qa", ROWS, template=template, tokenizer=tokenizer)
    records = evaluate_task(trainer.model, tokenizer, task, mode="nll", batch_size=3)
    for record, row in zip(records, trainer.train_dataset, strict=True):
        batch = trainer.data_collator([row])
        with torch.no_grad():
            logits = trainer.model(input_ids=batch["input_ids"]).logits[0].log_softmax(-1)
        labels = batch["labels"][0]
        answer = [place for place in range(1, len(labels)) if labels[place] != -100]
        loss = -sum(float(logits[place - 1, labels[place]]) for place in answer)
        assert record.nll == pytest.approx(loss, rel=1e-5)
        assert record.n_tokens == len(answer)


def test_plain_rows_end_with_the_end_token_too():
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    rows = prompt_completion_rows(4)
    for record, row in zip(
        evaluate_task(model, tokenizer, prompt_completion_task("t", rows), mode="nll"), rows, strict=True
    ):
        assert record.n_tokens == len(row["completion"].split()) + 1


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Do.", "input": "This", "output": "Done."}, ("Do.\n\nThis", "Done.")),
        ({"instruction": "Do.", "input": "", "output": "Done.", "answer": "x"}, ("Do.", "Done.")),
        ({"instruction": "Do.", "context": "With", "response": "So.", "category": "c"}, ("Do.\n\nWith", "So.")),
        ({"instruction": "Code.", "response": "x = 1"}, ("Code.", "x = 1")),
        ({"query": "Q?", "response": "A", "type": "t"}, ("Q?", "A")),
        ({"question": "Q?", "answer": "#### 3"}, ("Q?", "#### 3")),
    ],
)
def test_columns(row, expected):
    assert instruction_and_answer(row) == expected


def test_columns_that_no_template_knows():
    for row in ({"text": "x"}, {"question": "is it?", "answer": True}):
        with pytest.raises(ValueError, match="dataset_template"):
            instruction_and_answer(row)


def test_a_chat_template_that_rewrites_the_prompt_is_refused():
    tokenizer = tiny_tokenizer()
    example = TEMPLATES["chat"]({"instruction": "w1", "output": "w2"})
    rendering = Rendering(RowOptions(), tokenizer)
    parts = parts_of(example, rendering)
    assert (parts.prompt, parts.completion) == ("user : w1 assistant : ", "w2 </s> ")
    tokenizer.chat_template = "{{ messages | length }} " + tokenizer.chat_template
    with pytest.raises(ValueError, match="writes the prompt differently"):
        parts_of(example, rendering)
