"""What the GPU scripts write down: results, and where, when and with what they were measured."""

import json
import platform
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

import hf_hadacore

# Options that most of the scripts have.
JsonFile = Annotated[Path | None, typer.Option("--json", help="Where to write the results.")]
SanitizeOnly = Annotated[bool, typer.Option("--sanitize", help="Small run for compute-sanitizer.")]


def require_gpu(*, is_hopper: bool = False) -> None:
    """End a script on a machine that it cannot run on.

    Args:
        is_hopper: it runs Hopper's kernels.

    Raises:
        SystemExit: there is no such GPU.
    """
    if not torch.cuda.is_available():
        raise SystemExit("this script needs a CUDA device")
    if is_hopper and torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("this script needs a Hopper GPU")


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


def run_checks(report: dict[str, Any], checks: dict[str, Callable[[], Any]]) -> list[str]:
    """Run checks in turn, whatever the others do.

    Args:
        report: gets what they return, by name.
        checks: print nothing; raise if they cannot go on.

    Returns:
        The names of those that raised; why is printed.
    """
    failed = []
    for name, check in checks.items():
        try:
            report[name] = check()
        except Exception:
            print(f"{name}: {traceback.format_exc()}")
            failed.append(name)
        torch.cuda.empty_cache()
    return failed


def conclude(report: dict[str, Any], failed: list[Any], json_file: Path | None, rows: str = "") -> None:
    """Write and print the report of a check.

    Args:
        report: gets `failed` as its last entry.
        failed: what is not right.
        json_file: see `write_report`.
        rows: an entry that is printed apart, a line for each of its rows.

    Raises:
        SystemExit: something is not right.
    """
    report["failed"] = failed
    write_report(report, json_file)
    print(json.dumps({key: value for key, value in report.items() if key != rows}, indent=1))
    for row in report.get(rows, []):
        print(*(f"{name} {value}" for name, value in row.items()), sep="  ")
    if failed:
        raise SystemExit(f"failed: {failed}")
    print("all right")
