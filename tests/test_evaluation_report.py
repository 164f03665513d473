"""`hadacore evaluate` on tiny checkpoints: its report against the functions below it, and its errors."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from evaluation_cases import random_words, word_tokenizer, write_task
from tiny_models import make_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_hadacore import HadaCoreConfig
from hf_hadacore.cli import app
from hf_hadacore.errors import CheckpointError, EvaluationError
from hf_hadacore.evaluation.evaluate import Loaded, Protocol, evaluate_checkpoint, evaluate_models
from hf_hadacore.evaluation.multiple_choice import multiple_choice
from hf_hadacore.evaluation.perplexity import compare, encode, paired_difference
from hf_hadacore.evaluation.report import read_evaluation
from hf_hadacore.evaluation.speed import measure_speed
from hf_hadacore.evaluation.text_source import read_text
from hf_hadacore.offline.checkpoint import quantize_checkpoint

CONTEXT = 16


@pytest.fixture
def src(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    make_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def quantized(src: Path, tmp_path: Path) -> Path:
    quantize_checkpoint(src, tmp_path / "int4", HadaCoreConfig(group_size=32), progress=False)
    return tmp_path / "int4"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "prose.txt"
    file.write_text(random_words(70))
    return file


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in ("evaluate", *arguments)])


@pytest.mark.transformers_versions
def test_report(quantized: Path, src: Path, text: Path, tmp_path: Path) -> None:
    items = write_task(tmp_path / "trivia.jsonl")
    out = tmp_path / "out.json"
    result = run(
        *(quantized, "--baseline", src, "--text", text, "--context", CONTEXT, "--windows", 3),
        *("--tasks", tmp_path / "trivia.jsonl", "--device", "cpu", "--json", out),
    )
    assert result.exit_code == 0, result.output
    content = out.read_text()
    assert str(tmp_path) not in content
    report = json.loads(content)
    assert report["command"] == (
        "hadacore evaluate int4 --baseline src --text prose.txt --context 16 --windows 3 "
        "--tasks trivia.jsonl --device cpu"
    )
    assert set(report["versions"]) == {"hf_hadacore", "transformers", "torch", "python"}
    assert report["model"]["name"] == "int4" and report["baseline"]["name"] == "src"
    assert report["model"]["quantization_config"]["group_size"] == 32
    assert report["baseline"]["quantization_config"] is None
    assert report["model"]["bytes"] < report["baseline"]["bytes"]

    model, baseline = (AutoModelForCausalLM.from_pretrained(folder) for folder in (quantized, src))
    ids, _ = encode(word_tokenizer(), text.read_text())
    expected, (found,) = compare([model], baseline, ids, context=CONTEXT, windows=3)
    perplexity = report["perplexity"]
    assert perplexity["value"] == pytest.approx(found.perplexity.perplexity, rel=1e-5)
    assert perplexity["nll_by_window"] == pytest.approx(found.perplexity.token_nll.mean(1).tolist(), rel=1e-5)
    assert perplexity["baseline"]["value"] == pytest.approx(expected.perplexity, rel=1e-5)
    change = paired_difference(found.perplexity, expected)
    assert list(perplexity["over_baseline"].values()) == pytest.approx(change, abs=1e-6)
    assert list(perplexity["kl"].values()) == pytest.approx(found.kl, abs=1e-6)
    assert list(perplexity["top1_agreement"].values()) == pytest.approx(found.top1_agreement, abs=1e-6)
    assert perplexity["tokens"] == 45 and perplexity["text_sha256"] == read_text(str(text)).sha256

    answers, others = (multiple_choice(m, word_tokenizer(), items) for m in (model, baseline))
    task = report["tasks"]["trivia"]
    assert task["items"] == len(items)
    for name, mine, theirs in (
        ("acc", answers.correct, others.correct),
        ("acc_norm", answers.correct_normalized, others.correct_normalized),
    ):
        metric = task["metrics"][name]
        assert metric["value"] == pytest.approx(mine.double().mean().item(), abs=1e-6)
        assert metric["baseline"]["value"] == pytest.approx(theirs.double().mean().item(), abs=1e-6)
        difference = mine.double() - theirs.double()
        change = [difference.mean().item(), difference.std().item() / len(items) ** 0.5]
        assert list(metric["over_baseline"].values()) == pytest.approx(change, abs=1e-6)

    for expected_text in ("perplexity", "KL divergence", "same likeliest token", "trivia acc_norm", "±"):
        assert expected_text in result.stdout


@pytest.mark.transformers_versions
def test_attention_is_the_checkpoints_alone(src: Path, text: Path) -> None:
    report = evaluate_checkpoint(
        str(src),
        **dict(baseline=str(src), text=str(text), context=CONTEXT, attention="int8-fp8", device="cpu"),
        progress=False,
    )
    assert report["model"]["attention"] == "int8-fp8" and report["baseline"]["attention"] == "sdpa"
    assert report["perplexity"]["windows"] == 4  # all that the text holds
    assert 0 < report["perplexity"]["kl"]["value"] < 0.01


def test_without_a_baseline_and_with_few_questions(src: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "trivia.jsonl")
    out = tmp_path / "out.json"
    result = run(src, "--tasks", tmp_path / "trivia.jsonl", "--limit", 1, "--device", "cpu", "--json", out)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["baseline"] is None and "perplexity" not in report
    assert report["tasks"]["trivia"]["items"] == 1
    assert report["tasks"]["trivia"]["metrics"]["acc"]["standard_error"] is None


def test_speed(src: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(measure_speed, prompt_tokens=4, new_tokens=3, repeats=1)
    monkeypatch.setattr("hf_hadacore.evaluation.evaluate.measure_speed", few)
    out = tmp_path / "out.json"
    arguments = ("--context", CONTEXT, "--windows", 2, "--device", "cpu", "--json", out, "--speed")
    result = run(quantized, "--baseline", src, *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["command"].endswith(" --windows 2 --device cpu --speed")
    model, baseline = report["speed"]["model"], report["speed"]["baseline"]
    assert model["device"] == baseline["device"] == report["device"]
    assert model["weight_bytes"] < baseline["weight_bytes"] and model["peak_bytes"] is None
    (batch,) = model["batches"]
    assert batch["batch"] == 1 and batch["tokens_per_second"] > 0 and batch["time_to_first_token"] > 0
    assert "generate, tok/s, batch 1" in result.stdout
    assert "greedy generate, prompts of 4 tokens, 3 new ones" in result.stdout


def test_default_text_and_dtype(src: Path) -> None:
    result = run(src, "--context", CONTEXT, "--windows", 2, "--dtype", "float32", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "30 tokens of Python's documentation, 2 windows" in result.stdout


def test_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "prose"
    folder.mkdir()
    for split, texts in (("train", ["no"]), ("test", ["one", "two"])):
        lines = [json.dumps({"text": text, "id": 1}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    assert read_text(str(folder)).content == "one\n\ntwo"
    assert read_text(f"{folder}::train").content == "no"
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text('{"prose": "one", "id": 1}')
    with pytest.raises(EvaluationError, match="has no column 'text', but prose, id"):
        read_text(str(folder))


def test_several_models_are_measured_as_one_by_one(
    src: Path, quantized: Path, text: Path, tmp_path: Path
) -> None:
    """And their baseline once."""
    write_task(tmp_path / "trivia.jsonl")
    options: dict = dict(text=str(text), context=CONTEXT, windows=3, tasks=[str(tmp_path / "trivia.jsonl")])
    protocol = Protocol.read(**options, progress=False)
    models = [Loaded.load(str(quantized), device="cpu", attention=mode) for mode in (None, "fp8")]
    baseline = Loaded.load(str(src), device="cpu")
    passes: list[int] = []
    baseline.model.register_forward_pre_hook(lambda *args: passes.append(1))
    reports = evaluate_models(models, baseline, protocol)
    first = next(reports)
    counted = len(passes)
    second = next(reports)
    assert len(passes) == counted > 0 and next(reports, None) is None
    for report, mode in ((first, None), (second, "fp8")):
        alone = evaluate_checkpoint(
            str(quantized), baseline=str(src), attention=mode, device="cpu", progress=False, **options
        )
        assert report == alone


def test_reports_of_other_weights(src: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    report = evaluate_checkpoint(str(src), text=str(text), context=CONTEXT, device="cpu", progress=False)
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    assert read_evaluation(file, src) == report
    with pytest.raises(EvaluationError, match=r"is of src, whose weights are not those in .*int4"):
        read_evaluation(file, quantized)
    with pytest.raises(CheckpointError):
        read_evaluation(file, tmp_path)
    for content in ("{", "[]", '{"models": {}}'):
        file.write_text(content)
        with pytest.raises(EvaluationError, match=r"report\.json: (cannot be read|is no evaluation)"):
            read_evaluation(file, src)


def no_tokenizer(src: Path, tmp_path: Path) -> list[object]:
    for file in src.glob("tokenizer*"):
        file.unlink()
    return [src]


def no_tokenizer_of_the_baseline(src: Path, tmp_path: Path) -> list[object]:
    make_model("llama").save_pretrained(tmp_path / "bare")
    return [src, "--baseline", tmp_path / "bare"]


def other_vocabulary(src: Path, tmp_path: Path) -> list[object]:
    model = make_model("llama")
    model.resize_token_embeddings(100, mean_resizing=False)
    model.save_pretrained(tmp_path / "other")
    word_tokenizer().save_pretrained(tmp_path / "other")
    return [src, "--baseline", tmp_path / "other"]


def damaged(src: Path, tmp_path: Path) -> list[object]:
    (src / "model.safetensors").write_bytes(b"no weights")
    return [src]


def empty_text(src: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "empty.txt").write_text("w3 w4")
    return [src, "--text", tmp_path / "empty.txt"]


def binary_text(src: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    return [src, "--text", tmp_path / "image.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda src, tmp: [tmp], "found no config.json"),
        (lambda src, tmp: [tmp / "absent"], "is neither a checkpoint folder nor a model id"),
        (lambda src, tmp: [src, "--baseline", tmp], "found no config.json"),
        (no_tokenizer, "src: has no tokenizer"),
        (no_tokenizer_of_the_baseline, "bare: has no tokenizer"),
        (other_vocabulary, "other: has another vocabulary than"),
        (damaged, "model.safetensors: "),
        (empty_text, "2 tokens hold 0 windows of 16"),
        (binary_text, "image.png: cannot be read as text"),
        (lambda src, tmp: [src, "--text", tmp / "no.txt"], "no.txt: is neither a file nor a dataset"),
        (lambda src, tmp: [src, "--context", 65], "context must be 2 to 64 tokens"),
        (lambda src, tmp: [src, "--attention", "fp4"], "attention must be one of"),
        (lambda src, tmp: [src, "--dtype", "float12"], "dtype must be a name like"),
        (lambda src, tmp: [src, "--tasks", tmp / "no.jsonl"], "no.jsonl: cannot be read"),
        (lambda src, tmp: [src, "--tasks", "mmlu"], 'pip install "hf_hadacore[eval]"'),
        (lambda src, tmp: [src, "--json", tmp / "no" / "out.json"], "there is no folder"),
        (lambda src, tmp: [src, "--windows", 1, "--json", tmp], "cannot be written: Is a directory"),
    ],
)
def test_errors_are_one_line(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("--device", "cpu", "--context", CONTEXT, *arguments(src, tmp_path))
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1], result.stderr
    assert "Traceback" not in result.output


def test_a_gpu_that_is_too_small(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Linear, "forward", run_out)
    result = run(src, "--device", "cpu", "--context", CONTEXT)
    assert result.exit_code == 1 and "--baseline-device cpu" in result.stderr


def test_nothing_is_measured_before_bad_input_is_found(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda *args: pytest.fail("a model ran before the task was read")
    )
    write_task(tmp_path / "good.jsonl")
    tasks = f"{tmp_path / 'good.jsonl'},{tmp_path / 'bad.jsonl'}"
    assert run(src, "--tasks", tasks, "--device", "cpu").exit_code == 1
