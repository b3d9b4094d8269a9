"""LARS: the trust ratio of every layer, around any optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.optim import Optimizer

from torchlars.bases import check_update_is_scalable, decouples, steps_as
from torchlars.options import non_negative_number, one_of, positive_number, true_or_false, warn_of_caller
from torchlars.step import TrustRatioWrapper
from torchlars.zero_layers import ZeroLayers

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from torchlars.options import CommonOptions

    class LARSOptions(CommonOptions, total=False):
        """The options of :class:`LARS`."""

        norm: Literal["raw", "decayed"]
        lr_in_momentum: bool
        apply_to: Literal["gradient", "update"]
        weight_decay: Literal["decoupled"] | None


__all__ = ["LARC", "LARS"]


def _none_or_decoupled(name: str, value: Any) -> str | None:
    if value is None or value == "decoupled":
        return value  # type: ignore[no-any-return]
    raise (ValueError if isinstance(value, str) else TypeError)(
        f"{name} must be None or 'decoupled' (got: {value!r}); how much is the base's: SGD(..., weight_decay=1e-4)"
    )


class LARS(TrustRatioWrapper):
    r"""Layer-wise adaptive rate scaling around a base optimizer.

    Before the base takes its step, the gradient *g* of every layer (every parameter tensor *w*) becomes

    .. math::
        g \leftarrow r \cdot (g + \lambda w), \qquad
        r = \frac{\eta \lVert w \rVert}{\lVert g \rVert + \lambda \lVert w \rVert + \epsilon},

    with the L2 norm over the whole layer, *r* = 1 where either norm is zero, and (g − λw) in groups that maximize.
    *r* is the *trust ratio*, η ``trust_coef``, ε ``eps`` and λ the group's weight decay, if it is coupled.

    **Learning rate.** The base multiplies the adapted gradient by its lr. Where *r* is not 1, a step of plain SGD then
    has at most the length lr · η · ‖w‖, whatever the gradient's. So lr is much larger than for SGD alone, and depends
    less on the batch size. Momentum is the base's: it accumulates adapted gradients, without lr. The paper's Algorithm
    1 accumulates lr times them (``lr_in_momentum=True``); the two differ while lr changes.

    **Gradients are overwritten**: after :meth:`step`, ``p.grad`` holds r · (g + λw). Clip and inspect gradients before
    it. Over a base that takes trust ratios (see :mod:`torchlars.optim`) ``p.grad`` stays as it was, as such a base
    multiplies by them in its own update; its weight decay is not hidden.

    **Weight decay.** LARS takes over coupled weight decay, which the base would add to the gradient (SGD, Adam,
    RMSprop, ...), and hides it from the base during its step. Decoupled weight decay (AdamW, Muon, Adafactor) stays
    with the base, and λ is 0. LARS reads which it is from a group, or from the base's defaults, under
    ``decoupled_weight_decay``, ``weight_decouple``, ``decoupled_decay``, ``decoupled``, ``decouple``,
    ``use_decoupled_weight_decay``, ``stable_weight_decay``, ``weight_decay_type`` or ``adam_w_mode``. It has a list of
    the classes of timm, pytorch_optimizer and bitsandbytes without such a key, and looks also at bases that another
    optimizer keeps as an attribute (Lookahead, SAM). For any other base it warns once, and treats the decay as coupled.
    ``weight_decay="decoupled"``, or ``decoupled_weight_decay`` in the groups, says which it is.

    **Other bases.** The steps of the Adam family, Muon, Adafactor and Rprop hardly depend on a gradient's scale, so
    that LARS has almost no effect over them: use :class:`torchlars.LAMB`. LBFGS needs
    ``line_search_fn="strong_wolfe"``, as scaled gradients are not those of the loss, and step lengths that are derived
    from them alone diverge.

    **Dialects.** Other implementations of LARS differ in five places, with γ for the group's lr at this step:

    - ``clip=True``: *r* ← min(*r* / γ, 1), so that *r* is a layer's learning rate and γ its upper bound. If γ is 0, as
      in the first step of some warm-ups, *r* is 1: parameters do not move, but momentum accumulates whole gradients.
    - ``norm="decayed"``: ‖g + λw‖ instead of ‖g‖ + λ‖w‖.
    - ``lr_in_momentum=True``: the gradient becomes γ · r · (g + λw), and the base steps with an lr of 1. The base's own
      step hooks read an lr of 1, and changes that they make to it are lost.
    - ``always_adapt=False``: *r* is 1, and not clipped, for layers without weight decay, coupled or decoupled.
    - ``apply_to="update"``: the base takes its whole step with its own gradient, weight decay and momentum, and then w
      ← w_old + r · (w − w_old). Gradients stay as they were, parameters are copied for the duration of a step, and the
      precision is that of :class:`torchlars.LAMB`.

    "Coming from X" in ``examples/README.md`` lists the combinations that reproduce other implementations.

    **Sharded layers** (``DTensor``, as FSDP2 and tensor parallelism make them) have the trust ratios of whole layers.
    All ranks must take the step with gradients of the same layers; that is not checked. One all-reduce for each process
    group over which layers are split sums their squared norms. (Two, if a base that takes trust ratios asks for those
    of some groups, and LARS adapts others.) FSDP1 is refused. So are flat partitions of several layers, as DeepSpeed
    ZeRO puts them into groups: tensors that are no :class:`torch.nn.Parameter`, were added after the optimizer was
    wrapped, and do not have the shape of the layer that was in their place.

    **Mixed precision.** Over a base that unscales gradients itself (``fused=True``, :class:`torchlars.optim.SGD`), a
    :class:`torch.amp.GradScaler` leaves that to :meth:`step`, which reads neither the scale nor the overflow flag on
    the host. Gradients are unscaled as they are adapted. If they overflowed, nothing is written.

    Parameters, groups, state and hyper-parameters are the base's, and everything that works on a torch optimizer works
    on this one. A group may hold each option but ``weight_decay`` (there it is the base's) as a key. With
    ``trust_coef=None`` the base steps it as it is, weight decay included; with ``lr_in_momentum=True`` beside it, lr is
    in its momentum. A key that the base itself has, as Adam has ``eps``, is the base's.

    Args:
        optimizer: the base, any :class:`torch.optim.Optimizer`. Kept as ``.optim``.
        eps: ε ≥ 0, in units of a gradient's norm.
        trust_coef: η > 0, the length of a step relative to the weights', per unit of lr.
        clip: whether to limit each layer's learning rate to the group's, by *r* ← min(*r* / γ, 1).
        norm: ``"raw"`` or ``"decayed"``, the norms in the denominator of *r*.
        lr_in_momentum: whether lr multiplies gradients instead of steps. Needs a base whose step is linear in lr:
            :class:`torch.optim.SGD` or a subclass.
        apply_to: ``"gradient"`` or ``"update"``, what *r* multiplies.
        always_adapt: whether layers of groups with a weight decay of 0 are adapted; else their *r* is 1, not clipped.
        weight_decay: None to ask the base which kind it has; ``"decoupled"`` where it decouples and does not say so.
            A group says it by a key ``decoupled_weight_decay``, True or False.

    Raises:
        TypeError: ``optimizer`` is no optimizer, an argument is of the wrong kind, or the base's steps do not allow it.
        ValueError: an argument is out of its range, two contradict each other, the base is differentiable, or a group
            holds an option under the name of another library, such as ``trust_coefficient``, which the base does not
            own. Loading a state dict raises likewise.

    Source: You, Gitman and Ginsburg, *Large Batch Training of Convolutional Networks*, 2017, arXiv:1708.03888. The
    formula of the ratio is theirs, with ε added. Where they keep lr inside the momentum (``lr_in_momentum=True``) the
    default follows kakaobrain/torchlars 0.1.2, which does not.

    Example:
        >>> optimizer = LARS(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4))
        >>> loss.backward()
        >>> optimizer.step()
    """

    options: ClassVar = {
        "eps": non_negative_number,
        "trust_coef": positive_number,
        "clip": true_or_false,
        "norm": one_of("raw", "decayed"),
        "lr_in_momentum": true_or_false,
        "apply_to": one_of("gradient", "update"),
        "always_adapt": true_or_false,
        "weight_decay": _none_or_decoupled,
    }
    wrapper_only = frozenset({"weight_decay"})
    state_key = "lars"
    ratio_of = "gradient"

    eps: float
    trust_coef: float
    clip: bool
    norm: Literal["raw", "decayed"]
    lr_in_momentum: bool
    apply_to: Literal["gradient", "update"]
    always_adapt: bool = True  # pickles of older versions have none
    weight_decay: Literal["decoupled"] | None

    def __init__(
        self,
        optimizer: Optimizer,
        eps: float = 1e-8,
        trust_coef: float = 0.001,
        *,
        clip: bool = False,
        norm: Literal["raw", "decayed"] = "raw",
        lr_in_momentum: bool = False,
        apply_to: Literal["gradient", "update"] = "gradient",
        always_adapt: bool = True,
        weight_decay: Literal["decoupled"] | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            eps=eps,
            trust_coef=trust_coef,
            clip=clip,
            norm=norm,
            lr_in_momentum=lr_in_momentum,
            apply_to=apply_to,
            always_adapt=always_adapt,
            weight_decay=weight_decay,
        )
        self._zero_layers = ZeroLayers()
        for group in self.param_groups:
            self._zero_layers.watch(group["params"])
        if self._guesses_decay():
            self._warn_of_guess()

    if TYPE_CHECKING:

        @classmethod
        def over(  # type: ignore[override]
            cls, base: type[Optimizer], **options: Unpack[LARSOptions]
        ) -> type[LARSOver]:
            """Return a class that constructs a base and wraps it: :meth:`torchlars.wrapper.OptimizerWrapper.over`."""
            ...

    def check_options(self, of_group: str, options: dict[str, Any]) -> None:
        """Raise if options do not go together, or not with the base."""
        if options["apply_to"] == "update":
            check_update_is_scalable(self.optim, f"apply_to='update'{of_group}")
        if not options["lr_in_momentum"]:
            return
        if options.get("weight_decay") == "decoupled":
            raise ValueError(
                f"lr_in_momentum=True{of_group} hides lr from the base, which decoupled weight decay is multiplied by "
                "(got: weight_decay='decoupled')"
            )
        if options["apply_to"] == "update":
            raise ValueError(
                f"lr_in_momentum=True{of_group} needs apply_to='gradient' (got: 'update', which scales the whole step, "
                "with lr and momentum in it)"
            )
        if not steps_as(self.optim, torch.optim.SGD):
            raise TypeError(
                f"lr_in_momentum=True{of_group} needs a base whose step is linear in lr: torch.optim.SGD, "
                f"torchlars.optim.SGD or a subclass (got: {type(self.optim).__name__})"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base. It may hold any of the wrapper's options as keys."""
        guessed = self._guesses_decay()
        super().add_param_group(param_group)
        if self._guesses_decay() and not guessed:
            self._warn_of_guess()
        if self._zero_layers is None:
            self._zero_layers = ZeroLayers()
        self._zero_layers.watch(self.param_groups[-1]["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, as :meth:`torchlars.wrapper.OptimizerWrapper.load_state_dict` does."""
        guessed = self._guesses_decay()
        super().load_state_dict(state_dict)
        if self._guesses_decay() and not guessed:
            self._warn_of_guess()

    def _guesses_decay(self) -> bool:
        """Tell whether there is weight decay of which nobody says whether it is coupled."""
        for index, group in enumerate(self.param_groups):
            if decouples(self.optim, group) is None:
                how = self._adaptation(index, group)
                if how is not None and how.weight_decay != 0:
                    return True
        return False

    def _warn_of_guess(self) -> None:
        name = type(self).__name__
        warn_of_caller(
            f"{type(self.optim).__name__} does not say whether its weight decay is decoupled; {name} takes it for "
            f"coupled, and adds it to gradients. If it is decoupled, give weight_decay='decoupled' to {name}; if not, "
            "put decoupled_weight_decay=False into its parameter groups"
        )


class LARC(LARS):
    r"""LARS under the name and with the defaults of NVIDIA's apex: ``LARS(optimizer, eps, trust_coef, clip=clip)``.

    With ``clip=True`` the trust ratio is min(*r* / γ, 1), so that no layer's learning rate *r* is above the group's γ;
    with ``clip=False`` this is plain LARS. Groups may hold all keys that they may hold under :class:`LARS`. For its
    other arguments ask for ``LARS(optimizer, 1e-8, 0.02, clip=True, ...)``.

    Args:
        optimizer: the base, any :class:`torch.optim.Optimizer`. Kept as ``.optim``.
        trust_coef: η > 0. ``trust_coefficient`` there.
        clip: whether no layer's learning rate is to be above the group's.
        eps: ε ≥ 0, in units of a gradient's norm.
        always_adapt: as in :class:`LARS`. apex adapts all layers.

    Raises:
        TypeError, ValueError: as :class:`LARS` does.

    Source: ``apex.parallel.LARC``. There a layer whose weights or gradient are all zero takes no weight decay, and the
    whole of γ where that is above 1; here its ratio is 1 before it is clipped.

    Example:
        >>> optimizer = LARC(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        trust_coef: float = 0.02,
        clip: bool = True,
        eps: float = 1e-8,
        *,
        always_adapt: bool = True,
    ) -> None:
        super().__init__(optimizer, eps, trust_coef, clip=clip, always_adapt=always_adapt)

    if TYPE_CHECKING:

        @classmethod
        def over(  # type: ignore[override]
            cls, base: type[Optimizer], **options: Unpack[CommonOptions]
        ) -> type[LARCOver]:
            """Return a class that constructs a base and wraps it: :meth:`torchlars.wrapper.OptimizerWrapper.over`."""
            ...


if TYPE_CHECKING:

    class LARSOver(LARS):
        """A class of :meth:`LARS.over`. Type checkers are not told its base's arguments."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    class LARCOver(LARC):
        """A class of :meth:`LARC.over`. Type checkers are not told its base's arguments."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
