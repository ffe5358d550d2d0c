"""A device that this machine lacks: its tensors are on the CPU, and what a GPU refuses of them is refused.

Its type is "meta", the one that every build of torch has beside "cpu". So code takes the paths of a GPU, where all but
its kernels is computed, and numbers can be compared. An operation of tensors on both devices fails as CUDA's does: not
with numbers (tensors without a dimension), copies, and indices on the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ["DEVICE", "Remote", "device", "there"]

DEVICE = torch.device("meta")
aten = torch.ops.aten
BETWEEN = {aten._to_copy.default, aten.copy_.default}
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Remote(Tensor):
    """One on the device, and what it holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Remote":
        with torch.inference_mode(False):  # tensors of that mode cannot be wrapped
            made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=DEVICE,
            )
        made.held = held
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"Remote({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Within this context, tensors can be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Words(TorchFunctionMode):
    """Within this context, what no other mode is told of, ``torch.tensor`` and ``tolist``, knows the device, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func in (torch.tensor, torch.as_tensor)
            and kwargs.get("device") == DEVICE
            and not isinstance(args[0], Tensor)
        ):
            return Remote(func(*args, **kwargs | {"device": "cpu"}))
        if func is Tensor.tolist and isinstance(args[0], Remote):
            return args[0].held.tolist()
        return func(*args, **kwargs)


@contextmanager
def device() -> Iterator[None]:
    """Within this context there is the device."""
    asked, autocast = torch.is_autocast_enabled, torch.autocast
    torch.is_autocast_enabled = lambda kind="cpu": kind != DEVICE.type and asked(kind)
    torch.autocast = lambda kind, **more: nullcontext() if kind == DEVICE.type else autocast(kind, **more)  # type: ignore
    try:
        with Device(), Words():
            yield
    finally:
        torch.is_autocast_enabled, torch.autocast = asked, autocast  # type: ignore[misc]


def there(module: nn.Module) -> nn.Module:
    """The module, moved to the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Remote(parameter.detach().clone()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Remote(buffer.clone())
    return module


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if torch.is_inference_mode_enabled():
        with Device():
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    remote = [each for each in tensors if isinstance(each, Remote)]
    asked = kwargs.get("device")
    to_it = torch.device(asked) == DEVICE if asked is not None else bool(remote)
    if remote and func not in BETWEEN:
        _check(func, args, tensors)
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError(f"expected a generator on the device, got one on the CPU: {func}")
    if not remote and not to_it:
        return func(*args, **kwargs)
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    held_args, held_kwargs = tree_map_only(Remote, lambda each: each.held, (args, kwargs))
    found = func(*held_args, **held_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if not to_it or func is aten._local_scalar_dense.default:
        return found
    own = {id(each.held): each for each in remote}  # what is changed in place stays the object that it is
    return tree_map_only(Tensor, lambda each: own[id(each)] if id(each) in own else Remote(each), found)


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    if func in BY_INDEX:
        first, indices, *others = args
        tensors = [first, *(each for each in others if isinstance(each, Tensor))]
        if not isinstance(first, Remote) and any(isinstance(each, Remote) for each in indices):
            raise RuntimeError(f"expected indices on the CPU for a tensor there, got some on the device: {func}")
    here = [each for each in tensors if not isinstance(each, Remote) and each.ndim > 0]
    if here and any(isinstance(each, Remote) for each in tensors):
        raise RuntimeError(f"expected all tensors on one device, got one of shape {tuple(here[0].shape)} here: {func}")
