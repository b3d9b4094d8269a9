"""Clipping of each layer's gradient at a percentile of its last norms, as a step pre-hook of any optimizer."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars import ops, sharding
from torchlars.amp import GradScale
from torchlars.layers import own_gradients, problem_of_gradient, problem_of_memory, writable_gradient
from torchlars.options import is_capturing

__all__ = ["PercentileClipping"]


class PercentileClipping:
    """Clips the gradient of each layer at a percentile of the layer's last gradient norms, before every step.

    With n = ‖g‖² of a layer, and h its last ``history`` values, the present one included and the first one repeated
    as long as there are fewer, sorted in ascending order::

        c = √h[percentile · history // 100]
        g ← min(1, c / √n) · g

    It is a step pre-hook of the optimizer from its construction until :meth:`remove`. Gradients are overwritten.
    ``step(closure)`` clips after each evaluation, and each counts. Parameters in groups that are added later take part.
    The host never waits for the device.

    Under :class:`LARS` without weight decay it does next to nothing, because the trust ratio divides by ‖g‖. It is for
    SGD, for groups with ``trust_coef=None``, and for ``LAMB(SGD(...), clip=True)``.

    - **Zero and not finite**: if n is 0, infinite or NaN, g and h stay as they are.
    - **GradScaler**: where unscaling is left to the step, n is that of the unscaled gradient, and g stays scaled. If
      the scaler skips the step, g and h stay as they are.
    - **Sharded layers** (DTensor): n is that of the whole layer, at the price of one small all-reduce a step and mesh
      dimension. All ranks must step, with gradients of the same layers.
    - **CUDA graphs**: every layer must have had a step before a capture.
    - **Copies**: a copied or pickled PercentileClipping clips the copy of its optimizer. An optimizer that is copied
      alone has no hooks, as torch has it.
    - **Subclasses** whose ``step`` calls that of their base class: torch may call step hooks for both, which clips and
      counts twice.

    A history is a float64 vector on its parameter's device, 800 bytes at the default length. Gradients may have any
    dtype, layout and placement that :class:`LARS` takes. Factors are computed in float64, and rounded to float32 unless
    the layer is float64.

    Args:
        optimizer: any optimizer, also a wrapper such as LARS.
        percentile: an integer from 0 to 99: 0 clips at the smallest norm, 50 at the median.
        history: how many norms are kept, an integer of at least 1.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or a number is no integer.
        ValueError: a number is out of its range.

    A step raises a RuntimeError if a layer cannot be clipped. No gradient and no history has changed then.

    Source: ``percentile_clipping`` of bitsandbytes up to 0.49.2, with the same factors. Differences: NaN, infinite and
    zero norms enter no history (there, a first gradient of 0 multiplies the next ones by 0); the host does not wait;
    norms are in float64; sharded layers are whole; the length of the history can be chosen.

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> clipping = PercentileClipping(optimizer, percentile=5)
        >>> loss.backward()
        >>> optimizer.step()
        >>> checkpoint = {"optimizer": optimizer.state_dict(), "clipping": clipping.state_dict()}
    """

    def __init__(self, optimizer: Optimizer, percentile: int = 5, history: int = 100) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer (got: {type(optimizer).__name__}); "
                "construct it first: PercentileClipping(torch.optim.SGD(params, lr=0.1))"
            )
        self.optimizer = optimizer
        self.percentile = percentile
        self._history = _integer("history", history, 1)
        self._histories: dict[Tensor, Tensor] = {}  # squared norms, the oldest first; zeros if there is none yet
        self._is_removed = False
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    @property
    def percentile(self) -> int:
        """An integer from 0 to 99, which may be set between steps."""
        return self._percentile

    @percentile.setter
    def percentile(self, percentile: int) -> None:
        self._percentile = _integer("percentile", percentile, 0, 99)

    @property
    def history(self) -> int:
        """How many norms of each layer are kept."""
        return self._history

    def remove(self) -> None:
        """Stop clipping."""
        self._handle.remove()
        self._is_removed = True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Clip the copied optimizer: torch drops the hooks of an optimizer that is copied or pickled."""
        vars(self).update(state)
        self._handle = self.optimizer.register_step_pre_hook(self._before_step)
        if self._is_removed:
            self.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the percentile, and the history of every parameter in the order of the groups, not copied."""
        return {"percentile": self.percentile, "histories": [self._history_of(param) for param in self._params()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, with its percentile.

        Raises:
            TypeError, ValueError: it is not one of as many parameters with histories of this length. Nothing was loaded
                then.
        """
        got: Any
        if not isinstance(state_dict, dict) or state_dict.keys() != {"percentile", "histories"}:
            got = ", ".join(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(f"state_dict must be a dict of percentile and histories (got: {got})")
        percentile = _integer("state_dict['percentile']", state_dict["percentile"], 0, 99)
        histories, params = state_dict["histories"], self._params()
        if not isinstance(histories, list) or len(histories) != len(params):
            got = len(histories) if isinstance(histories, list) else type(histories).__name__
            raise ValueError(f"state_dict['histories'] must be a list of {len(params)}, one a parameter (got: {got})")
        for i, history in enumerate(histories):
            where = f"state_dict['histories'][{i}]"
            if not isinstance(history, Tensor) or history.shape != (self.history,):
                got = tuple(history.shape) if isinstance(history, Tensor) else type(history).__name__
                raise ValueError(f"{where} must be a tensor of shape {(self.history,)} (got: {got})")
            is_readable = history.layout == torch.strided and history.is_floating_point() and not history.is_meta
            if not is_readable or not _are_norms(history):
                raise ValueError(f"{where} must hold squared norms (got: {history})")
        copies = [h.to(param.device, torch.float64, copy=True) for h, param in zip(histories, params, strict=True)]
        self.percentile, self._histories = percentile, dict(zip(params, copies, strict=True))

    def _params(self) -> list[Tensor]:
        """Return all parameters, each once however often it is listed."""
        return list(dict.fromkeys(param for group in self.optimizer.param_groups for param in group["params"]))

    def _history_of(self, param: Tensor) -> Tensor:
        if param not in self._histories:
            self._histories[param] = torch.zeros(self.history, dtype=torch.float64, device=param.device)
        return self._histories[param]

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Clip now, or return other arguments of the step, whose closure clips. The first of them is the optimizer."""
        is_keyword = len(args) < 2
        closure = kwargs.get("closure") if is_keyword else args[1]
        if closure is None:
            self._clip()
            return None

        def evaluate() -> Any:
            loss = closure()
            self._clip()
            return loss

        return (args, {**kwargs, "closure": evaluate}) if is_keyword else ((args[0], evaluate, *args[2:]), kwargs)

    @torch.no_grad()
    def _clip(self) -> None:
        layers = self._layers()
        own_gradients(layers, self._params(), self.optimizer.state)
        buckets: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for param in layers:
            grad = writable_gradient(param)
            key = (param.device, param.dtype, grad.dtype, sharding.process_groups(param))
            params, grads = buckets.setdefault(key, ([], []))
            params.append(param)
            grads.append(grad)
        grad_scale = GradScale.of(self.optimizer)
        squared_norms = {
            key: ops.squared_norms(grads, inv_scale=grad_scale.inv_scale(key[0])) for key, (_, grads) in buckets.items()
        }
        sharding.complete((key[-1], of_bucket) for key, of_bucket in squared_norms.items())
        for key, (params, grads) in buckets.items():
            factors = self._factors([self._history_of(param) for param in params], squared_norms[key])
            ops.scale_gradients_(
                grads,
                [sharding.local(param) for param in params],
                maximize=False,
                weight_decays=[0.0] * len(params),
                ratios=factors.to(ops.compute_dtype(grads[0].dtype, params[0].dtype)),
            )

    def _layers(self) -> list[Tensor]:
        """Return the parameters with a gradient, or raise."""
        layers: dict[Tensor, None] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                if param.grad is None or param in layers:
                    continue
                layers[param] = None
                problem = sharding.problem_of(param) or problem_of_memory(param) or problem_of_gradient(param, 0.0)
                is_new = param not in self._histories
                if problem is None and is_new and not torch.compiler.is_compiling() and is_capturing(param.device):
                    problem = (
                        "the history of a layer must exist before a CUDA graph is captured, or replays begin it anew; "
                        "take a step before the capture"
                    )
                if problem is not None:
                    raise RuntimeError(
                        f"{problem} (group: {index}, parameter: {position}, shape: {tuple(param.shape)})"
                    )
        return list(layers)

    def _factors(self, histories: list[Tensor], squared_norms: Tensor) -> Tensor:
        """Return what gradients are to be multiplied by, and note their squared norms."""
        n = squared_norms[:, None]
        old = torch.stack(histories)
        new = torch.where(old == 0, n, torch.cat([old[:, 1:], n], dim=1))
        is_noted = (n > 0) & n.isfinite()  # n is 0 if the scaler skips the step
        new = torch.where(is_noted, new, old)
        torch._foreach_copy_(histories, new.unbind())
        limits = new.sort(dim=1).values[:, self.percentile * self.history // 100, None]
        return torch.where(is_noted, (limits.sqrt() / n.sqrt()).clamp(max=1.0), 1.0).flatten()


def _are_norms(history: Tensor) -> bool:
    """Tell whether a history holds squared norms, or has not begun."""
    return bool((history == 0).all() or (history.isfinite() & (history > 0)).all())


def _integer(name: str, value: Any, lowest: int, highest: float = math.inf) -> int:
    kind = f"of at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer {kind} (got: {value!r} of type {type(value).__name__})")
    number = int(value)
    if not lowest <= number <= highest:
        raise ValueError(f"{name} must be an integer {kind} (got: {value!r})")
    return number
