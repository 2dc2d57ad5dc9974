"""Lists of parameters of which a part is embedded, as the stdet ops take them."""

from __future__ import annotations

import torch

from lic_fast.functional import FlatLayout
from lic_fast.reference._layout import flat

WRITTEN = ("params", "slow", "exp_avg", "exp_avg_sq")
# lr / (1 - b1^t), b1, b2, 1 / sqrt(1 - b2^t), eps, l2, decay
HYPER = [3e-3, 0.9, 0.99, 1.5, 1e-8, 0.0, 0.0]


def coded(layout, g, tied=0.5, kept=0.2, outside=0.3, modes=3):
    """A random code. tied: of all elements; kept: of those, the part with a state; outside: of the others."""
    code = layout.new_code()
    for part in layout.split(code):
        n = len(part)
        is_tied, has_state, is_outside = (torch.rand(n, generator=g) < share for share in (tied, kept, outside))
        mode = torch.randint(modes, (n,), generator=g, dtype=torch.uint8)
        mode[is_outside & ~is_tied] = layout.OUTSIDE
        part.copy_(mode | is_tied * layout.TIED | (is_tied & ~has_state) * layout.STATELESS)
    return code


def references(layout, code, g, modes):
    """[modes, 3]: random elements, free from now on."""
    places = torch.tensor([a + i for a, n in zip(layout.starts, layout.sizes, strict=False) for i in range(n)]).long()
    chosen = places[torch.randperm(len(places), generator=g)[:modes]]
    code[chosen] &= layout.OUTSIDE
    slots = (code & layout.STATELESS).eq(0).cumsum(0) - 1
    rows = []
    for place in chosen.tolist():
        tensor = max(t for t, first in enumerate(layout.starts[:-1]) if first <= place and layout.sizes[t])
        rows.append([tensor, place - layout.starts[tensor], slots[place].item()])
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def embedded(shapes, dtype=torch.float32, device="cpu", seed=0, modes=3, missing=(), slow=True, hyper=HYPER, **shares):
    """The arguments of stdet_adam_step_ but its settings, as a dictionary. missing: tensors without a gradient."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def made(*shape, scale=1.0, dtype=wide):
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype).to(device)

    params = [made(*shape, dtype=dtype) for shape in shapes]
    layout = FlatLayout([p.numel() for p in params])
    code = coded(layout, g, modes=max(modes, 1), **shares)
    refs = references(layout, code, g, modes)
    states = int((code & layout.STATELESS).eq(0).sum())
    embeddable = int((code & layout.OUTSIDE).ne(layout.OUTSIDE).sum())
    none = torch.empty(0, dtype=dtype, device=device)
    return {
        "params": params,
        "grads": [none if t in missing else made(*p.shape, scale=0.1, dtype=dtype) for t, p in enumerate(params)],
        "slow": [p.to(wide) + made(*p.shape, scale=0.01) for p in params] if slow else [],
        "code": code.to(device),
        "base": layout.base_of(code).to(device),
        "k": 1 + made(embeddable, scale=0.1),
        "d": made(embeddable, scale=0.1),
        "exp_avg": made(states, scale=0.1),
        "exp_avg_sq": made(states, scale=0.1).square(),
        "refs": refs.to(device),
        "hyper": torch.tensor([[x * (1 - 1e-3 * t) for x in hyper] for t in range(len(params))], dtype=torch.float64),
    }


def copied(args, dtype=None):
    """Copies, layout in memory and all, floats in `dtype` where given."""

    def copy(x):
        return x.to(dtype, copy=True) if dtype is not None and x.is_floating_point() else x.clone()

    return {name: [copy(x) for x in value] if isinstance(value, list) else copy(value) for name, value in args.items()}


def written(args):
    """What a step may change, as one list."""
    return [*args["params"], *args["slow"], args["exp_avg"], args["exp_avg_sq"]]


def spread(args, name, default=0.0):
    """A compact tensor as one value for each place, `default` where there is none."""
    code = args["code"]
    bits = FlatLayout.STATELESS if name.startswith("exp") else FlatLayout.OUTSIDE
    has = code & bits != bits if bits == FlatLayout.OUTSIDE else code & bits == 0
    return torch.full(code.shape, default, dtype=args[name].dtype, device=code.device).masked_scatter(has, args[name])


def by_equations(args, alpha, reset):
    """params, slow and both averages after a step in fp64, dense and written down apart from the reference."""
    x, layout = copied(args, torch.float64), FlatLayout([p.numel() for p in args["params"]])
    m, v, k, d = (layout.split(spread(x, name)) for name in ("exp_avg", "exp_avg_sq", "k", "d"))
    code = layout.split(x["code"])
    tied, free = [c >= 128 for c in code], [c < 64 for c in code]
    for t, (p, grad) in enumerate(zip(x["params"], x["grads"], strict=True)):
        if grad.numel() != p.numel():
            continue
        step, b1, b2, scale, eps, l2, decay = x["hyper"][t].tolist()
        p, grad = flat(p), flat(grad) + l2 * flat(p)
        mean, square = b1 * m[t] + (1 - b1) * grad, b2 * v[t] + (1 - b2) * grad**2
        p[free[t]] = (p * (1 - decay) - step * mean / (scale * square.sqrt() + eps))[free[t]]
        m[t][free[t]], v[t][free[t]] = mean[free[t]], square[free[t]]
    for s, p, is_tied in zip(x["slow"], x["params"], tied, strict=False):
        flat(s)[~is_tied] = (1 - alpha) * flat(s)[~is_tied] + alpha * flat(p)[~is_tied]
    for tensors in (x["params"], x["slow"]):
        if tensors:
            r = torch.tensor([flat(tensors[t])[e].item() for t, e, _ in x["refs"].tolist()] + [0.0])
            for t, p in enumerate(tensors):
                value = k[t] * r.double()[(code[t] & 63).long().clamp(max=len(r) - 1)] + d[t]
                flat(p)[tied[t]] = value[tied[t]]
    if x["slow"] and reset:
        for p, s in zip(x["params"], x["slow"], strict=True):
            p.copy_(s)
    has = x["code"] & layout.STATELESS == 0
    joined = [torch.zeros(len(has), dtype=torch.float64) for _ in range(2)]
    for whole, parts in zip(joined, (m, v), strict=True):
        for target, part in zip(layout.split(whole), parts, strict=True):
            target.copy_(part)
    return [*x["params"], *x["slow"], *(whole[has.cpu()] for whole in joined)]
