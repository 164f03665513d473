"""What the GPU scripts write down: results, and where, when and with what they were measured."""

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import triton

import hf_hadacore


def about_this_run(command: str, *packages: str) -> dict[str, Any]:
    """The head of a report.

    Args:
        command: that makes it again.
        packages: whose versions matter besides those of torch, Triton and Python.
    """
    versions = {
        "hf_hadacore": hf_hadacore.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
    }
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": versions,
    }


def write_report(report: dict[str, Any], json_file: Path | None) -> None:
    """Write a report as JSON; None writes nothing."""
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")
