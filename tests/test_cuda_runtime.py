"""What only a GPU has: streams, graphs, a second device, tensors of more than 2^31 elements."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import torchops
from support import each_first_sample, gradients, positions, results

pytestmark = [
    pytest.mark.cuda,
    # What has no kernel yet: its native call is not what is tested here.
    pytest.mark.filterwarnings("ignore::torchops.FallbackWarning"),
]
DEVICE = "cuda"


def on(device, tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def everything(case, sample, tensors):
    """Outputs, updated arguments and gradients of one call."""
    return results(case, case.own, sample, tensors) + gradients(
        case, case.own, sample, tensors, like_output=True
    )


def same_bits(first, second):
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@each_first_sample
def test_twenty_runs_give_the_same_bits(case, sample, dtype):
    tensors = on(DEVICE, case.tensors(sample, dtype, torch.channels_last))
    expected = everything(case, sample, tensors)
    for _ in range(20):
        assert same_bits(everything(case, sample, tensors), expected)


@each_first_sample
def test_a_storage_offset_that_is_not_aligned(case, sample, dtype):
    tensors = on(DEVICE, case.tensors(sample, dtype, torch.contiguous_format))
    moved = list(tensors)
    for position in positions(case, tensors):
        storage = torch.empty(tensors[position].numel() + 1, dtype=dtype, device=DEVICE)
        moved[position] = storage[1:].view(tensors[position].shape).copy_(tensors[position])
    for own, aligned in zip(
        everything(case, sample, moved), everything(case, sample, tensors), strict=True
    ):
        # Not the same bits: unaligned tensors take the kernels without packs, which sum otherwise.
        torch.testing.assert_close(own, aligned, rtol=2e-2, atol=2e-2, equal_nan=True)


@each_first_sample
def test_a_stream_of_ones_own(case, sample, dtype):
    tensors = on(DEVICE, case.tensors(sample, dtype, torch.channels_last))
    expected = everything(case, sample, tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on another stream would overtake this
        delayed = [None if tensor is None else tensor.clone() for tensor in tensors]
        found = everything(case, sample, delayed)
    stream.synchronize()
    assert same_bits(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_first_sample
def test_a_device_that_is_not_the_current_one(case, sample, dtype):
    tensors = case.tensors(sample, dtype, torch.channels_last)
    expected = everything(case, sample, on("cuda:0", tensors))
    found = everything(case, sample, on("cuda:1", tensors))
    assert all(tensor.device == torch.device("cuda:1") for tensor in found)
    assert same_bits(on("cuda:0", found), expected)


class Net(nn.Module):
    """Every memory-bound kernel that a training step runs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(16, 16, 5, padding=2, groups=16),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, input):
        return self.body(input)


def converted():
    torch.manual_seed(0)
    return torchops.convert(Net()).to(DEVICE, memory_format=torch.channels_last)


def batch():
    input = torch.randn(8, 16, 20, 20, device=DEVICE)
    return input.contiguous(memory_format=torch.channels_last)


def training_step(net, input):
    net.zero_grad(set_to_none=False)
    loss = net(input).square().sum()
    loss.backward()
    return loss


def state(net):
    return [*net.buffers(), *(parameter.grad for parameter in net.parameters())]


def test_a_training_step_is_captured_and_replayed():
    net, eager = converted(), converted()
    eager.load_state_dict(net.state_dict())
    inputs = [batch() for _ in range(6)]
    input = inputs[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training_step(net, input)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training_step(net, input)
    net.load_state_dict(eager.state_dict())
    for another in inputs:
        input.copy_(another)
        graph.replay()
        training_step(eager, another)
        assert same_bits(state(net), state(eager))


def test_reduce_overhead():
    net, eager = converted(), converted()
    compiled = torch.compile(net, mode="reduce-overhead")
    for _ in range(5):
        input = batch()
        training_step(compiled, input)
        training_step(eager, input)
        for own, expected in zip(state(net), state(eager), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


LARGE = (1, 8, 16500, 16400)  # 2^31 elements are 8 x 16384 x 16384


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "call",
    [
        lambda functional, x: functional.max_pool2d(x, 3, 2, 1),
        lambda functional, x: functional.avg_pool2d(x, 2),
        lambda functional, x: functional.adaptive_avg_pool2d(x, 1),
        lambda functional, x: functional.batch_norm(
            x, torch.ones(8, device=x.device), torch.ones(8, device=x.device)
        ),
        lambda functional, x: functional.conv2d(
            x, torch.ones(8, 1, 3, 3, device=x.device, dtype=x.dtype), padding=1, groups=8
        ),
    ],
    ids=["max_pool2d", "avg_pool2d", "global", "batch_norm", "depthwise"],
)
def test_more_than_two_to_the_31_elements(call, memory_format):
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of free GPU memory")
    x = torch.zeros(LARGE, device=DEVICE, dtype=torch.bfloat16).contiguous(
        memory_format=memory_format
    )
    x[:, :, -64:, -64:] = torch.randn(1, 8, 64, 64, device=DEVICE, dtype=torch.bfloat16)
    own = call(torchops.functional, x)
    if own.numel() == 8:
        expected = x[:, :, -64:, -64:].double().sum((2, 3), keepdim=True) / (16500 * 16400)
        torch.testing.assert_close(own.double(), expected, rtol=1e-2, atol=1e-9)
        return
    # The last corner, where indices are largest, and one of an even size of its own.
    size = own.shape[-1] * 32 // LARGE[-1]
    expected = call(F, x[:, :, -64:, -64:])[:, :, -size:, -size:]
    torch.testing.assert_close(own[:, :, -size:, -size:], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, cpu: torchops.functional.conv2d(x, cpu(4, 4, 3, 3)),
        lambda x, cpu: torchops.functional.batch_norm(x, cpu(4), cpu(4)),
        lambda x, cpu: torchops.functional.batch_norm(x, None, None, cpu(4), training=True),
    ],
    ids=["conv2d", "running_mean", "weight"],
)
def test_arguments_on_two_devices(call):
    with pytest.raises(RuntimeError, match="device"):
        call(torch.randn(2, 4, 8, 8, device=DEVICE), torch.ones)
