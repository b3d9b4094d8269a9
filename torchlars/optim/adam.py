"""Adam and AdamW that take trust ratios into their update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchlars import ops, sharding
from torchlars.optim import fused
from torchlars.optim.fused import FusedOptimizer, check_can_begin, is_for_torch, problem_of_state, state_like
from torchlars.options import Group, learning_rate, non_negative_number, number_in

__all__: list[str] = []

#: The keys of one layer's moments in the state.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class HyperParameters(fused.HyperParameters):
    """The hyper-parameters of a group of Adam."""

    beta1: float
    beta2: float
    adam_eps: float
    decoupled_weight_decay: bool
    state_in_float32: bool

    fast_kind = "AdamOptions"

    def state_dtype_of(self, param: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's moments."""
        return torch.float32 if self.state_in_float32 and param.dtype.itemsize == 2 else param.dtype


@dataclass
class Bucket(fused.Bucket):
    """Layers of one group that one call can update."""

    hyper: HyperParameters

    def __post_init__(self) -> None:
        self._is_measured = False
        self._wide_moments: list[Tensor] = []  # where these are not rounded before the update is applied

    def measure_updates(self, inv_scale: Tensor | None) -> Tensor:
        """Update the moments, and return the squared norms of parameters and updates, as far as they are here."""
        squared_norms = torch.empty(2 * len(self.params), dtype=torch.float64, device=self.params[0].device)
        self._call(self.grads, inv_scale, of_updates=True, squared_norms=squared_norms)
        self._is_measured = True
        return squared_norms

    def update(self, inv_scale: Tensor | None) -> None:
        """Take the step, or what is left of it once updates are measured, unless ``inv_scale`` is 0."""
        grads = [] if self._is_measured else self.grads
        self._call(grads, inv_scale, of_updates=self._is_measured, ratios=self.ratios)

    def _call(self, grads: Sequence[Tensor], inv_scale: Tensor | None, of_updates: bool, **arguments: Any) -> None:
        hyper, layers = self.hyper, len(self.params)
        states = [_begun(param, self.state.get(param, {}), hyper, self.group) for param in self.params]
        exp_avgs, exp_avg_sqs, steps = (
            [sharding.local(state[name]) for state in states] for name in (*MOMENTS, "step")
        )
        moments = [*exp_avgs, *exp_avg_sqs]
        if of_updates and self.grads[0].dtype != self.params[0].dtype and moments[0].dtype.itemsize == 2:
            # What is measured from such gradients is the update of moments that are not rounded yet.
            self._wide_moments = self._wide_moments or [moment.float() for moment in moments]
            exp_avgs, exp_avg_sqs = self._wide_moments[:layers], self._wide_moments[layers:]
        ops.adam_(
            self.local_params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            maximize=hyper.maximize,
            weight_decays=[hyper.weight_decay] * layers,
            decoupled_weight_decay=hyper.decoupled_weight_decay,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            adam_eps=hyper.adam_eps,
            **hyper.lr_arguments(layers, self.params[0].device),
            of_updates=of_updates,
            inv_scale=inv_scale,
            **arguments,
        )
        if len(grads) > 0 and self._wide_moments:
            torch._foreach_copy_(moments, self._wide_moments)
        for param, state in zip(self.params, states, strict=True):
            self.state[param].update(state)
        if sharding.is_distributed(self.params[0]):
            sharding.note_writes([*self.params, *(state[name] for state in states for name in MOMENTS)])


class FusedAdam(FusedOptimizer):
    """What Adam and AdamW have in common: everything but the kind of weight decay, a key of their groups."""

    takes_ratios_of_updates = True
    fast_kind = "AdamLayers"
    bucket_type = Bucket
    torch_keys = MOMENTS
    state_keys = (*MOMENTS, "step")
    own_keys = ("state_dtype",)
    dtype_key = "state_dtype"
    #: A GradScaler leaves it to :meth:`step` to unscale gradients and to skip it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        amsgrad: bool,
        maximize: bool,
        state_dtype: torch.dtype | None,
        **of_class: bool,
    ) -> None:
        given: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        given |= {"maximize": maximize, **of_class}
        self.hyper_parameters("", {**given, "state_dtype": state_dtype})
        super().__init__(params, **given)
        self._add_own({} if state_dtype is None else {"state_dtype": state_dtype})

    def hyper_parameters(self, of_group: str, group: Group) -> HyperParameters:
        """Return the hyper-parameters of a group, or raise."""
        if group.get("amsgrad", False):
            raise ValueError(f"amsgrad{of_group} must be False (got: True); use torch.optim.{type(self).__name__}")
        if group.get("differentiable", False):
            raise ValueError(f"differentiable{of_group} must be False (got: True): the step writes in place")
        betas = group["betas"]
        if not isinstance(betas, Sequence) or len(betas) != 2:  # such as the lists of configurations
            raise TypeError(f"betas{of_group} must be two numbers (got: {betas!r})")
        beta1, beta2 = (
            non_negative_number(name, number_in(name, beta))
            for name, beta in zip((f"beta1{of_group}", f"beta2{of_group}"), betas, strict=True)
        )
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if beta >= 1:
                raise ValueError(f"{name}{of_group} must be below 1 (got: {beta})")
        state_dtype = group.get("state_dtype")
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype{of_group} must be None or torch.float32 (got: {state_dtype!r})")
        names = f"eps{of_group}", f"weight_decay{of_group}"
        return HyperParameters(
            lr=learning_rate(f"lr{of_group}", group["lr"]),
            weight_decay=non_negative_number(names[1], number_in(names[1], group["weight_decay"])),
            maximize=bool(group["maximize"]),
            beta1=beta1,
            beta2=beta2,
            adam_eps=non_negative_number(names[0], number_in(names[0], group["eps"])),
            decoupled_weight_decay=bool(group.get("decoupled_weight_decay", False)),
            state_in_float32=state_dtype is not None,
        )

    def problem_of(self, param: Tensor, grad: Tensor, hyper: HyperParameters, state: Mapping[str, Any]) -> str | None:
        """Return why no step can be taken with a layer and its moments, or None."""
        if grad.is_sparse:
            return f"gradients must be dense (got: {grad.layout}); use torch.optim.SparseAdam"
        if is_traceable_wrapper_subclass(param) and not sharding.is_distributed(param):
            return (
                f"parameters must be plain tensors or DTensors, not other subclasses (got: {type(param).__name__}); "
                f"use torch.optim.{type(self).__name__}"
            )
        if is_for_torch(param, grad):
            return "parameters must not be lazily conjugated or negated; use resolve_conj() and resolve_neg()"
        return self._problem_of_keys(state) or problem_of_state(param, state, MOMENTS)

    def load_layer(self, param: Tensor, saved: Mapping[str, Any], group: int) -> None:
        """Load the moments and the number of steps of a parameter."""
        dtype = self._read_group(group, self.param_groups[group]).state_dtype_of(param)
        for name in MOMENTS:
            if saved.get(name) is not None:
                if saved[name].shape != param.shape or saved[name].is_complex() != param.is_complex():
                    got = f"shape {tuple(saved[name].shape)}, {saved[name].dtype}"
                    raise ValueError(f"{name} must have its parameter's shape, and be complex if that is (got: {got})")
                self.state[param][name] = saved[name].to(device=param.device, dtype=dtype)
        if saved.get("step") is not None:
            self.state[param]["step"] = _step_on(param, saved["step"], group)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        super()._check_state_dict(state_dict)
        for key, state in state_dict["state"].items():
            problem = self._problem_of_keys(state)
            step = state.get("step")
            if problem is None and step is None and any(name in state for name in self.state_keys):
                problem = f"the state of a parameter must hold {', '.join(self.state_keys)}, or none (got: None)"
            if problem is None and step is not None and not (isinstance(step, Tensor) and step.device.type != "cpu"):
                steps = step.item() if isinstance(step, Tensor) else step
                if not 0 <= steps <= torch.finfo(torch.float32).max:
                    problem = f"step must be a non-negative number within float32 (got: {steps})"
            if problem is not None:
                raise ValueError(f"{problem} in state_dict['state'][{key!r}]")

    def _problem_of_keys(self, state: Mapping[str, Any]) -> str | None:
        """Return why no step can be taken with what a state holds, whatever its moments are, or None."""
        found = [name for name in self.state_keys if state.get(name) is not None]
        if len(found) not in (0, len(self.state_keys)):
            return f"the state of a parameter must hold {', '.join(self.state_keys)}, or none (got: {', '.join(found)})"
        step = state.get("step")
        if isinstance(step, Tensor):
            is_number = step.numel() == 1 and not step.is_complex() and step.dtype != torch.bool
            got = f"shape {tuple(step.shape)}, {step.dtype}"
        else:
            is_real = isinstance(step, Real) and not isinstance(step, bool)
            is_number, got = is_real or step is None, repr(step)
        return None if is_number else f"step must be a number or a tensor of one (got: {got})"


class Adam(FusedAdam, torch.optim.Adam):
    r"""Adam in one pass over memory, with trust ratios of LARS or LAMB or without.

    .. math::
        d &= r \cdot (g + \lambda w) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) d, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) d^2 \\
        u &= \frac{m / (1 - \beta_1^t)}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}, \qquad
        w \leftarrow w - \gamma s u

    at the *t*-th step, with the gradient *g*, negated where the group maximizes. *r* and *s* are 1, so that the step is
    that of :class:`torch.optim.Adam`, unless a wrapper takes it. ``LARS(torchlars.optim.Adam(...))`` sets *r* to the
    trust ratio of the layer's gradient, which has almost no effect, as Adam is invariant to a gradient's scale.
    ``LAMB(torchlars.optim.Adam(...))`` sets *s* to that of its update *u*. That gives what the wrappers give over
    :class:`torch.optim.Adam`, but LAMB copies no parameters, reads a layer from memory once where it fits into cache,
    and measures *u* itself, not the difference of two rounded parameters: the ratio is exact for steps of any length.

    A drop-in for :class:`torch.optim.Adam`: the same groups, the same state under the same keys, and each loads the
    other's state dicts. The arguments ``foreach``, ``fused``, ``capturable`` and ``differentiable`` choose among
    implementations, of which this is one, and do not exist here. ``step`` is on the parameter's device, as with
    ``fused=True``, so that steps can be captured in CUDA graphs and a scaler can skip them without waiting. bfloat16
    and float16 layers are computed in float32, and rounded once when they are written. A parameter that a group lists
    twice is one layer, and stepped once. Layers that share memory are stepped one after the other, under LAMB as well.

    Args:
        params: parameters, named parameters, or groups of them. Their gradients must be dense.
        lr: γ ≥ 0, a number or a tensor of one element. A tensor is read on the parameters' device, without waiting, so
            that its value is not checked. The other hyper-parameters are numbers.
        betas: β₁ and β₂, in [0, 1).
        eps: ε ≥ 0.
        weight_decay: λ ≥ 0, coupled: part of the gradient.
        amsgrad: must be False.
        maximize: whether to ascend.
        state_dtype: ``torch.float32`` keeps the moments *m* and *v* of bfloat16 and float16 parameters in float32. None
            keeps them in the parameter's dtype, as :class:`torch.optim.Adam` does. A group's key as well, if given.
            Use it for float16 under LAMB. There *v* becomes 0 where it is below 3e-8, as it is for gradients below
            0.005 with β₂ = 0.999; *u* is *m* / ε then, and elements with such gradients outweigh all others.
        decoupled_weight_decay: whether λ is decoupled, as in :class:`torchlars.optim.AdamW`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or out of its range.

    Source: Kingma and Ba, *Adam: A Method for Stochastic Optimization*, 2015, arXiv:1412.6980, and the update rule of
    :class:`torch.optim.Adam`. As with ``fused=True``, *u* is that of the moments before they are rounded to their
    dtype. Only LAMB takes it from the moments as they are stored, unless gradients have another dtype than parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        of_class = {"decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize, state_dtype, **of_class)


class AdamW(FusedAdam, torch.optim.AdamW):
    r"""AdamW in one pass over memory, with trust ratios of LARS or LAMB or without.

    As :class:`torchlars.optim.Adam`, with decoupled weight decay:

    .. math::
        d = r g, \qquad
        u = \frac{m / (1 - \beta_1^t)}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon} + \lambda w

    All else is as :class:`torchlars.optim.Adam` documents it. ``LAMB(torchlars.optim.AdamW(...))`` is the LAMB of You
    et al., 2020.

    Args:
        weight_decay: λ ≥ 0, decoupled: part of the update *u*, and multiplied by γ.

    Source: Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2019, arXiv:1711.05101, and the update rule
    of :class:`torch.optim.AdamW`, whose decay of *w* before the update is the same in exact arithmetic.

    Example:
        >>> optimizer = LAMB(torchlars.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01))
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize, state_dtype)


def _begun(param: Tensor, state: Mapping[str, Any], hyper: HyperParameters, group: int) -> dict[str, Tensor]:
    """Return the state of a layer as a kernel takes it; zeros before the first step."""
    dtype = hyper.state_dtype_of(param)
    begun = {name: state_like(param, state.get(name), dtype, group) for name in MOMENTS}
    return {"step": _step_on(param, state.get("step"), group), **begun}


def _step_on(param: Tensor, step: Any, group: int) -> Tensor:
    """Return a number of steps as a kernel takes it: a float32 tensor without dimensions on the parameter's device."""
    device = sharding.local(param).device
    if isinstance(step, Tensor) and (step.dtype, step.device, step.dim()) == (torch.float32, device, 0):
        return step
    check_can_begin(param, group)
    if isinstance(step, Tensor):
        return step.detach().reshape(()).to(device, torch.float32)
    return torch.full((), 0.0 if step is None else float(step), dtype=torch.float32, device=device)
