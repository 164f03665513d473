"""A model of tensor-parallel MLPs on numbers of ranks that nobody measured, named as one where it is shown.

A step is what a rank computes, timed on one GPU, plus its collectives. For these, time = launch + steps *
latency + traffic / bandwidth (Hockney's model), with the steps and the traffic of a ring: 2(p - 1) steps and
2(p - 1)/p of the bytes for an all-reduce, p - 1 steps and (p - 1)/p of the bytes for an all-gather. The three
constants are fitted to measured times.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """One measured collective.

    Attributes:
        operation: "all-reduce" or "all-gather".
        world: number of ranks, p.
        nbytes: of the result.
        microseconds: of one call.
    """

    operation: str
    world: int
    nbytes: int
    microseconds: float


class CollectiveModel(NamedTuple):
    """The constants of the model; none is negative.

    Attributes:
        launch_us: of every call.
        step_us: latency of a step.
        us_per_byte: that passes through a rank.
    """

    launch_us: float
    step_us: float
    us_per_byte: float

    def microseconds(self, operation: str, world: int, nbytes: int) -> float:
        """Of one call; nothing for one rank."""
        if world == 1:
            return 0.0
        return sum(a * b for a, b in zip(self, _features(operation, world, nbytes), strict=True))


def _features(operation: str, world: int, nbytes: int) -> tuple[float, float, float]:
    steps = (world - 1) * {"all-reduce": 2, "all-gather": 1}[operation]
    return 1.0, float(steps), steps * nbytes / world


def fit(timings: Iterable[Timing]) -> CollectiveModel:
    """The constants with the smallest relative errors; those that would be negative are left out.

    Args:
        timings: at least three, of both operations.
    """
    timings = list(timings)
    rows = torch.tensor([_features(*timing[:3]) for timing in timings], dtype=torch.float64)
    times = torch.tensor([timing.microseconds for timing in timings], dtype=torch.float64)
    scale = rows.abs().amax(0)
    relative = rows / scale / times[:, None]
    kept = [0, 1, 2]
    while True:
        solution = torch.linalg.lstsq(
            relative[:, kept], torch.ones(len(times), 1, dtype=torch.float64)
        ).solution
        if (solution >= 0).all():
            break
        kept.pop(int(solution.argmin()))
    constants = [0.0, 0.0, 0.0]
    for index, value in zip(kept, solution.flatten().tolist(), strict=True):
        constants[index] = value / float(scale[index])
    return CollectiveModel(*constants)


def predictions(
    mlps: list[dict[str, Any]], parts: list[dict[str, Any]], collectives: list[dict[str, Any]]
) -> dict[str, Any]:
    """Speed-ups of TP-aware over naive in CUDA graphs, from collectives of two ranks and parts of one GPU.

    Args:
        mlps, parts, collectives: rows of `benchmark_tp`.

    Returns:
        The constants, and a row for each part, with the measured speed-up where there is one. Empty without
        collectives of two ranks.
    """
    timings = [
        Timing(name, 2, row["bytes"], row[name]["graph_us"])
        for row in collectives
        if row["tp"] == 2
        for name in ("all-reduce", "all-gather")
    ]
    if not timings:
        return {}
    model = fit(timings)
    measured = {
        (row["mlp"], row["tp"], row["m"]): row["naive"]["graph_us"] / row["aware"]["graph_us"] for row in mlps
    }
    rows = []
    for part in parts:
        key = part["mlp"], part["tp"], part["m"]
        reduce, gather = (
            model.microseconds(name, part["tp"], part[f"{name}_bytes"])
            for name in ("all-reduce", "all-gather")
        )
        aware = part["products"]["graph_us"] + reduce
        naive = aware + gather + part["permute"]["graph_us"]
        rows.append(
            {
                **dict(zip(("mlp", "tp", "m"), key, strict=True)),
                "naive_us": round(naive, 2),
                "aware_us": round(aware, 2),
                "speedup": round(naive / aware, 3),
                "measured": round(measured[key], 3) if key in measured else None,
            }
        )
    return {"constants": model._asdict(), "rows": rows}
