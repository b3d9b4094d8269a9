"""csrc/plan.h, which host and device share: how tensors are cut into chunks, and chunks into the shares of threads.

On random sets of tensors, among them thousands of tensors, empty ones, and more than 2³¹ elements. None of them is
allocated, for the plan is arithmetic on numels.
"""

from __future__ import annotations

import bisect
import random
from itertools import pairwise

import numpy as np
import pytest

from torchlars._extension import extension

pytestmark = pytest.mark.skipif(extension is None, reason="torchlars._C, through which plan.h is reached, is not built")

CHUNK, CHUNK_STEP, MAX_CHUNKS, CHUNK_WORK = 16384, 1024, 1024, 1024  # as in plan.h


def random_numels(seed: int) -> list[int]:
    """Return thousands of small tensors or, mostly, a few of up to 2⁴⁰ elements; a fifth are empty or at a border."""
    rng = random.Random(seed)
    count, bits = (rng.randrange(1000, 4000), 18) if seed % 10 == 0 else (rng.randrange(1, 12), 40)

    def numel() -> int:
        kind = rng.randrange(10)
        if kind == 0:
            return 0
        if kind == 1:
            return max(0, CHUNK * 2 ** rng.randrange(max(1, bits - 14)) + rng.randrange(-1, 2))
        return int(2 ** rng.uniform(0, bits))

    return [numel() for _ in range(count)]


RANDOM_SETS = [random_numels(seed) for seed in range(320)]


def chunks_of(numels: list[int]) -> np.ndarray:
    """Return the chunks as rows of tensor, begin, end."""
    return np.array(extension.chunks(numels), dtype=np.int64).reshape(-1, 3)


def test_random_sets_hold_what_they_should() -> None:
    assert len(RANDOM_SETS) >= 300
    assert sum(len(numels) >= 1000 for numels in RANDOM_SETS) >= 30
    assert sum(0 in numels for numels in RANDOM_SETS) >= 100
    assert sum(max(numels) > 2**31 for numels in RANDOM_SETS) >= 100


def test_every_element_is_in_exactly_one_chunk() -> None:
    for numels in RANDOM_SETS:
        tensor, begin, end = chunks_of(numels).T
        is_first = np.diff(tensor, prepend=-1) != 0
        is_last = np.append(is_first[1:], True)
        assert (tensor[is_first] == np.arange(len(numels))).all()  # every tensor, an empty one too, in order
        assert (begin[is_first] == 0).all()
        assert (begin[~is_first] == end[~is_last]).all()
        assert (end[is_last] == numels).all()
        assert ((end > begin) | (end == 0)).all()


def test_chunks_are_few_aligned_and_no_longer_than_they_must_be() -> None:
    for numels in RANDOM_SETS:
        tensor, begin, end = chunks_of(numels).T
        numel = np.array(numels)
        size = np.maximum(CHUNK, -(-numel // (MAX_CHUNKS * CHUNK_STEP)) * CHUNK_STEP)[tensor]
        assert np.bincount(tensor).max() <= MAX_CHUNKS
        assert (begin % CHUNK_STEP == 0).all()
        assert (end == np.minimum(begin + size, numel[tensor])).all()


@pytest.mark.parametrize(
    ("numel", "count", "size"),
    [
        (0, 1, 0),
        (1, 1, 1),
        (CHUNK, 1, CHUNK),
        (CHUNK + 1, 2, CHUNK),
        (CHUNK * MAX_CHUNKS, MAX_CHUNKS, CHUNK),
        (CHUNK * MAX_CHUNKS + 1, 964, CHUNK + CHUNK_STEP),
        (2**31 + 1, 1024, 2**21 + CHUNK_STEP),
        (2**40, 1024, 2**30),
    ],
)
def test_chunk_counts_and_sizes_by_hand(numel: int, count: int, size: int) -> None:
    chunks = chunks_of([numel])
    assert len(chunks) == count
    assert chunks[0, 2] == size


def in_order(backwards: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """What was visited backwards, in the order of chunks: from the last block of 16 to the first, forwards within each."""
    blocks = [backwards[i : i + 16] for i in range(0, len(backwards), 16)]
    return [chunk for block in reversed(blocks) for chunk in block]


@pytest.mark.parametrize("backwards", [False, True])
def test_shares_of_threads_visit_every_chunk_once(backwards: bool) -> None:
    for seed, numels in enumerate(RANDOM_SETS):
        rng = random.Random(seed)
        chunks = chunks_of(numels)
        _, begin, end = chunks.T
        start = np.concatenate([[0], np.cumsum(end - begin + CHUNK_WORK)])  # of each chunk's work
        total = int(start[-1])
        borders = [int(i) for i in rng.choices(list(start[:-1]), k=3)]
        cuts = [rng.randrange(total + 1) for _ in range(4)]
        cuts = sorted([0, *borders, *cuts, *cuts[:1], total])
        visited = []
        for share in pairwise(cuts):
            taken = extension.chunks_starting_in(numels, *share, backwards)
            assert all(share[0] <= start[index] < share[1] for _, index, _, _ in taken)
            visited += in_order(taken) if backwards else taken

        indices = [index for _, index, _, _ in visited]
        assert indices == list(range(len(chunks)))
        assert [tuple(chunk) for chunk in chunks] == [(tensor, *share) for tensor, _, *share in visited]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_even_parts_of_each_tensor_visit_every_chunk_once(parts: int, backwards: bool) -> None:
    for numels in (numels[:20] for numels in RANDOM_SETS[::8]):
        of_tensors = np.bincount(chunks_of(numels)[:, 0])
        visited: dict[int, list[tuple[int, int, int, int]]] = {tensor: [] for tensor in range(len(numels))}
        for part in range(parts):
            taken = extension.chunks_of_part(numels, part, parts, backwards)
            tensors = [tensor for tensor, *_ in taken]
            assert tensors == sorted(tensors, reverse=backwards)
            for tensor, chunks in visited.items():
                of_tensor = [chunk for chunk in taken if chunk[0] == tensor]
                assert abs(len(of_tensor) - of_tensors[tensor] / parts) < 1
                chunks += in_order(of_tensor) if backwards else of_tensor
        in_turn = [chunk for chunks in visited.values() for chunk in chunks]
        assert [index for _, index, _, _ in in_turn] == list(range(len(in_turn)))
        assert [(tensor, *share) for tensor, _, *share in in_turn] == [tuple(chunk) for chunk in chunks_of(numels)]


@pytest.mark.parametrize(("part", "parts"), [(-1, 2), (2, 2), (0, 0)])
def test_a_part_that_does_not_exist_is_refused(part: int, parts: int) -> None:
    message = rf"^chunks_of_part: expected 0 <= part < parts \(part: {part}, parts: {parts}\)"
    with pytest.raises(ValueError, match=message):
        extension.chunks_of_part([5], part, parts)


def test_even_parts_deal_tensors_of_one_chunk_to_all() -> None:
    numels = [5, CHUNK, 7, 0, 2 * CHUNK]
    taken = [[tensor for tensor, *_ in extension.chunks_of_part(numels, part, 2)] for part in range(2)]
    assert taken == [[1, 3, 4], [0, 2, 4]]


def test_shares_hold_the_chunks_whose_work_begins_in_them() -> None:
    numels = [5, 0, 3 * CHUNK + 1, 7]
    second, third = 5 + CHUNK_WORK, 5 + 2 * CHUNK_WORK  # where the work of the second and of the third tensor begins
    chunk = CHUNK + CHUNK_WORK
    assert extension.chunks_starting_in(numels, 0, 1) == [(0, 0, 0, 5)]
    assert extension.chunks_starting_in(numels, 1, third + 1) == [(1, 1, 0, 0), (2, 2, 0, CHUNK)]
    assert extension.chunks_starting_in(numels, third + 1, third + chunk + 1) == [(2, 3, CHUNK, 2 * CHUNK)]
    assert extension.chunks_starting_in(numels, third + chunk + 1, third + 2 * chunk) == []
    assert extension.chunks_starting_in(numels, second, second) == []


def test_backwards_goes_from_the_last_block_of_16_chunks_to_the_first_and_forwards_within() -> None:
    numels = [5, 33 * CHUNK, 7]  # 35 chunks
    work = 35 * CHUNK_WORK + 12 + 33 * CHUNK
    indices = [index for _, index, _, _ in extension.chunks_starting_in(numels, 0, work, backwards=True)]
    assert indices == [*range(19, 35), *range(3, 19), *range(3)]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("numels", "begin", "end", "message"),
    [
        ([], 0, 0, r"at least one size \(got: numels is empty\)"),
        ([], -1, 5, r"at least one size \(got: numels is empty\)"),
        ([5, -1], 0, 1, r"non-negative sizes \(numels\[1\]: -1\)"),
        ([-(2**63)], 0, 1, r"non-negative sizes \(numels\[0\]: -9223372036854775808\)"),
        ([2**63 - 1], 0, 1, r"sizes whose work stays below 2\^62 \(numels\[0\]: 9223372036854775807\)"),
        ([2**61, 5, 2**61], 0, 1, r"sizes whose work stays below 2\^62 \(numels\[2\]: 2305843009213693952\)"),
        ([5], -1, 1, r"0 <= begin <= end <= 1029, the plan's work \(begin: -1, end: 1\)"),
        ([5], 2, 1, r"0 <= begin <= end <= 1029, the plan's work \(begin: 2, end: 1\)"),
        ([5, 0], 0, 2054, r"0 <= begin <= end <= 2053, the plan's work \(begin: 0, end: 2054\)"),
        ([5], 2**63 - 1, 2**63 - 1, r"0 <= begin <= end <= 1029, the plan's work \(begin: 9223372036854775807"),
        ([5], -(2**63), 2**63 - 1, r"0 <= begin <= end <= 1029, the plan's work \(begin: -9223372036854775808"),
    ],
)
def test_shares_of_what_is_no_plan_are_refused(
    numels: list[int], begin: int, end: int, message: str, backwards: bool
) -> None:
    """An empty list and a negative begin ended the process; sizes that overflow had shares of tensors that do not exist."""
    with pytest.raises(ValueError, match=f"^chunks_starting_in: expected {message}"):
        extension.chunks_starting_in(numels, begin, end, backwards)
    if "begin" not in message:
        with pytest.raises(ValueError, match=f"^chunks: expected {message}"):
            extension.chunks(numels)


def test_the_largest_sizes_have_shares() -> None:
    largest = 2**62 - 1 - 5 - 2 * MAX_CHUNKS * CHUNK_WORK
    chunks = [(1, 1 + i, begin, end) for i, (_, begin, end) in enumerate(extension.chunks([largest]))]
    work = 5 + CHUNK_WORK + largest + len(chunks) * CHUNK_WORK
    assert extension.chunks_starting_in([5, largest], 0, work) == [(0, 0, 0, 5), *chunks]


def test_runs_stay_within_the_limit() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        sizes = [rng.choice([0, 1, rng.randrange(100), rng.randrange(2**40)]) for _ in range(rng.randrange(60))]
        limit = rng.choice([0, 10, 300, 2**39, 2**41])
        runs = extension.runs_within(sizes, limit)
        assert [i for begin, end in runs for i in range(begin, end)] == list(range(len(sizes)))
        assert all(sum(sizes[begin:end]) <= limit or end - begin == 1 for begin, end in runs)
        # None could have taken the next item as well.
        assert all(sum(sizes[begin : end + 1]) > limit for begin, end in runs[:-1])


def test_find_start_is_bisection() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        width = rng.choice([3, 100, 2**40])
        starts = sorted(rng.randrange(width) for _ in range(rng.randrange(1, 50)))
        values = [*starts, starts[-1] + width, *(rng.randrange(starts[0], starts[0] + width) for _ in range(20))]
        assert [extension.find_start(starts, v) for v in values] == [bisect.bisect_right(starts, v) - 1 for v in values]
