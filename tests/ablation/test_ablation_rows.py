"""Arms on rows as people have them: with and without an echo the same tokens are answers."""

import json

import pytest
from ablation_cases import do, tiny_recipe
from chat import byte_model, byte_tokenizer
from models import prompt_completion_rows

from echo_trainer.ablation.run_one import Workbench

pytestmark = pytest.mark.slow

MARK = "### Response:\n"
ROWS = {
    "conversations": (
        [
            {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
            for i in range(16)
        ],
        {},
    ),
    "text": ([{"text": f"q{i}\n{MARK}a{i}"} for i in range(16)], {"answer_marker": MARK}),
}


@pytest.mark.parametrize("rows", ROWS)
def test_arms_train_on_the_same_answers(tmp_path, rows):
    rows, settings = ROWS[rows]
    recipe = tiny_recipe(tmp_path, settings)
    byte_model().save_pretrained(tmp_path / "base"), byte_tokenizer().save_pretrained(tmp_path / "base")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = {}
    for order in (("lora", "echo", "lora-unmasked"), ("echo", "lora")):
        bench = Workbench(recipe)  # shares what the first arm tokenised
        for arm in order:
            results.setdefault(arm, []).append(do(recipe, tmp_path / "out", arm, bench=bench))
    scored = {arm: [result["flops_sizes"]["scored"] for result in found] for arm, found in results.items()}
    assert len({*scored["lora"], *scored["echo"]}) == 1
    assert scored["lora-unmasked"][0] > scored["lora"][0]
    for arm in ("lora", "echo"):
        one, other = results[arm]
        assert one["held_out_nll"] == other["held_out_nll"]
    assert results["lora"][0]["batches"] == results["echo"][0]["batches"]


def test_options_are_ranked_by_both_passes(tmp_path):
    rows = prompt_completion_rows(8, seed=8)
    for number, row in enumerate(rows):
        others = [other["completion"] for other in rows if other["completion"] != row["completion"]][:3]
        row["options"] = [*others[: number % 3], row["completion"].strip(), *others[number % 3 :]]
    tests = [{"name": "words", "file": str(tmp_path / "test.jsonl"), "mode": "rank"}]
    recipe = tiny_recipe(tmp_path, tests=tests)
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    do(recipe, tmp_path / "out", "echo")
    (items,) = (json.loads(path.read_text())["words"] for path in (tmp_path / "out").rglob("items.json"))
    assert all(
        said in [option.strip() for option in row["options"]]
        for said, row in zip(items["prediction"], rows, strict=True)
    )
    right = [said == row["completion"].strip() for said, row in zip(items["prediction"], rows, strict=True)]
    assert items["correct"] == right
    assert len(items["echo_correct"]) == len(rows)
