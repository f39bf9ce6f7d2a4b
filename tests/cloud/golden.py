"""What a deployment asked Modal for, as a person would read it: no ids, and nothing that differs between machines."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from modal._serialization import deserialize, deserialize_data_format
from modal_proto import api_pb2

from tests.cloud.cloud import Cloud
from tests.cloud.objects import App, Function, Image
from tests.cloud.scheduler import Scheduler

MIB_PER_GIB = 1024
HOST = re.compile(r"(?<=://)[^/\s]+|(?:(?<=^FROM )|(?<=--from=))[\w-]+(?:\.[\w-]+)+(?::\d+)?(?=/)")
"""Of an index, or of a registry: where things are fetched from is the business of the machine."""


def render(cloud: Cloud) -> str:
    """All deployed apps. Layers are numbered in the order in which functions, by name, need them."""
    state, lines = cloud._state, []
    for app in sorted(cloud._plane.deployed.values(), key=lambda it: it.name):
        lines += [f"app {app.name}", *_indented(_app(state, app))]
    dicts = sorted(it.name for it in cloud._plane.dicts.values() if it.name)
    if dicts:
        lines += ["", f"dicts: {', '.join(dicts)}"]
    return "\n".join(lines) + "\n"


def _app(state: Scheduler, app: App) -> Iterator[str]:
    functions = [state.functions[id_] for _, id_ in sorted(app.function_ids.items())]
    layers: dict[str, Image] = {}
    for function in functions:
        layers |= {it.id: it for it in state.layers(function.definition.image_id)}
    numbers = {id_: number for number, id_ in enumerate(layers, 1)}
    users: dict[str, list[str]] = {}  # of each set of files: most functions have the same
    for function in functions:
        name = function.name.removesuffix(".*")
        yield from ("", f"{'class' if function.definition.is_class else 'function'} {name}")
        yield from _indented(_pairs(_facts(state, function, numbers)))
        users.setdefault(_files(state, function), []).append(name)
    for files, names in users.items():
        yield from ("", f"files of {', '.join(names)}")
        yield from _indented(files.splitlines())
    for image in layers.values():
        bases = [numbers[it.image_id] for it in image.recipe.base_images]
        on = f" on {', '.join(map(str, bases))}" if bases else ""
        yield from ("", f"layer {numbers[image.id]}{on}")
        yield from _indented(_layer(state, image))


def _facts(state: Scheduler, function: Function, numbers: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    of, resources = function.definition, function.definition.resources
    scale, placement = of.autoscaler_settings, of.scheduler_placement
    yield "methods", ", ".join(sorted(of.method_definitions))
    yield "parameters", ", ".join(it.name for it in of.class_parameter_info.schema)
    yield "schedule", function.schedule
    yield "gpu", ", else ".join(f"{it.count} x {it.gpu_type}" for it in function.gpus)
    yield "cpu", _range(resources.milli_cpu / 1000, resources.milli_cpu_max / 1000, "cores")
    yield "memory", _range(resources.memory_mb / MIB_PER_GIB, resources.memory_mb_max / MIB_PER_GIB, "GiB")
    yield "disk", _range(resources.ephemeral_disk_mb / MIB_PER_GIB, 0, "GiB")
    yield "timeout", _seconds(of.timeout_secs)
    yield "startup timeout", _seconds(of.startup_timeout_secs)
    yield "retries", str(of.retry_policy.retries)
    bounds = (("at least", "min_containers"), ("at most", "max_containers"), ("spare", "buffer_containers"))
    yield "containers", ", ".join(f"{word} {getattr(scale, it)}" for word, it in bounds if scale.HasField(it))
    yield "idle for", _seconds(scale.scaledown_window)
    inputs, target = of.max_concurrent_inputs, of.target_concurrent_inputs
    yield "inputs at once", f"{inputs}, aiming at {target}" if target else str(inputs or 1)
    yield "single use", "yes" if of.single_use_containers else ""
    yield "region", ", ".join(placement.regions)
    yield "cloud", of.cloud_provider_str
    yield "preemptible", "no" if placement.nonpreemptible else "yes"
    yield "network", "blocked" if of.block_network else ""
    yield "memory snapshot", "yes" if of.checkpointing_enabled else ""
    yield "experimental", ", ".join(f"{key}={value}" for key, value in sorted(of.experimental_options.items()))
    secrets = [state.secrets[it] for it in of.secret_ids]
    yield "secrets", ", ".join(f"{it.name} ({', '.join(sorted(it.required))})" for it in secrets if it.name)
    yield "variables", ", ".join(sorted(key for it in secrets if not it.name for key in it.values))
    yield "volumes", ", ".join(f"{state.volumes[it.volume_id]} at {it.mount_path}" for it in of.volume_mounts)
    yield "web", api_pb2.WebhookType.Name(of.webhook_config.type) if of.webhook_config.type else ""
    yield "layer", str(numbers[of.image_id])


def _layer(state: Scheduler, image: Image) -> Iterator[str]:
    recipe = image.recipe
    commands = [it for it in recipe.dockerfile_commands if it != "FROM base"]
    yield from (HOST.sub("…", line) for command in commands for line in command.splitlines())
    for file in recipe.context_files:
        digest = hashlib.sha256(file.data).hexdigest()[:12]
        yield f"with the file {file.filename}: {len(file.data.splitlines())} lines, sha256 {digest}"
    if recipe.context_mount_id:
        yield from ("with the files", *_indented(_by_folder(state.mounts[recipe.context_mount_id].files)))
    if recipe.gpu_config.count:
        yield f"built on {recipe.gpu_config.gpu_type}"
    if names := sorted(state.secrets[it].name or "(unnamed)" for it in recipe.secret_ids):
        yield f"with the secrets {', '.join(names)}"
    if image.function is not None:
        step, of = recipe.build_function, image.function.definition
        sent = step.input
        args, kwargs = deserialize_data_format(sent.args, sent.data_format, None) if sent.args else ((), {})
        called = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        yield f"run_function {of.module_name}.{of.function_name}({called})"
        yield from _indented(_pairs(_step(state, image.function, step)))


def _step(state: Scheduler, function: Function, step: api_pb2.BuildFunction) -> Iterator[tuple[str, str]]:
    """With what the arguments are, this is what makes Modal build the layer again."""
    of = function.definition
    lines = step.definition.splitlines()
    yield "source", f"{len(lines) - 1} lines, sha256 {hashlib.sha256(step.definition.encode()).hexdigest()[:12]}"
    known = deserialize(step.globals, None) if step.globals else {}
    yield "globals", ", ".join(f"{name}={_plain(value)}" for name, value in sorted(known.items()))
    yield "gpu", ", else ".join(f"{it.count} x {it.gpu_type}" for it in function.gpus)
    yield "timeout", _seconds(of.timeout_secs)
    yield "secrets", ", ".join(sorted(state.secrets[it].name or "(unnamed)" for it in of.secret_ids))
    yield "volumes", ", ".join(f"{state.volumes[it.volume_id]} at {it.mount_path}" for it in of.volume_mounts)
    # Which ones there are makes no difference to the layer; that those are there which a step imports, does.
    paths = [PurePosixPath(path) for it in of.mount_ids for path in state.mounts[it].files]
    yield "files below", ", ".join(sorted({str(PurePosixPath(*path.parts[:3])) for path in paths}))


def _plain(value: object) -> str:
    """Plain data as it is; of anything else the type, for it may say where on a machine it comes from."""
    plain = isinstance(value, (str, bytes, int, float, tuple, list, dict, set, frozenset, type(None)))
    return repr(value) if plain else f"({type(value).__name__})"


def _files(state: Scheduler, function: Function) -> str:
    paths = (path for it in function.definition.mount_ids for path in state.mounts[it].files)
    return "\n".join(_by_folder(paths))


def _by_folder(paths: Iterable[str]) -> Iterator[str]:
    """`/root/inference: __init__.py, task.py`."""
    folders: dict[str, list[str]] = {}
    for path in sorted(map(PurePosixPath, paths)):
        folders.setdefault(str(path.parent), []).append(path.name)
    return (f"{folder}: {', '.join(names)}" for folder, names in sorted(folders.items()))


def _pairs(facts: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, value in facts:
        if "\n" in value:
            yield from (f"{name}:", *_indented(value.splitlines()))
        elif value:
            yield f"{name}: {value}"


def _indented(lines: Iterable[str]) -> Iterator[str]:
    return (f"  {line}" if line else "" for line in lines)


def _range(least: float, most: float, unit: str) -> str:
    if not least and not most:
        return ""
    return f"{least:g} to {most:g} {unit}" if most else f"{least:g} {unit}"


def _seconds(seconds: int) -> str:
    if not seconds:
        return ""
    return f"{seconds // 60} min" if seconds % 60 == 0 else f"{seconds} s"
