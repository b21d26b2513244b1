"""`echo-trainer evaluate` end to end: intervals, interruption, refusal to mix, the record and the card."""

import json
import math
import subprocess
import sys
from pathlib import Path

import evaluate as evaluate_library
import pytest
import torch
from models import adapted, tiny_model, tiny_tokenizer
from paths import TASKS
from safetensors.torch import load_file, save_file

from echo_trainer import cli
from echo_trainer.evaluation import Item, Record, Task
from echo_trainer.evaluation.metrics import ChoiceAccuracy, ExactMatch, NumberAccuracy
from echo_trainer.evaluation.model import load_for_evaluation
from echo_trainer.evaluation.records import RecordFile
from echo_trainer.evaluation.results import macro_average, task_result
from echo_trainer.evaluation.run import harness_command


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a base, an adapter of it, and prompts with completions."""
    tiny_model(max_position_embeddings=512).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapted(tiny_model(max_position_embeddings=512)).save_pretrained(tmp_path / "adapter")
    rows = [{"prompt": f"w{n} w{n + 1}" + " w3" * (n % 5), "completion": f" w{n % 7}"} for n in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(folder, mode):
    return json.loads((Path(folder) / f"results.{mode}.json").read_text())


def records(folder, task, mode):
    return [json.loads(line) for line in (Path(folder) / f"{task}.{mode}.jsonl").read_text().splitlines()[1:]]


def test_the_command(workplace, capsys):
    arguments = [
        "evaluate",
        "adapter",
        "--base",
        "base",
        "--tasks",
        "boolq",
        "winogrande",
        "--data",
        str(TASKS),
    ]
    for mode, metric in (("rank", "accuracy_ranked"), ("generate", "accuracy"), ("nll", "nll")):
        assert cli.main([*arguments, "--mode", mode, "--batch_size", "3"]) == 0
        summary = results("adapter/evaluation", mode)
        assert [r["task"] for r in summary["results"]] == ["boolq", "winogrande"]
        assert {r["metric"] for r in summary["results"]} == {metric}
        assert all(r["n"] == 8 and r["interval"][0] <= r["value"] <= r["interval"][1] for r in summary["results"])
        assert summary["average"]["value"] == pytest.approx(sum(r["value"] for r in summary["results"]) / 2)
        lines = records("adapter/evaluation", "boolq", mode)
        assert sorted(line["index"] for line in lines) == list(range(8))
        if mode != "nll":
            assert sum(line["correct"] for line in lines) / 8 == summary["results"][0]["value"]
        assert str(workplace) not in json.dumps(summary)
    shown = capsys.readouterr().out
    assert "average of 2 tasks" in shown
    assert (
        "lm_eval --model hf --model_args pretrained=base,peft=adapter,dtype=float32 --tasks boolq,winogrande" in shown
    )


def test_a_file_of_ones_own_and_results_in_a_file(workplace):
    assert cli.main(["evaluate", "base", "--tasks", "mine.jsonl", "--limit", "6", "--output", "out/mine.json"]) == 0
    summary = json.loads((workplace / "out" / "mine.json").read_text())
    assert summary == results("out/mine", "generate")
    assert summary["results"][0] | {"value": 0, "interval": 0} == {
        "task": "mine", "dataset": "mine.jsonl", "split": None, "metric": "exact_match", "value": 0, "n": 6, "of": 20,
        "interval": 0, "seeds": None,
    }  # fmt: skip
    assert summary["average"] is None


def test_interrupted_and_continued(workplace, monkeypatch, capsys):
    """Killed in the middle of a line: the finished records stay as they are, the rest is computed once."""
    command = ["evaluate", "base", "--tasks", "mine.jsonl", "--mode", "nll", "--batch_size", "4"]
    assert cli.main([*command, "--output", "whole"]) == 0
    save, batches = RecordFile.save, []

    def interrupted(self, new):
        save(self, new)
        batches.append(new)
        if len(batches) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RecordFile, "save", interrupted)
    assert cli.main([*command, "--output", "out"]) == 130
    assert "the same command continues" in capsys.readouterr().err
    path = workplace / "out" / "mine.nll.jsonl"
    before = path.read_bytes()
    assert before.count(b"\n") == 1 + 8
    path.write_bytes(before + b'{"index": 19, "predic')
    monkeypatch.setattr(RecordFile, "save", save)
    assert cli.main([*command, "--output", "out", "--batch_size", "32"]) == 0
    assert path.read_bytes().startswith(before)
    assert results("out", "nll")["this_session"]["items"] == 12
    found, whole = ({r["index"]: r for r in records(folder, "mine", "nll")} for folder in ("out", "whole"))
    assert len(found) == 20 == len(records("out", "mine", "nll"))
    assert all(found[n]["nll"] == pytest.approx(whole[n]["nll"], rel=1e-5) for n in range(20))
    assert cli.main([*command, "--output", "out"]) == 0  # finished: nothing is computed again
    assert results("out", "nll")["this_session"]["items"] == 0
    assert results("out", "nll")["results"] == results("whole", "nll")["results"]


def test_records_of_another_evaluation_are_refused(workplace, capsys):
    command = ["evaluate", "adapter", "--base", "base", "--tasks", "mine.jsonl", "--mode", "nll", "--output", "out"]
    assert cli.main(command) == 0
    before = (workplace / "out" / "mine.nll.jsonl").read_bytes()
    torch.manual_seed(99)
    assert cli.main([*command, "--limit", "5"]) == 2
    assert "items 20 (now 5)" in capsys.readouterr().err
    model = adapted(tiny_model(max_position_embeddings=512), r=8)
    model.save_pretrained(workplace / "adapter")
    assert cli.main(command) == 2
    assert "records of another evaluation: adapter" in capsys.readouterr().err
    assert (workplace / "out" / "mine.nll.jsonl").read_bytes() == before
    assert cli.main([*command, "--restart"]) == 0
    assert (workplace / "out" / "mine.nll.jsonl").read_bytes() != before
    (workplace / "out" / "mine.nll.jsonl").write_text("something else\n")
    assert cli.main(command) == 2
    assert "is no file of records" in capsys.readouterr().err


def test_the_figures_reach_the_record_and_the_card(workplace, capsys):
    (workplace / "train.jsonl").write_text((workplace / "mine.jsonl").read_text())
    (workplace / "recipe.yaml").write_text(
        "model_name_or_path: base\ndataset_name: data\noutput_dir: run\nmax_steps: 2\nuse_cpu: true\nbf16: false\n"
        "report_to: none\nlora_r: 4\nper_device_train_batch_size: 4\nmax_length: 64\n"
    )
    (workplace / "data").mkdir()
    (workplace / "train.jsonl").rename(workplace / "data" / "train.jsonl")
    assert cli.main(["sft", "--config", "recipe.yaml"]) == 0
    command = [
        "evaluate",
        "run",
        "--base",
        "base",
        "--tasks",
        "boolq",
        "--data",
        str(TASKS),
        "--mode",
        "rank",
    ]
    for n in (4, 8):  # the second figure takes the place of the first
        assert cli.main([*command, "--limit", str(n), "--restart"]) == 0
        entry = json.loads((workplace / "run" / "echo_run.json").read_text())["evaluation"]
        assert [(e["task"], e["metric"], e["n"]) for e in entry] == [("boolq", "accuracy_ranked", n)]
    assert cli.main([*command, "--limit", "3", "--restart"]) == 0  # a quick look does not replace the whole
    assert json.loads((workplace / "run" / "echo_run.json").read_text())["evaluation"] == entry
    assert "keeps its figure on 8 items" in capsys.readouterr().out
    assert cli.main([*command[:-1], "generate", "--limit", "5"]) == 0
    assert "| 5 of 8 |" in (workplace / "run" / "README.md").read_text()
    assert cli.main([*command[:-1], "generate", "--restart"]) == 0
    record = json.loads((workplace / "run" / "echo_run.json").read_text())
    assert {e["metric"] for e in record["evaluation"]} == {"accuracy_ranked", "accuracy"}
    card = (workplace / "run" / "README.md").read_text()
    for entry in record["evaluation"]:
        assert f"| boolq | boolq-test.json | test | {entry['metric']} |" in card
    (workplace / "run" / "README.md").write_text("my own words")
    assert cli.main([*command, "--restart"]) == 0
    assert (workplace / "run" / "README.md").read_text() == "my own words"
    assert str(workplace) not in card


def test_bad_input(workplace, capsys):
    (workplace / "empty").mkdir()
    for arguments, message in (
        (["nowhere/at/all"], "no folder nowhere/at/all"),
        (["empty"], "holds neither an adapter nor a model"),
        (["adapter"], "Give --base MODEL"),
        (["base", "--base", "base"], "Leave --base out"),
        (["base", "--limit", "0"], "limit is 0"),
        (["base", "--mode", "rank", "--num_beams", "4"], "mode rank writes nothing"),
        (["base", "--mode", "rank"], "without options to rank"),
        (["base", "--template", "alpacca"], None),
    ):
        command = ["evaluate", *arguments, "--tasks", "mine.jsonl"]
        if message is None:
            with pytest.raises(SystemExit):
                cli.main(command)
        else:
            assert cli.main(command) == 2
            assert message in capsys.readouterr().err
    (workplace / "other").mkdir()
    (workplace / "other" / "mine.jsonl").write_text((workplace / "mine.jsonl").read_text())
    assert cli.main(["evaluate", "base", "--tasks", "mine.jsonl", "other/mine.jsonl"]) == 2
    assert "Two tasks are named 'mine'" in capsys.readouterr().err
    assert cli.main(["evaluate", "base", "--tasks", "none.jsonl"]) == 2
    assert "no file none.jsonl" in capsys.readouterr().err
    for content, message in (
        (b'{"prompt": "w1", "completion": "w2"}\n{"prompt": "w1"\n', "line 2 of the file"),
        (b'{"prompt": "w1", "completion": "w\xff"}\n', "not text in UTF-8"),
        (b'{"prompt": "w1", "completion": "w2"}\n{"prompt": "", "completion": "w2"}\n', "Row 2 of odd: its prompt is"),
        (b'{"prompt": "w1", "completion": "w2"}\n{"prompt": "w1"}\n', "Row 2 of odd: A row needs"),
    ):
        (workplace / "odd.jsonl").write_bytes(content)
        assert cli.main(["evaluate", "base", "--tasks", "odd.jsonl"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["evaluate", "base", "--tasks", "mine.jsonl", "--device", "abacus:0"]) == 2
    assert "'abacus:0' cannot be used here" in capsys.readouterr().err


def test_rows_of_messages(workplace, capsys):
    """Rendered by the chat template of the tokenizer, which is looked for before the model is loaded."""
    rows = [
        {"prompt": [{"role": "user", "content": f"w{n}"}], "completion": [{"role": "assistant", "content": f"w{n}"}]}
        for n in range(5)
    ]
    (workplace / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["evaluate", "adapter", "--base", "base", "--tasks", "chat.jsonl", "--mode", "nll"]
    tokenizer = tiny_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(workplace / "base")
    (workplace / "base" / "chat_template.jinja").unlink(missing_ok=True)
    assert cli.main(command) == 2
    assert "Row 1 of chat: The rows are messages, and the tokenizer has no chat template" in capsys.readouterr().err
    tokenizer.chat_template = template
    tokenizer.save_pretrained(workplace / "base")
    assert cli.main(command) == 0
    assert results("adapter/evaluation", "nll")["results"][0]["n"] == 5


@pytest.mark.parametrize(("harm", "message"), [
    ("missing", "There is a lora_A without its lora_B"),
    ("renamed", "Tensors that PEFT does not load"),
    ("foreign", "no such layer"),
    ("nan", "infinity: garbage"),
    ("base", "PEFT refuses it"),
])  # fmt: skip
def test_a_damaged_adapter_gets_no_figures(workplace, capsys, harm, message):
    path = workplace / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(name for name in tensors if "lora_B" in name)
    if harm in ("missing", "renamed"):
        taken = tensors.pop(name)
        if harm == "renamed":
            tensors[name.replace("lora_B", "lora_Q")] = taken
    elif harm == "foreign":
        for part in ("lora_A", "lora_B"):
            of_layer_0 = name.replace("lora_B", part)
            tensors[of_layer_0.replace("layers.0", "layers.9")] = tensors[of_layer_0].clone()
    elif harm == "nan":
        tensors[name][0, 0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    base = "other" if harm == "base" else "base"
    tiny_model(hidden_size=48, num_attention_heads=2, num_key_value_heads=2).save_pretrained(workplace / "other")
    tiny_tokenizer().save_pretrained(workplace / "other")
    assert cli.main(["evaluate", "adapter", "--base", base, "--tasks", "mine.jsonl", "--mode", "nll"]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) < 6
    assert not (workplace / "adapter" / "evaluation").exists()


def test_the_identity_tells_models_apart(workplace):
    same = [load_for_evaluation("adapter", "base").identity for _ in range(2)]
    assert same[0] == same[1]
    other = load_for_evaluation("base").identity
    assert other["sha256"] == same[0]["sha256"] and "adapter" not in other
    path = workplace / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert load_for_evaluation("adapter", "base").identity["adapter"] != same[0]["adapter"]
    assert str(workplace) not in json.dumps(same)
    assert load_for_evaluation("base", dtype="bfloat16").identity["dtype"] == "bfloat16"


def test_harness_command(workplace):
    loaded = load_for_evaluation("base")
    assert harness_command(loaded, ["social_i_qa", "ARC-Easy"], "float32") == (
        "lm_eval --model hf --model_args pretrained=base,dtype=float32 --tasks social_iqa,arc_easy --batch_size auto"
    )
    assert harness_command(loaded, ["mine"], "float32") is None


def test_accuracy_has_the_score_interval():
    """Against tabled values (Newcombe 1998, table I, method 3)."""
    task = Task("t", [Item("", "")], str.strip, 1)
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        records = [Record(i, "", "", i < correct) for i in range(n)]
        assert task_result(task, records, "generate")["interval"] == pytest.approx([low, high], abs=5e-5)
    assert task_result(task, [Record(i, "", "", True) for i in range(29)], "rank")["interval"][1] == 1.0


def test_the_interval_of_the_average_covers_the_truth():
    """1,000 evaluations of seven tasks with known accuracies."""
    truth = [0.62, 0.55, 0.4, 0.52, 0.8, 0.6, 0.97]
    counts = [200, 150, 180, 100, 220, 110, 50]
    generator = torch.Generator().manual_seed(5)
    draws = [torch.binomial(torch.full((1000,), float(n)), torch.full((1000,), p), generator=generator)
             for n, p in zip(counts, truth, strict=True)]  # fmt: skip
    covered = 0
    for run in range(1000):
        rows = []
        for n, drawn in zip(counts, draws, strict=True):
            right = int(drawn[run])
            task = Task("t", [Item("", "")], str.strip, 1)
            outcome = [Record(i, "", "", i < right) for i in range(n)]
            rows.append(task_result(task, outcome, "generate"))
        low, high = macro_average(rows)["interval"]
        covered += low <= sum(truth) / len(truth) <= high
    assert 930 <= covered <= 970


def test_the_mean_nll_has_an_interval():
    outcome = [Record(i, "", "", False, nll=value) for i, value in enumerate((1.0, 2.0, 3.0, 4.0))]
    result = task_result(Task("t", [Item("", "")], str.strip, 1), outcome, "nll")
    half = 1.959964 * math.sqrt(5 / 3) / 2
    assert (result["value"], result["n"]) == (2.5, 4)
    assert result["interval"] == pytest.approx([2.5 - half, 2.5 + half])
    assert macro_average([result]) is None
    assert macro_average([result, {**result, "metric": "accuracy"}]) is None


def test_metrics_of_the_evaluate_library(tmp_path):
    texts = ["the correct answer is answer2", "answer1 or answer2", "none", "answer3"]
    right = ["answer2", "answer2", "answer1", "answer3"]
    assert ChoiceAccuracy("openbookqa").compute(predictions=texts, references=right) == {"accuracy": 0.5}
    assert ExactMatch().compute(predictions=[" a ", "b"], references=["a", "B"]) == {"exact_match": 0.5}
    numbers = NumberAccuracy().compute(predictions=["so 1,200", "#### 3 4"], references=["#### 1200.0", "4"])
    assert numbers == {"number_accuracy": 0.5}
    both = evaluate_library.combine([ExactMatch(), NumberAccuracy()])
    found = both.compute(predictions=["12", "a 5"], references=["12", "5"])
    assert found == {"exact_match": 0.5, "number_accuracy": 1}
    metric = ExactMatch()
    metric.add_batch(predictions=["a"], references=["a"])
    metric.add_batch(predictions=["b"], references=["c"])
    assert metric.compute() == {"exact_match": 0.5}
    for predictions, references, message in (
        ([], [], "0 predictions cannot be compared with 0"),
        (["a"], ["a", "b"], "1 predictions cannot be compared with 2"),
        (["a"], [3], "reference 3 is not text"),
        ([None], ["a"], "prediction None is not text"),
    ):
        with pytest.raises(ValueError, match=message):
            ExactMatch().compute(predictions=predictions, references=references)
    with pytest.raises(ValueError, match="no commonsense task"):
        ChoiceAccuracy("mmlu")


def test_the_command_does_not_import_the_evaluate_library():
    """It takes seconds to import, and only `evaluation_metrics` needs it."""
    code = (
        "import sys, echo_trainer.cli.evaluate, echo_trainer.evaluation.run, echo_trainer.evaluation.tasks;"
        "sys.exit('evaluate' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
