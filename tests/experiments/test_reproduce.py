"""The papers' figures: what they declare, which trainings that is, and every one of them made at smoke scale.

All share one folder of runs, as they do for a person, so that each training is made once.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import signal
from pathlib import Path
from statistics import fmean

import pytest

from fastlth.catalogue import lenet_widths
from fastlth.errors import RecipeError, Stopped
from fastlth.experiments.control import Control
from fastlth.experiments.figures import estimate, work
from fastlth.experiments.figures.catalogue import FIGURES, find
from fastlth.experiments.figures.declare import Against, Arm, Branched, Copied, Figure, Stated
from fastlth.experiments.figures.overview import overview
from fastlth.experiments.figures.scale import jobs, left_out, within
from fastlth.happenings import Started
from fastlth.report import reproduced
from fastlth.report.figure import to_csv
from fastlth.search import RoundFinished

DOCS = Path(__file__).resolve().parents[2] / "docs"
READY = [name for name, figure in FIGURES.items() if figure.ready]
NOWHERE = Path("nowhere")


@pytest.fixture(scope="session")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reproduced")


def lines_of(figure, out, stopped=lambda: None, show=lambda event: None):
    return [line for job in jobs(figure, "smoke")
            for line in work.make(job, out, data_dir=None, show=show, stopped=stopped)]  # fmt: skip


def where(name: str, scale: str = "paper") -> set[str]:
    return {t.where for t in work.trainings(jobs(find(name), scale), NOWHERE)}


# What a figure needs


def test_trainings_of_fc_4():
    """5 searches of 27 rounds; on 26 masks 3 draws each; the dense nets once more, one-shot and its 3 draws."""
    assert len(where("fc-4")) == 5 * 27 + 5 * 26 * 3 + 5 + 5 * 26 + 5 * 26 * 3 == 1050


def test_trainings_of_continued_training():
    """fc-9: 3 searches of 27 rounds and 26 masks found without resetting, which take 25 trainings more."""
    assert len(where("fc-9")) == 3 * (27 + 1 + 25 + 26)


def test_trainings_of_pairs_of_copies():
    """lmc-3, three nets: 3 dense; 7 points with 6 copies, and theta_k for those 6 points that are not the start."""
    assert len(where("lmc-3")) == 3 * 3 * (1 + 6 + 7 * 6)


def test_trainings_of_pairs_that_train_the_whole_schedule():
    """lmc-4, LeNet alone: lmc-3's, and for those 6 points that are not the start 6 copies more."""
    lenet = {name: {w for w in where(name) if w.startswith("lenet")} for name in ("lmc-3", "lmc-4")}
    assert len(lenet["lmc-3"]) == 3 * (1 + 6 + 7 * 6) and len(lenet["lmc-4"] - lenet["lmc-3"]) == 3 * 6 * 6
    assert lenet["lmc-3"] < lenet["lmc-4"]


def test_figures_share_their_runs():
    assert where("fc-3") < where("fc-4") and where("fc-11") == where("fc-3") and where("fc-12") == where("fc-4")
    assert where("fc-4", "short") > where("fc-3", "short")
    assert where("fc-9") & where("fc-4") == {w for w in where("fc-9") if " round " in w} | {
        w for w in where("fc-9") if "/dense-" in w
    }
    assert not where("fc-4") & where("lmc-2")  # another length of training


def test_the_papers_settings():
    (job,) = jobs(find("fc-4"), "paper")
    r = job.recipe
    assert (r.train.iterations, r.train.batch_size, r.train.lr, r.prune.rounds) == (50_000, 60, 1.2e-3, 26)
    assert (r.evaluate.every, r.evaluate.test, job.replicates) == (100, "always", 5)
    warm = {job.arm.panel: job.recipe.schedule.warmup for job in jobs(find("fc-7"), "paper")}
    assert warm == {"learning rate 0.1": 0, "learning rate 0.01": 0, "learning rate 0.1, warm-up": 10_000}
    dropout = {job.arm.model: job.recipe for job in jobs(find("fc-6"), "paper") if job.arm.label == "dropout"}
    assert {m: (r.train.iterations, r.model.dropout) for m, r in dropout.items()} == {
        "conv-2": (60_000, 0.5), "conv-4": (75_000, 0.5), "conv-6": (90_000, 0.5)}  # fmt: skip


def test_the_papers_resnets():
    """Frankle & Carbin I.3 at three learning rates; Renda et al.; Frankle et al. 2020, who prune every weight."""
    found = {j.arm.panel: j.recipe for j in jobs(find("fc-8"), "paper")}
    assert {p: (r.train.lr, r.schedule.warmup) for p, r in found.items()} == {
        "learning rate 0.1": (0.1, 0),
        "learning rate 0.01": (0.01, 0),
        "learning rate 0.03, warm-up": (0.03, 20_000),
    }
    assert {(r.train.iterations, r.train.batch_size, r.schedule.milestones, r.prune.scope) for r in found.values()} == {
        (30_000, 128, (20_000, 25_000), "global")
    }
    assert all(r.prune.scale == {"*shortcut": 0.0, "output": 0.0} for r in found.values())
    assert {j.recipe.prune.scope for j in jobs(find("fc-39"), "paper")} == {"global", "layer"}
    assert [j.recipe.schedule.warmup for j in jobs(find("fc-44"), "paper")] == [0, 500, 1_000, 5_000, 10_000, 20_000]
    renda = {j.recipe.prune.rewind_to: j.recipe for j in jobs(find("renda"), "paper") if j.arm.model == "resnet-20"}
    assert set(renda) == {0, 12 * 391}  # epochs of all 50,000 images
    for r in renda.values():
        assert (r.train.iterations, r.train.lr, r.train.weight_decay, r.schedule.warmup) == (71_108, 0.1, 2e-4, 0)
        assert (r.schedule.milestones, r.prune.scale, r.model.weight_init) == ((35_581, 53_176), {}, "glorot")
    lmc = {j.arm.model: j.recipe for j in jobs(find("lmc-3"), "paper")}
    for model, scale in (("resnet-20", {}), ("vgg16", {"output": 0.0})):
        r = lmc[model]
        assert (r.train.iterations, r.train.batch_size, r.train.lr, r.schedule.warmup) == (63_000, 128, 0.1, 0)
        assert (r.schedule.milestones, r.train.weight_decay, r.prune.rewind_to) == ((32_000, 48_000), 1e-4, 0)
        assert (r.prune.scale, r.model.weight_init, r.model.norm_init) == (scale, "kaiming", "uniform")


def test_the_papers_lenets():
    """Appendix F.7, G.5 and G.6: sizes of noise, spreads of initial values, ten widths whose ratio is 3 to 1."""
    (noise,) = jobs(find("fc-25"), "paper")
    assert [f.control.sigma for f in noise.follow if f.control.kind == "noise"] == [0.5, 1.0, 2.0, 3.0]
    stds = [j.recipe.model.weight_std for j in jobs(find("fc-30"), "paper")]
    assert stds == [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, None]
    wide = jobs(find("fc-31"), "paper")
    assert len(wide) == 10 and {j.replicates for j in wide} == {3}
    for job in wide:
        a, b = lenet_widths(job.arm.model)
        left = 784 * a * 0.8**job.arm.rounds + a * b * 0.8**job.arm.rounds + 10 * b * 0.9**job.arm.rounds
        assert abs(a / b - 3) < 0.3 and 1_100 < left < 1_750
        assert (job.recipe.train.iterations, job.recipe.train.lr, job.recipe.prune.scale) == (
            50_000, 1.2e-3, {"output": 0.5})  # fmt: skip


def test_the_short_scale():
    (job,) = jobs(find("fc-4"), "short")
    assert (job.recipe.train.iterations, job.recipe.evaluate.every, job.recipe.prune.rounds) == (3_000, 100, 18)
    assert job.replicates == 3 and {f.trials for f in job.follow} == {1}
    drop = next(j for j in jobs(find("fc-6"), "short") if j.arm.label == "dropout")
    assert drop.recipe.train.iterations == 18_000  # three times the fast preset's, as in the paper
    vgg = {j.arm.label: j.recipe.schedule for j in jobs(find("fc-45"), "short")}
    assert vgg["warm-up 20,000"].warmup == 1_250 and vgg["warm-up 20,000"].milestones == (3_515, 5_272)
    assert [a.label for a in find("fc-1").ready if not a.small] and len(jobs(find("fc-1"), "short")) == 1
    assert left_out(find("fc-1"), "short") == ("Conv-2, Conv-4, Conv-6: left out at short scale.",)


def test_rounds_beyond_the_last():
    assert within((0, 3, 7, 12), 5) == (0, 3, 5) and within((), 5) == ()


# What cannot be made


def test_unknown_names():
    with pytest.raises(RecipeError, match=r"unknown figure 'fc-44x'.*did you mean 'fc-44'.*zhou-criteria"):
        find("fc-44x")
    with pytest.raises(RecipeError, match="unknown scale 'tiny'"):
        jobs(find("fc-3"), "tiny")


def test_refusals_say_what_is_missing():
    arm = Arm(label="tickets", model="a-net-of-tomorrow", dataset="mnist")
    figure = Figure(name="x", what="", source="", arms=(arm,), pictures=())
    for scale in ("paper", "short", "smoke"):
        with pytest.raises(RecipeError) as refused:
            jobs(figure, scale)
        assert str(refused.value).startswith("x needs the model a-net-of-tomorrow, which fastlth does not have yet")


def test_a_figure_without_one_of_its_nets():
    arm = Arm(label="tickets", panel="There", model="lenet-300-100", dataset="mnist", rounds=1)
    gone = dataclasses.replace(arm, panel="Gone", model="a-net-of-tomorrow")
    figure = Figure(name="x", what="", source="", arms=(arm, gone), pictures=())
    assert figure.needs == ("the model a-net-of-tomorrow",)
    assert left_out(figure, "paper") == ("Gone: not drawn; needs the model a-net-of-tomorrow.",)
    assert [job.arm for job in jobs(figure, "paper")] == [arm]


def test_declarations_fit_together():
    for figure in FIGURES.values():
        drawn = {arm.panel: set() for arm in figure.arms}
        for arm in figure.arms:
            drawn[arm.panel] |= {arm.label, *(f.label for f in arm.follow)}
        for stated in figure.stated:
            lines = drawn[stated.panel] | {"trained", *work.ONE_SHOT_LINES}
            assert stated.line in lines, (figure.name, stated)
            assert sum(v is not None for v in (stated.value, stated.gain, stated.earlier)) == 1


# Every figure, made


@pytest.mark.parametrize("name", READY)
def test_smoke(name, out):
    """The plan is exactly what is trained, and every picture has a finite number of each line in it."""
    figure = find(name)
    todo = jobs(figure, "smoke")
    planned = {t.where: t.done for t in work.trainings(todo, out)}
    before = _trained(out)
    lines = lines_of(figure, out)
    assert _trained(out) - before == {w for w, done in planned.items() if not done}
    assert all(t.done for t in work.trainings(todo, out))
    page = reproduced.document(figure, "smoke", lines, out, "fastlth reproduce")
    assert len(page.figures) == len(figure.pictures)
    for picture in page.figures:
        rows = list(csv.DictReader(io.StringIO(to_csv(picture))))
        assert rows and {r["panel"] for r in rows} <= {line.panel for line in lines} | {""}
        assert all(abs(float(r[picture.y.column])) < 1e6 for r in rows)
    made = next(s for s in page.sections if s.title == "How it was made").items
    assert [table.title for table in made] == ["", "Machine"] and ("device", "cpu") in made[1].rows
    for job in {id(line.job): line.job for line in lines}.values():
        assert sum(m.result.get("seconds", 0) for line in lines if line.job is job for m in line.found) > 0
    for picture in figure.pictures:
        if isinstance(picture, Against):
            curves = reproduced.draw(figure, picture, lines)
            assert {s.label for p in curves.panels for s in p.series if s.points} == {line.label for line in lines}
    assert lines_of(figure, out, show=_nothing_is_trained) and len(_trained(out)) == len(before | planned.keys())


def _trained(out: Path) -> set[str]:
    """The trainings there are, found by looking at all files: rounds in metrics.jsonl, and results of trials."""
    found = {str(f.parent.relative_to(out)) for f in out.rglob("result.json")}
    for file in out.glob("*/r*/metrics.jsonl"):
        for line in file.read_text().splitlines():
            if (record := json.loads(line))["event"] == "round":
                found.add(f"{file.parent.relative_to(out)} round {record['round']}")
    return found


def _nothing_is_trained(event: object) -> None:
    assert not isinstance(event, RoundFinished | Started), event


def test_ten_widths_are_drawn_against_weights(out):
    figure = find("fc-31")
    curves = reproduced.draw(figure, figure.pictures[0], lines_of(figure, out))
    assert curves.x.column == "kept"
    first = {s.label: s.points[0].x for p in curves.panels for s in p.series}
    assert first["25, 9"] == 64 * 25 + 25 * 9 + 9 * 10  # of digits, which have 64 pixels
    assert len(first) == 10 and first["900, 300"] == 64 * 900 + 900 * 300 + 3_000


def test_numbers_are_those_of_the_runs(out):
    lines = lines_of(find("fc-4"), out)
    curves = reproduced.draw(find("fc-4"), Against("early_stop_test_accuracy"), lines)
    drawn = {s.label: [p.y for p in s.points] for p in curves.panels for s in p.series}
    (job,) = jobs(find("fc-4"), "smoke")
    records = [json.loads(line) for line in (work.run_of(out, job.recipe) / "metrics.jsonl").read_text().splitlines()]
    assert drawn["tickets"] == [r["early_stop_test_accuracy"] for r in records if r["event"] == "round"]
    reinit = sorted((work.run_of(out, job.recipe) / "branches").glob("random-reinit-*/*/*/result.json"))
    assert drawn["random reinit"] == [json.loads(f.read_text())["early_stop_test_accuracy"] for f in reinit]


# Beside the paper


def _measured(density, seed=0, **result):
    return work.Measured({"round": 0 if density == 1 else 1, "density": density, **result}, seed)


def test_beside_the_paper():
    figure = dataclasses.replace(find("fc-4"), stated=(
        Stated(panel="LeNet", line="tickets", quantity="test_accuracy", density=0.21, gain=0.01),
        Stated(panel="LeNet", line="tickets", quantity="early_stop_iteration", density=0.21, earlier=2.0),
        Stated(panel="LeNet", line="tickets", quantity="test_accuracy", density=0.20, value=0.95),
        Stated(panel="LeNet", line="tickets", quantity="test_accuracy", density=0.05, value=0.95),
        Stated(panel="LeNet", line="random reinit", quantity="test_accuracy", density=0.21, gain=0.0),
    ))  # fmt: skip
    (job,) = jobs(figure, "paper")
    job = dataclasses.replace(job, arm=dataclasses.replace(job.arm, published=False))
    found = [_measured(1.0, s, test_accuracy=0.9 + s / 100, early_stop_iteration=300) for s in (0, 1)]
    found += [_measured(0.2107, s, test_accuracy=0.93 + s / 100, early_stop_iteration=100) for s in (0, 1)]
    rows = reproduced.beside(figure, [work.Line(job, "tickets", tuple(found))])
    assert [(r.paper, r.here) for r in rows] == [
        ("+1.00 points", "+3.00 points"), ("2.00 times earlier", "3.00 times earlier"), ("95.00 %", "93.50 %"),
        ("95.00 %", None), ("+0.00 points", None)]  # fmt: skip
    assert fmean(m.result["test_accuracy"] for m in found[2:]) == 0.935


# Stopping, and time


def test_a_stopped_figure_goes_on(tmp_path):
    """Stopped in the middle of a search and of a control, with the same numbers as in one go."""
    reinit = Branched(label="random reinit", control=Control(kind="random-reinit"))
    arm = dataclasses.replace(find("fc-3").arms[0], follow=(reinit,))
    figure = dataclasses.replace(find("fc-3"), arms=(arm,))
    whole = lines_of(figure, tmp_path / "whole")
    for after in (3, 2):
        asked = iter([None] * after)
        with pytest.raises(Stopped):
            lines_of(figure, tmp_path / "parts", stopped=lambda asked=asked: next(asked, signal.SIGTERM))
    done = [t.done for t in work.trainings(jobs(figure, "smoke"), tmp_path / "parts")]
    assert any(done) and not all(done)
    parts = lines_of(figure, tmp_path / "parts")
    assert [_bare(line) for line in parts] == [_bare(line) for line in whole]


def _bare(line):
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in m.result.items() if k not in timed} for m in line.found]


def test_the_estimate_is_measured(out, monkeypatch):
    """Half a second per step and evaluation, where the engine takes that: arithmetic, not the clock, is tested."""
    monkeypatch.setattr(estimate, "_timed", lambda call: (call(), 0.5)[1])
    monkeypatch.setattr(estimate, "SECONDS", 0.0)  # one step at a time
    needed = work.trainings(jobs(find("fc-3"), "smoke"), NOWHERE)
    # 4 trainings of 8 steps, 2 evaluations on 300 validation and on test images each, and one on the 160 trained on
    expected = 4 * (8 * 0.5 + 2 * (0.5 + 0.5) + 0.5 * 160 / 300)
    assert estimate.estimate(needed, NOWHERE, None) == pytest.approx(expected)
    lines_of(find("fc-3"), out)
    assert estimate.estimate(work.trainings(jobs(find("fc-3"), "smoke"), out), out, None) == 0


@pytest.mark.parametrize(("figure", "compute", "whole"), [
    ("fc-3", {"engine": "sparse", "break_even": 0.5}, 64 * 300),
    ("fc-5", {"engine": "dense", "compile": "off", "kept": {"fc1": 0.5}}, 1024 * 256),
])  # fmt: skip
def test_the_estimate_follows_the_density(monkeypatch, figure, compute, whole):
    """With an engine whose step takes a second per kept weight of a layer: dense is timed dense."""
    job, *_ = jobs(find(figure), "smoke")
    sparse = dataclasses.replace(
        job.recipe,
        compute=dataclasses.replace(job.recipe.compute, **compute),
        prune=dataclasses.replace(job.recipe.prune, rounds=10, rate=0.2),
    )
    monkeypatch.setattr(estimate, "_step", lambda engine, recipe: float((engine.weights()["fc1.weight"] != 0).sum()))
    training, *_ = work.trainings([dataclasses.replace(job, recipe=sparse)], NOWHERE)
    pace = estimate._pace(training, NOWHERE, None)
    assert pace.densities == pytest.approx((0.8**10, 0.8**5, 1.0)) and pace.step[-1] == whole
    assert pace.step[:2] == pytest.approx((whole * 0.8**10, whole * 0.8**5), rel=0.1)


def test_pairs_count_each_copy_once():
    arm = Arm(label="d", model="lenet-300-100", dataset="mnist", rounds=0, drawn=False,
              follow=(Copied(label="d", pairs=((1, 2), (2, 3))),))  # fmt: skip
    figure = Figure(name="x", what="", source="", arms=(arm,), pictures=())
    assert len(work.trainings(jobs(figure, "paper"), NOWHERE)) == 1 + 3


# The documentation


def test_docs_list_all_figures():
    text = (DOCS / "reproduce.md").read_text(encoding="utf-8")
    for row in overview():
        count = "-" if row.trainings is None else f"{row.trainings:,}"
        assert f"| {row.name} | {row.what} | {count} | {row.remark} |" in text
    listed = text.partition("## Figures")[2].partition("## What differs")[0]
    assert listed.count("\n| ") == len(FIGURES) + 1  # and the head
