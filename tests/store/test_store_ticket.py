"""search.ticket: comes back bit for bit, in few bytes, and notices damage."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from fastlth.errors import RecipeError, TicketError
from fastlth.recipe import Recipe
from fastlth.store import container, strict_json
from fastlth.store.inspect import summary, verify
from fastlth.store.ticket import EncodedTheta, Ticket, load, save

ROOT = Path(__file__).parents[2]


def recipe(**sections: Any) -> Recipe:
    return Recipe.from_dict({
        "model": {"name": "lenet-300-100"}, "data": {"name": "digits"},
        "train": {"iterations": 100, "batch_size": 20, "lr": 1e-3}, **sections,
    })  # fmt: skip


def theta0(_: Recipe | None = None, scale: int = 1) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(7)
    return {
        "fc1.weight": rng.standard_normal((6 * scale, 5), dtype=np.float32),
        "fc1.bias": np.array([-0.0, np.nan, 1e-45, np.inf], np.float32),
        "output.weight": rng.standard_normal((2, 6), dtype=np.float32),
        "bn.running_var": np.ones(4, np.float64),
        "bn.num_batches_tracked": np.array(3),
        "nothing": np.zeros((0, 2), np.float16),
    }


def a_ticket(finished: int = 3, scale: int = 1, **fields: Any) -> Ticket:
    """``finished`` rounds and the mask of the next; 20 % of what is left dies in each."""
    rewind = theta0(scale=scale)
    pruned_at = {"fc1.weight": np.zeros((6 * scale, 5), np.uint8), "output.weight": np.zeros((2, 6), np.uint8)}
    rng, results = np.random.default_rng(1), []
    for round in range(finished + 1):
        for at in pruned_at.values():
            alive = rng.permutation(np.flatnonzero(at == 0))
            at.reshape(-1)[alive[: len(alive) // 5 if round else 0]] = round
        results.append({"round": round, "kept": sum(int((at == 0).sum()) for at in pruned_at.values()),
                        "test_accuracy": 0.1 + round})  # fmt: skip
    ticket = Ticket(recipe=recipe(), resolved={"device": "cpu", "engine": {"fc1": "dense"}}, rewind=rewind,
                    rewind_iteration=0, pruned_at=pruned_at, all_weights=30 * scale + 12 + 8,
                    rounds=tuple(results[:finished]), metrics_bytes=1234)  # fmt: skip
    return replace(ticket, **fields)


def assert_arrays(got: Mapping[str, NDArray[Any]], wanted: Mapping[str, NDArray[Any]]) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype)
        assert got[name].tobytes() == array.tobytes()


def assert_tickets(got: Ticket, wanted: Ticket) -> None:
    assert_arrays(got.rewind, wanted.rewind)
    assert_arrays(got.pruned_at, wanted.pruned_at)
    for name in ("recipe", "resolved", "rewind_iteration", "all_weights", "rounds", "metrics_bytes", "theta0_seed"):
        assert getattr(got, name) == getattr(wanted, name)


@pytest.mark.parametrize("rounds", [0, 1, 3, 20])
def test_round_trip(rounds: int, tmp_path: Path) -> None:
    path, ticket = tmp_path / "search.ticket", a_ticket(rounds)
    save(path, ticket)
    assert_tickets(load(path), ticket)
    assert verify(path) == []
    with safe_open(path, "numpy") as file:
        assert file.metadata()["recipe_digest"] == ticket.recipe.digest
        assert "rewind/fc1.weight" in file.keys()


def test_the_order_of_layer_patterns_survives(tmp_path: Path) -> None:
    """The first match wins, and a ticket's description sorts its keys."""
    asked = recipe()
    asked = replace(asked, prune=replace(asked.prune, scale={"output": 0.5, "fc*": 1.0, "*": 0.0}))
    save(tmp_path / "search.ticket", a_ticket(recipe=asked))
    assert list(load(tmp_path / "search.ticket").recipe.prune.scale.items()) == list(asked.prune.scale.items())


def test_encoded_theta_saves_the_same_bytes(tmp_path: Path) -> None:
    ticket = a_ticket()
    save(tmp_path / "a", ticket)
    save(tmp_path / "b", ticket, theta=EncodedTheta.of(ticket.rewind))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="not the encoded rewind values of this ticket"):
        save(tmp_path / "b", ticket, theta=EncodedTheta.of({"other": np.zeros(2)}))


def test_masks_and_densities(tmp_path: Path) -> None:
    ticket = a_ticket(2, pruned_at={"fc1.weight": np.array([[0, 1, 2], [0, 0, 2]], np.uint8)}, all_weights=10)
    assert ticket.mask(0)["fc1.weight"].all()
    assert ticket.mask(1)["fc1.weight"].tolist() == [[True, False, True], [True, True, True]]
    assert ticket.mask(2)["fc1.weight"].tolist() == [[True, False, False], [True, True, False]]
    assert [ticket.kept(r) for r in range(3)] == [6, 5, 3]
    assert [ticket.density(r) for r in range(3)] == [1.0, 0.9, 0.7]
    for round in (-1, 3, 999):
        for ask in (ticket.mask, ticket.density, ticket.kept):
            with pytest.raises(RecipeError, match=f"no round {round}; choose one of 0 to 2"):
                ask(round)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 6), max_size=40), st.integers(0, 5))
def test_masks_are_nested_and_counts_agree(values: list[int], round: int) -> None:
    at = np.array(values, np.uint8)
    ticket = a_ticket(6, pruned_at={"w": at}, all_weights=len(values) + 1)
    now, later = ticket.mask(round)["w"], ticket.mask(round + 1)["w"]
    assert (later <= now).all()
    assert now.sum() == ticket.kept(round)
    assert ticket.density(round) == (now.sum() + 1) / (len(values) + 1)


def test_all_254_rounds_fit(tmp_path: Path) -> None:
    at = np.arange(255, dtype=np.uint8)
    results = tuple({"round": r, "kept": 255 - r} for r in range(255))
    rewind = {"w": at.astype(np.float32)}
    save(tmp_path / "t", a_ticket(pruned_at={"w": at}, rewind=rewind, rounds=results, all_weights=255))
    ticket = load(tmp_path / "t")
    assert [ticket.kept(r) for r in range(255)] == list(range(255, 0, -1))
    assert verify(tmp_path / "t") == []
    with pytest.raises(RecipeError, match="0 to 254"):
        ticket.mask(255)


def test_size_is_near_the_entropy_bound(tmp_path: Path) -> None:
    ticket = a_ticket(20, scale=8000)  # 240,000 weights
    save(tmp_path / "t", ticket)
    sizes = summary(tmp_path / "t").bytes
    share = np.bincount(ticket.pruned_at["fc1.weight"].reshape(-1)) / 240_000
    bound = float(-(share * np.log2(share)).sum()) * 240_000 / 8
    assert bound < sizes["masks"] < 1.02 * bound
    assert sizes["theta0"] < 0.86 * 240_000 * 4
    assert sizes["file"] == (tmp_path / "t").stat().st_size < sizes["masks"] + sizes["theta0"] + 8192


# theta0 as a seed


def test_a_seed_stands_for_theta0(tmp_path: Path) -> None:
    path, ticket = tmp_path / "t", a_ticket(theta0_seed={"init_version": 1})
    save(path, ticket)
    assert_tickets(load(path, theta0), ticket)
    assert summary(path).bytes["theta0"] == 0
    assert verify(path) == verify(path, theta0) == []
    assert_arrays(load(path, masks_only=True).pruned_at, ticket.pruned_at)
    assert load(path, masks_only=True).rewind == {}
    with pytest.raises(TicketError, match=r"keeps theta0 as a seed only; read it with fastlth\.load_ticket"):
        load(path)


@pytest.mark.parametrize("change", ["bit", "dtype", "shape", "missing", "more"])
def test_another_theta0_is_never_taken_silently(change: str, tmp_path: Path) -> None:
    def other(_: Recipe) -> dict[str, NDArray[Any]]:
        made = theta0()
        weights = made["fc1.weight"]
        if change == "bit":
            weights.view(np.uint32)[3, 2] ^= 1
        if change == "dtype":
            made["fc1.weight"] = weights.view(np.int32)
        if change == "shape":
            made["fc1.weight"] = weights.reshape(5, 6)
        if change == "missing":
            del made["fc1.weight"]
        if change == "more":
            made["fc1.weight2"] = weights
        return made

    path = tmp_path / "t"
    save(path, a_ticket(theta0_seed={"init_version": 3}))
    with pytest.raises(TicketError, match=r"differs from that of .* in 'fc1.weight2?'; use .* version 3"):
        load(path, other)
    assert len(verify(path, other)) == 1


def test_a_seed_cannot_stand_for_a_later_iteration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a seed stands for theta0 only"):
        save(tmp_path / "t", a_ticket(theta0_seed={"init_version": 1}, rewind_iteration=5))
    assert list(tmp_path.iterdir()) == []


# starts that are more than theta_k times the mask


def zeroing(mask_0: str = "freeze_init_zero_mask", **prune: Any) -> Recipe:
    return recipe(prune={"mask_0": mask_0, **prune})


def half_zero(ticket: Ticket) -> dict[str, NDArray[np.uint8]]:
    """Every other pruned weight became zero when it was pruned."""
    return {n: np.where(np.arange(at.size).reshape(at.shape) % 2, at, 0).astype(np.uint8)
            for n, at in ticket.pruned_at.items()}  # fmt: skip


def test_a_ticket_with_actions_comes_back(tmp_path: Path) -> None:
    path, plain = tmp_path / "t", a_ticket()
    for mask_0 in ("freeze_init_zero_mask", "freeze_init_zero_all"):
        ticket = replace(plain, recipe=zeroing(mask_0), fill=half_zero(plain))
        save(path, ticket)
        back = load(path)
        assert_tickets(back, ticket)
        assert_arrays(back.fill, ticket.fill)
        assert_arrays(second_reader().read(path)[1]["fill"], ticket.fill)
        assert verify(path) == [] and summary(path).bytes["fill"] > 0
        _, strings = container.read(path)
        assert strict_json.loads(strings["ticket"])["start"] == {"version": 1}
    save(path, replace(plain, recipe=recipe(prune={"mask_1": "signed_constant"})))
    assert load(path).fill == {} and verify(path) == [] and summary(path).bytes["fill"] == 0


def test_the_members_of_ordinary_tickets_are_what_they_were(tmp_path: Path) -> None:
    save(tmp_path / "t", a_ticket())
    _, strings = container.read(tmp_path / "t")
    assert set(strict_json.loads(strings["ticket"])) == {
        "all_weights", "metrics_bytes", "pruned_at", "recipe", "resolved", "rewind", "rewind_iteration", "rounds",
    }  # fmt: skip


def test_fill_and_recipe_must_agree_when_saving(tmp_path: Path) -> None:
    ticket = a_ticket()
    for wrong in (replace(ticket, fill=half_zero(ticket)), replace(ticket, recipe=zeroing())):
        with pytest.raises(ValueError, match=r"a ticket with mask-0 action .* has .* fill"):
            save(tmp_path / "t", wrong)


@pytest.mark.parametrize(
    "change",
    [{"fill": "absent"}, {"fill": {}}, {"fill": []}, {"start": "absent"}, {"start": {}}, {"start": {"version": True}},
     {"start": {"version": 0}}, {"start": None}, {"recipe": recipe().to_dict()}],
    ids=str,
)  # fmt: skip
def test_forged_starts_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path, plain = tmp_path / "t", a_ticket()
    save(path, replace(plain, recipe=zeroing(), fill=half_zero(plain)))
    rewrite(path)
    load(path)
    rewrite(path, **change)
    with pytest.raises(TicketError, match="is damaged or not a fastlth file"):
        load(path)


def test_starts_of_another_version_are_not_guessed(tmp_path: Path) -> None:
    save(tmp_path / "t", a_ticket(recipe=recipe(prune={"mask_1": "random_reinit"})))
    rewrite(tmp_path / "t", start={"version": 2})
    with pytest.raises(TicketError, match="has starts of version 2, this fastlth makes those of version 1; use the"):
        load(tmp_path / "t")


def test_verify_knows_when_weights_may_become_zero(tmp_path: Path) -> None:
    path, plain = tmp_path / "t", a_ticket(3)
    at = plain.pruned_at["fc1.weight"]
    alive, second = tuple(np.argwhere(at == 0)[0]), tuple(np.argwhere(at == 2)[0])
    for mask_0, place, value, said in (
        ("freeze_init_zero_mask", alive, 2, ["became zero that were not being pruned"]),
        ("freeze_init_zero_all", alive, 2, []),
        ("freeze_init_zero_all", second, 1, []),
        ("freeze_init_zero_all", second, 3, ["became zero after they were pruned"]),
        ("freeze_init_zero_all", alive, 4, ["are zero from round 4 on, which has not begun"]),
        ("freeze_init_zero_rev", second, 1, ["became zero that were not being pruned"]),
    ):
        fill = half_zero(plain)
        fill["fc1.weight"][place] = value
        save(path, replace(plain, recipe=zeroing(mask_0), fill=fill))
        problems = verify(path)
        assert len(problems) == len(said) and all(s in p for s, p in zip(said, problems, strict=True)), (mask_0, value)


# damage


def test_no_changed_byte_of_a_ticket_goes_unnoticed(tmp_path: Path) -> None:
    path, changed = tmp_path / "a", tmp_path / "b"
    save(path, a_ticket(1, rewind={"fc1.weight": theta0()["fc1.weight"]},
                        pruned_at={"fc1.weight": np.tile(np.array([0, 1, 0, 0, 1], np.uint8), (6, 1))}))  # fmt: skip
    good = path.read_bytes()
    data = bytearray(good)
    for position in range(len(good)):
        for flip in (1 << position % 8, 0xFF):  # every bit of a byte is tried in the container's test
            data[position] ^= flip
            changed.write_bytes(data)
            with pytest.raises(TicketError):
                load(changed)
            data[position] ^= flip
    for length in range(len(good)):
        changed.write_bytes(good[:length])
        with pytest.raises(TicketError):
            load(changed)
    changed.write_bytes(good)
    load(changed)


def rewrite(path: Path, *, tensors: dict[str, NDArray[Any]] | None = None, metadata: dict[str, str] | None = None,
            **document: Any) -> None:  # fmt: skip
    """Change a ticket and hash it again, as somebody with a grudge could."""
    arrays, strings = container.read(path)
    changed = {**strict_json.loads(strings["ticket"]), **document}
    strings["ticket"] = strict_json.dumps({k: v for k, v in changed.items() if v != "absent"})
    container.write(path, {**arrays, **(tensors or {})}, {**strings, **(metadata or {})})


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 5}, {"rounds": [1]}, {"rounds": "absent"}, {"recipe": {}}, {"recipe": []}, {"resolved": 3},
        {"recipe": {**recipe().to_dict(), "train": {"iterations": 99, "batch_size": 20, "lr": 1e-3}}},
        {"metrics_bytes": -1}, {"metrics_bytes": 1.5}, {"rewind_iteration": True}, {"all_weights": None},
        {"rewind": {}}, {"rewind": []}, {"pruned_at": {}}, {"pruned_at": 7}, {"theta0_seed": None},
        {"theta0_seed": {}}, {"theta0_seed": {"init_version": 1}}, {"pruned_at": {"fc1.weight": {}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_forged_description_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "t"
    save(path, a_ticket())
    rewrite(path)
    load(path)  # writing it again is harmless
    rewrite(path, **change)
    with pytest.raises(TicketError, match="is damaged or not a fastlth file"):
        load(path)
    assert len(verify(path)) == 1


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for pruned_at in ({"fc1.weight": np.zeros((5, 6), np.uint8)}, {"other": np.zeros((6, 5), np.uint8)},
                      {"fc1.weight": np.zeros((6, 5), np.int64)}):  # fmt: skip
        save(tmp_path / "t", a_ticket(pruned_at=pruned_at))
        with pytest.raises(TicketError, match="does not fit its weights"):
            load(tmp_path / "t")


def test_extra_tensors_and_deep_json_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save(path, a_ticket())
    rewrite(path, tensors={"rewind/more": np.zeros(3, np.uint8)})
    with pytest.raises(TicketError, match="does not hold the tensors it describes"):
        load(path)
    save(path, a_ticket())
    arrays, strings = container.read(path)
    text = strings["ticket"]
    container.write(path, arrays, {**strings, "ticket": "[" * 1_000_000})
    with pytest.raises(TicketError, match="nested too deeply"):
        load(path)
    for other in (text.replace('"all_weights":', '"all_weights":1,"all_weights":'), text.replace(":", ": "),
                  text.replace("1234", "1.234e3"), text.replace("1234", "1e999"), text + " "):  # fmt: skip
        assert other != text
        container.write(path, arrays, {**strings, "ticket": other})
        with pytest.raises(TicketError, match="JSON"):
            load(path)


def test_a_bomb_in_a_ticket_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save(path, a_ticket())
    bomb = zlib.compress(bytes(1 << 28), 9)
    info = {"dtype": "U8", "shape": [1 << 28], "planes": [["huffman", len(bomb)]],
            "sha256": hashlib.sha256(bytes(1 << 28)).hexdigest()}  # fmt: skip
    document = strict_json.loads(container.read(path)[1]["ticket"])
    rewrite(path, tensors={"rewind/bomb": np.frombuffer(bomb, np.uint8)},
            rewind={**document["rewind"], "bomb": info})  # fmt: skip
    with pytest.raises(TicketError, match="rewind of 'bomb': it declares more data than it can hold"):
        load(path)


def test_files_of_another_kind_or_a_newer_schema_say_so(tmp_path: Path) -> None:
    path = tmp_path / "t"
    container.write(path, {}, {"format": "fastlth state"})
    with pytest.raises(TicketError, match=r"is not a ticket .*'fastlth state'"):
        load(path)
    save(path, a_ticket())
    rewrite(path, metadata={"schema": "2"})
    with pytest.raises(TicketError, match="has schema '2', this fastlth reads '1'; update fastlth"):
        load(path)
    save(path, a_ticket())
    rewrite(path, theta0={})
    with pytest.raises(TicketError, match="uses 'theta0', which this fastlth does not know; update fastlth"):
        summary(path)


def test_verify_compares_masks_and_counts(tmp_path: Path) -> None:
    path, ticket = tmp_path / "t", a_ticket(3)
    results = [dict(r) for r in ticket.rounds]
    results[2]["kept"] += 1
    save(path, replace(ticket, rounds=tuple(results)))
    assert [p.partition(",")[0] for p in verify(path)] == [f"round 2 says it kept {results[2]['kept']}"]
    save(path, replace(ticket, rounds=ticket.rounds[:2]))
    assert verify(path) == ["weights were removed in round 3, but only 2 rounds are finished"]
    save(path, replace(ticket, rounds=(ticket.rounds[0], ticket.rounds[2], ticket.rounds[1])))
    assert len(verify(path)) == 4
    save(path, replace(ticket, all_weights=41))
    assert verify(path) == ["42 weights can be pruned, but there are only 41 at all"]
    assert verify(tmp_path / "missing") == [f"there is no file {tmp_path / 'missing'}; check the path"]


def test_nan_in_a_result_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        save(tmp_path / "t", a_ticket(1, resolved={"lr": float("nan")}))
    assert list(tmp_path.iterdir()) == []


# a second reader, and what reading needs


def second_reader() -> Any:
    spec = importlib.util.spec_from_file_location("read_ticket", ROOT / "docs" / "read_ticket.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [None, {"init_version": 1}])
def test_the_documented_reader_agrees(seed: dict[str, int] | None, tmp_path: Path) -> None:
    path, ticket = tmp_path / "t", a_ticket(5, scale=300, theta0_seed=seed)
    save(path, ticket)
    document, arrays = second_reader().read(path)
    assert_arrays(arrays["rewind"], ticket.rewind if seed is None else {})
    assert_arrays(arrays["pruned_at"], ticket.pruned_at)
    assert arrays["fill"] == {}
    assert document["rounds"] == list(ticket.rounds)
    printed = subprocess.run([sys.executable, ROOT / "docs" / "read_ticket.py", path],
                             capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert [float(line.split()[1]) for line in printed.splitlines()] == [
        pytest.approx(ticket.density(r), abs=1e-12) for r in range(5)
    ]


def test_the_documented_reader_is_short_and_notices_damage(tmp_path: Path) -> None:
    source = (ROOT / "docs" / "read_ticket.py").read_text()
    assert len(source.splitlines()) <= 60
    path = tmp_path / "t"
    save(path, a_ticket())
    good = path.read_bytes()
    for position in (300, len(good) - 1):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(SystemExit, match="sha256"):
            second_reader().read(path)


def test_reading_needs_no_torch() -> None:
    code = "import sys, fastlth.store.listing, fastlth.store.metrics_file; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True,
                   env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"})  # fmt: skip
