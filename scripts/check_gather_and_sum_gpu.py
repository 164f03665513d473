"""Are the small kernels of decoding right on this GPU: the gather of columns and the one-shot all-reduce?

    python scripts/check_gather_and_sum_gpu.py --json scripts/results/check_gather_and_sum.json
    compute-sanitizer python scripts/check_gather_and_sum_gpu.py --sanitize

Both have exact results. Two ranks of the all-reduce take turns on one GPU: what the second is going to send
is in its place before the first one runs, which otherwise would wait for it forever. Between GPUs it runs in
`check_multi_gpu.py`.
"""

import itertools
from typing import Any

import torch
import typer
from gpu_report import JsonFile, SanitizeOnly, about_this_run, conclude

from hf_hadacore.kernels.all_reduce import MAX_BYTES
from hf_hadacore.kernels.all_reduce_triton import BLOCK_BYTES, SLOTS, Mailbox, launch
from hf_hadacore.kernels.gather_columns import MAX_ROWS, gather_columns

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CALLS = 5


def wrong_gathers(sizes: tuple[int, ...]) -> list[str]:
    wrong = []
    for k, dtype, rows in itertools.product(sizes, DTYPES, (1, 3, MAX_ROWS, MAX_ROWS + 1)):
        wide = torch.randn(rows, k + 8, device="cuda").to(dtype)
        order = torch.randperm(k, device="cuda").int()
        for x in (wide[:, :k].contiguous(), wide[:, :k], wide[:, 3 : k + 3]):
            if not torch.equal(gather_columns(x, order), x[:, order.long()]):
                wrong.append(f"gather of {rows} x {k}, {dtype}, strides {x.stride()}")
    return wrong


def wrong_sums(sizes: tuple[int, ...]) -> list[str]:
    blocks = MAX_BYTES // BLOCK_BYTES
    memories = [
        torch.zeros(SLOTS * MAX_BYTES + 4 * blocks * 2, dtype=torch.uint8, device="cuda") for _ in range(2)
    ]
    slots = [memory.data_ptr() for memory in memories]
    flags = [address + SLOTS * MAX_BYTES for address in slots]
    addresses = torch.tensor([slots, flags], dtype=torch.int64, device="cuda")
    mailboxes = [
        Mailbox(memory, addresses, torch.zeros(blocks, dtype=torch.int32, device="cuda"), rank, 2, MAX_BYTES)
        for rank, memory in enumerate(memories)
    ]
    flags_of_first = memories[0][SLOTS * MAX_BYTES :].view(torch.int32).view(blocks, 2)
    slots_of_second = memories[1][: SLOTS * MAX_BYTES].view(SLOTS, MAX_BYTES)
    wrong = []
    for dtype, nbytes, _ in itertools.product(DTYPES, sizes, range(CALLS)):
        messages = [torch.randn(nbytes // dtype.itemsize, device="cuda").to(dtype) for _ in range(2)]
        # Blocks count their calls, and take turns with the slots, each on its own.
        slots_of_second[:, :nbytes] = messages[1].view(torch.uint8)
        flags_of_first[:, 1] = mailboxes[0].calls + 1
        outputs = [torch.full_like(message, float("nan")) for message in messages]
        for message, out, mailbox in zip(messages, outputs, mailboxes, strict=True):
            launch(message, out, mailbox)
        exact = (messages[0].float() + messages[1].float()).to(dtype)
        if not all(torch.equal(out, exact) for out in outputs):
            wrong.append(f"sum of {nbytes} bytes of {dtype}")
    return wrong


def main(json_file: JsonFile = None, sanitize_only: SanitizeOnly = False) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this check needs a CUDA device")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if sanitize_only:
        assert not wrong_gathers((1032,)) + wrong_sums((MAX_BYTES // 64 + 16,))
        return print("sanitize: gathers and sums ran")
    gathers, sums = (8, 1024, 1032, 4096, 14336), (16, 8192, MAX_BYTES - 16, MAX_BYTES)
    report: dict[str, Any] = about_this_run("python scripts/check_gather_and_sum_gpu.py")
    report |= {"columns": gathers, "bytes": sums, "calls": CALLS}
    conclude(report, wrong_gathers(gathers) + wrong_sums(sums), json_file)


if __name__ == "__main__":
    typer.run(main)
