"""A GPU for machines that have none: the CPU computes, and what CUDA would refuse is refused.

A tensor lies on the GPU once it was moved there or computed from what lies there, and says so. Errors are, as on CUDA,
an operation on tensors of both devices, a view by NumPy of what is on the GPU, a generator of the other device, and
pinning what is not on the host. What was copied to the GPU within a stream, from pinned memory and without blocking,
is NaN until somebody waits for that stream.

Simulated are these rules and no arithmetic: kernels, rounding, speed and memory stay those of the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
Tensor = torch.Tensor
aten = torch.ops.aten
# May be given tensors of both devices.
MOVES = {aten.copy_, aten.set_, aten._has_compatible_shallow_copy_type}
# May be given indices on the host.
BY_INDEX = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class SimulatedGpu(TorchDispatchMode):
    """Knows of every tensor where it lies.

    Attributes:
        operations: how many took a tensor on the GPU so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self._generators: dict[int, torch.Generator] = {}
        # Storages by address; kept, lest the address is given to one on the host.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._pinned: dict[int, torch.UntypedStorage] = {}
        self._within = threading.local()
        self._lock = threading.Lock()
        self._to = Tensor.to

    def holds(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        mixed = [*args[:1], *args[2:3]] if func.overloadpacket in BY_INDEX else tensors
        is_there = any(map(self.holds, tensors))
        if is_there and func.overloadpacket not in MOVES:
            self.operations += 1
            # A single number is passed to the kernel by its value.
            if not all(self.holds(tensor) or tensor.dim() == 0 or tensor.is_meta for tensor in mixed):
                found = [(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]
                raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {found}.")
        asked = kwargs.get("device")
        if asked is not None and asked.type == "cuda":
            kwargs["device"], is_there = CPU, True
        elif asked is not None:
            is_there = False
        generator = kwargs.get("generator")
        if generator is not None and (generator._cdata in self._generators) != is_there:
            raise RuntimeError(f"Expected a generator of the device of its tensor for {func}.")
        is_pinned = kwargs.pop("pin_memory", False) and not is_there
        known = {_address(tensor) for tensor in tensors}

        def place(made: Tensor) -> Tensor:
            # What is set to a storage lies where that does.
            if not made.is_meta and _address(made) not in known and func.overloadpacket is not aten.set_:
                self._place(made, self._storages if is_there else self._pinned if is_pinned else None)
            return made

        return tree_map_only(Tensor, place, func(*args, **kwargs))

    def _place(self, tensor: Tensor, where: dict[int, torch.UntypedStorage] | None) -> Tensor:
        address = _address(tensor)
        with self._lock:
            self._storages.pop(address, None)
            self._pinned.pop(address, None)
            if where is not None:
                where[address] = _storage(tensor)
        return tensor

    def move(self, tensor: Tensor, device: torch.device, dtype: torch.dtype | None, non_blocking: bool) -> Tensor:
        """Copy between the host and the GPU."""
        moved = self._to(tensor, dtype=dtype, copy=True)
        if device.type == "cpu":
            return self._place(moved, None)
        self._place(moved, self._storages)
        stream = getattr(self._within, "stream", None)
        if non_blocking and stream is not None and self.has_pinned(tensor):
            source, target = tensor.detach(), moved.detach()
            target.fill_(torch.nan)
            stream.waiting.append(lambda: target.copy_(source))
        return moved

    def place_there(self, tensor: Tensor) -> Tensor:
        return self._place(tensor, self._storages)

    def has_pinned(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._pinned

    def pin(self, tensor: Tensor) -> Tensor:
        if self.holds(tensor):
            raise RuntimeError("Only tensors on the host can be pinned.")
        return tensor if self.has_pinned(tensor) else self._place(tensor.clone(), self._pinned)

    def generator(self, plain: Any) -> Any:
        """Return the class of generators, which know their device; `plain` is that of torch."""
        generators = self._generators

        class Generator(plain):
            def __new__(cls, device: Any = "cpu") -> Generator:
                made = super().__new__(cls)
                if torch.device(device).type == "cuda":
                    generators[made._cdata] = made
                return made

            @property
            def device(self) -> torch.device:
                return GPU if self._cdata in generators else CPU

        return Generator

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = getattr(self._within, "stream", None)
        self._within.stream = stream
        try:
            yield
        finally:
            self._within.stream = before


class Stream:
    """The copies that nobody has waited for."""

    def __init__(self, device: Any = None) -> None:
        self.device = GPU
        self.waiting: list[Callable[[], Any]] = []

    def wait_stream(self, stream: Stream) -> None:
        while stream.waiting:
            stream.waiting.pop(0)()

    def synchronize(self) -> None:
        self.wait_stream(self)

    def record_event(self) -> SimpleNamespace:
        return event()


def event(**options: Any) -> SimpleNamespace:
    return SimpleNamespace(record=_nothing, synchronize=_nothing, wait=_nothing, elapsed_time=lambda later: 1.0)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor._values() if tensor.is_sparse else tensor).untyped_storage()


def _address(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else _storage(tensor)._cdata


@contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """Let torch have one GPU within the context, in this thread and in those that start there."""
    gpu, current = SimulatedGpu(), Stream()
    plain: dict[str, Any] = {name: getattr(Tensor, name) for name in ("to", "numpy", "__array__")}
    real_device = torch._C.TensorBase.device.__get__

    def device(self: Tensor) -> torch.device:
        return GPU if gpu.holds(self) else real_device(self)

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = ["dtype" if isinstance(args[0], torch.dtype) else "device"] if args else []
        names += ["non_blocking", "copy"] if names == ["dtype"] else ["dtype", "non_blocking", "copy"]
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        wanted = self.device if given.get("device") is None else torch.device(given["device"])
        if {wanted.type, self.device.type} == {"cpu", "cuda"}:
            return gpu.move(self, wanted, given.get("dtype"), given.get("non_blocking", False))
        moved = plain["to"](self, **{**given, "device": CPU if wanted.type == "cuda" else wanted})
        return gpu.place_there(moved) if wanted.type == "cuda" else moved

    def on_host(name: str) -> Callable[..., Any]:
        def viewed(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if gpu.holds(self):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
            return plain[name](self, *args, **kwargs)

        return viewed

    def moved_after(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            return make(*args, **kwargs) if device is None else make(*args, **kwargs).to(device)

        return made

    run = threading.Thread.run

    def run_there(self: threading.Thread) -> None:
        with gpu:
            run(self)

    # torch remembers these at the first question, which is to be before they are replaced.
    _device_constructors()
    made = {name: moved_after(getattr(torch, name)) for name in ("tensor", "as_tensor", "asarray")}
    properties = SimpleNamespace(name="a simulated GPU", major=9, minor=0, total_memory=2**34, multi_processor_count=1)
    replaced: dict[Any, dict[str, Any]] = {
        Tensor: {
            "device": property(device),
            "is_cuda": property(gpu.holds),
            "is_cpu": property(lambda self: device(self).type == "cpu"),
            "to": to,
            "cpu": lambda self, **options: to(self, CPU),
            "cuda": lambda self, device=None, non_blocking=False, **options: to(self, GPU, non_blocking=non_blocking),
            "numpy": on_host("numpy"),
            "__array__": on_host("__array__"),
            "pin_memory": lambda self, device=None: gpu.pin(self),
            "is_pinned": lambda self, device=None: gpu.has_pinned(self),
            "record_stream": _nothing,
        },
        torch: {**made, "Generator": gpu.generator(torch.Generator)},
        threading.Thread: {"run": run_there},
        torch.cuda: {
            **dict.fromkeys(
                ("_lazy_init", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"), _nothing
            ),
            **dict.fromkeys(("manual_seed", "manual_seed_all"), _nothing),
            **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), lambda *args, **options: True),
            **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), lambda *args: 0),
            **dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda device=None: 0),
            "device_count": lambda: 1,
            "get_device_name": lambda device=None: properties.name,
            "get_device_capability": lambda device=None: (properties.major, properties.minor),
            "get_device_properties": lambda device=None: properties,
            "mem_get_info": lambda device=None: (properties.total_memory // 2, properties.total_memory),
            "Stream": Stream,
            "Event": event,
            "current_stream": lambda device=None: current,
            "stream": gpu.stream,
        },
        # A build of torch for CUDA would ask its driver.
        torch.accelerator: {"is_available": lambda: False, "current_accelerator": lambda check_available=False: None},
        torch.cuda.random: {
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": _nothing,
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        for owner, values in replaced.items():
            for name, value in values.items():
                patch.setattr(owner, name, value)
        with gpu:
            yield gpu
