"""What `quantize_checkpoint` does not read or write, and says so before any work."""

import os
from pathlib import Path

import pytest
from checkpoint_cases import change_config, digests, quantize, rewrite, stored

from hf_hadacore import HadaCoreConfig
from hf_hadacore.errors import CheckpointError, ConfigError, QuantizationError
from hf_hadacore.offline import checkpoint


def test_existing_destination(llama_dir: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(llama_dir, dst)
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(llama_dir, dst / "precious")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(llama_dir, llama_dir)
    assert digests(dst).keys() == {"precious"}


def test_destination_that_cannot_be_renamed_or_made(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is a link"):
        quantize(llama_dir, tmp_path / "link")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be made"):
        quantize(llama_dir, tmp_path / "file" / "dst")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(llama_dir, "/")


def test_empty_destination_is_fine(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    quantize(llama_dir, tmp_path / "dst")
    assert (tmp_path / "dst" / "config.json").exists()


def test_destination_inside_the_source(llama_dir: Path) -> None:
    before = digests(llama_dir)
    with pytest.raises(CheckpointError, match="lies in the source"):
        quantize(llama_dir, llama_dir / "int4")
    assert digests(llama_dir) == before


def test_quantized_source(llama_dir: Path, tmp_path: Path) -> None:
    quantize(llama_dir, tmp_path / "dst")
    with pytest.raises(CheckpointError, match=r"already quantized.*hadacore"):
        quantize(tmp_path / "dst", tmp_path / "again")


def test_missing_and_misshapen_tensors(llama_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    whole = stored(llama_dir)
    rewrite(llama_dir, lambda tensors: tensors.update({name: whole[name][:-1].clone()}))
    with pytest.raises(CheckpointError, match=rf"{name}: expected shape \[104, 64\], found \[103, 64\]"):
        quantize(llama_dir, tmp_path / "dst")
    rewrite(llama_dir, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks '{name}' of LlamaForCausalLM"):
        quantize(llama_dir, tmp_path / "dst")
    assert not (tmp_path / "dst.partial").exists()


def test_nan_ends_the_run_with_the_name_of_the_weight(llama_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(llama_dir, lambda tensors: tensors[name].view(-1)[5].fill_(float("nan")))
    with pytest.raises(QuantizationError, match=name):
        quantize(llama_dir, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_truncated_source(llama_dir: Path, tmp_path: Path) -> None:
    os.truncate(llama_dir / "model.safetensors", (llama_dir / "model.safetensors").stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        quantize(llama_dir, tmp_path / "dst")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["os.system"]}, "none of transformers' classes for 'llama'"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "'Qwen3ForCausalLM'.*none of transformers' classes"),
        ({"model_type": "never-heard-of"}, "never-heard-of"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": -64}, "config"),
        ({"num_attention_heads": 0}, "config"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}, "cannot read"),
    ],
)
def test_unknown_architectures(llama_dir: Path, tmp_path: Path, changes: dict, says: str) -> None:
    (llama_dir / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    change_config(llama_dir, **changes)
    with pytest.raises(CheckpointError, match=says):
        quantize(llama_dir, tmp_path / "dst")


@pytest.mark.parametrize("content", [None, "{", "[]", "\xff"])
def test_unreadable_config(llama_dir: Path, tmp_path: Path, content: str | None) -> None:
    (llama_dir / "config.json").unlink()
    if content is not None:
        (llama_dir / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        quantize(llama_dir, tmp_path / "dst")


def test_config_errors_come_before_any_work(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="matches no module"):
        quantize(llama_dir, tmp_path / "dst", HadaCoreConfig(overrides={"q_porj": {"skip": True}}))
    with pytest.raises(CheckpointError, match="max_shard_size='5 apples'"):
        quantize(llama_dir, tmp_path / "dst", max_shard_size="5 apples")
    assert not (tmp_path / "dst.partial").exists()


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("/no/such/folder", "./folder", "a/b/c", ""):
        with pytest.raises(CheckpointError, match="neither a checkpoint folder nor a model id"):
            checkpoint.find_source(name or "\n")

    def offline(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"org/model: .*cannot be had from the Hub: offline"):
        quantize(Path("org/model"), tmp_path / "dst")
