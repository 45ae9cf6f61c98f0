"""Sweeps on processes of this machine: killed, stopped, two at once, and always the folder of single runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastlth.scaling import schedule
from fastlth.scaling.local import Local, Slot, _inherited, slots
from fastlth.scaling.perform import Place, perform
from fastlth.scaling.tasks import Worker, tasks
from tests.scaling.sweeps import (
    OWN_SETTINGS,
    Murderer,
    assert_same_content,
    assert_went_on_from_the_last_save,
    own_code,
    small_sweep,
    times_begun,
    undisturbed,
    write_spec,
)

ROOT = Path(__file__).parents[2]
BRANCHES = """
[[branch]]
kind = "random-reinit"
trials = 2
[[branch]]
kind = "one-shot"
[[branch]]
kind = "continued"
"""


@pytest.fixture(autouse=True)
def sources(monkeypatch):
    """Workers import from this checkout, installed or not."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/kernels:{os.environ.get('PYTHONPATH', '')}")


def spread(found, place, workers=2, **more):
    made = tasks(found.jobs, Worker(cores=1))
    backend = Local([Slot(()) for _ in range(workers)], place)
    try:
        return schedule.run(made, backend, place.out, **more)
    finally:
        backend.close()


def test_workers_share_cores_and_gpus():
    cores = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [s.cores for s in slots(cores, 4)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [s.cores for s in slots([3, 5], 4)] == [(3, 5)]
    assert slots(cores, 4, ["0", "1"]) == [Slot((0, 1, 2, 3), "0"), Slot((4, 5, 6, 7), "1")]
    assert [s.gpu for s in slots(cores, 4, ["0", "1"], 0.5)] == ["0", "0", "1", "1"]
    assert [s.cores for s in slots([0, 1], 4, ["0", "1", "2"])] == [(0,), (1,), (0,)]


def test_a_worker_sees_its_gpu_and_no_other(monkeypatch):
    for before in ("0,1", None):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if before:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
        for slot in (Slot((), "1"), Slot(())):
            with _inherited(slot):
                assert os.environ["CUDA_VISIBLE_DEVICES"] == slot.gpu
            assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_tasks_done_in_this_process_leave_the_folder_of_single_runs(tmp_path):
    """Packed or not, in tasks of any size: the same bits."""
    found = small_sweep(tmp_path, seeds=2, compute__engine="sparse", compute__break_even=0.5, branches=BRANCHES)
    reference = undisturbed(found, tmp_path / "whole")
    for cores in (1, 2):
        place = Place(tmp_path / f"cores-{cores}")
        for task in tasks(found.jobs, Worker(cores=cores)):
            outcome = perform(task, place)
            assert outcome.status == "done", outcome
        assert_same_content(place.out, reference)


def test_a_task_that_fails_says_so_in_its_log_and_is_tried_again(tmp_path):
    found = small_sweep(tmp_path, seeds=1, train__lr=1e30, train__optimizer="sgd", train__iterations=100)
    (task,) = tasks(found.jobs, Worker())
    place = Place(tmp_path / "runs")
    for tries in (1, 2):
        outcome = perform(task, place)
        assert (outcome.status, outcome.code) == ("failed", 5) and "NaN or infinite" in outcome.text
        text = place.log(task.name).read_text()
        assert text.count("failed: round 0: the loss became NaN") == tries


def test_a_bug_leaves_its_traceback_in_the_log(tmp_path, monkeypatch):
    from fastlth.scaling import perform as module

    monkeypatch.setattr(module, "make", lambda *_, **__: 1 / 0)
    (task,) = tasks(small_sweep(tmp_path, seeds=1).jobs, Worker())
    place = Place(tmp_path / "runs")
    assert perform(task, place).text == "a bug: ZeroDivisionError: division by zero"
    assert "Traceback" in place.log(task.name).read_text()


def test_a_run_that_another_process_writes_is_put_off(tmp_path):
    from fastlth.store.run import Run

    (job,) = small_sweep(tmp_path, seeds=1).jobs
    (task,) = tasks([job], Worker())
    place = Place(tmp_path / "runs")
    with Run.open(place.out, job.recipe):
        assert perform(task, place).status == "held"
    assert perform(task, place).status == "done"


@pytest.mark.endurance
def test_a_killed_worker_is_replaced_and_its_search_goes_on(tmp_path):
    found = small_sweep(tmp_path, seeds=2, train__iterations=2000, store__save_every=0.1,
                        branches='[[branch]]\nkind = "random-reinit"\nrounds = [1]\ntrials = 1\n')  # fmt: skip
    place = Place(tmp_path / "runs")
    murderer = Murderer(place, kills=2)
    murderer.start()
    shown = []
    outcomes = spread(found, place, show=shown.append)
    murderer.over.set()
    murderer.join()
    assert [o.status for o in outcomes] == ["done"] * 4 and len(murderer.killed) == 2
    assert_same_content(place.out, undisturbed(found, tmp_path / "whole"))
    assert_went_on_from_the_last_save(murderer)
    assert shown[-1].trainings_done == shown[-1].trainings == 2 * 3 + 2


@pytest.mark.endurance
@pytest.mark.parametrize("dataset", ["own_of_local:read_by_others", "imagefolder:flowers"])
def test_own_nets_and_data_on_workers(tmp_path, monkeypatch, dataset):
    """Named from the current folder; the data may be read by processes of their own."""
    own_code(tmp_path, "own_of_local")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    size = {"data__image_size": 8} if "folder" in dataset else {}
    found = small_sweep(tmp_path, model="own_of_local:net", dataset=dataset, **OWN_SETTINGS, **size,
                        branches='[[branch]]\nkind = "random-reinit"\nrounds = [1]\n')  # fmt: skip
    place = Place(tmp_path / "runs")
    outcomes = spread(found, place)
    assert [o.status for o in outcomes] == ["done"] * 4, outcomes
    assert_same_content(place.out, undisturbed(found, tmp_path / "whole"))


@pytest.mark.endurance
def test_twenty_four_searches_and_ten_kills(tmp_path):
    found = small_sweep(tmp_path, seeds=6, prune__rate=[0.1, 0.2, 0.3, 0.4], train__iterations=800,
                        store__save_every=0.1)  # fmt: skip
    place = Place(tmp_path / "runs")
    murderer = Murderer(place, kills=10)
    murderer.start()
    outcomes = spread(found, place)
    murderer.over.set()
    murderer.join()
    assert [o.status for o in outcomes] == ["done"] * 24 and len(murderer.killed) == 10
    assert times_begun(place) >= 24 + 10
    assert len(list(place.out.glob("*/r*/search.ticket"))) == 24
    assert_same_content(place.out, undisturbed(found, tmp_path / "whole"))
    assert_went_on_from_the_last_save(murderer)


# The command


def line_of(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fastlth", "sweep", *map(str, arguments)]


@pytest.mark.endurance
def test_two_schedulers_share_one_folder_and_a_stopped_one_goes_on(tmp_path):
    """Two commands at once divide the work; one is stopped by SIGUSR1, saves, exits 138, and goes on later."""
    found = small_sweep(tmp_path, seeds=4, train__iterations=2000, store__save_every=0.2)
    line = line_of(tmp_path / "spec.toml", "--out", tmp_path / "runs", "--report", tmp_path / "report", "--cores", 1)
    first, second = (subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(2))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("*/r*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    first.send_signal(signal.SIGUSR1)
    err = first.communicate(timeout=120)[1]
    assert first.returncode == 138, err
    assert "stopped and saved; go on with: fastlth sweep" in err.splitlines()[-1]
    err = second.communicate(timeout=240)[1]
    assert second.returncode == 0, err
    assert "4 of 4 searches finished" in err
    assert_same_content(tmp_path / "runs", undisturbed(found, tmp_path / "whole"))


@pytest.mark.endurance
def test_workers_end_when_their_scheduler_is_killed(tmp_path):
    small_sweep(tmp_path, seeds=2, train__iterations=50_000)
    line = line_of(tmp_path / "spec.toml", "--out", tmp_path / "runs", "--cores", 1)
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as scheduler:
        logs = tmp_path / "runs" / "logs"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            texts = [log.read_text() for log in logs.glob("*.log")]
            if any("from iteration" in text for text in texts):
                break
            time.sleep(0.1)
        scheduler.kill()
    pids = [int(text.partition("process ")[2].split()[0]) for text in texts]
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pids and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert any("stopped and saved" in log.read_text() for log in logs.glob("*.log"))


def test_the_plan_and_bad_options(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_spec(tmp_path / "spec.toml", seeds=2, schedule__milestones=[99_999])
    code, out, err = command("sweep", "spec.toml", "--dry-run", "--json", "--cores", 1)
    assert code == 0, err
    assert err.startswith("tickets: schedule.milestones [99999] are not reached in ")
    plan = json.loads(out)
    assert plan["plan"]["trainings"] == 6 and plan["plan"]["tasks"] == len(plan["tasks"]) == 2
    assert plan["plan"]["seconds"] > 0 and plan["plan"]["bytes_written"] > plan["plan"]["bytes_kept"] > 100_000
    assert not (tmp_path / "runs").exists()
    for options, sentence in (
        (["--on", "slurm"], "unknown --on 'slurm'"), (["--cores", "0"], "--cores must be at least 1, got 0"),
        (["--gpus", "1.5"], "--gpus must be 0, 1 or a share"), (["--address", "here:1"], "add --on ray"),
    ):  # fmt: skip
        code, _, err = command("sweep", "spec.toml", *options)
        assert code == 2 and sentence in err
    (tmp_path / "file").write_text("")
    for words in (["sweep", "spec.toml"], ["reproduce", "fc-3", "--scale", "smoke"]):
        code, _, err = command(*words, "--report", "file")  # said before anything is trained
        assert code == 2 and "cannot write file" in err and not (tmp_path / "runs").exists()
    code, _, err = command("reproduce", "fc-3", "--cores", "2")
    assert code == 2 and "--cores is about workers; add --on local or --on ray" in err


@pytest.mark.endurance
def test_the_command_for_a_figure(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("reproduce", "fc-3", "--scale", "smoke", "--on", "local", "--cores", "1", "--json")
    assert code == 0, err
    made = json.loads(out)
    assert {t["status"] for t in made["tasks"]} == {"done"} and made["pictures"]
    assert (tmp_path / made["report"] / "report.md").exists()


def test_a_figure_on_workers_is_the_figure(tmp_path):
    """``reproduce --on local`` draws from what ``reproduce`` would have trained."""
    from fastlth.experiments.figures.catalogue import find
    from fastlth.experiments.figures.scale import jobs
    from fastlth.experiments.figures.work import make

    todo = jobs(find("fc-9"), "smoke")
    place = Place(tmp_path / "tasks")
    for task in tasks(todo, Worker(cores=2)):
        assert perform(task, place).status == "done"
    for job in todo:
        make(job, tmp_path / "whole", data_dir=None, show=lambda _: None, stopped=lambda: None)
    assert_same_content(place.out, tmp_path / "whole")
    trained = threading.Event()
    for job in todo:
        make(job, place.out, data_dir=None, show=lambda _: trained.set(), stopped=lambda: None)
    assert not trained.is_set()
