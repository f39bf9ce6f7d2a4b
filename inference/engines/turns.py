"""Turns at an engine: who may use it now, for how long, and whether the engine is still healthy."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from inference.engines.base import Engine, Job
from inference.errors import EngineHung, EngineLost, I2VError
from inference.task import GenerationRequest, Video


class EngineTurns:
    """Lets `at_once` requests use an engine at the same time (a GPU: one); the others wait for their turn."""

    def __init__(self, engine: Engine, *, at_once: int = 1, limit_s: float = 1800, strict: bool = False) -> None:
        """`limit_s`: a longer generation counts as hung. `strict`: refuse to generate on a suspect engine."""
        self._engine, self._limit_s, self._strict = engine, limit_s, strict
        self._free = anyio.Semaphore(at_once)
        self.hung = False  # a thread of the engine did not stop: this process must not generate again
        self._suspect = False  # the engine was lost, hung, or raised an unexpected error

    @property
    def lost(self) -> bool:
        """Whether this process must not use the engine again."""
        return self.hung or (self._strict and self._suspect)

    @property
    def name(self) -> str:
        """The engine's."""
        return self._engine.name

    @property
    def stages(self) -> Mapping[str, float]:
        """The engine's own stages, with each one's relative duration."""
        return self._engine.stages

    async def check(self) -> None:
        """As Engine.check."""
        await self._engine.check()

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Waits for a turn and holds it for the length of the block, so for all attempts of one request."""
        async with self._free:
            yield

    async def generate(self, request: GenerationRequest, inputs: Mapping[str, Path], folder: Path, job: Job) -> Video:
        """One attempt; the caller holds a turn. Raises as Engine.generate, EngineHung, and EngineLost once it hung."""
        if self.hung:
            raise EngineLost("the engine of this worker is stuck")
        if self.lost:
            raise EngineLost("the engine of this worker failed, and is not trusted any more")
        try:
            with anyio.move_on_after(self._limit_s):
                return await self._engine.generate(request, inputs, folder, job)
        except (anyio.get_cancelled_exc_class(), GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._suspect = self._suspect or isinstance(error, EngineLost) or not isinstance(error, I2VError)
            if isinstance(error, Exception):
                raise
            # A panic of a Rust extension, or a SystemExit: neither may end the other requests of this process.
            raise EngineLost(f"the engine ended with {type(error).__name__}: {error}") from error
        finally:
            self.hung = self.hung or job.hung
            self._suspect = self._suspect or job.hung
        raise EngineHung(
            f"the {self._engine.name} engine made no video within {self._limit_s:g} s, which is I2V_ATTEMPT_LIMIT"
        )
