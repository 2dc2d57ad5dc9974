"""One rank of tests/test_soap_distributed.py: trains a small network with SOAP under DDP, writes down its losses."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from lic_fast.optim import SOAP

STEPS, BATCH = 24, 16


def network():
    """Of factors that have full rank from the first step on: elsewhere the order of a sum chooses the null space."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh(), torch.nn.Conv2d(8, 6, 3), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(6, 5, 4), torch.nn.Flatten()).double()


def batch(step):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 3, 8, 8, generator=g, dtype=torch.float64)
    return x, torch.stack([x.mean((1, 2, 3)), x[:, 0].amax((1, 2)), x.std((1, 2, 3)), x[:, 1, 0, 0], x[:, 2, 3, 3]], 1)


def train(model, optimizer, steps, rank=0, world=1):
    losses = []
    for step in steps:
        x, y = (part.chunk(world)[rank] for part in batch(step))
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(folder, die_at):
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    model = network()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = SOAP(model.parameters(), lr=1e-2, precondition_frequency=4, process_group=dist.group.WORLD)
    losses = []
    checkpoint = folder / "checkpoint.pt"
    resumed = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    if resumed is not None:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
    for step in range(resumed["step"] if resumed else 0, STEPS):
        if step == die_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        losses += train(wrapped, optimizer, [step], rank, world)
        if step == STEPS // 2 and resumed is None:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            if rank == 0:
                torch.save(saved, folder / "partial")
                (folder / "partial").rename(checkpoint)
            dist.barrier()
    told = {
        "losses": losses,
        "matrices": optimizer.refreshed_matrices,
        "flops": optimizer.refreshed_flops,
        "owned": len(optimizer.state),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    torch.save(model.state_dict(), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    code = 0
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    except RuntimeError:  # torch's own, where the other rank is gone
        traceback.print_exc()
        code = 1
    # Without the interpreter's finalization: it now and then aborts while threads of torch.distributed still run.
    sys.stderr.flush()
    os._exit(code)
