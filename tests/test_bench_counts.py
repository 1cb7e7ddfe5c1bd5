"""Bytes and FLOPs against figures worked out by hand and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchops.bench import native
from torchops.bench.counts import count
from torchops.bench.parse import parse
from torchops.bench.steps import step
from torchops.bench.workload import Setting, Workload, forward

CONVS = [
    "conv2d:mb2_ic8ih9oc6kh3ph1",
    "conv2d:mb2_ic8ih9oc6kh3sh2_bias",
    "conv2d:mb2_ic3ih9oc6kh3_first",
    "conv1x1:mb2_ic8ih9oc6",
    "conv1d:mb2_ic8iw20oc8kw4pw3",
    "conv3d:mb1_ic2id5oc3kd3",
]
GROUPED = [
    "conv2d:mb2_g4ic8ih9oc12kh3ph1dh2",
    "conv2d:mb2_g8ic8ih9oc8kh5ph2",
    "conv1d:mb2_g8ic8iw20oc8kw4pw3",
]


@pytest.mark.parametrize(
    ("text", "direction"),
    [*((text, "fwd") for text in CONVS + GROUPED), *((text, "bwd") for text in CONVS)],
)
def test_conv_flops_are_torchs(text, direction):
    problem = parse(text)
    workload = Workload(problem, Setting(torch.float32))
    call = step(forward(native, problem), direction, [workload])
    with FlopCounterMode(display=False) as counter:
        call()
    assert count(problem, torch.float32, direction).flops == counter.get_total_flops()


@pytest.mark.parametrize("text", GROUPED)
def test_grouped_backward_is_two_forwards(text):
    """Torch's counter forgets the groups in grad_weight, so it is no reference here."""
    problem = parse(text)
    forward_flops = count(problem, torch.float32, "fwd").flops
    assert count(problem, torch.float32, "bwd").flops == 2 * forward_flops


@pytest.mark.parametrize(
    ("text", "dtype", "fwd", "bwd"),
    [
        # input 2*8*9*9, output 2*6*9*9, weight 6*8*3*3: 1296, 972 and 432 elements.
        ("conv2d:mb2_ic8ih9oc6kh3ph1", torch.float32, 4 * 2700, 4 * 5400),
        ("conv2d:mb2_ic8ih9oc6kh3ph1", torch.bfloat16, 2 * 2700, 2 * 5400),
        # A bias is read once forward and its gradient written once backward.
        ("conv2d:mb2_ic8ih9oc6kh3ph1_bias", torch.float32, 4 * 2706, 4 * 5406),
        # A first layer has no grad_input.
        ("conv2d:mb2_ic8ih9oc6kh3ph1_first", torch.float32, 4 * 2700, 4 * 2700),
        # 2*4*8*8 = 512 in, 2*4*4*4 = 128 out, and one offset byte per output of a maximum.
        ("avg_pool2d:mb2_ic4ih8kh2", torch.float32, 4 * 640, 4 * 640),
        ("max_pool2d:mb2_ic4ih8kh2", torch.float32, 4 * 640 + 128, 4 * 640 + 128),
        ("adaptive_avg_pool2d:mb2_ic4ih8oh1", torch.bfloat16, 2 * 520, 2 * 520),
        ("channel_avg_pool:mb2_ic4ih8kc2", torch.float32, 4 * 768, 4 * 768),
        # 512 elements; 8 statistics of 4 channels forward, 6 backward, in float32.
        ("batch_norm:mb2_ic4ih8", torch.float32, 4 * 1024 + 128, 4 * 1536 + 96),
        ("batch_norm:mb2_ic4ih8", torch.bfloat16, 2 * 1024 + 128, 2 * 1536 + 96),
        ("batch_norm:mb2_ic4ih8", torch.float64, 8 * 1024 + 256, 8 * 1536 + 192),
        ("batch_norm:mb2_ic4ih8_act=silu", torch.float32, 4 * 1024 + 128, 4 * 1536 + 96),
        # The residual: read forward, its gradient written, and one bit of the sign kept.
        ("batch_norm:mb2_ic4ih8_act=relu_res", torch.float32, 6144 + 128 + 64, 8192 + 96 + 64),
        # No bit tells SiLU's gradient: the residual is read again.
        ("batch_norm:mb2_ic4ih8_act=silu_res", torch.float32, 6144 + 128, 8192 + 96 + 2048),
        # Without an activation grad_output is the residual's gradient.
        ("batch_norm:mb2_ic4ih8_res", torch.float32, 6144 + 128, 6144 + 96),
    ],
)
def test_bytes(text, dtype, fwd, bwd):
    problem = parse(text)
    assert count(problem, dtype, "fwd").bytes == fwd
    assert count(problem, dtype, "bwd").bytes == bwd


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("max_pool2d:mb2_ic4ih8kh2_eval", 4 * 640),
        ("batch_norm:mb2_ic4ih8_act=relu_eval", 4 * 1024 + 64),
        ("batch_norm:mb2_ic4ih8_act=relu_res_eval", 4 * 1536 + 64),
        # The conv's 5 tensors' worth plus 4 statistics of 6 channels: nothing lies between.
        ("conv2d_bn_act:mb2_ic8ih9oc6kh3ph1_act=relu_eval", 4 * 2700 + 96),
    ],
)
def test_bytes_in_evaluation(text, bytes):
    assert count(parse(text), torch.float32, "fwd").bytes == bytes


@pytest.mark.parametrize(
    ("text", "fwd", "bwd"),
    [
        # 128 outputs of 4 taps; a maximum's gradient goes to one element.
        ("avg_pool2d:mb2_ic4ih8kh2", 512, 512),
        ("max_pool2d:mb2_ic4ih8kh2", 512, 128),
        # 5 windows over 7 rows hold 2 + 2 + 3 + 2 + 2 rows.
        ("adaptive_avg_pool2d:mb1_ic1ih7oh5", 121, 121),
        ("channel_max_pool:mb2_ic4ih8kc2", 512, 256),
        ("batch_norm:mb2_ic4ih8", 5 * 512, 9 * 512),
        ("batch_norm:mb2_ic4ih8_act=relu_res", 7 * 512, 11 * 512),
    ],
)
def test_flops(text, fwd, bwd):
    problem = parse(text)
    assert count(problem, torch.float32, "fwd").flops == fwd
    assert count(problem, torch.float32, "bwd").flops == bwd


def test_floor_is_the_larger_of_the_two_limits():
    counts = count(parse("conv2d:mb2_ic8ih9oc6kh3ph1"), torch.float32, "fwd")
    assert counts.flops == 2 * 972 * 72
    assert counts.seconds(1.0, 1e12) == counts.bytes
    assert counts.seconds(1e12, 1.0) == counts.flops
    assert counts.bandwidth_bound(1.0, 1e12)
    assert not counts.bandwidth_bound(1e12, 1.0)


def test_the_published_floors_of_resnet_batch_norms():
    """32x64x112x112 float32 at 20 GB/s: 10.4 ms forward and 15.7 ms backward."""
    problem = parse("batch_norm:mb32_ic64ih112_act=relu")
    assert count(problem, torch.float32, "fwd").bytes / 19.7e9 == pytest.approx(10.4e-3, rel=0.01)
    assert count(problem, torch.float32, "bwd").bytes / 19.7e9 == pytest.approx(15.7e-3, rel=0.01)


def test_unknown_direction():
    with pytest.raises(ValueError, match="must be one of fwd, bwd, got 'sideways'"):
        count(parse("batch_norm:ic4"), torch.float32, "sideways")
