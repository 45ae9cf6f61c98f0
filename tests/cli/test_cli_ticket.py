"""``fastlth ticket diff | export | import`` as a person and as a script meet them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest
import torch

from fastlth.cli.main import main
from tests.exchange.making import make_ticket
from tests.helpers import small_recipe

NAMES = ["--model", "lenet-300-100", "--dataset", "digits"]


@pytest.fixture
def run(command, monkeypatch, tmp_path):
    """Run the command in a folder with a.ticket and b.ticket: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    make_ticket(tmp_path / "a.ticket")
    make_ticket(tmp_path / "b.ticket", rounds=3, seed=2)

    return functools.partial(command, "ticket")


def test_diff(run):
    code, out, err = run("diff", "a.ticket", "b.ticket", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["identical"] is False and document["theta0_identical"] is True and document["rounds"] == [4, 3]
    assert set(document["layers"][0]) == {"name", "rounds", "theta0_identical", "theta0_relative_difference"}
    assert set(document["layers"][0]["rounds"][0]) == {"round", "jaccard", "hamming"}
    code, out, err = run("diff", "a.ticket", "b.ticket")
    assert code == 0 and out == "" and "1.000 / 0.000" in err and "not identical: finished rounds 4 and 3" in err
    code, out, _ = run("diff", "a.ticket", "a.ticket", "--json")
    assert code == 0 and json.loads(out)["identical"] is True


def test_export_and_import(run, tmp_path):
    code, out, err = run("export", "a.ticket", "net.pt", "--format", "torch-prune", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert {k: document[k] for k in ("out", "format", "round")} == {
        "out": "net.pt", "format": "torch-prune", "round": 2,
    }  # fmt: skip
    assert "round 2, density" in err and "net.pt" in err
    code, out, err = run("import", "net.pt", "back.ticket", "--format", "torch-prune", *NAMES, "--json")
    assert code == 0, err
    back = json.loads(out)
    assert back["rounds"] == 2 and back["densities"] == [1.0, document["density"]] and back["notes"] == []
    assert run("verify", "back.ticket")[0] == 0
    code, out, err = run("inspect", "back.ticket", "--json")
    assert code == 0 and json.loads(out)["densities"] == back["densities"]
    assert run("inspect", "back.ticket")[0] == 0
    code, out, err = run("diff", "a.ticket", "back.ticket", "--json")
    assert code == 0 and json.loads(out)["theta0_identical"] is True
    # the default format, and a hub folder's weights, which are the same file
    assert run("export", "a.ticket", "net.safetensors", "--round", 3)[0] == 0
    assert run("export", "a.ticket", "hub", "--round", 3, "--format", "hf")[0] == 0
    assert (tmp_path / "net.safetensors").read_bytes() == (tmp_path / "hub" / "model.safetensors").read_bytes()
    code, _, err = run("import", "hub/model.safetensors", "hub.ticket", "--format", "safetensors")
    assert code == 0 and "round 3 of the search is round 1 here" in err


def test_an_imported_ticket_can_be_trained(run, tmp_path, monkeypatch, capfd):
    """With no round given: there is no winning one, since nothing was measured."""
    run("export", "a.ticket", "net.safetensors", "--round", 3)
    assert run("import", "net.safetensors", "back.ticket", "--format", "safetensors")[0] == 0
    monkeypatch.setattr(sys, "argv", ["fastlth", "train", "back.ticket", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    out, _ = capfd.readouterr()
    result = json.loads(out)
    assert result["round"] == 1 and 0 < result["test_accuracy"] <= 1


def test_import_without_values_takes_the_seed(run, tmp_path):
    torch.save({"fc1.weight_mask": torch.ones(300, 64).triu()}, tmp_path / "masks.pt")
    command = ["import", "masks.pt", "c.ticket", "--format", "torch-prune", *NAMES, "--seed", 3]
    code, _, err = run(*command, "--set", "model.bias_init=uniform")
    assert code == 0 and "theta0 is that of seed 3" in err
    assert run("verify", "c.ticket")[0] == 0


BAD = {
    "diff of other nets": (4, ["diff", "a.ticket", "conv.ticket"], "compare two tickets of the same net"),
    "diff with nothing": (4, ["diff", "a.ticket", "none.ticket"], "none.ticket"),
    "unknown format": (2, ["export", "a.ticket", "x", "--format", "pickle"], "unknown format 'pickle'"),
    "round not there": (2, ["export", "a.ticket", "x", "--round", "9"], "no round 9"),
    "inspect: round not there": (2, ["inspect", "a.ticket", "--round", "9"], "no round 9"),
    "existing out": (2, ["export", "a.ticket", "b.ticket"], "--force"),
    "existing out, hf": (2, ["export", "a.ticket", ".", "--format", "hf"], "--force"),
    "onto itself": (2, ["export", "a.ticket", "a.ticket", "--force"], "choose another OUT"),
    "no such folder": (2, ["export", "a.ticket", "no/x"], "there is no folder no"),
    "no such ticket": (4, ["export", "none.ticket", "x"], "none.ticket"),
    "not a ticket": (4, ["export", "masks.pt", "x"], "masks.pt"),
    "import: unknown format": (2, ["import", "masks.pt", "x", "--format", "torch"], "choose one of: torch-prune"),
    "import: no model": (2, ["import", "masks.pt", "x", "--format", "torch-prune"], "--model and --dataset"),
    "import: no file": (4, ["import", "none.pt", "x", "--format", "torch-prune", *NAMES], "none.pt"),
    "import: a folder that is no run": (4, ["import", ".", "x", "--format", "open-lth", *NAMES], "level_0"),
    "import: malformed --set": (
        2, ["import", "masks.pt", "x", "--format", "torch-prune", *NAMES, "--set", "a"], "section.field=value"),
    "import: other shapes": (
        4, ["import", "masks.pt", "x", "--format", "torch-prune", "--model", "lenet-5", "--dataset", "mnist"],
        "does not make a ticket of lenet-5 on mnist"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_line_and_writes_nothing(run, tmp_path, name):
    expected, arguments, says = BAD[name]
    make_ticket(tmp_path / "conv.ticket", small_recipe("conv-2"))
    torch.save({"fc1.weight_mask": torch.ones(300, 64)}, tmp_path / "masks.pt")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code, out, err = run(*arguments)
    assert code == expected, err
    assert out == "" and says in " ".join(err.split())
    assert err.startswith("fastlth: ") and err.count("\n") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_help_of_the_new_verbs_imports_no_torch():
    script = (
        "import sys\nfrom fastlth.cli.main import main\n"
        "for verb in ('diff', 'export', 'import'):\n"
        "    sys.argv = ['fastlth', 'ticket', verb, '--help']\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
