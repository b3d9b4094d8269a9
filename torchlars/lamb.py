"""LAMB: the trust ratio of every layer's update, around any optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim import Optimizer

from torchlars.bases import check_update_is_scalable
from torchlars.options import non_negative_number, positive_number, true_or_false
from torchlars.step import TrustRatioWrapper

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from torchlars.options import CommonOptions

__all__ = ["LAMB"]


class LAMB(TrustRatioWrapper):
    r"""Layer-wise adaptive moments around a base optimizer: the trust ratio of the base's update.

    The base takes its whole step, with its own weight decay and momentum. Then the update of every layer (every
    parameter tensor *w*) is multiplied by a trust ratio:

    .. math::
        w \leftarrow w_\text{old} + r \cdot (w - w_\text{old}), \qquad
        r = \frac{\eta \lVert w_\text{old} \rVert}{\lVert u \rVert + \epsilon}, \qquad
        u = \frac{w - w_\text{old}}{\gamma},

    with the L2 norm over the whole layer, *r* = 1 where either norm is zero, and min(*r*, 1) with ``clip``. *r* is the
    *trust ratio*, η ``trust_coef``, ε ``eps`` and γ the group's learning rate at this step. So a layer's step has the
    length γ · η · ‖w‖, or with ``clip`` that at most.

    Over AdamW this is LAMB. It suits all bases whose steps hardly depend on a gradient's scale (the Adam family, Muon,
    Adafactor), over which :class:`torchlars.LARS` has almost no effect. Over SGD with momentum it is a LARS that scales
    the momentum, too.

    :class:`torchlars.optim.AdamW` and :class:`torchlars.optim.Adam` are the fastest and most precise bases: they take
    the ratio into their own update (see :mod:`torchlars.optim`), which needs no copy of a parameter.

    **Gradients** stay as they were. Over other bases each parameter, or its local shard (``DTensor``), is copied for
    the duration of a step. Norms are those of whole layers, and all ranks must have gradients of the same layers, as in
    :class:`torchlars.LARS`.

    **Precision.** Over :class:`torchlars.optim.AdamW` *u* is measured before it is rounded to the parameter. Over other
    bases an update is the difference of two values of the parameter's dtype, each of which was rounded. So it must not
    be much smaller than the parameter: in float32 it is good to 1 % where ‖γu‖ is above 1e-5 · ‖w‖, which Adam's always
    is in practice. In bfloat16 and float16 most of a small update is lost: keep such parameters in float32.

    Parameters, groups, state and hyper-parameters are the base's, and everything that works on a torch optimizer works
    on this one. A group may hold each option as a key, and with ``trust_coef=None`` the base steps it as it is, as is
    common for biases and normalisation layers (see :func:`torchlars.param_groups`). A key that the base itself has, as
    Adam has ``eps``, is the base's.

    Args:
        optimizer: the base, any :class:`torch.optim.Optimizer` whose groups have an ``lr``. Kept as ``.optim``.
        trust_coef: η > 0, the length of a step relative to the weights', per unit of lr.
        eps: ε ≥ 0, in units of an update's norm.
        clip: whether no step is to be longer than the base's own.
        always_adapt: whether layers of groups with a weight decay of 0 are adapted; else their *r* is 1.

    Raises:
        TypeError: ``optimizer`` is no optimizer, has no lr or searches along a line (LBFGS), or an argument is of the
            wrong kind.
        ValueError: a number is out of its range, the base is differentiable, or a group holds an option under the name
            of another library, such as ``trust_coefficient``, which the base does not own.

    Source: You et al., *Large Batch Optimization for Deep Learning: Training BERT in 76 minutes*, 2020,
    arXiv:1904.00962, with their φ(‖w‖) = ‖w‖. As in optax and timm, AdamW's bias correction stays.

    Example:
        >>> optimizer = LAMB(torchlars.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01))
        >>> loss.backward()
        >>> optimizer.step()
    """

    options: ClassVar = {
        "trust_coef": positive_number,
        "eps": non_negative_number,
        "clip": true_or_false,
        "always_adapt": true_or_false,
    }
    state_key = "lamb"
    ratio_of = "update"

    trust_coef: float
    eps: float
    clip: bool
    always_adapt: bool = True  # pickles of older versions have none

    def __init__(
        self,
        optimizer: Optimizer,
        trust_coef: float = 1.0,
        eps: float = 0.0,
        *,
        clip: bool = False,
        always_adapt: bool = True,
    ) -> None:
        super().__init__(optimizer, trust_coef=trust_coef, eps=eps, clip=clip, always_adapt=always_adapt)

    if TYPE_CHECKING:

        @classmethod
        def over(  # type: ignore[override]
            cls, base: type[Optimizer], **options: Unpack[CommonOptions]
        ) -> type[LAMBOver]:
            """Return a class that constructs a base and wraps it: :meth:`torchlars.wrapper.OptimizerWrapper.over`."""
            ...

    def check_options(self, of_group: str, options: dict[str, Any]) -> None:
        """Raise if the base's update cannot be scaled."""
        check_update_is_scalable(self.optim, "LAMB")


if TYPE_CHECKING:

    class LAMBOver(LAMB):
        """A class of :meth:`LAMB.over`. Type checkers are not told its base's arguments."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
