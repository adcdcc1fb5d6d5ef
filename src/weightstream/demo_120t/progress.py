"""What a demonstration has done so far, in its folder: it goes on from there if it is killed itself and run again."""

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from weightstream.errors import ConfigError

STEPS, LEAST_STEPS, KILLS = 24, 8, 3
_FILE = "demo.json"
_PARTIAL = f"{_FILE}.partial"

Facts = dict[str, Any]


@dataclass(slots=True)
class Progress:
    """How far it is.

    `planned` are the moments of the kills: after which step, and after which part of the next one. `kills` are those that
    were carried out; `done` has what each part that is done came to; `disk_bytes` is the most that the files took;
    `seconds` are those of all calls.
    """

    steps: int
    sizes: dict[str, int]
    planned: list[tuple[int, float]]
    kills: list[Facts] = field(default_factory=list)
    done: dict[str, Facts] = field(default_factory=dict)
    disk_bytes: int = 0
    seconds: float = 0.0

    @classmethod
    def new(cls, steps: int, sizes: dict[str, int]) -> Self:
        """A demonstration with kills at random moments of its last third.

        Raises:
            ConfigError: fewer steps than that needs.
        """
        if steps < LEAST_STEPS:
            raise ConfigError(
                f"demo 120t: --steps must be at least {LEAST_STEPS}, so that it can be killed {KILLS} times, found {steps}"
            )
        chance = random.SystemRandom()
        found = cls(steps, sizes, [])
        after = sorted(chance.sample(range(found.before, steps - 1), KILLS))
        found.planned = [(step, chance.random()) for step in after]
        return found

    @classmethod
    def begun(cls, folder: Path, steps: int | None, sizes: dict[str, int]) -> Self:
        """What was begun in a folder; a beginning if nothing was.

        Raises:
            ConfigError: the folder holds something else, or a demonstration of another size.
        """
        if (folder / _FILE).is_file():
            try:
                found = cls(**json.loads((folder / _FILE).read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"'{folder / _FILE}', which says how far the demonstration is, cannot be read: {error}; give another --out"
                ) from None
            if steps not in (None, found.steps) or sizes != found.sizes:
                raise ConfigError(
                    f"'{folder}' holds a demonstration of {found.steps} steps, this one is to have {steps}; leave --steps "
                    f"out to go on with it, or give another --out"
                )
            return found
        if folder.exists() and any(path.name != _PARTIAL for path in folder.iterdir()):  # one that was ended at once
            raise ConfigError(f"'{folder}' holds something else; give an --out that is new or empty")
        progress = cls.new(STEPS if steps is None else steps, sizes)
        folder.mkdir(parents=True, exist_ok=True)
        progress.save(folder)
        return progress

    @property
    def before(self) -> int:
        """The step after which kills begin: the steps from there on are taken twice, and their files are there twice."""
        return min(2 * self.steps // 3, self.steps - KILLS - 1)

    def save(self, folder: Path) -> None:
        partial = folder / _PARTIAL
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / _FILE)
