"""Seeds of an experiment, each kept in a file of its own as soon as it is done: a killed run goes on from there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

Result = dict[str, Any]


def run_seeds(
    folder: Path, name: str, settings: dict[str, Any], seeds: Iterable[int], run: Callable[[int], Result]
) -> list[Result]:
    """Return what `run` gives for each seed; those that a file holds for the same settings are not run again.

    Args:
        folder: Keeps `<name>-seed-<seed>.json`.
        name: Of the experiment.
        settings: All that the result depends on but the seed; as JSON.
        seeds: Seeds.
        run: Runs one seed; its result must be JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in tqdm(list(seeds), desc=name, unit="seed"):
        path = folder / f"{name}-seed-{seed}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("settings") != settings:
            kept = {"settings": settings, "seed": seed, **run(seed)}
            write_json(path, kept)
        results.append(kept)
    return results


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as new:
        json.dump(content, new, indent=1)
        new.write("\n")
    os.chmod(new.name, 0o644)
    os.replace(new.name, path)
