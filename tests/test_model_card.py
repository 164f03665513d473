"""Model cards say what the reports say, and their metadata are what the Hub wants."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_cases import random_words, write_task
from hub_cases import run
from hub_server import card_problems
from huggingface_hub import ModelCard
from tiny_models import make_model, token_ids
from transformers import AutoModelForCausalLM

from hf_hadacore import HadaCoreConfig
from hf_hadacore.errors import CheckpointError, EvaluationError
from hf_hadacore.evaluation.evaluate import evaluate_checkpoint
from hf_hadacore.inspection import inspect_checkpoint
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.offline.licenses import find_license
from hf_hadacore.publishing.model_card import card_of, is_generated, render_card, write_card


@pytest.fixture(scope="module")
def evaluation(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a real evaluation beside the full-precision model."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "words.txt").write_text(random_words(200))
    write_task(folder / "riddles.jsonl")
    report = evaluate_checkpoint(
        str(made),
        baseline=str(made.parent / "src"),
        text=str(folder / "words.txt"),
        context=32,
        windows=5,
        tasks=[str(folder / "riddles.jsonl")],
        device="cpu",
        progress=False,
    )
    file = folder / "evaluation.json"
    file.write_text(json.dumps({"command": "hadacore evaluate int4 --text words.txt", **report}))
    return file


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quantization_report.json").read_text())


def test_says_what_the_report_and_the_files_say(checkpoint: Path) -> None:
    card = card_of(checkpoint, repo_id="user/int4", base_model="org/big")
    summary = inspect_checkpoint(checkpoint)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert f"[org/big](https://huggingface.co/org/big) with int4 weights: {size / 1e3:.2f} kB instead" in card
    assert f"| {summary['bits_per_weight']:.2f} |" in card
    assert f"| parameters | {summary['parameters']:,} |" in card
    assert f"| in int4 | {100 * summary['quantized_share']:.1f} % |" in card
    assert "| method | rtn |\n| group_size | 128 |\n| symmetric | False |\n| dtype of" in card
    assert "| lm_head.weight | 1 | 7.97 % | output head |" in card
    errors = [layer["relative_error"] for layer in report_of(checkpoint)["layers"]]
    assert f"by {100 * sum(errors) / len(errors):.1f} % (relative L2 norm" in card
    assert "Not measured yet" in card


def test_follows_the_report(checkpoint: Path) -> None:
    report = report_of(checkpoint)
    report["quantization_config"] |= {
        "method": "gptq",
        "group_size": 32,
        "modules_to_not_convert": ["o_proj"],
        "key_means": {r"self_attn$": [2, 16]},
    }
    report |= {"quantized_bytes": 5_000_000_000, "source_bytes": 20_000_000_000, "size_ratio": 0.25}
    report["calibration"] = {"source": "prose.txt", "samples": 7, "sequence_length": 99, "damping": 0.01}
    report["layers"][0]["output_error"] = 0.0123
    report |= {"full_precision": [], "rotation": "r1"}
    card = render_card(report, repo_id="int4", license_data={})
    for expected in (
        "| method | gptq |",
        "| group_size | 32 |",
        "| rotation folded into the weights | r1 |",
        "| mean of the keys, for 8-bit attention | measured on the calibration data |",
        "| modules_to_not_convert | ['o_proj'] |",
        "5.00 GB instead of 20.00 GB",
        "(25.0 % is left)",
        "| calibration data | prose.txt: 7 samples of 99 tokens |",
        "its outputs on the calibration data by 1.23 %",
        "The source names no license",
    ):
        assert expected in card
    assert "In full precision" not in card and "self_attn" not in card


def test_metadata(checkpoint: Path, evaluation: Path) -> None:
    card = card_of(checkpoint, evaluations=[evaluation], repo_id="user/int4", base_model="org/big")
    assert card_problems(card) == []
    data = ModelCard(card).data
    assert data.base_model == "org/big"
    assert data.base_model_relation == "quantized"
    assert data.quantized_by == "user"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.license == "apache-2.0"
    assert set(data.tags) >= {"hadacore", "int4"}
    report = json.loads(evaluation.read_text())
    found = {(result.dataset_name, result.metric_name): result.metric_value for result in data.eval_results}
    attention = report["model"]["attention"]
    perplexity = report["perplexity"]["value"]
    assert found["words.txt", f"perplexity, windows of 32 tokens, attention {attention}"] == round(
        perplexity, 4
    )
    accuracy = report["tasks"]["riddles"]["metrics"]["acc"]["value"]
    assert found["riddles", f"acc, attention {attention}"] == round(accuracy, 4)
    assert len(found) == 3


def test_metadata_without_results_or_known_source(checkpoint: Path) -> None:
    data = ModelCard(card_of(checkpoint)).data.to_dict()
    assert not {"base_model", "base_model_relation", "model-index"} & data.keys()
    report = report_of(checkpoint) | {"source": "org/big"}
    data = ModelCard(render_card(report, repo_id="int4", license_data={})).data.to_dict()
    assert data["base_model"] == "org/big"
    assert "license" not in data


def test_quality_is_that_of_the_evaluation(checkpoint: Path, evaluation: Path) -> None:
    card = card_of(checkpoint, evaluations=[evaluation])
    report = json.loads(evaluation.read_text())
    text, (value, error) = report["perplexity"], report["perplexity"]["over_baseline"].values()
    assert "|  | src, bfloat16 | attention `sdpa` |\n| --- | ---: | ---: |\n" in card
    assert f"| perplexity | {text['baseline']['value']:.3f} | {text['value']:.3f} |" in card
    assert f"| nats per token over the original |  | {value:+.4f} ± {error:.4f} |" in card
    assert "155 tokens of words.txt, in 5 windows" in card
    accuracy = report["tasks"]["riddles"]["metrics"]["acc"]
    before = accuracy["baseline"]
    assert (
        f"| riddles acc | {before['value']:.4f} ± {before['standard_error']:.4f} "
        f"| {accuracy['value']:.4f} ± {accuracy['standard_error']:.4f} |" in card
    )
    change = accuracy["over_baseline"]
    assert f"| difference |  | {change['value']:+.4f} ± {change['standard_error']:.4f} |" in card
    assert f"{report['device']}; hf_hadacore" in card
    assert "`hadacore evaluate int4 --text words.txt`" in card
    assert "Not measured yet" not in card and "## Speed" not in card


def other_attention(evaluation: Path, mode: str) -> dict[str, Any]:
    """The same evaluation as if with 8-bit attention, a little worse."""
    report = json.loads(evaluation.read_text())
    report["command"] = f"hadacore evaluate int4 --attention {mode}"
    report["model"]["attention"] = mode
    report["perplexity"]["value"] += 1
    return report


def test_evaluations_in_the_folder_stand_side_by_side(checkpoint: Path, evaluation: Path) -> None:
    (checkpoint / "evaluation.json").write_text(evaluation.read_text())
    other = other_attention(evaluation, "fp8")
    (checkpoint / "evaluation-fp8.json").write_text(json.dumps(other))
    card = card_of(checkpoint)
    first = json.loads(evaluation.read_text())["perplexity"]
    assert "|  | src, bfloat16 | attention `sdpa` | attention `fp8` |" in card
    values = (first["baseline"]["value"], first["value"], first["value"] + 1)
    assert f"| perplexity | {' | '.join(f'{value:.3f}' for value in values)} |" in card
    assert "`hadacore evaluate int4 --text words.txt`, `hadacore evaluate int4 --attention fp8`" in card


@pytest.mark.parametrize("change", ["device", "windows", "baseline"])
def test_what_was_measured_otherwise_stands_apart(checkpoint: Path, evaluation: Path, change: str) -> None:
    other = other_attention(evaluation, "fp8")
    if change == "device":
        other["device"] = "an abacus"
    elif change == "windows":
        other["perplexity"]["windows"] = 4
    else:
        other["baseline"]["files"] = {"model.safetensors": "0" * 64}
    reports = [json.loads(evaluation.read_text()), other]
    card = render_card(report_of(checkpoint), reports, repo_id="int4", license_data={})
    assert card.count("|  | src, bfloat16 | attention ") == 2
    assert "|  | src, bfloat16 | attention `fp8` |\n" in card


def with_speed(report: dict[str, Any], rate: float) -> dict[str, Any]:
    def part(factor: float) -> dict[str, Any]:
        batches = [
            {"batch": 1, "tokens_per_second": rate * factor, "time_to_first_token": 0.0123},
            {"batch": 8, "tokens_per_second": 9 * rate * factor, "time_to_first_token": 0.05},
        ]
        return {"device": "a GPU", "weight_bytes": 2_000_000, "peak_bytes": 3_000_000, "batches": batches}

    speed = {"prompt_tokens": 128, "new_tokens": 64, "model": part(2), "baseline": part(1)}
    return {**report, "speed": speed}


def test_speed(checkpoint: Path, evaluation: Path) -> None:
    reports = [
        with_speed(json.loads(evaluation.read_text()), 50.5),
        other_attention(evaluation, "int8-fp8"),
        with_speed(other_attention(evaluation, "fp8"), 40.5),
    ]
    card = render_card(report_of(checkpoint), reports, repo_id="int4", license_data={})
    speed = card[card.index("## Speed") : card.index("## Limits")]
    assert "Greedy generate, prompts of 128 tokens, 64 new ones; a GPU.\n\n|  | src, bfloat16 |" in speed
    assert "| src, bfloat16 | attention `sdpa` | attention `fp8` |\n| --- | ---: | ---: | ---: |" in speed
    assert "| tokens per second, batch 1 | 50.5 | 101.0 | 81.0 |" in speed
    assert "| tokens per second, batch 8 | 454.5 | 909.0 | 729.0 |" in speed
    assert "| first token, ms, batch 1 | 12.3 | 12.3 | 12.3 |" in speed
    assert "| weights in memory | 2.00 MB | 2.00 MB | 2.00 MB |" in speed
    assert "| peak memory of the GPU | 3.00 MB | 3.00 MB | 3.00 MB |" in speed


def test_an_evaluation_without_a_baseline(checkpoint: Path, evaluation: Path) -> None:
    report = json.loads(evaluation.read_text()) | {"baseline": None}
    for entry in (report["perplexity"], *report["tasks"]["riddles"]["metrics"].values()):
        for key in ("baseline", "over_baseline", "kl", "top1_agreement"):
            entry.pop(key, None)
    card = render_card(report_of(checkpoint), [report], repo_id="int4", license_data={})
    assert (
        f"|  | attention `sdpa` |\n| --- | ---: |\n| perplexity | {report['perplexity']['value']:.3f} |"
        in card
    )
    assert "difference |" not in card and "over the original" not in card


def test_the_code_loads_it(checkpoint: Path) -> None:
    card = card_of(checkpoint, repo_id=str(checkpoint))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert code.startswith("import hf_hadacore\n")
    names: dict[str, Any] = {}
    exec(code, names)
    expected = AutoModelForCausalLM.from_pretrained(checkpoint)(token_ids()).logits
    assert torch.equal(names["model"](token_ids()).logits, expected)
    assert names["tokenizer"]("w3 w4").input_ids == [3, 4]


def test_names_the_class_of_a_model_that_is_no_causal_one(checkpoint: Path) -> None:
    report = report_of(checkpoint) | {"architecture": "T5ForConditionalGeneration"}
    card = render_card(report, repo_id="int4", license_data={})
    assert "from transformers import T5ForConditionalGeneration, AutoTokenizer" in card
    assert "pipeline_tag" not in card


def test_a_card_that_a_person_wrote_is_kept(checkpoint: Path, evaluation: Path) -> None:
    file = write_card(checkpoint)
    assert is_generated(file.read_text())
    measured = run("card", checkpoint, "--evaluation", evaluation, "--license", "mit", "--repo", "me/int4")
    assert measured.exit_code == 0, measured.output
    assert measured.stdout == f"{file}\n"
    assert "license: mit" in file.read_text() and 'from_pretrained("me/int4"' in file.read_text()

    changed = file.read_text().replace("## Limits", "## Limitations")
    file.write_text(changed)
    result = run("card", checkpoint)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {file}: was written or changed by a person and is kept; force=True (--force) replaces it\n"
    )
    assert file.read_text() == changed
    assert run("card", checkpoint, "--force").exit_code == 0
    assert is_generated(file.read_text())


def test_bad_input_is_named(checkpoint: Path, made: Path, evaluation: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    quantize_checkpoint(made.parent / "src", other, HadaCoreConfig(group_size=32), progress=False)
    with pytest.raises(
        EvaluationError, match=r"evaluation\.json: is of int4, whose weights are not those in"
    ):
        card_of(other, evaluations=[evaluation])
    with pytest.raises(EvaluationError, match=r"lacks what all have: KeyError\('device'\)"):
        broken = json.loads(evaluation.read_text())
        del broken["device"]
        render_card(report_of(checkpoint), [broken], repo_id="int4", license_data={})
    report = checkpoint / "quantization_report.json"
    for content, message in (
        ('{"source": "x"}', r"is no report of hadacore quantize: KeyError\('quantization_config'\)"),
        ("[]", "must be a JSON object, found list"),
        ("{", "cannot be read"),
    ):
        report.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            card_of(checkpoint)
    report.unlink()
    result = run("card", checkpoint)
    assert result.exit_code == 1
    assert "has no quantization_report.json, from which cards are made" in result.stderr
    assert not (checkpoint / "README.md").exists()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"LICENSE": "                Apache License\n           Version 2.0, January 2004"}, "apache-2.0"),
        (
            {"LICENSE.txt": "MIT License\n\nPermission is hereby granted, free of charge, to any person"},
            "mit",
        ),
        (
            {"LICENSE": "\nLLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n"},
            {
                "license": "other",
                "license_name": "llama-3.1-community-license-agreement",
                "license_link": "LICENSE",
            },
        ),
        ({"README.md": "---\nlicense: gemma\n---\n# It\n", "LICENSE": "MIT License"}, "gemma"),
        ({"README.md": "---\nlicense: [broken\n---\n"}, {}),
        ({"README.md": "---\n- no\n- mapping\n---\n", "LICENSE": "Apache License Version 2.0"}, "apache-2.0"),
        ({"README.md": "---\nlicense: [mit, gpl]\n---\n"}, {}),
    ],
)
def test_licenses_are_found(files: dict[str, str], expected: Any, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert find_license(tmp_path) == ({"license": expected} if isinstance(expected, str) else expected)


def test_the_license_of_the_source_is_in_report_and_card(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "src")
    (tmp_path / "src" / "README.md").write_text("---\nlicense: gemma\n---\n# A model\n")
    report = quantize_checkpoint(tmp_path / "src", tmp_path / "int4", HadaCoreConfig(), progress=False)
    assert report["license"] == {"license": "gemma"}
    assert ModelCard(card_of(tmp_path / "int4")).data.license == "gemma"
    assert not (tmp_path / "int4" / "README.md").exists()
