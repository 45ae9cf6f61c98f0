"""Which cluster ``--on ray`` joins; a stand-in for Ray notes how it is called."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from fastlth.scaling import on_ray


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The arguments of each ``ray.init``."""
    calls = []
    fake = SimpleNamespace(is_initialized=lambda: False, init=lambda **how: calls.append(how))
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(on_ray, "find_spec", lambda name: name)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def note(tmp_path, address):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)


def test_a_cluster_that_left_its_note_and_is_gone_is_not_waited_for(asked, tmp_path, monkeypatch):
    note(tmp_path, "192.0.2.1:6379\n")
    monkeypatch.setattr(on_ray, "_answers", lambda address: address != "192.0.2.1:6379")
    on_ray.connect(None)
    assert len(asked) == 1 and "address" not in asked[0]  # one is made here


@pytest.mark.parametrize("noted", [True, False])
def test_a_cluster_that_answers_or_that_ray_may_know_is_joined(asked, tmp_path, monkeypatch, noted):
    if noted:
        note(tmp_path, "192.0.2.1:6379")
    monkeypatch.setattr(on_ray, "_answers", lambda address: True)
    on_ray.connect(None)
    assert [how["address"] for how in asked] == ["auto"]
