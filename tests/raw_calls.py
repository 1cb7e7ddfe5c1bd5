"""Which torch.ops.torchops operators there are, and how the cases call them."""

import functools
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_convolutions
import torchops
from support import CASES, FORMATS, as_function

OPERATORS = sorted(
    name.removeprefix("torchops::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("torchops::")
)


@dataclass(frozen=True)
class RawCall:
    overload: torch._ops.OpOverload
    arguments: tuple

    @property
    def operator(self):
        return self.overload._schema.name.removeprefix("torchops::")

    @property
    def signature(self):
        """Equal for calls that differ in values alone."""
        return self.overload, *(
            (a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else repr(a)
            for a in self.arguments
        )

    def fresh_arguments(self, requires_grad=False):
        """Copies to call it with; written ones never require grad."""
        copies = []
        for argument, declared in zip(self.arguments, self.overload._schema.arguments, strict=True):
            if isinstance(argument, torch.Tensor):
                argument = argument.clone()
                written = declared.alias_info is not None and declared.alias_info.is_write
                if requires_grad and argument.is_floating_point() and not written:
                    argument.requires_grad_()
            copies.append(argument)
        return tuple(copies)


class Recorder(TorchDispatchMode):
    """Remembers every call of an operator of ours, with copies of its tensors."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "torchops":
            copies = (a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            call = RawCall(function, tuple(copies))
            self.calls.setdefault(call.signature, call)
        return function(*args, **kwargs or {})


def _exercise(case, sample, tensors):
    """Inference, backward, double backward and forward mode."""
    call, inputs = as_function(case, case.own, sample, tensors)
    with torch.no_grad():
        call(*inputs)
    inputs = [input.detach().requires_grad_() for input in inputs]
    outputs = call(*inputs)
    output = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    grads = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
    torch.autograd.grad(sum(grad.sin().sum() for grad in grads), inputs)
    with torch.no_grad():
        torch.func.jvp(call, tuple(inputs), tuple(inputs))


@functools.cache
def raw_calls():
    """Every distinct operator call that the cases' small samples lead to, in both formats."""
    with torchops.backend("own"), Recorder() as recorder:
        for case in CASES:
            for sample in case.gradcheck_samples:
                for memory_format in FORMATS.values():
                    _exercise(case, sample, case.tensors(sample, torch.float32, memory_format))
        for call in fused_convolutions.SMALL:
            for memory_format in FORMATS.values():
                arguments, options = call.arguments(torch.float32, memory_format)
                torchops.functional.conv2d_bn_act(*arguments, **options)
    return list(recorder.calls.values())
