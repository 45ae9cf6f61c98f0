"""The wheel holds what it should, works outside a checkout, and the pins cover what is declared."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"fastlth": ROOT / "fastlth", "fastlth_kernels": ROOT / "kernels" / "fastlth_kernels"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def _run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that does not see this checkout through the environment."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in PACKAGES.values():
        shutil.copytree(folder, source / folder.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of a fresh environment: the wheel, and this environment's third parties."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    programs = home / ("Scripts" if os.name == "nt" else "bin")
    # Folders named in a .pth file are searched, but their own .pth files, by which an editable
    # install of the checkout would be found, are not read.
    third_parties = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = Path(_run(programs / "python", "-c", ask, cwd=home).strip())
    (purelib / "third-parties.pth").write_text("\n".join(third_parties) + "\n", encoding="utf-8")
    _run(sys.executable, "-m", "pip", "--python", programs / "python", "install",
         "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=home)  # fmt: skip
    return programs


def test_wheel_top_level_is_exactly_the_two_packages(wheel: Path) -> None:
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert top == {*PACKAGES, f"fastlth-{PROJECT['version']}.dist-info"}


def test_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    wanted = {
        (name / path.relative_to(folder)).as_posix()
        for name, folder in ((Path(n), f) for n, f in PACKAGES.items())
        for pattern in ("*.py", "*.toml", "py.typed")
        for path in folder.rglob(pattern)
    }
    assert {"fastlth/presets/paper.toml", "fastlth/py.typed", "fastlth_kernels/py.typed"} <= wanted
    missing = wanted - set(zipfile.ZipFile(wheel).namelist())
    assert not missing, "in the checkout but not in the wheel (is an __init__.py missing?)"


def test_installed_wheel_composes_a_recipe_from_a_preset(installed: Path, tmp_path: Path) -> None:
    code = """
import fastlth, fastlth_kernels
composed = fastlth.compose("vgg19", "cifar-10")
print(fastlth.__file__, fastlth_kernels.__file__, fastlth.__version__, sep="\\n")
print(composed.preset, composed.recipe.train.batch_size, sep="\\n")
"""
    ours, kernels, version, preset, batch_size = _run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    home = installed.parent.resolve()
    assert home in Path(ours).resolve().parents
    assert home in Path(kernels).resolve().parents
    assert (version, preset, batch_size) == (PROJECT["version"], "paper", "64")


@pytest.mark.parametrize("command", [["python", "-m", "fastlth"], ["fastlth"]], ids=" ".join)
def test_installed_command_answers(installed: Path, tmp_path: Path, command: list[str]) -> None:
    program, *arguments = command
    assert "find-ticket" in _run(installed / program, *arguments, "--help", cwd=tmp_path)


def _names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(r).name) for r in requirements}


def test_extras_exist() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"ffcv", "ray", "wandb", "tensorboard", "onnx", "report", "test", "lint"} <= set(extras)
    optional = _names([r for e in ("ffcv", "ray", "wandb", "tensorboard", "onnx") for r in extras[e]])
    assert not optional & _names(PROJECT["dependencies"]), "an extra is also required"


def test_constraints_pin_what_setup_installs() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    exact = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in pins}
    assert all(str(r.specifier).startswith("==") and r.url is None for r in pins)
    extras = PROJECT["optional-dependencies"]
    declared = PROJECT["dependencies"] + [r for e in ("ffcv", "report", "test", "lint") for r in extras[e]]
    assert _names(declared) <= set(exact)
    outside = [r for r in map(Requirement, declared) if not r.specifier.contains(exact[canonicalize_name(r.name)])]
    assert not outside, "the pinned version lies outside the declared range"


def _ci_commands() -> list[list[str]]:
    """The words of every one-line ``run:`` of the GitHub workflow, and of every ``step`` of .ci/run."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    found = re.findall(r"^\s+(?:- )?run: (.+)$", workflow, re.MULTILINE)
    assert len(found) == len(re.findall(r"\brun:", workflow)) and not any(c.startswith(("|", ">")) for c in found)
    found += re.findall(r"^step (.+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(part) for line in found for part in line.split("&&")]


@pytest.mark.parametrize("command", _ci_commands(), ids=" ".join)
def test_what_ci_runs_exists(command: list[str]) -> None:
    """make targets, modules, and sub-commands and options of fastlth."""
    program, *rest = [word for word in command if not word.startswith((">", "$"))]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        asked = {word for word in rest if "=" not in word}
        assert asked and asked <= set(targets)
    elif program == "python":
        assert rest[0] == "-m" and (rest[1] in ("pip", "pytest") or find_spec(rest[1]) is not None)
    elif Path(program).name == "fastlth":
        import typer

        from fastlth.cli.main import app

        at: Any = typer.main.get_command(app)
        for word in rest:
            if word.startswith("--"):
                assert word in {o for p in at.params for o in p.opts}, f"{word} is no option of {at.name}"
            else:
                at = at.commands[word]
    else:
        assert program in ("sudo", "lottery")  # apt-get, and a function of .ci/run itself


def test_ci_holds_speed_and_kernels_and_every_supported_version() -> None:
    commands = [" ".join(c) for c in _ci_commands()]
    assert any("fastlth bench --check --markdown >> $GITHUB_STEP_SUMMARY" in c for c in commands)
    assert commands.count("make kernel-budgets") == 2
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^kernel-budgets: setup\n\t\S+python -m benchmarks\.aot$", makefile, re.MULTILINE)
    assert find_spec("benchmarks.aot") is not None
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    supported = {c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)}
    matrix = re.search(r"^ +python: \[(.*)\]$", workflow, re.MULTILINE)
    assert matrix is not None and set(re.findall(r"[\d.]+", matrix[1])) == supported
    [torch] = [Requirement(r) for r in PROJECT["dependencies"] if Requirement(r).name == "torch"]
    oldest = re.search(r'torch: oldest, pins: "torch==([\d.]+)\.\*', workflow)
    assert oldest is not None and str(torch.specifier) == f">={oldest[1]}"
    assert 'torch: newest, pins: "torch torchvision"' in workflow
    systems = re.search(r"^ +os: \[(.*)\]$", workflow, re.MULTILINE)
    assert systems is not None and systems[1] == "ubuntu-latest, macos-latest, windows-latest"


def test_ci_runs_none_of_the_long_tests() -> None:
    """A -m of one's own replaces that of pyproject.toml, so it must name all that this leaves out."""
    left_out = PYPROJECT["tool"]["pytest"]["ini_options"]["addopts"][-1].split(" and ")
    suites = [c for c in _ci_commands() if c[:3] == ["python", "-m", "pytest"]]
    chosen = [set(c[c.index("-m", 3) + 1].split(" and ")) for c in suites]
    assert len(chosen) == 2 and all(c > set(left_out) for c in chosen)
