"""The seat at an engine: whose turn it is, how long a turn may take, and whether the engine can still be trusted."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from inference.engines.base import Engine, Job
from inference.errors import EngineHung, EngineLost, I2VError
from inference.task import GenerationRequest, Video


class Seat:
    """Lets `at_once` requests at an engine: a GPU generates for one at a time."""

    def __init__(self, engine: Engine, *, at_once: int = 1, limit_s: float = 1800, strict: bool = False) -> None:
        """`limit_s`: after which a generation counts as hung. `strict`: nothing generates on a suspect engine."""
        self._engine, self._limit_s, self._strict = engine, limit_s, strict
        self._free = anyio.Semaphore(at_once)
        self.hung = False  # a thread of the engine did not stop: nothing may generate here any more
        self._suspect = False  # the engine was lost, hung, or failed in a way nobody foresaw

    @property
    def lost(self) -> bool:
        """Nothing more may generate here."""
        return self.hung or (self._strict and self._suspect)

    @property
    def stages(self) -> Mapping[str, float]:
        """The engine's own stages, with each one's relative duration."""
        return self._engine.stages

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Waits for a turn, and keeps it for as long as the block runs: for all tries of one request."""
        async with self._free:
            yield

    async def generate(self, request: GenerationRequest, photo: Path, folder: Path, job: Job) -> Video:
        """One try, by whoever has the turn. Raises as Engine.generate, EngineHung, and EngineLost where it hung."""
        if self.hung:
            raise EngineLost("the engine of this worker is stuck")
        if self.lost:
            raise EngineLost("the engine of this worker failed, and is not trusted any more")
        try:
            with anyio.move_on_after(self._limit_s):
                return await self._engine.generate(request, photo, folder, job)
        except (anyio.get_cancelled_exc_class(), GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._suspect = self._suspect or isinstance(error, EngineLost) or not isinstance(error, I2VError)
            if isinstance(error, Exception):
                raise
            # A panic of a Rust extension, or a SystemExit: neither may take along whoever runs other requests here.
            raise EngineLost(f"the engine ended with {type(error).__name__}: {error}") from error
        finally:
            self.hung = self.hung or job.hung
            self._suspect = self._suspect or job.hung
        raise EngineHung(
            f"the {self._engine.name} engine made no video within {self._limit_s:g} s, which is I2V_ATTEMPT_LIMIT"
        )
