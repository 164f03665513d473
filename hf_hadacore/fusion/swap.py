"""Putting another forward in front of a module's own, and taking it away again."""

import sys
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import nn


class Fused(nn.Module):
    """Base of the fused forwards, each put in front of a module's own class by `swap`."""

    unfused: ClassVar[type[nn.Module]]
    modeling: ClassVar[Any]
    mixin: ClassVar[type["Fused"]]
    formula: Any

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: copies and pickles have to make it again.
        return _new, (self.mixin, self.unfused), self.__dict__

    def _keeps_own_forward(self) -> bool:
        return self.training or torch.is_grad_enabled()


_CLASSES: dict[tuple[type, type], Any] = {}


def _fused_class(mixin: type[Fused], unfused: type[nn.Module]) -> Any:
    if (mixin, unfused) in _CLASSES:
        return _CLASSES[mixin, unfused]
    # transformers and accelerate look at class names, so the name stays.
    names: dict[str, Any] = {
        name: getattr(unfused, name) for name in ("__module__", "__qualname__", "__doc__")
    }
    modeling = sys.modules[unfused.__module__]
    names |= {"unfused": unfused, "modeling": modeling, "mixin": mixin}
    _CLASSES[mixin, unfused] = type(unfused.__name__, (mixin, unfused), names)
    return _CLASSES[mixin, unfused]


def _new(mixin: type[Fused], unfused: type[nn.Module]) -> Fused:
    cls = _fused_class(mixin, unfused)
    return cls.__new__(cls)


def swap(module: nn.Module, mixin: type[Fused], formula: tuple[Any, ...] | None) -> None:
    """Put a mixin's forward in front of a module's own.

    Args:
        module: left alone if someone has set a forward on it.
        mixin: with the forward.
        formula: what the forward reads; None leaves the module alone.
    """
    # A forward that someone has set on the instance is not ours to go around.
    is_hooked = "_old_forward" in module.__dict__
    if formula is not None and (is_hooked or "forward" not in module.__dict__):
        _set_class(module, _fused_class(mixin, type(module)))
        module.formula = formula  # type: ignore[assignment]


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    own = type(module).forward
    # accelerate's hooks keep the bound forward that they wrap.
    for name in ("forward", "_old_forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, MethodType) and bound.__func__ is own:
            module.__dict__[name] = MethodType(cls.forward, module)
    module.__class__ = cls


def is_bare(module: nn.Module, device: torch.device | None = None) -> bool:
    """Whether nothing but the module's class decides what a call does.

    Hooks would, but for one of accelerate's that only moves inputs to where they are already.

    Args:
        module: any.
        device: of the inputs; None if it is not known.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    hook = module.__dict__.get("_hf_hook")
    return hook is None or (device is not None and _only_moves_to(hook, device))


def _only_moves_to(hook: Any, device: torch.device) -> bool:
    return (
        type(hook) is sys.modules["accelerate.hooks"].AlignDevicesHook
        and not (hook.offload or hook.io_same_device)
        and torch.device(hook.execution_device) == device
    )


def restore(module: nn.Module) -> None:
    """Undo `swap`, and with it what the forward kept on the module."""
    if isinstance(module, Fused):
        for name in ("formula", "successor"):
            module.__dict__.pop(name, None)
        _set_class(module, type(module).unfused)
