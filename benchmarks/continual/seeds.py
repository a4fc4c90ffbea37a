"""Seeds of an experiment, each kept in a file of its own as soon as it is done: a killed run goes on from there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

Result = dict[str, Any]


class ResultError(ValueError):
    """A file of an earlier run cannot be used."""


@dataclass(frozen=True)
class Workplace:
    """Where an experiment keeps its seeds, and which it runs.

    Attributes:
        folder: Of the results.
        name: Of the experiment.
        seeds: Of the runs that are reported.
        choice_seeds: Of those by which strengths are chosen; others.
        small: Whether fewer problems and strengths are run.
        settings: All that every run depends on; as JSON.
    """

    folder: Path
    name: str
    seeds: tuple[int, ...]
    choice_seeds: tuple[int, ...]
    small: bool
    settings: Mapping[str, Any]

    def run(
        self, part: str, seeds: Iterable[int], run: Callable[[int], Result], settings: Mapping[str, Any]
    ) -> list[Result]:
        """Return what `run` gives for each seed, of a part of the experiment with settings of its own."""
        every = json.loads(json.dumps({**self.settings, "small": self.small, **settings}))
        return run_seeds(self.folder, f"{self.name}-{part}" if part else self.name, every, seeds, run)


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

    Raises:
        ResultError: A seed's file is no JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in tqdm(list(seeds), desc=name, unit="seed"):
        path = folder / f"{name}-seed-{seed}.json"
        kept = _read(path) if path.exists() else {}
        if kept.get("settings") != settings:
            kept = {"settings": settings, "seed": seed, **run(seed)}
            write_json(path, kept)
        results.append(kept)
    return results


def _read(path: Path) -> Result:
    try:
        kept = json.loads(path.read_text())
    except ValueError as error:
        raise ResultError(
            f"{path} must be the result of a seed, got: {error}; delete it, and it is run again"
        ) from error
    return kept if isinstance(kept, dict) else {}


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as new:
        json.dump(content, new, indent=1)
        new.write("\n")
    os.chmod(new.name, 0o644)
    os.replace(new.name, path)
