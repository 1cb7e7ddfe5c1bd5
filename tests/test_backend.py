"""backend("auto" | "own" | "native"): who really computes, and that a fallback never hides."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.utils._python_dispatch import TorchDispatchMode

import torchops
import torchops.functional as TF
from cases import all_cases
from torchops import FallbackWarning, _backend
from torchops.ops._drop_in import OPERATORS


class Namespaces(TorchDispatchMode):
    """Which libraries the operators of a block come from."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(function)
        return function(*args, **kwargs or {})

    @property
    def own(self):
        return [op for op in self.operators if op.namespace == "torchops"]


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("mode", ["own", "native"])
def test_mode_decides_who_computes(case, mode):
    sample = case.gradcheck_samples[0]
    tensors = case.tensors(sample, torch.float32)
    with torchops.backend(mode), torch.no_grad(), Namespaces() as seen:
        case.own(*tensors, **sample.kwargs)
    assert bool(seen.own) is (mode == "own")


@pytest.mark.parametrize("operator", [o.name for o in OPERATORS.values() if o.own])
def test_own_mode_calls_no_native_kernel_of_the_same_name(operator):
    """An operator of ours that computed through aten would be a native call in disguise."""
    cases = [case for case in all_cases() if case.name == operator]
    for case in cases:
        for sample in case.gradcheck_samples:
            with torch.no_grad(), Namespaces() as seen:
                case.own(*case.tensors(sample, torch.float32), **sample.kwargs)
            native = {op.name() for op in seen.operators if op.namespace == "aten"}
            assert not [
                name for name in native if "pool" in name or "conv" in name or "norm" in name
            ]


def test_modes_nest_and_restore():
    before = _backend.mode
    with torchops.backend("native"):
        with torchops.backend("auto"):
            assert _backend.mode == "auto"
        assert _backend.mode == "native"
        with pytest.raises(KeyError), torchops.backend("own"):
            raise KeyError
        assert _backend.mode == "native"
    assert _backend.mode == before


def test_a_mode_may_be_entered_again():
    before, native = _backend.mode, torchops.backend("native")
    with native:
        with native:
            assert _backend.mode == "native"
        assert _backend.mode == "native"
    assert _backend.mode == before


def test_unknown_mode_names_the_known_ones():
    with pytest.raises(ValueError, match="torchops.backend: expected one of 'auto', 'own', 'nat"):
        torchops.backend("fast")


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("mode", ["auto", "own", "native"])
def test_environment_variable(mode):
    shown = python("import torchops; print(torchops._backend.mode)", TORCHOPS_BACKEND=mode)
    assert shown.stdout.strip() == mode


def test_environment_variable_with_a_typing_error():
    shown = python("import torchops", TORCHOPS_BACKEND="owm")
    assert shown.returncode != 0
    assert "TORCHOPS_BACKEND: expected one of 'auto', 'own', 'native', got 'owm'" in shown.stderr


@pytest.fixture
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(_backend, "_warned", set())


def fallbacks(*calls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]


def pool(dtype):
    return lambda: TF.max_pool2d(torch.ones(1, 1, 4, 4).to(dtype), 2)


@pytest.mark.usefixtures("nothing_warned_yet")
def test_fallback_warns_once_per_operator_and_reason():
    assert fallbacks(pool(torch.int32), pool(torch.int32)) == [
        "torchops.max_pool2d ran natively: no kernel for torch.int32"
    ]
    assert len(fallbacks(pool(torch.int32), pool(torch.int64))) == 1


@pytest.mark.usefixtures("nothing_warned_yet")
@pytest.mark.parametrize("mode", ["auto", "native"])
def test_fallback_is_silent_in_other_modes(mode):
    with torchops.backend(mode):
        assert fallbacks(pool(torch.int32)) == []


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.usefixtures("nothing_warned_yet")
def test_a_layout_without_a_kernel_runs_natively():
    image = torch.ones(1, 1, 4, 4).to_mkldnn()
    with torchops.backend("own"):
        assert fallbacks(lambda: TF.max_pool2d(image, 2)) == [
            "torchops.max_pool2d ran natively: no kernel for torch._mkldnn"
        ]


@pytest.mark.usefixtures("nothing_warned_yet")
def test_fallback_warning_points_at_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TF.max_pool2d(torch.ones(1, 1, 4, 4, dtype=torch.int32), 2)
    assert caught[0].filename == __file__


@pytest.mark.usefixtures("nothing_warned_yet")
@pytest.mark.parametrize("operator", [o for o in OPERATORS.values() if not o.own])
def test_operators_that_torch_computes_say_so(operator):
    shape = (1, 2, *[5] * int(operator.name[-2]))
    arguments = (
        (torch.randn(2, 2, *[3] * int(operator.name[-2])),) if "conv" in operator.name else (2,)
    )
    input = torch.randn(shape)
    own = getattr(TF, operator.name)
    assert len(fallbacks(lambda: own(input, *arguments))) == 1
    torch.testing.assert_close(own(input, *arguments), operator.native(input, *arguments))


def test_compiled_code_follows_the_mode():
    recorder = EagerAndRecordGraphs()
    compiled = torch.compile(lambda x: TF.max_pool2d(x, 2), backend=recorder, fullgraph=True)
    input = torch.randn(1, 2, 4, 4)
    with torch.no_grad():
        for mode in ("own", "native"):
            with torchops.backend(mode):
                compiled(input)
    own, native = ([str(node.target) for node in graph.graph.nodes] for graph in recorder.graphs)
    assert any("torchops" in target for target in own)
    assert not any("torchops" in target for target in native)


class TorchOnly(torch.Tensor):
    """A tensor subclass that knows torch's operators and no others, as DTensor does."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace != "aten":
            raise NotImplementedError(f"{cls.__name__} does not know {function}")
        plain = [a.inner if isinstance(a, TorchOnly) else a for a in args]
        return function(*plain, **(kwargs or {}))


class Marked(torch.Tensor):
    """A tensor subclass that results take over from any argument, as torch.Tensor's do."""


@pytest.mark.parametrize("position", [0, 1, 2])
def test_every_argument_may_be_of_a_tensor_subclass(position):
    arguments = [torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)]
    plain = TF.conv2d(*arguments)
    arguments[position] = arguments[position].as_subclass(Marked)
    for output in (
        TF.conv2d(*arguments),
        TF.conv2d(arguments[0], **dict(weight=arguments[1], bias=arguments[2])),
    ):
        assert type(output) is Marked
        assert torch.equal(output.as_subclass(torch.Tensor), plain)


def test_a_tensor_subclass_that_knows_only_torch_runs_natively():
    input, weight = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    with pytest.warns(
        FallbackWarning, match="conv2d ran natively: .* tensors of class TorchOnly"
    ) as caught:
        output = TF.conv2d(input, TorchOnly(weight))
    assert caught[0].filename == __file__
    torch.testing.assert_close(output, torch.nn.functional.conv2d(input, weight))


def test_what_torch_accepts_and_ours_refuses_runs_natively_in_auto_only():
    # torch 2.13 lets a bias of another dtype pass where padding is a word.
    input = torch.randn(1, 2, 5, 5, requires_grad=True)
    weight, bias = torch.randn(3, 2, 3, 3), torch.randn(3, dtype=torch.float64)
    native = torch.nn.functional.conv2d(input, weight, bias, padding="same")
    with torchops.backend("auto"):
        assert torch.equal(TF.conv2d(input, weight, bias, padding="same"), native)
    with torchops.backend("own"), pytest.raises(RuntimeError, match="bias has another dtype"):
        TF.conv2d(input, weight, bias, padding="same")


def test_uneven_padding_is_warned_of_as_by_native():
    """torch says once that padding="same" may copy the input, by its own means always."""
    input, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 2, 3)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with pytest.warns(UserWarning, match="padding='same'") as native:
            torch.nn.functional.conv2d(input, weight, padding="same")
    finally:
        torch.set_warn_always(before)
    with pytest.warns(UserWarning, match="padding='same'") as own:
        TF.conv2d(input, weight, padding="same")
    assert str(native[0].message).startswith(str(own[0].message))
