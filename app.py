"""Modal: `modal deploy app.py` is the whole deployment. Wiring only; all decisions are made in `inference/`.

    every minute   dispatch ──▶ leases what can start ──▶ Wan (GPU) or Overflow (Runway), one call a lease
    a container    beats ▸ photo ▸ generates ▸ uploads ▸ reports ▸ takes the next itself while there is one
    when called    calls ─────▶ /wake runs a tick now; /jobs/run takes that job and sends it (with I2V_PUSH_TOKEN)
    by hand        modal run app.py::process --help      modal run app.py::status

Settings are read from the environment and `.env` of whoever deploys, and travel in the images; keys come from the
Modal secret that is named as the app is. README.md has the commands.
"""

import sys
from contextlib import nullcontext
from typing import Any, Literal

import grpclib.exceptions
import modal
import modal.exception
import modal.experimental

from images.slim import slim_image
from images.wan import wan_image
from inference import logs, terminal
from inference.build.workers import build_ledger
from inference.errors import I2VError, one_line
from inference.fleet import opening, report, shape
from inference.on_modal import deployment, ticks
from inference.on_modal import one_off as one_offs
from inference.on_modal.container import ModalContainer
from inference.on_modal.lent import DictRecords, RemoteContainers, RemoteFunction
from inference.process import told_errors
from inference.providers import DEFAULT, EngineName, PoolName
from inference.settings import Settings

MINUTES = 60  # seconds

with told_errors(verbose=False) if modal.is_local() else nullcontext():
    settings = Settings.load()
    for line in settings.unread() if modal.is_local() else ():
        terminal.error(line)
    deployment.refuse_deployment(settings)
secret = modal.Secret.from_name(settings.modal_app, required_keys=deployment.keys_of(settings))
slim = slim_image(settings)
wan = wan_image(settings)
app = modal.App(settings.modal_app, secrets=[secret])

ERRORS = (modal.exception.Error, grpclib.exceptions.GRPCError, grpclib.exceptions.StreamTerminatedError, OSError)


def records() -> DictRecords:
    return DictRecords(modal.Dict.from_name(f"{settings.modal_app}-records", create_if_missing=True), ERRORS)


def pools() -> dict[PoolName, RemoteContainers]:
    """Of the deployed app, whichever app this runs in."""
    names: dict[PoolName, str] = {"gpu": "Wan", "runway": "Overflow"}
    return {
        pool: RemoteContainers(modal.Cls.from_name(settings.modal_app, name)().run, ERRORS)
        for pool, name in names.items()
    }


def tick_function() -> RemoteFunction:
    """Of the deployed app."""
    return RemoteFunction(modal.Function.from_name(settings.modal_app, "dispatch"), ERRORS)


@app.function(
    image=slim,
    schedule=modal.Cron(settings.modal_cron),
    max_containers=1,
    timeout=55,  # a tick stops leasing after 30 s, and ends before the next one
    scaledown_window=2,
    cpu=0.25,
    memory=512,
)
async def dispatch() -> str:
    """One tick: leases what can start, and sends each lease to a container."""
    logs.configure(settings.log_level)
    await ticks.begun(records())
    if settings.queue == "video_jobs":
        await ticks.sweep(settings)
    async with opening.open_dispatcher(settings, deployment.on_modal(settings), records(), pools()) as dispatcher:
        return await dispatcher.tick()


if deployment.takes_calls(settings):

    @app.function(
        image=slim,
        max_containers=2,
        timeout=deployment.calls_timeout_s(settings),
        scaledown_window=10,
        cpu=0.125,
        memory=256,
    )
    @modal.concurrent(max_inputs=100)
    @modal.asgi_app()
    def calls() -> Any:
        """`POST /wake`, `POST /jobs/run` and `GET /jobs/health`: checks who calls, hands on, and answers.

        With REDIS_URL also live progress: `/events/{project_id}` and `/ws/{project_id}`.
        """
        from inference.on_modal.calls import application  # noqa: PLC0415 - starlette is not where this is deployed from

        here = Settings.load()  # with what the secret holds
        pool = pools()[DEFAULT.pool]
        return application(here, deployment.on_modal(here), records(), pool, tick_function().spawn)


class Container:
    """What the containers of both pools do."""

    container: ModalContainer

    @modal.method()
    async def run(self, lease: dict[str, Any] | None, drain: bool = True) -> list[dict[str, Any]]:
        outcomes = await self.container.run(lease, drain=drain)
        if self.container.broken:
            await modal.experimental.stop_fetching_inputs.aio()
        return outcomes

    @modal.method()
    async def render(self, request: dict[str, Any], photo: bytes) -> dict[str, Any]:
        return await self.container.render(request, photo)

    @modal.exit()
    async def stop(self) -> None:
        await self.container.close()


@app.cls(
    image=wan,
    gpu=settings.modal_gpu,
    region=settings.modal_region,
    max_containers=settings.modal_max_containers,
    timeout=settings.modal_timeout_s,
    startup_timeout=settings.modal_startup_timeout_s,
    scaledown_window=2 if settings.modal_drain else max(2, int(settings.modal_linger_s)),  # else it lingers itself
    retries=0,  # the queue owns attempts
    cpu=4,
    memory=32 * 1024,
    enable_memory_snapshot=settings.modal_snapshot,
)
@modal.concurrent(max_inputs=shape.INPUTS)
class Wan(Container):
    """A GPU with the weights in its image."""

    by_hand: bool = modal.parameter(default=False)  # a person's own container: it is not of the fleet

    @modal.enter(snap=settings.modal_snapshot)
    def prepare(self) -> None:
        deployment.import_engine()  # seconds that a snapshot keeps; no GPU is there yet to load weights onto

    @modal.enter()
    async def start(self) -> None:
        self.container = ModalContainer(Settings.load(), records())  # anew: a snapshot may be older than its keys
        await self.container.open("gpu", "wan", drain=settings.modal_drain, by_hand=self.by_hand)


@app.cls(
    image=slim,
    max_containers=1,  # one process checks the budget
    timeout=int(settings.runway_timeout_s) + 20 * MINUTES,
    scaledown_window=2,
    retries=0,
    cpu=0.5,
    memory=1024,
)
@modal.concurrent(max_inputs=settings.runway_concurrency)
class Overflow(Container):
    """Runway, many clips in one small container."""

    by_hand: bool = modal.parameter(default=False)

    @modal.enter()
    async def start(self) -> None:
        self.container = ModalContainer(settings, records())
        await self.container.open("runway", "runway", by_hand=self.by_hand)


@app.function(image=slim, timeout=settings.modal_timeout_s, scaledown_window=2, cpu=1, memory=2048)
async def one_off(engine: EngineName, item_id: str, request: dict[str, Any] | None, photo: bytes | str) -> Any:
    """One task of the queue, or one photo without it; an error comes back as one line."""
    logs.configure(settings.log_level)
    kind: Any = Overflow if engine == "runway" else Wan
    remote = kind(by_hand=True)
    try:
        one_offs.refuse(settings, engine, request)
        if request is not None:
            found = await one_offs.fetch(settings, photo)
            if engine == "preview":
                return await one_offs.preview(settings, None, request, found)
            return await remote.render.remote.aio(request, found)
        async with one_offs.taken(settings, item_id) as lease:
            if engine == "preview":
                return await one_offs.preview(settings, lease, None, b"")
            return await remote.run.remote.aio(lease.model_dump(mode="json"), drain=False)
    except (I2VError, *ERRORS) as error:
        return {"error": one_line(str(error), 1000)}


@app.local_entrypoint()
def process(
    item_id: str = "",
    photo: str = "",
    photo_url: str = "",
    prompt: str = "",
    seconds: float = 5.0,
    seed: int | None = None,
    engine: Literal["wan", "runway", "preview"] = "wan",
) -> bytes | str:
    """Takes the next task now, or --item-id; with --photo or --photo-url makes one video, which `-w out.mp4` saves."""
    with told_errors(verbose=False):
        saves = any(argument.startswith(("-w", "--write-result")) for argument in sys.argv)
        request = one_offs.asked(photo, photo_url, prompt, seconds, seed, item_id=item_id, saves=saves)
        answer = one_off.remote(engine, item_id, request, one_offs.photo_bytes(photo) if photo else photo_url)
        return one_offs.tell(answer)


@app.function(image=slim, timeout=MINUTES, scaledown_window=2, cpu=0.25, memory=512)
async def look(forget: str) -> list[str] | dict[str, str]:
    """What `status` shows; an error comes back as one line."""
    try:
        if forget:
            await build_ledger(settings, records()).forget(forget)
        return await report.report(settings, deployment.on_modal(settings), records(), pools())
    except I2VError as error:
        return {"error": str(error)}


@app.local_entrypoint()
def status(forget: str = "") -> None:
    """The pools, the queue, the last ticks, today's money. --forget ITEM lets a payment in doubt be made again."""
    with told_errors(verbose=False):
        for line in one_offs.lines(look.remote(forget)):
            terminal.out.print(line, markup=False)
