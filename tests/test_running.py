"""A search run and gone on with from Python."""

from __future__ import annotations

import pytest

import fastlth
from fastlth.errors import Stopped
from fastlth.running import run
from tests.helpers import small_recipe


def test_resume_takes_a_path_or_its_text_of_the_run_or_of_its_folder(tmp_path):
    recipe = small_recipe(train__iterations=6, evaluate__every=3, prune__rounds=1)
    with pytest.raises(Stopped):
        run(recipe, out=str(tmp_path), stopped=lambda: 2)
    [folder] = tmp_path.glob("*/r0")
    found = fastlth.resume(str(folder))
    assert len(found.rounds) == 2 and found.ticket == folder / "search.ticket"
    for path in (folder, folder.parent, str(folder.parent)):
        assert fastlth.resume(path).to_json() == found.to_json()
