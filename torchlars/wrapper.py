"""A torch.optim.Optimizer that wraps another one and forwards the protocol.

Schedulers, scalers, trainers and checkpoints accept a wrapper as an optimizer. Parameters, groups and state are the
base optimizer's; the wrapper has options only, whose meaning is not known here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from inspect import signature
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from torchlars import amp
from torchlars.bases import bases
from torchlars.hidden import Hidden
from torchlars.options import Group, finite_number, non_negative_number, number_in
from torchlars.over import ClassOver, class_over

__all__: list[str] = []

StateDict = dict[str, Any]


class OptimizerWrapper(Optimizer):
    """An optimizer whose groups, state and defaults are the base optimizer's. Subclasses add ``step`` and options.

    It does not call ``super().__init__``, which would create groups and state of its own, and has no ``__getattr__``,
    which would register hooks on the base. Groups and state are properties, as loading a state dict replaces both.

    Args:
        optimizer: the base optimizer.
        **options: the wrapper's own values, one for each name in :attr:`options`.

    Raises:
        TypeError: the base is no optimizer, or an option is of the wrong kind.
        ValueError: an option has an impossible value, or the base was built with ``differentiable=True``.
    """

    #: The wrapper's options. ``check(name, value)`` returns the value as a plain Python one, or raises.
    options: ClassVar[dict[str, Callable[[str, Any], Any]]]
    #: The options that a group cannot hold as a key.
    wrapper_only: ClassVar[frozenset[str]] = frozenset()
    #: The wrapper's own key in a state dict.
    state_key: ClassVar[str]

    optim: Optimizer
    _hidden: Hidden

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        if not isinstance(optimizer, Optimizer):
            name = type(self).__name__
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer (got: {type(optimizer).__name__}); "
                f"construct the base first: {name}(torch.optim.SGD(params, lr=0.1)); "
                f"where only params are passed, as by a framework, call {name}.over(torch.optim.SGD)"
            )
        if isinstance(optimizer, OptimizerWrapper):
            raise TypeError(
                f"optimizer must be a base optimizer, not itself a wrapper (got: {type(optimizer).__name__})"
            )
        checked = {name: check(name, options[name]) for name, check in self.options.items()}
        self.__setstate__({"optim": optimizer, **checked})
        self.check_options("", checked)
        for index, group in enumerate(self.param_groups):
            self._check_keys(index, group)
            self.check_group(index, group)

    @classmethod
    def over(cls, base: type[Optimizer], **options: Any) -> type[Any]:
        """Return a class that constructs a base and wraps it, for whatever takes a class and not an optimizer.

        Its instances are instances of this wrapper. It takes the base's arguments, and the wrapper's by keyword:
        ``LARS.over(SGD)(params, lr=0.1, trust_coef=0.02)`` and ``LARS.over(SGD, trust_coef=0.02)(params, lr=0.1)`` are
        ``LARS(SGD(params, lr=0.1), trust_coef=0.02)``. A name that both have is the base's, as ``weight_decay`` is, and
        Adam's ``eps``: give such an option here. The same arguments give the same class as long as it is referenced.
        The class and its instances can be pickled if the base's class can. A configuration that names classes finds a
        derived one in a module of yours: ``class LARSSGD(LARS.over(SGD)): pass``.

        Args:
            base: the base's class.
            **options: the wrapper's own arguments, the defaults of the class.

        Raises:
            TypeError: ``base`` is no class of optimizers, or the wrapper has no such option, or of another kind.
            ValueError: an option has an impossible value.
        """
        if isinstance(cls, ClassOver):
            raise TypeError(f"{cls.__name__} is over a base already (got: {base!r})")
        if not (isinstance(base, type) and issubclass(base, Optimizer)) or issubclass(base, OptimizerWrapper):
            raise TypeError(
                f"base must be a class of optimizers, itself no wrapper (got: {base!r}); "
                f"for example {cls.__name__}.over(torch.optim.SGD)"
            )
        known = [name for name in signature(cls.__init__).parameters if name in cls.options]
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise TypeError(
                f"{cls.__name__} has the options {', '.join(known)} (got: {', '.join(unknown)}); "
                f"arguments of the base are for the class: {cls.__name__}.over({base.__name__})(params, lr=0.1)"
            )
        checked = {name: cls.options[name](name, value) for name, value in options.items()}
        return class_over(cls, base, checked)

    # What belongs to the base.

    @property
    def param_groups(self) -> list[Group]:
        """The base optimizer's parameter groups."""
        return self.optim.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[Group]) -> None:
        self.optim.param_groups = param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's state."""
        return self.optim.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optim.state = state

    @property
    def defaults(self) -> Group:
        """The base optimizer's defaults."""
        return self.optim.defaults

    @defaults.setter
    def defaults(self, defaults: Group) -> None:
        self.optim.defaults = defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves it to :meth:`step` to unscale gradients and to skip it: if the base can do so."""
        return amp.step_supports_scaling(self.optim)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base does."""
        self.optim.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group to the base. It may hold any of the wrapper's options as keys."""
        if isinstance(param_group, dict):  # otherwise the base raises
            self._check_keys(len(self.param_groups), param_group)
            self.check_group(len(self.param_groups), param_group)
        self.optim.add_param_group(param_group)

    def train(self, mode: bool = True) -> None:
        """Tell the base that training goes on, if that matters to it (it does to schedule-free ones)."""
        if mode and hasattr(self.optim, "train"):
            self.optim.train()
        elif not mode:
            self.eval()

    def eval(self) -> None:
        """Tell the base that evaluation begins, if that matters to it."""
        if hasattr(self.optim, "eval"):
            self.optim.eval()

    # What belongs to the wrapper.

    def check_group(self, index: int, group: Group) -> None:
        """Raise if an option that the ``index``-th group holds is wrong, or does not go together with the others."""
        raise NotImplementedError

    def check_options(self, of_group: str, options: Group) -> None:
        """Raise if options do not go together, or not with the base; ``of_group`` says whose they are."""

    def _group_keys(self, group: Group) -> Group:
        """Return what a group says of the wrapper's options."""
        return {
            name: group[name]
            for name in self.options
            if name in group and name not in self.wrapper_only and not self._is_of_base(name)
        }

    def _check_keys(self, index: int, group: Group) -> None:
        """Raise if a group has another implementation's name for one of our options, which nothing would read."""
        foreign = [name for name in FOREIGN_KEYS if name in group and not self._is_of_base(name)]
        if foreign:
            got = ", ".join(f"{name}={group[name]!r}" for name in foreign)
            ours = "; ".join(f"instead of {name} say {FOREIGN_KEYS[name]}" for name in foreign)
            raise ValueError(
                f"parameter group {index} must hold options under their names in torchlars (got: {got}); {ours}"
            )

    def _is_of_base(self, name: str) -> bool:
        """Tell whether a key of a group is the base's own, or that of a base which the base is wrapped around."""
        return any(name in base.defaults for base in bases(self.optim))

    def __getstate__(self) -> StateDict:
        """Return the base and the options. Hooks are dropped, as torch drops them.

        Not ``__dict__``: a scheduler leaves an attribute ``step`` there, bound to this object, which a copy would call.
        """
        return {"optim": self.optim, **{name: getattr(self, name) for name in self.options}}

    def __setstate__(self, state: StateDict) -> None:
        """Set what is given. Groups, state and defaults are set on the base."""
        of_base = {name: value for name, value in state.items() if name in ("param_groups", "state", "defaults")}
        self.__dict__.update((name, value) for name, value in state.items() if name not in of_base)
        if of_base:
            self.optim.__setstate__(of_base)
        self.__dict__.setdefault("_hidden", Hidden())
        had_differentiable = "differentiable" in self.defaults
        Optimizer.__setstate__(self, {})  # makes every hook table that this torch knows, and hooks step
        if not had_differentiable:
            self.defaults.pop("differentiable", None)

    def _own_values(self) -> StateDict:
        return {name: check(name, getattr(self, name)) for name, check in self.options.items()}

    def state_dict(self) -> StateDict:
        """Return the base's state dict, with the wrapper's options under one extra key."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict: StateDict = {**self.optim.state_dict(), self.state_key: self._own_values()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this wrapper, or one of the plain base.

        Missing entries keep their values: the wrapper's options, and those that the groups hold.

        Raises:
            TypeError, ValueError: the wrapper's entry, an option in a group or the state is wrong.

        Whatever raises, nothing was loaded then.
        """
        state_dict = state_dict.copy()  # hooks may edit it
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        own_values = self._checked(state_dict.get(self.state_key, {}))
        self._check_state_of_base(state_dict)
        group_options = [self._group_keys(group) for group in self.param_groups]
        before = {name: getattr(self, name) for name in self.options}
        param_groups, state = self.param_groups, self.state
        self.__dict__.update(own_values)
        try:
            self.check_options(f" of state_dict[{self.state_key!r}]", {**before, **own_values})
            for index, (own, group) in enumerate(zip(group_options, state_dict.get("param_groups", ()), strict=False)):
                self._check_keys(index, group)
                self.check_group(index, {**own, **group})
            self.optim.load_state_dict({key: value for key, value in state_dict.items() if key != self.state_key})
        except BaseException:
            self.__dict__.update(before)
            self.param_groups, self.state = param_groups, state  # torch replaces both, and does not change them
            raise
        for group, options in zip(self.param_groups, group_options, strict=True):
            for name, value in options.items():
                group.setdefault(name, value)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_state_of_base(self, state_dict: StateDict) -> None:
        """Raise if a base would load a state dict in part only, or without noticing that it is wrong."""
        groups, state = state_dict.get("param_groups", ()), state_dict.get("state", {})
        if not isinstance(state, dict):
            raise TypeError(f"state_dict['state'] must be a dict (got: {type(state).__name__})")
        for key, value in state.items():
            where = f"state_dict['state'][{key!r}]"
            if not isinstance(value, dict):
                if isinstance(key, str):
                    continue  # some bases keep there, under a name, what is no parameter's
                raise TypeError(f"{where} must be a dict (got: {type(value).__name__})")
            for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
                if not isinstance(value.get(name), Tensor | None):
                    raise TypeError(f"{where}[{name!r}] must be a tensor (got: {type(value[name]).__name__})")
        for index, group in enumerate(groups):
            if not isinstance(group, dict):
                raise TypeError(f"state_dict['param_groups'][{index}] must be a dict (got: {type(group).__name__})")
            for name in ("lr", "weight_decay", "momentum", "dampening"):
                value, default = group.get(name), self.defaults.get(name)
                is_number = isinstance(default, Real | Tensor) or (name in ("lr", "weight_decay") and value is not None)
                is_on_device = isinstance(value, Tensor) and value.device.type != "cpu"  # then it is not looked at
                if name in group and is_number and not is_on_device:
                    what = f"{name} of parameter group {index}"
                    check = finite_number if name == "dampening" else non_negative_number
                    check(what, number_in(what, value))

    def _checked(self, own_values: Any) -> StateDict:
        where = f"state_dict[{self.state_key!r}]"
        if not isinstance(own_values, dict):
            raise TypeError(f"{where} must be a dict of options (got: {type(own_values).__name__})")
        unknown = sorted(map(str, own_values.keys() - self.options.keys()))
        if unknown:
            raise ValueError(f"{where} must hold {', '.join(self.options)} (got: {', '.join(unknown)})")
        return {name: self.options[name](f"{where}[{name!r}]", value) for name, value in own_values.items()}

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.options)
        return f"{type(self).__name__}({values}, optim={self.optim!r})"


#: What other implementations of LARS and LAMB call their options in parameter groups, and what to say here instead.
FOREIGN_KEYS = {
    "trust_coefficient": "trust_coef",  # apex, quadra, lightning-bolts, lightly, MAE, MoCo v3, pytorch_optimizer
    "trust_coeff": "trust_coef",  # timm
    "eta": "trust_coef",  # Barlow Twins, VICReg, VISSL, DINO, solo-learn, OpenMMLab, the 2018 blog
    "eeta": "trust_coef",  # SimCLR, MLPerf, ColossalAI, Intel
    "lars_coeff": "trust_coef",  # Paddle
    "trust_clip": "clip",  # timm
    "clip_lr": "clip",  # solo-learn
    "epsilon": "eps",  # SimCLR, ColossalAI, Intel, Paddle
    "lars_weight_decay": "weight_decay",  # Paddle
    "max_unorm": "the trust_coef of LAMB(..., clip=True)",  # bitsandbytes
    "weight_decay_filter": "weight_decay=0 in a group of what it excludes",  # Barlow Twins, VICReg, DINO
    "lars_adaptation_filter": "trust_coef=None in a group of what it excludes",  # Barlow Twins, VICReg, DINO
    "exclude_bias_n_norm": "trust_coef=None in a group of biases and norms",  # solo-learn
    "lars_exclude": "trust_coef=None, where it is True",  # OpenMMLab
    "exclude": "trust_coef=None, where it is True",  # VISSL
    "lars": "trust_coef=None and weight_decay=0, where it is False",  # Intel
}
