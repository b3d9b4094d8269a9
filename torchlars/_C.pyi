from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

has_cuda: bool

def set_run_bytes(bytes: int) -> None: ...  # only where has_cuda

class LarsBucket:
    @property
    def params(self) -> list[Tensor]: ...
    def adapt(self, inv_scale: Tensor | None = None) -> Tensor: ...

class LarsLayers:
    def __init__(self) -> None: ...
    def add(
        self,
        params: Sequence[Tensor],
        weight_decay: float,
        maximize: bool,
        trust_coef: float,
        eps: float,
        decayed_norm: bool,
        clip: bool,
        lr_in_momentum: bool,
        lr: float | Tensor | None,
    ) -> list[int]: ...
    @property
    def buckets(self) -> list[LarsBucket]: ...
    @property
    def shares_memory(self) -> bool: ...
    @property
    def same_layout(self) -> bool: ...
    @property
    def versions(self) -> int: ...

class SgdBucket:
    @property
    def params(self) -> list[Tensor]: ...
    def update(self, inv_scale: Tensor | None = None) -> Tensor | None: ...

class SgdLayers:
    def __init__(self) -> None: ...
    def add(
        self,
        params: Sequence[Tensor],
        state: Mapping[Tensor, Any],
        weight_decay: float,
        trust_coef: float | None,
        eps: float | None,
        decayed_norm: bool,
        clip: bool,
        lr_in_momentum: bool,
        lr: float | Tensor,
        momentum: float,
        dampening: float,
        nesterov: bool,
        maximize: bool,
        momentum_in_float32: bool,
    ) -> list[int]: ...
    @property
    def buckets(self) -> list[SgdBucket]: ...
    @property
    def shares_memory(self) -> bool: ...

def has_memory(tensor: Tensor) -> bool: ...
def positions_of_other_layout(params: list[Tensor]) -> list[int]: ...
def overlapping(tensors: Sequence[Tensor]) -> list[int]: ...
def positions_of_non_parameters(params: list[Tensor]) -> list[int]: ...
def chunks(numels: list[int]) -> list[tuple[int, int, int]]: ...
def chunks_starting_in(
    numels: list[int], begin: int, end: int, backwards: bool = False
) -> list[tuple[int, int, int, int]]: ...
def runs_within(sizes: list[int], limit: int) -> list[tuple[int, int]]: ...
def find_start(starts: list[int], value: int) -> int: ...
