"""The sum over the ranks of a process group, as an op that is fast for the small messages of decoding.

NCCL's all-reduce takes longer to start than such a message takes to travel. On one host whose GPUs reach each
other's memory (NVLink; no multicast is needed) each rank reads all messages itself instead, in one kernel:
`all_reduce_triton`. Everything else goes to `torch.distributed.all_reduce`.
"""

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group, _resolve_process_group

from .launcher import goes_straight

if TYPE_CHECKING:
    from .all_reduce_triton import Mailbox

# Larger messages go to the process group, which splits the sum among ranks instead of making it on each.
MAX_BYTES = 1 << 19
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WORLDS = (2, 4, 8)

# None where memory cannot be shared.
_mailboxes: "WeakKeyDictionary[dist.ProcessGroup, Mailbox | None]" = WeakKeyDictionary()

torch.library.define("hf_hadacore::all_reduce", "(Tensor x, str group_name) -> Tensor")


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum over ranks; x itself is left as it is.

    A collective: every rank calls it with the same shape and dtype, in the same order, on one stream at a
    time. Messages of up to `MAX_BYTES` are added up in fp32 in the order of the ranks and rounded once, where
    `prepare` returned True: every rank gets the same bits, every time. Not differentiable.

    Args:
        x: floating point, any shape.
        group: default the default group.

    Returns:
        The shape and dtype of x, contiguous.
    """
    op = _cuda if goes_straight(x) else torch.ops.hf_hadacore.all_reduce
    return op(x, (group or _get_default_group()).group_name)


def prepare(group: dist.ProcessGroup | None = None) -> bool:
    """Share memory between the ranks of a group, once; a collective call, made before any graph capture.

    Without it `all_reduce` is the process group's own.

    Args:
        group: default the default group.

    Returns:
        Whether small messages of CUDA tensors will be read directly; the same on all ranks.
    """
    group = group or _get_default_group()
    if group not in _mailboxes:
        _mailboxes[group] = _make_mailbox(group)
    return _mailboxes[group] is not None


def _make_mailbox(group: dist.ProcessGroup) -> "Mailbox | None":
    """This rank's view of the shared memory, or None on all ranks if there is one that has none."""
    if dist.get_backend(group) != "nccl" or torch.version.cuda is None or group.size() not in _WORLDS:
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    mailbox = None
    try:
        mailbox = _share_memory(group, device)
    except (ImportError, RuntimeError):
        # Another host, no peer access, no Triton.
        pass
    # Nobody may use flags before they are zero everywhere, nor memory that another rank has not got.
    has_memory = torch.tensor(int(mailbox is not None), device=device)
    dist.all_reduce(has_memory, dist.ReduceOp.MIN, group)
    return mailbox if has_memory.item() else None


def _share_memory(group: dist.ProcessGroup, device: torch.device) -> "Mailbox":
    from torch.distributed import _symmetric_memory

    from .all_reduce_triton import BLOCK_BYTES, SLOTS, Mailbox

    world, blocks = group.size(), MAX_BYTES // BLOCK_BYTES
    nbytes = SLOTS * MAX_BYTES + 4 * blocks * world
    memory = _symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device).zero_()
    handle = _symmetric_memory.rendezvous(memory, group)
    # An allocation may begin before the tensor, by the same distance on all ranks.
    offset = memory.data_ptr() - handle.buffer_ptrs[handle.rank]
    slots = [address + offset for address in handle.buffer_ptrs]
    flags = [address + SLOTS * MAX_BYTES for address in slots]
    addresses = torch.tensor([slots, flags], dtype=torch.int64, device=device)
    calls = torch.zeros(blocks, dtype=torch.int32, device=device)
    return Mailbox(memory, addresses, calls, handle.rank, world, MAX_BYTES)


@torch.library.register_fake("hf_hadacore::all_reduce")
def _fake(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return x.new_empty(x.shape)


def _group_of(name: str) -> dist.ProcessGroup:
    # Newer versions of torch have a type for such names, older ones do not.
    return _resolve_process_group(name)  # type: ignore[arg-type]


def _anywhere(x: torch.Tensor, group_name: str) -> torch.Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=_group_of(group_name))
    return out


torch.library.impl("hf_hadacore::all_reduce", "default", _anywhere)


def _cuda(x: torch.Tensor, group_name: str) -> torch.Tensor:
    mailbox = _mailboxes.get(_group_of(group_name))
    if mailbox is None or x.dtype not in _DTYPES or not 0 < x.nbytes <= mailbox.slot_bytes:
        return _anywhere(x, group_name)
    from .all_reduce_triton import launch

    out = x.new_empty(x.shape)
    launch(x.contiguous(), out, mailbox)
    return out


torch.library.impl("hf_hadacore::all_reduce", "cuda", _cuda)
