"""lm-eval's tasks on models in memory, and its command line for checkpoints.

    python -m hf_hadacore.evaluation.harness --model hf --model_args pretrained=DIR --tasks mmlu

is lm-eval's own command line, in a process that knows HadaCore checkpoints.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import EvaluationError, MissingPackageError
from .perplexity import Estimate
from .task_result import TaskResult


def require_lm_eval() -> str:
    """The version of lm-eval.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise MissingPackageError(
            f"tasks by name are run by lm-eval, which cannot be imported ({error}): "
            'pip install "hf_hadacore[eval]"'
        ) from None
    return lm_eval.__version__


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, TaskResult]:
    """Run tasks of lm-eval on a loaded model, whatever its weights and its attention.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        tasks: names of tasks, groups or tags of lm-eval, or task files (.yaml).
        few_shot: examples before each question; None for the task's own number.
        limit: questions of each task, the first ones; None for all.
        batch_size: sequences at a time.

    Returns:
        By name, the groups' first.

    Raises:
        MissingPackageError: lm-eval is not installed.
        EvaluationError: there is no such task, or its data cannot be had.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for task in tasks:
        if task not in manager.all_tasks and not task.endswith(".yaml"):
            raise EvaluationError(
                f"{task}: is neither a .jsonl file nor a task of lm-eval; `lm-eval ls tasks` lists those"
            )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of models that are loaded already
    try:
        results: Any = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=few_shot,
            limit=limit,
            task_manager=manager,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise EvaluationError(
            f"lm-eval cannot run {', '.join(tasks)}: {' '.join(str(error).split())}"
        ) from error
    groups: dict[str, list[str]] = results.get("group_subtasks", {})
    samples = {task: _samples(entries) for task, entries in results["samples"].items()}
    everything = {**results.get("groups", {}), **results["results"]}
    return {
        name: _task_result(metrics, [samples[task] for task in _leaves(name, groups) if task in samples])
        for name, metrics in everything.items()
    }


def _leaves(name: str, groups: Mapping[str, list[str]]) -> list[str]:
    """The tasks of a group; of a task, itself."""
    parts = groups.get(name)
    return [leaf for part in parts for leaf in _leaves(part, groups)] if parts else [name]


def _samples(entries: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """By metric and filter, what is a number for each question."""
    found: dict[str, list[Any]] = {}
    for entry in sorted(entries, key=lambda entry: entry["doc_id"]):
        for metric in entry["metrics"]:
            found.setdefault(f"{metric},{entry['filter']}", []).append(entry[metric])
    return {
        name: torch.tensor(values, dtype=torch.float64)
        for name, values in found.items()
        if all(isinstance(value, Real) for value in values)
    }


def _task_result(metrics: Mapping[str, Any], parts: Sequence[dict[str, torch.Tensor]]) -> TaskResult:
    """Samples count only where their mean is the metric: some metrics are made of them in other ways."""
    estimates, means, items = {}, {}, 0
    for key, value in metrics.items():
        name, _, filtered = key.partition(",")
        if name.endswith("_stderr") or not filtered or not isinstance(value, Real):
            continue
        error = metrics.get(f"{name}_stderr,{filtered}")
        label = name if filtered == "none" else key
        estimates[label] = Estimate(float(value), float(error) if isinstance(error, Real) else math.nan)
        if parts and all(key in part for part in parts):
            values = torch.cat([part[key] for part in parts])
            items = max(items, len(values))
            if math.isclose(values.mean(), value, abs_tol=1e-9):
                means[label] = values
    return TaskResult(items, estimates, means)


if __name__ == "__main__":
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
