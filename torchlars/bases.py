"""What is known of a base optimizer: which it is, what its weight decay is, and how its step is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import unwrap
from itertools import compress, repeat
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlars.options import Group, is_capturing

__all__: list[str] = []

#: The code of the function that torch wraps around every ``step``, which calls global hooks and the optimizer's own.
_HOOKED = Optimizer.profile_hook_step(lambda self: None).__code__


def step_of_base(optim: Optimizer) -> Callable[..., Any]:
    """Return a base's ``step``. While a CUDA graph is captured, it raises if the step has created tensors of state.

    Such a graph creates them anew at every replay. The bases of torch do not check that. If the step raises, for this
    or any other reason, all state is put back, also that of optimizers that the base is wrapped around.
    """
    if torch.compiler.is_compiling():
        return optim.step
    step = _step_of_base(optim)
    if not is_capturing():
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


def _step_of_base(optim: Optimizer) -> Callable[..., Any]:
    """Return a base's ``step`` without torch's global hooks, which are called once a step, for the wrapper.

    The base's own hooks are called. If ``step`` was replaced by anything but torch's own functions and the counter of a
    scheduler around them, the replacement is returned.
    """
    is_counted = getattr(optim.step, "_wrapped_by_lr_sched", False)
    hooked: Any = getattr(optim.step, "__wrapped__" if is_counted else "__func__", None)
    if getattr(hooked, "__code__", None) is not _HOOKED:
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
    for outer in found:  # grows during the iteration
        values = vars(outer).values()
        for inner in compress(values, map(isinstance, values, repeat(Optimizer))):
            if not any(inner is other for other in found):
                found.append(inner)
    return found


def is_base(optim: Optimizer, *kinds: type[Optimizer]) -> bool:
    """Tell whether a base optimizer, or one that it is wrapped around, is of a kind."""
    return any(isinstance(base, kinds) for base in bases(optim))


def steps_as(optim: Any, kind: type[Optimizer]) -> bool:
    """Tell whether a base optimizer is of a kind, or hands its step on to one that is, as ZeroRedundancyOptimizer does.

    A wrapper that keeps its base under another name than ``optim`` is not looked into: it may use lr itself, as
    ScheduleFreeWrapper does.
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

#: The modules of optimizers that wrap no other one, and whose weight decay is coupled unless they say otherwise.
PLAIN_BASES = ("torch.optim.", "torchlars.optim.")

#: Classes with coupled weight decay whose groups do not say so, besides torch's own.
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
    for base in bases(optim):
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


_known_of_classes: WeakKeyDictionary[type[Optimizer], bool | None] = WeakKeyDictionary()


def _known_of_class(cls: type[Optimizer]) -> bool | None:
    """Return :func:`_class_decouples` of a class, which is asked for whenever a group is read."""
    if torch.compiler.is_compiling():
        return _class_decouples(cls)
    if cls not in _known_of_classes:
        _known_of_classes[cls] = _class_decouples(cls)
    return _known_of_classes[cls]


def _decays_in_its_step(cls: type[Optimizer]) -> bool:
    """Tell whether a class that is not torch's defines a step of its own that reads the weight decay."""
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


# Of torch's own. They raise where they come to a sparse gradient, which may be after they have moved other layers.
_WITHOUT_SPARSE = frozenset(
    getattr(torch.optim, name)
    for name in (
        "ASGD", "Adadelta", "Adafactor", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop"
    )
)  # fmt: skip


def problem_of_sparse(optim: Optimizer, group: int) -> str | None:
    """Return why a base does not take sparse gradients, as far as that is known, or None."""
    base = bases(optim)[-1]
    if type(base) in _WITHOUT_SPARSE:
        return f"sparse gradients need a base that takes them (got: {type(base).__name__}), as SGD and SparseAdam do"
    if type(base) in (torch.optim.SGD, torch.optim.Adagrad) and optim.param_groups[group].get("fused", False):
        return "sparse gradients need fused=False (got: True)"
    return None


def check_update_is_scalable(optim: Optimizer, who: str) -> None:
    """Raise if a base's update has no length per lr."""
    if is_base(optim, torch.optim.LBFGS):
        raise TypeError(
            f"{who} needs a base that takes one step along one direction (got: LBFGS, which searches along many, "
            "over all layers at once)"
        )


def check_line_search(optim: Optimizer, index: int, group: Group) -> None:
    """Raise if LBFGS is to take steps whose length it works out from gradients that are not those of its loss."""
    if "line_search_fn" in group and group["line_search_fn"] is None and is_base(optim, torch.optim.LBFGS):
        raise TypeError(
            f"LBFGS needs a line search under LARS (parameter group: {index}, got: line_search_fn=None): scaled "
            "gradients are not those of the loss, and the steps that LBFGS derives from them climb; pass "
            "line_search_fn='strong_wolfe'"
        )
