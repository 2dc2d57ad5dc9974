"""How well the refresh of SOAP's eigenbases does on the factors of a real training, and on batches made to break it.

`python -m lic_fast.benchmarks.factors [--model NAME] [--channels N,M] [--steps 100] [--data DIR] [--output FILE]`

Trains a model on photographs with SOAP, takes all factors at the last refresh, and measures for each method against
Householder's QR in fp64 of the same product GG Q: how many matrices it served itself, the orthogonality of the result,
the error of its columns, and the off-diagonal energy of Q^T GG Q beside that of the fp32 QR which other SOAPs take.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..functional import refresh_eigenbasis
from ..optim import SOAP
from ..training.data import RandomCrops, Schedule, open_photos
from ..training.errors import TrainingError, optional_import
from ..training.loss import RateDistortionLoss
from ..training.models import build_model, resolve_channels, split_parameters

COLUMNS = (
    "model", "channels", "steps", "method", "matrices", "served", "orthogonality", "column_error_worst",
    "column_error_independent", "energy_ratio_worst",
)  # fmt: skip
ROUNDING = 1e-6  # of an energy, as a share of GG's norm: what fp32's rounding of GG and Q leaves anyway
Basis = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # GG, Q -> new, order, served


def capture(model: str, channels: tuple[int, ...], steps: int, data: str | None, seed: int = 0, batch: int = 4):
    """[(GG [N, d, d], Q [N, d, d])] of all factors after `steps` training steps on photographs, one pair a size."""
    torch.manual_seed(seed)
    net = build_model(model, channels)
    main, _ = split_parameters(net)
    optimizer = SOAP([p for _, p in main], lr=1e-3, weight_decay=0.0)
    photos = open_photos(data, "factors")
    crops = RandomCrops(photos, 128, seed)
    schedule = Schedule(len(photos), batch, steps, seed)
    criterion = RateDistortionLoss(0.013)
    bar = optional_import("tqdm").tqdm(range(steps), unit="step")
    for _, places in zip(bar, schedule.batches(0, 0), strict=False):
        x = torch.stack([crops[place] for place in places]).float().div_(255)
        optimizer.zero_grad()
        criterion(net(x), x, x.new_zeros(()))["loss"].backward()
        optimizer.step()
    stacks: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for state in optimizer.state.values():
        for GG, Q in zip(state["GG"], state["Q"], strict=True):
            if len(GG):
                stacks.setdefault(len(GG), []).append((GG.clone(), Q.clone()))
    return [tuple(map(torch.stack, zip(*pairs, strict=True))) for _, pairs in sorted(stacks.items())]


def by_method(method: str) -> Basis:
    """A method of lic_fast.functional.refresh_eigenbasis."""

    def run(GG: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new, order, _, served = refresh_eigenbasis([GG], [Q], method=method)
        return new[0], order[0], served[0]

    return run


def qr_fp32(GG: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Product and Householder's QR in fp32, as nikhilvyas/SOAP and its ports take them."""
    P = GG @ Q
    order = (Q * P).sum(-2).argsort(dim=-1, descending=True, stable=True)
    new = torch.linalg.qr(P.gather(-1, order[:, None].expand(P.shape))).Q
    return new, order, torch.ones(len(GG), dtype=torch.bool)


METHODS: dict[str, Basis] = {
    "cholesky_qr": by_method("cholesky_qr"),
    "qr": by_method("qr"),
    "torch.linalg.qr fp32": qr_fp32,
}


def orthogonality(Q: Tensor) -> Tensor:
    """max |Q^T Q - I| of each matrix."""
    Q = Q.double()
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=torch.float64)).abs().amax((-2, -1))


def energy(GG: Tensor, Q: Tensor) -> Tensor:
    """Off-diagonal norm of Q^T GG Q of each matrix, as a share of GG's norm."""
    rotated = Q.double().mT @ GG.double() @ Q.double()
    off = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.matrix_norm(off) / torch.linalg.matrix_norm(GG.double()).clamp_min(1e-300)


def column_errors(new: Tensor, GG: Tensor, Q: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """(error of each column [N, d], whether it is independent of those before it to fp64's rounding [N, d])."""
    P = (GG.double() @ Q.double()).gather(-1, order[:, None].expand(Q.shape))
    exact, R = torch.linalg.qr(P)
    pivots = R.diagonal(dim1=-2, dim2=-1).abs()
    independent = pivots > 1e-7 * torch.linalg.vector_norm(P, dim=-2)
    sign = torch.where((new.double() * exact).sum(-2, keepdim=True) < 0, -1.0, 1.0)
    return torch.linalg.vector_norm(new.double() * sign - exact, dim=-2), independent


def judge(name: str, run: Basis, stacks: list[tuple[Tensor, Tensor]]) -> dict[str, object]:
    """One row of the table."""
    served = matrices = 0
    worst = {"orthogonality": 0.0, "all": 0.0, "independent": 0.0, "energy": 0.0}
    for GG, Q in stacks:
        new, order, good = run(GG, Q)
        errors, independent = column_errors(new, GG, Q, order)
        peer = energy(GG, qr_fp32(GG, Q)[0])
        matrices, served = matrices + len(GG), served + int(good.sum())
        worst["orthogonality"] = max(worst["orthogonality"], orthogonality(new).max().item())
        worst["all"] = max(worst["all"], errors.max().item())
        worst["independent"] = max(worst["independent"], torch.where(independent, errors, 0).max().item())
        worst["energy"] = max(worst["energy"], ((energy(GG, new) + ROUNDING) / (peer + ROUNDING)).max().item())
    figures = (worst["orthogonality"], worst["all"], worst["independent"], worst["energy"])
    return dict(zip(COLUMNS[3:], (name, matrices, served, *(f"{x:.3g}" for x in figures)), strict=True))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(argv: list[str] | None = None) -> int:
    """Runs it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lic_fast.benchmarks.factors", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mbt2018-mean")
    parser.add_argument("--channels", type=_numbers, default=None, metavar="N,M")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--data", default=None, help="folder of photographs (default: those inside scikit-image)")
    parser.add_argument("--output", type=Path, default=None, help="CSV file that the rows are added to")
    args = parser.parse_args(argv)
    try:
        channels = resolve_channels(args.model, args.channels, 0.013)
        stacks = capture(args.model, channels, args.steps, args.data)
    except (TrainingError, ValueError, ImportError) as error:
        print(f"factors: error: {error}", file=sys.stderr)
        return 2
    described = {"model": args.model, "channels": " ".join(map(str, channels)), "steps": args.steps}
    rows = [described | judge(name, run, stacks) for name, run in METHODS.items()]
    widths = {c: max(len(c), *(len(str(row[c])) for row in rows)) for c in COLUMNS}
    for row in ({c: c for c in COLUMNS}, *rows):
        print("  ".join(str(row[c]).ljust(widths[c]) for c in COLUMNS))
    if args.output is not None:
        fresh = not args.output.exists()
        with args.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
