"""A sweep's file: what multiplies, what does not, and what is refused in one sentence."""

from __future__ import annotations

import pytest

from fastlth.composition import compose
from fastlth.errors import RecipeError
from fastlth.experiments.control import Control
from fastlth.scaling.spec import read
from tests.scaling.sweeps import BASE, small_sweep, write_spec

BRANCH = '[[branch]]\nkind = "random-reinit"\nrounds = [1]\ntrials = 2\n'


def test_lists_multiply_and_a_setting_that_is_a_list_does_not(tmp_path):
    jobs = small_sweep(tmp_path, seeds=3, prune__rate=[0.1, 0.2], train__lr=[1e-3, 2e-3],
                       schedule__milestones=[10, 20], branches=BRANCH).jobs  # fmt: skip
    assert [(j.recipe.prune.rate, j.recipe.train.lr) for j in jobs] == [
        (0.1, 1e-3), (0.2, 1e-3), (0.1, 2e-3), (0.2, 2e-3)]  # fmt: skip
    assert {j.recipe.schedule.milestones for j in jobs} == {(10, 20)}
    assert {j.replicates for j in jobs} == {3} and {j.recipe.seeds.base for j in jobs} == {0}
    assert jobs[1].arm.label == "lr 0.001, rate 0.2"
    (follow,) = jobs[0].follow
    assert (follow.control.kind, follow.rounds, follow.trials) == ("random-reinit", (1,), 2)


def test_what_comes_to_nothing_is_said_of_the_combination(tmp_path):
    sweep = small_sweep(tmp_path, schedule__milestones=[[10], [10, 99_999]])
    last = sweep.jobs[0].recipe.train.iterations
    assert sweep.notes == (f"milestones [10, 99999]: schedule.milestones [99999] are not reached in {last} iterations",)


def test_a_list_of_lists_multiplies(tmp_path):
    jobs = small_sweep(tmp_path, schedule__milestones=[[10], [10, 20]]).jobs
    assert [j.recipe.schedule.milestones for j in jobs] == [(10,), (10, 20)]


def test_a_list_that_may_be_left_out_stays_one_too(tmp_path):
    (job,) = small_sweep(tmp_path, prune__never=["fc1", "fc3"]).jobs
    assert job.recipe.prune.never == ("fc1", "fc3")
    jobs = small_sweep(tmp_path, prune__never=[["fc1"], ["fc1", "fc3"]]).jobs
    assert [j.recipe.prune.never for j in jobs] == [("fc1",), ("fc1", "fc3")]


def test_entries_of_a_table_are_set_as_set_does_and_multiply(tmp_path):
    """The preset's output = 0.5 stays, and the new entry goes before it."""
    scaled = dict(prune__scale__fc1=[0.5, 1.0], prune__scale__output=0.25)
    (one,) = small_sweep(tmp_path, prune__scale__fc1=0.5).jobs
    assert list(one.recipe.prune.scale.items()) == [("fc1", 0.5), ("output", 0.5)]
    jobs = small_sweep(tmp_path, **scaled).jobs
    assert [(j.arm.label, dict(j.recipe.prune.scale)) for j in jobs] == [
        ("scale.fc1 0.5", {"fc1": 0.5, "output": 0.25}), ("scale.fc1 1", {"fc1": 1.0, "output": 0.25})]  # fmt: skip
    settings = {**BASE, "prune.scale.fc1": 0.5, "prune.scale.output": 0.25}
    assert jobs[0].recipe == compose("lenet-300-100", "digits", settings=settings).recipe


@pytest.mark.parametrize(("written", "scale"), [
    ("{fc1 = 0.5}", {"fc1": 0.5, "output": 0.5}),
    ("{}", {}),  # whole, as --set prune.scale={}
])  # fmt: skip
def test_a_table_written_whole(tmp_path, written, scale):
    (tmp_path / "s.toml").write_text(
        f'model = "lenet-300-100"\ndataset = "digits"\npreset = "fast"\n[settings]\nprune.scale = {written}'
    )
    (job,) = read(tmp_path / "s.toml").jobs
    assert job.recipe.prune.scale == scale


def test_seeds_with_gaps_become_unbroken_stretches(tmp_path):
    jobs = small_sweep(tmp_path, seeds=[7, 0, 1, 3]).jobs
    assert [(j.recipe.seeds.base, j.replicates) for j in jobs] == [(0, 2), (3, 1), (7, 1)]


def test_models_multiply_and_epochs_are_counted(tmp_path):
    settings = '[settings]\ntrain.iterations = "1ep"\ntrain.batch_size = 60\ntrain.lr = 0.1'
    (tmp_path / "s.toml").write_text(f'model = ["lenet-300-100", "conv-2"]\ndataset = "mnist"\n{settings}')
    jobs = read(tmp_path / "s.toml").jobs
    assert [(j.recipe.model.name, j.arm.label) for j in jobs] == [
        ("lenet-300-100", "model lenet-300-100"), ("conv-2", "model conv-2")]  # fmt: skip
    assert {j.recipe.train.iterations for j in jobs} == {916}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no model"),
        ('model = "lenet-5"', "has no dataset"),
        ('model = 3\ndataset = "mnist"', "model must be a word or a list of words, got 3"),
        ('modle = "lenet-5"', "did you mean 'model'"),
        ("model = ", "is not TOML"),
        ('model = "lenet-5"\ndataset = "mnist"\nseeds = [1, 1]', "different seeds, got [1, 1]"),
        ('model = "lenet-5"\ndataset = "mnist"\nseeds = true', "different seeds, got True"),
        ('model = "lenet-5"\ndataset = "mnist"\n[settings]\nprun.rate = 0.1', "did you mean 'prune'"),
        ('model = "lenet-5"\ndataset = "mnist"\n[settings]\nprune.rat = 0.1', "prune.rat"),
        ('model = "lenet-5"\ndataset = "mnist"\n[settings]\nprune.rate = []', "is an empty list"),
        ('model = "lenet-5"\ndataset = "mnist"\n[settings]\nseeds.base = 3', "is given by seeds"),
        ('model = "lenet-5"\ndataset = "mnist"\n[settings]\nprune.rate = [0.2, 0.2]', "is the same search"),
        ('model = "lenet-5"\ndataset = "mnist"\n[settings]\nprune.rounds = [3, 5]', "rounds and densities"),
        ('model = "lenet-5"\ndataset = "mnist"\n[branch]\nkind = "one-shot"', "double brackets"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nrounds = [1]', "has no kind"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "one-shit"', "did you mean 'one-shot'"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "one-shot"\nround = 1', "did you mean 'rounds'"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "one-shot"\nrounds = [99]', "round 99 is not"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "one-shot"\nrounds = "some"', "got 'some'"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "one-shot"\ntrials = 2', "must be 1"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "one-shot"\ndensity = 0.1', "go by rounds"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = ["noise", "one-shot"]', "kind must be a word"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "noise"\nsigma = "0.5"', "sigma must be a n"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "one-shot"\ndensity = "1"', "density must be a"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "random-prune"\nreinit = "no"', "true or false"),
        ('model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "lr-rewind"\niterations = 1.5', "a whole number"),
        (
            'model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "prune-at-init"\nmethod = "snip"\nimages = 55001',
            "at most the 55000 training images, got 55001",
        ),
    ],
)
def test_what_is_refused(tmp_path, text, sentence):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(RecipeError) as error:
        read(tmp_path / "s.toml")
    assert sentence in str(error.value) and "\n" not in str(error.value).strip()


def test_a_branch_is_that_of_the_command(tmp_path):
    (tmp_path / "s.toml").write_text(
        'model = "lenet-5"\ndataset = "mnist"\n[[branch]]\nkind = "noise"\nsigma = 1\ntrials = 2'
    )
    (job,) = read(tmp_path / "s.toml").jobs
    asked = Control(kind="noise", sigma=1.0)  # as the flag --sigma 1 is read
    assert job.follow[0].control.digest("0") == asked.digest("0") and job.follow[0].trials == 2


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="cannot read"):
        read(tmp_path / "none.toml")
    assert write_spec(tmp_path / "spec.toml").exists()
