"""Imported act-order checkpoints, divided among ranks."""

from pathlib import Path

import pytest
import torch
from packed_checkpoints import GPTQ, gptq_tensors, random_grids, write_packed
from rank_processes import run_every_rank
from tiny_models import token_ids
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig

from hf_hadacore.interchange.importing import import_checkpoint


def logits_of_a_rank(folder: Path, ranks: int) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=ranks)
    )
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.transformers_versions
def test_act_order_divided_among_ranks(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=96,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        dtype=torch.float16,
    )
    grids = random_grids(model, 32, symmetric=True, act_order=True)
    write_packed(tmp_path / "src", model, grids, gptq_tensors, {**GPTQ, "desc_act": True})
    import_checkpoint(tmp_path / "src", tmp_path / "dst", tensor_parallel=True, progress=False)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype=torch.float32)(
            token_ids()
        ).logits
    for found in run_every_rank(logits_of_a_rank, 2, tmp_path / "dst", 2):
        # Sums of fp32 products in another order: of what each rank has, then of the ranks.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
