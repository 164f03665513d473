"""Measure checkpoints, one or several at a time, beside the model that they were made from."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._version import __version__
from ..errors import CheckpointError, EvaluationError
from ..pretrained import load_pretrained
from .harness import require_lm_eval, run_tasks
from .multiple_choice import Item, multiple_choice, read_items
from .perplexity import compare, encode, perplexity
from .report import SCHEMA, describe_model, device_name, perplexity_entry, speed_entry, task_entry
from .speed import Speed, measure_speed
from .task_result import TaskResult
from .text_source import Text, read_text

_DEFAULT_WINDOWS = 20
_PACKAGES = ("transformers", "torch")


class Loaded(NamedTuple):
    """A checkpoint in memory.

    Attributes:
        source: its folder, or its id on the Hub.
        model: in evaluation mode.
        tokenizer: the model's.
    """

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, source: str, **options: Any) -> "Loaded":
        """Load a checkpoint.

        Args:
            source: a folder or a model id.
            options: of `load_pretrained`.
        """
        return cls(source, *load_pretrained(source, **options))


class Protocol(NamedTuple):
    """What is measured, the same of every model; see `Protocol.read`.

    Attributes:
        text: for perplexity; None for none.
        context, windows: of `perplexity`.
        questions: by .jsonl file.
        tasks: of lm-eval.
        few_shot, limit, batch_size: of those tasks.
        speed: whether to measure it.
        progress: show progress bars.
    """

    text: Text | None
    context: int
    windows: int | None
    questions: Mapping[str, Sequence[Item]]
    tasks: Sequence[str]
    few_shot: int | None
    limit: int | None
    batch_size: int
    speed: bool
    progress: bool

    @classmethod
    def read(
        cls,
        *,
        text: str | None = None,
        context: int = 1024,
        windows: int | None = None,
        tasks: Sequence[str] = (),
        few_shot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        speed: bool = False,
        progress: bool = True,
    ) -> "Protocol":
        """Read texts and questions.

        Args:
            text, context, windows, tasks, few_shot, limit, batch_size, speed, progress: as for
                `evaluate_checkpoint`.

        Raises:
            EvaluationError: a text or a task cannot be read.
            MissingPackageError: a task needs lm-eval.
        """
        prose = read_text(text) if text is not None or not tasks else None
        questions = {task: read_items(task)[:limit] for task in tasks if task.endswith(".jsonl")}
        by_name = [task for task in tasks if task not in questions]
        if by_name:
            require_lm_eval()
        return cls(prose, context, windows, questions, by_name, few_shot, limit, batch_size, speed, progress)


def evaluate_checkpoint(
    folder: str,
    *,
    baseline: str | None = None,
    text: str | None = None,
    context: int = 1024,
    windows: int | None = None,
    tasks: Sequence[str] = (),
    few_shot: int | None = None,
    limit: int | None = None,
    attention: str | None = None,
    device: str | None = None,
    baseline_device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    speed: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the quality of a checkpoint: perplexity and tasks, beside a baseline's.

    Args:
        folder: a checkpoint's folder or a model id.
        baseline: of the model to compare with, usually the full-precision one; in memory at the same time.
        text: for perplexity; see `read_text`. None takes its default, or no text at all if there are tasks.
        context: tokens of a window.
        windows: how many, spread over the text; None takes 20, or as many as there are.
        tasks: .jsonl files (see `read_items`), and tasks of lm-eval (see `run_tasks`).
        few_shot: examples before each question of lm-eval's tasks; None for the task's own number.
        limit: questions of each task, the first ones; None for all.
        attention: "fp8" or "int8-fp8", of the checkpoint, not of the baseline; None for the checkpoint's.
        device, baseline_device, dtype: as for `load_pretrained`; `dtype` is for both.
        batch_size: sequences at a time, of lm-eval's tasks.
        speed: measure how fast both generate, too; see `measure_speed`.
        progress: show progress bars.

    Returns:
        The report; docs/evaluation.md describes it.

    Raises:
        CheckpointError, ConfigError: as `load_pretrained`.
        EvaluationError: a text or a task cannot be read, or is too short; the baseline is another model.
        MissingPackageError: a task needs lm-eval.
    """
    protocol = Protocol.read(
        text=text,
        context=context,
        windows=windows,
        tasks=tasks,
        few_shot=few_shot,
        limit=limit,
        batch_size=batch_size,
        speed=speed,
        progress=progress,
    )
    loaded = Loaded.load(folder, device=device, dtype=dtype, attention=attention)
    expected = None
    if baseline is not None:
        expected = Loaded.load(baseline, device=baseline_device or device, dtype=dtype)
    (report,) = evaluate_models([loaded], expected, protocol)
    return report


def evaluate_models(
    models: Sequence[Loaded], baseline: Loaded | None, protocol: Protocol
) -> Iterator[dict[str, Any]]:
    """Measure models that have one baseline, which is measured once.

    Args:
        models: in the order of the reports.
        baseline: what all are compared with, usually the full-precision model; None for nothing.
        protocol: what is measured.

    Yields:
        The report of each model, as soon as it is complete; docs/evaluation.md describes it.

    Raises:
        CheckpointError: the baseline has another vocabulary than a model.
        EvaluationError: the text is too short.
    """
    if baseline is not None:
        for model in models:
            _check_pair(model, baseline)
    expected_speed = timed(baseline) if protocol.speed and baseline is not None else None
    texts = _measure_perplexity(models, baseline, protocol)
    expected: dict[str, TaskResult] = {}
    for i, model in enumerate(models):
        report: dict[str, Any] = {
            "schema": SCHEMA,
            "date": datetime.now(UTC).date().isoformat(),
            "device": device_name(model.model.device),
            "versions": _versions(with_lm_eval=bool(protocol.tasks)),
            "model": describe_model(model.source, model.model),
            "baseline": None if baseline is None else describe_model(baseline.source, baseline.model),
        }
        if protocol.text is not None:
            report["perplexity"] = texts[i]
        if protocol.questions or protocol.tasks:
            found = _run_tasks(model, protocol)
            if baseline is not None:
                expected = expected or _run_tasks(baseline, protocol)
            report["tasks"] = _task_entries(found, expected, protocol)
        if protocol.speed:
            report["speed"] = speed_entry(timed(model), expected_speed)
        yield report


def timed(loaded: Loaded) -> tuple[str, Speed]:
    """The speed of a checkpoint.

    Args:
        loaded: on a device with nothing else to do.

    Returns:
        The device's name, and `measure_speed`.
    """
    return device_name(loaded.model.device), measure_speed(loaded.model)


def answer_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], progress: bool = True
) -> TaskResult:
    """`multiple_choice`, with the names that lm-eval has for its metrics.

    Args:
        model, tokenizer, items, progress: as there.
    """
    result = multiple_choice(model, tokenizer, items, progress=progress)
    return TaskResult(
        len(items),
        {"acc": result.accuracy, "acc_norm": result.normalized_accuracy},
        {"acc": result.correct.double(), "acc_norm": result.correct_normalized.double()},
    )


def _run_tasks(loaded: Loaded, protocol: Protocol) -> dict[str, TaskResult]:
    """By .jsonl file or by name."""
    _, model, tokenizer = loaded
    results = {
        file: answer_questions(model, tokenizer, items, protocol.progress)
        for file, items in protocol.questions.items()
    }
    if protocol.tasks:
        results |= run_tasks(
            model,
            tokenizer,
            protocol.tasks,
            few_shot=protocol.few_shot,
            limit=protocol.limit,
            batch_size=protocol.batch_size,
        )
    return results


def _task_entries(
    found: Mapping[str, TaskResult], expected: Mapping[str, TaskResult], protocol: Protocol
) -> dict[str, Any]:
    """Results in a report; `expected` is empty if there is no baseline."""
    entries = {}
    about: dict[str, Any]
    for name, result in found.items():
        if name in protocol.questions:
            file = Path(name)
            title, about = file.stem, {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        else:
            title, about = name, {"few_shot": protocol.few_shot}
        entries[title] = {**about, **task_entry(result, expected.get(name))}
    return entries


def _measure_perplexity(
    models: Sequence[Loaded], baseline: Loaded | None, protocol: Protocol
) -> list[dict[str, Any]]:
    """An entry of each model; nothing if there is no text."""
    if protocol.text is None:
        return []
    context, windows = protocol.context, protocol.windows
    for loaded in models:
        config = loaded.model.config.get_text_config(decoder=True)
        longest = getattr(config, "max_position_embeddings", None)
        if context < 2 or (longest is not None and context > longest):
            raise EvaluationError(
                f"context must be 2 to {longest} tokens, the longest of the model, got {context}"
            )
    ids, bos = encode(models[0].tokenizer, protocol.text.content)
    if windows is None:
        windows = max(1, min(_DEFAULT_WINDOWS, len(ids) // (context - (bos is not None))))
    options: dict[str, Any] = dict(bos=bos, context=context, windows=windows, progress=protocol.progress)
    head = {
        "text": protocol.text.name,
        "text_sha256": protocol.text.sha256,
        "context": context,
        "windows": windows,
        "tokens": windows * (context - 1),
    }
    if baseline is None:
        return [head | perplexity_entry(perplexity(each.model, ids, **options)) for each in models]
    expected, found = compare([each.model for each in models], baseline.model, ids, **options)
    return [head | perplexity_entry(result.perplexity, expected, result) for result in found]


def _check_pair(model: Loaded, baseline: Loaded) -> None:
    vocabularies = [each.tokenizer.get_vocab() for each in (model, baseline)]
    sizes = [each.model.config.get_text_config(decoder=True).vocab_size for each in (model, baseline)]
    if vocabularies[0] != vocabularies[1] or sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{baseline.source}: has another vocabulary than {model.source}; a baseline is another form of "
            "the same model"
        )


def _versions(*, with_lm_eval: bool) -> dict[str, str]:
    packages = (*_PACKAGES, "lm_eval") if with_lm_eval else _PACKAGES
    return {
        "hf_hadacore": __version__,
        **{package: importlib.metadata.version(package) for package in packages},
        "python": platform.python_version(),
    }
