"""Modal's control plane on loopback: what the real client and real containers ask, answered from memory.

Method names and messages are those of `modal_proto.api_grpc.ModalClientBase`. A call that is missing here is refused
and noted: add it when an app needs it.
"""
# ruff: noqa: N802 - the names in the protocol

import asyncio
import hashlib
import time
from collections import Counter
from contextvars import ContextVar
from functools import partial
from pathlib import Path

from google.protobuf.message import Message
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream
from modal._image import LATEST_IMAGE_BUILDER_VERSION
from modal._serialization import deserialize_data_format, serialize_data_format
from modal_proto import api_pb2
from modal_proto.api_grpc import ModalClientBase

from tests.cloud.containers import CALLER, Container
from tests.cloud.objects import App, Dict, Function, Image, Input, Mount, Secret
from tests.cloud.scheduler import FAILURE, SUCCESS, Scheduler, Settings

LONG_POLL_S = 5
LOG_POLL_S = 0.05
NOTHING_TO_DO = {"AppHeartbeat", "ContainerHello", "DictHeartbeat", "VolumeCommit"}

_caller = ContextVar("id of the container that called", default="")


class ControlPlane:
    """One workspace with one environment. All of it runs on the event loop of its server."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.scheduler = Scheduler(folder, settings)
        self.dicts: dict[str, Dict] = {}
        self.refusals = Counter()  # spawns still to refuse, by the name of the function
        self.deployed: dict[str, App] = {}  # by name

    # ------------------------------------------------------------ the server's side

    def __mapping__(self) -> dict[str, Handler]:
        """What grpclib asks a service for."""
        routes = type("Routes", (ModalClientBase,), dict.fromkeys(ModalClientBase.__abstractmethods__))()
        return {
            path: handler._replace(func=partial(self._answer, path.rpartition("/")[2], handler))
            for path, handler in routes.__mapping__().items()
        }

    async def _answer(self, name: str, handler: Handler, stream: Stream) -> None:
        request = await stream.recv_message()
        _caller.set(stream.metadata.get(CALLER, ""))
        method = getattr(self, name, None)
        if method is None:
            if name not in NOTHING_TO_DO:
                self.scheduler.complaints.append(f"a call this control plane does not know: {name}")
                raise GRPCError(Status.UNIMPLEMENTED, f"{name} is not part of tests/cloud")
            await stream.send_message(handler.reply_type())
        elif handler.cardinality is Cardinality.UNARY_STREAM:
            async for reply in method(request):
                await stream.send_message(reply)
        else:
            reply = await self._reply(name, method(request))
            await stream.send_message(handler.reply_type() if reply is None else reply)

    async def _reply(self, name, answer) -> Message | None:
        try:
            return await answer
        except (GRPCError, asyncio.CancelledError):
            raise
        except Exception as error:
            # The client tries most statuses again and again; of this one it lets its user know.
            self.scheduler.complaints.append(f"{name} failed: {error!r}")
            raise GRPCError(Status.FAILED_PRECONDITION, f"{name} failed: {error!r}") from error

    @property
    def _container(self) -> Container:
        return self.scheduler.containers[_caller.get()]

    # ------------------------------------------------------------ apps

    async def EnvironmentGetOrCreate(self, request):
        settings = api_pb2.EnvironmentSettings(image_builder_version=LATEST_IMAGE_BUILDER_VERSION)
        metadata = api_pb2.EnvironmentMetadata(name=request.deployment_name or "main", settings=settings)
        return api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    async def AppGetByDeploymentName(self, request):
        app = self.deployed.get(request.name)
        return api_pb2.AppGetByDeploymentNameResponse(app_id=app.id if app else "")

    async def AppGetLayout(self, request):
        return api_pb2.AppGetLayoutResponse(app_layout=self.scheduler.layout(self.scheduler.apps[request.app_id]))

    async def AppCreate(self, request):
        app = App(self.scheduler.new_id("ap"), request.description, request.app_state)
        self.scheduler.apps[app.id] = app
        return api_pb2.AppCreateResponse(app_id=app.id, app_page_url=f"https://modal.invalid/{app.id}")

    async def AppPublish(self, request):
        app = self.scheduler.apps[request.app_id]
        app.state = request.app_state
        app.function_ids, app.class_ids = dict(request.function_ids), dict(request.class_ids)
        if app.state == api_pb2.APP_STATE_DEPLOYED:
            app.name = request.name
            self.deployed[app.name] = app
        self.scheduler.changed()
        return api_pb2.AppPublishResponse(url=f"https://modal.invalid/{app.name}", deployed_at=time.time())

    async def AppClientDisconnect(self, request):
        app = self.scheduler.apps[request.app_id]
        if app.state == api_pb2.APP_STATE_EPHEMERAL:
            self.scheduler.stop(app)

    async def AppGetLogs(self, request):
        app = self.scheduler.apps[request.app_id]
        number = 0
        while True:
            containers = [it for it in self.scheduler.containers.values() if it.function.app is app]
            is_over = app.is_over and all(it.exit_code is not None for it in containers)
            for container, name, fd in [(it, *file) for it in containers for file in _LOG_FILES]:
                if text := _unread(app, container.folder / name):
                    number += 1
                    line = api_pb2.TaskLogs(data=text, file_descriptor=fd, timestamp=time.time())
                    yield api_pb2.TaskLogsBatch(task_id=container.id, items=[line], entry_id=str(number))
            if is_over:
                yield api_pb2.TaskLogsBatch(app_done=True)
                return
            await asyncio.sleep(LOG_POLL_S)

    # ------------------------------------------------------------ what functions are made of

    async def SecretList(self, _request):
        named = [
            api_pb2.SecretListItem(secret_id=it.id, metadata=api_pb2.SecretMetadata(name=it.name))
            for it in self.scheduler.secrets.values()
            if it.name
        ]
        return api_pb2.SecretListResponse(items=named)

    async def SecretGetOrCreate(self, request):
        secrets, name = self.scheduler.secrets, request.deployment_name
        if name:
            secret = next((it for it in secrets.values() if it.name == name), None)
            if secret is None:
                raise GRPCError(Status.NOT_FOUND, f"Secret '{name}' not found in environment 'main'")
            secret.required |= set(request.required_keys)
            if missing := sorted(set(request.required_keys) - secret.values.keys()):
                raise GRPCError(Status.FAILED_PRECONDITION, f"Secret '{name}' is missing key(s): {', '.join(missing)}")
        else:
            secret = self.add_secret("", dict(request.env_dict))
        metadata = api_pb2.SecretMetadata(name=name, keys=sorted(secret.values))
        return api_pb2.SecretGetOrCreateResponse(secret_id=secret.id, metadata=metadata)

    def add_secret(self, name: str, values: dict[str, str]) -> Secret:
        """One a person made, or one that an app brings along."""
        there = next((it for it in self.scheduler.secrets.values() if name and it.name == name), None)
        secret = Secret(there.id if there else self.scheduler.new_id("st"), name, values)
        self.scheduler.secrets[secret.id] = secret
        return secret

    async def MountBatchedCheckExistence(self, request):
        missing = [it for it in request.sha256_hex_hashes if it not in self.scheduler.uploads]
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def MountPutFile(self, request):
        self.scheduler.uploads[request.sha256_hex] = request.data
        return api_pb2.MountPutFileResponse(exists=True)

    async def MountGetOrCreate(self, request):
        files = {it.filename: it.sha256_hex for it in request.files}
        mount = Mount(self.scheduler.new_id("mo"), request.deployment_name, files)
        self.scheduler.mounts[mount.id] = mount
        handle = api_pb2.MountHandleMetadata(content_checksum_sha256_hex=_digest(repr(sorted(files.items())).encode()))
        return api_pb2.MountGetOrCreateResponse(mount_id=mount.id, handle_metadata=handle)

    async def VolumeGetOrCreate(self, request):
        volume_id = f"vo-{request.deployment_name or self.scheduler.new_id('anonymous')}"
        self.scheduler.volumes[volume_id] = request.deployment_name
        metadata = api_pb2.VolumeMetadata(name=request.deployment_name)
        return api_pb2.VolumeGetOrCreateResponse(volume_id=volume_id, metadata=metadata)

    async def ImageGetOrCreate(self, request):
        recipe = api_pb2.Image()
        recipe.CopyFrom(request.image)
        if mount := self.scheduler.mounts.get(recipe.context_mount_id):
            recipe.context_mount_id = repr(sorted(mount.files.items()))  # what is in it counts, not its id
        for index, id_ in enumerate(recipe.secret_ids):
            recipe.secret_ids[index] = self.scheduler.secrets[id_].name
        image_id = f"im-{_digest(recipe.SerializeToString(deterministic=True))[:16]}"
        builder = self.scheduler.functions.get(request.build_function_id)
        self.scheduler.images[image_id] = Image(image_id, request.image, builder)
        metadata = api_pb2.ImageMetadata(image_builder_version=request.builder_version)
        result = api_pb2.GenericResult(status=SUCCESS)
        return api_pb2.ImageGetOrCreateResponse(image_id=image_id, result=result, metadata=metadata)

    async def FunctionPrecreate(self, request):
        definition = api_pb2.Function(
            function_name=request.function_name,
            function_type=request.function_type,
            method_definitions=request.method_definitions,
            webhook_config=request.webhook_config,
            supported_input_formats=request.supported_input_formats,
            supported_output_formats=request.supported_output_formats,
        )
        function = self._function(request)
        if not request.existing_function_id:
            function.definition = definition
        return api_pb2.FunctionPrecreateResponse(function_id=function.id, handle_metadata=function.handle())

    async def FunctionCreate(self, request):
        function = self._function(request)
        ranked = [it.function for it in request.function_data.ranked_functions] or [request.function]
        function.definition = ranked[0]
        function.gpus = [it.resources.gpu_config for it in ranked if it.resources.gpu_config.count]
        function.crashes_in_a_row = 0
        data = api_pb2.FunctionData()
        data.CopyFrom(request.function_data)
        if not data.ranked_functions:
            data.ranked_functions.add(function=request.function)
        return api_pb2.FunctionCreateResponse(
            function_id=function.id, function=ranked[0], function_data=data, handle_metadata=function.handle()
        )

    def _function(self, request: api_pb2.FunctionPrecreateRequest | api_pb2.FunctionCreateRequest) -> Function:
        functions = self.scheduler.functions
        if request.existing_function_id not in functions:
            name = getattr(request, "function_name", "")
            function = Function(self.scheduler.new_id("fu"), self.scheduler.apps[request.app_id], name)
            functions[function.id] = function
            return function
        return functions[request.existing_function_id]

    async def ClassCreate(self, request):
        class_id = request.existing_class_id or self.scheduler.new_id("cs")
        return api_pb2.ClassCreateResponse(class_id=class_id, handle_metadata=api_pb2.ClassHandleMetadata())

    async def ClassGet(self, request):
        self._deployed(request.app_name, f"{request.object_tag}.*")
        return api_pb2.ClassGetResponse(class_id=self.scheduler.new_id("cs"))

    async def FunctionGet(self, request):
        function = self._deployed(request.app_name, request.object_tag)
        data = api_pb2.FunctionData(ranked_functions=[api_pb2.FunctionData.RankedFunction()])
        data.ranked_functions[0].function.CopyFrom(function.definition)
        return api_pb2.FunctionGetResponse(function_id=function.id, handle_metadata=function.handle(), function=data)

    def _deployed(self, app_name, tag):
        app = self.deployed.get(app_name)
        if app is None or tag not in app.function_ids:
            raise GRPCError(Status.NOT_FOUND, f"App {app_name!r} with {tag!r} not found")
        return self.scheduler.functions[app.function_ids[tag]]

    async def FunctionBindParams(self, request):
        base = self.scheduler.functions[request.function_id]
        bound_id = f"fu-{_digest(request.SerializeToString(deterministic=True))[:16]}"
        if bound_id not in self.scheduler.functions:
            bound = Function(bound_id, base.app, base.name, base.definition, base.gpus, request.serialized_params)
            self.scheduler.functions[bound_id] = bound
        return api_pb2.FunctionBindParamsResponse(bound_function_id=bound_id, handle_metadata=base.handle())

    # ------------------------------------------------------------ calls

    async def FunctionMap(self, request):
        function = self.scheduler.functions[request.function_id]
        if self.refusals[function.name] > 0:
            self.refusals[function.name] -= 1
            raise GRPCError(Status.RESOURCE_EXHAUSTED, f"too many inputs wait for {function.name}")
        call_id = self.scheduler.new_id("fc")
        return api_pb2.FunctionMapResponse(
            function_call_id=call_id,
            function_call_jwt=call_id,
            pipelined_inputs=self._put(
                function, call_id, request.pipelined_inputs, request.function_call_invocation_type
            ),
            retry_policy=function.definition.retry_policy,
        )

    async def FunctionPutInputs(self, request):
        function = self.scheduler.functions[request.function_id]
        return api_pb2.FunctionPutInputsResponse(inputs=self._put(function, request.function_call_id, request.inputs))

    def _put(self, function, call_id, items, invocation=0) -> list[api_pb2.FunctionPutInputsResponseItem]:
        put = [Input(self.scheduler.new_id("in"), call_id, function, it.input, it.idx, invocation) for it in items]
        for item in put:
            self.scheduler.put(item)
        return [api_pb2.FunctionPutInputsResponseItem(idx=it.index, input_id=it.id, input_jwt=it.id) for it in put]

    async def FunctionGetOutputs(self, request):
        give_up_at = time.monotonic() + min(request.timeout, LONG_POLL_S)
        while True:
            of_call = [it for it in self.scheduler.inputs.values() if it.call_id == request.function_call_id]
            wanted = [
                it
                for it in of_call
                if it.has_ended
                and not (request.HasField("start_idx") and it.index < request.start_idx)
                and not (request.HasField("end_idx") and it.index > request.end_idx)
            ]
            left_s = give_up_at - time.monotonic()
            if wanted or left_s <= 0:
                break
            await self.scheduler.wait(left_s)
        outputs = [
            api_pb2.FunctionGetOutputsItem(
                result=it.result, idx=it.index, input_id=it.id, data_format=it.data_format, retry_count=it.retries
            )
            for it in wanted
        ]
        unfinished = sum(not it.has_ended for it in of_call)
        return api_pb2.FunctionGetOutputsResponse(outputs=outputs, num_unfinished_inputs=unfinished)

    async def FunctionCallGetDataIn(self, request):
        """What whoever called over HTTP sent: its whole body at once."""
        item = self.scheduler.of_call(request.function_call_id)
        message = {"type": "http.request", "body": item.request, "more_body": False}
        if request.last_index < 1:
            data = serialize_data_format(message, api_pb2.DATA_FORMAT_ASGI)
            yield api_pb2.DataChunk(data_format=api_pb2.DATA_FORMAT_ASGI, data=data, index=1)
        while not item.has_ended:
            await self.scheduler.wait(LONG_POLL_S)

    async def FunctionCallPutDataOut(self, request):
        item = self.scheduler.of_call(request.function_call_id)
        item.messages += [deserialize_data_format(it.data, it.data_format, None) for it in request.data_chunks]
        self.scheduler.changed()

    async def FunctionCallCancel(self, request):
        self.scheduler.cancel(request.function_call_id)

    async def FunctionGetCurrentStats(self, request):
        function = self.scheduler.functions[request.function_id]
        running = sum(len(it.running) for it in function.live)
        return api_pb2.FunctionStats(
            backlog=len(function.waiting),
            num_total_tasks=len(function.live),
            num_running_inputs=running,
            input_headroom=max(0, len(function.live) * function.slots - running),
        )

    # ------------------------------------------------------------ containers

    async def ContainerHeartbeat(self, _request):
        reply = api_pb2.ContainerHeartbeatResponse()
        if cancelled := self._container.cancelled & self._container.running.keys():
            reply.cancel_input_event.input_ids.extend(cancelled)
        return reply

    async def ContainerStop(self, _request):
        self._container.is_leaving = True  # it ends what it has
        self.scheduler.changed()
        return api_pb2.ContainerStopResponse()

    async def TaskResult(self, request):
        if request.result.status == FAILURE:
            self._container.failure = request.result

    async def FunctionGetDynamicConcurrency(self, request):
        return api_pb2.FunctionGetDynamicConcurrencyResponse(concurrency=request.max_concurrency)

    async def FunctionGetInputs(self, _request):
        item = await self.scheduler.take(self._container)
        if item is None:
            return api_pb2.FunctionGetInputsResponse(inputs=[api_pb2.FunctionGetInputsItem(kill_switch=True)])
        found = api_pb2.FunctionGetInputsItem(
            input_id=item.id,
            input=item.message,
            function_call_id=item.call_id,
            function_call_invocation_type=item.invocation,
            retry_count=item.retries,
        )
        return api_pb2.FunctionGetInputsResponse(inputs=[found])

    async def FunctionPutOutputs(self, request):
        for output in request.outputs:
            self.scheduler.finish(self._container, output)

    # ------------------------------------------------------------ dicts

    async def DictGetOrCreate(self, request):
        name = request.deployment_name
        if name and f"di-{name}" not in self.dicts and not request.object_creation_type:
            raise GRPCError(Status.NOT_FOUND, f"Dict '{name}' not found in environment 'main'")
        dict_id = f"di-{name or self.scheduler.new_id('anonymous')}"
        self.dicts.setdefault(dict_id, Dict(dict_id, name))
        return api_pb2.DictGetOrCreateResponse(dict_id=dict_id, metadata=api_pb2.DictMetadata(name=name))

    async def DictUpdate(self, request):
        entries = self.dicts[request.dict_id].entries
        updates = {it.key: it.value for it in request.updates}
        if request.if_not_exists:
            updates = {key: value for key, value in updates.items() if key not in entries}
        entries |= updates
        return api_pb2.DictUpdateResponse(created=bool(updates))

    async def DictGet(self, request):
        value = self.dicts[request.dict_id].entries.get(request.key)
        return api_pb2.DictGetResponse(found=value is not None, value=value)

    async def DictPop(self, request):
        value = self.dicts[request.dict_id].entries.pop(request.key, None)
        return api_pb2.DictPopResponse(found=value is not None, value=value)

    async def DictContains(self, request):
        return api_pb2.DictContainsResponse(found=request.key in self.dicts[request.dict_id].entries)

    async def DictLen(self, request):
        return api_pb2.DictLenResponse(len=len(self.dicts[request.dict_id].entries))

    async def DictClear(self, request):
        self.dicts[request.dict_id].entries.clear()

    async def DictContents(self, request):
        for key, value in list(self.dicts[request.dict_id].entries.items()):
            # Keys come along even when only values were asked for: the client names them in its errors.
            yield api_pb2.DictEntry(key=key, value=value)


_LOG_FILES = (("stdout", api_pb2.FILE_DESCRIPTOR_STDOUT), ("stderr", api_pb2.FILE_DESCRIPTOR_STDERR))


def _unread(app: App, file: Path) -> str:
    with file.open("rb") as opened:
        opened.seek(app.log_offsets.get(str(file), 0))
        content = opened.read()
        app.log_offsets[str(file)] = opened.tell()
    return content.decode(errors="replace")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
