"""Jobs as tasks: every training in exactly the tasks that make it, in an order that can be kept."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path

import pytest

from fastlth import running
from fastlth.experiments.figures.catalogue import FIGURES, find
from fastlth.experiments.figures.scale import jobs
from fastlth.experiments.figures.work import trainings
from fastlth.scaling.perform import Place
from fastlth.scaling.plan import beside, plan, simulate, size
from fastlth.scaling.spec import read
from fastlth.scaling.tasks import Task, Worker, tasks
from tests.scaling.sweeps import small_sweep

BRANCHES = """
[[branch]]
kind = "random-reinit"
trials = 2
[[branch]]
kind = "one-shot"
[[branch]]
kind = "lr-rewind"
"""


@pytest.mark.parametrize("name", [n for n, f in FIGURES.items() if f.ready])
def test_tasks_of_a_figure_are_its_trainings(tmp_path, name):
    todo = jobs(find(name), "smoke")
    made = tasks(todo, Worker(cores=1 if name == "fc-4" else 4))
    assert len({t.name for t in made}) == len(made)
    assert len({Place(tmp_path).log(t.name) for t in made}) == len(made)
    assert {x.where for t in made for x in t.trainings(tmp_path)} == {x.where for x in trainings(todo, tmp_path)}
    place = {t.name: i for i, t in enumerate(made)}
    assert all(place[before] < place[t.name] for t in made for before in t.after)


def test_small_nets_are_packed_as_many_as_a_worker_has_cores(tmp_path):
    found = small_sweep(tmp_path, seeds=5, compute__engine="auto", branches=BRANCHES)
    packed = [t for t in tasks(found.jobs, Worker(cores=2)) if not t.follows]
    assert [t.job.replicates for t in packed] == [2, 2, 1]
    assert [t.job.recipe.seeds.base for t in packed] == [0, 2, 4]
    for engine in ("dense", "graph"):
        alone = small_sweep(tmp_path, seeds=5, compute__engine=engine)
        assert [t.job.replicates for t in tasks(alone.jobs, Worker(cores=2))] == [1] * 5


@pytest.mark.parametrize(
    ("settings", "packed"),
    [
        ({}, [32, 8]),
        ({"compute__engine": "graph"}, [32, 8]),
        ({"compute__engine": "dense"}, [1] * 40),
        ({"model": "conv-2"}, [1] * 40),
        ({"compute__device": "cpu"}, [2] * 20),
    ],
)
def test_replicates_that_a_gpu_trains_as_one_are_one_task(tmp_path, settings, packed):
    """Whatever follows them is trained one by one there."""
    given = {"compute__device": "auto", "compute__engine": "auto", **settings}
    branches = '[[branch]]\nkind = "random-reinit"\ntrials = 1\n'
    made = tasks(small_sweep(tmp_path, seeds=40, branches=branches, **given).jobs, Worker(cores=2, gpus=1))
    assert [t.job.replicates for t in made if not t.follows] == packed
    rounds = {len(t.job.follow[0].rounds) for t in made if t.follows}
    assert rounds == ({2} if settings == {"compute__device": "cpu"} else {1})


def test_what_two_tasks_need_is_made_by_one_of_them(tmp_path):
    """One-shot and chains begin with the dense net trained again: the first one-shot task makes it, all wait for it."""
    found = small_sweep(tmp_path, seeds=1, prune__rounds=3, branches=BRANCHES)
    made = {t.name.partition("/")[2]: t for t in tasks(found.jobs, Worker(cores=1))}
    after = {name: [a.partition("/")[2] for a in t.after] for name, t in made.items()}
    assert after == {
        "r0 to round 3": [],
        "r0 random-reinit round 1 x2": ["r0 to round 3"],
        "r0 random-reinit round 2 x2": ["r0 to round 3"],
        "r0 random-reinit round 3 x2": ["r0 to round 3"],
        "r0 one-shot round 1 x1": ["r0 to round 3"],
        "r0 one-shot round 2 x1": ["r0 to round 3", "r0 one-shot round 1 x1"],
        "r0 one-shot round 3 x1": ["r0 to round 3", "r0 one-shot round 1 x1"],
        "r0 lr-rewind x1": ["r0 to round 3", "r0 one-shot round 1 x1"],
    }


def test_a_longer_search_of_a_folder_waits_for_the_shorter(tmp_path):
    (job,) = small_sweep(tmp_path, seeds=1).jobs
    longer = dataclasses.replace(
        job, recipe=dataclasses.replace(job.recipe, prune=dataclasses.replace(job.recipe.prune, rounds=5))
    )
    short, long = tasks([longer, job], Worker())
    assert short.after == () and long.after == (short.name,)
    assert tasks([job, job], Worker()) == tasks([job], Worker())


def test_logs_of_tasks_with_long_names_differ(tmp_path):
    logs = {Place(tmp_path).log(f"{'n' * 250} round {k}").name for k in range(3)}
    assert len(logs) == 3 and all(len(name) < 255 for name in logs)


def test_a_task_travels(tmp_path):
    for task in tasks(jobs(find("fc-4"), "smoke"), Worker()):
        assert pickle.loads(pickle.dumps(task)) == task


# The plan


def chain(*links: tuple[str, tuple[str, ...]]) -> list[Task]:
    return [Task(name, None, after) for name, after in links]  # type: ignore[arg-type]


def test_simulated_schedules():
    """Worked out by hand: the first free worker takes the next task that may begin."""
    free = chain(("a", ()), ("b", ()), ("c", ()))
    times = {"a": 3.0, "b": 2.0, "c": 2.0}
    assert simulate(free, times, 1) == 7.0
    assert simulate(free, times, 2) == 4.0
    assert simulate(free, times, 9) == 3.0
    bound = chain(("a", ()), ("b", ("a",)), ("c", ("b",)))
    assert simulate(bound, times, 9) == 7.0
    assert simulate([], {}, 4) == 0.0


def test_a_plan_counts_each_training_once(tmp_path):
    found = small_sweep(tmp_path, seeds=2, branches=BRANCHES)
    made = tasks(found.jobs, Worker())
    needed = trainings(found.jobs, tmp_path)
    whole = plan(made, Worker(), 1, tmp_path, lambda t: 10.0)
    assert whole.trainings == len(needed) == 2 * (3 + 2 * 2 + 1 + 2 + 2)
    assert whole.work_seconds == 10.0 * len(needed) and whole.done == 0
    assert whole.seconds == pytest.approx(10.0 * len(needed) + len(made))
    assert plan(made, Worker(), 4, tmp_path, lambda t: 10.0).seconds < whole.seconds / 1.5


def test_only_rounds_that_do_not_follow_each_other_run_at_once(tmp_path):
    found = small_sweep(tmp_path, seeds=1, compute__engine="sparse", prune__rounds=4, branches="""
[[branch]]
kind = "random-reinit"
rounds = [1, 2, 4]
trials = 1
[[branch]]
kind = "lr-rewind"
rounds = [2, 4]
""")  # fmt: skip
    worker = Worker(cores=2)
    at_once = {t.name.partition("/r0 ")[2]: beside(t, worker) for t in tasks(found.jobs, worker)}
    assert at_once == {
        "to round 4": 1, "random-reinit round 1,2 x1": 2, "random-reinit round 4 x1": 1, "lr-rewind round 2,4 x1": 1,
    }  # fmt: skip


def test_the_plan_of_the_documentation(tmp_path):
    """1,320 trainings, one search to a task, and a shorter time on two workers; seconds are made up."""
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    (spec,) = re.findall(r"## Planned.*?```toml\n(.*?)```", text, re.S)
    (tmp_path / "figure.toml").write_text(spec)
    made = tasks(read(tmp_path / "figure.toml").jobs, Worker())
    whole = plan(made, Worker(), 2, tmp_path, lambda t: 60 * t.density)
    assert (whole.tasks, whole.trainings) == (60, 1320)
    assert "| tasks, trainings | 60 (one search each with `--cores 1`), 1,320 |" in text
    assert whole.seconds == pytest.approx(whole.work_seconds / 2 + 30 * 1.0, rel=0.1)


def test_bytes_are_about_what_a_search_leaves(tmp_path):
    (job,) = small_sweep(tmp_path, seeds=1, prune__rounds=6).jobs
    search = running.run(job.recipe, out=tmp_path / "runs")
    left = sum(f.stat().st_size for f in search.replicates[0].path.iterdir())
    guessed = sum(size(t, 1.0).kept for t in trainings([job], tmp_path / "empty"))
    assert 0.8 < guessed / left < 1.25
