from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

has_cuda: bool

def set_run_bytes(bytes: int) -> None: ...  # only where has_cuda

class LarsBucket:
    @property
    def params(self) -> list[Tensor]: ...
    def adapt(self, inv_scale: Tensor | None = None) -> Tensor: ...
    def copy_params(self) -> None: ...
    def scale_updates(self) -> Tensor: ...

class LarsOptions:
    weight_decay: float
    maximize: bool
    trust_coef: float
    eps: float
    decayed_norm: bool
    clip: bool
    lr_in_momentum: bool
    lr: float | Tensor | None

class LarsLayers:
    def __init__(self) -> None: ...
    def add(self, groups: Sequence[tuple[dict[str, Any], LarsOptions]]) -> list[tuple[int, int]]: ...
    @property
    def buckets(self) -> list[LarsBucket]: ...
    @property
    def shares_memory(self) -> bool: ...
    @property
    def params_share_memory(self) -> bool: ...
    @property
    def same_layout(self) -> bool: ...
    @property
    def versions(self) -> int: ...

class SgdBucket:
    @property
    def params(self) -> list[Tensor]: ...
    def update(self, inv_scale: Tensor | None = None) -> Tensor | None: ...

class SgdOptions:
    weight_decay: float
    maximize: bool
    lr: float | Tensor
    momentum: float
    dampening: float
    nesterov: bool
    momentum_in_float32: bool
    min_8bit_size: int | None
    trust_coef: float | None
    eps: float | None
    decayed_norm: bool
    clip: bool
    lr_in_momentum: bool

class SgdLayers:
    def __init__(self) -> None: ...
    def add(
        self, groups: Sequence[tuple[dict[str, Any], SgdOptions]], state: Mapping[Tensor, Any]
    ) -> list[tuple[int, int]]: ...
    @property
    def buckets(self) -> list[SgdBucket]: ...
    @property
    def shares_memory(self) -> bool: ...

class AdamBucket:
    @property
    def params(self) -> list[Tensor]: ...
    def update(self, inv_scale: Tensor | None = None) -> Tensor | None: ...

class AdamOptions:
    weight_decay: float
    decoupled_weight_decay: bool
    maximize: bool
    lr: float | Tensor
    beta1: float
    beta2: float
    adam_eps: float
    state_in_float32: bool
    of_updates: bool
    trust_coef: float | None
    eps: float | None
    decayed_norm: bool
    clip: bool
    lr_in_momentum: bool

class AdamLayers:
    def __init__(self) -> None: ...
    def add(
        self, groups: Sequence[tuple[dict[str, Any], AdamOptions]], state: Mapping[Tensor, Any]
    ) -> list[tuple[int, int]]: ...
    @property
    def buckets(self) -> list[AdamBucket]: ...
    @property
    def shares_memory(self) -> bool: ...

def has_memory(tensor: Tensor) -> bool: ...
def positions_of_other_layout(params: list[Tensor]) -> list[int]: ...
def overlapping(tensors: Sequence[Tensor]) -> list[int]: ...
def positions_of_non_parameters(groups: Sequence[list[Tensor]]) -> list[tuple[int, int]]: ...
def changed_groups(groups: list[dict[str, Any]], snapshots: list[tuple[Any, ...] | None]) -> list[int]: ...
def chunks(numels: list[int]) -> list[tuple[int, int, int]]: ...
def chunks_starting_in(
    numels: list[int], begin: int, end: int, backwards: bool = False
) -> list[tuple[int, int, int, int]]: ...
def chunks_of_part(
    numels: list[int], part: int, parts: int, backwards: bool = False
) -> list[tuple[int, int, int, int]]: ...
def runs_within(sizes: list[int], limit: int) -> list[tuple[int, int]]: ...
def find_start(starts: list[int], value: int) -> int: ...
