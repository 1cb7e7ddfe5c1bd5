"""The comparison with float64: right answers pass, wrong ones are named."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from torchops.bench import native
from torchops.bench.match import match
from torchops.bench.memory import peak_memory
from torchops.bench.parse import parse
from torchops.bench.problem import ACTIVATIONS, OPS
from torchops.bench.steps import step, steps
from torchops.bench.workload import LAYOUTS, Setting, Workload, forward, has_layout

PROBLEMS = [
    "conv1d:mb2_g8ic8iw20oc8kw4pw3_bias",
    "conv2d:mb2_ic8ih9oc6kh3ph1_bias",
    "conv2d:mb2_ic3ih9oc6kh3_first",
    "conv3d:mb1_ic2id5oc3kd3",
    "conv1x1:mb2_ic8ih9oc6sh2",
    "conv2d_bn_act:mb4_ic8ih9oc6kh3ph1_act=relu_res",
    "max_pool1d:mb2_ic4iw9kw3",
    "max_pool2d:mb2_ic4ih9kh3sh2ph1_ceil",
    "max_pool3d:mb1_ic4id5kd2",
    "avg_pool1d:mb2_ic4iw9kw3",
    "avg_pool2d:mb2_ic4ih9kh3ph1_nopad",
    "avg_pool3d:mb1_ic4id5kd2",
    "adaptive_avg_pool1d:mb2_ic4iw9ow4",
    "adaptive_avg_pool2d:mb2_ic4ih9oh4",
    "adaptive_avg_pool3d:mb1_ic4id5od2",
    "adaptive_max_pool1d:mb2_ic4iw9ow4",
    "adaptive_max_pool2d:mb2_ic4ih9oh4",
    "adaptive_max_pool3d:mb1_ic4id5od2",
    "channel_max_pool:mb2_ic6ih9kc2",
    "channel_avg_pool:mb2_ic6ih9kc3sc1",
    "batch_norm:mb8_ic4",
    "batch_norm:mb4_ic4ih9",
    "batch_norm:mb4_ic4ih9_act=relu_res_eval",
    *(f"batch_norm:mb4_ic4ih9_act={activation}_res" for activation in ACTIVATIONS),
]


def test_every_op_is_tried():
    assert {parse(text).op for text in PROBLEMS} == set(OPS)


@pytest.mark.parametrize(
    ("text", "layout"),
    [(text, layout) for text in PROBLEMS for layout in LAYOUTS if has_layout(parse(text), layout)],
)
def test_native_matches_itself(text, layout):
    problem = parse(text)
    outcome = match(native, problem, Workload(problem, Setting(torch.float32, layout)))
    assert outcome.keys() == ({"fwd", "bwd"} if problem.training else {"fwd"})
    assert all(outcome.values()), outcome


@pytest.mark.parametrize("text", PROBLEMS)
def test_steps_run_in_both_directions(text):
    problem = parse(text)
    workloads = [Workload(problem, Setting(torch.float32))]
    workloads.append(workloads[0].copy())
    call = forward(native, problem)
    for _ in range(3):
        output = step(call, "fwd", workloads)()
        assert output.shape == problem.output_shape
        assert output.requires_grad == problem.training
    if problem.training:
        backward = step(call, "bwd", workloads)
        first, second, again = backward(), backward(), backward()
        for name, one, other, third in zip(
            workloads[0].differentiable, first, second, again, strict=True
        ):
            assert one.shape == workloads[0].tensors[name].shape
            assert torch.equal(one, other) and torch.equal(one, third), name


def test_contestants_do_not_read_what_the_other_has_just_read():
    problem = parse("batch_norm:mb2_ic4ih9")
    workloads = [Workload(problem, Setting(torch.float32)) for _ in range(4)]
    read = []

    def reader(name):
        return lambda input, **tensors: read.append((name, id(input)))

    calls = steps({"ours": reader("ours"), "eager": reader("eager")}, "fwd", workloads)
    for _ in range(4):
        for call in calls.values():
            call()
    inputs = [id(workload.tensors["input"]) for workload in workloads]
    assert [input for name, input in read if name == "ours"] == inputs
    assert [input for name, input in read if name == "eager"] == inputs[2:] + inputs[:2]


def test_a_wrong_output_is_named():
    problem = parse("batch_norm:mb4_ic4ih9")
    wrong = SimpleNamespace(batch_norm=lambda *args: native.batch_norm(*args) * 1.001)
    outcome = match(wrong, problem, Workload(problem, Setting(torch.float32)))
    assert not outcome["fwd"]
    assert outcome["fwd"].reason.startswith("output: error")
    assert not outcome["bwd"]
    assert outcome["bwd"].reason.startswith("grad_")


def test_running_statistics_that_stay_behind_are_named():
    problem = parse("batch_norm:mb4_ic4ih9")

    def forgets(input, running_mean, running_var, *args):
        return native.batch_norm(input, running_mean, running_var.clone(), *args)

    wrong = SimpleNamespace(batch_norm=forgets)
    outcome = match(wrong, problem, Workload(problem, Setting(torch.float32)))
    assert not outcome["fwd"]
    assert outcome["fwd"].reason.startswith("running_var: error")
    assert outcome["bwd"]


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "hardswish"])
def test_an_element_on_a_kink_excuses_nobody_and_blames_nobody(activation):
    """The activation's argument is exactly 0, where either one-sided gradient is right."""
    problem = parse(f"batch_norm:mb4_ic4ih9_act={activation}_res")
    workload = Workload(problem, Setting(torch.float32))
    workload.tensors["weight"].data.zero_()
    workload.tensors["bias"].data.zero_()
    workload.tensors["residual"].data[0, 0, 0, :3] = torch.tensor([0.0, 1e-9, -1e-9])

    def one_sided(*args, residual, **fused):
        return native.batch_norm(*args, residual=residual + 1e-8, **fused)

    outcome = match(SimpleNamespace(batch_norm=one_sided), problem, workload)
    assert outcome["bwd"], outcome["bwd"].reason


@pytest.mark.skipif(peak_memory(lambda: None, "cpu") is None, reason="no /proc/self/clear_refs")
def test_peak_memory_counts_result_and_scratch():
    size = 64 << 20

    def result_only():
        return torch.ones(size, dtype=torch.int8)

    def with_scratch():
        return result_only() + result_only()

    assert peak_memory(result_only, "cpu") == pytest.approx(size, rel=0.05)
    assert peak_memory(with_scratch, "cpu") == pytest.approx(3 * size, rel=0.05)


ON_THE_HEAP = """
import sys, torch
from torchops.bench.memory import settle_allocator

if sys.argv[1:] == ["settled"]:
    settle_allocator()
result = torch.ones(6_000_000)
heap = next(line for line in open("/proc/self/maps") if line.endswith("[heap]\\n"))
start, end = (int(address, 16) for address in heap.split()[0].split("-"))
print(start <= result.data_ptr() < end)
"""


def on_the_heap(*arguments):
    """Where a result of 24 MB lies, in a process of its own: the setting stays."""
    command = [sys.executable, "-c", ON_THE_HEAP, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these thresholds")
def test_a_settled_allocator_uses_memory_again():
    """Memory of the heap is kept; what stands apart goes back to the system when it is freed."""
    assert on_the_heap("settled")
    assert not on_the_heap()
