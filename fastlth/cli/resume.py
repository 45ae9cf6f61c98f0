"""``fastlth resume RUN``: go on with a stopped search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlth.cli.options import DataDir, Json, Log

EXAMPLE = "Example: fastlth resume runs/vgg19-cifar-10-2997fc99/r0"


def resume(
    run: Annotated[Path, typer.Argument(help="A run folder (r<seed>), as the stopped command printed it.")],
    data_dir: DataDir = None,
    log: Log = None,
    json: Json = False,
) -> None:
    """Go on from the very step at which a search was stopped, with the recipe it was started with."""
    from fastlth.cli.show import console, json_document, search_result
    from fastlth.running import processes
    from fastlth.running import resume as go_on
    from fastlth.ui import StopGuard, View

    screen = console()
    with processes(data_dir) as team, StopGuard() as guard, View(screen) as view:
        search = go_on(run, data_dir=data_dir, log=log or (), show=view, stopped=guard, team=team)
    search_result(search, screen)
    if json:
        json_document(search.to_json())
