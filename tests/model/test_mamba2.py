"""The Mamba-2 mixer is the same whole, in pieces, token by token and ragged, with gradients and without; in less
precision it is close. Steps follow the weights."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayes_dispatch.model.mambaformer.cache import MambaState
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.mambaformer.mixers import Mamba2Mixer, Span, mamba2

if TYPE_CHECKING:
    from bayes_dispatch.model.mambaformer.network import MambaFormerForCausalLM

MakeMixer = Callable[..., Mamba2Mixer]


@pytest.fixture(scope="module")
def make_mixer(make_model: "Callable[..., MambaFormerForCausalLM]") -> MakeMixer:
    def make(*, groups: int = 2, taps: int = 4, dtype: torch.dtype = torch.float64) -> Mamba2Mixer:
        config = MambaFormerConfig(
            d_model=16, n_heads=2, d_state=3, head_dim=8, chunk_size=4, n_groups=groups, d_conv=taps, blocks=("mamba2",)
        )
        mixer = make_model(config, dtype=dtype).blocks[0].mixer
        assert isinstance(mixer, Mamba2Mixer)
        return mixer

    return make


@pytest.fixture(scope="module")
def mixer(make_mixer: MakeMixer) -> Mamba2Mixer:
    return make_mixer()


def inputs(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def states_close(got: MambaState, expected: MambaState) -> None:
    close(got.conv, expected.conv)
    close(got.ssm, expected.ssm)


@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    recording=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    taps=st.sampled_from([2, 4]),
    tokens=st.sampled_from([1, 12, 100]),
)
def test_any_split_through_the_state_is_one_pass(
    make_mixer: MakeMixer, parts: list[int], recording: bool, groups: int, taps: int, tokens: int
) -> None:
    mixer, x = make_mixer(groups=groups, taps=taps), inputs(sum(parts))
    whole_state, state = (mixer.init_state(2, torch.float64) for _ in range(2))
    whole = mixer(x, Span(), {}, whole_state)
    with torch.set_grad_enabled(recording), pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba2, "PIECE", tokens)
        outputs = [mixer(part, Span(), {}, state) for part in x.split(parts, dim=1)]
    close(torch.cat(outputs, 1), whole)
    states_close(state, whole_state)


@settings(max_examples=30, deadline=None)
@given(
    first=st.tuples(*[st.integers(0, 7)] * 3),
    second=st.tuples(*[st.integers(0, 6)] * 3),
    third=st.tuples(*[st.integers(0, 1)] * 3),
    recording=st.booleans(),
    tokens=st.sampled_from([1, 12, 100]),
)
def test_ragged_rows_are_each_row_alone(
    mixer: Mamba2Mixer,
    first: tuple[int, ...],
    second: tuple[int, ...],
    third: tuple[int, ...],
    recording: bool,
    tokens: int,
) -> None:
    state = mixer.init_state(3, torch.float64)
    alone = [mixer.init_state(1, torch.float64) for _ in range(3)]
    for seed, (lengths, width) in enumerate(((first, 7), (second, 6), (third, 1))):
        x = inputs(width, batch=3, seed=seed)
        with torch.set_grad_enabled(recording), pytest.MonkeyPatch.context() as patch:
            patch.setattr(mamba2, "PIECE", tokens)
            y = mixer(x, Span(torch.tensor(lengths)), {}, state)
        for row, length in enumerate(lengths):
            if length:
                close(y[row : row + 1, :length], mixer(x[row : row + 1, :length], Span(), {}, alone[row]))
            close(state.conv[row], alone[row].conv[0])
            close(state.ssm[row], alone[row].ssm[0])


@pytest.mark.parametrize("length", [1, 6])
def test_a_row_without_a_new_token_keeps_its_state(mixer: Mamba2Mixer, length: int) -> None:
    state = mixer.init_state(2, torch.float64)
    with torch.no_grad():
        mixer(inputs(5), Span(), {}, state)
        before = MambaState(state.conv.clone(), state.ssm.clone())
        mixer(inputs(length), Span(torch.tensor([0, length])), {}, state)
    assert torch.equal(state.conv[0], before.conv[0])
    assert torch.equal(state.ssm[0], before.ssm[0])
    assert not torch.equal(state.conv[1], before.conv[1])
    assert not torch.equal(state.ssm[1], before.ssm[1])


def test_gradients_of_ragged_rows_are_those_alone_and_none_reach_padding(mixer: Mamba2Mixer) -> None:
    lengths = [9, 4]
    x = inputs(9).requires_grad_()
    parameters = list(mixer.parameters())
    y = mixer(x, Span(torch.tensor(lengths)), {})
    real = torch.stack([y[row, :length].square().sum() for row, length in enumerate(lengths)]).sum()
    together = torch.autograd.grad(real, [x, *parameters])
    alone = sum(mixer(x[r : r + 1, :n], Span(), {}).square().sum() for r, n in enumerate(lengths))
    assert isinstance(alone, Tensor)
    for got, expected in zip(together, torch.autograd.grad(alone, [x, *parameters]), strict=True):
        close(got, expected)
    assert (together[0][1, 4:] == 0).all()
    assert (together[0][1, :4] != 0).all()


def test_a_gradient_flows_through_the_state(mixer: Mamba2Mixer) -> None:
    x = inputs(9).requires_grad_()
    (whole,) = torch.autograd.grad(mixer(x, Span(), {})[:, 5:].square().sum(), x)
    state = mixer.init_state(2, torch.float64)
    mixer(x[:, :5], Span(), {}, state)
    (split,) = torch.autograd.grad(mixer(x[:, 5:], Span(), {}, state).square().sum(), x)
    close(split, whole)
    assert (whole[:, :5] != 0).any()


def test_states_may_be_stored_in_bfloat16(make_mixer: MakeMixer) -> None:
    mixer, x = make_mixer(dtype=torch.float32), inputs(60, seed=3).float()
    exact, rounded = (mixer.init_state(2, dtype) for dtype in (torch.float32, torch.bfloat16))
    with torch.no_grad():
        for part in (x[:, :20], *x[:, 20:].split(1, dim=1)):
            expected, got = (mixer(part, Span(), {}, state) for state in (exact, rounded))
            assert (got - expected).abs().max() < 0.02 * expected.abs().max()  # measured: .010
    assert (rounded.conv.dtype, rounded.ssm.dtype) == (torch.bfloat16, torch.bfloat16)
    assert not torch.equal(rounded.ssm.float(), exact.ssm)


def test_steps_in_bfloat16_decay_as_a_read_at_once_does(make_mixer: MakeMixer) -> None:
    """A decay of .999 is 1 in bfloat16; a state that is more precise than the model is kept so."""
    mixer, x = make_mixer(dtype=torch.bfloat16), inputs(300, seed=3).bfloat16()
    with torch.no_grad():
        mixer.A_log.fill_(-6)
        once, stepped = (mixer.init_state(2, torch.float32) for _ in range(2))
        expected = mixer(x, Span(), {}, once)
        got = torch.cat([mixer(part, Span(), {}, stepped) for part in x.split(1, dim=1)], 1)
    assert got.dtype == torch.bfloat16
    assert (stepped.ssm - once.ssm).norm() < 0.005 * once.ssm.norm()  # measured: .0029
    assert (got - expected).norm() < 0.01 * expected.norm()  # measured: .0070


def test_steps_follow_the_weights(make_mixer: MakeMixer) -> None:
    mixer, x = make_mixer(), inputs(1)
    with torch.no_grad():
        mixer(x, Span(), {}, mixer.init_state(2, torch.float64))
        for name in ("A_log", "conv_weight"):
            getattr(mixer, name).add_(0.3)
            stepped = mixer(x, Span(), {}, state := mixer.init_state(2, torch.float64))
            twice = mixer(x, Span(), {}, state)
            whole = mixer(x.repeat(1, 2, 1), Span(), {})
            close(torch.cat([stepped, twice], 1), whole)


def test_autocast_rounds_products_and_nothing_else(make_mixer: MakeMixer) -> None:
    mixer, x = make_mixer(dtype=torch.float32), inputs(300, seed=4).float()
    expected = mixer(x, Span(), {})
    with torch.autocast("cpu", torch.bfloat16):
        recorded = mixer(x, Span(), {})
        with torch.no_grad():
            plain = mixer(x, Span(), {})
    for got in (recorded, plain):
        assert got.dtype == torch.bfloat16
        assert (got - expected).norm() < 0.02 * expected.norm()
