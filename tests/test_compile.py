"""torch.compile, torch.export and opcheck: the same answers, in one graph, the right strides."""

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap

from raw_calls import OPERATORS, raw_calls
from support import each_first_sample
from test_transforms import assert_same, loss, pair


def backward(call, inputs):
    """Outputs and gradients through autograd, for functions that may be compiled."""
    leaves = [input.detach().requires_grad_() for input in inputs]
    outputs = call(*leaves)
    total = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    return outputs, torch.autograd.grad((total * total).sum(), leaves, allow_unused=True)


@each_first_sample
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(case, sample, dynamic):
    own, native, inputs = pair(case, sample)
    compiled = torch.compile(own, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(*inputs), native(*inputs))
    assert_same(backward(compiled, inputs), backward(native, inputs))


@each_first_sample
def test_one_dynamic_graph_serves_every_batch_size(case, sample):
    if len(sample.shapes[0]) < 3:
        pytest.skip("the sample has no batch dimension")
    own, native, inputs = pair(case, sample)
    same_batch = [i.shape[0] == inputs[0].shape[0] and i.dim() == inputs[0].dim() for i in inputs]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(own, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for repeats in (
        7,
        11,
        13,
    ):  # no size that another dimension has, which the graph would tie it to
        larger = [
            input.repeat(repeats, *[1] * (input.dim() - 1)) if shares and position == 0 else input
            for position, (input, shares) in enumerate(zip(inputs, same_batch, strict=True))
        ]
        try:
            expected = native(*larger)
        except RuntimeError:
            pytest.skip("other arguments of the sample fix the batch size")
        assert_same(compiled(*larger), expected)
        compilations.append(counter.frame_count)
    # torch compiles a function twice where a float argument (eps) has to become a constant
    assert len(set(compilations)) == 1


@each_first_sample
def test_inductor(case, sample):
    own, native, inputs = pair(case, sample)
    compiled = torch.compile(own, fullgraph=True)
    assert_same(backward(compiled, inputs), backward(native, inputs))


@each_first_sample
def test_compile_of_grad(case, sample):
    own, native, inputs = pair(case, sample)
    every = tuple(range(len(inputs)))
    compiled = torch.compile(grad(loss(own), every), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*inputs), grad(loss(native), every)(*inputs))


@each_first_sample
def test_compile_of_vmap(case, sample):
    own, native, inputs = pair(case, sample)
    stacked = [torch.stack([input, -input]) for input in inputs]
    compiled = torch.compile(vmap(own), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*stacked), vmap(native)(*stacked))


@each_first_sample
def test_compile_of_jvp_is_never_silently_wrong(case, sample):
    own, native, inputs = pair(case, sample)
    tangents = tuple(input.cos() for input in inputs)

    def derivative(*inputs):
        return jvp(own, inputs, tangents)

    assert_same(
        torch.compile(derivative, backend="aot_eager")(*inputs),
        jvp(native, tuple(inputs), tangents),
    )
    torch._dynamo.reset()
    with pytest.raises(Exception, match="forward-mode|orward_ad|jvp"):
        torch.compile(derivative, fullgraph=True, backend="aot_eager")(*inputs)


@each_first_sample
def test_compile_with_the_same_tensor_twice(case, sample):
    own, native, inputs = pair(case, sample)
    twins = [i for i, input in enumerate(inputs) if input.shape == inputs[0].shape]
    if len(twins) < 2:
        pytest.skip("no two arguments of one shape")

    def repeated(call):
        return lambda x: call(*(x if i in twins else input for i, input in enumerate(inputs)))

    compiled = torch.compile(repeated(own), fullgraph=True, backend="aot_eager")
    assert_same(backward(compiled, inputs[:1]), backward(repeated(native), inputs[:1]))


@each_first_sample
def test_export(case, sample):
    own, native, inputs = pair(case, sample)

    class Model(torch.nn.Module):
        def forward(self, *inputs):
            return own(*inputs)

    program = torch.export.export(Model(), tuple(inputs))
    assert_same(program.module()(*inputs), native(*inputs))
    names = {str(node.target).split(".")[0] for node in program.graph.nodes}
    assert "torchops" in names


@each_first_sample
def test_jit_trace(case, sample):
    """Traced with gradients on, saved and loaded: the graph holds operators that differentiate."""
    own, native, inputs = pair(case, sample)
    traced = torch.jit.trace(own, [input.detach().requires_grad_() for input in inputs])
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert_same(backward(torch.jit.load(file), inputs), backward(native, inputs))


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator):
    calls = [call for call in raw_calls() if call.operator == operator]
    assert calls, f"no case calls torch.ops.torchops.{operator}: add a gradcheck sample that does"
    differentiable = torch._C._dispatch_has_kernel_for_dispatch_key(
        f"torchops::{operator}", "AutogradCPU"
    )
    for call in calls:
        torch.library.opcheck(call.overload, call.fresh_arguments(differentiable))
