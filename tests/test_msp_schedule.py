"""The schedule of the multi-scale progressive model: what is coded when, and what each step may know."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("compressai")

from lic_fast.entropy import PROFILES, MSPEntropyModel, Profile, Schedule

SHAPES = [(1, 1), (1, 2), (2, 1), (1, 9), (3, 3), (7, 5), (8, 8), (9, 16), (13, 1)]
SMALL = Profile(scales=2, groups=2, width=6, depth=1)


@st.composite
def schedules(draw):
    channels = draw(st.integers(1, 7))
    schedule = Schedule(channels, draw(st.integers(1, 5)), draw(st.integers(1, channels)))
    return schedule, draw(st.integers(1, 40)), draw(st.integers(1, 40))


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_every_element_is_coded_exactly_once(drawn) -> None:
    schedule, height, width = drawn
    times = torch.zeros(1, schedule.channels, height, width)
    for step, count in zip(schedule.steps, schedule.counts(height, width), strict=True):
        place = step.of(times)
        assert place.numel() == count and (count == 0 or place.shape[2:] == step.sides(height, width))
        place += 1
    assert bool((times == 1).all())
    assert len(schedule) == len(schedule.steps) == 1 + 3 * schedule.scales * schedule.groups
    assert [step.index for step in schedule.steps] == list(range(len(schedule)))


@settings(max_examples=50, deadline=None)
@given(schedules())
def test_unpack_is_the_inverse_of_pack(drawn) -> None:
    schedule, height, width = drawn
    y = torch.randn(2, schedule.channels, height, width)
    packed = schedule.pack(y)
    assert torch.equal(schedule.unpack(packed, height, width), y)
    parts = packed.split(schedule.counts(height, width), 1)
    for step, part in zip(schedule.steps, parts, strict=True):
        assert torch.equal(part, step.of(y).flatten(1))


def test_pack_and_unpack_have_gradients() -> None:
    schedule = Schedule(3, 2, 2)
    y = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(schedule.pack, y)
    packed = torch.randn(2, 90, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: schedule.unpack(p, 5, 6), packed)


def test_the_number_of_steps_is_the_profiles() -> None:
    steps = {name: len(Schedule(192, sizes.scales, sizes.groups)) for name, sizes in PROFILES.items()}
    assert steps == {"fast": 10, "base": 19, "max": 37}


def test_what_a_schedule_refuses() -> None:
    for wrong in [(4, 0, 1), (4, 17, 1), (4, 3, 0), (4, 3, 5)]:
        with pytest.raises(ValueError, match="Schedule: "):
            Schedule(*wrong)
    schedule = Schedule(3)
    with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\]"):
        schedule.pack(torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"must be \[B, 75\]"):
        schedule.unpack(torch.zeros(1, 74), 5, 5)


def _parameters(model: MSPEntropyModel, y: torch.Tensor) -> dict[int, torch.Tensor]:
    return {step.index: parameters for step, parameters in model.step_parameters(y)}


@pytest.mark.parametrize("shape", [(5, 7), (6, 4)])
def test_parameters_depend_on_earlier_steps_alone(shape: tuple[int, int]) -> None:
    """Every element in turn is changed by an odd number: no step up to its own may notice, some later one must."""
    torch.manual_seed(0)
    model = MSPEntropyModel(3, SMALL)
    y = torch.randn(1, 3, *shape)
    before = _parameters(model, y)
    noticed = set()
    for step in model.schedule.steps:
        for place in range(step.of(y).numel()):
            changed = y.clone()
            part = step.of(changed)
            part.view_as(part)[(0, *torch.unravel_index(torch.tensor(place), part.shape[1:]))] += 7.25
            after = _parameters(model, changed)
            assert after.keys() == before.keys()
            differ = {index for index in before if not torch.equal(before[index], after[index])}
            assert all(index > step.index for index in differ), (step, differ)
            if differ:
                noticed.add(step.index)
    last = max(before)
    assert noticed >= {index for index in before if index < last} | {0}, "a step that nothing looks at"


@pytest.mark.parametrize("scale", [0, 1])
def test_channel_groups_see_the_groups_before_them(scale: int) -> None:
    torch.manual_seed(1)
    model = MSPEntropyModel(4, SMALL)
    y = torch.randn(1, 4, 8, 8)
    first, second = model.schedule.at(scale)[:2]
    assert first.phase == second.phase and (first.group, second.group) == (0, 1)
    changed = y.clone()
    first.of(changed).add_(1)
    before, after = _parameters(model, y), _parameters(model, changed)
    assert torch.equal(before[first.index], after[first.index])
    assert not torch.equal(before[second.index], after[second.index])


@pytest.mark.parametrize("shape", [(1, 3), (5, 4), (9, 16)], ids=str)
@torch.no_grad()
def test_parameters_are_those_of_a_masked_convolution(shape: tuple[int, int]) -> None:
    """As documented: the 5x5 kernel over what is known of a step's grid, a bias a phase, the head of the group."""
    torch.manual_seed(0)
    model = MSPEntropyModel(5, SMALL).double().eval()
    network, width = model.network, model.profile.width
    network.biases.normal_()
    y = torch.randn(2, 5, *shape, dtype=torch.float64) * 4
    for step, parameters in model.step_parameters(y):
        known = torch.zeros_like(y)
        for earlier in model.schedule.steps[: step.index]:
            earlier.of(known).fill_(1)
        grid, mask = (each[:, :, :: 1 << step.scale, :: 1 << step.scale] for each in (y, known))
        values = torch.cat([grid * mask, grid.abs() * mask], 1)
        state = torch.nn.functional.conv2d(values, network.kernel.flatten(1, 2), padding=2)
        i, j = step.phase
        phase = ((1, 1), (0, 1), (1, 0)).index(step.phase)
        bias = network.biases[step.scale][phase * width : (phase + 1) * width]
        expected = network.heads[step.group](state[:, :, i::2, j::2] + bias.view(-1, 1, 1))
        torch.testing.assert_close(parameters, expected, rtol=1e-10, atol=1e-10)
