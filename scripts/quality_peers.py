"""Other int4 quantizers, each of which writes its own checkpoint: for `benchmark_quality_peers.py`.

They patch transformers and want versions of packages that contradict each other, so each runs in a process
of its own, which this file is the program of: `python scripts/quality_peers.py TASK`.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

BATCH_SIZE = 8  # samples of a forward pass


class Task(NamedTuple):
    """What a peer is asked to do.

    Attributes:
        peer: a key of `PEERS`.
        method: one of the peer's methods.
        group_size, symmetric: of the weights, four bits each.
        source: a full-precision checkpoint.
        target: the folder to write the checkpoint to.
        tokens: a safetensors file with `tokens`, int64 ``[samples, length]``.
        report: the JSON file to write the seconds to.
        device: "cuda" or "cpu".
    """

    peer: str
    method: str
    group_size: int
    symmetric: bool
    source: str
    target: str
    tokens: str
    report: str
    device: str


class Peer(NamedTuple):
    """A quantizer.

    Attributes:
        package: its name on PyPI.
        module: imported before time is taken.
        methods: its ways to quantize, by what people call them; options that `quantize` understands.
        quantize: does the task with the options on samples, int64 ``[length]`` each.
    """

    package: str
    module: str
    methods: dict[str, dict[str, Any]]
    quantize: Callable[[Task, dict[str, Any], list[torch.Tensor]], None]


def _rows(samples: list[torch.Tensor]) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in samples]


def _gptqmodel(task: Task, options: dict[str, Any], samples: list[torch.Tensor]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    # Its first format cannot tell a zero point of 0 from one of 16.
    recipe = QuantizeConfig(
        bits=4,
        group_size=task.group_size,
        sym=task.symmetric,
        format="gptq" if task.symmetric else "gptq_v2",
        device=task.device,
        offload_to_disk=False,
        pack_impl="original",  # the others compile C++ first
        **options,
    )
    model = GPTQModel.load(task.source, recipe)
    model.quantize(_rows(samples), batch_size=BATCH_SIZE)
    model.save(task.target)


def _auto_round(task: Task, options: dict[str, Any], samples: list[torch.Tensor]) -> None:
    from auto_round import AutoRound

    batches = torch.stack(samples).split(BATCH_SIZE)
    rounding = AutoRound(
        task.source,
        bits=4,
        group_size=task.group_size,
        sym=task.symmetric,
        dataset=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches],
        nsamples=len(samples),
        seqlen=len(samples[0]),
        batch_size=BATCH_SIZE,
        device_map=task.device,
        enable_torch_compile=False,
        **options,
    )
    rounding.quantize_and_save(task.target, format="auto_awq")


def _llmcompressor(task: Task, options: dict[str, Any], samples: list[torch.Tensor]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": task.group_size,
        "symmetric": task.symmetric,
    }
    scheme = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    kinds = {
        "gptq": lambda: [GPTQModifier(**scheme, **options["options"])],
        "awq": lambda: [AWQModifier(**options["options"]), QuantizationModifier(**scheme)],
        "rtn": lambda: [QuantizationModifier(**scheme)],
    }
    model: Any = AutoModelForCausalLM.from_pretrained(task.source, dtype="auto")
    model.to(task.device)
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(task.source),
        dataset=Dataset.from_list(_rows(samples)),
        recipe=kinds[options["modifier"]](),
        max_seq_length=len(samples[0]),
        num_calibration_samples=len(samples),
        shuffle_calibration_samples=False,
        output_dir=task.target,
    )


PEERS = {
    "gptqmodel": Peer(
        "gptqmodel",
        "gptqmodel",
        {
            "GPTQ": {"desc_act": False, "act_group_aware": False},
            "GPTQ, act-group-aware": {},  # its default
            "GPTQ, desc_act": {"desc_act": True, "act_group_aware": False},
        },
        _gptqmodel,
    ),
    "auto-round": Peer(
        "auto-round",
        "auto_round",
        {"RTN": {"iters": 0}, "50 iterations": {"iters": 50}, "200 iterations": {"iters": 200}},
        _auto_round,
    ),
    "llm-compressor": Peer(
        "llmcompressor",
        "llmcompressor",
        {
            "GPTQ, static act-order": {"modifier": "gptq", "options": {"actorder": "static"}},  # its default
            "AWQ": {"modifier": "awq", "options": {"duo_scaling": "both"}},
        },
        _llmcompressor,
    ),
}


def main(file: Path) -> None:
    """Do the task that a JSON file holds."""
    task = Task(**json.loads(file.read_text()))
    peer = PEERS[task.peer]
    importlib.import_module(peer.module)
    samples = list(load_file(task.tokens)["tokens"])
    start = time.perf_counter()
    peer.quantize(task, peer.methods[task.method], samples)
    facts = {"version": version(peer.package), "seconds_to_quantize": round(time.perf_counter() - start, 1)}
    Path(task.report).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
