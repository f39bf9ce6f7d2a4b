"""One prompt, from sending it to its end.

ComfyUI's websocket says how far a run is, and its history how it ended: messages are lost while a socket is down, and a
run that ended meanwhile is mentioned to nobody again. So the history is looked at every few seconds, whatever the
socket says or does not say, and right after a message about the end.
"""

import json
import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import anyio
import httpcore
import httpx
import structlog
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from httpx_ws import AsyncWebSocketSession, HTTPXWSException, aconnect_ws
from wsproto.events import TextMessage
from wsproto.utilities import ProtocolError

from inference.engines.base import Job
from inference.engines.comfyui.api import ComfyApi
from inference.engines.comfyui.graph import Graph
from inference.engines.comfyui.progress import RunProgress
from inference.engines.comfyui.refusals import OutOfMemory, failed, refused
from inference.errors import EngineFailed, I2VError
from inference.transfer.json_api import CONNECT_TIMEOUT_S, Unanswered
from inference.transfer.storage_errors import FOREIGN
from inference.transfer.tls import tls_context

log = structlog.get_logger(__name__)

Message = dict[str, Any]
Place = Literal["running", "waiting"]

SOCKET_ERRORS = (HTTPXWSException, ProtocolError, httpcore.NetworkError, httpcore.ProtocolError, *FOREIGN)
"""What ends a websocket: it was closed, refused, reset, or the other side does not speak the protocol."""

ENDS = {"execution_success", "execution_error", "execution_interrupted"}
"""Messages after which the history has the run, at once or a moment later."""

QUEUED_MESSAGES = 1000
"""How many messages wait to be read, while one request to the history takes longer than usual."""


class Run:
    """One graph at one ComfyUI. `id` and the client's id are this run's alone, so nothing of others is ever touched."""

    send_limit_s: ClassVar = 60.0  # for the answer to a prompt: validation looks for every file that the graph names
    send_tries: ClassVar = 3
    look_s: ClassVar = 2.0  # between two looks at the history, as long as the socket says nothing about the end
    end_s: ClassVar = 0.2  # between two looks once the run has ended
    lost_s: ClassVar = 1.0  # after a lost answer: a request that was carried out is in the queue by then
    gone_s: ClassVar = 3.0  # a prompt that is neither queued nor in the history for so long was forgotten
    socket_s: ClassVar = 3.0  # how long sending waits for the socket, which some proxies do not let through
    first_pause_s: ClassVar = 0.25  # between two connections; doubled from one to the next
    longest_pause_s: ClassVar = 5.0
    stop_s: ClassVar = 5.0  # how long stopping may take, which holds up whoever cancelled
    stop_pause_s: ClassVar = 0.2

    def __init__(
        self, api: ComfyApi, job: Job, graph: Graph, progress: RunProgress, *, of_task: bool, stages: tuple[str, str]
    ) -> None:
        """`of_task`: the graph is the task's and not the operator's template, which says whose fault an error is."""
        self._api, self._job, self._graph, self._progress = api, job, graph, progress
        self._of_task, (self._queue_stage, self._run_stage) = of_task, stages
        self.id = str(uuid.uuid4())
        self._client_id = uuid.uuid4().hex
        self._is_sent = False  # ComfyUI may have it, or may get it yet
        self._has_started = False
        self._absent_since: float | None = None
        self.node_errors: dict[str, Any] = {}  # outputs that ComfyUI leaves out because their nodes are wrong

    async def outputs(self) -> object:
        """Runs the graph and returns its outputs as the history has them. When it is cancelled, so is the run there.

        Raises OutOfMemory, and all that `refused` and `failed` make; ProviderUnavailable, EngineFailed.
        """
        outcome: object = None
        failure: Exception | None = None
        messages, heard = anyio.create_memory_object_stream[Message](QUEUED_MESSAGES)
        opened = anyio.Event()
        async with messages, heard, anyio.create_task_group() as tasks:
            tasks.start_soon(self._listen, messages, opened)
            try:
                with anyio.move_on_after(self.socket_s):
                    await opened.wait()
                if not opened.is_set():
                    log.warning(
                        "comfyui_no_websocket",
                        why="its address lets no websocket through, or not yet",
                        then="progress is told in coarse steps",
                    )
                await self._send()
                outcome = self._judged(await self._end(heard))
            except (I2VError, OutOfMemory) as error:  # out of the group, which would wrap it
                failure = error
                await self._withdraw()
            except BaseException:  # cancelled: on trio that can be a group, where a connection was just being made
                await self._withdraw()
                raise
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return outcome

    # Sending.

    async def _send(self) -> None:
        """Sends the prompt, never twice: after a lost answer it is looked for first.

        ComfyUI accepts an id that it has already, and runs it again.
        """
        for _ in range(self.send_tries):
            if await self._try_to_send():
                return
        raise EngineFailed(f"ComfyUI did not take the workflow in {self.send_tries} tries")

    async def _try_to_send(self) -> bool:
        self._job.raise_if_lease_ended()
        body = {"prompt": self._graph, "client_id": self._client_id, "prompt_id": self.id}
        self._is_sent = True
        try:
            answer = await self._api.ask("POST", "prompt", body, limit_s=self.send_limit_s)
        except Unanswered as error:
            if not error.sent:
                self._is_sent = False
                await self._api.get("queue")  # returns once it is back
                return False
            log.warning("comfyui_prompt_in_doubt", prompt_id=self.id, error=str(error))
            return await self._arrived()
        if answer.status == 200 and isinstance(answer.payload, dict):
            self.id = str(answer.payload.get("prompt_id") or self.id)  # before 2025-08 it makes an id of its own
            errors = answer.payload.get("node_errors")
            self.node_errors = errors if isinstance(errors, dict) else {}
            log.info("comfyui_sent", prompt_id=self.id)
            return True
        if answer.status >= 500 or answer.is_half:
            log.warning("comfyui_prompt_in_doubt", prompt_id=self.id, error=f"{answer.status} {answer.said}")
            return await self._arrived()
        self._is_sent = False
        if answer.status == 400:
            raise refused(self._graph, answer.payload, of_task=self._of_task)
        raise answer.error("a prompt")

    async def _arrived(self) -> bool:
        """Whether a prompt whose answer was lost is there. Two looks: the request may still be on its way."""
        for pause_s in (0.0, self.lost_s):
            await anyio.sleep(pause_s)
            if await self._history() is not None or await self._place() is not None:
                return True
        self._is_sent = False
        return False

    # Looking.

    async def _history(self) -> dict[str, Any] | None:
        """The run's entry, once it has ended."""
        entry = (await self._api.get(f"history/{self.id}")).get(self.id)
        return entry if isinstance(entry, dict) else None

    async def _place(self) -> Place | None:
        """Where in the queue it is."""
        return self._found_in(await self._api.get("queue"))

    def _found_in(self, queue: Mapping[str, Any]) -> Place | None:
        """Looks for our id, or for our client's: an old server gives a prompt an id that a lost answer leaves unknown.

        An entry is `[number, prompt id, graph, extra data with the client's id, …]` (`execution.py`).
        """
        places: tuple[tuple[Place, str], ...] = (("running", "queue_running"), ("waiting", "queue_pending"))
        for place, key in places:
            for item in queue.get(key) or []:
                if not isinstance(item, list) or len(item) < 4:
                    continue
                extra = item[3] if isinstance(item[3], dict) else {}
                if item[1] == self.id or extra.get("client_id") == self._client_id:
                    self.id = str(item[1])
                    return place
        return None

    async def _end(self, heard: MemoryObjectReceiveStream[Message]) -> dict[str, Any]:
        """Waits for the end, and returns the history's entry. Raises EngineFailed where ComfyUI forgot the run."""
        self._job.report(self._queue_stage)
        self._job.raise_if_cancelled()
        is_over = False
        look_at = anyio.current_time()
        while True:
            message: Message | None = None
            with anyio.move_on_at(look_at):
                message = await heard.receive()
            self._job.raise_if_cancelled()
            if message is not None and not self._hear(message):
                continue
            is_over = is_over or message is not None
            entry = await self._look()
            if entry is not None:
                return entry
            look_at = anyio.current_time() + (self.end_s if is_over else self.look_s)

    async def _look(self) -> dict[str, Any] | None:
        entry = await self._history()
        if entry is not None:
            return entry
        place = await self._place()
        if place == "running" and not self._has_started:
            self._report()
            self._job.raise_if_cancelled()
        if place is not None:
            self._absent_since = None
            return None
        now = anyio.current_time()
        self._absent_since = now if self._absent_since is None else self._absent_since
        if now - self._absent_since >= self.gone_s:  # not at the first look: it may have ended between both requests
            self._is_sent = False
            raise EngineFailed("ComfyUI forgot the workflow: it was restarted, or its queue or history was cleared")
        return None

    def _hear(self, message: Message) -> bool:
        """Takes one message. Returns whether it says that the run has ended."""
        kind, data = message.get("type"), message.get("data")
        if not isinstance(kind, str) or not isinstance(data, dict) or data.get("prompt_id") != self.id:
            return False  # `progress_state` and `status` go to every client, about every client's prompts
        if self._progress.hear(kind, data) or kind == "execution_start":
            self._report()
            self._job.raise_if_cancelled()
        return kind in ENDS or (kind == "executing" and data.get("node") is None)

    def _report(self) -> None:
        self._has_started = True
        self._job.report(self._run_stage, self._progress.done, self._progress.total, self._progress.detail)

    def _judged(self, entry: Mapping[str, Any]) -> object:
        """The outputs of a run that went well. Raises as `outputs`."""
        self._is_sent = False
        status = entry.get("status")
        status = status if isinstance(status, dict) else {}
        messages = status.get("messages")
        for message in reversed(messages if isinstance(messages, list) else []):
            if not isinstance(message, list) or len(message) != 2 or not isinstance(message[1], dict):
                continue
            if message[0] == "execution_interrupted":
                raise EngineFailed("somebody interrupted the workflow in ComfyUI")
            if message[0] == "execution_error":
                raise failed(self._graph, message[1], of_task=self._of_task)
        if status.get("status_str") == "error":
            raise EngineFailed("ComfyUI could not run the workflow, and does not say why")
        self._progress.finish()
        self._report()
        self._job.raise_if_cancelled()
        return entry.get("outputs")

    # Stopping.

    async def _withdraw(self) -> None:
        """Takes the prompt away where it waits, or interrupts it where it runs, and makes sure that it is gone.

        `/interrupt` with an id leaves other runs alone. Servers from before 2025-08 ignore the id, so it is sent only
        while our own run is the one that runs.
        """
        if not self._is_sent:
            return
        with anyio.move_on_after(self.stop_s, shield=True) as limit:
            try:
                if await self._is_withdrawn():
                    log.info("comfyui_stopped", prompt_id=self.id)
                    return
            except Unanswered as error:
                log.warning("comfyui_may_still_run", prompt_id=self.id, error=str(error))
        if limit.cancelled_caught:
            log.warning("comfyui_may_still_run", prompt_id=self.id, error=f"not gone after {self.stop_s:g} s")

    async def _is_withdrawn(self) -> bool:
        """Returns once it is in nobody's way any more; two looks, since a prompt may still be on its way there."""
        absent = 0
        while absent < 2:
            answer = await self._api.ask("GET", "queue")
            place = self._found_in(answer.payload if isinstance(answer.payload, dict) else {})
            if place == "waiting":
                await self._api.ask("POST", "queue", {"delete": [self.id]})
            elif place == "running":
                await self._api.ask("POST", "interrupt", {"prompt_id": self.id})
            absent = absent + 1 if place is None and answer.status == 200 else 0
            if absent < 2:
                await anyio.sleep(self.stop_pause_s)
        return True

    # The websocket.

    async def _listen(self, messages: MemoryObjectSendStream[Message], opened: anyio.Event) -> None:
        """Passes on what the server says, and connects again whenever the connection ends."""
        pause_s = self.first_pause_s

        def is_open() -> None:
            nonlocal pause_s
            pause_s = self.first_pause_s
            opened.set()

        while True:
            try:
                await self._hear_all(messages, is_open)
            except* SOCKET_ERRORS as errors:
                log.debug("comfyui_socket_ended", prompt_id=self.id, error=repr(errors.exceptions[0]))
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, self.longest_pause_s)

    async def _hear_all(self, messages: MemoryObjectSendStream[Message], is_open: Callable[[], None]) -> None:
        """One connection, to its end. The client's id makes ComfyUI go on with the messages of a run that goes on."""
        url = f"{self._api.url}/ws"
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)  # a run may say nothing for long: pings find the end
        async with (
            httpx.AsyncClient(timeout=timeout, trust_env=url.startswith("https:"), verify=tls_context()) as client,
            aconnect_ws(
                url, client, params={"clientId": self._client_id}, session_class=AsyncWebSocketSession
            ) as socket,
        ):
            is_open()
            while True:
                event = await socket.receive()
                if isinstance(event, TextMessage):  # binary ones are pictures, for people who watch
                    try:
                        message = json.loads(event.data)
                    except (ValueError, RecursionError):
                        continue
                    if isinstance(message, dict):
                        await messages.send(message)
