"""A multi-scale progressive model of a quantised latent, after Zhang et al. (arXiv 2210.04112); see docs/MSP.md."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from compressai.ops import quantize_ste
from torch import Tensor, nn

from ..coding import MixtureTables, Tables, constant_tables, join_tables, mixture_tables
from ..functional import factorized_rate, gaussian_rate, mixture_rate, pack_factorized
from ._msp_coding import SCALE_BOUND, Visit, encoding, rounded
from ._msp_decoding import Then, decompress
from ._msp_graphs import Graphs
from ._msp_integer import IntegerContextNetwork, watched
from ._msp_network import PROFILES, ContextNetwork, Profile
from ._msp_stream import Writer
from ._msp_tables import coarsest_tables
from ._schedule import Schedule, Step
from ._threads import number_of_threads
from .entropy_bottleneck import EntropyBottleneck

__all__ = ["PROFILES", "MSPEntropyModel", "Profile"]


class MSPEntropyModel(nn.Module):
    """Likelihoods of a latent, and its bytes, from coarse to fine in a number of steps that the profile alone sets.

    channels: C of the latents [B, C, H, W], any H, W >= 1. profile: "fast" (10 steps), "base" (19), "max" (37), or a
    Profile. mixture: Gaussians an element; more than one has 3K parameters, is rounded
    about 0, and coded by the mixtures of docs/BITSTREAM.md.

    The coarsest grid has a learned density a channel. Every other step has scales and means from a network that sees
    the values of all steps before, and no other. Training, encoding and decoding are one traversal of one Schedule,
    with the same calls on tensors of the same shapes: on one machine and number of threads their parameters are equal
    to the bit. Convolutions are not exact arithmetic: another machine may round otherwise. make_portable() quantises
    the networks to integers, whose streams decode on any machine, device, thread count and torch. Streams say which
    they are, and carry a check of every step's levels: a decoder that computes others raises BitstreamError.

    exact: whether forward() in eval mode, step_parameters() and compress() use the integer networks: True once there
    are any (of make_portable() or a state dict), False for the float ones. decompress() does as the stream says.

    threads: with how many the networks run on the CPU in compress(), decompress(), step_parameters() and forward() in
    eval mode. The default, 1, makes streams independent of torch.set_num_threads(), by which convolutions round
    otherwise; None leaves torch's number, and ties a stream to it. Training is not affected.

    lanes: chains that compress() interleaves (lic_fast.coding.encode); a GPU decodes more side by side, for bytes.

    cuda_graph: whether decompress() on a GPU replays a CUDA graph from the second image of a shape on; such images, and
    the last few shapes' graphs, keep their memory. It is dropped where weights change or move.

    The coding tables of the coarsest grid are made by update() and belong to the state dict.

    Raises ValueError for profiles and sizes.
    Source: Zhang et al. (arXiv 2210.04112): multi-scale, progressive, spatial and channel correlation, O(1) steps,
    profiles. Its networks are not public to us: all sizes, the order and the networks are our reconstruction.
    """

    exact = False
    threads: int | None = 1
    lanes: int | str = "auto"
    cuda_graph = True

    def __init__(self, channels: int, profile: str | Profile = "base", *, mixture: int = 1) -> None:
        super().__init__()
        sizes = PROFILES.get(profile) if isinstance(profile, str) else profile
        if not isinstance(sizes, Profile):
            raise ValueError(f"MSPEntropyModel: profile must be one of {', '.join(PROFILES)}, got {profile!r}")
        if not 1 <= mixture <= 16:
            raise ValueError(f"MSPEntropyModel: mixture must be 1 to 16 components, got {mixture}")
        self.schedule, self.profile, self.mixture = Schedule(channels, sizes.scales, sizes.groups), sizes, mixture
        self.bottleneck = EntropyBottleneck(channels)
        self.network = ContextNetwork(self.schedule, sizes, mixture)
        self.register_module("integers", None)  # the portable networks, by make_portable() or from a state dict
        self.register_buffer("tables", torch.empty(0, dtype=torch.uint8))
        self._joined: tuple[bytes, Tables] | None = None
        self._graphs = Graphs()

    # Traversal

    def _traverse(self, y: Tensor, visit: Visit, network: Any = None) -> None:
        """Visits every step that has elements, in order, with its parameters (None for the coarsest grid).

        visit returns the step's values [B, c, h, w], contiguous; grids are read from y, where they are by then. Through
        the float network, or `network`.
        """
        network = (self.network if network is None else network).prepared()
        coarsest = self.schedule.steps[0]
        visit(coarsest, None)
        for scale in reversed(range(self.profile.scales)):
            # a copy even where it is all of y: where there are gradients, steps write into y what these go through
            coarse = y[:, :, :: 2 << scale, :: 2 << scale].clone(memory_format=torch.contiguous_format)
            state = network.open(scale, coarse)
            for step in self.schedule.at(scale):
                h, w = step.sides(*y.shape[2:])
                part = visit(step, network.parameters(state, step)[:, :, :h, :w]) if h and w else None
                state = network.add(state, step, part)

    def _given(self, y_hat: Tensor, visit: Callable[[Step, Tensor | None], None], network: Any = None) -> None:
        """_traverse where all values are known; through the float network, or `network`."""
        parts = self.schedule.pack(y_hat).split(self.schedule.counts(*y_hat.shape[2:]), 1)

        def known(step: Step, parameters: Tensor | None) -> Tensor:
            visit(step, parameters)
            h, w = step.sides(*y_hat.shape[2:])
            return parts[step.index].reshape(len(y_hat), -1, h, w)

        self._traverse(y_hat, known, network)

    def _grown(
        self,
        y_hat: Tensor,
        code: Callable[[Step, Tensor, Tensor | None], Tensor],
        network: Any = None,
        coding: bool = True,
    ) -> None:
        """_traverse where code(step, means, parameters) gives the rounded differences from the means; fills y_hat.

        Through the network that `exact` says, or `network`; on `threads` threads where it is for coding.
        """

        def grow(step: Step, parameters: Tensor | None) -> Tensor:
            place = step.of(y_hat)
            if parameters is None:
                means = self._medians().to(y_hat).view(1, -1, 1, 1).expand(place.shape)
            elif self.mixture == 1:
                means = parameters[:, place.shape[1] :]
            else:
                means = torch.zeros_like(place)
            values = (code(step, means, parameters) + means).contiguous()
            place.copy_(values)
            return values

        network = self._coding_network() if network is None else network
        with self._own_threads(y_hat, network) if coding else contextlib.nullcontext():
            self._traverse(y_hat, grow, network)

    def _coding_network(self) -> nn.Module:
        return self.integers if self.exact and self.integers is not None else self.network

    def _own_threads(self, y: Tensor, network: Any = None) -> contextlib.AbstractContextManager[None]:
        free = self.threads is None or not y.is_cpu or (network is not None and network is self.integers)
        return contextlib.nullcontext() if free else number_of_threads(self.threads)

    def _medians(self) -> Tensor:
        return self.bottleneck.quantiles[:, 0, 1].detach()

    @torch.no_grad()
    def step_parameters(self, y_hat: Tensor) -> list[tuple[Step, Tensor]]:
        """(step, parameters [B, P, h, w]) of all steps but the first that have elements, given all values.

        y_hat [B, C, H, W]. P is 2 c for c channels (scales, then means), 3 K c for a mixture. For B = 1, on
        one machine, these are the numbers that compress() and decompress() use, to the bit.
        Raises ValueError for the shape.
        """
        found: list[tuple[Step, Tensor]] = []
        network = self._coding_network()
        with self._own_threads(y_hat, network):
            self._given(y_hat, lambda step, p: None if p is None else found.append((step, p)), network)
        return found

    # Likelihoods

    def forward(
        self, y: Tensor, training: bool | None = None, *, quantize: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(y_hat, likelihoods), both [B, C, H, W], of y [B, C, H, W]; fp32 (fp64 for fp64).

        training (default: the module's mode): y_hat is rounded as decompress() gives it, with the derivative 1 in y,
        and makes all contexts; the likelihoods are those of y plus uniform noise. Else they are y_hat's, without
        derivatives.

        quantize, for encoders that search for y (not in training): takes the place of rounding, [B, c, h, w] a step
        of differences from the means to the same, in the order of the schedule. What it gives makes the contexts too,
        and there are derivatives in y through all of it. Rounding in it gives what no quantize gives with exact=False,
        to the bit: derivatives need the float networks.
        Raises ValueError for the shape.
        """
        if training is None:
            training = self.training
        y = self._checked("forward", y)
        packed: list[Tensor] = []
        y_hat = torch.empty_like(y, memory_format=torch.contiguous_format)
        if training:
            quantize = quantize_ste

        def quantised(step: Step, means: Tensor, parameters: Tensor | None) -> Tensor:
            if parameters is not None:
                packed.append(parameters.reshape(len(y), self._kinds, -1).to(y.dtype))
            return rounded(step.of(y), means) if quantize is None else quantize(step.of(y) - means)

        with torch.set_grad_enabled(quantize is not None and torch.is_grad_enabled()):
            self._grown(y_hat, quantised, None if quantize is None else self.network, coding=not training)
        parameters = torch.cat([y.new_empty((len(y), self._kinds, 0)), *packed], 2)
        values = y + torch.empty_like(y).uniform_(-0.5, 0.5) if training else y_hat
        return y_hat, self.schedule.unpack(self._likelihoods(values, parameters), *y.shape[2:])

    @property
    def _kinds(self) -> int:
        """Parameters an element."""
        return 2 if self.mixture == 1 else 3 * self.mixture

    def _likelihoods(self, values: Tensor, parameters: Tensor) -> Tensor:
        """[B, C * H * W] in the stream's order: of values [B, C, H, W], with parameters [B, kinds, N]."""
        packed = self.schedule.pack(values)
        first = packed.shape[1] - parameters.shape[2]
        grid = packed[:, :first].reshape(len(packed), self.schedule.channels, -1)
        weights = [list(each) for each in (self.bottleneck.matrices, self.bottleneck.biases, self.bottleneck.factors)]
        options = {"output": "likelihood", "bound": "none"}
        _, coarsest = factorized_rate(
            grid, pack_factorized(*weights).to(grid.dtype), filters=self.bottleneck.filters, **options
        )
        rest, options["scale_bound"] = packed[:, first:].contiguous(), SCALE_BOUND
        if self.mixture == 1:
            scales, means = (each.contiguous() for each in parameters.unbind(1))
            _, finer = gaussian_rate(rest, scales, means, **options)
        elif rest.numel() == 0:
            finer = rest
        else:
            rows = (each.reshape(len(rest), -1) for each in parameters.chunk(3, 1))
            _, finer = mixture_rate(rest, *rows, logits=True, **options)
        return torch.cat([coarsest.flatten(1), finer], 1)

    def _checked(self, function: str, y: object) -> Tensor:
        c = self.schedule.channels
        if not isinstance(y, Tensor) or not y.is_floating_point():
            raise TypeError(
                f"MSPEntropyModel.{function}: y must be a floating-point tensor, got {_kind(y)}; convert it"
            )
        if y.dim() != 4 or y.shape[1] != c or 0 in y.shape[2:]:
            raise ValueError(
                f"MSPEntropyModel.{function}: y must be [B, {c}, H, W] with H, W >= 1, got {list(y.shape)}; "
                "make the model with the latent's channels"
            )
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def aux_loss(self) -> Tensor:
        """The auxiliary loss of the coarsest grid's quantiles, as CompressAI's models have it."""
        return self.bottleneck.loss()

    # Coding

    @torch.no_grad()
    def make_portable(self, latents: Tensor | Iterable[Tensor]) -> None:
        """Makes integer networks of the trained ones; streams are portable from then on (`exact`).

        latents [B, C, H, W], or several such: what the analysis transform makes of a few photographs; the ranges
        of the integers are what these reach. The integer networks belong to the state dict. They follow no training:
        call this again after it, or load a state dict without them.

        Raises ValueError for mixtures, weights that are not finite or do not suit the latents, no latents, their shapes
        and values; TypeError for dtypes.
        """
        f = "make_portable"
        if self.mixture != 1:
            raise ValueError(
                f"MSPEntropyModel.{f}: mixtures have no integer networks, got {self.mixture}; use mixture=1"
            )
        with watched(self.network) as network:
            for y in [latents] if isinstance(latents, Tensor) else latents:
                y = self._finite(f, y)
                with torch.autocast(y.device.type, enabled=False):
                    self._grown(torch.empty_like(y), lambda s, means, _, y=y: rounded(s.of(y), means), network)
        made = self._new_integers()
        made.quantise(network)
        self.integers, self.exact = made, True

    @torch.no_grad()
    def update(self, force: bool = False) -> bool:
        """Makes the coding tables of the coarsest grid from its density, where there are none or by force.

        Returns whether it did. Call it after training, and save the state dict then: a stream decodes with the tables
        that it was coded with. Raises ValueError for a density that is not finite.
        """
        if self.tables.numel() and not force:
            return False
        made = coarsest_tables(self.bottleneck)
        self.tables = torch.frombuffer(bytearray(made.serialized), dtype=torch.uint8).to(self.tables.device)
        return True

    def coding_tables(self) -> Tables:
        """The constant Gaussian set, followed by a level for each channel of the coarsest grid.

        Raises ValueError where update() was not called.
        """
        if self.tables.numel() == 0:
            raise ValueError("MSPEntropyModel: there are no coding tables yet; call update()")
        data = self.tables.cpu().numpy().tobytes()
        if self._joined is None or self._joined[0] != data:
            self._joined = (data, join_tables(constant_tables("gaussian"), Tables(data)))
        return self._joined[1]

    @property
    def _mixtures(self) -> MixtureTables | None:
        """The tables of mixtures, where elements are such."""
        return None if self.mixture == 1 else mixture_tables()

    def _finite(self, function: str, y: object) -> Tensor:
        y = self._checked(function, y).float()
        if not bool(y.isfinite().all()):
            raise ValueError(
                f"MSPEntropyModel.{function}: y must be finite, got NaN or Inf; look for where they came from"
            )
        return y

    def _codable(self, function: str) -> Tables:
        if self.bottleneck.quantiles.dtype is not torch.float32:
            raise TypeError(
                f"MSPEntropyModel.{function}: needs fp32 parameters, got {self.bottleneck.quantiles.dtype}; "
                "convert the model with .float()"
            )
        return self.coding_tables()

    @torch.no_grad()
    def compress(self, y: Tensor) -> list[bytes]:
        """A stream for each sample of y [B, C, H, W]. What decompress() gives is forward(y[b : b + 1], False)[0].

        Raises ValueError for shapes, for values that are not finite, and where update() was not called;
        TypeError for dtypes.
        """
        y, tables = self._finite("compress", y), self._codable("compress")
        return [self._compress_one(sample[None], tables) for sample in y]

    def _compress_one(self, y: Tensor, tables: Tables) -> bytes:
        network = self._coding_network()
        writer = Writer(tables, self._mixtures, portable=network is self.integers, lanes=self.lanes)
        y = y.contiguous()
        y_hat = torch.empty_like(y)
        self._coded(y_hat, encoding(writer, y, y_hat, self._medians(), tables, self._mixtures), network)
        return writer.finish()

    @torch.no_grad()
    def decompress(self, strings: Sequence[bytes], shape: Sequence[int], *, then: Then | None = None) -> Tensor:
        """y_hat [B, C, *shape] fp32, on the model's device, of B streams of compress(); shape: (H, W).

        then: what is made of y_hat, and returned in its place; of one stream on a GPU in the same graph.

        Raises BitstreamError (a ValueError) for streams that are truncated, damaged, of another shape, or made where
        parameters come out otherwise (other weights, machine, torch, number of threads); ValueError for the shape.
        """
        return decompress(self, strings, shape, then)

    def _coded(self, y_hat: Tensor, visit: Visit, network: nn.Module) -> None:
        with torch.autocast(y_hat.device.type, enabled=False), self._own_threads(y_hat, network):
            self._traverse(y_hat, visit, network)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        new = state_dict.get(prefix + "tables")
        if isinstance(new, Tensor) and new.shape != self.tables.shape:
            self.tables = self.tables.new_empty(new.shape)
        self.exact = any(key.startswith(prefix + "integers.") for key in state_dict)
        self.register_module("integers", self._new_integers() if self.exact else None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _new_integers(self) -> nn.Module:
        made = IntegerContextNetwork(self.schedule, self.profile)
        return made.to(self.bottleneck.quantiles.device)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
