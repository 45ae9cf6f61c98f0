"""ticket import: masks of other programs become a valid ticket, and nothing that a file holds is ever run."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fastlth.errors import FastlthError, OutputError, RecipeError, TicketError
from fastlth.exchange.exporting import export
from fastlth.exchange.importing import UNMEASURED, Imported, import_ticket
from fastlth.models import build
from fastlth.search import winning_round
from fastlth.store import container, strict_json
from fastlth.store.inspect import verify
from fastlth.tickets import load_ticket, theta0
from tests.exchange.making import make_ticket
from tests.helpers import assert_same_bits, half_masks, small_recipe

NAMES = {"model": "lenet-300-100", "dataset": "digits"}
CONV_NAMES: dict[str, Any] = {"model": "conv-2", "dataset": "digits", "settings": {"model.batch_norm": True}}


def names_of(file: Path) -> dict[str, Any]:
    return CONV_NAMES if load_ticket(file).recipe.model.batch_norm else NAMES


def lenet(sizes: tuple[int, ...] = (64, 300, 100, 10)) -> nn.Sequential:
    """Somebody else's LeNet, with names of their own."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def imported(source: Path, out: Path, **arguments: Any) -> Imported:
    done = import_ticket(source, out, **{**NAMES, **arguments})
    assert verify(out, theta0) == []
    return done


# -- our own exports --------------------------------------------------------------------------------------------------


def test_torch_prune_comes_back_whole(file: Path, tmp_path: Path) -> None:
    export(file, tmp_path / "pruned.pt", format="torch-prune", round=3)
    imported(tmp_path / "pruned.pt", tmp_path / "back.ticket", format="torch-prune", **names_of(file))
    before, after = load_ticket(file), load_ticket(tmp_path / "back.ticket")
    assert_same_bits(after.mask(1), before.mask(3))
    assert_same_bits(after.rewind(), before.rewind())
    assert len(after.rounds) == 2 and after.file.kept(0) == after.file.all_weights
    assert after.file.all_weights == before.file.all_weights
    assert after.rounds[1]["kept"] == before.file.kept(3)
    assert after.rounds[1]["density"] == before.file.density(3)


def test_safetensors_come_back_with_their_recipe(file: Path, tmp_path: Path) -> None:
    for round in (0, 3):
        out = tmp_path / f"{round}.ticket"
        export(file, tmp_path / f"{round}.safetensors", round=round)
        done = import_ticket(tmp_path / f"{round}.safetensors", out, format="safetensors")
        before, after = load_ticket(file), load_ticket(out)
        assert verify(out, theta0) == [] and after.recipe == before.recipe
        last = len(after.rounds) - 1
        assert last == (1 if round else 0), "the dense net's mask makes no second round"
        assert any("rewind to zero" in note for note in done.notes) == bool(round)
        assert_same_bits(dict(after.model(last).state_dict()), dict(before.model(round).state_dict()))
        assert_same_bits(after.mask(last), before.mask(round))


def test_safetensors_of_another_net_or_program(file: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "net.safetensors", tmp_path / "out.ticket"
    export(file, source)
    with pytest.raises(RecipeError, match="leave out --model and --dataset"):
        import_ticket(source, out, format="safetensors", model="conv-4")
    other = tmp_path / "other.safetensors"
    container.write(other, {"w": np.zeros(3, np.float32)}, {"format": "pt"})
    with pytest.raises(TicketError, match="not an export of fastlth"):
        import_ticket(other, out, format="safetensors")
    for recipe in ("{}", "[]", "nonsense", strict_json.dumps({**small_recipe().to_dict(), "train": {}})):
        container.write(other, {"w": np.zeros(3, np.float32)},
                        {"recipe": recipe, "recipe_digest": "0", "round": "1"})  # fmt: skip
        with pytest.raises(TicketError, match="damaged"):
            import_ticket(other, out, format="safetensors")
    data = bytearray(source.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    with pytest.raises(TicketError, match="damaged"):
        import_ticket(other, out, format="safetensors")
    assert not out.exists()


# -- torch.nn.utils.prune ---------------------------------------------------------------------------------------------


def pruned(net: nn.Module, amount: float = 0.3) -> nn.Module:
    layers = [(m, "weight") for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=amount)
    return net


def test_a_net_with_other_names_is_matched_by_place(tmp_path: Path) -> None:
    net = pruned(lenet())
    torch.save(net.state_dict(), tmp_path / "net.pt")
    imported(tmp_path / "net.pt", tmp_path / "out.ticket", format="torch-prune")
    ticket = load_ticket(tmp_path / "out.ticket")
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(ticket.model(1)(images), net(images))
    assert torch.equal(ticket.mask(1)["fc2.weight"], net[3].weight_mask.bool())
    assert torch.equal(ticket.rewind()["output.bias"], net[5].bias)
    assert torch.equal(ticket.rewind()["fc1.weight"], net[1].weight_orig)


def test_masks_of_some_layers_and_masks_alone(tmp_path: Path) -> None:
    net = build(small_recipe())
    prune.random_unstructured(net.get_submodule("fc2"), "weight", 0.5)
    torch.save(net.state_dict(), tmp_path / "some.pt")
    done = imported(tmp_path / "some.pt", tmp_path / "some.ticket", format="torch-prune")
    assert list(done.ticket.pruned_at) == ["fc2.weight"] and done.notes == ()
    assert done.ticket.density(1) == (50_200 - 15_000) / 50_200

    masks = {n: t for n, t in net.state_dict().items() if n.endswith("_mask")}
    torch.save(masks, tmp_path / "masks.pt")
    settings = {"seeds.base": 7}
    done = imported(tmp_path / "masks.pt", tmp_path / "masks.ticket", format="torch-prune", settings=settings)
    assert any("seed 7" in note for note in done.notes)
    loaded = load_ticket(tmp_path / "masks.ticket")
    assert_same_bits(loaded.rewind(), dict(build(small_recipe(seeds__base=7)).state_dict()))
    with pytest.raises(TicketError, match=r"no rewind values.*rewind_to=5"):
        imported(tmp_path / "masks.pt", tmp_path / "x", format="torch-prune", settings={"prune.rewind_to": 5})


def test_results_are_null_and_everything_that_reads_a_ticket_copes(tmp_path: Path) -> None:
    torch.save(pruned(lenet()).state_dict(), tmp_path / "net.pt")
    done = imported(tmp_path / "net.pt", tmp_path / "out.ticket", format="torch-prune")
    searched = make_ticket(tmp_path / "searched.ticket").rounds[0]
    for result in done.ticket.rounds:
        assert result.keys() == searched.keys()
        assert [k for k, v in result.items() if v is None] == [k for k in result if k in UNMEASURED]
    assert winning_round([done.ticket.rounds]) is None
    assert export(tmp_path / "out.ticket", tmp_path / "hub", format="hf").round == 1
    assert "test accuracy" not in (tmp_path / "hub" / "README.md").read_text()


def save(**tensors: Any) -> Callable[[Path], None]:
    return lambda path: torch.save({n.replace("__", "."): t for n, t in tensors.items()}, path)


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = dict(pruned(build(small_recipe())).state_dict())
        change(state)
        torch.save(state, path)

    return write


ONES = torch.ones(300, 64)
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no masks": (save(fc1__weight=ONES), "no <name>_mask"),
    "values besides 0 and 1": (save(fc1__weight_mask=ONES * 0.5), "besides 0"),
    "not a number": (save(fc1__weight_mask=ONES * float("nan")), "besides 0"),
    "another shape": (save(fc1__weight_mask=torch.ones(300, 784)), r"\[300, 784\].*\[300, 64\]"),
    "another number of layers": (save(a__weight_mask=ONES, b__weight_mask=ONES), "2 Linear and Conv weights"),
    "a mask of a bias": (save(fc1__bias_mask=torch.ones(300)), "Linear and Conv weights alone"),
    "sparse": (save(fc1__weight_mask=ONES.to_sparse()), "dense tensors"),
    "complex": (save(fc1__weight_mask=ONES * 1j), "dense tensors"),
    "on no device": (save(fc1__weight_mask=ONES.to("meta")), "dense tensors"),
    "larger than its bytes": (save(fc1__weight_mask=torch.ones(1).expand(1 << 40)), "dense tensors"),
    "not a tensor": (save(fc1__weight_mask=3), "dense tensors"),
    "nested": (lambda p: torch.save({"state_dict": {"a": ONES}}, p), "dense tensors"),
    "a list": (lambda p: torch.save([ONES], p), "dense tensors"),
    "a whole net": (lambda p: torch.save(lenet(), p), "not a file of tensors alone"),
    "text": (lambda p: p.write_text("hello"), "not a file of tensors alone"),
    "empty": (lambda p: p.write_bytes(b""), "not a file of tensors alone"),
    "no file": (lambda p: None, "there is no file"),
    "a folder": (lambda p: p.mkdir(), "cannot read"),
    "a value missing": (changed(lambda s: s.pop("fc2.bias")), "fc2 has weight, the net's fc2 has weight, bias"),
    "a layer too many": (changed(lambda s: s.update({"fc9.bias": torch.ones(3)})), "4 layers.*3"),
    "a value of another shape": (changed(lambda s: s.update({"fc2.bias": torch.ones(3)})), "fc2.bias have shape"),
    "a value of another kind": (changed(lambda s: s.update({"fc2.bias": torch.ones(100).long()})), "torch.int64"),
    "a mask without its values": (changed(lambda s: s.pop("fc1.weight_orig")), "mask of fc1.weight has no values"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_state_dicts_that_do_not_fit_are_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    write, says = BAD[name]
    source, out = tmp_path / "net.pt", tmp_path / "out.ticket"
    write(source)
    with pytest.raises(TicketError, match=says) as caught:
        import_ticket(source, out, format="torch-prune", **NAMES)
    assert "net.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert not out.exists()


class Bomb:
    """What a pickle must never do: unrestricted loading makes the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("format", ["torch-prune", "open-lth", "safetensors"])
@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
def test_a_pickle_that_would_run_code_does_not(
    tmp_path: Path, format: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # even where somebody asked for it
    struck, source = tmp_path / "struck", tmp_path / "run"
    file = source / "level_0" / "main" / "mask.pth" if format == "open-lth" else source
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"fc1.weight_mask": ONES, "bomb": Bomb(struck)}
    if how == "plain":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(TicketError):
        import_ticket(source, tmp_path / "out.ticket", format=format, **NAMES)
    assert not struck.exists()
    if how == "plain":  # the bomb is a real one
        pickle.loads(file.read_bytes())
        assert struck.exists()


def test_every_truncation_ends_in_a_sentence(tmp_path: Path) -> None:
    whole, source, out = tmp_path / "whole.pt", tmp_path / "net.pt", tmp_path / "out.ticket"
    torch.save({"fc1.weight_mask": torch.ones(3, 2)}, whole)
    data = whole.read_bytes()
    for size in range(0, len(data), 7):
        source.write_bytes(data[:size])
        with pytest.raises(FastlthError):
            import_ticket(source, out, format="torch-prune", **NAMES)
    source.write_bytes(struct.pack("<Q", 1 << 60))
    with pytest.raises(TicketError):
        import_ticket(source, out, format="safetensors")
    assert not out.exists()


# -- open_lth ---------------------------------------------------------------------------------------------------------

OPEN_LTH = ("fc_layers.0", "fc_layers.1", "fc")


def open_lth_state(net: nn.Sequential) -> dict[str, Tensor]:
    linear = [m for m in net if isinstance(m, nn.Linear)]
    return {f"{name}.{leaf}": t for name, m in zip(OPEN_LTH, linear, strict=True) for leaf, t in m.state_dict().items()}


def write_level(run: Path, level: int, masks: Mapping[str, Tensor]) -> Path:
    folder = run / f"level_{level}" / "main"
    folder.mkdir(parents=True)
    torch.save({n: m.cpu().int() for n, m in masks.items()}, folder / "mask.pth")
    (folder / "sparsity_report.json").write_text(json.dumps({"total": 1.0, "unpruned": 1.0}))
    return folder


def write_run(root: Path, state: Mapping[str, Tensor], levels: int = 3) -> list[dict[str, Tensor]]:
    """What open_lth leaves behind: int32 masks of each level, and models at the beginning and the end."""
    run = root / "replicate_1"
    weights = {n: t for n, t in state.items() if t.dim() > 1}
    masks = [{n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}]
    for level in range(1, levels):
        half = half_masks(weights, seed=level)
        masks.append({n: m & half[n] for n, m in masks[-1].items()})
    for level, mask in enumerate(masks):
        folder = write_level(run, level, mask)
        torch.save(dict(state), folder / "model_ep0_it0.pth")
        torch.save({n: t + 1 for n, t in state.items()}, folder / "model_ep40_it0.pth")
    return masks


@pytest.mark.parametrize("part", ["", "replicate_1"])
def test_open_lth_levels_become_rounds(tmp_path: Path, part: str) -> None:
    root, net = tmp_path / "lottery_1a2b", lenet()
    masks = write_run(root, open_lth_state(net))
    done = imported(root / part, tmp_path / "out.ticket", format="open-lth")
    assert any("model_ep0_it0.pth" in note for note in done.notes)
    ticket = load_ticket(tmp_path / "out.ticket")
    assert len(ticket.rounds) == 3
    ours = ("fc1", "fc2", "output")
    for k, level in enumerate(masks):
        expected = {f"{b}.weight": level[f"{a}.weight"] for a, b in zip(OPEN_LTH, ours, strict=True)}
        assert_same_bits(ticket.mask(k), expected)
        assert ticket.rounds[k]["kept"] == sum(int(m.sum()) for m in level.values())
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(ticket.model(0)(images), net(images))


def test_open_lth_convolution_biases_before_batch_norm_change_no_output(tmp_path: Path) -> None:
    theirs = nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(),
        nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip
    write_run(tmp_path / "run", theirs.state_dict())
    done = imported(tmp_path / "run", tmp_path / "out.ticket", format="open-lth", **CONV_NAMES)
    images = torch.randn(4, 1, 8, 8)
    net = load_ticket(tmp_path / "out.ticket").model(0)
    for mode in (False, True):
        torch.testing.assert_close(net.train(mode)(images), theirs.train(mode)(images), rtol=1e-4, atol=1e-5)
    assert len(done.ticket.pruned_at) == 5


def test_open_lth_order_comes_from_the_model_not_from_the_masks(tmp_path: Path) -> None:
    """open_lth puts layers that it does not prune last in later masks, wherever they are in the net."""
    run = tmp_path / "run"
    state = open_lth_state(lenet((64, 300, 100, 10)))
    masks = write_run(run, state)
    for level in (0, 1, 2):
        path = run / "replicate_1" / f"level_{level}" / "main" / "mask.pth"
        torch.save({n: masks[level][n].int() for n in sorted(masks[level])}, path)  # fc first
    imported(run, tmp_path / "out.ticket", format="open-lth")
    assert torch.equal(load_ticket(tmp_path / "out.ticket").mask(2)["output.weight"], masks[2]["fc.weight"])


def test_open_lth_without_models_takes_theta0_of_the_seed(tmp_path: Path) -> None:
    state = open_lth_state(lenet())
    write_run(tmp_path, state)
    for model in tmp_path.rglob("model_*.pth"):
        model.unlink()
    done = imported(tmp_path, tmp_path / "out.ticket", format="open-lth")
    assert any("theta0 is that of seed 0" in note for note in done.notes)


def test_open_lth_rewound_runs_say_from_where(tmp_path: Path) -> None:
    write_run(tmp_path, open_lth_state(lenet()))
    for model in tmp_path.rglob("model_ep0_it0.pth"):
        model.rename(model.with_name("model_ep2_it10.pth"))
    done = imported(tmp_path, tmp_path / "a", format="open-lth", settings={"prune.rewind_to": 50})
    assert any("epoch 2, iteration 10" in note for note in done.notes)
    assert done.ticket.rewind_iteration == 50
    assert np.array_equal(done.ticket.rewind["fc1.weight"], lenet()[1].weight.detach().numpy())


def _grow(run: Path) -> None:
    masks = {n: m.int() for n, m in torch.load(run / "level_1/main/mask.pth", weights_only=True).items()}
    masks["fc.weight"] = 1 - masks["fc.weight"]
    torch.save(masks, run / "level_2/main/mask.pth")


def _other_layers(run: Path) -> None:
    masks = torch.load(run / "level_1/main/mask.pth", weights_only=True)
    del masks["fc.weight"]
    torch.save(masks, run / "level_1/main/mask.pth")


BAD_RUNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not nested": (_grow, "round 2 keeps weights that round 1 had removed"),
    "a level missing": (lambda run: (run / "level_1").rename(run / "lost"), r"levels \[0, 2\]"),
    "no level 0": (lambda run: (run / "level_0").rename(run / "level_9"), "no folder level_0"),
    "no mask": (lambda run: (run / "level_1/main/mask.pth").unlink(), "there is no file"),
    "other layers": (_other_layers, "different layers or shapes"),
    "two replicates": (lambda run: (run.parent / "replicate_2").mkdir(), "2 replicates"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RUNS)
def test_open_lth_runs_that_make_no_ticket(tmp_path: Path, name: str) -> None:
    change, says = BAD_RUNS[name]
    write_run(tmp_path / "run", open_lth_state(lenet()))
    change(tmp_path / "run" / "replicate_1")
    with pytest.raises(TicketError, match=says):
        import_ticket(tmp_path / "run", tmp_path / "out.ticket", format="open-lth", **NAMES)
    assert not (tmp_path / "out.ticket").exists()


# -- everything ------------------------------------------------------------------------------------------------------


def test_usage_errors_and_existing_out(file: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "pruned.pt", tmp_path / "out.ticket"
    names = names_of(file)
    export(file, source, format="torch-prune")
    with pytest.raises(RecipeError, match="did you mean 'open-lth'"):
        import_ticket(source, out, format="open_lth", **names)
    with pytest.raises(RecipeError, match="--model and --dataset"):
        import_ticket(source, out, format="torch-prune")
    with pytest.raises(RecipeError, match="unknown model"):
        import_ticket(source, out, format="torch-prune", model="lenet", dataset="digits")
    with pytest.raises(TicketError, match=r"does not make a ticket of lenet-5 on mnist"):
        import_ticket(source, out, format="torch-prune", model="lenet-5", dataset="mnist")
    out.write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        import_ticket(source, out, format="torch-prune", **names)
    assert out.read_text() == "mine"
    with pytest.raises(OutputError, match="is what is being read"):
        import_ticket(source, source, format="torch-prune", force=True, **names)
    imported(source, out, format="torch-prune", force=True, **names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ticket", "pruned.pt", "search.ticket"]
