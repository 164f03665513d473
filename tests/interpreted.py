"""Running kernels under Triton's interpreter, each script in a process of its own.

The interpreter is chosen when triton is imported, so it must not share a process with tests that compile.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
_SECONDS = 280


def run_interpreted(script: str, *arguments: str) -> str:
    """Run a script of this folder, which may import what tests may.

    Returns:
        What it printed.

    Raises:
        AssertionError: it failed; with the end of what it wrote to stderr.
    """
    paths = [TESTS, TESTS.parent, TESTS.parent / "scripts", os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, __file__, str(TESTS / script), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _patch_once() -> None:
    """Let the interpreter patch `triton.language` once a module, not whenever a kernel calls a function.

    That takes as long as all else that it does.
    """
    from triton.runtime import interpreter

    modules = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__ not in modules:
            modules.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if __name__ == "__main__":
    _patch_once()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
