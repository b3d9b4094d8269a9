"""Base optimizers that take trust ratios into their own update, and the protocol by which any base can.

A base that LARS scales gradients for reads and writes each gradient once more than its update needs. One that *takes
trust ratios* multiplies by them where it reads the gradient anyway, and leaves ``.grad`` as it was. It says so, and
its ``step`` has one keyword more::

    class MySGD(torch.optim.Optimizer):
        takes_trust_ratios = True

        @torch.no_grad()
        def step(self, closure=None, *, trust_ratios=None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for index, group in enumerate(self.param_groups):
                params = [param for param in group["params"] if param.grad is not None]
                ratios = None if trust_ratios is None else trust_ratios.measure(index, params)
                for i, param in enumerate(params):
                    direction = param.grad + group["weight_decay"] * param
                    param -= group["lr"] * (direction if ratios is None else ratios[i] * direction)
            return loss

LARS passes a :class:`TrustRatios`, asks for nothing in return, and hides no weight decay: λ in r · (g + λw) is the
base's own. Without LARS, ``trust_ratios`` is None and the step is the base's plain one. A base with parameters of
several devices or dtypes in a group asks for those of each. Groups whose updates are scaled (``apply_to="update"``)
get None, and while lr is in the momentum a group's ``lr`` reads 1. A subclass whose ``step`` does not know the keyword
says ``takes_trust_ratios = False``, and gets gradients scaled as any other base does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from torchlars.optim.sgd import SGD

__all__ = ["SGD", "TrustRatios"]


class TrustRatios(Protocol):
    """The trust ratios of one step, for a base that applies them itself.

    They are of the gradients at the time of the call, so that a base with a closure asks once it has evaluated it.
    """

    def measure(self, index: int, params: Sequence[Tensor]) -> Tensor | None:
        """Return the vector of what to multiply the gradients of some parameters of a group by, on their device.

        That is the trust ratio r, and γr where lr is in the momentum (then the group's ``lr`` reads 1).

        Args:
            index: the group's, in ``param_groups``.
            params: n parameters with gradients, of one device and one dtype.

        Returns:
            A vector of n, float64 for float64 layers and float32 for all others; None for a group that LARS leaves
            alone, and whose step is the plain one.

        Raises:
            TypeError, ValueError, RuntimeError: a parameter or gradient cannot be adapted; the message names it.
        """

    def measure_all(self, layers: Iterable[tuple[int, Sequence[Tensor]]]) -> list[Tensor | None]:
        """Return what :meth:`measure` returns, for parameters of several groups: pairs of an index and parameters.

        Layers that are sharded over several ranks cost one collective for all of them, instead of one a call. In a call
        of either method all parameters of a list are sharded over the same ranks, or none is.
        """

    def options(self, index: int) -> dict[str, Any] | None:
        """Return how a group's trust ratios are decided, or None if LARS leaves it alone.

        For a base that measures by itself in the pass of its own update, as :class:`SGD` does. It must heed every key:
        ``trust_coef``, ``eps``, ``decayed_norm``, ``clip`` and ``lr_in_momentum``, and ``lr``, the group's real
        learning rate (a number or a tensor), which is None where neither of the last two is set.
        """

    def report(self, params: Sequence[Tensor], ratios: Tensor) -> None:
        """Take note of ratios that the base measured by itself, for ``LARS.trust_ratios()``.

        :meth:`measure` does so by itself.
        """
