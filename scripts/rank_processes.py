"""Start one process per rank, run a function in each, and give back what rank 0 returned."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> Any:
    """Run a function as `world` processes with a default process group, one GPU each where there are GPUs.

    The backend is NCCL on GPUs and gloo on a machine without. NVLink multicast stays off: what is measured
    with it says nothing about machines that do not have it.

    Args:
        function: picklable; called with the arguments in every process.
        world: number of ranks.
        arguments: picklable.

    Returns:
        What `function` returned on rank 0, through JSON.

    Raises:
        ProcessRaisedException: a rank raised; the others are stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, (world, folder, function, arguments), nprocs=world)
        return json.loads((Path(folder) / "result.json").read_text())


def _run_rank(
    rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    # What torchrun sets, and transformers reads.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "gloo" if device is None else "nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        device_id=device,
    )
    try:
        result = function(*arguments)
        if rank == 0:
            (Path(folder) / "result.json").write_text(json.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()
