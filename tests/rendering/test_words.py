"""The words of a chat template around an answer, and the answers of texts that the template wrote."""

import pytest
from chat import CHATML, TEMPLATES, answers, byte_tokenizer, template

from echo_trainer.rendering.forms import RowOptions
from echo_trainer.rendering.rendering import Rendering
from echo_trainer.rendering.rows import renderer, special_words
from echo_trainer.rendering.words import Words, words_of

CONVERSATION = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "this one"},
    {"role": "user", "content": "and now?"},
    {"role": "assistant", "content": "that one"},
]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ALTERNATES = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}" + CHATML
# Texts have no parts; idefics3 and its kin write parts only.
OF_TEXTS = sorted(p.stem for p in TEMPLATES.glob("*.jinja") if not p.stem.startswith(("idefics3", "llava", "smolvlm")))
SEVERAL = [name for name in OF_TEXTS if not name.startswith(("gptoss", "glm4moe"))]


def words(written):
    tokenizer = byte_tokenizer(written)
    return words_of(renderer({}, tokenizer), special_words(tokenizer))


@pytest.mark.parametrize(
    ("written", "marker", "end"),
    [
        (CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
        (template("llama3"), "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        (template("gemma3"), "<start_of_turn>model\n", "<end_of_turn>"),
        (template("phi3"), "<|end|>\n<|assistant|>\n", "<|end|>"),  # closes every conversation with another token
        (template("qwen3_5_think"), "<|im_start|>assistant\n", "<|im_end|>"),  # asks for a thought, answers without
        (MISTRAL, " [/INST]", "<|im_end|>"),  # asks with the end of the prompt
    ],
)
def test_words(written, marker, end):
    assert words(written) == Words(marker, end)


@pytest.mark.parametrize(
    "written", [ALTERNATES, template("idefics3"), "{% for m in messages %}{{ m['role'] }}{% endfor %}"]
)
def test_templates_in_which_no_answer_is_found(written):
    assert words(written) is None


@pytest.mark.parametrize("family", OF_TEXTS)
def test_an_answer_is_found_in_what_every_template_of_trl_writes(family):
    tokenizer = byte_tokenizer(template(family))
    for n in (2, 4) if family in SEVERAL else (2,):
        text = tokenizer.apply_chat_template(CONVERSATION[:n], tokenize=False)
        (row,) = Rendering(RowOptions(), tokenizer).examples([{"text": text}])
        found = answers(row, tokenizer)
        expected = ["this one", "that one"][: n // 2]
        assert len(found) == len(expected)
        for answer, said in zip(found, expected, strict=True):
            assert said in answer and "one?" not in answer and "now?" not in answer


@pytest.mark.parametrize("family", ["gptoss", "glm4moe"])
def test_templates_whose_last_answer_ends_in_other_words(family):
    """The first answer of several then has no end that is known."""
    tokenizer = byte_tokenizer(template(family))
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    with pytest.raises(ValueError, match=r"2 times, and nothing says where the answer .* ends.*prompt_marker"):
        Rendering(RowOptions(), tokenizer).examples([{"text": text}])
