"""One training three ways: in one process, under DDP, and sharded by FSDP2. The losses are the same.

  torchrun --nproc-per-node 2 examples/distributed.py

A trust ratio takes the norms of whole layers. Under DDP every rank has them; under FSDP2 it has shards, and LARS sums
their squared norms over all ranks. A small network learns the digits of digits.py each time alike, and once more from
the middle on, from a sharded checkpoint. Exits with 1 if losses differ. Needs torchlars and what digits.py needs.
"""

import argparse
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from digits import TRAIN_SIZE, load_split, warmup_then_poly
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import torchlars
from torchlars import LARS, param_groups


def start() -> tuple[Tensor, Tensor, float]:
    """Joins the other processes. Returns images and labels, where to compute on them, and what rounding may make."""
    images, _, labels, _ = load_split()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # no torchrun
    if torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):  # 0 where there is no CUDA
        dist.init_process_group("gloo", **alone)
        return images.double(), labels, 1e-12
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()), **alone)
    return images.cuda(), labels.cuda(), 1e-6


class Run:
    """A training. The three ways differ in what the constructor does to the model; all else is the same."""

    def __init__(self, way: str, epochs: int, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels, self.batch_size = images, labels, 512  # of all ranks together
        torch.manual_seed(0)  # the same weights on every rank
        # Smooth, so that rounding stays small: in float32, a ReLU or a max-pool would soon decide otherwise.
        layers = nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
        self.model = nn.Sequential(*layers).to(images)
        self.rank, self.ranks = (0, 1) if way == "one process" else (dist.get_rank(), dist.get_world_size())
        if way == "DDP":
            self.model = nn.parallel.DistributedDataParallel(self.model)
        elif way == "FSDP2":
            mesh = dist.init_device_mesh(images.device.type, (self.ranks,))
            for part in (layers[1], layers[3], self.model):  # in a large model its blocks, and then the whole
                fully_shard(part, mesh=mesh)
        groups = param_groups(self.model, lr=16, weight_decay=5e-4)  # after fully_shard, which replaces parameters
        self.optimizer = LARS(torchlars.optim.SGD(groups, momentum=0.9))
        self.scheduler = warmup_then_poly(self.optimizer, steps=epochs * -(-TRAIN_SIZE // self.batch_size))

    def train(self, epoch: int) -> float:
        """Trains on this rank's shares of all batches, and returns the mean loss over all shares."""
        total, order = 0.0, torch.randperm(TRAIN_SIZE, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(self.batch_size):
            share = batch.tensor_split(self.ranks)[self.rank]
            loss = nn.functional.cross_entropy(self.model(self.images[share]), self.labels[share], reduction="sum")
            total += loss.detach()
            self.optimizer.zero_grad()
            (loss * self.ranks / len(batch)).backward()  # ranks, whose shares may be uneven, average their gradients
            self.optimizer.step()
            self.scheduler.step()
        if self.ranks > 1:
            dist.all_reduce(total)
        return total.item() / TRAIN_SIZE

    def state_dict(self) -> dict[str, dict]:
        """All keys of groups are in it, such as trust_coef=None. What LARS itself was given is not: give it again."""
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Takes over from another run. dcp.load calls it, once it has filled what state_dict() returned."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.scheduler.load_state_dict(state["scheduler"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains with LARS in one process, under DDP and under FSDP2.")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each run (default: 10)")
    parser.add_argument("--out", help="folder for the checkpoint, which all ranks can see (default: a temporary one)")
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error(f"--epochs must be at least 2, so that there is a middle (got: {args.epochs})")
    images, labels, tolerance = start()
    say = print if dist.get_rank() == 0 else lambda _: None
    title = f"Mean losses in {images.dtype} on {images.device.type}, processes: {dist.get_world_size()}"
    say(f"{title}\n\nepoch     one process             DDP           FSDP2  FSDP2, resumed")
    runs, apart = [Run(way, args.epochs, images, labels) for way in ("one process", "DDP", "FSDP2")], []
    for epoch in range(args.epochs):
        if epoch == args.epochs // 2:
            runs.append(Run("FSDP2", args.epochs, images, labels))
            with tempfile.TemporaryDirectory() as temporary:
                folders = [args.out or temporary]
                dist.broadcast_object_list(folders)  # all take that of rank 0
                dcp.save({"run": runs[2]}, checkpoint_id=folders[0])
                dcp.load({"run": runs[3]}, checkpoint_id=folders[0])
                dist.barrier()  # before it is removed
        losses = [run.train(epoch) for run in runs]
        apart += [abs(loss / losses[0] - 1) for loss in losses]
        say(f"{epoch + 1:5}" + "".join(f"{loss:16.9f}" for loss in losses))
    equal = all(difference <= tolerance for difference in apart)  # NaN is not
    say(f"\n{'Equal' if equal else 'NOT EQUAL'}: largest relative difference {max(apart):.1e}, allowed {tolerance:.0e}")
    dist.barrier()  # torchrun ends the others when one fails
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0 if equal else 1)  # where gloo's threads still hold tensors at a normal exit, torch aborts


if __name__ == "__main__":
    main()
