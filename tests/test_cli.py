"""The `hadacore` command, run on a tiny model with a tokenizer made here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from hf_hadacore import HadaCoreCache, __version__
from hf_hadacore.cli import app
from hf_hadacore.offline import checkpoint

runner = CliRunner()


def run(*arguments: object):
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def src(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def quantized(src: Path, tmp_path: Path) -> Path:
    result = run("quantize", src, tmp_path / "int4", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return tmp_path / "int4"


def test_quantize_passes_its_options_on(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "int4"
    result = run(
        *("quantize", src, dst, "--group-size", 64, "--symmetric", "--skip", "o_proj", "--quantize-lm-head"),
        *(
            "--override",
            r"layers\.(?:1)\.mlp:group_size=32,symmetric=false",
            "--override",
            "q_proj:skip=true",
        ),
        *("--dtype", "float16", "--max-shard-size", "20KB", "--device", "cpu", "--attention", "int8-fp8"),
    )
    assert result.exit_code == 0, result.output
    assert "of the source" in result.stdout
    recipe = json.loads((dst / "config.json").read_text())["quantization_config"]
    assert recipe["group_size"] == 64
    assert recipe["symmetric"] is True
    assert recipe["modules_to_not_convert"] == ["o_proj"]
    assert recipe["quantize_lm_head"] is True
    assert recipe["attention"] == "int8-fp8"
    assert recipe["overrides"] == {
        r"layers\.(?:1)\.mlp": {"group_size": 32, "symmetric": False},
        "q_proj": {"skip": True},
    }
    assert json.loads((dst / "config.json").read_text())["dtype"] == "float16"
    assert (dst / "model.safetensors.index.json").exists()
    assert (dst / "tokenizer.json").exists()


def test_quantize_with_calibration(src: Path, tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.write_text(" ".join(f"w{9 + 7 * i % 80}" for i in range(200)))
    options = ("--method", "gptq", "--calibration", text, "--samples", 6, "--sequence-length", 16)
    result = run("quantize", src, tmp_path / "int4", *options, "--device", "cpu")
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    assert (recipe["method"], recipe["act_order"]) == ("gptq", "static")
    report = json.loads((tmp_path / "int4" / "quantization_report.json").read_text())
    assert report["calibration"]["source"] == "prose.txt"
    assert str(tmp_path) not in json.dumps(report)
    natural = run("quantize", src, tmp_path / "natural", *options, "--device", "cpu", "--act-order", "none")
    assert natural.exit_code == 0, natural.output
    assert json.loads((tmp_path / "natural" / "config.json").read_text())["quantization_config"][
        "act_order"
    ] is False  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "gptq"], "needs calibration data"),
        (["--method", "gptq", "--calibration", "no.txt"], r"no.txt: there is no such file"),
        (["--method", "gptq", "--calibration", "no.txt", "--act-order", "sideways"], "act_order must be"),
        (["--calibration", "no.txt"], "uses no calibration data"),
        (["--act-order", "static"], 'needs method="gptq"'),
    ],
)
def test_calibration_errors_come_before_any_work(
    src: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    result = run("quantize", src, tmp_path / "int4", *options)
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_errors_are_one_line_and_exit_code_1(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("quantize", src, tmp_path / "int4", "--group-size", 48)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: group_size must be one of")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    monkeypatch.setenv("HADACORE_DEBUG", "1")
    result = run("quantize", src, tmp_path / "int4", "--group-size", 48)
    assert type(result.exception).__name__ == "ConfigError"


@pytest.mark.parametrize(
    "override", ["q_proj", ":group_size=32", "q_proj:group_size", "q_proj:=3", "q_proj:"]
)
def test_malformed_overrides_are_usage_errors(src: Path, tmp_path: Path, override: str) -> None:
    result = run("quantize", src, tmp_path / "int4", "--override", override)
    assert result.exit_code == 2
    assert "REGEX:OPTION=VALUE" in result.output


def test_override_values_are_checked_by_the_config(src: Path, tmp_path: Path) -> None:
    result = run("quantize", src, tmp_path / "int4", "--override", "q_proj:group_size=many")
    assert result.exit_code == 1
    assert "'many'" in result.stderr


@pytest.mark.parametrize("arguments", [["quantize"], ["fly"], ["info", "--no-such-option"]])
def test_usage_errors(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_interrupted_run_says_how_to_continue(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "_write_small_files", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        result = run("quantize", src, tmp_path / "int4", "--device", "cpu")
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert run("quantize", src, tmp_path / "int4", "--device", "cpu").exit_code == 1
    assert run("quantize", src, tmp_path / "int4", "--device", "cpu", "--resume").exit_code == 0


def test_info(quantized: Path) -> None:
    summary = json.loads(run("info", quantized, "--json").stdout)
    report = json.loads((quantized / "quantization_report.json").read_text())
    assert summary["architecture"] == report["architecture"] == "LlamaForCausalLM"
    assert summary["parameters"] == report["parameters"]
    assert summary["quantized_share"] == pytest.approx(report["quantized_share"], abs=1e-5)
    assert summary["quantization_config"] == report["quantization_config"]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in report["layers"])
    stored_bits = sum(
        layer["bits_per_weight"] * layer["shape"][0] * layer["shape"][1] for layer in report["layers"]
    )
    assert summary["bits_per_weight"] == pytest.approx(stored_bits / weights, abs=1e-3)
    assert summary["bytes_by_kind"]["int4 weights"] == weights // 2
    assert sum(summary["bytes_by_kind"].values()) == summary["bytes"]
    kept = {group["name"]: group for group in summary["full_precision"]}
    assert kept["lm_head.weight"]["reason"] == "output head"
    assert kept["model.layers.*.input_layernorm.weight"]["count"] == 2
    text = run("info", quantized).stdout
    for expected in (
        "LlamaForCausalLM",
        "group_size=128",
        "bits per weight",
        "lm_head.weight",
        "(output head)",
    ):
        assert expected in text


def test_info_of_a_full_precision_checkpoint(src: Path) -> None:
    summary = json.loads(run("info", src, "--json").stdout)
    assert summary["bits_per_weight"] is None
    assert summary["bits_per_parameter"] == 16
    assert summary["quantized_share"] == 0
    assert "none, full precision" in run("info", src).stdout


def test_info_of_a_damaged_checkpoint(quantized: Path) -> None:
    os.truncate(quantized / "model.safetensors", 100)
    result = run("info", quantized)
    assert result.exit_code == 1
    assert "model.safetensors: truncated" in result.stderr


@pytest.mark.parametrize("options", [(), ("--no-chat",), ("--temperature", "0.7")])
def test_generate(quantized: Path, options: tuple[str, ...]) -> None:
    result = run("generate", quantized, "w3 w4", "--max-new-tokens", 5, "--device", "cpu", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("w") or result.stdout.startswith("[")
    assert "w3 w4" not in result.stdout
    assert "tok/s" in result.stderr
    assert "tok/s" not in result.stdout


def test_generate_with_8bit_attention(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    make_cache = HadaCoreCache.__init__
    monkeypatch.setattr(
        HadaCoreCache,
        "__init__",
        lambda *args, **kwargs: (caches.append(args[0]), make_cache(*args, **kwargs))[1],
    )
    arguments = ("generate", quantized, "w3", "--max-new-tokens", 3, "--device", "cpu")
    assert run(*arguments, "--attention", "int8-fp8").exit_code == 0
    (cache,) = caches
    assert cache.layers[0].key_dtype == torch.int8
    result = run(*arguments, "--attention", "fp4")
    assert result.exit_code == 1 and "fp8" in result.stderr


def test_greedy_generation_repeats(quantized: Path) -> None:
    outputs = {
        run("generate", quantized, "w3", "--max-new-tokens", 8, "--device", "cpu").stdout for _ in range(2)
    }
    assert len(outputs) == 1


def test_generate_without_template_or_model(quantized: Path, tmp_path: Path) -> None:
    (quantized / "chat_template.jinja").unlink()
    result = run("generate", quantized, "w3", "--chat", "--device", "cpu")
    assert result.exit_code == 1
    assert "--no-chat" in result.stderr
    result = run("generate", tmp_path / "absent", "w3")
    assert result.exit_code == 1
    assert "neither a checkpoint folder nor a model id" in result.stderr


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"hadacore {__version__}\n"


@pytest.mark.parametrize("command", [("-m", "hf_hadacore"), ("scripts/quantize.py",)])
def test_other_ways_to_start_it(command: tuple[str, ...]) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
