"""Every function transform of torch.func on every case: same answers as on native."""

import pytest
import torch
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

import torchops.functional
from support import as_function, each_first_sample, each_small_sample


def pair(case, sample):
    """Our call and native's as functions of the same float64 inputs."""
    tensors = case.tensors(sample, torch.float64)
    own, inputs = as_function(case, case.own, sample, tensors)
    native, _ = as_function(case, case.reference or case.native, sample, tensors)
    return own, native, inputs


def skip_updates(case, sample):
    if case.updates(sample):
        pytest.skip("vmap cannot write to an argument that is not batched")


def loss(call):
    """A scalar whose gradient depends on every output, and on the inputs to second order."""

    def scalar(*inputs):
        outputs = call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((output.sin() * output).sum() for output in outputs)

    return scalar


def assert_same(own, native):
    torch.testing.assert_close(own, native, rtol=1e-9, atol=1e-9)


@each_small_sample
def test_vmap_over_every_input(case, sample):
    skip_updates(case, sample)
    own, native, inputs = pair(case, sample)
    for batched in [*([i] for i in range(len(inputs))), range(len(inputs))]:
        for dim in (0, 1):
            in_dims = tuple(dim if i in batched else None for i in range(len(inputs)))
            arguments = [
                torch.stack([input, input.flip(0), -input], dim) if i in batched else input
                for i, input in enumerate(inputs)
            ]
            rows = [
                native(
                    *(
                        a if d is None else a.select(d, row)
                        for a, d in zip(arguments, in_dims, strict=True)
                    )
                )
                for row in range(3)
            ]
            if isinstance(rows[0], tuple):
                expected = tuple(torch.stack(row) for row in zip(*rows, strict=True))
            else:
                expected = torch.stack(rows)
            assert_same(vmap(own, in_dims)(*arguments), expected)


@each_small_sample
def test_output_is_changed_in_place_under_vmap(case, sample):
    """As ReLU(inplace=True) does, with parameters that require grad outside of the transform."""
    skip_updates(case, sample)
    if sample.kwargs.get("activation"):
        pytest.skip("torch's own activation needs its output for the backward")
    own, native, inputs = pair(case, sample)
    found = []
    for call in (own, native):
        leaves = [torch.stack([input, -input]).requires_grad_() for input in inputs]

        def doubled(*inputs, call=call):
            output = call(*inputs)
            output = output[0] if isinstance(output, tuple) else output
            return output.mul_(2)

        output = vmap(doubled)(*leaves)
        found.append((output.detach(), torch.autograd.grad(output.sum(), leaves)))
    assert_same(*found)


@each_small_sample
def test_nested_vmap(case, sample):
    skip_updates(case, sample)
    own, native, inputs = pair(case, sample)
    inputs = [torch.stack([torch.stack([i, -i]), torch.stack([2 * i, i])]) for i in inputs]
    for row in range(2):
        for column in range(2):
            actual = vmap(vmap(own))(*inputs)
            actual = actual if isinstance(actual, tuple) else (actual,)
            expected = native(*(input[row, column] for input in inputs))
            expected = expected if isinstance(expected, tuple) else (expected,)
            assert_same(tuple(a[row, column] for a in actual), expected)


@each_small_sample
def test_grad(case, sample):
    own, native, inputs = pair(case, sample)
    every = tuple(range(len(inputs)))
    assert_same(grad(loss(own), every)(*inputs), grad(loss(native), every)(*inputs))


@each_small_sample
def test_vmap_of_grad(case, sample):
    skip_updates(case, sample)
    own, native, inputs = pair(case, sample)
    every = tuple(range(len(inputs)))
    inputs = [torch.stack([input, -input]) for input in inputs]
    actual = vmap(grad(loss(own), every))(*inputs)
    rows = [grad(loss(native), every)(*(input[row] for input in inputs)) for row in range(2)]
    assert_same(actual, tuple(torch.stack(column) for column in zip(*rows, strict=True)))


@each_small_sample
def test_jvp_and_vjp(case, sample):
    own, native, inputs = pair(case, sample)
    tangents = tuple(torch.linspace(-1, 1, i.numel()).double().view_as(i) for i in inputs)
    assert_same(jvp(own, tuple(inputs), tangents), jvp(native, tuple(inputs), tangents))
    (output, own_vjp), (_, native_vjp) = vjp(own, *inputs), vjp(native, *inputs)
    cotangent = torch.utils._pytree.tree_map(torch.cos, output)
    assert_same(own_vjp(cotangent), native_vjp(cotangent))


@each_small_sample
def test_jvp_of_one_input_alone(case, sample):
    own, native, inputs = pair(case, sample)
    for position, input in enumerate(inputs):

        def only(call, value, position=position):
            return call(*inputs[:position], value, *inputs[position + 1 :])

        found = [
            jvp(lambda value, call=call: only(call, value), (input,), (torch.cos(input),))
            for call in (own, native)
        ]
        assert_same(*found)


@each_first_sample
def test_jacrev(case, sample):
    own, native, inputs = pair(case, sample)
    every = tuple(range(len(inputs)))
    assert_same(jacrev(own, every)(*inputs), jacrev(native, every)(*inputs))


@each_first_sample
def test_hessian(case, sample):
    """Forward over reverse, vectorised: four transforms at once."""
    own, native, inputs = pair(case, sample)
    every = tuple(range(len(inputs)))
    assert_same(
        hessian(loss(own), every)(*inputs),
        jacrev(jacrev(loss(native), every), every)(*inputs),
    )


@each_first_sample
def test_forward_mode_under_eager_autograd(case, sample):
    """Dual tensors that also require grad: forward over the tape, without functorch."""
    own, native, inputs = pair(case, sample)
    found = []
    for call in (own, native):
        leaves = [input.clone().requires_grad_() for input in inputs]
        with torch.autograd.forward_ad.dual_level():
            duals = [
                torch.autograd.forward_ad.make_dual(leaf, leaf.detach().cos()) for leaf in leaves
            ]
            tangent = torch.autograd.forward_ad.unpack_dual(loss(call)(*duals)).tangent
        found.append((tangent.detach(), torch.autograd.grad(tangent, leaves, allow_unused=True)))
    assert_same(*found)


@pytest.mark.parametrize("duals", [(0,), (1,), (2,), (1, 2), (0, 1), (0, 2), (3, 1), (0, 3)])
def test_batch_norm_refuses_tangents_of_its_statistics(duals):
    input, mean, var, weight = (torch.rand(size) for size in ((3, 2, 5), 2, 2, 2))
    found = []
    for ops in (torchops.functional, torch.nn.functional):
        with torch.autograd.forward_ad.dual_level():
            arguments = [
                torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) if i in duals else t
                for i, t in enumerate((input, mean, var, weight))
            ]
            try:
                found.append(ops.batch_norm(*arguments).shape)
            except RuntimeError as error:
                found.append(str(error))
    assert found[0] == found[1]
