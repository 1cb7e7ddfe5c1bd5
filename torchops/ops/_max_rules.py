"""What max_pool2d and adaptive_max_pool2d share, which differ in their windows: fake kernels, vmap
rules, and the short way through autograd.

`windows` are the numbers that describe these, where an operator needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchops.ops._autograd import (
    BelowAutograd,
    Function,
    call_operator,
    fold_batch,
    kernel,
    operator,
    plain_apply,
    register,
    unfold_batch,
)
from torchops.ops._shape import suggest_memory_format


def backward_only(op: str, function: type[Function]) -> Callable[..., Any]:
    """`function`, of outputs and offsets, where only backward is asked for: one output, 4 us sooner
    (bench/overhead.py)."""
    handle = operator(f"{op}_with_offsets")._handle

    def forward(ctx, input, windows):
        guard = BelowAutograd()
        try:
            output, offsets = call_operator(handle, input, windows)
        finally:
            del guard
        # What set_materialize_grads and save_for_backward do, each a frame sooner.
        ctx.materialize_grads = False
        ctx.to_save = (offsets,)
        ctx.rest = input.shape, windows
        return output

    def backward(ctx, grad_output):
        return function.backward(ctx, grad_output, None)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    name = function.__name__.replace("Function", "BackwardOnly")
    return plain_apply(type(name, (torch.autograd.Function,), members))


def with_indices(
    op: str, function: type[Function], to_indices: Callable[..., Any]
) -> Callable[..., Any]:
    """The same for a call that returns indices, `to_indices(offsets, input_size, windows)`.

    Backward reads the offsets alone, but refuses as native's does where the indices have changed.
    """
    pool_with_offsets = kernel(f"{op}_with_offsets")

    def forward(ctx, input, windows):
        output, offsets = pool_with_offsets(input, windows)
        indices = to_indices(offsets, input.shape, windows)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(offsets, indices)
        ctx.rest = input.shape, windows
        return output, indices

    def backward(ctx, grad_output, _):
        return function.backward(ctx, grad_output, None)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    name = function.__name__.replace("Function", "WithIndices")
    return plain_apply(type(name, (torch.autograd.Function,), members))


def register_max(
    op: str,
    fake_offsets: Callable[..., Any],
    derive: Callable[..., Any],
    pooling: type[Function],
    scatter: type[Function],
    gather: type[Function],
) -> None:
    """All five operators: `op` itself, with_offsets, backward, gather and indices."""
    pool, pool_with_offsets, scatter_back, gather_winners, to_indices = (
        getattr(torch.ops.torchops, op + suffix)
        for suffix in ("", "_with_offsets", "_backward", "_gather", "_indices")
    )

    def fake_output(input, windows):
        return torch.empty_like(fake_offsets(input, windows), dtype=input.dtype)

    def fake_with_offsets(input, windows):
        offsets = fake_offsets(input, windows)
        return torch.empty_like(offsets, dtype=input.dtype), offsets

    # A further batch dimension is more images.

    def vmap_output(info, in_dims, input, windows):
        images = fold_batch(input, in_dims[0], info.batch_size)
        return unfold_batch(pool(images, windows), info.batch_size), 0

    def vmap_with_offsets(info, in_dims, input, windows):
        images = fold_batch(input, in_dims[0], info.batch_size)
        both = (unfold_batch(t, info.batch_size) for t in pool_with_offsets(images, windows))
        return tuple(both), (0, 0)

    def vmap_backward(info, in_dims, grad_output, offsets, input_size, *windows):
        grads = fold_batch(grad_output, in_dims[0], info.batch_size)
        winners = fold_batch(offsets, in_dims[1], info.batch_size)
        size = (info.batch_size * input_size[0], *input_size[1:])
        return unfold_batch(scatter_back(grads, winners, size, *windows), info.batch_size), 0

    def vmap_gather(info, in_dims, input, offsets, *windows):
        images = fold_batch(input, in_dims[0], info.batch_size)
        winners = fold_batch(offsets, in_dims[1], info.batch_size)
        return unfold_batch(gather_winners(images, winners, *windows), info.batch_size), 0

    def vmap_indices(info, in_dims, offsets, input_size, *windows):
        winners = fold_batch(offsets, in_dims[0], info.batch_size)
        size = (info.batch_size * input_size[0], *input_size[1:])
        return unfold_batch(to_indices(winners, size, *windows), info.batch_size), 0

    register(op, fake=fake_output, vmap=vmap_output, autograd=derive)
    register(f"{op}_with_offsets", fake=fake_with_offsets, vmap=vmap_with_offsets,
             autograd=pooling.apply_here)  # fmt: skip
    register(f"{op}_backward", fake=_fake_backward, vmap=vmap_backward, autograd=scatter.apply_here)
    register(f"{op}_gather", fake=_fake_gather, vmap=vmap_gather, autograd=gather.apply_here)
    register(f"{op}_indices", fake=_fake_indices, vmap=vmap_indices)


def _fake_backward(grad_output, offsets, input_size, *windows):
    return torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device,
        memory_format=suggest_memory_format(offsets),
    )  # fmt: skip


def _fake_gather(input, offsets, *windows):
    return torch.empty_like(offsets, dtype=input.dtype)


def _fake_indices(offsets, input_size, *windows):
    return torch.empty_like(offsets, dtype=torch.int64)
