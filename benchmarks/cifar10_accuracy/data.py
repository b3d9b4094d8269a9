"""CIFAR-10 in any of its usual forms, resident on one device, cropped and flipped there in batches."""

from __future__ import annotations

import io
import itertools
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PAD = 4
HELD_OUT = 0.1
CHUNK = 2500
BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


class Data(NamedTuple):
    """Images of shape (count, height, width, 3) and labels, uint8 both."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def fingerprint(self) -> str:
        """Return what tells data sets apart. Of labels only: JPEG decoders differ in a bit here and there."""
        return f"{zlib.crc32(self.test_labels.tobytes(), zlib.crc32(self.train_labels.tobytes())):08x}"

    def held_out(self) -> Data:
        """Return the training set in two parts, always the same: what is left to train on, and what is tested on."""
        order = np.random.default_rng(0).permutation(len(self.train_labels))
        test, train = np.split(order, [round(HELD_OUT * len(order))])
        images, labels = self.train_images, self.train_labels
        return Data(images[train], labels[train], images[test], labels[test])


def load(path: Path, mapper: Callable[..., Iterable[Any]] = map) -> Data:
    """Read what ``save`` wrote, the folder of the original distribution (or one that holds it), or an npz of JPEGs.

    Args:
        path: of one of these.
        mapper: decodes JPEGs, ``map`` or an executor's.

    Raises:
        ValueError: there is none of these.
    """
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / BATCHES[0]).is_file():
            return _unpickle(folder)
    if path.is_file() and path.suffix == ".npz":
        with np.load(path) as arrays:
            if set(Data._fields) <= set(arrays):
                return Data(*(arrays[name] for name in Data._fields))
            if "train_jpeg" in arrays:
                return Data(*_decode(arrays, "train", mapper), *_decode(arrays, "test", mapper))
    raise ValueError(f"must be an .npz, or a folder that holds cifar-10-batches-py (got: {path})")


def save(path: Path, data: Data) -> None:
    """Write an npz that numpy alone can read."""
    with path.open("wb") as file:  # a name would get .npz appended
        np.savez(file, **data._asdict())


def _unpickle(folder: Path) -> Data:
    """Read the original distribution, which torchvision keeps as it is. Pickles are code: take it from its own site."""

    def read(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        pixels = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([part[b"labels"] for part in parts]).astype(np.uint8)
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels

    return Data(*read(BATCHES), *read(["test_batch"]))


def _decode(
    arrays: np.lib.npyio.NpzFile, part: str, mapper: Callable[..., Iterable[Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Decode JPEGs that stand one after another in one array, some thousands at a time."""
    files, offsets = arrays[f"{part}_jpeg"], arrays[f"{part}_offsets"].tolist()
    chunks = [offsets[first : first + CHUNK + 1] for first in range(0, len(offsets) - 1, CHUNK)]
    images = mapper(_decode_chunk, [files[ends[0] : ends[-1]].tobytes() for ends in chunks], chunks)
    return np.concatenate(list(images)), arrays[f"{part}_labels"].astype(np.uint8)


def _decode_chunk(files: bytes, offsets: list[int]) -> np.ndarray:
    """Decode the JPEGs between the given offsets, of which the first is where ``files`` begins."""
    from PIL import Image

    images = [
        np.asarray(
            Image.open(io.BytesIO(files[start - offsets[0] : end - offsets[0]]), formats=["JPEG"]).convert("RGB")
        )
        for start, end in itertools.pairwise(offsets)
    ]
    return np.stack(images)


def synthetic(train: int = 640, test: int = 200, size: int = 16) -> Data:
    """Return ten classes that colors alone tell apart, under noise. For trying things out."""
    random = np.random.default_rng(0)
    colors = random.permutation(np.array(np.meshgrid([50, 130, 210], [50, 130, 210], [90, 170])).reshape(3, -1).T)[:10]

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count, dtype=np.uint8) % 10
        noise = random.normal(0, 20, (count, size, size, 3))
        return (colors[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8), labels

    return Data(*draw(train), *draw(test))


class Resident:
    """A training and a test set on one device, standardised by the training set as they are taken out."""

    def __init__(self, data: Data, device: torch.device) -> None:
        images = torch.from_numpy(data.train_images).to(device)
        self.size = images.shape[1]
        border = (torch.arange(-PAD, self.size + PAD, device=device) - self.size + 1).abs()  # reflected on one side
        border = (self.size - 1 - border).abs()  # and on the other
        self.padded = images.index_select(1, border).index_select(2, border)
        self.labels = torch.from_numpy(data.train_labels.astype(np.int64)).to(device)
        self.test_images = torch.from_numpy(data.test_images).to(device)
        self.test_labels = torch.from_numpy(data.test_labels.astype(np.int64)).to(device)
        # Sums of integers, which have no rounding: every device gets the same numbers.
        pixels = images.flatten(0, 2).int()
        mean, square = (values.sum(0).double() / len(pixels) for values in (pixels, pixels.square()))
        self.mean, self.std = mean.float(), (square - mean.square()).sqrt().float()

    def __len__(self) -> int:
        return len(self.labels)

    def standardised(self, images: Tensor) -> Tensor:
        """Return (count, 3, height, width) of (count, height, width, 3): channels_last without a copy."""
        return ((images - self.mean) / self.std).permute(0, 3, 1, 2)

    def train_batch(self, index: Tensor, generator: torch.Generator, cutout: int = 0) -> tuple[Tensor, Tensor]:
        """Return some training images, each moved by up to 4 pixels, every other one mirrored, and their labels."""
        count, device = len(index), index.device
        ramp = torch.arange(self.size, device=device)
        corners = torch.randint(0, 2 * PAD + 1, (2, count, 1), generator=generator, device=device)
        rows, columns = corners + ramp
        mirror = torch.rand((count, 1), generator=generator, device=device) < 0.5
        columns = torch.where(mirror, columns.flip(1), columns)
        images = self.standardised(self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]])
        if cutout:
            corners = torch.randint(0, self.size - cutout + 1, (2, count, 1), generator=generator, device=device)
            rows, columns = (ramp >= corners) & (ramp < corners + cutout)
            images = images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
        return images, self.labels[index]

    def training_steps(
        self, batch: int, steps: int, generator: torch.Generator, microbatch: int, cutout: int = 0
    ) -> Iterator[Iterable[tuple[Tensor, Tensor]]]:
        """Yield the parts of every step, which have ``microbatch`` images or fewer.

        Small batches are cropped and mirrored several at a time, which takes fewer kernels.
        """
        order = batches(len(self), batch, steps, generator)
        while ahead := list(itertools.islice(order, max(1, microbatch // batch))):
            parts = (self.train_batch(part, generator, cutout) for part in torch.cat(ahead).split(microbatch))
            if batch >= microbatch:
                yield parts
            else:
                ((images, labels),) = parts
                yield from ([each] for each in zip(images.split(batch), labels.split(batch), strict=True))

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test set as it is, in batches."""
        for images, labels in zip(self.test_images.split(size), self.test_labels.split(size), strict=True):
            yield self.standardised(images), labels


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of full batches, cut from one epoch's random order after another.

    A batch may span two epochs. So all are of one size, every image is seen as often as any other (give or take one),
    and no epoch is cut short because the batch does not divide it.
    """
    ahead = torch.empty(0, dtype=torch.int64, device=generator.device)
    for _ in range(steps):
        while len(ahead) < size:
            ahead = torch.cat([ahead, torch.randperm(count, generator=generator, device=generator.device)])
        yield ahead[:size]
        ahead = ahead[size:]
