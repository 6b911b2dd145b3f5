"""`manyforms eval`: what a trained model is worth on held-out data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.errors import UserError, hint
from data_pipeline.open import open_data
from launcher.trained import load_trained
from training.objectives.choose import choose_objective
from training.validate import validate

SUITES = ("held-out",)


def evaluate(place: Path, suite: str, json_file: Path | None) -> dict[str, Any]:
    """Measure, print a line for each value, and write JSON if asked to.

    Raises:
        UserError: there is no such suite or run.
    """
    if suite not in SUITES:
        raise UserError(f"--suite: unknown suite '{suite}'{hint(suite, SUITES)}")
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json: {json_file.parent}: no such folder")
    trained = load_trained(place)
    config = trained.config
    data = open_data(config.data, config.model.kind, config.run.seed)
    objective = choose_objective(
        config.train.objective, trained.engine.model, data, config.run.seed
    )
    batch = config.train.micro_batch
    measured = validate(
        trained.engine,
        objective,
        data.validation,
        micro_batch=min(32, config.train.global_batch) if batch == "auto" else batch,
    )
    result = {"run": str(trained.folder), "step": trained.step, "suite": suite, **measured}
    print(f"{trained.folder}, step {trained.step}, {len(data.validation):,} held-out samples")
    for name, value in measured.items():
        print(f"  {name:<16}{value:.4f}")
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
        except OSError as error:
            raise UserError(f"--json: {json_file}: cannot be written: {error.strerror}") from None
    return result
