"""How the layers of a group are adapted, and buckets: the layers that one call of an op takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from torchlars import ops, sharding
from torchlars.layers import scale_updates
from torchlars.options import Group

__all__: list[str] = []


@dataclass
class Adaptation:
    """The options of a group, as long as they stay the same. The default only unscales gradients."""

    group: Group
    trust_coef: float | None = None  # None: no trust ratio, only lr in the momentum or gradients to be unscaled
    eps: float = 0.0
    clip: bool = False
    norm: str = "raw"
    lr_in_momentum: bool = False
    ratio_of: str = "gradient"  # or "update": whose norm is in the ratio
    apply_to: str = "gradient"  # or "update": what the ratio multiplies
    weight_decay: float = 0.0  # the coupled one
    is_decoupled: bool = False
    base_decouples: bool = False  # the base knows of it, by a flag of its own
    maximize: bool = False
    lr: float | Tensor | None = None  # None: not needed

    def __post_init__(self) -> None:
        #: Whether gradients are multiplied by trust ratios.
        self.multiplies_gradients = self.trust_coef is not None and self.apply_to == "gradient"
        #: Whether a base that takes trust ratios can multiply by them: of gradients it multiplies g + λw, λ coupled.
        decays_alike = not self.is_decoupled or self.base_decouples
        self.suits_a_base = self.ratio_of == "update" or (self.multiplies_gradients and decays_alike)
        self.hides_lr = self.lr_in_momentum and self.apply_to == "gradient"
        #: The arguments of a pass that measures, decides and applies.
        self.kernel_options: dict[str, Any] = {
            "trust_coef": self.trust_coef,
            "eps": self.eps,
            "decayed_norm": self.norm == "decayed",
            "clip": self.clip,
            "lr_in_momentum": self.lr_in_momentum,
            "lr": self.lr,
        }
        self._options_for_base: Mapping[str, Any] | None = None
        self._fast_options: Any = None
        #: What all layers of a bucket have in common.
        self.kind = (
            *(self.maximize, self.norm, self.clip, self.lr_in_momentum, self.ratio_of, self.apply_to),
            self.trust_coef is not None,
            self.lr if isinstance(self.lr, Tensor) else None,
        )

    def options_for_base(self) -> Mapping[str, Any]:
        """Return the options as a base that takes trust ratios is given them."""
        if self._options_for_base is None:
            names = self.kernel_options if self.ratio_of == "gradient" else ("trust_coef", "eps", "clip")
            self._options_for_base = MappingProxyType({name: self.kernel_options[name] for name in names})
        return self._options_for_base

    def fast_options(self) -> Any:
        """Return the options as the fast path takes them."""
        if self._fast_options is None:
            how = {"weight_decay": self.weight_decay, "maximize": self.maximize}
            self._fast_options = ops.fast_options("LarsOptions", **how, **self.kernel_options)
        return self._fast_options


def needs_lr(how: Adaptation | None) -> bool:
    """Tell whether how a group is adapted depends on its lr."""
    return how is not None and how.lr is not None


@dataclass
class Plan:
    """What a step derives from the options of all groups, as long as these stay the same."""

    of_groups: list[Adaptation | None]  # None: left to the base
    base_takes: bool  # whether the base takes ratios

    def __post_init__(self) -> None:
        self.adaptations = {index: how for index, how in enumerate(self.of_groups) if how is not None}
        #: The groups with trust ratios.
        self.adapted = [index for index, how in self.adaptations.items() if how.trust_coef is not None]
        #: The groups whose ratios the base multiplies by.
        self.for_base = {index for index, how in self.adaptations.items() if self.base_takes and how.suits_a_base}
        ours = {index: how for index, how in self.adaptations.items() if index not in self.for_base}
        #: The groups whose updates are scaled here, and those whose gradients are multiplied by ratios, or only by lr.
        self.updated = [index for index, how in ours.items() if how.apply_to == "update"]
        self.written = {index for index, how in ours.items() if how.apply_to == "gradient"}
        #: The groups whose layers may take the fast path, and whether all of ours may.
        self.fast = [index for index, how in ours.items() if how.multiplies_gradients or how.ratio_of == "update"]
        self.is_all_fast = len(self.fast) == len(ours)
        self._fast_groups: list[tuple[Group, Any]] | None = None
        #: What the base must not see, as gradients hold it already: a group, a key, and the value to show.
        decaying = (how for index, how in ours.items() if index in self.written and how.weight_decay != 0)
        self.hidden: list[tuple[Group, str, Any]] = [(how.group, "weight_decay", 0.0) for how in decaying]
        self.hidden += [(how.group, "lr", 1.0) for how in self.adaptations.values() if how.hides_lr]

    def fast_groups(self) -> list[tuple[Group, Any]]:
        """Return the groups of :attr:`fast` with their options, as the fast path takes them."""
        if self._fast_groups is None:
            ours = [self.adaptations[index] for index in self.fast]
            self._fast_groups = [(how.group, how.fast_options()) for how in ours]
        return self._fast_groups


@dataclass(eq=False)
class Bucket:
    """Layers of one device and dtype, sharded over the same ranks and adapted in the same way."""

    adaptation: Adaptation  # weight_decay, trust_coef, eps and lr are those of the first layer
    process_groups: Sequence[Any] = ()
    inv_scale: Tensor | None = None
    is_written: bool = False  # whether gradients are, if only to be unscaled
    is_sparse: bool = False
    params: list[Tensor] = field(default_factory=list)
    local_params: list[Tensor] = field(default_factory=list)
    old_params: list[Tensor] = field(default_factory=list)  # local ones before the base's step, for updates
    grads: list[Tensor] = field(default_factory=list)  # local ones
    weight_decays: list[float] = field(default_factory=list)
    trust_coefs: list[float] = field(default_factory=list)
    eps: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    squared_norms: Tensor | None = None  # of all parameters, then of all gradients or updates
    ratios: Tensor | None = None

    def add(self, param: Tensor, adaptation: Adaptation, grad: Tensor | None = None) -> None:
        """Add a layer, with its local gradient if that is in the ratio or written."""
        self.params.append(param)
        self.local_params.append(sharding.local(param))
        if grad is not None:
            self.grads.append(grad)
        self.weight_decays.append(adaptation.weight_decay)
        if adaptation.trust_coef is not None:
            self.trust_coefs.append(adaptation.trust_coef)
        self.eps.append(adaptation.eps)
        if adaptation.lr is not None:
            self.lrs.append(1.0 if isinstance(adaptation.lr, Tensor) else adaptation.lr)

    @property
    def takes_one_pass(self) -> bool:
        """Whether one op measures, decides and applies.

        False for sharded layers, whose norms are summed in between, and for sparse gradients, whose values have not the
        size of the parameter.
        """
        return self.adaptation.multiplies_gradients and not self.is_sparse and not self.process_groups

    def measure(self) -> Tensor:
        """Return the squared norms of the local part of each layer, to be completed in place."""
        if self.squared_norms is not None:
            return self.squared_norms
        how = self.adaptation
        params = self.local_params
        if how.ratio_of == "update" and len(self.grads) == 0:  # else they are the updates, as the base handed them over
            params = self.old_params
            others = ops.squared_norms(self.local_params, others=params, scales=[-1.0] * len(params))
        elif how.norm == "decayed":
            scales = [-weight_decay if how.maximize else weight_decay for weight_decay in self.weight_decays]
            others = ops.squared_norms(self.grads, others=params, scales=scales, inv_scale=self.inv_scale)
        else:
            others = ops.squared_norms(self.grads, inv_scale=self.inv_scale)
        self.squared_norms = torch.cat([ops.squared_norms(params), others])
        return self.squared_norms

    def decide(self) -> Tensor:
        """Return the trust ratios, once squared norms are complete."""
        how = self.adaptation
        assert self.squared_norms is not None
        param_squared_norms, other_squared_norms = self.squared_norms.chunk(2)
        adds_decay_to_norm = how.ratio_of == "gradient" and how.norm == "raw"
        self.ratios = ops.trust_ratios(
            param_squared_norms,
            other_squared_norms,
            weight_decays=self.weight_decays if adds_decay_to_norm else [0.0] * len(self.params),
            trust_coefs=self.trust_coefs,
            eps=self.eps,
            dtype=self._dtype(),
            clip=how.clip,
            lrs=self.lrs,
            of_updates=how.ratio_of == "update",
            lr_tensor=self._lr_tensor(),
        )
        return self.ratios

    def scale_gradients(self) -> None:
        """Decide, and scale the gradients if they are written. Where one pass does so, measure as well."""
        how = self.adaptation
        if self.takes_one_pass:
            self.ratios = ops.empty_ratios(self.grads, self.local_params)
        elif how.trust_coef is not None:
            self.decide()
        if self.is_written:
            scales_updates = how.apply_to == "update"
            ops.scale_gradients_(
                self.grads,
                self.local_params,
                maximize=how.maximize,
                weight_decays=[0.0] * len(self.grads) if scales_updates else self.weight_decays,
                decayed_norm=how.norm == "decayed" and self.takes_one_pass,
                ratios=None if scales_updates else self.ratios,
                trust_coefs=self.trust_coefs if self.takes_one_pass else [],
                eps=self.eps if self.takes_one_pass else [],
                clip=how.clip and self.takes_one_pass,
                lrs=self.lrs,
                lr_in_momentum=how.lr_in_momentum,
                lr_tensor=self._lr_tensor(),
                inv_scale=self.inv_scale,
            )

    def scale_updates(self) -> None:
        """Scale the updates. Where ratios are of updates, decide, and measure unless that is done already."""
        if self.ratios is None and self.squared_norms is None:
            if torch.compiler.is_compiling() or len(ops.overlapping(self.local_params)) == 0:
                self.ratios = ops.empty_ratios(self.local_params, self.old_params)
                ops.scale_updates_(
                    self.local_params,
                    self.old_params,
                    ratios=self.ratios,
                    trust_coefs=self.trust_coefs,
                    eps=self.eps,
                    clip=self.adaptation.clip,
                    lrs=self.lrs,
                    lr_tensor=self._lr_tensor(),
                )
                return
            self.measure()
        ratios = self.decide() if self.ratios is None else self.ratios
        scale_updates(self.params, self.old_params, ratios)

    def _dtype(self) -> torch.dtype:
        dtype = self.local_params[0].dtype
        return ops.compute_dtype(self.grads[0].dtype if len(self.grads) > 0 else dtype, dtype)

    def _lr_tensor(self) -> Tensor | None:
        lr = self.adaptation.lr
        return ops.lr_tensor(lr, self.params[0].device) if isinstance(lr, Tensor) else None


def measure(buckets: Sequence[Bucket]) -> None:
    """Measure, and complete the norms of layers that are sharded over several ranks."""
    sharding.complete([(bucket.process_groups, bucket.measure()) for bucket in buckets])
