"""The manners of an optimizer that owns nothing.

A wrapper *is* a :class:`torch.optim.Optimizer` to schedulers, scalers, trainers and checkpoints, while parameters,
groups and state stay the base optimizer's. What it owns is a few numbers, its options. Nothing here knows what those
mean.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from copyreg import __newobj__  # type: ignore[attr-defined]
from inspect import signature, unwrap
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars import amp

if TYPE_CHECKING:
    from typing_extensions import Self

__all__: list[str] = []

Group = dict[str, Any]
StateDict = dict[str, Any]


class OptimizerWrapper(Optimizer):
    """Borrows a base optimizer's groups, state and defaults; to be subclassed with a ``step`` and its options.

    There is no ``super().__init__``, which would create groups and state of its own, and no ``__getattr__``, which
    would send hooks to the base. Aliases of groups and state would go stale, since loading a state dict replaces them.

    Args:
        optimizer: the base optimizer.
        **options: the wrapper's own values, one for each name in :attr:`options`.

    Raises:
        TypeError: the base is no optimizer, or an option is of the wrong kind.
        ValueError: an option has an impossible value, or the base was built with ``differentiable=True``.
    """

    #: The wrapper's options. ``check(name, value)`` returns the value as a plain Python one, or raises.
    options: ClassVar[dict[str, Callable[[str, Any], Any]]]
    #: Those of them that a group cannot have as a key: there it is the base's.
    wrapper_only: ClassVar[frozenset[str]] = frozenset()
    #: The option that a group sets to None to be left to the base, untouched.
    opt_out: ClassVar[str]
    #: The wrapper's own key in a state dict.
    state_key: ClassVar[str]
    #: Whether this is a class made by :meth:`over`, or derived from one.
    _is_over_a_base: ClassVar[bool] = False

    optim: Optimizer
    _hidden: HiddenHyperParameters

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        if not isinstance(optimizer, Optimizer):
            name = type(self).__name__
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer (got: {type(optimizer).__name__}); "
                f"construct the base first: {name}(torch.optim.SGD(params, lr=0.1))"
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
            self.group_options(index, group)

    @classmethod
    def over(cls, base: type[Optimizer], **options: Any) -> type[Self]:
        """Return a class that constructs a base and wraps it, for whatever takes a class and not an optimizer.

        Its signature is the base's: ``LARS.over(SGD, trust_coef=0.02)(params, lr=0.1)`` is
        ``LARS(SGD(params, lr=0.1), trust_coef=0.02)``, and an instance of ``LARS`` too. The same arguments give the
        same class. Instances can be copied and pickled. To be found by name, in a configuration file or a pickle of the
        class itself, derive one in a module of yours: ``class LARSSGD(LARS.over(SGD)): pass``.

        Args:
            base: the base's class.
            **options: the wrapper's own arguments.

        Raises:
            TypeError: ``base`` is no class of optimizers, or the wrapper has no such option, or of another kind.
            ValueError: an option has an impossible value.
        """
        if cls._is_over_a_base:
            raise TypeError(f"{cls.__name__} is over a base already (got: {base!r})")
        if not (isinstance(base, type) and issubclass(base, Optimizer)) or issubclass(base, OptimizerWrapper):
            raise TypeError(
                f"base must be a class of optimizers, itself no wrapper (got: {base!r}); "
                f"for example {cls.__name__}.over(torch.optim.SGD)"
            )
        known = [name for name in signature(cls.__init__).parameters if name in cls.options]
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise TypeError(f"{cls.__name__} has the options {', '.join(known)} (got: {', '.join(unknown)})")
        checked = {name: cls.options[name](name, value) for name, value in options.items()}
        return _class_over(cls, base, checked)  # type: ignore[no-any-return]

    # What is borrowed.

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
        if isinstance(param_group, dict):  # else the base says so
            self._check_keys(len(self.param_groups), param_group)
            self.group_options(len(self.param_groups), param_group)
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

    # What is owned.

    def group_options(self, index: int, group: Group) -> Group | None:
        """Return the options of the ``index``-th group, or None if it opts out.

        A key of the group comes before the wrapper's own value, unless the base itself has a key of that name: Adam's
        ``eps`` is Adam's.
        """
        if group.get("differentiable", self.defaults.get("differentiable", False)):
            raise ValueError(
                f"differentiable must be False (group: {index}, got: True); {type(self).__name__} writes in place, "
                "which cannot be differentiated through"
            )
        own = self._group_keys(group)
        opts_out = own.get(self.opt_out, self.opt_out) is None
        own = {
            name: self.options[name](f"{name} of parameter group {index}", value)
            for name, value in own.items()
            if not (opts_out and name == self.opt_out)
        }
        if opts_out:
            return None
        options = {
            name: own[name] if name in own else check(name, getattr(self, name)) for name, check in self.options.items()
        }
        self.check_options(f" of parameter group {index}", options)
        return options

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

    def check_options(self, of_group: str, options: Group) -> None:
        """Raise if options do not go together, or not with the base; ``of_group`` says whose they are."""

    def __getstate__(self) -> StateDict:
        """Return what the wrapper owns. Hooks are dropped, as torch drops them.

        Not ``__dict__``: a scheduler leaves an attribute ``step`` there which is bound to this very object, and a copy
        that took it along would step the original.
        """
        return {"optim": self.optim, **{name: getattr(self, name) for name in self.options}}

    def __setstate__(self, state: StateDict) -> None:
        """Set what is given. What is the base's is given to the base: ``__setstate__({"state": ...})`` resets that."""
        of_base = {name: value for name, value in state.items() if name in ("param_groups", "state", "defaults")}
        self.__dict__.update((name, value) for name, value in state.items() if name not in of_base)
        if of_base:
            self.optim.__setstate__(of_base)
        self.__dict__.setdefault("_hidden", HiddenHyperParameters())
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

        What it says nothing of stays as it is: the wrapper's own values, and the options that the groups hold.

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
                self.group_options(index, {**own, **group})
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
        """Raise if what a base is to load would be loaded in part, or be found to be wrong in a later step only."""
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


_classes_over: dict[Any, Any] = {}


def _class_over(cls: type[OptimizerWrapper], base: type[Optimizer], options: dict[str, Any]) -> Any:
    """Return the class of :meth:`OptimizerWrapper.over`."""
    key = (cls, base, *sorted(options.items()))
    if key not in _classes_over:

        def __init__(self: OptimizerWrapper, *args: Any, **kwargs: Any) -> None:
            cls.__init__(self, base(*args, **kwargs), **options)

        def __reduce__(self: OptimizerWrapper) -> tuple[Any, ...]:
            if type(self) is not _classes_over[key]:  # but derived from it: found by its own name
                return __newobj__, (type(self),), self.__getstate__()
            return _new_over, (cls, base, options), self.__getstate__()

        __init__.__signature__ = signature(base.__init__)  # type: ignore[attr-defined]
        names = {"__init__": __init__, "__reduce__": __reduce__, "__module__": cls.__module__, "__doc__": base.__doc__}
        names["_is_over_a_base"] = True
        _classes_over[key] = type(f"{cls.__name__}Over{base.__name__}", (cls,), names)
    return _classes_over[key]


def _new_over(cls: type[OptimizerWrapper], base: type[Optimizer], options: dict[str, Any]) -> Any:
    """Return an instance of such a class without calling its constructor, for copies and pickles."""
    made = _class_over(cls, base, options)
    return made.__new__(made)


class HiddenHyperParameters:
    """Hyper-parameters that the base must not see while its own arithmetic runs."""

    def __init__(self) -> None:
        self._hidden: list[tuple[Group, str, Any, Any]] = []

    def hide(self, group: Group, name: str, value: Any) -> None:
        """Put ``value`` in the place of what the group holds."""
        self._hidden.append((group, name, group[name], value))
        group[name] = value

    def restore(self) -> None:
        """Put back the very objects that were there."""
        while self._hidden:
            group, name, before, _ = self._hidden[-1]
            group[name] = before
            self._hidden.pop()  # last, so that nothing is lost if this is interrupted

    def restore_what_was_left(self) -> None:
        """Put back what an interrupted step left, unless the user has set it since."""
        while self._hidden:
            group, name, before, value = self._hidden[-1]
            if group.get(name) is value:
                group[name] = before
            self._hidden.pop()


#: What torch makes of every ``step``: a function that calls global hooks and the optimizer's own around it.
_HOOKED = Optimizer.profile_hook_step(lambda self: None).__code__


def step_of_base(optim: Optimizer) -> Callable[..., Any]:
    """Return a base's ``step``. While a CUDA graph is captured, it raises if the step has created tensors of state.

    Such a graph creates them anew at every replay. The bases of torch do not check that. If the step raises, for this
    or any other reason, all state is put back, also that of optimizers that the base is wrapped around.
    """
    step = _step_of_base(optim)
    if torch.compiler.is_compiling() or not is_capturing():
        return step

    def step_in_capture(*args: Any, **kwargs: Any) -> Any:
        before = [
            (base.state, {p: dict(s) for p, s in base.state.items() if isinstance(s, dict)}) for base in bases(optim)
        ]
        try:
            result = step(*args, **kwargs)
            _check_tensors_of_state(optim, before)
        except BaseException:
            for states, old_states in before:
                for param, state in states.items():
                    if isinstance(state, dict):
                        state.clear()
                        state.update(old_states.get(param, {}))
            raise
        return result

    return step_in_capture


def _check_tensors_of_state(optim: Optimizer, before: Iterable[tuple[Any, dict[Any, dict[Any, Any]]]]) -> None:
    """Raise if tensors of state that a CUDA graph works on are new: each pair has state, and what it was before."""
    created: set[str] = set()
    replaced: set[str] = set()
    for states, old_states in before:
        for param, state in states.items():
            old_state = old_states.get(param, {})
            for key, value in state.items() if isinstance(state, dict) else ():
                if isinstance(value, Tensor) and value is not old_state.get(key) and is_capturing(value.device):
                    (replaced if isinstance(old_state.get(key), Tensor) else created).add(str(key))
    if replaced:
        raise RuntimeError(
            f"a step of {type(optim).__name__} cannot be captured in a CUDA graph: it replaces tensors of its state, "
            f"and every replay would begin from the same ones (replaced: {', '.join(sorted(replaced))}); use a base "
            "that updates its state in place"
        )
    if created:
        raise RuntimeError(
            f"the state of {type(optim).__name__} must exist before a CUDA graph is captured, or every replay begins "
            f"it anew (created in the capture: {', '.join(sorted(created))}); take a step before the capture"
        )


def is_capturing(device: torch.device | None = None) -> bool:
    """Return whether the current stream captures a CUDA graph. Always False of a device that is not CUDA."""
    if device is not None and device.type != "cuda":
        return False
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _step_of_base(optim: Optimizer) -> Callable[..., Any]:
    """Return a base's ``step`` without torch's global hooks, which are called once a step, for the wrapper.

    The base's own hooks are called. Where something else than torch's own functions, or the counter of a scheduler
    around them, stands in the place of its step, that is returned.
    """
    is_counted = getattr(optim.step, "_wrapped_by_lr_sched", False)
    hooked: Any = getattr(optim.step, "__wrapped__" if is_counted else "__func__", None)
    if torch.compiler.is_compiling() or getattr(hooked, "__code__", None) is not _HOOKED:
        return optim.step

    def step(*args: Any, **kwargs: Any) -> Any:
        all_args: Any = (optim, *args)
        if is_counted:
            optim._opt_called = True  # type: ignore[attr-defined]  # which is all that the counter does
        for pre_hook in optim._optimizer_step_pre_hooks.values():
            replaced = pre_hook(optim, all_args, kwargs)
            if replaced is not None:
                if not (isinstance(replaced, tuple) and len(replaced) == 2):
                    raise RuntimeError(
                        f"step pre-hooks must return None or a tuple of new args and kwargs (got: {replaced!r})"
                    )
                all_args, kwargs = replaced
        result = hooked.__wrapped__(*all_args, **kwargs)
        optim._optimizer_step_code()
        for post_hook in optim._optimizer_step_post_hooks.values():
            post_hook(optim, all_args, kwargs)
        return result

    return step


def bases(optim: Any) -> list[Optimizer]:
    """Return a base optimizer and those it is wrapped around, the outermost first.

    Wrappers keep theirs under many names (``optim``, ``optimizer``, ``base_optimizer``, ``_base_optimizer``), and none
    says so. So every attribute counts that is an optimizer. Only stored ones: reading a property runs foreign code.
    """
    found = [optim] if isinstance(optim, Optimizer) else []
    for outer in found:  # grows meanwhile
        for inner in vars(outer).values():
            if isinstance(inner, Optimizer) and not any(inner is other for other in found):
                found.append(inner)
    return found


def is_base(optim: Optimizer, *kinds: type[Optimizer]) -> bool:
    """Tell whether a base optimizer, or one that it is wrapped around, is of a kind."""
    return any(isinstance(base, kinds) for base in bases(optim))


def steps_as(optim: Any, kind: type[Optimizer]) -> bool:
    """Tell whether a base optimizer is of a kind, or hands its step on to one that is, as ZeroRedundancyOptimizer does.

    What keeps its base under another name than ``optim`` may use the lr itself, as ScheduleFreeWrapper does.
    """
    seen: list[Optimizer] = []
    while isinstance(optim, Optimizer) and optim not in seen:
        if isinstance(optim, kind):
            return True
        seen.append(optim)
        optim = vars(optim).get("optim")
    return False


#: The keys of groups and defaults that say whether weight decay is decoupled: by truth, or by any value but "l2".
DECOUPLED_FLAGS = frozenset(
    {
        "decoupled_weight_decay",  # torch
        "weight_decouple",  # pytorch_optimizer, adabelief_pytorch
        "decoupled_decay",  # timm
        "decoupled",  # timm's Adopt
        "decouple",  # Prodigy and D-Adaptation
        "use_decoupled_weight_decay",  # Meta's Distributed Shampoo
        "stable_weight_decay",  # pytorch_optimizer's Adai
        "weight_decay_type",  # pytorch_optimizer's ApolloDQN
        "adam_w_mode",  # Transformer Engine
    }
)

#: The classes whose weight decay does not go through the gradient, and whose groups do not say so. Some have a flag
#: for the way in which it does not, whose False means another way (Kron, NovoGrad, Adan).
DECOUPLED_CLASSES: dict[str, frozenset[str]] = {
    library: frozenset(names.split())
    for library, names in {
        "torch": "Adafactor Muon",
        "timm": "Adafactor AdafactorBigVision Adahessian AdamP AdamWLegacy Adan Kron LaProp Lamb Lars Lion Mars Muon "
        "NAdamW NvNovoGrad RAdamLegacy SGDP SGDW",
        "pytorch_optimizer": "Adan Conda DAdaptAdan DAdaptSGD DASH FAdam FOCUS Fira FlashAdamW GaLore LARS LoRARite "
        "NovoGrad SOAP SPAM SaRA ScheduleFreeAdamW ScheduleFreeRAdam StableSPAM",
        "bitsandbytes": "Optimizer2State Lion Lion8bit Lion32bit PagedLion PagedLion8bit PagedLion32bit",
    }.items()
}

#: Where the optimizers are that are themselves no wrappers, and coupled unless they say so. (Others of torch are.)
PLAIN_BASES = ("torch.optim.", "torchlars.optim.")

#: Those whose weight decay does, and whose groups do not say so, beside torch's own.
COUPLED_CLASSES: dict[str, frozenset[str]] = {
    "timm": frozenset({"NAdamLegacy"}),
    "pytorch_optimizer": frozenset({"AccSGD", "ScheduleFreeSGD"}),
    "bitsandbytes": frozenset({"Optimizer1State", "PytorchLARS"}),
}


def decouples(optim: Optimizer, group: Group) -> bool | None:
    """Tell whether the base shrinks the weights of a group apart from the gradient.

    The group says so, else the defaults of the base or of one that it is wrapped around, else the name of a known
    class, or that it takes trust ratios. None where nobody says.
    """
    says = _says_decoupled(group)
    if says:
        return True
    known = None
    wraps_nothing = type(optim).__module__.startswith(PLAIN_BASES)  # and this runs in every step
    for base in [optim] if wraps_nothing else bases(optim):
        of_class = _known_of_class(type(base))
        if of_class:
            return True
        if of_class is None and getattr(base, "takes_trust_ratios", False):
            of_class = False  # it multiplies them by gradients with their decay
        known = of_class if known is None else known
        says = _says_decoupled(base.defaults) if says is None else says
    return known if says is None else says


def _says_decoupled(options: Group) -> bool | None:
    """Return what a group or defaults say."""
    if DECOUPLED_FLAGS.isdisjoint(options):
        return None
    return any(options[flag] not in (False, None, "l2") for flag in DECOUPLED_FLAGS if flag in options)


_known_of_classes: dict[type[Optimizer], bool | None] = {}


def _known_of_class(cls: type[Optimizer]) -> bool | None:
    """Return :func:`_class_decouples` of a class, which is asked for in every step."""
    if torch.compiler.is_compiling():
        return _class_decouples(cls)
    if cls not in _known_of_classes:
        _known_of_classes[cls] = _class_decouples(cls)
    return _known_of_classes[cls]


def _decays_in_its_step(cls: type[Optimizer]) -> bool:
    """Tell whether a class that is not torch's has a step that is not torch's either, and reads the weight decay."""
    if torch.compiler.is_compiling() or cls.__module__.startswith(PLAIN_BASES) or "step" not in vars(cls):
        return False
    step = unwrap(vars(cls)["step"])  # torch puts the inherited one, wrapped, into every class
    code = getattr(step, "__code__", None)
    module = getattr(step, "__module__", None) or ""  # exec() may make functions without one
    return code is not None and not module.startswith(PLAIN_BASES) and "weight_decay" in code.co_consts


def _class_decouples(cls: type[Optimizer]) -> bool | None:
    """Return what is known of a class, or of the nearest one that it is derived from, without importing its library."""
    for known in cls.__mro__:
        library = known.__module__.partition(".")[0]
        if known.__name__ in DECOUPLED_CLASSES.get(library, ()):
            return True
        if known is Optimizer or _decays_in_its_step(known):
            return None
        if known.__module__.startswith(PLAIN_BASES) or known.__name__ in COUPLED_CLASSES.get(library, ()):
            return False
    return None


#: What other implementations of LARS and LAMB call their options in parameter groups, and what to say here instead.
FOREIGN_KEYS = {
    "trust_coefficient": "trust_coef",  # apex, quadra, lightning-bolts, lightly, pytorch_optimizer
    "trust_coeff": "trust_coef",  # timm
    "eta": "trust_coef",  # Barlow Twins, VICReg, VISSL, the 2018 blog
    "eeta": "trust_coef",  # SimCLR, MLPerf, ColossalAI
    "lars_coeff": "trust_coef",  # Paddle
    "trust_clip": "clip",  # timm
    "clip_lr": "clip",  # solo-learn
    "epsilon": "eps",  # SimCLR, ColossalAI, Paddle
    "lars_weight_decay": "weight_decay",  # Paddle
    "always_adapt": "trust_coef=None in groups without weight decay, where it is False",  # timm
    "max_unorm": "the trust_coef of LAMB(..., clip=True)",  # bitsandbytes
    "weight_decay_filter": "weight_decay=0 in a group of what it excludes",  # Barlow Twins, VICReg
    "lars_adaptation_filter": "trust_coef=None in a group of what it excludes",  # Barlow Twins, VICReg
    "exclude_bias_n_norm": "trust_coef=None in a group of biases and norms",  # solo-learn
    "lars_exclude": "trust_coef=None, where it is True",  # OpenMMLab
}


def weight_decay_of(index: int, group: Group) -> float:
    """Return the weight decay of the ``index``-th group, of whichever kind.

    Raises:
        TypeError, ValueError: it is not a non-negative number.
    """
    name = f"weight_decay of parameter group {index}"
    return non_negative_number(name, number_in(name, group.get("weight_decay", 0.0)))


def learning_rate(optim: Optimizer, index: int, group: Group) -> float | Tensor:
    """Return the learning rate of the base's ``index``-th group: a number, or a tensor whose value is not looked at.

    Raises:
        TypeError, ValueError: there is none, or it is not a non-negative number or a tensor of one element.
    """
    if "lr" not in group:
        raise TypeError(
            f"optimizer must have a learning rate (got: {type(optim).__name__}, without lr in parameter group {index})"
        )
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"lr of parameter group {index} must be a number or a tensor of one element (got: {tuple(lr.shape)})"
            )
        check_can_be_captured(lr)
        return lr
    return non_negative_number(f"lr of parameter group {index}", lr)


def check_can_be_captured(lr: Tensor) -> None:
    """Raise if a learning rate would be copied into a CUDA graph from memory of the host that is gone at its replay."""
    if not torch.compiler.is_compiling() and lr.device.type == "cpu" and is_capturing():
        raise RuntimeError(
            f"lr must be on the parameters' device while a CUDA graph is captured (got: a tensor on {lr.device}); "
            "a number is kept as it is at the capture"
        )


def true_or_false(name: str, value: Any) -> bool:
    """Return a truth value, or raise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False (got: {value!r} of type {type(value).__name__})")
    return value


def one_of(*values: Any) -> Callable[[str, Any], Any]:
    """Return a check that a value is one of several."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str | None) or value not in values:
            kind = TypeError if not isinstance(value, str | None) else ValueError
            raise kind(f"{name} must be {' or '.join(map(repr, values))} (got: {value!r})")
        return value

    return check


def non_negative_number(name: str, value: Any) -> float:
    """Return a finite number that is at least 0, or raise."""
    return _number(name, value, "non-negative", lambda number: number >= 0)


def positive_number(name: str, value: Any) -> float:
    """Return a finite number above 0, or raise."""
    return _number(name, value, "positive", lambda number: number > 0)


def finite_number(name: str, value: Any) -> float:
    """Return a finite number, or raise."""
    return _number(name, value, "finite", lambda number: True)


def _number(name: str, value: Any, kind: str, in_range: Callable[[float], bool]) -> float:
    is_float = type(value) is float  # which is asked first because it is quick: this runs in every step
    if not is_float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name} must be a {kind} number (got: {value!r} of type {type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not in_range(number):
        raise ValueError(f"{name} must be a {kind} number (got: {value!r})")
    return number


def number_in(name: str, value: Any) -> Any:
    """Return the number in a tensor of one element, as schedulers leave in groups, and all else as it is."""
    if type(value) is float or not isinstance(value, Tensor):  # the first is quick: this runs in every step
        return value
    if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a number (got: a tensor of shape {tuple(value.shape)} and {value.dtype})")
    if value.device.type != "cpu":
        raise TypeError(
            f"{name} must be a number or a tensor on the CPU (got: one on {value.device}, whose value the host would "
            "have to wait for in every step); pass its .item()"
        )
    return float(value.detach())
