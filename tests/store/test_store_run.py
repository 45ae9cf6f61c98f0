"""The run directory: which run is found again, what goes on, who may write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastlth.errors import OutputError, RunLockedError, TicketError
from fastlth.recipe import Recipe
from fastlth.store import run as module
from fastlth.store.listing import list_runs
from fastlth.store.run import Run, State
from fastlth.store.ticket import EncodedTheta, Ticket, load

ROOT = Path(__file__).parents[2]


def recipe(seed: int = 0, lr: float = 1e-3, **prune: Any) -> Recipe:
    return Recipe.from_dict({
        "model": {"name": "lenet-300-100"}, "data": {"name": "digits"}, "prune": prune,
        "train": {"iterations": 100, "batch_size": 20, "lr": lr}, "seeds": {"base": seed},
    })  # fmt: skip


def a_ticket(asked: Recipe, rounds: int = 1, **fields: Any) -> Ticket:
    values = dict(recipe=asked, resolved={}, rewind={"w": np.arange(5, dtype=np.float32)}, rewind_iteration=0,
                  pruned_at={"w": np.zeros(5, np.uint8)}, all_weights=5,
                  rounds=tuple({"round": r, "kept": 5, "density": 1.0} for r in range(rounds)))  # fmt: skip
    return Ticket(**{**values, **fields})


def a_state(round: int, iteration: int = 3) -> State:
    info = {"round": round, "iteration": iteration, "best": None}
    return State({"w": np.arange(4.0), "step": np.array(iteration)}, info)


RESOLVED = {"device": "cpu", "threads": 2, "compile": False, "lr": 1e-5, "engine": {"conv*": "dense"}, "list": [1, 2]}


def finish(out: Path, asked: Recipe, **options: Any) -> Path:
    with Run.open(out, asked, **options) as run:
        run.write_recipe(asked, RESOLVED)
        run.save_ticket(a_ticket(asked))
        return run.path


def test_names_and_first_contents(tmp_path: Path) -> None:
    asked = recipe(seed=7)
    with Run.open(tmp_path / "deep" / "runs", asked) as run:
        assert run.path == tmp_path / "deep" / "runs" / f"lenet-300-100-digits-{asked.digest[:8]}" / "r7"
        assert (run.recipe, run.resolved, run.ticket(), run.state()) == (asked, None, None, None)
        run.drop_state()
        assert [p.name for p in run.path.iterdir()] == ["lock"]


def test_what_was_saved_is_found_again(tmp_path: Path) -> None:
    asked = recipe()
    with Run.open(tmp_path, asked) as run:
        run.write_recipe(asked, RESOLVED)
        ticket = a_ticket(asked, 2, metrics_bytes=99)
        run.save_ticket(ticket, theta=EncodedTheta.of(ticket.rewind))
        run.save_state(a_state(2))
    finds: list[Callable[[], Run]] = [
        lambda: Run.open(tmp_path, asked), lambda: Run.reopen(run.path), lambda: Run.reopen(run.path.parent),
    ]  # fmt: skip
    for find in finds:
        with find() as again:
            assert (again.path, again.recipe, again.resolved) == (run.path, asked, RESOLVED)
            found, state = again.ticket(), again.state()
            assert found is not None and found.metrics_bytes == 99 and len(found.rounds) == 2
            assert state is not None and state.info == a_state(2).info
            assert state.arrays["w"].tolist() == [0, 1, 2, 3] and state.arrays["step"].shape == ()


def test_recipe_toml_is_a_recipe_and_what_auto_became(tmp_path: Path) -> None:
    path = finish(tmp_path, recipe(rate=0.3))
    stored, resolved = module.read_recipe(path / "recipe.toml")
    assert (stored, resolved) == (recipe(rate=0.3), RESOLVED)
    assert "rate = 0.3" in (path / "recipe.toml").read_text()


def test_more_rounds_go_on_in_the_same_run_and_are_remembered(tmp_path: Path) -> None:
    path = finish(tmp_path, recipe(rounds=2))
    with Run.open(tmp_path, recipe(rounds=5, to_density=0.1)) as run:
        assert run.path == path
        assert run.recipe.prune.rounds == 5
        assert run.resolved == RESOLVED
    with Run.reopen(path) as run:
        assert (run.recipe.prune.rounds, run.recipe.prune.to_density) == (5, 0.1)
        assert run.resolved == RESOLVED


def test_other_seeds_and_settings_are_other_runs(tmp_path: Path) -> None:
    paths = [finish(tmp_path, r) for r in (recipe(), recipe(seed=1), recipe(lr=2e-3))]
    assert len(set(paths)) == 3
    assert paths[0].parent == paths[1].parent != paths[2].parent
    with Run.open(tmp_path, recipe()), Run.open(tmp_path, recipe(seed=1)):  # side by side
        pass


def test_fresh_starts_another_and_the_highest_is_resumed(tmp_path: Path) -> None:
    asked = recipe()
    names = [finish(tmp_path, asked, fresh=True).name for _ in range(11)]
    assert names == ["r0", *(f"r0.{n}" for n in range(2, 12))]
    assert finish(tmp_path, recipe(seed=1)).name == "r1"
    with Run.open(tmp_path, asked) as run:
        assert run.path.name == "r0.11"  # a number, not a word
    assert all((run.path.parent / name / "search.ticket").exists() for name in names)


def test_reopen_needs_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = finish(tmp_path, recipe())
    finish(tmp_path, recipe(), fresh=True)
    with Run.reopen(first.parent) as run:  # one seed: its highest number
        assert run.path.name == "r0.2"
    with Run.reopen(first) as run:
        assert run.path.name == "r0"
    monkeypatch.chdir(first)
    with Run.reopen(Path(".")) as run:
        assert run.recipe == recipe()
    finish(tmp_path, recipe(seed=3))
    with pytest.raises(TicketError, match=r"is not one run; give one of the r<seed> folders in it \(r0, r0.2, r3\)"):
        Run.reopen(first.parent)
    with pytest.raises(TicketError, match=r"folders in it \(none\)"):
        Run.reopen(tmp_path / "missing")
    with pytest.raises(TicketError, match=r"there is no run in .*r9 \(no recipe.toml\)"):
        Run.reopen(tmp_path / "r9")
    assert not (tmp_path / "r9").exists()


# state


def test_a_state_counts_only_in_the_round_after_the_ticket(tmp_path: Path) -> None:
    asked = recipe()
    with Run.open(tmp_path, asked) as run:
        run.save_state(a_state(0))
        assert run.state() is not None  # no ticket yet: round 0 is next
        run.save_ticket(a_ticket(asked, 0))
        assert run.state() is not None  # a ticket of theta0 alone
        run.save_ticket(a_ticket(asked, 1))
        assert run.state() is None  # the crash came between saving the ticket and dropping the state
        run.save_state(a_state(1))
        assert run.state() is not None
        run.save_state(a_state(2))
        assert run.state() is None
        run.drop_state()
        assert not (run.path / "state.safetensors").exists()


def test_saving_from_a_background_thread(tmp_path: Path) -> None:
    asked = recipe()
    with Run.open(tmp_path, asked) as run:
        threads = [threading.Thread(target=run.save_state, args=(a_state(0, 9),)),
                   threading.Thread(target=run.save_ticket, args=(a_ticket(asked, 0),))]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        state = run.state()
        assert state is not None and state.info["iteration"] == 9
        assert run.ticket() is not None


# damage


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_damaged_files_say_which_and_what_to_do(tmp_path: Path) -> None:
    path = finish(tmp_path, recipe())
    with Run.open(tmp_path, recipe()) as run:
        run.save_state(a_state(1))
        damage(path / "state.safetensors")
        with pytest.raises(TicketError, match=r"state of round 1 .*delete .*state.safetensors to repeat the round"):
            run.state()
        damage(path / "search.ticket")
        with pytest.raises(TicketError, match=r"search.ticket is damaged .* --fresh"):
            run.ticket()


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[model", b"[model]\nname = 1\n[resolved]\n", b"x = 1\n[resolved]\n", b"resolved = 1\n"]
)
def test_a_damaged_recipe_is_named_and_the_lock_let_go(text: bytes, tmp_path: Path) -> None:
    path = finish(tmp_path, recipe())
    (path / "recipe.toml").write_bytes(text)
    attempts: list[Callable[[], Run]] = [lambda: Run.open(tmp_path, recipe()), lambda: Run.reopen(path)]
    for attempt in attempts * 2:
        with pytest.raises(TicketError, match=r"recipe.toml is damaged .* or start again with --fresh"):
            attempt()
    with Run.open(tmp_path, recipe(), fresh=True) as run:
        assert run.path.name == "r0.2"


def test_a_ticket_without_its_recipe_is_not_overwritten(tmp_path: Path) -> None:
    path = finish(tmp_path, recipe())
    (path / "recipe.toml").unlink()
    with pytest.raises(TicketError, match=r"recipe\.toml is damaged"):
        Run.open(tmp_path, recipe())
    assert load(path / "search.ticket").rounds


def test_files_of_another_recipe_are_refused(tmp_path: Path) -> None:
    mine, other = finish(tmp_path, recipe()), finish(tmp_path, recipe(lr=2e-3))
    with Run.reopen(other) as run:
        run.save_state(a_state(1))
    for name in ("search.ticket", "state.safetensors"):
        (mine / name).write_bytes((other / name).read_bytes())
    with Run.open(tmp_path, recipe()) as run:
        with pytest.raises(TicketError, match=r"search.ticket is of another recipe \(digest"):
            run.ticket()
        with pytest.raises(TicketError, match=r"state\.safetensors is of another recipe"):
            run.state()
    (mine / "recipe.toml").write_bytes((other / "recipe.toml").read_bytes())
    with pytest.raises(TicketError, match=r"recipe\.toml is of another recipe"):
        Run.open(tmp_path, recipe())


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(OutputError, match=r"cannot write .*out.* make it writable or choose another folder"):
        Run.open(tmp_path / "out", recipe())


# one writer

HOLDER = """
import sys, time
from pathlib import Path
from fastlth.store.run import Run
run = Run.reopen(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
run.close()
print("closed", flush=True)
sys.stdin.close()
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def hold() -> Any:
    children: list[subprocess.Popen[str]] = []

    def start(path: Path) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLDER, path, "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        )  # fmt: skip
        children.append(child)
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


Hold = Callable[[Path], "subprocess.Popen[str]"]


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path, hold: Hold) -> None:
    path = finish(tmp_path, recipe())
    before = (path / "recipe.toml").read_bytes()
    child = hold(path)
    with pytest.raises(RunLockedError, match=rf"r0 is in use by process {child.pid} on .+ since \d{{4}}-") as caught:
        Run.open(tmp_path, recipe(rounds=9))
    assert caught.value.exit_code == 6
    assert (path / "recipe.toml").read_bytes() == before
    child.communicate("")
    with Run.open(tmp_path, recipe()) as run:
        assert json.loads((path / "lock").read_text())["pid"] == os.getpid()
        assert run.ticket() is not None
    assert (path / "lock").read_text() == ""


def test_a_killed_holder_is_taken_over_and_its_rubbish_swept(tmp_path: Path, hold: Hold) -> None:
    path = finish(tmp_path, recipe())
    child = hold(path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert json.loads((path / "lock").read_text())["pid"] == child.pid  # stale, but nobody holds it
    (path / ".search.ticket.0badcafe.tmp").write_bytes(b"half a ticket")
    with Run.open(tmp_path, recipe()):
        assert json.loads((path / "lock").read_text())["pid"] == os.getpid()
        assert sorted(p.name for p in path.iterdir()) == ["lock", "recipe.toml", "search.ticket"]


def test_two_opens_in_one_process(tmp_path: Path) -> None:
    with Run.open(tmp_path, recipe()) as run:
        for _ in range(2):
            with pytest.raises(RunLockedError, match=f"process {os.getpid()} "):
                Run.open(tmp_path, recipe())
        run.close()
        with Run.open(tmp_path, recipe()) as second:
            run.close()  # the first one's lock is gone; this must not release the second's
            with pytest.raises(RunLockedError):
                Run.open(tmp_path, recipe())
            second.save_state(a_state(0))


def test_a_holder_that_has_not_said_its_name(tmp_path: Path) -> None:
    with Run.open(tmp_path, recipe()) as run:
        (run.path / "lock").write_bytes(b"")
        with pytest.raises(RunLockedError, match="in use by another process; wait"):
            Run.open(tmp_path, recipe())


# the list


def test_list_runs(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "missing") == []
    first = finish(tmp_path, recipe(rounds=4))
    second = finish(tmp_path, recipe(seed=2))
    third = finish(tmp_path, recipe(lr=2e-3))
    (first / "branches" / "x").mkdir(parents=True)
    (first / "branches" / "x" / "file").write_bytes(bytes(5000))
    (tmp_path / "notes.txt").write_text("no run")
    (first.parent / "r5").mkdir()  # opened, and never begun
    (third / "search.ticket").write_bytes(b"rubbish")
    with Run.reopen(second) as run:
        run.save_ticket(a_ticket(run.recipe, 3))
        run.save_state(a_state(3))
        found = {info.path: info for info in list_runs(tmp_path)}  # while it is locked
    assert set(found) == {first, second, third}
    one, two, three = found[first], found[second], found[third]
    assert (one.model, one.dataset, one.seed, one.rounds_done, one.rounds_asked) == ("lenet-300-100", "digits", 0, 1, 5)
    assert (two.seed, two.rounds_done) == (2, 3)
    assert one.bytes == sum(p.stat().st_size for p in first.rglob("*") if p.is_file()) > 5000
    assert one.problem == two.problem == ""
    assert "search.ticket is damaged" in three.problem
    assert three.rounds_done == 0
