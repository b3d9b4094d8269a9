"""What the fused bases have in common: hyper-parameters, gathering layers, saving and loading of state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchlars import amp, ops, sharding
from torchlars.amp import GradScale
from torchlars.layers import WRONG_DTYPE, check_update, memory_of, problem_of_gradient, problem_of_memory
from torchlars.optim.protocol import TrustRatios
from torchlars.options import Group, GroupReader, is_capturing, non_negative_number, number_in

__all__: list[str] = []


@dataclass
class HyperParameters:
    """The hyper-parameters of a group, as an update takes them. Subclasses add those of one optimizer."""

    lr: float | Tensor
    weight_decay: float
    maximize: bool

    #: The options of the fast path, a name in ``_C.pyi``.
    fast_kind: ClassVar[str]

    def __post_init__(self) -> None:
        self._fast: tuple[Mapping[str, Any] | None, Any] | None = None  # the last trust options, and both together

    def fast_options(self, options: Mapping[str, Any] | None, of_updates: bool = False) -> Any:
        """Return the hyper-parameters, and the options of trust ratios if there are any, as the fast path takes them.

        Args:
            options: those of :class:`torchlars.optim.TrustRatios`.
            of_updates: whether these are of updates.
        """
        if self._fast is None or self._fast[0] is not options:
            ours = {name: value for name, value in vars(self).items() if name != "_fast"}
            if options is not None:  # while lr is in the momentum, the group's own reads 1
                ours |= {name: value for name, value in options.items() if name != "lr" or value is not None}
            if of_updates:
                ours["of_updates"] = True
            self._fast = options, ops.fast_options(self.fast_kind, **ours)
        return self._fast[1]

    def lr_arguments(self, layers: int, device: torch.device) -> dict[str, Any]:
        """Return the learning rate as the arguments of an op."""
        if isinstance(self.lr, Tensor):
            return {"lrs": [1.0] * layers, "lr_tensor": ops.lr_tensor(self.lr, device)}
        return {"lrs": [self.lr] * layers}


@dataclass
class Bucket:
    """Layers of one group that one call can update. Subclasses say how."""

    group: int
    state: Any
    hyper: Any
    params: list[Tensor] = field(default_factory=list)
    local_params: list[Tensor] = field(default_factory=list)  # what is here of each
    grads: list[Tensor] = field(default_factory=list)  # likewise
    ratios: Tensor | None = None
    is_alone: bool = False  # a layer that overlaps another one, and is measured when those before it are updated

    def update(self, inv_scale: Tensor | None) -> None:
        """Take the step, unless ``inv_scale`` is 0."""
        raise NotImplementedError

    def measure_updates(self, inv_scale: Tensor | None) -> Tensor:
        """Take the first part of a step with ratios of updates, and return the squared norms of what is here."""
        raise NotImplementedError


class FusedOptimizer(Optimizer):
    """An optimizer that takes its step, and multiplies by trust ratios, in one pass over memory.

    To be put before a class of :mod:`torch.optim`, whose constructor, groups and state dicts it has.
    """

    takes_trust_ratios = True
    takes_ratios_of_updates = False

    #: The gatherer of the fast path, a name in ``_C.pyi``.
    fast_kind: ClassVar[str]
    #: What is gathered by the slow path.
    bucket_type: ClassVar[type[Bucket]]
    #: The keys of a parameter's state in the class of :mod:`torch.optim`, and all keys of tensors that it can have.
    torch_keys: ClassVar[tuple[str, ...]]
    state_keys: ClassVar[tuple[str, ...]]
    #: The keys of groups that the class of :mod:`torch.optim` does not know, and which of them is a dtype of state.
    own_keys: ClassVar[tuple[str, ...]]
    dtype_key: ClassVar[str]
    #: How that dtype is written in a state dict.
    dtype_names: ClassVar[dict[torch.dtype, str]] = {torch.float32: "float32"}

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._reader = GroupReader(needs_lr=lambda hyper: True)
        super().__init__(params, *args, **kwargs)

    def hyper_parameters(self, of_group: str, group: Group) -> Any:
        """Return the hyper-parameters of a group, which may lack defaults of our own; raise if they are impossible."""
        raise NotImplementedError

    def problem_of(self, param: Tensor, grad: Tensor, hyper: Any, state: Mapping[str, Any]) -> str | None:
        """Return why no step can be taken with a layer, which is valid as such, or None."""
        raise NotImplementedError

    def load_layer(self, param: Tensor, saved: Mapping[str, Any], group: int) -> None:
        """Put the saved state of a parameter in the place of the loaded one, whose dtype torch has changed."""
        raise NotImplementedError

    def _add_own(self, own: Group) -> None:
        """Add keys that torch's class does not know to defaults and groups, once these exist."""
        self.defaults.update(own)
        for group in self.param_groups:
            for key, value in own.items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, if its hyper-parameters are possible."""
        if isinstance(param_group, dict):  # else torch says so
            of_group = f" of parameter group {len(self.param_groups)}"
            self.hyper_parameters(of_group, {**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reader = GroupReader(needs_lr=lambda hyper: True)

    def step(self, closure: Callable[[], Any] | None = None, *, trust_ratios: TrustRatios | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model anew and returns the loss. Called once, with gradients enabled.
            trust_ratios: passed by LARS and LAMB. See :mod:`torchlars.optim`.

        Returns:
            What the closure returns.

        Raises:
            TypeError, ValueError, RuntimeError: a group, parameter or gradient does not allow the step; the message
                names it. Nothing has changed then.
        """
        loss = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._step(trust_ratios)
        except BaseException:
            amp.drop_scale(self)
            raise
        return loss

    @torch.no_grad()
    def _step(self, trust_ratios: TrustRatios | None) -> None:
        """Gather, then update. Errors are raised while gathering, but for state that cannot begin in a capture."""
        grad_scale = GradScale.of(self)
        fast_buckets, other_buckets = self._gather(trust_ratios)
        for fast_bucket in fast_buckets:
            ratios = fast_bucket.update(grad_scale.inv_scale(fast_bucket.params[0].device))
            if trust_ratios is not None and ratios is not None:
                trust_ratios.report(fast_bucket.params, ratios)
        self._measure_updates(trust_ratios, [bucket for bucket in other_buckets if not bucket.is_alone], grad_scale)
        for bucket in other_buckets:
            if bucket.is_alone:
                self._measure_updates(trust_ratios, [bucket], grad_scale)
            bucket.update(grad_scale.inv_scale(bucket.params[0].device))

    def _measure_updates(
        self, trust_ratios: TrustRatios | None, buckets: Sequence[Bucket], grad_scale: GradScale
    ) -> None:
        """Take the first part of the step of layers with ratios of updates, and set these."""
        adapted = [bucket for bucket in buckets if self._update_options(bucket.group, trust_ratios) is not None]
        if trust_ratios is not None and adapted:  # all at once: shards are completed together
            norms = [bucket.measure_updates(grad_scale.inv_scale(bucket.params[0].device)) for bucket in adapted]
            layers = [(bucket.group, bucket.params, norm) for bucket, norm in zip(adapted, norms, strict=True)]
            for bucket, ratios in zip(adapted, trust_ratios.decide_updates(layers), strict=True):
                bucket.ratios = ratios

    def _gather(self, trust_ratios: TrustRatios | None) -> tuple[Sequence[Any], list[Bucket]]:
        """Return all layers to update in buckets: those on the fast path, and the others with ratios of gradients."""
        fast_layers, buckets = self._gather_but_for_ratios(trust_ratios)
        if fast_layers.shares_memory or buckets:
            overlapping = self._overlapping_layers()
            if overlapping:
                fast_layers, buckets = self._gather_but_for_ratios(trust_ratios, overlapping)
        if trust_ratios is not None and buckets:  # of all groups at once: shards are completed together
            measured = trust_ratios.measure_all([(bucket.group, bucket.params) for bucket in buckets])
            for bucket, ratios in zip(buckets, measured, strict=True):
                bucket.ratios = ratios
        return fast_layers.buckets, buckets

    def _gather_but_for_ratios(
        self, trust_ratios: TrustRatios | None, overlapping: Collection[Tensor] = ()
    ) -> tuple[Any, list[Bucket]]:
        """Return all layers to update in buckets. Each overlapping layer has a bucket and a gradient of its own.

        Buckets are updated one after the other, which gives overlapping layers the order that they are listed in.
        """
        fast_layers = ops.NoFastPath() if overlapping else ops.fast_layers(self.fast_kind)
        groups = self.param_groups
        hypers = self._reader.read(groups, self._read_group, self._context)
        fast_options = [self._fast_options(index, hyper, trust_ratios) for index, hyper in enumerate(hypers)]
        others: dict[int, list[tuple[int, Tensor]]] = {}
        seen: set[Tensor] = set()
        for index, position in fast_layers.add(list(zip(groups, fast_options, strict=True)), self.state):
            param = groups[index]["params"][position]
            if param.grad is not None and param not in seen:
                seen.add(param)
                others.setdefault(index, []).append((position, param))
        buckets: list[Bucket] = []
        for index, layers in others.items():
            buckets += self._slow_path(index, layers, hypers[index], overlapping)
            if self._update_options(index, trust_ratios) is not None:
                for position, param in layers:
                    check_update(index, position, param)
        return fast_layers, buckets

    def _fast_options(self, index: int, hyper: HyperParameters, trust_ratios: TrustRatios | None) -> Any:
        if trust_ratios is None:
            return hyper.fast_options(None)
        options = self._update_options(index, trust_ratios)
        if options is not None:
            return hyper.fast_options(options, of_updates=True)
        return hyper.fast_options(trust_ratios.options(index))

    def _update_options(self, index: int, trust_ratios: TrustRatios | None) -> Mapping[str, Any] | None:
        """Return how the ratios of updates of a group are decided, or None if it has none."""
        if trust_ratios is None or not self.takes_ratios_of_updates:
            return None
        return trust_ratios.update_options(index)

    def _context(self) -> list[Any]:
        return [*self.defaults, *self.defaults.values()]

    def _read_group(self, index: int, group: Group) -> Any:
        return self.hyper_parameters(f" of parameter group {index}", {**self.defaults, **group})

    def _overlapping_layers(self) -> Collection[Tensor]:
        """Return the layers of which a parameter, gradient or state overlaps another tensor of the step."""
        if torch.compiler.is_compiling():  # memory has no address there
            return ()
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        params = list(dict.fromkeys(params))
        memory: list[tuple[Tensor, Tensor]] = []
        for param in params:
            state = self.state.get(param, {})
            kept = (param, param.grad, *(state.get(name) for name in self.state_keys))
            memory += [(param, memory_of(x)) for x in kept if isinstance(x, Tensor)]
        return {memory[i][0] for i in ops.overlapping([tensor for _, tensor in memory])}

    def _slow_path(
        self, index: int, layers: list[tuple[int, Tensor]], hyper: Any, overlapping: Collection[Tensor]
    ) -> Iterable[Bucket]:
        """Return the buckets of those layers of a group that are not on the fast path."""
        buckets: dict[Any, Bucket] = {}
        for position, param in layers:
            grad = self._gradient(index, position, param, hyper)
            own: Any = None
            if param in overlapping:
                own, grad = param, grad.clone()
            kind = (type(param), sharding.process_groups(param), *self.kind_of(param, grad, hyper))
            key = (param.device, param.dtype, grad.dtype, grad.layout, own, *kind)
            if key not in buckets:
                is_alone = own is not None and not sharding.is_distributed(param)
                buckets[key] = self.bucket_type(index, self.state, hyper, is_alone=is_alone)
            buckets[key].params.append(param)
            buckets[key].local_params.append(sharding.local(param))
            buckets[key].grads.append(sharding.local(grad))
        return buckets.values()

    def kind_of(self, param: Tensor, grad: Tensor, hyper: Any) -> tuple[Any, ...]:
        """Return what else all layers of a bucket have in common."""
        return ()

    def _gradient(self, group: int, position: int, param: Tensor, hyper: HyperParameters) -> Tensor:
        """Return a parameter's gradient, distributed as it is, or raise if the step cannot be taken with it."""
        grad = param.grad
        assert grad is not None
        problem = problem_of_memory(param)
        if problem is None and param.dtype not in ops.DTYPES:
            problem = f"{WRONG_DTYPE} (dtype: {param.dtype})"
        problem = problem or self.problem_of(param, grad, hyper, self.state.get(param, {}))
        problem = problem or problem_of_gradient(param, hyper.weight_decay)
        if problem is None and not is_for_torch(param, grad):
            here = sharding.local(param)
            if not ops.is_writable_in_place(here):
                problem = f"elements of a parameter must not share memory (strides: {here.stride()})"
        if problem is not None:
            raise RuntimeError(f"{problem} (group: {group}, parameter: {position}, shape: {tuple(param.shape)})")
        if grad.is_sparse:
            return grad.coalesce()
        placed = sharding.placed_like(param, grad)
        if placed is not grad:
            param.grad = placed  # so that it is redistributed once
        return placed

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, of plain types and tensors: the dtype of state is in it by its name.

        torch.distributed.checkpoint gathers nothing else to one rank.
        """
        state_dict = super().state_dict()
        key = self.dtype_key
        for group in state_dict["param_groups"]:
            if group.get(key) in self.dtype_names:
                group[key] = self.dtype_names[group[key]]
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of the class of :mod:`torch.optim` that it is derived from.

        State becomes of the dtype that the groups ask for. A group keeps a key of its own where the state dict has
        none, as torch's own have.

        Raises:
            TypeError, ValueError: a hyper-parameter or a tensor is impossible.

        Whatever raises, nothing was loaded then.
        """
        own_keys = [{key: group[key] for key in self.own_keys if key in group} for group in self.param_groups]
        loaded: dict[str, Any] = {}

        def check(_: Any, final: dict[str, Any]) -> None:
            self._check_state_dict(final)
            loaded.update(final)

        handle = self.register_load_state_dict_pre_hook(check)  # after all others
        before = self.param_groups, self.state
        try:
            super().load_state_dict(state_dict)
            self._load_state(loaded, own_keys)
        except BaseException:
            self.param_groups, self.state = before  # torch replaces both, and does not change them
            raise
        finally:
            handle.remove()

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise if no step could be taken with what a state dict holds."""
        key = self.dtype_key
        for index, group in enumerate(state_dict["param_groups"]):
            dtype = group.get(key, self.defaults.get(key))
            numbers = {**self.defaults, **group, key: self._dtype_named(dtype)}
            self.hyper_parameters(f" of parameter group {index}", numbers)
            if isinstance(numbers["lr"], Tensor) and numbers["lr"].device.type == "cpu":
                name = f"lr of parameter group {index}"
                non_negative_number(name, number_in(name, numbers["lr"]))
        if not isinstance(state_dict["state"], dict):
            raise TypeError(f"state_dict['state'] must be a dict (got: {type(state_dict['state']).__name__})")
        for key, state in state_dict["state"].items():
            where = f"state_dict['state'][{key!r}]"
            if not isinstance(state, dict):
                raise TypeError(f"{where} must be a dict (got: {type(state).__name__})")
            for name in {*self.torch_keys, *self.state_keys} - {"step"}:
                if not isinstance(state.get(name), Tensor | None):
                    raise TypeError(f"{where}[{name!r}] must be a tensor or None (got: {type(state[name]).__name__})")

    def _load_state(self, loaded: dict[str, Any], own_keys: Sequence[dict[str, Any]]) -> None:
        """Give loaded state the dtype that groups ask for: torch has cast it to the parameters' dtype."""
        key = self.dtype_key
        for group, own in zip(self.param_groups, own_keys, strict=True):
            group.update({**own, **group})
            if key in group:
                group[key] = self._dtype_named(group[key])
        ids: Iterator[Any] = (i for group in loaded["param_groups"] for i in group["params"])
        for index, group in enumerate(self.param_groups):
            for param, i in zip(group["params"], ids, strict=False):  # the next group goes on with ids
                try:
                    self.load_layer(param, loaded["state"].get(i, {}), index)
                except ValueError as error:
                    raise ValueError(f"{error} in state_dict['state'][{i!r}]") from None

    def _dtype_named(self, name: Any) -> Any:
        """Return the dtype that a state dict holds by its name, and everything else as it is."""
        return next((dtype for dtype, known in self.dtype_names.items() if name == known), name)


def is_for_torch(param: Tensor, grad: Tensor) -> bool:
    """Tell whether no op of ours can update a layer: torch lets none write a list of lazily conjugated tensors."""
    if grad.is_sparse or (is_traceable_wrapper_subclass(param) and not sharding.is_distributed(param)):
        return True
    return _is_lazy(param)


def _is_lazy(tensor: Tensor) -> bool:
    """Tell whether a tensor is lazily conjugated or negated."""
    return not torch.compiler.is_compiling() and (tensor.is_conj() or tensor.is_neg())  # asking would break the graph


def state_like(param: Tensor, found: Tensor | None, dtype: torch.dtype, group: int) -> Tensor:
    """Return a tensor of the state as a kernel takes it: in its parameter's memory order and sharding, and dense.

    Args:
        param: the parameter.
        found: what the state has; None begins with zeros.
        dtype: that of the tensor.
        group: the parameter's group, for the error.

    Returns:
        The same tensor where it is so already.

    Raises:
        RuntimeError: a new tensor is needed while a CUDA graph is captured.
    """
    if found is not None:  # torch begins a sparse one from a sparse gradient
        placed = found.to_dense() if found.is_sparse else sharding.placed_like(param, found)
        is_alike = (found.dtype, found.device, _is_lazy(found)) == (dtype, param.device, False)
        if placed is found and is_alike and is_in_order(param, found):
            return found
        found = placed
    check_can_begin(param, group)
    like = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    return like if found is None else like.copy_(found)


def is_in_order(param: Tensor, tensor: Tensor) -> bool:
    """Tell whether a tensor lies in memory as its parameter does, but for gaps between the parameter's elements."""
    here = sharding.local(param)
    strides = here.stride() if here.is_contiguous() else torch.empty_like(here, device="meta").stride()
    return sharding.local(tensor).stride() == strides


def check_can_begin(param: Tensor, group: int) -> None:
    """Raise if every replay of a CUDA graph would initialize a parameter's state again."""
    if not torch.compiler.is_compiling() and is_capturing(param.device):
        raise RuntimeError(
            "state must exist before a CUDA graph is captured, in its final dtype and memory order, or replays "
            f"begin it anew (group: {group}, shape: {tuple(param.shape)}); take a step before the capture"
        )


def problem_of_state(param: Tensor, state: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Return why what a state holds under some keys cannot be that of a parameter, element by element, or None."""
    for name in names:
        tensor = state.get(name)
        if tensor is None:
            continue
        problem = problem_of_tensor(name, tensor)
        if problem is not None:
            return problem
        if tensor.layout not in (torch.strided, torch.sparse_coo):
            return f"{name} must be strided or sparse COO (got: {tensor.layout})"
        if tensor.shape != param.shape:
            return f"{name} must have its parameter's shape (got: {tuple(tensor.shape)})"
        problem = problem_of_distribution(param, name, tensor)
        if problem is not None:
            return problem
    return None


def problem_of_tensor(name: str, value: Any) -> str | None:
    """Return why a value of the state is no tensor with memory, or None."""
    if not isinstance(value, Tensor):
        return f"{name} must be a tensor (got: {value!r})"
    return None if ops.has_memory(memory_of(value)) else f"{name} must have memory (its storage was freed)"


def problem_of_distribution(param: Tensor, name: str, tensor: Tensor) -> str | None:
    """Return why a tensor of the state is not distributed as its parameter, or None."""
    if sharding.is_distributed(tensor) == sharding.is_distributed(param):
        return None
    kind = "a DTensor" if sharding.is_distributed(tensor) else "a whole tensor"
    return f"{name} must be distributed as its parameter is (got: {kind})"
