"""lm-eval's real harness on tiny checkpoints: its answers against ours, and its own command line."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from evaluation_cases import word_tokenizer, write_task
from tiny_models import make_model

from hf_hadacore import HadaCoreConfig
from hf_hadacore.errors import EvaluationError
from hf_hadacore.evaluation.evaluate import evaluate_checkpoint
from hf_hadacore.evaluation.harness import run_tasks
from hf_hadacore.evaluation.multiple_choice import multiple_choice
from hf_hadacore.offline.checkpoint import quantize_checkpoint

lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="the eval extra is not installed")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""

GROUP = """
group: both
task: [trivia, few]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


@pytest.fixture(autouse=True)
def own_tasks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval takes seconds to read its thousands of tasks; ours are in the folder "tasks"."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    with_ours = partial(lm_eval_tasks.TaskManager, include_path=str(folder), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", with_ours)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task file of `write_task`'s questions."""
    write_task(tmp_path / "trivia.jsonl")
    file = tmp_path / "tasks" / "trivia.yaml"
    file.write_text(TASK.format(name="trivia", file=tmp_path / "trivia.jsonl"))
    return file


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    make_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    quantize_checkpoint(folder, tmp_path / "int4", HadaCoreConfig(group_size=32), progress=False)
    return tmp_path / "int4"


def test_answers_are_those_of_multiple_choice(task: Path, tmp_path: Path) -> None:
    model, items = make_model("llama", torch.float32), write_task(tmp_path / "trivia.jsonl")
    expected = multiple_choice(model, word_tokenizer(), items)
    results = run_tasks(model, word_tokenizer(), [str(task)], batch_size=4)
    assert list(results) == ["trivia"]
    result = results["trivia"]
    assert result.items == len(items)
    assert result.samples["acc"].bool().tolist() == expected.correct.tolist()
    assert result.samples["acc_norm"].bool().tolist() == expected.correct_normalized.tolist()
    assert result.samples["acc"].unique().tolist() == [0, 1]
    for metric, estimate in (("acc", expected.accuracy), ("acc_norm", expected.normalized_accuracy)):
        assert result.metrics[metric] == pytest.approx(estimate)


def test_a_group_is_its_tasks_together(task: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "few.jsonl", 7)
    task.with_name("few.yaml").write_text(TASK.format(name="few", file=tmp_path / "few.jsonl"))
    task.with_name("both.yaml").write_text(GROUP)
    results = run_tasks(make_model("llama", torch.float32), word_tokenizer(), ["both"])
    assert set(results) == {"both", "trivia", "few"}
    assert results["both"].items == 37
    together = torch.cat([results["trivia"].samples["acc"], results["few"].samples["acc"]])
    assert results["both"].metrics["acc"].value == pytest.approx(together.mean().item())
    assert results["both"].samples["acc"].sum() == together.sum()


def test_report_beside_a_baseline(quantized: Path, task: Path) -> None:
    report = evaluate_checkpoint(
        str(quantized),
        **dict(baseline=str(quantized.with_name("src")), tasks=[str(task)], limit=9, few_shot=1),
        **dict(attention="fp8", device="cpu", progress=False),
    )
    assert "lm_eval" in report["versions"] and report["model"]["attention"] == "fp8"
    entry = report["tasks"]["trivia"]
    assert entry["items"] == 9 and entry["few_shot"] == 1
    metric = entry["metrics"]["acc"]
    difference = metric["value"] - metric["baseline"]["value"]
    assert metric["over_baseline"]["value"] == pytest.approx(difference, abs=1e-5)


def test_tasks_that_cannot_be_run(task: Path) -> None:
    model = make_model("llama", torch.float32)
    with pytest.raises(EvaluationError, match=r"trivial: is neither a \.jsonl file nor a task of lm-eval"):
        run_tasks(model, word_tokenizer(), ["trivial"])
    task.write_text(TASK.format(name="trivia", file="no.jsonl"))
    with pytest.raises(EvaluationError, match=r"lm-eval cannot run .*trivia\.yaml: "):
        run_tasks(model, word_tokenizer(), [str(task)])


def test_the_command_line_of_lm_eval(quantized: Path, task: Path) -> None:
    """It loads the int4 model: without this package, transformers would not know its quantization."""
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "hf_hadacore.evaluation.harness", "--model", "hf"),
            *("--model_args", f"pretrained={quantized},attn_implementation=hadacore", "--device", "cpu"),
            *("--tasks", "trivia", "--include_path", str(task.parent), "--batch_size", "8"),
        ],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    row = next(line for line in result.stdout.splitlines() if line.startswith("|trivia"))
    assert "acc" in row and "±" in row
