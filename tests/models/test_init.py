"""theta0: every value by its definition, bits that no thread count or vector unit changes, and golden values."""

import hashlib
import math
import os
import subprocess
import sys
from collections import OrderedDict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from fastlth_kernels.philox import philox, words
from scipy.special import ndtri
from scipy.stats import truncnorm
from torch import nn

from fastlth.composition import compose
from fastlth.models import INIT_VERSION, build, weight_stds
from fastlth.models.conv import vgg
from fastlth.models.init import _inverse_normal, initialise_, normal, uniform

KEY = (5, 1)


def small() -> nn.Module:
    """One of every kind of parameter and buffer."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(2, 5, 3), bn=nn.BatchNorm2d(5), bare=nn.Conv2d(5, 3, 1, bias=False), output=nn.Linear(12, 7)
        )
    )


def spoiled(model: nn.Module) -> nn.Module:
    """The model as ``to_empty`` may leave it: with anything in its memory."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan if tensor.is_floating_point() else 99)
    return model


def initialised(
    model: nn.Module, key: tuple[int, int] = KEY, bias: str = "zero", **how: Any
) -> dict[str, torch.Tensor]:
    initialise_(spoiled(model), key, bias, **how)
    return dict(model.state_dict())


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def middle(index: int, tensor: int, key: tuple[int, int]) -> float:
    """The middle of the interval that word ``index`` of stream ``tensor`` stands for."""
    return (philox(index // 4, 0, tensor, 0, key)[index % 4] + 0.5) / 2**32


def test_normal_deviates_are_the_inverse_normal_of_the_words():
    drawn = normal(3, 100_000, KEY)
    expected = ndtri((words(0, 100_000, KEY, c2=3).astype(np.float64) + 0.5) / 2**32)
    assert np.max(np.abs(drawn / expected - 1)) < 4e-15
    assert drawn[[0, 1, 32_767, 32_768, 99_999]] == pytest.approx(  # also where one block ends and the next begins
        [ndtri(middle(i, 3, KEY)) for i in (0, 1, 32_767, 32_768, 99_999)], rel=4e-15
    )


def test_the_inverse_normal_holds_at_its_ends_and_seams():
    """The first and last words, both sides of the middle, and of |q| = 0.425 where the tails begin."""
    seam = round(0.075 * 2**32)
    around = [seam + d for d in range(-2, 3)]
    w = np.array([0, 1, 2, *around, 2**31 - 1], dtype=np.float64)
    p = (w + 0.5) / 2**32
    below, above = _inverse_normal(p), _inverse_normal(1 - p)
    assert np.max(np.abs(below / ndtri(p) - 1)) < 4e-15
    assert (above == -below).all()
    assert below[0] == pytest.approx(-6.3379577545537, rel=1e-12)
    assert (np.diff(below) > 0).all()


def test_uniform_numbers_are_exact_multiples_of_two_to_the_minus_23():
    drawn = uniform(2, 1_000, KEY)
    expected = [Fraction(philox(i // 4, 0, 2, 0, KEY)[i % 4] >> 8, 2**23) - 1 for i in range(1_000)]
    assert [Fraction(x) for x in drawn.tolist()] == expected
    assert (drawn.astype(np.float32) == drawn).all()
    assert -1 <= drawn.min() < -0.99 < 0.99 < drawn.max() < 1


def test_a_shorter_tensor_is_the_beginning_of_a_longer_one():
    assert (normal(0, 40_000, KEY)[:33_000] == normal(0, 33_000, KEY)).all()
    assert (uniform(0, 100, KEY)[:33] == uniform(0, 33, KEY)).all()


def test_weights_are_glorot_normal():
    """std = sqrt(2 / (fan_in + fan_out)), with torch's own fans, value by value in the place of the parameter."""
    model = small()
    initialise_(spoiled(model), KEY)
    for place, (name, p) in enumerate(model.named_parameters()):
        if p.dim() < 2:
            continue
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(p)
        deviates = ndtri((words(0, p.numel(), KEY, c2=place).astype(np.float64) + 0.5) / 2**32)
        expected = math.sqrt(2 / (fan_in + fan_out)) * deviates
        np.testing.assert_allclose(p.detach().flatten().numpy(), expected, rtol=2e-7, err_msg=name)


def fan_in_and_out(weight: torch.Tensor) -> tuple[int, int]:
    return nn.init._calculate_fan_in_and_fan_out(weight)


@pytest.mark.parametrize(("how", "std"), [
    ({"weights": "kaiming"}, lambda w: math.sqrt(2 / fan_in_and_out(w)[0])),
    ({"std": 0.1}, lambda w: 0.1),
    ({}, lambda w: math.sqrt(2 / sum(fan_in_and_out(w)))),
])  # fmt: skip
def test_other_spreads_are_the_same_deviates_on_another_scale(how, std):
    """Value by value: kaiming is sqrt(2 / fan_in), torch's kaiming_normal_ for ReLU; a given one is the same in all
    layers. Nothing but weights changes."""
    model = small()
    drawn, plain = initialised(model, **how), initialised(small())
    for place, (name, p) in enumerate(model.named_parameters()):
        if p.dim() > 1:
            deviates = ndtri((words(0, p.numel(), KEY, c2=place).astype(np.float64) + 0.5) / 2**32)
            np.testing.assert_allclose(drawn[name].flatten().numpy(), std(p) * deviates, rtol=2e-7, err_msg=name)
        else:
            assert torch.equal(drawn[name], plain[name])


def test_truncated_weights_have_no_tails_and_the_same_spread():
    """scipy's normal distribution cut off at two standard deviations, over its own standard deviation."""
    cut = truncnorm(-2, 2)
    drawn = normal(3, 100_000, KEY, truncated=True)
    u = (words(0, 100_000, KEY, c2=3).astype(np.float64) + 0.5) / 2**32
    np.testing.assert_allclose(drawn, cut.ppf(u) / cut.std(), rtol=1e-14, atol=1e-14)  # 0.5 + tiny loses digits
    assert 2.27 < np.abs(drawn).max() < 2 / cut.std() < 2.274
    plain, truncated = initialised(small()), initialised(small(), weights="glorot-truncated")
    for place, (name, p) in enumerate(small().named_parameters()):
        if p.dim() > 1:
            std = math.sqrt(2 / sum(fan_in_and_out(p)))
            wanted = std * normal(place, p.numel(), KEY, truncated=True)
            np.testing.assert_allclose(truncated[name].flatten().numpy(), wanted, rtol=2e-7)
        else:
            assert torch.equal(truncated[name], plain[name])


def test_a_net_has_the_spreads_that_weight_stds_gives():
    """Within 5 standard errors, in a convolution, a shortcut and a linear layer of a ResNet."""
    for settings in ({}, {"model.weight_init": "kaiming"}, {"model.weight_init": "glorot-truncated"},
                     {"model.weight_std": 0.05}):  # fmt: skip
        asked = compose("resnet-8", "cifar-10", settings={"train.iterations": 1, "train.batch_size": 1, "train.lr": 1.0,
                                                          **settings}).recipe  # fmt: skip
        net, stds = build(asked), weight_stds(asked)
        for name in ("block3.conv2.weight", "block3.shortcut.weight", "output.weight"):
            w = net.get_parameter(name).detach()
            assert float(w.std()) == pytest.approx(stds[name], rel=5 / math.sqrt(2 * w.numel()))
            assert abs(float(w.mean())) < 5 * stds[name] / math.sqrt(w.numel())
    assert set(stds.values()) == {0.05}
    kaiming = nn.init.kaiming_normal_(torch.empty(64, 64, 3, 3), nonlinearity="relu").std().item()
    found = weight_stds(compose("vgg16", "cifar-10").recipe)["conv2.weight"]
    assert found == pytest.approx(kaiming, rel=5 / math.sqrt(2 * 36_864))


def test_scales_of_batch_norm_are_one_or_uniform_in_0_to_1():
    one, drawn = initialised(small()), initialised(small(), norm="uniform")
    place = [n for n, _ in small().named_parameters()].index("bn.weight")
    expected = [(philox(i // 4, 0, place, 0, KEY)[i % 4] >> 8) / 2**24 for i in range(5)]
    np.testing.assert_allclose(drawn["bn.weight"].numpy(), expected, rtol=1e-7)
    assert all(torch.equal(one[n], drawn[n]) for n in one if n != "bn.weight")
    wide = initialised(nn.Sequential(nn.BatchNorm2d(4_000)), norm="uniform")["0.weight"]
    assert 0 <= float(wide.min()) < 0.01 and 0.99 < float(wide.max()) < 1
    assert float(wide.mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * 4_000))


@pytest.mark.parametrize("name", ["resnet-8", "lenet-25-9"])
def test_a_seed_draws_a_net_again_and_another_one_another(name):
    settings = {"train.iterations": 1, "train.batch_size": 1, "train.lr": 1.0}
    one, again, other = (
        build(compose(name, "digits", settings={**settings, "seeds.base": seed}).recipe).state_dict()
        for seed in (4, 4, 5)
    )
    assert all(torch.equal(one[n], again[n]) for n in one)
    changed = {n for n in one if not torch.equal(one[n], other[n])}
    assert changed == {n for n in one if one[n].dim() > 1}  # weights alone are drawn


def test_a_large_layer_has_the_spread_of_torchs_xavier_normal():
    """78,400 values: mean within 5 standard errors of 0, standard deviation within 5 of xavier_normal_'s."""
    ours = initialised(nn.Sequential(nn.Linear(784, 100)))["0.weight"]
    torchs = nn.init.xavier_normal_(torch.empty(100, 784), generator=torch.Generator().manual_seed(0))
    std = torchs.std().item()
    assert abs(ours.mean().item()) < 5 * std / math.sqrt(78_400)
    assert ours.std().item() == pytest.approx(std, rel=5 * math.sqrt(2) / math.sqrt(2 * 78_400))


def test_biases_are_zero_or_uniform_in_one_over_the_square_root_of_the_fan_in():
    zero, drawn = initialised(small()), initialised(small(), bias="uniform")
    assert not zero["conv.bias"].any()
    assert not zero["output.bias"].any()
    model = small()
    for place, (name, p) in enumerate(model.named_parameters()):
        if name in ("conv.bias", "output.bias"):
            bound = 1 / math.sqrt({"conv.bias": 2 * 9, "output.bias": 12}[name])
            expected = [bound * ((philox(i // 4, 0, place, 0, KEY)[i % 4] >> 8) / 2**23 - 1) for i in range(p.numel())]
            np.testing.assert_allclose(drawn[name].numpy(), expected, rtol=1e-7)
        else:  # the kind of the biases changes nothing else
            assert torch.equal(zero[name], drawn[name])


@pytest.mark.parametrize("model", [small(), vgg(((4, 4), (8,)), (3, 8, 8), 10)], ids=["small", "vgg"])
def test_nothing_is_left_as_it_was_in_memory(model):
    state = initialised(model)
    assert all(t.isfinite().all() for t in state.values())
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.running_var == 1).all(), name
            assert not any(t.any() for t in (module.bias, module.running_mean, module.num_batches_tracked)), name


# If one of these changes, the bits of theta0 have changed: every ticket that stores its seed in place of theta0 would
# come back as another net. Then raise INIT_VERSION (such tickets name the version they need) and renew the values.
GOLDEN_VERSION = 1
GOLDEN = {
    "conv.weight": "82ef905b3faf9c5f18b31b7f82a8b94bcc23e2669d8a7bdc1d54f56c6044ed96",
    "conv.bias": "c8856f01aca5fb5503a808cef6090c0f4edcfdc1cecc244bfbd6dd98430e96a6",
    "bn.weight": "f603f94b1d517d5138cdeae0c125779455d596b548a58e5cb4d941f97a1a242a",
    "bn.running_mean": "de47c9b27eb8d300dbb5f2c353e632c393262cf06340c4fa7f1b40c4cbd36f90",
    "bare.weight": "18b1006857f677f9fd042c288a9edb7958e0114c1de8480796bfa7de606f165d",
    "output.weight": "001528f6a695f1eb5692244f24a351042c97577dfe83d4d5bd7ac1fae834dc32",
    "output.bias": "92946949eabb2dd588c763436e98924c2c73518711e26152a10cd098571176fa",
    "lenet-300-100 fc1.weight": "94a09166a5fec438c5ef32dd928077e12a39f04726148a2051a4bbf4093fa5f1",
    "normal deviates in float64": "39e67ea5bdae3e8c873e74b7a356050e6d76d2ca13c31fa6043f3670436a4047",
}


def test_the_bits_of_theta0_are_those_of_this_init_version():
    state = initialised(small(), bias="uniform")
    net = build(compose("lenet-300-100", "digits").recipe)
    state["lenet-300-100 fc1.weight"] = net.get_parameter("fc1.weight").detach()
    state["normal deviates in float64"] = torch.from_numpy(normal(0, 100_000, KEY))  # before rounding hides anything
    assert {name: sha256(t) for name, t in state.items() if name in GOLDEN} == GOLDEN
    assert INIT_VERSION == GOLDEN_VERSION


PRINT_HASHES = """
import hashlib, sys
import numpy as np, torch
from fastlth.composition import compose
from fastlth.models import build
from fastlth.models.init import normal
torch.set_num_threads(1)
print(torch.backends.cpu.get_cpu_capability())
state = build(compose("conv-2", "digits").recipe).state_dict()
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in state.values())).hexdigest())
print(hashlib.sha256(normal(0, 100_000, (5, 1)).tobytes()).hexdigest())
"""


def vector_extensions_of_numpy() -> str:
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return " ".join(f for f in __cpu_dispatch__ if __cpu_features__[f])


def test_theta0_depends_on_no_thread_count_and_no_vector_unit():
    """A process with one thread, and with torch and numpy held to their plainest code, makes the same bits."""
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": vector_extensions_of_numpy(),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }  # fmt: skip
    plain = subprocess.run(
        [sys.executable, "-c", PRINT_HASHES], env=environment, capture_output=True, text=True, check=True
    )
    capability, *hashes = plain.stdout.split()
    assert capability in ("DEFAULT", "NO AVX")
    state = build(compose("conv-2", "digits").recipe).state_dict()
    here = b"".join(t.numpy().tobytes() for t in state.values()), normal(0, 100_000, KEY).tobytes()
    assert hashes == [hashlib.sha256(b).hexdigest() for b in here]


def test_torchs_own_generator_plays_no_part_and_is_left_alone():
    one, other = small(), small()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = initialised(one)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = initialised(other)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_layer_added_at_the_end_changes_no_layer_before_it():
    short = initialised(small(), bias="uniform")
    longer = small()
    longer.add_module("more", nn.Linear(7, 3))
    long = initialised(longer, bias="uniform")
    assert all(torch.equal(long[n], t) for n, t in short.items())


@pytest.mark.parametrize("keys", [((5, 1), (6, 1)), ((5, 1), (5, 2))], ids=["seeds", "streams"])
def test_seeds_and_streams_are_independent(keys):
    """Correlation of 20,000 pairs within 5 standard errors of zero."""
    a, b = (normal(0, 20_000, key) for key in keys)
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(20_000)


def test_tensors_of_one_net_are_independent():
    columns = [normal(tensor, 20_000, KEY) for tensor in range(4)]
    off_diagonal = np.corrcoef(columns) - np.eye(4)
    assert np.abs(off_diagonal).max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("stream", ["init", "split", "order", "augment", "prune"])
def test_only_the_init_seed_changes_theta0(stream):
    ours, others = (
        build(compose("lenet-300-100", "digits", settings=settings).recipe).state_dict()
        for settings in ({}, {f"seeds.{stream}": 1})
    )
    assert torch.equal(ours["fc1.weight"], others["fc1.weight"]) == (stream != "init")


def test_seeds_base_and_seeds_init_name_the_same_stream():
    ours, others = (
        build(compose("lenet-300-100", "digits", settings=settings).recipe).state_dict()
        for settings in ({"seeds.base": 3}, {"seeds.init": 3})
    )
    assert all(torch.equal(ours[n], others[n]) for n in ours)
