"""Quantize a checkpoint: the same as `hadacore quantize`, for use from a source tree.

    python scripts/quantize.py SRC DST --group-size 128

`--help` lists the options. To do it from Python:

    from hf_hadacore import HadaCoreConfig, quantize_checkpoint

    report = quantize_checkpoint(src, dst, HadaCoreConfig(group_size=128))
"""

import typer

from hf_hadacore.commands.quantize import quantize

if __name__ == "__main__":
    typer.run(quantize)
