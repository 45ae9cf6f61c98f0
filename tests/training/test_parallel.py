"""One net trained by two processes: the values of one process, the same bits on both, rank 0 alone writes."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fastlth.errors import RecipeError, Stopped
from fastlth.running import run
from fastlth.training.engines.make import make_engine
from fastlth.training.parallel.norm import SharedBatchNorm, join_batch_norms_
from fastlth.training.parallel.team import Team, check, remark
from tests.endurance.searches import assert_equal_runs, content
from tests.helpers import CPU, assert_close_by_norm, random_source, small_recipe
from tests.scaling.sweeps import own_code
from tests.training import ranks

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    paths = f"{ROOT}:{ROOT}/kernels:{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes left: case -> (rank 0's state, rank 1's)."""
    out, port = tmp_path_factory.mktemp("ranks"), free_port()
    each = [environment(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for r in (0, 1)]  # fmt: skip
    started = [subprocess.Popen([sys.executable, "-m", "tests.training.ranks", str(out)], env=e, cwd=ROOT,
                                stderr=subprocess.PIPE, text=True) for e in each]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return {case: [torch.load(out / f"{case}-{r}.pt") for r in (0, 1)] for case in ranks.CASES}


@pytest.mark.parametrize("case", ranks.CASES)
def test_two_processes_train_the_values_of_one(two_ranks, case, monkeypatch):
    """1e-10 relative over 100 steps in float64: uneven parts, dropout, augmentation, batch norm's statistics."""
    monkeypatch.setattr(ranks.dense, "build", lambda recipe: ranks.build(recipe).double())
    alone = make_engine(ranks.recipe(case), random_source("digits", 331))
    ranks.trained(alone)
    moved = 0
    for name, expected in alone.state().items():
        found = two_ranks[case][0][name]
        if not name.startswith("interval") and expected.is_floating_point():
            assert found.dtype == expected.dtype and expected.dtype in (torch.float64, torch.float32)
            moved += expected.numel()
            assert_close_by_norm(found.double(), expected.double(), 1e-10)
            assert torch.equal(found == 0, expected == 0) or "bias" in name or "/exp_avg" in name, name
    assert moved > 10_000
    losses = "interval/losses"
    assert_close_by_norm(two_ranks[case][0][losses].double(), alone.state()[losses].double(), 1e-6)
    assert torch.equal(two_ranks[case][0]["interval/hits"], alone.state()["interval/hits"])


@pytest.mark.parametrize("case", ranks.CASES)
def test_both_processes_hold_the_same_bits(two_ranks, case):
    first, second = two_ranks[case]
    for name in (n for n in first if not n.startswith("interval")):
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("settings", "size", "sentence"),
    [
        ({"compute__engine": "sparse"}, 2, "--engine sparse trains in one process, and torchrun started 2"),
        ({"compute__compile": "on"}, 2, "--compile on trains in one process"),
        ({"compute__engine": "graph"}, 2, "--engine graph trains in one process"),
        ({"compute__kept": {"fc1": 0.3}}, 2, "compute.kept must be empty"),
        ({"compute__device": "cuda:1"}, 2, "--device cuda:1 is one GPU, and torchrun started 2 processes"),
        ({"model": "tests.training.ranks:own_of_one_dimension"}, 2, r"layer 1 .BatchNorm1d. looks at a whole batch"),
        ({"train__batch_size": 3}, 4, "a batch of 3 images cannot be shared by 4 processes"),
        ({"train__batch_size": 40, "train__drop_last": False, "data__validation": 36}, 2, "a batch of 1 images"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings, size, sentence):
    with pytest.raises(RecipeError, match=sentence):
        check(small_recipe(**settings), size)


def test_a_layer_that_looks_at_a_batch_in_another_way_is_refused():
    with pytest.raises(RecipeError, match=r"layer 0 .BatchNorm1d. looks at a whole batch"):
        join_batch_norms_(nn.Sequential(nn.BatchNorm1d(3)), lambda x: x)


def test_an_own_net_that_drops_by_itself_is_told_of():
    text = remark(small_recipe("tests.training.ranks:own_dropping"), 2)
    assert text and "own_dropping draws what it drops itself: 2 processes" in text
    assert remark(small_recipe(model__dropout=0.3), 2) is None


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_one_process_is_torchs(training):
    """Its output, its gradients and its running statistics, with the sum over one rank."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(5).double().train(training)
    nn.init.normal_(theirs.weight)
    theirs.running_mean.normal_()
    ours = nn.BatchNorm2d(5).double().train(training)
    ours.load_state_dict(theirs.state_dict())
    net = nn.Sequential(ours)
    join_batch_norms_(net, lambda x: x.clone())
    assert isinstance(net[0], SharedBatchNorm) and net[0].weight is ours.weight
    assert list(net[0].state_dict()) == list(theirs.state_dict())
    x = (3 + 2 * torch.randn(7, 5, 4, 6, dtype=torch.float64)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    dy = torch.randn_like(x)
    for _ in range(3):
        out, expected = net(x), theirs(y)
        assert_close_by_norm(out.detach(), expected.detach(), 1e-14)
    out.backward(dy)
    expected.backward(dy)
    assert_close_by_norm(x.grad, y.grad, 1e-13)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(net[0].state_dict()[name].double(), value.double(), rtol=1e-14, atol=1e-15), name


def test_parts_of_a_batch_are_all_of_it_in_order():
    from fastlth.data.loader import Batch

    batch = Batch(torch.arange(11)[:, None], torch.arange(11), 3, 100)
    parts = [Team(r, 4, r).part(batch) for r in range(4)]
    assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)
    assert [p.position - 100 for p in parts] == [int(p.labels[0]) for p in parts]
    assert {p.epoch for p in parts} == {3} and max(len(p.labels) for p in parts) == 3


# torchrun


def torchrun(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
            "--master-port", free_port(), "-m", "fastlth", *map(str, arguments)]  # fmt: skip


def find(
    out: Path, iterations: int = 40, *, model: str = "lenet-300-100", dataset: str = "digits", rounds: int = 2,
    **settings: object,
) -> list[object]:  # fmt: skip
    """Keyword data__validation is data.validation."""
    given = {**CPU, **{name.replace("__", "."): value for name, value in settings.items()}}
    sets = [x for key, value in given.items() for x in ("--set", f"{key}={value}")]
    return ["find-ticket", model, dataset, "-i", iterations, "-b", 32, "-l", "1e-3", "--rounds", rounds,
            "--set", "evaluate.every=10", "--save-every", "0.1s", "--out", out, *sets]  # fmt: skip


def train(line: list[str], **more: str) -> str:
    """What a command that ends well says."""
    done = subprocess.run(line, env=environment(**more), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stderr


def by_one(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fastlth", *map(str, arguments)]


@pytest.mark.endurance
def test_a_search_by_torchrun_stopped_and_gone_on_with(tmp_path):
    """As one process finds it, and the same bits whether it was stopped or not."""
    whole = subprocess.run([*torchrun(*find(tmp_path / "whole", 400))], env=environment(), capture_output=True,
                           text=True, timeout=240)  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    assert sum(line.startswith("ticket: ") for line in whole.stderr.splitlines()) == 1  # one process talks
    (folder,) = (tmp_path / "whole").glob("*/r0")
    assert 'processes = "2"' in (folder / "recipe.toml").read_text()

    train(by_one(*find(tmp_path / "alone", 400)))
    (single,) = (tmp_path / "alone").glob("*/r0")
    ours, theirs = content(folder), content(single)
    assert [r["kept"] for r in ours["rounds"]] == [r["kept"] for r in theirs["rounds"]]
    assert ours["rewind"] == theirs["rewind"]
    for a, b in zip(ours["metrics"][:2], theirs["metrics"][:2], strict=True):
        assert a["iteration"] == b["iteration"]
        assert abs(a["train_loss"] - b["train_loss"]) <= 1e-4 * b["train_loss"]

    line = torchrun(*find(tmp_path / "parts", 400))
    with subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (found := list((tmp_path / "parts").glob("*/r0/metrics.jsonl"))) or not found[0].stat().st_size:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # torchrun hands it to all
        process.communicate(timeout=120)
    (parts,) = (tmp_path / "parts").glob("*/r0")
    assert (parts / "state.safetensors").exists()
    again = subprocess.run(torchrun(*find(tmp_path / "parts", 400)), env=environment(), capture_output=True, text=True,
                           timeout=240)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert_equal_runs(parts, folder)


@pytest.mark.endurance
def test_a_recipe_that_cannot_be_shared_ends_all_processes_with_one_sentence(tmp_path):
    arguments = [*find(tmp_path), "--engine", "sparse"]
    done = subprocess.run(torchrun(*arguments), env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("fastlth: --engine sparse trains in one process") == 1
    assert not list(tmp_path.glob("*/r0"))


@pytest.mark.endurance
def test_an_own_net_on_a_folder_of_images_by_torchrun(tmp_path):
    """As one process trains it, to the tolerance of a few float32 steps; the first evaluation comes after ten."""
    own_code(tmp_path, "unused")
    what = {"model": "tests.training.ranks:own_net", "dataset": f"imagefolder:{tmp_path / 'flowers'}",
            "data__image_size": 8, "data__validation": 16}  # fmt: skip
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    train(by_one(*find(tmp_path / "alone", **what)), **cache)
    train(torchrun(*find(tmp_path / "two", **what)), **cache)
    (ours,), (theirs,) = ((tmp_path / out).glob("*/r0") for out in ("two", "alone"))
    a, b = content(ours), content(theirs)
    assert a["rewind"] == b["rewind"] and [r["kept"] for r in a["rounds"]] == [r["kept"] for r in b["rounds"]]
    assert abs(a["metrics"][0]["train_loss"] - b["metrics"][0]["train_loss"]) <= 1e-4 * b["metrics"][0]["train_loss"]


@pytest.mark.endurance
def test_a_search_of_one_process_goes_on_in_two_and_back(tmp_path):
    """From the middle of a round that the sparse engine trained; what became otherwise is said and recorded."""
    settings = {"data__validation": 64, "compute__engine": "auto"}
    recipe = small_recipe(train__iterations=400, **settings)
    sparse = dataclasses.replace(recipe.compute, engine="sparse", break_even=0.5, shifted=())
    steps = iter(range(8))
    with pytest.raises(Stopped):
        run(recipe, out=tmp_path, resolved=dataclasses.asdict(sparse), stopped=lambda: next(steps, None) is None and 15)
    (folder,) = tmp_path.glob("*/r0")
    assert (folder / "state.safetensors").exists() and 'engine = "sparse"' in (folder / "recipe.toml").read_text()
    said = train(torchrun(*find(tmp_path, 400, **settings)))
    assert "2 processes train it, by the dense engine" in said
    text = (folder / "recipe.toml").read_text()
    assert 'processes = "2"' in text and 'moved = ["2 processes train it, by the dense engine"]' in text
    assert "processes 2 -> 1" in train(by_one(*find(tmp_path, 400, rounds=3, **settings)))
    assert len(content(folder)["rounds"]) == 4
