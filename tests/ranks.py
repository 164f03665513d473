"""Running a function in several processes that talk through gloo, on the CPU."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

# The processes are forked from one that has imported them.
_PRELOADED = ["torch.distributed.tensor", "tiny_models", "hf_hadacore"]
_SECONDS = 240


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Call a function in new processes, with the environment that torchrun would give them.

    Args:
        function: of a module, at its top level; `from_pretrained` or the function itself makes the process
            group.
        ranks: number of processes.
        args: for the function.

    Returns:
        What it returned on every rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(ranks, mp_context=context) as pool:
        tasks = [pool.submit(_run, function, rank, ranks, port, args) for rank in range(ranks)]
        return [task.result(_SECONDS) for task in tasks]


def _run(function: Callable[..., Any], rank: int, ranks: int, port: int, args: tuple[Any, ...]) -> Any:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    try:
        return function(*args)
    finally:
        # Ranks that wait for one that has failed fail, too.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
