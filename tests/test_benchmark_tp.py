"""The tensor-parallel benchmark's algorithms and its model, without GPUs."""

from typing import Any

import pytest
import torch
from benchmark_tp import failures, measure
from rank_processes import run_ranks
from tp_mlp import SMALL, Problem, Share, aware, naive
from tp_model import CollectiveModel, Timing, fit, predictions


def test_both_algorithms_on_two_ranks():
    """Results as exact as one rank's, the same on both ranks, and one all-reduce for TP-aware."""
    report = run_ranks(measure, 2, list(SMALL), [1, 5], True)
    assert not failures({2: report})
    assert len(report["mlps"]) == 2 * len(SMALL)
    for row in report["mlps"]:
        assert row["naive"]["collectives"] == {"all_gather": 1, "all_reduce": 1}
        assert row["aware"]["collectives"] == {"all_reduce": 1}
        # P2 only moves the channels to where they are read.
        assert row["naive"]["error_in_floors"] == row["aware"]["error_in_floors"]


def test_failures_are_seen():
    good: dict[str, Any] = {
        "error_in_floors": 1.5,
        "same_on_all_ranks": True,
        "collectives": {"AllReduce": 1},
    }
    row = {"mlp": "small", "tp": 2, "m": 1, "aware": good}
    assert not failures({2: {"mlps": [row]}})
    wrongs: list[dict[str, Any]] = [
        {"error_in_floors": 2.3},
        {"error_in_floors": float("nan")},
        {"same_on_all_ranks": False},
        {"collectives": {"AllReduce": 1, "AllGather": 1}},
        {"collectives": {}},
    ]
    for wrong in wrongs:
        assert len(failures({2: {"mlps": [row | {"aware": good | wrong}]}})) == 1
    assert len(failures({2: {"mlps": [row], "one_shot_check": {"calls": 9, "wrong": 2}}})) == 1


@pytest.mark.parametrize("name", list(SMALL))
def test_shares_of_one_rank_hold_everything(name: str):
    problem = Problem(SMALL[name], torch.device("cpu"))
    x = problem.tokens(3)
    exact = problem.exact(x)
    for is_aware, algorithm in ((False, naive), (True, aware)):
        y = algorithm(Share(problem, 0, 1, is_aware), x)
        assert float((y.double() - exact).norm() / exact.norm()) < 1e-3
    # The order matters.
    wrong = aware(Share(problem, 0, 1, is_aware=False), x)
    assert float((wrong.double() - exact).norm() / exact.norm()) > 0.5


OPERATIONS = ("all-reduce", "all-gather")


@pytest.mark.parametrize("constants", [(7.0, 2.0, 1e-5), (5.0, 0.0, 1e-5), (9.0, 1.0, 0.0)])
def test_the_model_finds_its_own_constants(constants: tuple[float, float, float]):
    exact = CollectiveModel(*constants)
    keys = [(operation, 2, 1 << bits) for operation in OPERATIONS for bits in range(10, 22, 2)]
    found = fit(Timing(*key, exact.microseconds(*key)) for key in keys)
    for key in keys:
        for world in (2, 4, 8):
            expected = exact.microseconds(key[0], world, key[2])
            assert found.microseconds(key[0], world, key[2]) == pytest.approx(expected, rel=1e-6)
    assert exact.microseconds("all-reduce", 1, 1 << 20) == 0


def test_no_constant_of_the_model_is_negative():
    """An all-gather that takes longer than an all-reduce would have steps of negative latency."""
    timings = [Timing("all-reduce", 2, 1 << bits, 10.0) for bits in (12, 16, 20)]
    timings += [Timing("all-gather", 2, 1 << bits, 12.0) for bits in (12, 16, 20)]
    model = fit(timings)
    assert min(model) >= 0
    assert model.microseconds("all-reduce", 2, 1 << 12) == pytest.approx(11, abs=1)


def test_predictions_add_up():
    collectives = [
        {"tp": 2, "bytes": size, "all-reduce": {"graph_us": 10.0}, "all-gather": {"graph_us": 10.0}}
        for size in (1 << 12, 1 << 20)
    ]
    part = {"mlp": "a", "tp": 4, "m": 1, "all-reduce_bytes": 100, "all-gather_bytes": 400}
    part |= {"products": {"graph_us": 30.0}, "permute": {"graph_us": 10.0}}
    measured = {"mlp": "a", "tp": 4, "m": 1, "naive": {"graph_us": 60.0}, "aware": {"graph_us": 50.0}}
    model = predictions([measured], [part], collectives)
    assert model["rows"] == [
        {
            **{"mlp": "a", "tp": 4, "m": 1, "naive_us": 60.0, "aware_us": 40.0},
            **{"speedup": 1.5, "measured": 1.2},
        }
    ]
    assert predictions([measured], [part], []) == {}
