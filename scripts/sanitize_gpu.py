"""compute-sanitizer over every kernel of the package: memcheck and racecheck, on small problems.

    python scripts/sanitize_gpu.py --json scripts/results/sanitize.json

Each check script has a `--sanitize` mode that launches the variants of its kernels once. They are compiled
first, side by side, because compiling under compute-sanitizer takes many times as long.

racecheck does not follow how Triton hands work to the partitions of a warp-specialized kernel (a number in
shared memory, between barriers) and reports it as a race. The control is a kernel with partitions that share
nothing but values they were given: what is reported for it too, is Triton's. In attention of few queries it
also reports threads that each hold a copy of one sum and store it to one place. With `--only`, the results of
other scripts that the JSON file has are kept; each says where and when it was made.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_report import JsonFile, about_this_run

SCRIPTS = (
    "check_w4a16.py",
    "check_w4a16_tiled.py",
    "check_experts_gpu.py",
    "check_fusion_gpu.py",
    "check_decode_attention_gpu.py",
    "check_hadamard_gpu.py",
    "check_rotate_quantize_gpu.py",
    "check_attention_gpu.py",
    "check_key_mean_gpu.py",
    "check_quantize_step_gpu.py",
    "check_gather_and_sum_gpu.py",
    "check_gptq_gpu.py",
)
TOOLS = ("memcheck", "racecheck")
CONTROL = """
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

@gluon.jit
def store(p_out, value, i, first, count):
    o = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    for j in range(count):
        gl.store(p_out + ((i * 2 + value) * 4 + first + j) * 128 + o, o)

@gluon.jit
def control_kernel(p_out, total):
    i = gl.program_id(0)
    first = i % 2
    count = gl.minimum(total - first, 3)
    gl.warp_specialize(
        [(store, (p_out, 0, i, first, count)), (store, (p_out, 1, i, first, count))], [4], [64]
    )

out = torch.zeros(3 * 2 * 4 * 128, dtype=torch.int32, device="cuda")
control_kernel[(3,)](out, 4, num_warps=4)
torch.cuda.synchronize()
print("sanitize: control ran")
"""


def run(command: list[str], seconds: int) -> tuple[str, float]:
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        output = ""
    return output, round(time.perf_counter() - start, 1)


def check(
    script: Path, options: list[str], tool: str, seconds: int, log_folder: Path | None
) -> dict[str, Any]:
    """What a tool says: its number of errors or hazards, and between which lines of which kernels."""
    output, spent = run(
        [str(shutil.which("compute-sanitizer")), "--tool", tool, sys.executable, str(script), *options],
        seconds,
    )
    summary = re.search(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", output)
    if log_folder is not None:
        (log_folder / f"{script.stem}_{tool}.log").write_text(output)
    accesses = re.findall(r"access at (\w+?)\+0x\w+ in (\w+\.py):(\d+)", output)
    return {
        "completed": "sanitize:" in output and summary is not None,
        "reported": None if summary is None else int(summary[1]),
        "places": sorted({f"{kernel} {file}:{line}" for kernel, file, line in accesses}),
        "seconds": spent,
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help="Scripts; default all.")] = None,
    tool: Annotated[list[str] | None, typer.Option(help="memcheck, racecheck; default both.")] = None,
    seconds: Annotated[int, typer.Option(help="Limit for one run.")] = 240,
    log_folder: Annotated[Path | None, typer.Option("--logs", help="For all that the tools print.")] = None,
    json_file: JsonFile = None,
) -> None:
    if not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None:
        raise SystemExit("this check needs a CUDA device and compute-sanitizer")
    folder = Path(__file__).parent
    if log_folder is not None:
        log_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(8) as pool:
        control = Path(scratch) / "control.py"
        control.write_text(CONTROL)
        jobs: dict[str, tuple[Path, list[str]]] = {
            name: (folder / name, ["--sanitize"]) for name in only or SCRIPTS
        }
        jobs["control"] = (control, [])
        commands = [[sys.executable, str(script), *options] for script, options in jobs.values()]
        warm = dict(zip(jobs, pool.map(lambda command: run(command, seconds)[0], commands), strict=True))
        for name, output in warm.items():
            if "sanitize:" not in output:
                print(f"{name} fails without compute-sanitizer:\n{output[-2000:]}")
        running = {
            (name, one): pool.submit(check, script, options, one, seconds, log_folder)
            for one in tool or TOOLS
            for name, (script, options) in jobs.items()
        }
        results = {f"{name} {one}": future.result() for (name, one), future in running.items()}
    about = about_this_run("python scripts/sanitize_gpu.py")
    for result in results.values():
        result |= {key: about[key] for key in ("device", "date")}
    report: dict[str, Any] = {**about, "results": results}
    if json_file is not None:
        if only and json_file.is_file():
            report["results"] = json.loads(json_file.read_text())["results"] | results
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    for name, result in results.items():
        print(name, result)


if __name__ == "__main__":
    typer.run(main)
