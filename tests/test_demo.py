"""`torchops demo` end to end on a few images, its parts, and what it says when it cannot run."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torchops
from torchops import demo
from torchops.bench.models import NETWORKS
from torchops.demo import BATCH, data, training
from torchops.demo.layer_times import layer_times, recorded_layers
from torchops.demo.report import running_mean

pytest.importorskip("rich", reason="the demo needs the [bench] extra")
pytest.importorskip("matplotlib", reason="the demo needs the [bench] extra")

REPOSITORY_DATA = Path(__file__).resolve().parents[1] / "examples" / "data"


@pytest.fixture(autouse=True)
def subset(monkeypatch):
    monkeypatch.setenv("TORCHOPS_DATA", str(REPOSITORY_DATA))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_comparison(network: str, seed: int = 0) -> training.Comparison:
    torch.manual_seed(seed)
    return training.compare(
        network,
        NETWORKS[network].build(),
        data.load(),
        training.Plan(epochs=1, steps_per_epoch=3, seed=seed),
        after_step=lambda: None,
        after_epoch=lambda epoch, native, converted: None,
    )


def test_demo_end_to_end(tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    code = demo.main(
        ["--quick", "--images", "128", "--threads", "1", "--output", str(output), "--seed", "3"]
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "128 of 6,000 training images per epoch" in printed
    assert printed.count("epoch 1/1: loss") == 2
    for word in "BN-LeNet", "ResNet-8", "accuracy", "per epoch", "Conv2d 1-6 5x5", "together":
        assert word in printed
    assert "\x1b" not in printed, "escape sequences where there is no terminal"


@pytest.mark.parametrize("network", ["bn_lenet", "small_resnet"])
def test_both_trainings_agree(network):
    with torchops.backend("own"):
        comparison = small_comparison(network)
    together = comparison.native.gradient_error + comparison.converted.gradient_error
    assert 0 < comparison.gradient_difference < 1.01 * together
    assert comparison.converted.losses == pytest.approx(comparison.native.losses, rel=1e-3)
    assert len(comparison.native.losses) == 3
    assert comparison.native.seconds > 0 and comparison.converted.seconds > 0
    assert abs(comparison.native.accuracy - comparison.converted.accuracy) < 0.05


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_exact_but_for_rounding(seed):
    """Of a network without ReLUs: where the input of one is zero but for rounding, it passes the
    gradient on or not, which decides the error of torch's kernels as of these, 2e-6 to 4e-3.
    """
    torch.manual_seed(seed)
    model = smooth(NETWORKS["small_resnet"].build())
    native = training.Training(model, 1)
    with torchops.backend("own"):
        converted = training.Training(torchops.convert(copy.deepcopy(model)), 1)
        training.compare_gradients(
            native, converted, *next(training.batches(data.load().train, 1, seed))
        )
    # Measured here: 2e-7 to 5e-7 with torchops, 3e-6 to 5e-6 with torch's own kernels.
    assert converted.gradient_error < 2e-6


def smooth(model):
    for name, layer in model.named_children():
        if isinstance(layer, torch.nn.ReLU):
            setattr(model, name, torch.nn.Softplus())
        else:
            smooth(layer)
    return model


def test_same_seed_same_run():
    first, again, other = (small_comparison("bn_lenet", seed) for seed in (1, 1, 2))
    assert first.converted.losses == again.converted.losses
    assert first.native.losses == again.native.losses
    assert first.native.losses != other.native.losses


def test_relative_error():
    expected = {"weight": torch.tensor([3.0, -4.0]), "bias": torch.tensor([1.0])}
    actual = {"weight": torch.tensor([3.0, -4.0]), "bias": torch.tensor([3.0])}
    assert training.relative_error(expected, expected) == 0
    assert training.relative_error(actual, expected) == 0.5


def test_gradients_are_those_of_the_mean_cross_entropy():
    model = nn.Linear(2, 2)
    images, labels = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    probabilities = model(images).softmax(1)
    by_hand = (probabilities - nn.functional.one_hot(labels, 2)).mean(0)
    assert torch.allclose(training.gradients(model, images, labels)["bias"], by_hand)


def test_batches_are_full_drawn_anew_and_repeatable():
    split = data.load().test
    first, again, other = (list(training.batches(split, 15, seed)) for seed in (0, 0, 1))
    assert [len(labels) for _, labels in first] == [BATCH] * 15
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], other[0][1])
    assert first[0][0].dtype == torch.float32 and first[0][0].shape == (BATCH, 1, 28, 28)


def test_accuracy_counts_hits_and_leaves_the_model_in_training():
    split = data.Split(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10))

    class AlwaysThree(nn.Module):
        def forward(self, input):
            return nn.functional.one_hot(torch.full((len(input),), 3), 10).float()

    model = AlwaysThree()
    assert training.accuracy(model, split) == 0.1
    assert model.training


def test_recorded_layers_pair_batch_norm_with_its_activation():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.ReLU()
    )
    images = torch.randn(2, 1, 8, 8)
    layers = recorded_layers(model, images)
    kinds = [[type(module) for module in layer] for layer, _ in layers]
    assert kinds == [[nn.Conv2d], [nn.BatchNorm2d, nn.ReLU], [nn.AvgPool2d], [nn.ReLU]]
    assert [input.requires_grad for _, input in layers] == [False, True, True, True]
    assert torch.equal(layers[1][1], model[0](images)), "not overwritten by the in-place ReLU"
    assert (layers[2][1] >= 0).all()
    assert not any(module._forward_hooks for module in model.modules())


def test_layer_times_list_what_torchops_replaces():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)
    )
    times = layer_times(model, torch.randn(2, 1, 8, 8), repeats=2)
    assert [time.layer for time in times] == ["Conv2d 1-4 3x3 /2", "BatchNorm2d + ReLU"]
    assert [time.input for time in times] == ["2x1x8x8", "2x4x3x3"]
    assert all(time.native > 0 and time.converted > 0 for time in times)


def test_running_mean():
    assert running_mean([4.0, 2.0, 0.0, 2.0], reach=1) == [4.0, 2.0, 4 / 3, 1.0]


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_missing_extra(missing):
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from torchops.demo import main; sys.exit(main(['--quick']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert f"the demo needs {missing}" in result.stderr
    assert "-m pip install rich matplotlib" in result.stderr
    assert "Traceback" not in result.stderr


def test_damaged_data_is_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHOPS_DATA", str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"half a file")
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("torchops demo: ") and "train-images-idx3-ubyte.gz" in error


def test_output_that_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert demo.main(["--quick", "--output", str(tmp_path / "file")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and "--output" in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--epochs", "0"], "expected a number from 1 up, got '0'"),
        (["--images", "63"], "expected a number from 64 up, got '63'"),
        (["--threads", "two"], "expected a number from 1 up, got 'two'"),
        (["--seed", "-1"], "expected a number from 0 up, got '-1'"),
        (["--epoch-count", "3"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(arguments, reason, capsys):
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err
