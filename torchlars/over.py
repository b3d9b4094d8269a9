"""Classes that construct a base optimizer and wrap it, such as ``LARS.over(SGD)``."""

from __future__ import annotations

import copyreg
from inspect import Parameter, Signature, signature
from itertools import chain, count
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

from torch.optim import Optimizer

__all__: list[str] = []


class ClassOver(type):
    """The metaclass of these classes, and of classes derived from them. pickle reduces classes by their metaclass."""


_classes: WeakValueDictionary[Any, type[Any]] = WeakValueDictionary()
_lock = RLock()  # held while classes are added or looked through: iterating fails if another thread adds one


def class_over(cls: type[Optimizer], base: type[Optimizer], options: dict[str, Any]) -> type[Any]:
    """Return a subclass of ``cls``, constructed as ``cls(base(...), **options)``.

    Equal arguments return the same class, as long as something refers to it. Keyword arguments that are options of
    ``cls``, and no parameters of the base, replace those of ``options``.
    """
    key = (cls, base, *sorted(options.items()))
    with _lock:
        made = _classes.get(key)
        return made if made is not None else _classes.setdefault(key, _make(cls, base, options))


def _signature(cls: Any) -> Signature:
    """Return the arguments of a class, with evaluated annotations, as parsers of command lines need, where possible."""
    try:
        return signature(cls.__init__, eval_str=True)
    except Exception:  # whatever evaluating raises
        return signature(cls.__init__)


def _make(cls: Any, base: type[Optimizer], options: dict[str, Any]) -> ClassOver:
    of_base = _signature(base)
    of_wrapper = _signature(cls).parameters
    own = {name: of_wrapper[name] for name in cls.options if name in of_wrapper and name not in of_base.parameters}

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in own if name in kwargs}
        cls.__init__(self, base(*args, **kwargs), **{**options, **given})

    keywords = [
        parameter.replace(kind=Parameter.KEYWORD_ONLY, default=options.get(name, parameter.default))
        for name, parameter in own.items()
    ]
    parameters = sorted([*of_base.parameters.values(), *keywords], key=lambda parameter: parameter.kind)
    __init__.__signature__ = of_base.replace(parameters=parameters)  # type: ignore[attr-defined]

    name = f"{cls.__name__}Over{base.__name__}"
    taken = {made.__qualname__ for made in _classes.values()}
    names = {
        "__init__": __init__,
        "__doc__": base.__doc__,
        "__module__": __name__,
        "__qualname__": next(n for n in chain([name], map(f"{name}_{{}}".format, count(2))) if n not in taken),
        "_arguments_of_class_over": (cls, base, options),
    }
    return ClassOver(name, (cls,), names)


def _reduce(made: ClassOver) -> Any:
    """Return how a class is pickled: as it was made, or, if it is derived from one that was made, by its name."""
    arguments = vars(made).get("_arguments_of_class_over")
    return made.__qualname__ if arguments is None else (class_over, arguments)


copyreg.pickle(ClassOver, _reduce)


def __getattr__(name: str) -> Any:
    """Return the class of that name. cloudpickle pickles classes by value that their module does not have by name."""
    with _lock:
        for made in _classes.values():
            if made.__qualname__ == name:
                return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
