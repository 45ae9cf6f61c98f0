"""Sweeps on a Ray cluster of several simulated nodes: workers killed, a whole node removed. Needs fastlth[ray]."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastlth.scaling.machine import Wanted
from fastlth.scaling.perform import Place
from fastlth.scaling.run import Scaled
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

pytest.importorskip("ray")
pytestmark = [pytest.mark.endurance, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
BRANCHES = """
[[branch]]
kind = "random-reinit"
rounds = [1, 2]
trials = 1
[[branch]]
kind = "one-shot"
rounds = [2]
"""


@pytest.fixture
def cluster(monkeypatch):
    """A head that takes no tasks, and two nodes of one processor each."""
    monkeypatch.setenv("PYTHONPATH", ":".join([str(ROOT), str(ROOT / "kernels"), *sys.path]))
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    nodes = [made.add_node(**{k: v for k, v in NODE.items() if k != "include_dashboard"}) for _ in range(2)]
    made.wait_for_nodes()
    try:
        yield made, nodes
    finally:
        import ray

        ray.shutdown()
        made.shutdown()


def train(found, place, cluster, show=lambda _: None, stopped=lambda: None):
    scaled = Scaled(found.jobs, place, Wanted(on="ray", address=cluster.address, cores=1))
    return scaled, scaled.run(show, stopped)


def test_a_killed_worker_and_a_removed_node(cluster, tmp_path):
    made, nodes = cluster
    found = small_sweep(tmp_path, seeds=4, prune__rounds=3, train__iterations=3000, store__save_every=0.2,
                        branches=BRANCHES)  # fmt: skip
    place = Place(tmp_path / "runs")
    murderer = Murderer(place, kills=2)

    def disturb():
        murderer.run()
        time.sleep(1)
        import ray

        mine = ray.get_runtime_context().get_node_id()  # Ray may connect this process through any node of the machine
        gone = next(node for node in nodes if node.node_id != mine)
        made.remove_node(gone, allow_graceful=False)

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    shown = []
    scaled, outcomes = train(found, place, made, shown.append)
    thread.join()
    assert scaled.workers == 2 and len(murderer.killed) == 2
    assert [o.status for o in outcomes] == ["done"] * len(scaled.tasks), outcomes
    assert_same_content(place.out, undisturbed(found, tmp_path / "whole"))
    assert_went_on_from_the_last_save(murderer)
    assert shown[-1].trainings_done == shown[-1].trainings


def test_twenty_four_searches_and_ten_kills(cluster, tmp_path):
    made, _ = cluster
    found = small_sweep(tmp_path, seeds=6, prune__rate=[0.1, 0.2, 0.3, 0.4], train__iterations=800,
                        store__save_every=0.1)  # fmt: skip
    place = Place(tmp_path / "runs")
    murderer = Murderer(place, kills=10)
    murderer.start()
    _, outcomes = train(found, place, made)
    murderer.over.set()
    murderer.join()
    assert [o.status for o in outcomes] == ["done"] * 24 and len(murderer.killed) == 10
    assert times_begun(place) >= 24 + 10
    assert len(list(place.out.glob("*/r*/search.ticket"))) == 24
    assert_same_content(place.out, undisturbed(found, tmp_path / "whole"))
    assert_went_on_from_the_last_save(murderer)


@pytest.mark.parametrize("dataset", ["own_of_ray:arrays", "imagefolder:flowers"])
def test_own_nets_and_data(cluster, tmp_path, monkeypatch, dataset):
    """Named from the folder in which the command runs, which nodes see under the same path."""
    made, _ = cluster
    own_code(tmp_path, "own_of_ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    size = {"data__image_size": 8} if "folder" in dataset else {}
    found = small_sweep(tmp_path, model="own_of_ray:net", dataset=dataset, **OWN_SETTINGS, **size)
    place = Place(tmp_path / "runs")
    _, outcomes = train(found, place, made)
    assert [o.status for o in outcomes] == ["done"] * 2, outcomes
    assert_same_content(place.out, undisturbed(found, tmp_path / "whole"))


def test_a_stop_saves_and_a_failure_is_reported(cluster, tmp_path):
    made, _ = cluster
    found = small_sweep(tmp_path, seeds=2, train__lr=[1e-3, 1e30], train__optimizer="sgd", train__iterations=5000,
                        store__save_every=60.0)  # fmt: skip
    place = Place(tmp_path / "runs")

    def stopped():
        begun = [log for log in (place.out / "logs").glob("*.log") if "from iteration" in log.read_text()]
        return 15 if len(begun) >= 2 else None

    _, outcomes = train(found, place, made, stopped=stopped)
    assert {o.status for o in outcomes} <= {"stopped", "failed"} and len(outcomes) == 4
    assert not list((place.out / "logs").glob("stop-*"))
    _, outcomes = train(found, place, made)
    status = {o.task: o.status for o in outcomes}
    assert sorted(status.values()) == ["done", "done", "failed", "failed"]
    failed = [o for o in outcomes if o.status == "failed"]
    assert all(o.code == 5 and "NaN or infinite" in o.text for o in failed)


def test_the_command(cluster, tmp_path):
    made, _ = cluster
    write_spec(tmp_path / "spec.toml", seeds=2)
    line = [sys.executable, "-m", "fastlth", "sweep", "spec.toml", "--on", "ray", "--cores", "1"]
    done = subprocess.run([*line, "--address", made.address], cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ), timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of 2 searches finished" in done.stderr and (tmp_path / "sweeps" / "spec" / "results.csv").exists()
    figure = [*line[:3], "reproduce", "fc-3", "--scale", "smoke", "--on", "ray", "--address", made.address]
    done = subprocess.run(figure, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ), timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reproduced" / "fc-3-smoke" / "report.md").exists()
    done = subprocess.run([*line, "--address", "127.0.0.1:1"], cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ), timeout=300)  # fmt: skip
    assert done.returncode == 6 and "no Ray cluster at 127.0.0.1:1" in done.stderr
