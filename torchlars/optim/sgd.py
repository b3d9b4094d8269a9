"""SGD that takes trust ratios into its update."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from torchlars import amp, ops, sharding
from torchlars.codes import BLOCK, is_coded
from torchlars.optim import fused
from torchlars.optim.fused import FusedOptimizer, check_can_begin, is_for_torch
from torchlars.optim.momentum import (
    BUFFER,
    CODES,
    MOMENTUM_KEYS,
    ORDER,
    SCALES,
    has_momentum,
    momentum_dtype_of,
    momentum_like,
    problem_of_momentum,
    set_momentum,
)
from torchlars.optim.protocol import TrustRatios
from torchlars.options import (
    Group,
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


@dataclass
class HyperParameters(fused.HyperParameters):
    """The hyper-parameters of a group of SGD."""

    momentum: float
    dampening: float
    nesterov: bool
    momentum_in_float32: bool
    min_8bit_size: int | None  # None: no momentum is in 8 bits

    fast_kind = "SgdOptions"

    def momentum_dtype_of(self, param: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's momentum, int8 for codes."""
        return momentum_dtype_of(param, torch.float32 if self.momentum_in_float32 else None, self.min_8bit_size)

    def wants_codes(self, param: Tensor) -> bool:
        """Tell whether a parameter is to have momentum in 8 bits, if its shards allow it."""
        return self.momentum != 0 and self.min_8bit_size is not None and is_coded(param, self.min_8bit_size)

    def codes(self, param: Tensor) -> bool:
        """Tell whether a parameter has momentum, and that in 8 bits."""
        return self.momentum != 0 and self.momentum_dtype_of(param) == torch.int8


@dataclass
class Bucket(fused.Bucket):
    """Layers of one group that one call can update."""

    hyper: HyperParameters

    def update(self, inv_scale: Tensor | None) -> None:
        """Take the step, unless ``inv_scale`` is 0."""
        if is_for_torch(self.params[0], self.grads[0]):
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
        ops.sgd_(
            self.local_params,
            self.grads,
            [sharding.local(tensors[0]) for tensors in kept],
            momentum_scales=[sharding.local(tensors[1]) for tensors in kept] if in_8bit else None,
            row_lengths=[place[1] for place in places if place is not None],
            offsets=[place[0] for place in places if place is not None],
            maximize=self.hyper.maximize,
            weight_decays=[self.hyper.weight_decay] * layers,
            **self.hyper.lr_arguments(layers, self.params[0].device),
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


class SGD(FusedOptimizer, torch.optim.SGD):
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

    fast_kind = "SgdLayers"
    bucket_type = Bucket
    torch_keys = ("momentum_buffer",)
    state_keys = MOMENTUM_KEYS
    own_keys = ("momentum_dtype", "min_8bit_size")
    dtype_key = "momentum_dtype"
    dtype_names = {torch.float32: "float32", torch.int8: "int8"}  # noqa: RUF012

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
        self.hyper_parameters("", {**given, "momentum_dtype": momentum_dtype, "min_8bit_size": min_8bit_size})
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        own: Group = {}  # without these, groups hold the keys of torch's SGD, and no other
        if momentum_dtype is not None:
            own["momentum_dtype"] = momentum_dtype
        if momentum_dtype is torch.int8 or min_8bit_size != MIN_8BIT_SIZE:
            own["min_8bit_size"] = min_8bit_size
        self._add_own(own)

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        """Whether a GradScaler leaves it to :meth:`step` to unscale gradients and to skip it.

        If the first step is skipped, the momentum is initialized with zeros, which equals none. Not supported with
        dampening, as a first step is undampened, nor for layers whose step torch's own functions take.
        """
        dampened = [group for group in self.param_groups if group["dampening"] != 0]
        return not amp.begins_momentum(self, dampened) and not any(
            param.grad is not None and is_for_torch(param, param.grad)
            for group in self.param_groups
            for param in group["params"]
        )

    def _gather(self, trust_ratios: TrustRatios | None) -> tuple[Sequence[Any], list[fused.Bucket]]:
        fast_buckets, buckets = super()._gather(trust_ratios)
        if not torch.compiler.is_compiling():
            self._warn_of_cut_layers(buckets)
        return fast_buckets, buckets

    def _warn_of_cut_layers(self, buckets: Iterable[fused.Bucket]) -> None:
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

    def hyper_parameters(self, of_group: str, group: Group) -> HyperParameters:
        """Return the hyper-parameters of a group, or raise."""
        lr = learning_rate(f"lr{of_group}", group["lr"])
        if group.get("differentiable", False):
            raise ValueError(f"differentiable{of_group} must be False (got: True): the step writes in place")
        momentum_dtype = group.get("momentum_dtype")
        if momentum_dtype not in (None, *self.dtype_names):
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

    def kind_of(self, param: Tensor, grad: Tensor, hyper: HyperParameters) -> tuple[Any, ...]:
        """Return whether torch takes the step of a layer, and whether its momentum is in 8 bits."""
        return is_for_torch(param, grad), hyper.codes(param)

    def problem_of(self, param: Tensor, grad: Tensor, hyper: HyperParameters, state: Mapping[str, Any]) -> str | None:
        """Return why no step can be taken with a layer and its momentum, or None."""
        problem = problem_of_momentum(param, state) if hyper.momentum != 0 else None
        if problem is not None:
            return problem
        is_kept_apart = hyper.momentum != 0 and hyper.momentum_dtype_of(param) != param.dtype
        if is_kept_apart and is_for_torch(param, grad):
            return (
                "momentum_dtype must be None for sparse gradients, tensor subclasses and lazily negated parameters "
                f"(dtype: {param.dtype})"
            )
        if grad.dtype == torch.float64 and hyper.codes(param):
            return f"gradients of a layer with momentum in 8 bits must have at most 32 bits (gradient: {grad.dtype})"
        return None

    def load_layer(self, param: Tensor, saved: Mapping[str, Any], group: int) -> None:
        """Load the momentum of a parameter. A float one that becomes codes is rounded to nearest."""
        hyper = self._read_group(group, self.param_groups[group])
        dtype = hyper.momentum_dtype_of(param)
        found = {name: saved[name] for name in MOMENTUM_KEYS if saved.get(name) is not None}
        found = {name: x.to("cpu" if name == ORDER else param.device) for name, x in found.items()}
        if found.keys() >= {BUFFER, CODES, SCALES} and found[CODES].is_floating_point():
            found = {BUFFER: found[BUFFER]}  # torch.optim.SGD has cast the codes, and then begun anew
        if found.keys() - {BUFFER} or (found and dtype == torch.int8):
            problem = problem_of_momentum(param, found)
            if problem is not None:
                raise ValueError(problem)
            set_momentum(self.state[param], momentum_like(param, found, dtype, group))
        elif found:
            self.state[param][BUFFER] = found[BUFFER].to(dtype=dtype)
