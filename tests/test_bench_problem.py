"""Problem strings: what they mean, that they survive a round trip, and how errors read."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchops.bench.parse import parse
from torchops.bench.problem import ACTIVATIONS, FAMILIES, OPS, Problem, ProblemError

EXAMPLES = [
    "conv1d:mb8_g64ic64iw128oc64kw4pw3_bias",
    "conv2d:mb8_ic64ih56oc64kh3ph1",
    "conv2d:mb1_ic3ih224iw200oc8kh7kw5sh2ph3pw2dh2_first",
    "conv3d:mb2_ic4id8oc8kd3pd1",
    "conv1x1:mb8_ic64ih56oc256sh2_bias",
    "conv2d_bn_act:mb8_ic64ih14oc64kh1_act=relu_res",
    "max_pool1d:mb8_ic4iw9kw3",
    "max_pool2d:mb8_ic64ih112kh3sh2ph1_ceil",
    "avg_pool2d:mb8_ic8ih10kh3kw2_nopad",
    "adaptive_avg_pool2d:mb8_ic2048ih7oh1",
    "adaptive_max_pool2d:mb8_ic8ih13iw9oh5ow3",
    "channel_max_pool:mb8_ic64ih8kc4sc2",
    "batch_norm:mb8_ic64",
    "batch_norm:mb8_ic64iw9",
    "batch_norm:mb8_ic64ih56_act=leaky_relu_res_eval",
    "batch_norm:mb8_ic64id4ih8_act=relu6",
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_round_trip(text):
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


def test_conv():
    assert parse("conv2d:mb2_g2ic4ih9iw7oc6kh3kw1sh2ph1dh2_bias_first") == Problem(
        "conv2d",
        batch=2,
        in_channels=4,
        input_size=(9, 7),
        out_channels=6,
        kernel_size=(3, 1),
        stride=(2, 2),
        padding=(1, 1),
        dilation=(2, 2),
        groups=2,
        bias=True,
        first=True,
    )


def test_underscores_and_order_do_not_matter():
    assert parse("conv2d:kh3oc8_ih9ic4mb2") == parse("conv2d:mb2_ic4_ih9_oc8_kh3")


def test_batch_norm():
    problem = parse("batch_norm:mb4ic8ih5_act=silu_res")
    assert (problem.activation, problem.residual, problem.training) == ("silu", True, True)
    assert problem.input_shape == problem.output_shape == (4, 8, 5, 5)


def test_pool_stride_defaults_to_its_kernel():
    assert parse("max_pool2d:ic4ih8kh3kw2").stride == (3, 2)
    assert parse("conv2d:ic4ih8oc4kh3").stride == (1, 1)


def test_batch():
    assert parse("batch_norm:ic4").batch == 8
    assert parse("batch_norm:ic4", batch=3).batch == 3
    assert parse("batch_norm:mb2ic4", batch=3).batch == 2


def test_output_sizes_are_accepted_when_they_follow():
    assert parse("conv2d:ic4ih8oh8oc4kh3ph1") == parse("conv2d:ic4ih8oc4kh3ph1")
    with pytest.raises(ProblemError, match="oh7 contradicts the rest, which gives oh8"):
        parse("conv2d:ic4ih8oh7oc4kh3ph1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conv9d:ic3", r"unknown op 'conv9d'; known: conv1d, conv2d"),
        ("conv2d", r"expected sizes after the op, such as conv2d:mb8_ic64ih56oc64kh3ph1"),
        ("conv2d:ic4ih9oc4kx3", r"unknown key 'kx' at character 17; conv2d takes mb ic oc g"),
        ("conv2d:ic4ih9oc4kh", r"'kh' at character 17 needs a number, such as kh3"),
        ("conv2d:ic4ih9oc4kh3kh3", r"'kh' is given twice, again at character 20"),
        ("conv2d:ic4ih9oc4kh3bias_bias", r"'bias' is given twice"),
        ("conv2d:ic4ih9-oc4kh3", r"unexpected '-' at character 14"),
        ("conv2d:ic4ih9oc4kh3bias2", r"flag 'bias' at character 20 takes no number, got 2"),
        ("conv2d:ic4ih9oc4kh3act=relu", r"unknown flag 'act' at character 20"),
        ("conv2d:ic4oc4", r"conv2d needs ic, oc, ih, kh; missing: ih, kh"),
        ("conv2d:g3ic4ih9oc4kh3", r"in_channels must be a multiple of groups, got 4 with 3"),
        ("conv2d:ic4ih2oc4kh3", r"output size \(0, 0\) is empty: kernel \(3, 3\) does not fit"),
        ("conv2d:ic0ih9oc4kh3", r"in_channels must be at least 1, got 0"),
        ("avg_pool2d:ic4ih9kh3dh2", r"unknown key 'dh' .*; avg_pool2d takes mb ic ih iw kh kw sh"),
        ("max_pool2d:ic4ih9kh3ph2", r"padding of a pool must be at most kernel / 2, got 2 with 3"),
        ("adaptive_avg_pool2d:ic4ih9", r"needs ic, ih, oh; missing: oh"),
        ("batch_norm:ic4act=tanh", r"unknown activation 'tanh' .*; known: relu, relu6, leaky"),
        ("batch_norm:ic4act=relux", r"unknown activation 'relux'"),
        ("batch_norm:ic4act=", r"unknown activation ''"),
    ],
)
def test_errors_name_the_token_and_what_is_allowed(text, message):
    with pytest.raises(ProblemError, match=message) as error:
        parse(text)
    assert str(error.value).startswith(f"{text}: ")


@pytest.mark.parametrize("op", OPS)
def test_every_op_suggests_a_string_that_it_can_read(op):
    with pytest.raises(ProblemError, match="such as ") as error:
        parse(op)
    example = str(error.value).partition("such as ")[2]
    assert parse(example).op == op


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_can_be_followed(activation):
    problem = parse(f"batch_norm:ic4act={activation}_res")
    assert (problem.activation, problem.residual) == (activation, True)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padded=st.booleans(),
    ceil=st.booleans(),
)
def test_output_size_is_torchs(size, kernel, stride, dilation, padded, ceil):
    padding = tuple(k // 2 * padded for k in kernel)
    sides = zip(size, padding, kernel, strict=True)
    assume(all(s + 2 * p > dilation * (k - 1) for s, p, k in sides))
    problem = Problem(
        "max_pool2d",
        batch=1,
        in_channels=1,
        input_size=size,
        kernel_size=kernel,
        stride=(stride, stride),
        padding=padding,
        dilation=(dilation, dilation),
        ceil_mode=ceil,
    )
    expected = F.max_pool2d(torch.zeros(1, 1, *size), kernel, stride, padding, dilation, ceil)
    assert problem.output_shape == tuple(expected.shape)
    assert parse(str(problem)) == problem


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("conv2d:ic64ih9oc64kh1", "pointwise"),
        ("conv1x1:ic64ih9oc64", "pointwise"),
        ("conv2d:ic3ih9oc64kh3", "dense"),
        ("conv2d:g64ic64ih9oc64kh3", "depthwise"),
        ("conv2d:g64ic64ih9oc128kh3", "depthwise"),
        ("conv2d:g32ic64ih9oc64kh1", "grouped"),
        ("adaptive_avg_pool2d:ic4ih9oh1", "pooling"),
        ("channel_avg_pool:ic4ih9kc2", "channel pooling"),
        ("batch_norm:ic4ih9", "batch_norm"),
        ("batch_norm:ic4ih9res", "batch_norm+act"),
        ("batch_norm:ic4ih9act=relu_eval", "batch_norm+act eval"),
    ],
)
def test_family(text, family):
    assert parse(text).family == family
    assert family.removesuffix(" eval") in FAMILIES
