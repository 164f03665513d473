"""`quantize_checkpoint` with a rotation is rotating the model first and quantizing it then."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import rewrite, stored
from test_cli import run
from tiny_models import VOCAB_SIZE, make_model
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from varied_models import plain

from hf_hadacore import HadaCoreConfig
from hf_hadacore.errors import CheckpointError, ConfigError, UnsupportedError
from hf_hadacore.interchange.exporting import export_checkpoint
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.offline.layer_solver import LayerSolver
from hf_hadacore.offline.rotation_search import rotate_model

pytestmark = pytest.mark.transformers_versions

TOKENS = torch.randint(1, VOCAB_SIZE, (16, 24), generator=torch.Generator().manual_seed(7))


def quantize(src: Path, dst: Path, method: str = "rtn", **options: Any) -> dict[str, Any]:
    calibration = TOKENS if method == "gptq" else None
    config = HadaCoreConfig(method=method, act_order=method == "gptq", group_size=32)
    return quantize_checkpoint(src, dst, config, calibration=calibration, progress=False, **options)


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def read(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS[:2]).logits


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama-tied", "r2"), ("llama", "r1"), ("gemma3", "r2"), ("qwen3-moe", "r1r2"), ("gpt-oss", "r1r2")],
)
def test_equals_quantizing_the_rotated_model(tmp_path: Path, name: str, kind: str, method: str) -> None:
    src = save(make_model(name), tmp_path / "src")
    rotated = save(rotate_model(make_model(name), kind), tmp_path / "rotated")
    report = quantize(src, tmp_path / "int4", method, rotation=kind)
    assert report["rotation"] == kind
    quantize(rotated, tmp_path / "expected", method, rotation="none")
    found, expected = stored(tmp_path / "int4"), stored(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("int4", "expected")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_tied_ends_stay_as_they_are(tmp_path: Path, method: str) -> None:
    src = save(make_model("llama-tied"), tmp_path / "src")
    quantize(src, tmp_path / "int4", method, rotation="r1r2")
    rotated = save(rotate_model(make_model("llama-tied"), "r1r2"), tmp_path / "rotated")
    quantize(rotated, tmp_path / "untied", method, rotation="none")
    found, expected, source = (stored(tmp_path / folder) for folder in ("int4", "untied", "src"))
    ends = {"model.embed_tokens.weight", "model.norm.weight"}
    added = ("_scale", "_zero", ".k_mean")
    assert found.keys() == source.keys() | {key for key in expected if key.endswith(added)}
    for key, value in found.items():
        if key in ends:
            assert torch.equal(value, source[key])
        elif method == "rtn":
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["llama-tied", "llama"])
def test_the_result_computes_what_the_model_did(tmp_path: Path, name: str) -> None:
    model = make_model(name)
    src = save(model, tmp_path / "src")
    quantize(src, tmp_path / "int4", rotation="r1r2", dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
    assert loaded.config.tie_word_embeddings == (name == "llama-tied")
    logits = read(loaded)
    # int4; weights that were rotated on one side only give more than 1
    assert relative_difference(logits, read(model.float())) < 0.25
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(read(again), logits)


def test_a_rotated_stream_is_folded_when_it_is_dequantized(tmp_path: Path) -> None:
    src = save(make_model("llama-tied"), tmp_path / "src")
    quantize(src, tmp_path / "int4", rotation="r1r2", dtype="float32")
    expected = read(AutoModelForCausalLM.from_pretrained(tmp_path / "int4"))
    options = HadaCoreConfig(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", quantization_config=options)
    assert not plain.config.tie_word_embeddings
    assert relative_difference(read(plain), expected) < 1e-5
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert relative_difference(read(again), expected) < 1e-5


def test_a_rotated_stream_cannot_be_exported(tmp_path: Path) -> None:
    src = save(make_model("llama-tied"), tmp_path / "src")
    quantize(src, tmp_path / "int4", rotation="r1")
    with pytest.raises(UnsupportedError, match='rotation="none"'):
        export_checkpoint(tmp_path / "int4", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["model.embed_tokens", "model.norm"],
        {"embedding": "model.embed_tokens", "norm": "model.norm"},
        {"embedding": "model.embed_tokens", "norm": "model.norm", "gain_offset": 0},
    ],
)
def test_a_stream_rotation_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="stream_rotation must be"):
        HadaCoreConfig(stream_rotation=wrong)


def test_where_a_stream_is_rotated_must_be_in_the_model(tmp_path: Path) -> None:
    src = save(make_model("llama-tied"), tmp_path / "src")
    quantize(src, tmp_path / "int4", rotation="r1")
    file = tmp_path / "int4" / "config.json"
    file.write_text(file.read_text().replace('"model.norm"', '"model.last_norm"'))
    with pytest.raises(ConfigError, match=r"no embedding or norm 'model\.last_norm'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "int4")


def test_the_base_model_alone(tmp_path: Path) -> None:
    """Options name modules as the whole model does, tensors of a base model are saved without its prefix."""
    src = save(make_model("llama-tied"), tmp_path / "src")
    quantize(src, tmp_path / "int4", "gptq", rotation="r1r2")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", attn_implementation="hadacore")
    with torch.no_grad():
        expected = whole.model(TOKENS[:2]).last_hidden_state
    for folder in ("int4", "base"):
        base = AutoModel.from_pretrained(tmp_path / folder, attn_implementation="hadacore")
        means = [base.layers[i].self_attn.k_mean for i in range(2)]
        assert all(torch.equal(m, whole.model.layers[i].self_attn.k_mean) for i, m in enumerate(means))
        with torch.no_grad():
            assert torch.equal(base(TOKENS[:2]).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedError, match="LlamaModel has no output head"):
        AutoModel.from_pretrained(tmp_path / "int4", quantization_config=HadaCoreConfig(dequantize=True))


def test_only_checkpoints_have_a_rotated_stream(tmp_path: Path) -> None:
    src = save(make_model("llama-tied"), tmp_path / "src")
    where = {"embedding": "model.embed_tokens", "norm": "model.norm", "gain_offset": 0.0}
    with pytest.raises(ConfigError, match="describes a quantized checkpoint"):
        AutoModelForCausalLM.from_pretrained(src, quantization_config=HadaCoreConfig(stream_rotation=where))


@pytest.mark.parametrize(
    ("name", "method", "kind"),
    [
        ("llama", "gptq", "r1r2"),
        ("llama-tied", "gptq", "r1r2"),
        ("gemma3", "gptq", None),
        ("llama", "rtn", None),
    ],
)
def test_by_default_gptq_rotates_what_it_can(
    tmp_path: Path, name: str, method: str, kind: str | None
) -> None:
    src = save(make_model(name), tmp_path / "src")
    report = quantize(src, tmp_path / "int4", method)
    assert report.get("rotation") == kind
    explicit = quantize(src, tmp_path / "explicit", method, rotation=kind or "none")
    assert report == {**explicit, "seconds": report["seconds"]} if "seconds" in report else report == explicit


def test_a_tied_pair_of_which_only_the_head_is_stored(tmp_path: Path) -> None:
    src = save(make_model("llama-tied"), tmp_path / "src")
    quantize(src, tmp_path / "expected", rotation="r1")
    rewrite(src, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    quantize(src, tmp_path / "int4", rotation="r1")
    expected = stored(tmp_path / "expected")
    assert all(torch.equal(value, expected[key]) for key, value in stored(tmp_path / "int4").items())


def test_resume_refuses_another_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = save(make_model("llama"), tmp_path / "src")
    with monkeypatch.context() as patch:
        patch.setattr("hf_hadacore.offline.checkpoint._write_small_files", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(src, tmp_path / "int4", rotation="r2")
    with pytest.raises(CheckpointError, match="rotation"):
        quantize(src, tmp_path / "int4", resume=True)
    assert quantize(src, tmp_path / "int4", resume=True, rotation="r2")["rotation"] == "r2"


def test_an_interrupted_run_goes_on_with_what_was_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = save(make_model("llama-tied"), tmp_path / "src")
    quantize(src, tmp_path / "expected", "gptq", rotation="r1r2")
    solve = LayerSolver.solve

    def dying(solver: LayerSolver) -> None:
        if "model.layers.1.mlp.down_proj" in solver._modules:
            raise KeyboardInterrupt
        solve(solver)

    with monkeypatch.context() as patch:
        patch.setattr(LayerSolver, "solve", dying)
        with pytest.raises(KeyboardInterrupt):
            quantize(src, tmp_path / "int4", "gptq", rotation="r1r2")
    quantize(src, tmp_path / "int4", "gptq", rotation="r1r2", resume=True)
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "int4" / file.name).read_bytes() == file.read_bytes()


def test_what_cannot_be_rotated_is_refused_before_any_work(tmp_path: Path) -> None:
    src = save(make_model("gemma3"), tmp_path / "src")
    with pytest.raises(UnsupportedError, match='rotation="r2"'):
        quantize(src, tmp_path / "int4", rotation="r1r2")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_the_command_line_has_it(tmp_path: Path) -> None:
    src = save(make_model("llama"), tmp_path / "src")
    result = run("quantize", src, tmp_path / "int4", "--device", "cpu", "--rotate", "r1r2")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "int4" / "quantization_report.json").read_text())["rotation"] == "r1r2"
    result = run("quantize", src, tmp_path / "other", "--device", "cpu", "--rotate", "r3")
    assert result.exit_code == 1
    assert "expected one of auto, none, r1, r2, r1r2, found 'r3'" in result.output


def test_a_rotated_stream_decodes_with_graphs(recorder, tmp_path: Path) -> None:
    src = save(make_model("llama-tied"), tmp_path / "src")
    quantize(src, tmp_path / "int4", rotation="r1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.float32)
    assert model.config.quantization_config.stream_rotation is not None
    options = dict(do_sample=False, max_new_tokens=10)
    expected = plain(model, TOKENS[:2], **options)
    assert torch.equal(model.generate(TOKENS[:2], **options), expected)
    assert recorder.replays == 8
