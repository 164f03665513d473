"""LoRA adapters train on an int4 model, and are saved and loaded."""

import pytest
import torch
from tiny_models import make_model, token_ids
from transformers import AutoModelForCausalLM

from hf_hadacore import HadaCoreConfig

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.transformers_versions


def test_lora_trains_saves_and_reloads(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "source")

    def base():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "source", quantization_config=HadaCoreConfig(), dtype=torch.float32
        )

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(), config)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = token_ids(4, 12)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert len(adapters) == 28 and all(p.grad is not None for p in adapters.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)

    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=ids).logits, expected)
        with reloaded.disable_adapter():
            assert not torch.equal(reloaded(input_ids=ids).logits, expected)
