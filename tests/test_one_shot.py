"""Row-parallel layers that sum with our all-reduce, on two ranks of gloo."""

import tempfile
from typing import Any

import pytest
import torch
from rank_processes import run_ranks
from tiny_models import token_ids
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig

from hf_hadacore import HadaCoreConfig
from hf_hadacore.parallel import one_shot

CONFIG = LlamaConfig(
    **dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2),
    **dict(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False),
)


def on_a_rank(folder: str) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=2)
    ).eval()
    report: dict[str, Any] = {"on_gloo": one_shot.use_one_shot_all_reduce(model)}
    inputs = token_ids(2, 9)
    with torch.no_grad():
        expected = model(inputs).logits
    # gloo has no shared memory, and sums all the same.
    one_shot.prepare = lambda group: True
    report["changed"] = one_shot.use_one_shot_all_reduce(model)
    calls = []
    reduce = one_shot.all_reduce
    one_shot.all_reduce = lambda x, group: calls.append(x.shape) or reduce(x, group)
    with torch.no_grad():
        got = model(inputs).logits
    report["equal"] = torch.equal(got, expected)
    report["calls"] = [list(shape) for shape in calls]
    one_shot.MAX_BYTES = 0
    with torch.no_grad():
        report["equal_if_large"] = torch.equal(model(inputs).logits, expected)
    with torch.enable_grad():
        embedded = torch.randn(2, 3, 64, requires_grad=True)
        model(inputs_embeds=embedded).logits.sum().backward()
    report["has_gradient"] = bool(embedded.grad.any())
    report["calls_in_all"] = len(calls)
    return report


@pytest.mark.transformers_versions
def test_layers_sum_with_our_all_reduce():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = HadaCoreConfig(group_size=32)
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(
            f"{folder}/int4"
        )
        report = run_ranks(on_a_rank, 2, f"{folder}/int4")
    assert report == {
        "on_gloo": False,
        "changed": True,
        "equal": True,
        # o_proj and down_proj of two layers.
        "calls": 4 * [[2, 9, 64]],
        "equal_if_large": True,
        "has_gradient": True,
        "calls_in_all": 4,
    }
