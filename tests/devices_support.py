"""A second device without hardware: tensors whose storage is marked as elsewhere, and an error for mixing the two.

    with SecondDevice():
        x = torch.ones(2, device="cuda")     # an ordinary tensor, which says that it is on cuda:0
        x + torch.ones(2)                    # WrongDevice, as on a machine with a GPU

The numbers are ordinary numbers on the CPU, so whole stages run, data-dependent control flow included. A mark belongs
to a storage, as a device does: views share it, in-place operations keep it, gradients get it from what they are made
of. What may mix here is what may mix in torch: copies, 0-dimensional CPU tensors, and indices on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["HERE", "THERE", "SecondDevice", "WrongDevice"]

HERE, THERE = torch.device("cpu"), torch.device("cuda", 0)

# Operations that take tensors of two devices on purpose.
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::set_.source_Tensor"}
_INDEXING = ("aten::index", "aten::_index_put", "aten::_unsafe_index")


class WrongDevice(AssertionError):
    """An operation got tensors of two devices."""


class SecondDevice(TorchFunctionMode):
    """While entered, `cuda` is a second device; `operations` counts what ran on it."""

    def __init__(self) -> None:
        super().__init__()
        self._marked: dict[int, StorageWeakRef] = {}
        self._anywhere: dict[int, StorageWeakRef] = {}
        self._wanted: list[torch.device] = []
        self._dispatch = _Dispatch(self)
        self.operations = 0

    def __enter__(self) -> SecondDevice:
        self._dispatch.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._dispatch.__exit__(*error)

    def device_of(self, tensor: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            if tensor.device.type != "cpu":
                return tensor.device
            return THERE if tensor.untyped_storage()._cdata in self._marked else HERE

    def _by_storage(self, tensor: Tensor) -> dict[int, StorageWeakRef]:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        # The weak reference keeps the address from being used again.
        return {storage._cdata: StorageWeakRef(storage)}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return self.device_of(args[0])
        if func == Tensor.is_cuda.__get__:
            return self.device_of(args[0]) == THERE
        if func in (Tensor.numpy, Tensor.__array__) and self.device_of(args[0]) == THERE:
            raise WrongDevice("a tensor on cuda:0 has no numpy array: copy it to the CPU first")
        if name == "cpu":
            return self._moved(args[0], HERE, args[0].dtype, copy=False)
        if name == "new_tensor" and "device" not in kwargs:
            kwargs["device"] = self.device_of(args[0])
        if name == "to":
            return self._to(args, kwargs)
        asked = kwargs.get("device")
        if asked is None or isinstance(asked, int) or torch.device(asked).type == "meta":
            return func(*args, **kwargs)
        kwargs["device"] = HERE
        return self._made_on(_full(asked), lambda: func(*args, **kwargs))

    def _to(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensor, device, dtype = args[0], None, None
        for value in (*args[1:], kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other")):
            if isinstance(value, Tensor):
                device, dtype = self.device_of(value), value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, str | torch.device):
                device = _full(value)
        if tensor.device.type == "meta":
            return Tensor.to(*args, **kwargs)
        copy = bool(kwargs.get("copy", False))
        return self._moved(tensor, device or self.device_of(tensor), dtype or tensor.dtype, copy=copy)

    def _moved(self, tensor: Tensor, device: torch.device, dtype: torch.dtype, *, copy: bool) -> Tensor:
        if device == self.device_of(tensor) and dtype == tensor.dtype and not copy:
            return tensor
        return self._made_on(device, lambda: Tensor.to(tensor, dtype=dtype, copy=True))

    def _made_on(self, device: torch.device, make: Callable[[], Any]) -> Any:
        """What `make` makes, marked as being on `device`."""
        self._wanted.append(device)
        try:
            result = make()
        finally:
            self._wanted.pop()
        if device == THERE:  # torch.tensor() fills its tensor unseen by the dispatcher
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._marked |= self._by_storage(leaf)
        return result

    def ran(self, operation: Any, inputs: list[Tensor], args: Sequence[Any], result: Any) -> None:
        """Check an operation's inputs and mark what it made."""
        name = operation._schema.name
        placed = [tensor for tensor in inputs if not self._anywhere.keys() & self._by_storage(tensor).keys()]
        backward = torch._C._current_graph_task_id() >= 0
        if not placed and not self._wanted and isinstance(result, Tensor) and (inputs or backward):
            # A zero gradient that autograd makes by itself is where its output is.
            self._anywhere |= self._by_storage(result)
            return
        inputs = placed
        devices = {self.device_of(tensor) for tensor in inputs}
        if self._wanted:
            made = self._wanted[-1]
        elif len(devices) > 1 and name not in _COPIES:
            made = self._mixed(name, inputs, args)
        elif name == "aten::copy_":
            return
        else:
            made = next(iter(devices), HERE)
        self.operations += made == THERE
        known = {id(tensor) for tensor in inputs}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor) not in known and made == THERE and tensor.device.type == "cpu":
                self._marked |= self._by_storage(tensor)

    def _mixed(self, name: str, inputs: list[Tensor], args: Sequence[Any]) -> torch.device:
        """The device of what torch allows to mix; else an error."""
        if name.startswith(_INDEXING):
            rest = [tensor for tensor in inputs if tensor is args[0] or tensor.is_floating_point()]
            odd = [tensor for tensor in inputs if not any(tensor is one for one in rest)]
            if {self.device_of(tensor) for tensor in odd} == {HERE}:
                inputs = rest
        elif not name.startswith("aten::_fused"):
            inputs = [tensor for tensor in inputs if tensor.dim() or self.device_of(tensor) == THERE]
        devices = {self.device_of(tensor) for tensor in inputs}
        if len(devices) > 1:
            shown = ", ".join(f"{tuple(tensor.shape)} on {self.device_of(tensor)}" for tensor in inputs)
            raise WrongDevice(f"{name} got tensors of two devices: {shown}")
        return next(iter(devices))


class _Dispatch(TorchDispatchMode):
    """Sees every operation below autograd, the backward pass's too."""

    def __init__(self, devices: SecondDevice) -> None:
        super().__init__()
        self._devices = devices

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            result = func(*args, **(kwargs or {}))
            inputs = list(_tensors((args, kwargs)))
            self._devices.ran(func, inputs, args, result)
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == "cpu")


def _full(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    return THERE if device.type == "cuda" else device
