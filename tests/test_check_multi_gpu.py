"""What the check of several GPUs makes of what it finds, and the checkpoints that it times."""

import re
from pathlib import Path

import pytest
import torch
from benchmark_generate import fill_randomly
from check_multi_gpu import compare, logits_file, wrong_rows
from multi_gpu_models import SHAPES, tiny
from multi_gpu_speed import with_speedups, write_hollow_checkpoint
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def write_logits(root: Path, differences: dict[str, float]) -> None:
    """Logits of one place, and others that differ from them by random numbers of some size."""
    one = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0))
    for form in ("bf16", "int4"):
        save_file({"logits": one}, logits_file(root, form, "bf16", "one"))
        noise = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
        got = one + differences[form] * noise
        save_file({"logits": got}, logits_file(root, form, "bf16", "ranks"))


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        ({"bf16": 1e-3, "int4": 1.1e-3}, None),
        ({"bf16": 1e-3, "int4": 1.5e-3}, "bf16 ranks: .* > "),
        ({"bf16": 1e-3, "int4": 10.0}, "clear tokens differ"),
        ({"bf16": 1e-3, "int4": float("nan")}, "nan > "),
        ({"bf16": 0.0, "int4": 0.0}, None),
    ],
)
def test_int4_may_differ_as_bf16_does(tmp_path: Path, differences: dict[str, float], message: str | None):
    write_logits(tmp_path, differences)
    found = "\n".join(wrong_rows(compare(tmp_path)))
    assert re.search(message, found) if message else not found


def test_all_shapes_are_llamas():
    sizes = {name: shape(3).num_hidden_layers for name, shape in SHAPES.items()}
    assert sizes == dict.fromkeys(SHAPES, 3)
    assert SHAPES["llama-70b"](80).hidden_size == 8192


def test_speeds_are_compared_with_the_first_places():
    def place(speed: float, *names: str):
        return {"memory_gib": 1.0} | {name: {"tokens_per_second": speed} for name in names}

    case = "bf16 batch 1"
    results = with_speedups(
        {"tp 1": place(50, case), "tp 2": place(80, case, f"one-shot {case}"), "auto": place(5, case)}
    )
    found = [row["speedup_over_tp_1"] for run in results.values() for row in run.values() if row != 1.0]
    assert found == [1.0, 1.6, 1.6, 0.1]


@pytest.mark.transformers_versions
def test_a_checkpoint_of_holes_is_loaded_and_filled(tmp_path: Path):
    size = write_hollow_checkpoint(tmp_path, tiny(2))
    assert size == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(parameter.any() for parameter in model.parameters())
    fill_randomly(model)
    assert all(parameter.any() for parameter in model.parameters())
    assert model(torch.arange(8)[None]).logits.isfinite().all()
