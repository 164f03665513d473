"""Start one process per rank, run a function in each, and give back what it returned."""

import os
import pickle
import socket
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
        What `function` returned on rank 0.

    Raises:
        ProcessRaisedException: a rank raised; the others are stopped.
    """
    return run_every_rank(_in_group, world, function, *arguments)[0]


def run_every_rank(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """Run a function as `world` processes that torchrun might have started, which have no process group yet.

    Args, Raises: as `run_ranks`.

    Returns:
        What `function` returned on every rank.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # On a GPU as torch does it. Elsewhere from a process that has imported what takes long.
    method = "spawn"
    if not torch.cuda.is_available():
        method = "forkserver"
        mp.get_context(method).set_forkserver_preload(["hf_hadacore"])
    with tempfile.TemporaryDirectory() as folder:
        inputs = (world, port, Path(folder), function, arguments)
        mp.start_processes(_run_rank, inputs, nprocs=world, start_method=method)
        return [pickle.loads((Path(folder) / f"{rank}").read_bytes()) for rank in range(world)]


def _run_rank(
    rank: int, world: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    # What torchrun sets, and transformers reads.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    try:
        (folder / f"{rank}").write_bytes(pickle.dumps(function(*arguments)))
    finally:
        # Ranks that wait for one that has failed fail, too.
        if dist.is_initialized():
            dist.destroy_process_group()


def _in_group(function: Callable[..., Any], *arguments: Any) -> Any:
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else None
    dist.init_process_group("nccl" if has_gpu else "gloo", device_id=device)
    result = function(*arguments)
    dist.barrier()
    return result
