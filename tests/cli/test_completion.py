"""What the shell's Tab offers, asked for as bash asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("typed", "offered"), [
    ("find-ticket vg", {"vgg11", "vgg13", "vgg16", "vgg19"}),
    ("find-ticket vgg19 cifar-10", {"cifar-10", "cifar-100", "cifar-10a", "cifar-10b"}),
    ("find-ticket vgg19 cifar-10 --preset le", {"lecode"}),
    ("branch run random-r", {"random-reinit"}),
    ("reproduce lmc-", {"lmc-2", "lmc-3", "lmc-4", "lmc-5", "lmc-table-2"}),
    ("ticket ver", {"verify"}),
])  # fmt: skip
def test_tab(typed, offered):
    words = f"fastlth {typed}"
    environment = {**os.environ, "_FASTLTH_COMPLETE": "complete_bash", "COMP_WORDS": words,
                   "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
    code = "import sys; sys.argv = ['fastlth']; from fastlth.cli.main import app; app(prog_name='fastlth')"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert set(said.stdout.split()) == offered, said.stderr
