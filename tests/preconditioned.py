"""Lists of tensors with factors, as SOAP's ops take them."""

from __future__ import annotations

import torch

HYPER = [3e-3, 0.9, 0.95, 0.8, 1e-8, 0.05]

# Walked shapes: [taps..., R, C]; with the axes that have no factor.
SHAPES = [
    ((3, 3, 8, 6), ()),
    ((5, 5, 3, 17), ()),
    ((12, 33), ()),
    ((40, 20), (0,)),
    ((4, 70), (1,)),
    ((9,), ()),
    ((2, 3, 2, 5, 7), ()),
    ((3, 1, 5), (1,)),
    ((3, 16, 16), (0, 1)),
    ((1, 1), (0,)),
]


def factor(d, g, dtype):
    a = (
        torch.randn(d, 2 * d + 3, generator=g, dtype=torch.float64)
        * torch.logspace(0, -2, d, dtype=torch.float64)[:, None]
    )
    product = (a @ a.T / (2 * d + 3)).to(dtype)
    return torch.tril(product) + torch.tril(product, -1).T


def basis(d, g, dtype):
    return torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q.contiguous().to(dtype)


def tensors(shapes, param_dtype=torch.float32, device="cpu", seed=0, steps=3):
    """The arguments of soap_update_ but its settings, as a dictionary, in the dtypes SOAP would have."""
    g = torch.Generator().manual_seed(seed)
    state = torch.float64 if param_dtype is torch.float64 else torch.float32

    def made(*shape, scale=1.0):
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(device)

    args = {name: [] for name in ("params", "grads", "exp_avg", "exp_avg_sq", "GG", "Q")}
    for shape, without in shapes:
        args["params"].append(made(*shape).to(param_dtype))
        args["grads"].append(made(*shape, scale=0.1).to(param_dtype))
        args["exp_avg"].append(made(*shape, scale=0.1).to(state))
        args["exp_avg_sq"].append(made(*shape, scale=0.1).square().to(state))
        for axis, d in enumerate(shape):
            empty = torch.empty(0, 0, dtype=state, device=device)
            args["GG"].append(empty if axis in without else factor(d, g, state).to(device))
            args["Q"].append(empty if axis in without else basis(d, g, state).to(device))
    args["counts"] = torch.tensor([[steps, 1]] * len(shapes), dtype=torch.int64, device=device)
    args["hyper"] = torch.tensor(
        [[x * (1 + 0.01 * i) for x in HYPER] for i in range(len(shapes))], dtype=torch.float64, device=device
    )
    args["hyper"][:, 1:4].clamp_(max=0.99)
    return args


def copied(args, dtype=None):
    """A deep copy, its floating tensors but hyper in `dtype`."""

    def copy(x):
        return x.to(dtype, copy=True) if dtype is not None and x.is_floating_point() else x.clone()

    return {
        name: [copy(x) for x in value] if isinstance(value, list) else value.clone() for name, value in args.items()
    }
