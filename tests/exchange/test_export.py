"""ticket export: what comes out is what the ticket holds, in the words of the program that reads it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.utils import prune

import fastlth
from fastlth.errors import EnvironmentFailure, OutputError, RecipeError, TicketError
from fastlth.exchange.exporting import FORMATS, export
from fastlth.models import build
from fastlth.store import atomic
from fastlth.tickets import LoadedTicket, load_ticket
from tests.helpers import assert_masked, assert_same_bits

WITHOUT_ONNX = [name for name in FORMATS if name != "onnx"]


def masked(ticket: LoadedTicket, round: int) -> dict[str, torch.Tensor]:
    state = dict(ticket.model(round).state_dict())
    assert_masked(state, ticket.mask(round))
    return state


def test_safetensors_round_trip_metadata_and_bytes(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    ticket = load_ticket(file)
    export(file, out, format="safetensors", round=3)
    tensors = load_file(out)
    assert_same_bits({n: t for n, t in tensors.items() if not n.endswith("_mask")}, masked(ticket, 3))
    masks = {n.removesuffix("_mask"): t for n, t in tensors.items() if n.endswith("_mask")}
    assert all(m.dtype is torch.bool for m in masks.values())
    assert_same_bits(masks, ticket.mask(3))
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert {k: metadata[k] for k in ("round", "model", "dataset", "recipe_digest", "fastlth_version", "format")} == {
        "round": "3", "model": ticket.recipe.model.name, "dataset": "digits",
        "recipe_digest": ticket.recipe.digest, "fastlth_version": fastlth.__version__, "format": "pt",
    }  # fmt: skip
    assert float(metadata["density"]) == ticket.file.density(3)
    export(file, tmp_path / "again.safetensors", round=3)
    assert out.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_state_dict_loads_into_the_plain_net(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.pt"
    done = export(file, out, format="state-dict")
    ticket = load_ticket(file)
    assert done.round == 2, "the winning ticket, where no round is given"
    state = torch.load(out, weights_only=True)
    assert_same_bits(state, masked(ticket, 2))
    net = build(ticket.recipe)
    net.load_state_dict(state, strict=True)
    assert_same_bits(dict(net.state_dict()), masked(ticket, 2))


def test_torch_prune_loads_into_a_net_under_torch_nn_utils_prune(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned.pt"
    export(file, out, format="torch-prune", round=1)
    ticket = load_ticket(file)
    net = build(ticket.recipe)
    for name, mask in ticket.mask(1).items():  # any mask: the state dict brings the right one
        prune.custom_from_mask(net.get_submodule(name.removesuffix(".weight")), "weight", torch.ones_like(mask))
    net.load_state_dict(torch.load(out, weights_only=True), strict=True)
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(net.eval()(images), ticket.model(1).eval()(images))
    originals = {n.removesuffix("_orig"): p for n, p in net.state_dict().items() if n.endswith("_orig")}
    assert_same_bits(originals, {n: ticket.rewind()[n] for n in originals})
    for name in ticket.mask(1):
        prune.remove(net.get_submodule(name.removesuffix(".weight")), "weight")
    assert_same_bits({n: t.abs() for n, t in net.state_dict().items()},  # 0 * -w is -0.0
                     {n: t.abs() for n, t in masked(ticket, 1).items()})  # fmt: skip


def test_hf_folder_holds_three_files_and_its_card_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "hub"
    export(file, out, format="hf", round=2)
    ticket = load_ticket(file)
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == ticket.recipe.model.name and config["image_shape"] == [1, 8, 8]
    assert config["round"] == 2 and config["density"] == ticket.file.density(2)
    assert config["recipe_digest"] == ticket.recipe.digest
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: fastlth\n") and "- lottery-ticket\n" in card
    assert "| test accuracy at the end | 90.00% |" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(snippet[1], names)
    assert_same_bits(dict(names["net"].state_dict()), masked(ticket, 2))
    assert_same_bits(names["masks"], ticket.mask(2))


def test_onnx_computes_what_the_masked_net_computes(file: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "net.onnx"
    export(file, out, format="onnx", round=2)
    ticket = load_ticket(file)
    session = runtime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 1, 8, 8)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            expected = ticket.model(2).eval()(images)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["round"] == "2" and facts["recipe_digest"] == ticket.recipe.digest
    assert {p.name for p in tmp_path.iterdir()} == {"search.ticket", "net.onnx"}, "no second file of weights"


def test_onnx_without_its_packages_says_what_to_install(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("fastlth.exchange.exporting.find_spec", lambda n: None if n == "onnxscript" else real(n))
    with pytest.raises(RecipeError, match=r"onnxscript.*pip install 'fastlth\[onnx\]'"):
        export(file, tmp_path / "net.onnx", format="onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["search.ticket"]


@pytest.mark.parametrize("format", WITHOUT_ONNX)
def test_an_existing_out_stays_unless_forced(file: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / "out"
    export(file, out, format=format, round=1)
    before = _contents(out)
    with pytest.raises(OutputError, match=r"out exists.*--force"):
        export(file, out, format=format, round=2)
    assert _contents(out) == before
    export(file, out, format=format, round=2, force=True)
    assert _contents(out) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "search.ticket"]


@pytest.mark.parametrize("format", WITHOUT_ONNX)
def test_force_never_replaces_the_ticket_or_another_kind_of_thing(file: Path, tmp_path: Path, format: str) -> None:
    ticket = file.read_bytes()
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "README.md").write_text("mine")
    (precious / "cat.jpg").write_text("meow")
    for out in (file, precious):
        with pytest.raises(OutputError, match=r"choose another OUT|a file as OUT"):
            export(file, out, format=format, force=True)
    assert file.read_bytes() == ticket and (precious / "cat.jpg").read_text() == "meow"


def test_wrong_names_and_rounds(file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'torch-prune'"):
        export(file, tmp_path / "out", format="torch-prun")
    with pytest.raises(RecipeError, match="no round 9; choose one of 0 to 4"):
        export(file, tmp_path / "out", round=9)
    with pytest.raises(OutputError, match="there is no folder"):
        export(file, tmp_path / "nowhere" / "out")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(TicketError, match="damaged"):
        export(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["search.ticket"]


@pytest.mark.parametrize("format", WITHOUT_ONNX)
@pytest.mark.parametrize("step", ["write_all", "sync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(13, "Permission denied")], ids=str)
def test_a_disk_that_refuses_leaves_nothing_behind(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, step: str, error: OSError
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(atomic, step, refuse)
        kind = OutputError if error.errno == 13 else EnvironmentFailure
        with pytest.raises(kind, match="choose another OUT" if error.errno == 13 else "disk is full"):
            export(file, tmp_path / "out", format=format)
    assert [p.name for p in tmp_path.iterdir()] == ["search.ticket"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_replaced_is_still_there(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    out = tmp_path / "hub"
    export(file, out, format="hf", round=1)
    before = _contents(out)
    calls = iter(range(1, 9))

    def refuse_one(source: Path, target: Path) -> None:
        if source.is_dir() and next(calls) == failing:
            raise PermissionError(13, "Permission denied")
        os.replace(source, target)

    monkeypatch.setattr(atomic, "replace", refuse_one)
    with pytest.raises(OutputError):
        export(file, out, format="hf", round=2, force=True)
    assert _contents(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "search.ticket"]


def _contents(path: Path) -> dict[str, bytes]:
    files = path.iterdir() if path.is_dir() else [path]
    return {p.name: p.read_bytes() for p in files}
