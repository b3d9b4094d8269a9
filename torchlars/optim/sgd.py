"""SGD that takes trust ratios into its update."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchlars import amp, ops, sharding
from torchlars.amp import GradScale
from torchlars.codes import BLOCK, is_coded
from torchlars.layers import WRONG_DTYPE, memory_of, problem_of_gradient, problem_of_memory
from torchlars.optim.momentum import (
    BUFFER,
    CODES,
    DTYPE_NAMES,
    MOMENTUM_KEYS,
    MomentumOptimizer,
    check_can_begin,
    has_momentum,
    momentum_dtype_of,
    momentum_like,
    problem_of_momentum,
    set_momentum,
)
from torchlars.optim.protocol import TrustRatios
from torchlars.options import (
    Group,
    GroupReader,
    finite_number,
    learning_rate,
    non_negative_integer,
    non_negative_number,
    number_in,
    warn_of_caller,
)

__all__: list[str] = []

#: As in bitsandbytes.
MIN_8BIT_SIZE = 4096


class SGD(MomentumOptimizer, torch.optim.SGD):
    r"""Stochastic gradient descent in one pass over memory, with the trust ratios of LARS or without.

    .. math::
        d &= r \cdot (g + \lambda w) \\
        m &\leftarrow \mu m + (1 - \tau) d \qquad (m \leftarrow d \text{ in a first step}) \\
        w &\leftarrow w - \gamma m, \qquad \text{or } w - \gamma (d + \mu m) \text{ with } \texttt{nesterov},
        \qquad \text{or } w - \gamma d \text{ where } \mu = 0

    with the gradient *g*, negated where the group maximizes. *r* is 1, so that the step is that of
    :class:`torch.optim.SGD`, unless it is taken by ``LARS(torchlars.optim.SGD(...))``: then *r* is the layer's trust
    ratio. That gives what ``LARS(torch.optim.SGD(...))`` gives, but ``.grad`` is neither written nor read a second time
    from memory where a layer fits into cache.

    A drop-in for :class:`torch.optim.SGD`: the same groups, the same state under the same keys, and each loads the
    other's state dicts. The arguments ``foreach``, ``fused`` and ``differentiable`` choose among implementations, of
    which this is one, and do not exist here. bfloat16 and float16 layers are computed in float32, and rounded once
    when they are written. A parameter that a group lists twice is one layer, and stepped once.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: γ ≥ 0, a number or a tensor of one element. A tensor is read on the parameters' device, without waiting, so
            that its value is not checked. The other hyper-parameters are numbers.
        momentum: μ ≥ 0.
        dampening: τ.
        weight_decay: λ ≥ 0, coupled: part of the gradient.
        nesterov: whether to use Nesterov momentum; needs momentum and no dampening.
        maximize: whether to ascend.
        momentum_dtype: ``torch.float32`` keeps the momentum *m* of bfloat16 and float16 parameters in float32. None
            keeps it in the parameter's dtype, as :class:`torch.optim.SGD` does. ``torch.int8`` keeps it in 8 bits, of
            float32 parameters, too: 1.03 bytes an element. A group's key as well, if given.
        min_8bit_size: the least number of elements of a layer whose momentum is in 8 bits. A group's key as well.

    **Momentum in 8 bits.** The parameter is updated by the exact momentum, which is then kept as codes with a scale for
    each 128 elements, rounded with a dither that makes the rounding unbiased and needs no generator: the same bits on
    every run, for any number of threads, and for sharded and whole layers. That holds for contiguous layers: a sharded
    layer in another memory order has another dither than the whole one. :mod:`torchlars.codes` has the formulas. The
    state holds ``momentum_codes`` (int8, of the parameter's shape) and ``momentum_scales`` in the place of
    ``momentum_buffer``. A momentum that is NaN or infinite makes its whole block NaN.

    Layers are kept in 8 bits if they have ``min_8bit_size`` elements or more, a dtype of at most 32 bits, at most ten
    dimensions, 64 elements or more for each index of dimension 0, and that dimension outermost in memory (contiguous,
    channels_last). All others, biases among them, have the momentum that ``torch.float32`` gives. So have shards whose
    rows are not cut at multiples of 128 elements, as tensor parallelism over columns may cut them; a warning names
    them. Gradients of layers in 8 bits must be dense and of at most 32 bits.

    State dicts are loaded in every direction: a float momentum that becomes codes is rounded to nearest, and codes
    become a ``momentum_buffer`` where a layer is not kept in 8 bits. :class:`torch.optim.SGD` does not know codes, and
    begins its momentum anew. A state dict brings its groups' ``momentum_dtype`` along, if they have one. To enter or
    leave 8 bits, set that of the groups, after loading or between any steps: the next step converts the momentum.
    :mod:`torch.distributed.checkpoint` loads into what is there: load into groups of the ``momentum_dtype`` that was
    saved, and then set another.

    A block is consecutive in memory, so that the memory order of a layer says which elements it has. The state of
    layers with three dimensions or more therefore also holds ``momentum_order``, the dimensions after the first from
    the outermost to the innermost: 123 is contiguous, 231 channels_last. Where it is loaded into a layer of another
    order, the momentum is rounded to nearest once more. It is ``load_state_dict`` that does so: call it also with what
    :mod:`torch.distributed.checkpoint` has loaded in place.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or out of its range.

    Source: the update rule is that of :class:`torch.optim.SGD`, whose documentation says where it differs from
    Sutskever et al., 2013. For *r* see :class:`torchlars.LARS`.

    Example:
        >>> optimizer = LARS(torchlars.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4))
    """

    #: Tells LARS to pass trust ratios to :meth:`step` and leave gradients alone.
    takes_trust_ratios = True
    momentum_keys = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        momentum_dtype: torch.dtype | None = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
    ) -> None:
        given = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        given |= {"nesterov": nesterov, "maximize": maximize}
        self.check_group("", {**given, "momentum_dtype": momentum_dtype, "min_8bit_size": min_8bit_size})
        self._reader = GroupReader(needs_lr=lambda hyper: True)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        own: Group = {}  # without these, groups hold the keys of torch's SGD, and no other
        if momentum_dtype is not None:
            own["momentum_dtype"] = momentum_dtype
        if momentum_dtype is torch.int8 or min_8bit_size != MIN_8BIT_SIZE:
            own["min_8bit_size"] = min_8bit_size
        self.defaults.update(own)
        for group in self.param_groups:
            for key, value in own.items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, if its hyper-parameters are possible."""
        if isinstance(param_group, dict):  # else torch says so
            self.check_group(f" of parameter group {len(self.param_groups)}", {**self.defaults, **param_group})
        super().add_param_group(param_group)

    def check_group(self, of_group: str, group: Group) -> None:
        """Raise if no step can be taken with the hyper-parameters of a group."""
        _hyper_parameters(of_group, group)

    def momentum_dtype_of(self, param: Tensor, group: Group) -> torch.dtype:
        """Return the dtype of a parameter's momentum, int8 for codes, as its group asks for it."""
        return _hyper_parameters("", {**self.defaults, **group}).momentum_dtype_of(param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reader = GroupReader(needs_lr=lambda hyper: True)

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        """Whether a GradScaler leaves it to :meth:`step` to unscale gradients and to skip it.

        If the first step is skipped, the momentum is initialized with zeros, which equals none. Not supported with
        dampening, as a first step is undampened, nor for layers whose step torch's own functions take.
        """
        dampened = [group for group in self.param_groups if group["dampening"] != 0]
        return not amp.begins_momentum(self, dampened) and not any(
            param.grad is not None and _is_for_torch(param, param.grad)
            for group in self.param_groups
            for param in group["params"]
        )

    def step(self, closure: Callable[[], Any] | None = None, *, trust_ratios: TrustRatios | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model anew and returns the loss. Called once, with gradients enabled.
            trust_ratios: passed by LARS. See :mod:`torchlars.optim`.

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
        """Gather, then update. Errors are raised while gathering, but for momentum that cannot begin in a capture."""
        grad_scale = GradScale.of(self)
        fast_buckets, other_buckets = self._gather(trust_ratios)
        for fast_bucket in fast_buckets:
            ratios = fast_bucket.update(grad_scale.inv_scale(fast_bucket.params[0].device))
            if trust_ratios is not None and ratios is not None:
                trust_ratios.report(fast_bucket.params, ratios)
        for bucket in other_buckets:
            bucket.update(grad_scale.inv_scale(bucket.params[0].device))

    def _gather(self, trust_ratios: TrustRatios | None) -> tuple[Sequence[Any], list[Bucket]]:
        """Return all layers to update in buckets: those on the fast path, and the others with their trust ratios."""
        fast_layers, buckets = self._gather_but_for_ratios(trust_ratios)
        if fast_layers.shares_memory or buckets:
            overlapping = self._overlapping_layers()
            if overlapping:
                fast_layers, buckets = self._gather_but_for_ratios(trust_ratios, overlapping)
        if trust_ratios is not None and buckets:  # of all groups at once: shards are completed together
            measured = trust_ratios.measure_all([(bucket.group, bucket.params) for bucket in buckets])
            for bucket, ratios in zip(buckets, measured, strict=True):
                bucket.ratios = ratios
        if not torch.compiler.is_compiling():
            self._warn_of_cut_layers(buckets)
        return fast_layers.buckets, buckets

    def _warn_of_cut_layers(self, buckets: Iterable[Bucket]) -> None:
        """Warn of layers whose momentum begins in float32 because of how they are sharded."""
        cut = [
            f"group: {bucket.group}, shape: {tuple(param.shape)}, placements: {getattr(param, 'placements', ())}"
            for bucket in buckets
            for param in bucket.params
            if bucket.hyper.wants_codes(param) and not bucket.hyper.codes(param) and not has_momentum(self.state[param])
        ]
        if cut:
            more = f"; and {len(cut) - 1} more" if len(cut) > 1 else ""
            warn_of_caller(
                f"a layer whose rows are cut elsewhere than at multiples of {BLOCK} elements has momentum in float32, "
                f"not in 8 bits ({cut[0]}{more}); shard dimension 0, or choose sizes that the ranks divide so"
            )

    def _gather_but_for_ratios(
        self, trust_ratios: TrustRatios | None, overlapping: Collection[Tensor] = ()
    ) -> tuple[Any, list[Bucket]]:
        """Return all layers to update in buckets. Each overlapping layer has a bucket and a gradient of its own.

        Buckets are updated one after the other, which gives overlapping layers the order that they are listed in.
        """
        fast_layers = ops.NoFastPath() if overlapping else ops.fast_layers("SgdLayers")
        groups = self.param_groups
        hypers = self._reader.read(groups, self._read_group, self._context)
        options = [None if trust_ratios is None else trust_ratios.options(index) for index in range(len(groups))]
        fast_options = [hyper.fast_options(how) for hyper, how in zip(hypers, options, strict=True)]
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
        return fast_layers, buckets

    def _context(self) -> list[Any]:
        return [*self.defaults, *self.defaults.values()]

    def _read_group(self, index: int, group: Group) -> HyperParameters:
        return _hyper_parameters(f" of parameter group {index}", {**self.defaults, **group})

    def _overlapping_layers(self) -> Collection[Tensor]:
        """Return the layers of which a parameter, gradient or momentum overlaps another tensor of the step."""
        if torch.compiler.is_compiling():  # memory has no address there
            return ()
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        params = list(dict.fromkeys(params))
        memory: list[tuple[Tensor, Tensor]] = []
        for param in params:
            state = self.state.get(param, {})
            kept = (param, param.grad, *(state.get(name) for name in MOMENTUM_KEYS))
            memory += [(param, memory_of(x)) for x in kept if isinstance(x, Tensor)]
        return {memory[i][0] for i in ops.overlapping([tensor for _, tensor in memory])}

    def _slow_path(
        self, index: int, layers: list[tuple[int, Tensor]], hyper: HyperParameters, overlapping: Collection[Tensor]
    ) -> Iterable[Bucket]:
        """Return the buckets of those layers of a group that are not on the fast path."""
        buckets: dict[Any, Bucket] = {}
        for position, param in layers:
            grad = _gradient(index, position, param, hyper, self.state.get(param, {}))
            own: Any = None
            if param in overlapping:
                own, grad = param, grad.clone()
            kind = (type(param), sharding.process_groups(param), _is_for_torch(param, grad), hyper.codes(param))
            key = (param.device, param.dtype, grad.dtype, grad.layout, own, *kind)
            if key not in buckets:
                buckets[key] = Bucket(index, self.state, hyper)
            buckets[key].params.append(param)
            buckets[key].local_params.append(sharding.local(param))
            buckets[key].grads.append(sharding.local(grad))
        return buckets.values()


@dataclass
class HyperParameters:
    """The hyper-parameters of a group, as an update takes them."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    momentum_in_float32: bool
    min_8bit_size: int | None  # None: no momentum is in 8 bits

    def momentum_dtype_of(self, param: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's momentum, int8 for codes."""
        return momentum_dtype_of(param, torch.float32 if self.momentum_in_float32 else None, self.min_8bit_size)

    def wants_codes(self, param: Tensor) -> bool:
        """Tell whether a parameter is to have momentum in 8 bits, if its shards allow it."""
        return self.momentum != 0 and self.min_8bit_size is not None and is_coded(param, self.min_8bit_size)

    def codes(self, param: Tensor) -> bool:
        """Tell whether a parameter has momentum, and that in 8 bits."""
        return self.momentum != 0 and self.momentum_dtype_of(param) == torch.int8

    def __post_init__(self) -> None:
        self._fast: tuple[Mapping[str, Any] | None, Any] | None = None  # the last options of LARS, and both together

    def fast_options(self, options: Mapping[str, Any] | None) -> Any:
        """Return the hyper-parameters, and the options of LARS if there are any, as the fast path takes them."""
        if self._fast is None or self._fast[0] is not options:
            ours = {name: value for name, value in vars(self).items() if name != "_fast"}
            if options is not None:  # while lr is in the momentum, the group's own reads 1
                ours |= {name: value for name, value in options.items() if name != "lr" or value is not None}
            self._fast = options, ops.fast_options("SgdOptions", **ours)
        return self._fast[1]


@dataclass
class Bucket:
    """Layers of one group that one call can update."""

    group: int
    state: Any
    hyper: HyperParameters
    params: list[Tensor] = field(default_factory=list)
    local_params: list[Tensor] = field(default_factory=list)  # what is here of each
    grads: list[Tensor] = field(default_factory=list)  # likewise
    ratios: Tensor | None = None

    def update(self, inv_scale: Tensor | None) -> None:
        """Take the step, unless ``inv_scale`` is 0."""
        if _is_for_torch(self.params[0], self.grads[0]):
            self._update_by_torch()
            return
        layers = len(self.params)
        dampenings = [self.hyper.dampening] * layers
        momenta: list[dict[str, Tensor]] = []
        if self.hyper.momentum != 0:
            for i, param in enumerate(self.params):
                if not has_momentum(self.state[param]):
                    dampenings[i] = 0.0  # m ← d: from zeros, undampened
                momenta.append(momentum_like(param, self.state[param], self.hyper.momentum_dtype_of(param), self.group))
        kept = [list(momentum.values()) for momentum in momenta]  # a buffer, or codes and their scales
        in_8bit = self.hyper.codes(self.params[0])
        places = [sharding.place_of_rows(param) for param in self.params if in_8bit]
        lr, lr_tensor = self.hyper.lr, None
        if isinstance(lr, Tensor):
            lr_tensor = ops.lr_tensor(lr, self.params[0].device)
            lr = 1.0
        ops.sgd_(
            self.local_params,
            self.grads,
            [sharding.local(tensors[0]) for tensors in kept],
            momentum_scales=[sharding.local(tensors[1]) for tensors in kept] if in_8bit else None,
            row_lengths=[place[1] for place in places if place is not None],
            offsets=[place[0] for place in places if place is not None],
            maximize=self.hyper.maximize,
            weight_decays=[self.hyper.weight_decay] * layers,
            lrs=[lr] * layers,
            lr_tensor=lr_tensor,
            momentums=[self.hyper.momentum] * layers,
            dampenings=dampenings,
            nesterov=self.hyper.nesterov,
            ratios=self.ratios,
            inv_scale=inv_scale,
        )
        for param, momentum in zip(self.params, momenta, strict=self.hyper.momentum != 0):
            set_momentum(self.state[param], momentum)
        if sharding.is_distributed(self.params[0]):
            sharding.note_writes([*self.params, *(tensor for tensors in kept for tensor in tensors)])

    def _update_by_torch(self) -> None:
        """Take the step by torch's own functions, which support sparse gradients, subclasses and lazy parameters."""
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            weight_decay = self.hyper.weight_decay
            if self.ratios is not None:
                if weight_decay != 0:
                    grad = grad.add(param, alpha=-weight_decay if self.hyper.maximize else weight_decay)
                grad, weight_decay = self.ratios[i] * grad, 0.0
            buffers: list[Tensor | None] = [None]
            if self.hyper.momentum != 0:
                state = self.state[param]
                if state.get(CODES) is not None:  # of a group that was in 8 bits
                    set_momentum(state, momentum_like(param, state, self.hyper.momentum_dtype_of(param), self.group))
                buffers = [state.get(BUFFER)]
                if buffers[0] is None:
                    check_can_begin(param, self.group)
            torch_sgd(
                [param],
                [grad],
                buffers,
                has_sparse_grad=grad.is_sparse,
                foreach=False,
                weight_decay=weight_decay,
                momentum=self.hyper.momentum,
                lr=self.hyper.lr,  # type: ignore[arg-type]
                dampening=self.hyper.dampening,
                nesterov=self.hyper.nesterov,
                maximize=self.hyper.maximize,
            )
            if self.hyper.momentum != 0:
                self.state[param][BUFFER] = buffers[0]


def _is_for_torch(param: Tensor, grad: Tensor) -> bool:
    """Tell whether no op of ours can update a layer: torch lets none write a list of lazily conjugated tensors."""
    if grad.is_sparse or (is_traceable_wrapper_subclass(param) and not sharding.is_distributed(param)):
        return True
    return not torch.compiler.is_compiling() and (param.is_conj() or param.is_neg())  # asking would cause a graph break


def _hyper_parameters(of_group: str, group: Group) -> HyperParameters:
    """Return hyper-parameters as an update takes them, or raise."""
    lr = learning_rate(f"lr{of_group}", group["lr"])
    if group.get("differentiable", False):
        raise ValueError(f"differentiable{of_group} must be False (got: True): the step writes in place")
    momentum_dtype = group.get("momentum_dtype")
    if momentum_dtype not in (None, *DTYPE_NAMES):
        raise ValueError(
            f"momentum_dtype{of_group} must be None, torch.float32 or torch.int8 (got: {momentum_dtype!r})"
        )
    min_8bit_size = non_negative_integer(f"min_8bit_size{of_group}", group.get("min_8bit_size", MIN_8BIT_SIZE))
    names = f"momentum{of_group}", f"dampening{of_group}", f"weight_decay{of_group}"
    hyper = HyperParameters(
        lr=lr,
        momentum=non_negative_number(names[0], number_in(names[0], group["momentum"])),
        dampening=finite_number(names[1], number_in(names[1], group["dampening"])),
        weight_decay=non_negative_number(names[2], number_in(names[2], group["weight_decay"])),
        nesterov=bool(group["nesterov"]),
        maximize=bool(group["maximize"]),
        momentum_in_float32=momentum_dtype is not None,
        min_8bit_size=min(min_8bit_size, sys.maxsize) if momentum_dtype is torch.int8 else None,
    )
    if hyper.nesterov and (hyper.momentum == 0 or hyper.dampening != 0):
        raise ValueError(
            f"nesterov{of_group} needs momentum and no dampening "
            f"(momentum: {hyper.momentum}, dampening: {hyper.dampening})"
        )
    return hyper


def _gradient(group: int, position: int, param: Tensor, hyper: HyperParameters, state: Mapping[str, Any]) -> Tensor:
    """Return a parameter's gradient, distributed as it is, or raise if the step cannot be taken with it."""
    grad = param.grad
    assert grad is not None
    problem = _problem_of(param, grad, hyper, state)
    if problem is not None:
        raise RuntimeError(f"{problem} (group: {group}, parameter: {position}, shape: {tuple(param.shape)})")
    if grad.is_sparse:
        return grad.coalesce()
    placed = sharding.placed_like(param, grad)
    if placed is not grad:
        param.grad = placed  # so that it is redistributed once
    return placed


def _problem_of(param: Tensor, grad: Tensor, hyper: HyperParameters, state: Mapping[str, Any]) -> str | None:
    """Return why no step can be taken with a parameter, its gradient and its momentum, or None."""
    problem = problem_of_memory(param)
    if problem is None and param.dtype not in ops.DTYPES:
        problem = f"{WRONG_DTYPE} (dtype: {param.dtype})"
    problem = problem or problem_of_gradient(param, hyper.weight_decay)
    if problem is None and hyper.momentum != 0:
        problem = problem_of_momentum(param, state)
    if problem is not None:
        return problem
    if (sharding.is_distributed(param) or not is_traceable_wrapper_subclass(param)) and not grad.is_sparse:
        here = sharding.local(param)
        if not ops.is_writable_in_place(here):
            return f"elements of a parameter must not share memory (strides: {here.stride()})"
    is_kept_apart = hyper.momentum != 0 and hyper.momentum_dtype_of(param) != param.dtype
    if is_kept_apart and _is_for_torch(param, grad):
        return (
            "momentum_dtype must be None for sparse gradients, tensor subclasses and lazily negated parameters "
            f"(dtype: {param.dtype})"
        )
    if grad.dtype == torch.float64 and hyper.codes(param):
        return f"gradients of a layer with momentum in 8 bits must have at most 32 bits (gradient: {grad.dtype})"
    return None
