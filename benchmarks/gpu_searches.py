"""Whole searches on the device, round by round: time, images/s, memory, and what must not grow from round to round."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu import Ledger
from fastlth import analysis
from fastlth.data.sources import Source
from fastlth.recipe import Recipe
from fastlth.search import RoundFinished, Said, find_tickets


def search(ledger: Ledger, one: Recipe, source: Source, images: str, **facts: object) -> None:
    """A row per round, then one for the whole; checks that masks shrink as counted and memory does not grow."""
    what = {"model": one.model.name, "dataset": one.data.name, "images": images, **facts}
    if ledger.has(subject="search", **what):
        return
    began, previous, held = time.perf_counter(), time.perf_counter(), list[int]()
    for event in find_tickets(one, source, one.compute):
        if isinstance(event, Said):
            print(event.text, flush=True)
        if not isinstance(event, RoundFinished):
            continue
        now, ticket, k = time.perf_counter(), event.ticket, event.round
        masks = ticket.mask(k)
        if k:
            outside = sum(int((masks[n] & ~m).sum()) for n, m in ticket.mask(k - 1).items())
            ledger.check(f"{one.model.name} round {k}: weights kept that were not before", outside, 0)
        wrong = abs(sum(int(m.sum()) for m in masks.values()) - event.result["kept"])
        ledger.check(f"{one.model.name} round {k}: kept weights that were not counted", wrong, 0)
        held.append(torch.cuda.memory_reserved(ledger.device) if ledger.device.type == "cuda" else 0)
        found = analysis.removable_units(one, masks, ticket.rewind)
        ledger.row(subject="round", **what, round=k, seconds=now - previous, reserved=held[-1],
                   removable=sum(int(u.either.sum()) for u in found.values()) if found else None,
                   **(analysis._work(one, found) if found else {}),
                   **{name: event.result[name] for name in ("density", "images_per_second", "test_accuracy",
                      "early_stop_test_accuracy", "early_stop_iteration", "engine")})  # fmt: skip
        previous = now
        if ledger.time_left() < 0:
            ledger.left_out.append(f"{one.model.name} after round {k}")
            return
    if len(held) > 2:
        ledger.check(f"{one.model.name}: bytes reserved after round 1", held[-1] - held[1], 0)
    ledger.row(subject="search", **what, seconds=time.perf_counter() - began)
