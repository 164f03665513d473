"""Convert a checkpoint of another int4 library to the hadacore format."""

import os
from typing import Any

from ..offline.checkpoint import convert_checkpoint
from .packed_source import PackedSource


def import_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    tensor_parallel: bool = False,
    max_shard_size: int | str = "5GB",
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Convert a GPTQ, AWQ or compressed-tensors int4 checkpoint to the hadacore format.

    Integers, zeros and scales are those of the source, bit for bit. Memory is needed for one Parameter at a
    time.

    Args:
        src: a local folder, or a model id on the Hub.
        dst: the folder to make; must not exist (an empty one is fine).
        tensor_parallel: act-order that cannot be baked into the layers before (o_proj's) keeps a layer from
            being divided among GPUs. True stores such layers in full precision.
        max_shard_size, resume, progress: as of `quantize_checkpoint`.

    Returns:
        The report, which also lies in DST as `quantization_report.json`.

    Raises:
        CheckpointError: the source is damaged, incomplete, in full precision or a hadacore checkpoint
            already; dst exists or lies in src; the disk is too small.
        UnsupportedError: the source's format, or an option of it, has no place in the hadacore format.
    """
    return convert_checkpoint(
        src,
        dst,
        lambda folder: PackedSource(folder, tensor_parallel=tensor_parallel),
        {},
        max_shard_size=max_shard_size,
        resume=resume,
        progress=progress,
        label="Importing",
    )
