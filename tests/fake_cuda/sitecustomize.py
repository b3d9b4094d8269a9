"""Makes torch compute its own ops on the devices of runtime.cpp, in every Python that has this folder on its path."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import traceback
import types

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

aten = torch.ops.aten
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
HOST = torch.device("cpu")
LIBRARY = os.environ["FAKE_CUDA"]
runtime = ctypes.CDLL(LIBRARY)
runtime.fake_launch.restype = ctypes.c_char_p
RUN = ctypes.CFUNCTYPE(None, ctypes.c_size_t)

# Whose own implementation for CUDA launches nothing, and calls other ops by the dispatcher: they allocate, look at
# metadata, or copy between host and device.
WITHOUT_KERNEL = {
    aten._local_scalar_dense,
    aten._to_copy,
    aten.clone,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.rand_like,
    aten.randn_like,
    aten.record_stream,
    aten.resize_,
    aten.set_,
}
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
DEPENDS_ON_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

ran: list[str] = []  # the names of torch's ops that were enqueued
numbers = itertools.count()
waiting = {}  # what was enqueued, by its number


@RUN
def run_waiting(number: int) -> None:
    try:
        waiting[number]()
    except BaseException:  # which would be printed and forgotten
        traceback.print_exc()
        os.abort()


def enqueue(work, device: torch.device, stream: ctypes.c_void_p) -> None:
    number = next(numbers)
    waiting[number] = work  # for good: a graph may run it again
    torch.cuda.check_error(runtime.fake_enqueue(device.index, stream, run_waiting, ctypes.c_size_t(number)))


@functools.cache
def is_composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a CUDA tensor."""
    memory = tensor.untyped_storage()
    if memory.nbytes() == 0:
        storage = torch.UntypedStorage(0)
    else:
        storage = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), HOST, memory.nbytes())
    alias = torch.empty(0, dtype=tensor.dtype)
    alias.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    alias = alias.conj() if tensor.is_conj() else alias
    return torch._neg_view(alias) if tensor.is_neg() else alias


def on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def waits(func, args) -> bool:
    """Whether the host must know values on the device."""
    if func in INDEXED:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        return bool(masks) and (len(args) < 3 or args[2].numel() != 1)
    return not DEPENDS_ON_DATA.isdisjoint(func.tags)


def seed_of(func, kwargs, device: torch.device) -> int | None:
    """The next seed of the generator on the device, if the op takes one."""
    if all(argument.name != "generator" for argument in func._schema.arguments):
        return None
    if torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(f"random numbers in a capture are not modelled ({func})")
    generator = kwargs.get("generator") or torch.cuda.default_generators[device.index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return hash((generator.initial_seed(), offset)) % 2**63


def compute(func, args, kwargs, device: torch.device, stream: ctypes.c_void_p, is_deferred: bool):
    """Enqueue the op on the stream. Where that waits for something, shapes are known from the meta device."""
    ran.append(func.name())
    leaves, spec = tree_flatten((args, kwargs))
    seed = seed_of(func, kwargs, device)

    def elsewhere(place, device: torch.device) -> list:
        places = {id(x): place(x) for x in leaves if isinstance(x, Tensor)}  # a tensor may be given twice

        def one(x):
            return device if isinstance(x, torch.device) else x

        return [places.get(id(x), one(x)) for x in leaves]

    def call(leaves: list):
        args, kwargs = tree_unflatten(leaves, spec)
        if seed is not None:
            kwargs["generator"] = torch.Generator().manual_seed(seed)
        return tree_flatten(func(*args, **kwargs))

    host = elsewhere(lambda x: on_host(x) if x.is_cuda else x.clone(), HOST)  # a number of the host is read now
    given = elsewhere(on_meta, torch.device("meta")) if is_deferred else host
    results, results_spec = call(given) if func._schema.returns or not is_deferred else tree_flatten(None)
    positions = {id(x): i for i, x in enumerate(given) if isinstance(x, Tensor)}
    returned, written = [], []
    for i, x in enumerate(results):
        if not isinstance(x, Tensor):
            returned.append(x)
            continue
        if id(x) in positions:
            returned.append(leaves[positions[id(x)]])
            if returned[-1].shape == x.shape:
                continue
            returned[-1].resize_(x.shape)
        else:
            returned.append(torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device))
        written.append((i, on_host(returned[-1])))

    def write(results: list) -> None:
        for i, memory in written:
            memory.copy_(results[i])

    if is_deferred:
        enqueue(lambda: write(call(host)[0]), device, stream)
    else:
        write(results)
    return tree_unflatten(returned, results_spec)


class Host(TorchDispatchMode):
    """Computes ops of torch by the CPU's kernels on the same memory, in the order of the current stream."""

    def __torch_dispatch__(self, func, classes, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(not issubclass(t, Tensor) or t.__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in classes):
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device for x in tensors if x.is_cuda}
        if not tensors and torch.device(kwargs.get("device") or HOST).type == "cuda":
            device = torch.device(kwargs["device"])
            devices = {torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)}
        if not devices:
            return func(*args, **kwargs)
        if is_composite(func):  # contiguous(), which is called a view, may copy
            with self:
                return func.decompose(*args, **kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        is_transfer = func is aten.copy_.default and {x.device for x in tensors} != devices
        is_ours = func.namespace == "torchlars"
        if is_ours or is_transfer or not tensors or func.overloadpacket in WITHOUT_KERNEL:
            with self:
                return func.redispatch(CUDA, *args, **kwargs)
        devices.update(x.device for x in tensors if x.dim() > 0)
        if len(devices) > 1:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device (got: {devices})")
        (device,) = devices
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device.index))
        if waits(func, args):
            with self:
                torch.empty(1, device=device, dtype=torch.uint8).item()
            is_deferred = False
        else:
            is_deferred = runtime.fake_is_deferred(device.index, stream)
        return compute(func, args, kwargs, device, stream, is_deferred)


class Profile:
    """The kernels that were launched, for torch.profiler.profile, whose own way needs a driver."""

    def __init__(self, activities=None, **options):
        self.names = []

    def __enter__(self):
        self.first, self.first_op = runtime.fake_launches(), len(ran)
        return self

    def __exit__(self, *error):
        launched = (runtime.fake_launch(i).decode() for i in range(self.first, runtime.fake_launches()))
        self.names = [*launched, *ran[self.first_op :]]

    def events(self):
        kernel = {"device_type": torch.autograd.DeviceType.CUDA, "is_user_annotation": False}
        return [types.SimpleNamespace(name=name, **kernel) for name in self.names]


to_string = torch._tensor_str._str  # leaves all modes
torch._tensor_str._str = lambda tensor, **more: to_string(tensor.cpu() if tensor.is_cuda else tensor, **more)
torch.profiler.profile = Profile
torch.distributed.is_nccl_available = lambda: False
torch.cuda.memory.change_current_allocator(
    torch.cuda.memory.CUDAPluggableAllocator(LIBRARY, "fake_malloc", "fake_free")
)
Host().__enter__()
