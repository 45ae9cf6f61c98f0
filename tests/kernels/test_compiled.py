"""Compiled kernels are kept on disk, and never used after any source file has changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from fastlth_kernels import compiled

PACKAGE = Path(compiled.__file__).parent
CALLED = "from .compiled import compiled\n\n@compiled\ndef called(x):\n    return x + {}\n"
CALLER = (
    "from .compiled import compiled\nfrom .called import called\n\n"
    "@compiled\ndef caller(x):\n    return called(x) * 10\n"
)
ASK = ("from thing.caller import caller; print(caller(1), list(caller.stats.cache_hits.values()), "
       "list(caller.stats.cache_misses.values()))")  # fmt: skip


def ask(folder):
    done = subprocess.run([sys.executable, "-c", ASK], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_code_is_kept_until_a_file_it_calls_into_changes(tmp_path):
    package = tmp_path / "thing"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(PACKAGE / "compiled.py", package)
    (package / "called.py").write_text(CALLED.format(1))
    (package / "caller.py").write_text(CALLER)
    assert ask(tmp_path) == "20 [] [1]"
    assert ask(tmp_path) == "20 [1] []"
    (package / "called.py").write_text(CALLED.format(2))
    assert ask(tmp_path) == "30 [] [1]"


def test_every_file_counts_by_name_and_content(tmp_path):
    seen = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", ""), ("c.txt", "3")):
        (tmp_path / name).write_text(text)
        seen.add(compiled.sources(tmp_path))
    assert len(seen) == 3


RACE = """
import threading, numpy as np
from concurrent.futures import ThreadPoolExecutor
from fastlth_kernels.mlp_cpu import Images, MaskedMlp, Optimizer

def net(pool):
    return MaskedMlp([np.ones((10, 64), bool)], [False], Optimizer("adam"), np.ones(4), np.zeros(4), batch=8,
                     threads=2, pool=pool)

data = Images(np.zeros(64 * 8, np.uint8), np.zeros(8, np.int64), np.arange(8))
nets = [net(ThreadPoolExecutor(1)) for _ in range(4)]
meet, losses = threading.Barrier(4), []

def work(one):
    meet.wait()
    one.train(data, np.array([0, 8]), np.array([1e-3]), 0)
    losses.append(one.scores(data)[0])

threads = [threading.Thread(target=work, args=(one,)) for one in nets]
for t in threads: t.start()
for t in threads: t.join()
assert len(losses) == 4 and len(set(losses)) == 1
"""


def test_many_threads_may_begin_with_nothing_compiled(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-c", RACE], check=True, env=environment)
