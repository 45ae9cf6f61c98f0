"""``fastlth doctor``: what is installed, what will be used, and why."""

from __future__ import annotations

from fastlth.cli.options import DataDir, Json

EXAMPLE = "Example: fastlth doctor"


def doctor(data_dir: DataDir = None, json: Json = False) -> None:
    """What is installed, what will be used, and why."""
    import os
    import platform
    import shutil
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import fastlth
    from fastlth.catalogue import DATASETS
    from fastlth.cli.show import console, json_document
    from fastlth.data import ffcv
    from fastlth.data.sources import data_root, state
    from fastlth.training import available

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    chosen = available.device("auto")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    root = data_root(data_dir)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    report = {
        "fastlth": fastlth.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{p: installed(p) for p in ("torch", "torchvision", "triton", "numpy", "numba", "ffcv")},
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpus": ", ".join(gpus) or "none",
        "device": f"{chosen} ({'a GPU is there' if chosen != 'cpu' else 'no GPU that torch can use'})",
        "precision": "bf16 where it trains at least a quarter faster than fp32, timed when a run begins",
        "compile": "tried in searches of more than half an hour, kept where it is faster" if compiler or gpus
                   else "off: no C++ compiler found; install one to use torch.compile",
        "loader": "resident: the data sets fit in memory; --loader ffcv streams "
                  + (f"(not possible: {reason})" if (reason := ffcv.available()) else "(ready)"),
        **{f"data: {name}": f"{state(name, root)} in {root}" for name in DATASETS},
    }  # fmt: skip
    if json:
        json_document(report)
        return
    screen = console()
    width = max(map(len, report))
    for key, value in report.items():
        screen.print(f"{key:<{width}}  {value}", highlight=False, soft_wrap=True)
