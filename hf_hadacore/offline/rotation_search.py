"""Which weights of a model can be rotated together, found out by running a tiny one (see `weight_rotation`).

Nothing is taken from names. Which axes of which Parameters belong to the residual stream is found by building
the architecture tiny, twice: their lengths follow `hidden_size`. Which norm a layer reads is seen in a
forward pass. And a plan counts only if it leaves the logits of the tiny model, whose weights are random, as
they were.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigError, UnsupportedError
from ..fusion.probes import norm_formula
from ..hadamard_matrices import has_hadamard_matrix
from ..modules.experts import expert_projections
from ..modules.stream_rotation import StreamRotation, rotate_stream
from ..parallel.permutation_search import permutation_groups
from .tiny_model import WIDTHS, probe_logits, tiny_config, tiny_model
from .weight_rotation import ROTATIONS, AxisRotation, ParameterChange, WeightRotation

logger = logging.get_logger(__name__)

# Of the largest logit. Norms and softmax compute in fp32 whatever their input; a wrong plan changes more.
_TOLERANCE = 1e-3


def rotate_model(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Rotate the weights of a loaded full-precision model, in place.

    Args:
        model: not quantized, with weights on any device.
        kind: "r1", "r2", "r1r2", or "none".

    Returns:
        The model. After R1 its embedding and its head are no longer tied.

    Raises:
        ConfigError: there is no such kind.
        UnsupportedError: the model cannot be rotated so.
    """
    rotation = plan_rotation(model, kind)
    head: Any = model.get_output_embeddings()
    if "r1" in kind and model.all_tied_weights_keys:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    _apply(rotation, model)
    return model


def _apply(rotation: WeightRotation, model: PreTrainedModel) -> None:
    parameters = dict(model.named_parameters())
    rotation.set_gains(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(rotation.rotate(name, parameter))


def choose_rotation(model: PreTrainedModel) -> WeightRotation:
    """What GPTQ gains by: R1 and R2 if the model allows both, else nothing.

    R2 alone made weights worse where it was tried (scripts/results/quality_gemma.json).

    Args:
        model: as for `plan_rotation`.
    """
    try:
        return plan_rotation(model, "r1r2", keep_tied=True)
    except UnsupportedError as error:
        logger.info(f"HadaCore: {error}")
    return plan_rotation(model, "none")


def plan_rotation(model: PreTrainedModel, kind: str, *, keep_tied: bool = False) -> WeightRotation:
    """How the weights of a model can be rotated.

    Args:
        model: on any device, meta included; not quantized.
        kind: "r1", "r2", "r1r2", or "none".
        keep_tied: leave an embedding and a head that share a tensor as they are under R1, and rotate the
            stream between them at run time.

    Raises:
        ConfigError: there is no such kind.
        UnsupportedError: the model cannot be rotated so; the message says why, and what can be done.
    """
    if kind not in ROTATIONS:
        raise ConfigError(f"rotation: expected one of {', '.join(ROTATIONS)}, found {kind!r}")
    if kind == "none":
        return WeightRotation(kind, {}, {})
    model_name = type(model).__name__
    if model.config.get_text_config(decoder=True) is not model.config or model.config.is_encoder_decoder:
        raise UnsupportedError(f'{model_name}: only decoders of text are rotated; use rotation="none"')
    try:
        tiny = tiny_model(model)
        logits = probe_logits(tiny)
    except Exception as error:  # as many ways to fail as there are architectures
        raise UnsupportedError(
            f"{model_name}: cannot be rotated, because a tiny one that is to be tried fails: {error}; use "
            'rotation="none"'
        ) from error
    heads = _head_changes(tiny)
    if "r2" in kind and not heads:
        raise UnsupportedError(
            f"{model_name}: the values of its heads cannot be rotated (R2): found no v_proj and o_proj with "
            'nothing but attention between them; try rotation="r1"'
        )
    residual: dict[str, ParameterChange] = {}
    norms: dict[str, float] = {}
    if "r1" in kind:
        try:
            residual, norms = _residual_changes(model, tiny)
        except UnsupportedError as error:
            instead = "r2" if heads else "none"
            raise UnsupportedError(
                f'{model_name}: the residual stream cannot be rotated (R1): {error}; use rotation="{instead}"'
            ) from error
    stream = None
    if keep_tied and "r1" in kind and model.all_tied_weights_keys:
        stream = _leave_ends(tiny, residual, norms)
    plan = WeightRotation(kind, _merged(residual, heads if "r2" in kind else {}), norms, stream)
    _verify(plan, tiny, logits, model_name)
    return plan


def _merged(one: dict[str, ParameterChange], other: dict[str, ParameterChange]) -> dict[str, ParameterChange]:
    merged = dict(one)
    for name, change in other.items():
        before = merged.get(name, ParameterChange())
        merged[name] = before._replace(rotations=before.rotations + change.rotations)
    return merged


def _head_changes(tiny: PreTrainedModel) -> dict[str, ParameterChange]:
    """R2 of all attention layers that allow it."""
    changes: dict[str, ParameterChange] = {}
    for group in permutation_groups(tiny):
        if group.head_dim is None or not group.producers or not has_hadamard_matrix(group.head_dim):
            continue
        (writer_name,), (reader_name,) = group.producers, group.consumers
        writer: Any = tiny.get_submodule(writer_name)
        reader: Any = tiny.get_submodule(reader_name)
        # A fused projection has the rows of q and k first.
        start = writer.out_features - reader.in_features // group.repeats
        change = ParameterChange((AxisRotation(0, group.head_dim, start),))
        changes[f"{writer_name}.weight"] = change
        if writer.bias is not None:
            changes[f"{writer_name}.bias"] = change
        changes[f"{reader_name}.weight"] = ParameterChange((AxisRotation(1, group.head_dim),))
    return changes


def _residual_axes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The axes of each Parameter whose lengths follow the width of the residual stream."""
    shapes = []
    for width in WIDTHS:
        with torch.device("meta"):
            tiny = type(model)._from_config(tiny_config(model.config, width))
        shapes.append({name: parameter.shape for name, parameter in tiny.named_parameters()})
    return {
        name: tuple(axis for axis, sizes in enumerate(zip(*both, strict=True)) if sizes == WIDTHS)
        for name, *both in ((name, shape, shapes[1][name]) for name, shape in shapes[0].items())
    }


def _residual_changes(
    model: PreTrainedModel, tiny: PreTrainedModel
) -> tuple[dict[str, ParameterChange], dict[str, float]]:
    """R1 of all Parameters, and the norms whose gains are folded."""
    if not has_hadamard_matrix(model.config.hidden_size):
        raise UnsupportedError(f"no Hadamard matrix of its size, {model.config.hidden_size}, can be built")
    axes = {name: found for name, found in _residual_axes(model).items() if found}
    modules: dict[str, Any] = dict(tiny.named_modules())
    norms: dict[str, float] = {}
    changes: dict[str, ParameterChange] = {}
    for name, found in axes.items():
        owner, _, leaf = name.rpartition(".")
        if tiny.get_parameter(name).dim() > 1 or (leaf == "bias" and isinstance(modules[owner], nn.Linear)):
            changes[name] = ParameterChange(tuple(AxisRotation(axis) for axis in found))
            continue
        formula = norm_formula(modules[owner])
        if formula is None:
            raise UnsupportedError(f"{owner} is no RMSNorm ({type(modules[owner]).__name__})")
        norms[name] = formula.weight_offset
    owners = {name.rpartition(".")[0] for name in changes}
    readings = _readings(tiny, {name.rpartition(".")[0] for name in norms}, owners)
    for reader, norm in readings.items():
        name, axis = _reading_parameter(reader, modules[reader], axes)
        changes[name] = changes[name]._replace(norm=f"{norm}.weight", gain_axis=axis)
    read = {change.norm for change in changes.values()}
    for name in norms:
        if name not in read:
            raise UnsupportedError(
                f"{name.rpartition('.')[0]} is read by no linear layer that could take over its gains"
            )
    return changes, norms


def _leave_ends(
    tiny: PreTrainedModel, changes: dict[str, ParameterChange], norms: dict[str, float]
) -> StreamRotation:
    """Take embedding, last norm and head out of the changes, and say what has to be done in their places."""
    ends: tuple[Any, Any] = (tiny.get_input_embeddings(), tiny.get_output_embeddings())
    embedding, head = (next(name for name, module in tiny.named_modules() if module is end) for end in ends)
    del changes[f"{embedding}.weight"]
    norm = changes.pop(f"{head}.weight").norm or ""
    return StreamRotation(embedding, norm.removesuffix(".weight"), norms.pop(norm))


def _reading_parameter(name: str, module: nn.Module, axes: Mapping[str, tuple[int, ...]]) -> tuple[str, int]:
    """The Parameter of a module that multiplies its input, and the axis along which it does."""
    projections = expert_projections(module)
    matrices = [leaf for leaf, value in module._parameters.items() if value is not None and value.dim() > 1]
    candidates = [
        (f"{name}.{leaf}", axis)
        for leaf in (projections[:1] or matrices)
        for axis in axes.get(f"{name}.{leaf}", ())
        # What else holds a matrix has it output-major.
        if projections or axis == 1
    ]
    if len(candidates) != 1:
        raise UnsupportedError(f"{name} ({type(module).__name__}) reads a norm in an unknown way")
    return candidates[0]


def _readings(tiny: PreTrainedModel, norms: set[str], readers: set[str]) -> dict[str, str]:
    """Which modules read the output of which norm, itself or a view of it, as a forward pass shows."""
    outputs: list[tuple[str, torch.Tensor]] = []
    readings: dict[str, str] = {}
    unseen = set(readers)

    def see_output(name: str, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        outputs.append((name, output))

    def see_input(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        unseen.discard(name)
        for value in (*args, *kwargs.values()):
            for norm, output in outputs if isinstance(value, torch.Tensor) else ():
                if value.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
                    readings[name] = norm

    with ExitStack() as stack:
        for name, module in tiny.named_modules():
            if name in norms:
                stack.callback(module.register_forward_hook(partial(see_output, name)).remove)
            elif name in readers:
                hook = module.register_forward_pre_hook(partial(see_input, name), with_kwargs=True)
                stack.callback(hook.remove)
        probe_logits(tiny)
    if unseen:
        raise UnsupportedError(f"{min(unseen)} does not run when logits are computed")
    return readings


def _verify(plan: WeightRotation, tiny: PreTrainedModel, logits: torch.Tensor, model_name: str) -> None:
    """Check that the plan changes no logits of the tiny model. It leaves that model rotated."""
    _apply(plan, tiny)
    if plan.stream is not None:
        rotate_stream(tiny, plan.stream)
    difference = (probe_logits(tiny) - logits).abs().max() / logits.abs().max()
    if not difference < _TOLERANCE:
        raise UnsupportedError(
            f"{model_name}: rotated ({plan.kind}) it would compute something else: a tiny model's logits "
            f'change by {float(difference):.1e} of their size; use rotation="none"'
        )
