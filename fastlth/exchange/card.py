"""The folder of ``--format hf``: what its configuration and its card say. Nothing here needs a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastlth.recipe import Recipe

CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"
FILES = (CONFIG, WEIGHTS, README)

_CARD = """\
---
library_name: fastlth
pipeline_tag: image-classification
tags:
- lottery-ticket
- pruning
- sparsity
- image-classification
---

# {model} on {dataset}: a lottery ticket at density {density:.2%}

{kind} of round {round} of a lottery-ticket search with fastlth {version}: {kept:,} prunable weights
are kept, at their values of iteration {rewind_to:,} of the search. The net is **not trained**: train it, with the
pruned weights held at zero.
{results}
`{weights}` holds every parameter and buffer under its own name, pruned weights as zeros, and a bool
`<name>_mask` (true = kept) for each prunable weight. `{config}` holds the recipe, digest `{digest}`.

```python
import json
from pathlib import Path

from fastlth import Recipe
from fastlth.models import build
from safetensors.torch import load_file

recipe = Recipe.from_dict(json.loads(Path("{config}").read_text())["recipe"])
tensors = load_file("{weights}")
masks = {{name.removesuffix("_mask"): t for name, t in tensors.items() if name.endswith("_mask")}}
net = build(recipe)
net.load_state_dict({{name: t for name, t in tensors.items() if not name.endswith("_mask")}})
```

`fastlth ticket import {weights} search.ticket --format safetensors` makes a ticket file of it again.
"""

_RESULTS = """
| trained by fastlth, this round | |
|---|---|
| iteration of early stop | {early_stop_iteration:,} |
| test accuracy there | {early_stop_test_accuracy:.2%} |
| test accuracy at the end | {test_accuracy:.2%} |
"""


def config(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """config.json: ``facts`` and the net's shape."""
    data = recipe.data.facts
    document = {
        "library_name": "fastlth", "model_type": recipe.model.name, "image_shape": list(data.shape),
        "num_labels": data.classes, **facts,
    }  # fmt: skip
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def readme(recipe: Recipe, facts: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The card; ``result`` is the round's entry of ``find-ticket --json``, with null for what was not measured."""
    fields = ("early_stop_iteration", "early_stop_test_accuracy", "test_accuracy")
    measured = all(result.get(field) is not None for field in fields)
    return _CARD.format(
        model=recipe.model.name, dataset=recipe.data.name, density=facts["density"], kept=facts["kept"],
        kind="The ticket" if facts["round"] else "The dense net", round=facts["round"],
        version=facts["fastlth_version"], rewind_to=recipe.prune.rewind_to, weights=WEIGHTS, config=CONFIG,
        digest=recipe.digest, results=_RESULTS.format_map(result) if measured else "",
    )  # fmt: skip
