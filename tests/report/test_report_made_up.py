"""A long search of a deep net, made up: what a small real one does not show."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastlth.composition import compose
from fastlth.report import curves, layers, searches, subject
from fastlth.report.figure import Curves
from fastlth.report.write import write
from fastlth.store import ticket as tickets
from fastlth.store.ticket import Ticket

ROUNDS = 21


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Conv-6, whose layers lose their weights at different speeds, in 21 rounds; rounds 3 and 4 were not measured."""
    recipe = compose("conv-6", "cifar-10").recipe
    rng = np.random.default_rng(0)
    names = [*(f"conv{i}" for i in range(1, 7)), "fc1", "fc2", "output"]
    pruned_at = {}
    for i, name in enumerate(names):
        died = rng.geometric(0.1 + 0.02 * i, size=(40, 50))
        pruned_at[f"{name}.weight"] = np.where(died < ROUNDS, died, 0).astype(np.uint8)
    ticket = Ticket(
        recipe=recipe, resolved={}, pruned_at=pruned_at, all_weights=9 * 2000, rewind_iteration=0,
        rewind={name: np.zeros((40, 50), np.float32) for name in pruned_at}, rounds=({},) * ROUNDS,
    )  # fmt: skip
    results = tuple(
        {"round": k, "density": ticket.density(k), "kept": ticket.kept(k), "engine": "dense",
         **dict.fromkeys(("early_stop_validation_accuracy", "early_stop_test_accuracy", "test_accuracy",
                          "train_accuracy"), None if k in (3, 4) else 0.7 + 0.01 * min(k, 12) - 0.02 * max(0, k - 12)),
         "early_stop_iteration": None if k in (3, 4) else 20_000 - 500 * k, "early_stop_validation_loss": 0.5,
         "seconds": 100.0 + k, "images_per_second": 9000.0}
        for k in range(ROUNDS)
    )  # fmt: skip
    path = tmp_path_factory.mktemp("deep") / "deep.ticket"
    tickets.save(path, dataclasses.replace(ticket, rounds=results))
    return path


def test_a_page_of_a_deep_net(deep, tmp_path):
    [one] = subject.read([deep])
    document = searches.document([one], "fastlth report deep.ticket")
    text = write(document, tmp_path).read_text()
    assert "Winning ticket: round 18" in text  # 0.82 - 0.12 = 0.7, as good as dense
    assert "+3.3 points at 26.4 %" in text


def test_rounds_that_were_not_measured_are_left_out(deep):
    [one] = subject.read([deep])
    figure = next(f for f in curves.by_density([one]) if f.name == "accuracy-early-stop")
    line = next(s for s in figure.panels[0].series if s.label == "tickets")
    assert len(line.points) == ROUNDS - 2
    found = {p.x for p in line.points}
    assert not {one.results(k)[0]["density"] for k in (3, 4)} & found


def test_published_gains_start_from_our_dense_net(deep):
    [one] = subject.read([deep])
    by_name = {f.name: f for f in curves.by_density([one])}
    star, sooner = (
        next(s for s in by_name[name].panels[0].series if s.label == "published")
        for name in ("accuracy-early-stop", "early-stop")
    )
    assert [(p.x, p.y) for p in star.points] == [(0.264, pytest.approx(0.733))]
    assert [(p.x, p.y) for p in sooner.points] == [(0.151, 8000.0)]


def test_many_layers_get_a_sequence_of_colours(deep):
    [one] = subject.read([deep])
    figure = layers.density_per_layer([one])
    depths = [s.look.depth for s in figure.panels[0].series]
    assert [s.label for s in figure.panels[0].series][:2] == ["conv1", "conv2"]
    assert depths == sorted(depths) and (depths[0], depths[-1]) == (0.0, 1.0)


def test_labels_stay_readable_with_many_rounds(deep):
    [one] = subject.read([deep])
    axis = next(f for f in curves.by_density([one])).x
    assert 5 <= len(axis.ticks) <= curves.MANY_TICKS and axis.ticks[0] == 1.0
    squares = layers.overlap_between_rounds([one])
    assert len(squares.panels[0].labels) <= layers.MANY_ROUNDS


def test_no_label_is_cut_off(deep):
    """Every text of every picture lies inside it."""
    from matplotlib.figure import Figure as Canvas

    from fastlth.report import draw

    canvases = []
    original = Canvas.savefig

    def keep(self, *arguments, **named):
        canvases.append(self)
        return original(self, *arguments, **named)

    two = [dataclasses.replace(s, label=f"rate 0.{i}, " + "settings " * 12) for i, s in
           enumerate(subject.read([deep]) * 2)]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Canvas, "savefig", keep)
        for figure in searches.document(two, "x").figures:
            if not figure.empty:
                draw.draw(figure)
    assert len(canvases) >= 16
    for canvas in canvases:
        canvas.draw_without_rendering()
        drawn, (width, height) = canvas.get_tightbbox(), canvas.get_size_inches()
        assert drawn.x0 >= -0.01 and drawn.y0 >= -0.01, canvas
        assert drawn.x1 <= width + 0.01 and drawn.y1 <= height + 0.01, canvas


def test_an_empty_figure_is_left_out(deep, tmp_path):
    [one] = subject.read([deep])
    document = searches.document([one], "x")
    empty = {f.name for f in document.figures if f.empty}
    assert empty == {"training-accuracy", "validation-loss", "overlap-replicates"}
    write(document, tmp_path)
    assert not empty & {f.stem for f in tmp_path.iterdir()}
    assert all(isinstance(f, Curves) for f in document.figures if f.empty)
