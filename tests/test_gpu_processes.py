"""Jobs of GPU scripts in several processes."""

import os
from concurrent.futures.process import BrokenProcessPool

from gpu_processes import in_processes


def half(number: int) -> float:
    if number == 0:
        os._exit(1)  # as a compiler that aborts
    if number < 0:
        raise ValueError("negative")
    return number / 2


def test_a_job_that_fails_takes_no_other_along():
    first, ended, raised, last = in_processes(half, [4, 0, -2, 6])
    assert (first, last) == (2, 3)
    assert isinstance(ended, BrokenProcessPool)
    assert str(raised) == "ValueError: negative"
