"""Offline quantization: the same bytes as loading and saving, whole or absent, resumable at any point."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY_CONFIGS, make_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_hadacore import HadaCoreConfig
from hf_hadacore.errors import CheckpointError, ConfigError, QuantizationError
from hf_hadacore.integrity import checkpoint_files, verify_files
from hf_hadacore.offline import checkpoint, shard_writer
from hf_hadacore.offline.checkpoint import quantize_checkpoint
from hf_hadacore.offline.layer_record import relative_error
from hf_hadacore.offline.streaming import SourceModel

RECIPES = {
    "default": HadaCoreConfig(),
    "head": HadaCoreConfig(group_size=64, quantize_lm_head=True),
    "mixed": HadaCoreConfig(
        group_size=32,
        symmetric=True,
        overrides={r"layers\.0": {"skip": True}, "o_proj": {"symmetric": False}},
    ),
}


def quantize(src: Path, dst: Path, config: HadaCoreConfig | None = None, **options) -> dict:
    return quantize_checkpoint(src, dst, config or HadaCoreConfig(), **{"progress": False, **options})


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in checkpoint_files(folder) for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def src(tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "src")
    return tmp_path / "src"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    make_model("llama-tied").save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.transformers_versions
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_equals_loading_and_saving(tmp_path: Path, name: str, recipe: str) -> None:
    make_model(name).save_pretrained(tmp_path / "src", max_shard_size="50KB")
    config = RECIPES[recipe]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "src", quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")

    quantize(tmp_path / "src", tmp_path / "dst", config, max_shard_size="30KB")

    offline, saved = digests(tmp_path / "dst"), digests(tmp_path / "saved")
    assert len(saved) > 4
    del offline["quantization_report.json"]
    assert offline == saved


SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
)
OTHER_MODELS = {
    # A router bias that stays in fp32 whatever the dtype.
    "deepseek-v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
        )
    ),
    # A model of models, whose parts are renamed.
    "gemma3-vision": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=dict(**SIZES, head_dim=16),
            vision_config=dict(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=28,
                patch_size=14,
            ),
            mm_tokens_per_image=4,
        )
    ),
    # Three tied tensors, and no generation head that is called lm_head alone.
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ),
    "classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0)),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_architectures_equal_loading_and_saving(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = OTHER_MODELS[name]().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "src", max_shard_size="100KB")
    loaded = type(model).from_pretrained(
        tmp_path / "src", quantization_config=HadaCoreConfig(), device_map="cpu"
    )
    loaded.save_pretrained(tmp_path / "saved")
    quantize(tmp_path / "src", tmp_path / "dst")
    offline, saved = digests(tmp_path / "dst"), digests(tmp_path / "saved")
    del offline["quantization_report.json"]
    assert offline == saved


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype_is_that_of_loading(src: Path, tmp_path: Path, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        src, quantization_config=HadaCoreConfig(), dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "saved")
    quantize(src, tmp_path / "dst", dtype=dtype)
    offline, saved = digests(tmp_path / "dst"), digests(tmp_path / "saved")
    del offline["quantization_report.json"]
    assert offline == saved


@pytest.mark.transformers_versions
def test_result_loads_and_its_report_is_true(src: Path, tmp_path: Path) -> None:
    report = quantize(src, tmp_path / "dst", RECIPES["mixed"])
    assert report == json.loads((tmp_path / "dst" / "quantization_report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", device_map="cpu")
    original = stored(src)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert len(layers) == 7
    for name, layer in layers.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        weight = module.int4_weight()
        exact = original[name].float()
        error = float((weight.dequantize(torch.float32) - exact).norm() / exact.norm())
        assert layer["relative_error"] == pytest.approx(error, rel=1e-4)
        assert layer["shape"] == list(exact.shape)
        assert (layer["group_size"], layer["symmetric"]) == (module.group_size, module.weight_zero is None)
        stored_bytes = sum(t.numel() * t.element_size() for t in weight[:3] if t is not None)
        assert layer["bits_per_weight"] == pytest.approx(8 * stored_bytes / exact.numel(), abs=1e-3)
    kept = {entry["name"]: entry for entry in report["full_precision"]}
    assert kept["model.layers.0.mlp.down_proj.weight"]["reason"] == "skipped by an override"
    assert sum(entry["share"] for entry in kept.values()) == pytest.approx(
        1 - report["quantized_share"], abs=1e-4
    )
    assert report["quantized_bytes"] == (tmp_path / "dst" / "model.safetensors").stat().st_size
    assert set(report["versions"]) == {"hf_hadacore", "transformers", "torch", "safetensors"}
    assert report["quantization_config"]["group_size"] == 32
    assert str(tmp_path) not in json.dumps(report)


def test_relative_error_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_hadacore.solvers.rtn import quantize_weight

    value = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    weight = quantize_weight(value, group_size=32, symmetric=False)
    expected = float((weight.dequantize() - value).norm() / value.norm())
    assert relative_error(value, weight) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("hf_hadacore.offline.layer_record._ERROR_CHUNK_ELEMENTS", 80)
    assert relative_error(value, weight) == pytest.approx(expected, rel=1e-6)
    zeros = torch.zeros(2, 40)
    assert relative_error(zeros, quantize_weight(zeros, group_size=32, symmetric=True)) == 0


def test_copies_what_belongs_to_the_model_and_nothing_else(src: Path, tmp_path: Path) -> None:
    copied = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE"]
    left = ["pytorch_model.bin", "modeling_x.py", "README.md", "old.safetensors", "x.bin.index.json", "a.pkl"]
    for name in copied + left:
        (src / name).write_text(name)
    (src / "additional_chat_templates").mkdir()
    (src / "additional_chat_templates" / "tools.jinja").write_text("tools")
    quantize(src, tmp_path / "dst")
    names = set(digests(tmp_path / "dst"))
    assert names == {
        *copied,
        "additional_chat_templates/tools.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantization_report.json",
    }
    assert (tmp_path / "dst" / "generation_config.json").read_bytes() == (
        src / "generation_config.json"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_tied_pair_stored_twice_is_written_once(tied: Path, tmp_path: Path) -> None:
    quantize(tied, tmp_path / "once")
    rewrite(
        tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    quantize(tied, tmp_path / "dst")
    assert "lm_head.weight" not in stored(tmp_path / "dst")
    assert stored(tmp_path / "dst").keys() == stored(tmp_path / "once").keys()


def test_tied_pair_of_which_only_the_head_is_stored(tied: Path, tmp_path: Path) -> None:
    quantize(tied, tmp_path / "once")
    rewrite(
        tied, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    )
    quantize(tied, tmp_path / "dst")
    once, got = stored(tmp_path / "once"), stored(tmp_path / "dst")
    assert once.keys() == got.keys()
    assert torch.equal(once["model.embed_tokens.weight"], got["model.embed_tokens.weight"])


def test_tied_by_config_but_not_by_data_keeps_both_as_transformers_does(tied: Path, tmp_path: Path) -> None:
    rewrite(
        tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2})
    )
    model = AutoModelForCausalLM.from_pretrained(tied, quantization_config=HadaCoreConfig(), device_map="cpu")
    model.save_pretrained(tmp_path / "saved")
    quantize(tied, tmp_path / "dst")
    expected, got = stored(tmp_path / "saved"), stored(tmp_path / "dst")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_tensors_without_a_place_are_reported(src: Path, tmp_path: Path) -> None:
    rewrite(src, lambda tensors: tensors.update({"model.mystery": torch.ones(3)}))
    report = quantize(src, tmp_path / "dst")
    assert report["unused_source_tensors"] == ["model.mystery"]


def test_nothing_stays_in_memory(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    realise = SourceModel.realise
    units = 0

    def checked(self, unit):
        nonlocal units
        units += 1
        result = realise(self, unit)
        assert all(tensor.is_meta for tensor in self.model.state_dict().values())
        return result

    monkeypatch.setattr(SourceModel, "realise", checked)
    quantize(src, tmp_path / "dst")
    assert units == 21


# Interruptions


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package may catch it."""


def raise_killed() -> None:
    raise Killed


def fail_at_call(
    monkeypatch: pytest.MonkeyPatch, number: int, die: Callable[[], None] = raise_killed
) -> list[str]:
    """Let the process "end" at the n-th call that changes the disk, before the call has done its work.

    Returns:
        What was called, as it grows.
    """
    calls: list[str] = []

    def dying(function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            calls.append(function.__name__)
            if len(calls) == number:
                die()
            return function(*args, **kwargs)

        return wrapper

    for module, name in ((os, "pwrite"), (os, "fsync"), (os, "replace"), (os, "ftruncate")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    for name in ("copyfile", "rmtree"):
        monkeypatch.setattr(shutil, name, dying(getattr(shutil, name)))
    return calls


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int, src: Path, dst: Path) -> bool:
    """Run (or resume) until the n-th such call; whether it came to that."""
    with monkeypatch.context() as patch:
        fail_at_call(patch, number)
        try:
            quantize(src, dst, max_shard_size="20KB", resume=True)
        except Killed:
            return True
    return False


def check_nothing_half_made_loads(dst: Path, whole: dict[str, str]) -> None:
    partial = dst.with_name(dst.name + ".partial")
    assert partial.exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(partial)
    for folder in (dst, partial / "checkpoint"):
        assert not (folder / "config.json").exists() or digests(folder) == whole


def test_killed_at_every_point_and_resumed(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(src, tmp_path / "whole", max_shard_size="20KB")
    whole = digests(tmp_path / "whole")
    number = 1
    while killed_at(monkeypatch, number, src, tmp_path / f"dst{number}"):
        dst = tmp_path / f"dst{number}"
        check_nothing_half_made_loads(dst, whole)
        quantize(src, dst, max_shard_size="20KB", resume=True)
        assert digests(dst) == whole
        assert not dst.with_name(dst.name + ".partial").exists()
        shutil.rmtree(dst)
        number += 1
    assert number > 100


def test_killed_again_and_again(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(src, tmp_path / "whole", max_shard_size="20KB")
    number = 1
    while killed_at(monkeypatch, number, src, tmp_path / "dst"):
        number += 1
    assert number > 10
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")


@pytest.mark.parametrize("units", [0, 1, 9, 20])
def test_what_is_done_is_not_done_again(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: int
) -> None:
    done: list[str] = []
    realise = SourceModel.realise

    def dying_realise(self, unit):
        if len(done) == units:
            raise KeyboardInterrupt
        done.append(unit.name)
        return realise(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(SourceModel, "realise", dying_realise)
        with pytest.raises(KeyboardInterrupt):
            quantize(src, tmp_path / "dst")
    again: list[str] = []
    monkeypatch.setattr(
        SourceModel, "realise", lambda self, unit: again.append(unit.name) or realise(self, unit)
    )
    quantize(src, tmp_path / "dst", resume=True)
    assert not set(done) & set(again)
    assert len(done) + len(again) == 21
    quantize(src, tmp_path / "whole")
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")


def test_sigkill(src: Path, tmp_path: Path) -> None:
    quantize(src, tmp_path / "whole", max_shard_size="20KB")
    script = """
import os, signal, sys
from hf_hadacore import HadaCoreConfig, checkpoint, shard_writer
write, calls = shard_writer._write_tensor, []
def dying(*args):
    result = write(*args)
    calls.append(1)
    if len(calls) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
shard_writer._write_tensor = dying
checkpoint.quantize_checkpoint(
    sys.argv[1], sys.argv[2], HadaCoreConfig(), max_shard_size="20KB", progress=False
)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    command = [sys.executable, "-c", script, str(src), str(tmp_path / "dst")]
    assert subprocess.run(command, env=environment, timeout=240).returncode == -signal.SIGKILL
    assert not (tmp_path / "dst").exists()
    quantize(src, tmp_path / "dst", max_shard_size="20KB", resume=True)
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")


@pytest.fixture
def interrupted(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted after ten writes; returns the folder it was to make."""
    write, calls = shard_writer._write_tensor, []

    def dying(*args):
        calls.append(1)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "_write_tensor", dying)
        with pytest.raises(KeyboardInterrupt):
            quantize(src, tmp_path / "dst", max_shard_size="20KB")
    return tmp_path / "dst"


def test_damaged_partial_tensors_are_made_again(src: Path, tmp_path: Path, interrupted: Path) -> None:
    for shard in (tmp_path / "dst.partial" / "checkpoint").iterdir():
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    quantize(src, interrupted, max_shard_size="20KB", resume=True)
    quantize(src, tmp_path / "whole", max_shard_size="20KB")
    assert digests(interrupted) == digests(tmp_path / "whole")


@pytest.mark.parametrize("rest", [b'{"unit": "model.nor', b"\0\0\0\0", b"[]\n", b"{}"])
def test_torn_journal(src: Path, tmp_path: Path, interrupted: Path, rest: bytes) -> None:
    with open(tmp_path / "dst.partial" / "journal.jsonl", "ab") as stream:
        stream.write(rest)
    quantize(src, interrupted, max_shard_size="20KB", resume=True)
    quantize(src, tmp_path / "whole", max_shard_size="20KB")
    assert digests(interrupted) == digests(tmp_path / "whole")


def test_unfinished_run_is_not_overwritten(src: Path, interrupted: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dst\.partial: holds an unfinished run.*--resume"):
        quantize(src, interrupted)


def test_resume_refuses_another_source_or_config(src: Path, interrupted: Path) -> None:
    before = digests(interrupted.with_name("dst.partial"))
    resume = {"max_shard_size": "20KB", "resume": True}
    with pytest.raises(CheckpointError, match=r"cannot resume.*quantization config"):
        quantize(src, interrupted, HadaCoreConfig(symmetric=True), **resume)
    with pytest.raises(CheckpointError, match=r"cannot resume.*plan of the shards"):
        quantize(src, interrupted, max_shard_size="1GB", resume=True)
    with pytest.raises(CheckpointError, match=r"cannot resume.*dtype"):
        quantize(src, interrupted, dtype="float16", **resume)
    rewrite(src, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"cannot resume.*source weights"):
        quantize(src, interrupted, **resume)
    assert digests(interrupted.with_name("dst.partial")) == before


def test_two_processes_do_not_share_a_run(src: Path, tmp_path: Path, interrupted: Path) -> None:
    with filelock.FileLock(tmp_path / "dst.partial" / "lock"):
        with pytest.raises(CheckpointError, match="another process"):
            quantize(src, interrupted, max_shard_size="20KB", resume=True)


# Refusals


def test_existing_destination(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(src, dst)
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(src, dst / "precious")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(src, src)
    assert digests(dst).keys() == {"precious"}


def test_destination_that_cannot_be_renamed_or_made(src: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is a link"):
        quantize(src, tmp_path / "link")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be made"):
        quantize(src, tmp_path / "file" / "dst")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(src, "/")


def test_empty_destination_is_fine(src: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    quantize(src, tmp_path / "dst")
    assert (tmp_path / "dst" / "config.json").exists()


def test_destination_inside_the_source(src: Path) -> None:
    before = digests(src)
    with pytest.raises(CheckpointError, match="lies in the source"):
        quantize(src, src / "int4")
    assert digests(src) == before


def test_quantized_source(src: Path, tmp_path: Path) -> None:
    quantize(src, tmp_path / "dst")
    with pytest.raises(CheckpointError, match=r"already quantized.*hadacore"):
        quantize(tmp_path / "dst", tmp_path / "again")


def test_missing_and_misshapen_tensors(src: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    whole = stored(src)
    rewrite(src, lambda tensors: tensors.update({name: whole[name][:-1].clone()}))
    with pytest.raises(CheckpointError, match=rf"{name}: expected shape \[104, 64\], found \[103, 64\]"):
        quantize(src, tmp_path / "dst")
    rewrite(src, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks '{name}' of LlamaForCausalLM"):
        quantize(src, tmp_path / "dst")
    assert not (tmp_path / "dst.partial").exists()


def test_nan_ends_the_run_with_the_name_of_the_weight(src: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(src, lambda tensors: tensors[name].view(-1)[5].fill_(float("nan")))
    with pytest.raises(QuantizationError, match=name):
        quantize(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_truncated_source(src: Path, tmp_path: Path) -> None:
    os.truncate(src / "model.safetensors", (src / "model.safetensors").stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        quantize(src, tmp_path / "dst")


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


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
def test_unknown_architectures(src: Path, tmp_path: Path, changes: dict, says: str) -> None:
    (src / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    change_config(src, **changes)
    with pytest.raises(CheckpointError, match=says):
        quantize(src, tmp_path / "dst")


@pytest.mark.parametrize("content", [None, "{", "[]", "\xff"])
def test_unreadable_config(src: Path, tmp_path: Path, content: str | None) -> None:
    (src / "config.json").unlink()
    if content is not None:
        (src / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        quantize(src, tmp_path / "dst")


def test_config_errors_come_before_any_work(src: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="matches no module"):
        quantize(src, tmp_path / "dst", HadaCoreConfig(overrides={"q_porj": {"skip": True}}))
    with pytest.raises(CheckpointError, match="max_shard_size='5 apples'"):
        quantize(src, tmp_path / "dst", max_shard_size="5 apples")
    assert not (tmp_path / "dst.partial").exists()


def test_full_disk(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(CheckpointError, match="GB more are needed"):
            quantize(src, tmp_path / "dst")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match=r"No space left.*resume"):
            quantize(src, tmp_path / "dst", resume=True)
    quantize(src, tmp_path / "dst", resume=True)
    verify_files(checkpoint_files(tmp_path / "dst"))


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("/no/such/folder", "./folder", "a/b/c", ""):
        with pytest.raises(CheckpointError, match="neither a checkpoint folder nor a model id"):
            checkpoint.find_source(name or "\n")

    def offline(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"org/model: .*cannot be had from the Hub: offline"):
        quantize(Path("org/model"), tmp_path / "dst")


def test_model_id(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(model_id, **kwargs):
        asked.update(kwargs, model_id=model_id)
        return str(src)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    report = quantize("org/model", tmp_path / "dst")
    assert report["source"] == asked["model_id"] == "org/model"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*", "*.py", "*.bin", "*.pt"} & set(asked["allow_patterns"])
