"""fastlth without its optional packages, and without what only Linux or macOS have: a search in a process of its own.

An import hook hides packages as if they were not installed; modules of the system are hidden alike.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlth.errors import DeviceError
from fastlth.store.lock import Lock
from fastlth.training import available
from tests.helpers import small_recipe

ROOT = Path(__file__).parent.parent

HIDE = """
import importlib.abc, sys

class Without(importlib.abc.MetaPathFinder):
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
    def find_distributions(self, *arguments):
        found = getattr(self.finder, "find_distributions", lambda *_: ())(*arguments)
        return [d for d in found if d.metadata["Name"] not in HIDDEN]

sys.meta_path[:] = map(Without, sys.meta_path)
"""

SEARCH = """
import json, sys
import numpy as np
import fastlth
import fastlth.cli.main

def stripes():
    rng = np.random.default_rng(0)
    def part(count):
        labels = rng.integers(0, 4, count)
        images = rng.integers(0, 128, (count, 8, 8), dtype=np.uint8)
        for image, label in zip(images, labels):
            image[2 * label : 2 * label + 2] += 100
        return images, labels
    return part(320), part(64)

settings = {"train.iterations": 20, "train.batch_size": 32, "train.lr": 1e-3, "evaluate.every": 10,
            "prune.rounds": 2, "compute.device": "cpu", "compute.compile": "off",
            "compute.precision": "fp32", "compute.threads": 1, "compute.engine": sys.argv[2]}
recipe = fastlth.compose("lenet-300-100", stripes, settings=settings).recipe
search = fastlth.run(recipe, out=sys.argv[1])
net = fastlth.load_ticket(search.ticket).model(round=2)
loaded = sorted({name.partition(".")[0] for name in sys.modules if sys.modules[name] is not None})
kept = sum(int(p.count_nonzero()) for n, p in net.named_parameters() if n.endswith("weight"))
print(json.dumps({"rounds": search.rounds, "loaded": loaded, "kept": kept}))
"""

OPTIONAL = ["triton", "ffcv", "cv2", "numba", "llvmlite", "matplotlib", "timm", "wandb", "tensorboard", "ray", "onnx",
            "onnxscript"]  # fmt: skip
NOT_FOR_OWN_DATA = ["scipy", "sklearn", "torchvision", "PIL"]


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, [ROOT, ROOT / "kernels"]))
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": path}, cwd=ROOT)  # fmt: skip


def test_a_search_needs_no_optional_package(tmp_path: Path) -> None:
    hidden = OPTIONAL + NOT_FOR_OWN_DATA
    done = python(f"HIDDEN = {hidden}\n{HIDE}\n{SEARCH}", tmp_path, "auto")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not set(hidden) & set(found["loaded"]), "the hook let something through"
    assert [r["engine"] for r in found["rounds"]] == ["dense"] * 3
    assert found["kept"] == found["rounds"][2]["kept"] < 0.65 * found["rounds"][0]["kept"]


# What a search is made of: recipes, nets, data on their way to a step, steps, pruning, tickets.
CORE = ["tests/test_masks.py", "tests/test_recipe.py", "tests/composition", "tests/pruning",
        "tests/models/test_init.py", "tests/models/test_dropout.py", "tests/data/test_data_order.py",
        "tests/data/test_data_normalise.py", "tests/training/test_step.py", "tests/training/test_dense.py",
        "tests/training/test_trainer.py", "tests/store/test_store_ticket.py", "tests/kernels/test_philox.py",
        "tests/kernels/test_bitmask.py"]  # fmt: skip


@pytest.mark.slow
def test_the_core_of_the_suite_needs_no_optional_package() -> None:
    arguments = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not science and not nightly and not endurance "
                 "and not network and not gpu"]  # fmt: skip
    done = python(f"HIDDEN = {OPTIONAL}\n{HIDE}\nimport pytest\nsys.exit(pytest.main({[*arguments, *CORE]}))")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 300


MISSING = {
    "--engine sparse": "numba is not installed; use --engine auto or dense",
    "--loader ffcv": "--loader ffcv needs the ffcv package; install fastlth[ffcv]",
    "--kernels triton": "--kernels triton needs",
}


def test_what_needs_a_package_that_is_not_there_says_so(tmp_path: Path) -> None:
    command = ["fastlth", "find-ticket", "lenet-300-100", "digits", "-i", "20", "-b", "32", "-l", "0.001",
               "--device", "cpu", "--out", str(tmp_path / "runs")]  # fmt: skip
    code = f"""HIDDEN = ["numba", "ffcv", "triton"]
{HIDE}
from fastlth.cli.main import main
for line in {list(MISSING)}:
    sys.argv = [*{command}, *line.split()]
    try:
        main()
    except SystemExit as stop:
        print(stop.code)
"""
    done = python(code)
    assert done.stdout.split() == ["2"] * len(MISSING), done.stderr
    for said, expected in zip(done.stderr.splitlines(), MISSING.values(), strict=True):
        assert expected in said
    assert not (tmp_path / "runs").exists()


# What Windows lacks is missing, and what it has instead stands in: bytes are locked there, not whole files.
WINDOWS = """
import fcntl, os, signal, subprocess, sys, types  # subprocess asks for msvcrt to find out where it is
import asyncio  # chooses the system's way when it is imported
real = fcntl
for name in ("fcntl", "resource", "termios", "pwd", "grp", "posix_ipc"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "O_CLOEXEC", "pread", "sysconf", "fork"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGKILL"):
    delattr(signal, name)

def locking(fd, mode, count):
    assert (mode, count, os.lseek(fd, 0, os.SEEK_CUR)) == (2, 1, 1 << 30), "only a byte behind the name"
    try:
        real.flock(fd, real.LOCK_EX | real.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(13, "Permission denied") from None

sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
"""


def test_a_search_needs_nothing_of_linux_alone(tmp_path: Path) -> None:
    done = python(f"{WINDOWS}\n{SEARCH}", tmp_path, "dense")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["rounds"]) == 3


def test_a_run_is_locked_where_only_bytes_can_be(tmp_path: Path) -> None:
    """Held, refused with the holder's name, and free again."""
    code = f"""{WINDOWS}
from pathlib import Path
from fastlth.errors import RunLockedError
from fastlth.store.lock import Lock
path = Path(sys.argv[1])
first = Lock(path)
try:
    Lock(path)
except RunLockedError as error:
    print(error)
first.release()
Lock(path).release()
print("free")
"""
    done = python(code, tmp_path / "lock")
    assert done.returncode == 0, done.stderr
    assert " is in use by process " in done.stdout and done.stdout.endswith("free\n")
    Lock(tmp_path / "lock").release()


def test_workers_and_ranks_live_without_the_signals_of_unix() -> None:
    code = f"""{WINDOWS}
from multiprocessing import Pipe
from types import SimpleNamespace
from fastlth.scaling.local import _work
from fastlth.training.parallel.lead import END, follow
ours, theirs = Pipe()
theirs.close()
_work(ours, None)
follow(SimpleNamespace(hear=lambda count: (END, 0, 0)), None)
print("done")
"""
    done = python(code)
    assert done.stdout == "done\n", done.stderr


def test_apples_gpu_is_a_device_that_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    recipe = small_recipe(compute__device="auto", compute__engine="auto")
    for there, chosen in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert available.device("auto") == chosen
        assert available.engine(recipe) == ("dense" if there else "auto")
    with pytest.raises(DeviceError, match=r"--device mps is not there; this machine has cpu$"):
        available.device("mps")


def test_the_command_line_starts_without_the_packages_that_compute() -> None:
    hidden = ["torch", "numpy", "numba", "triton", "scipy", "sklearn", "matplotlib", "torchvision"]
    code = f"HIDDEN = {hidden}\n{HIDE}\n{WINDOWS}\nsys.argv = ['fastlth', 'find-ticket', '--help']\n" \
           "from fastlth.cli.main import main\nmain()"  # fmt: skip
    done = python(code)
    assert done.returncode == 0 and "--never-prune" in done.stdout, done.stderr
