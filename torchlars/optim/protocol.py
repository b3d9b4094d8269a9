"""The protocol by which a base optimizer takes trust ratios into its own update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

__all__: list[str] = []


class TrustRatios(Protocol):
    """The trust ratios of one step, for a base that multiplies by them itself.

    A base calls the methods inside its ``step``, after it has evaluated the closure, if any: gradients are measured as
    they are at the call. A group has ratios of gradients (under LARS and LARC) or of updates (under LAMB), or none.
    """

    # Ratios of gradients.

    def measure(self, index: int, params: Sequence[Tensor]) -> Tensor | None:
        """Return the factors by which to multiply g + λw, one for each of some parameters of a group.

        That is the trust ratio r, or γr where lr is in the momentum; the group's ``lr`` reads 1 then.

        Args:
            index: the group's, in ``param_groups``.
            params: n parameters with gradients, of one device and one dtype, and sharded over the same ranks.

        Returns:
            A vector of n on the parameters' device, float64 for float64 layers and float32 for all others. None for a
            group without ratios of gradients: the step is the plain one.

        Raises:
            TypeError, ValueError, RuntimeError: a parameter or gradient cannot be adapted; the message names it.
        """

    def measure_all(self, layers: Iterable[tuple[int, Sequence[Tensor]]]) -> list[Tensor | None]:
        """Return what :meth:`measure` returns, for several pairs of an index and parameters.

        Layers that are sharded over several ranks then take one collective, instead of one a call.
        """

    def options(self, index: int) -> Mapping[str, Any] | None:
        """Return how a group's ratios of gradients are decided, or None for a group that has none.

        The mapping is read-only, and another object once anything has changed.

        For a base that measures and decides by itself, in the pass of its own update. It must support every key:
        ``trust_coef``, ``eps``, ``decayed_norm``, ``clip`` and ``lr_in_momentum``, as :class:`torchlars.LARS` defines
        them, and ``lr``, the group's real learning rate (a number or a tensor), which is None where neither of the last
        two is set. It hands the ratios to :meth:`report`.
        """

    # Ratios of updates.

    def measure_updates(self, layers: Iterable[tuple[int, Sequence[Tensor], Sequence[Tensor]]]) -> list[Tensor | None]:
        """Return the vectors of what to multiply the updates of some parameters of groups by.

        Args:
            layers: for each vector a group's index, n parameters as :meth:`measure` takes them, not written yet, and
                their n updates u. The step is to be w ← w − γru, weight decay included in u and γ not.

        Returns:
            For each a vector of n as :meth:`measure` returns it; None for a group without ratios of updates.

        Raises:
            TypeError, ValueError, RuntimeError: a parameter or update does not allow it; the message names it.
        """

    def decide_updates(self, layers: Iterable[tuple[int, Sequence[Tensor], Tensor]]) -> list[Tensor | None]:
        """Return what :meth:`measure_updates` returns, for a base that measures by itself.

        Args:
            layers: for each vector a group's index, n parameters, and a float64 vector of 2n squared norms: those of
                what is here of the parameters, and of their updates. Norms of sharded layers are completed over the
                ranks here, in place.
        """

    def update_options(self, index: int) -> Mapping[str, Any] | None:
        """Return how a group's ratios of updates are decided, or None for a group that has none.

        The mapping is read-only, and another object once anything has changed.

        For a base that measures and decides by itself. It must support every key: ``trust_coef``, ``eps`` and ``clip``,
        as :class:`torchlars.LAMB` defines them. It hands the ratios to :meth:`report`.
        """

    def report(self, params: Sequence[Tensor], ratios: Tensor) -> None:
        """Take note of ratios that the base decided by itself, for ``optimizer.trust_ratios()``."""
