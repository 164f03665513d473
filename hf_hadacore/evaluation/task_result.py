"""What an evaluation task gives, whoever runs it."""

from typing import NamedTuple

import torch

from .perplexity import Estimate


class TaskResult(NamedTuple):
    """Metrics of a model on one task.

    Attributes:
        items: how many questions.
        metrics: by name, as lm-eval calls them.
        samples: fp64 ``[items]`` for metrics that are the mean of one number for each question.
    """

    items: int
    metrics: dict[str, Estimate]
    samples: dict[str, torch.Tensor]

    def over(self, baseline: "TaskResult") -> dict[str, Estimate]:
        """Paired differences from a baseline's result on the same questions, where there are samples."""
        return {
            name: Estimate.of(values - baseline.samples[name])
            for name, values in self.samples.items()
            if name in baseline.samples and len(baseline.samples[name]) == len(values)
        }
