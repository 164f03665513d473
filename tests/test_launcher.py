"""The launcher finds the kernel that Triton would, and knows when the dispatcher must not be skipped."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_hadacore.kernels import launcher


class Kernel:
    """Stands in for a Triton kernel: counts how launches reach it."""

    def __init__(self) -> None:
        self.slow: list[tuple] = []
        self.fast: list[tuple] = []
        self.warmed: list[tuple] = []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.slow.append((grid, arguments, options))
            return SimpleNamespace(function="function", packed_metadata="packed", run=self._run)

        return launch

    def _run(self, *arguments):
        self.fast.append(arguments)

    def warmup(self, *arguments, **options):
        self.warmed.append(arguments)


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    return Kernel()


def aligned(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    tensor = torch.zeros(*shape, dtype=dtype)
    assert tensor.data_ptr() % 16 == 0
    return tensor


def test_the_second_launch_of_a_kind_skips_tritons_look_up(kernel):
    x, y = aligned(4, 8), aligned(4, 8)
    for tensor in (x, y):
        launcher.run(kernel, (tensor, None), (4, 0.5), (8, True), (3, 2, 1), num_warps=4, launch_pdl=True)
    assert kernel.slow == [((3, 2, 1), (x, None, 4, 0.5, 8, True), {"num_warps": 4, "launch_pdl": True})]
    assert kernel.fast == [(3, 2, 1, 77, "function", "packed", None, None, None, y, None, 4, 0.5, 8, True)]


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": (aligned(8, dtype=torch.bfloat16), None)},
        {"tensors": (aligned(8), aligned(8))},
        {"sizes": (5,)},
        {"constants": (16,)},
        {"num_warps": 8},
    ],
)
def test_whatever_a_kernel_is_compiled_for_is_told_apart(kernel, change):
    call = dict(tensors=(aligned(8), None), sizes=(4,), constants=(8,), grid=(1, 1, 1), num_warps=4)
    launcher.run(kernel, **call)
    launcher.run(kernel, **call | change)
    assert len(kernel.slow) == 2 and not kernel.fast
    launcher.run(kernel, **call)
    assert len(kernel.fast) == 1


def test_unaligned_tensors_are_left_to_triton(kernel):
    x = aligned(9)[1:]
    for _ in range(2):
        launcher.run(kernel, (x,), (), (), (1, 1, 1), num_warps=4)
    assert len(kernel.slow) == 2 and not kernel.fast


def test_meta_tensors_only_compile(kernel):
    tensors = (torch.empty(2, device="meta"), None)
    launcher.run(kernel, tensors, (1,), (2,), (1, 1, 1), num_warps=4, descriptors=("tma",))
    assert kernel.warmed == [("tma", *tensors, 1, 2)] and not kernel.slow


def test_what_is_kept_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launcher, "_MAX_KEYS", 3)
    for size in range(7):
        launcher.run(kernel, (aligned(8),), (size,), (), (1, 1, 1), num_warps=4)
        assert len(launcher._compiled) <= 3


def test_the_dispatcher_is_skipped_only_when_nobody_watches_it(monkeypatch):
    class Cuda(torch.Tensor):
        pass

    x = torch.zeros(3)
    # CI has no GPU: what is not on one never goes straight.
    with torch.no_grad():
        assert not launcher.goes_straight(x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert not launcher.goes_straight(x)
    with torch.no_grad():
        assert launcher.goes_straight(x)
        assert not launcher.goes_straight(x.as_subclass(Cuda))
        with FlopCounterMode(display=False):
            assert not launcher.goes_straight(x)
        seen = []

        def look(row: torch.Tensor) -> torch.Tensor:
            seen.append(launcher.goes_straight(row))
            return row

        torch.vmap(look)(torch.zeros(2, 3))
        torch.jit.trace(look, x, check_trace=False)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        look(x)
        assert seen == [False] * 3
