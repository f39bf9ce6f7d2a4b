"""The offline Modal itself: a toy app goes through all that a real one may meet."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.cloud import golden
from tests.cloud.cloud import Cloud
from tests.cloud.containers import make_interpreter
from tests.support.processes import until

pytestmark = pytest.mark.slow
"""It is used by tests/on_modal/test_deployment.py; these are for whoever changes it."""

APP = '''
import asyncio, os
from threading import Event
import modal

REVISION = "r1"

def wait(seconds):
    """Without a sleep, which a signal would interrupt no better."""
    Event().wait(seconds)

def download(name: str, *, quick: bool):
    """A build step: it runs on Modal, while the image is built."""
    open("/weights", "w").write(name + REVISION)

image = (
    modal.Image.debian_slim(python_version="3.11")
    .env({"GREETING": "hello there", "HF_HUB_OFFLINE": "1"})
    .pip_install("httpx==0.28.1")
    .run_function(download, args=("tiny",), kwargs={"quick": True})
    .add_local_python_source("toypack")
)
secret = modal.Secret.from_name("queue", required_keys=["QUEUE_URL"])
app = modal.App("toy", image=image, secrets=[secret])
flights = modal.Dict.from_name("toy-flights", create_if_missing=True)

@app.function(schedule=modal.Cron("*/5 * * * *"), max_containers=1, timeout=60)
def dispatch():
    stats = Model().generate.get_current_stats()
    counts = [stats.backlog, stats.num_total_runners, stats.num_running_inputs, stats.input_headroom]
    if not flights.put("first", os.environ["QUEUE_URL"], skip_if_exists=True):
        return counts
    call = Model().generate.spawn(3)
    flights["call"] = call.object_id
    return counts

@app.cls(gpu=["L40S", "A100"], max_containers=2, scaledown_window=60, timeout=900, startup_timeout=600, retries=0)
@modal.concurrent(max_inputs=2)
class Model:
    @modal.enter()
    def load(self):
        import toypack
        self.factor = toypack.FACTOR
        print("entered with", os.environ["GREETING"], flush=True)

    @modal.exit()
    def leave(self):
        print("left", flush=True)

    @modal.method()
    async def generate(self, number: int):
        return number * self.factor

    @modal.method()
    async def meet(self, name: str, other: str):
        """Ends when both are in it at once."""
        await flights.put.aio(name, modal.current_input_id())
        while not await flights.contains.aio(other):
            await asyncio.sleep(0.05)
        return os.environ["MODAL_TASK_ID"]

    @modal.method()
    async def hold(self, key: str):
        """Held by its first container until something happens to it; the next one gets through."""
        try:
            if await flights.put.aio(key, modal.current_input_id(), skip_if_exists=True):
                await asyncio.sleep(60)
            return modal.current_input_id()
        except asyncio.CancelledError:
            print("cancelled", flush=True)
            raise

@app.cls(max_containers=1)
class Single:
    @modal.exit()
    def leave(self):
        print("left", flush=True)

    @modal.method()
    def hold(self, key: str, stubborn: bool = False):
        try:
            if flights.put(key, modal.current_input_id(), skip_if_exists=True):
                wait(60)
            return modal.current_input_id()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            if stubborn:
                wait(60)
            raise

@app.function(max_containers=1, region="eu", nonpreemptible=True, env={"MODE": "test"}, cpu=0.5, memory=512)
def spawner():
    Model().generate.spawn(1)

@app.function()
def scribble():
    """Every operation of a dict."""
    pad = modal.Dict.from_name("pad", create_if_missing=True)
    pad.clear()
    pad.update(a=1, b=2, c=3)
    said = [pad.put("a", 9, skip_if_exists=True), pad.len(), pad.pop("b"), pad.contains("b"), pad.get("b", "none")]
    return [*said, sorted(pad.items()), sorted(pad.keys()), sorted(pad.values())]

@app.function()
def process(item: str, count: int = 1, opens: bool = False):
    print("working on", item, flush=True)
    if opens:
        flights[item] = True
    if count == 0:
        raise ValueError("nothing to do")
    return f"{item} x {count}"

@app.function()
@modal.concurrent(max_inputs=10)
@modal.asgi_app()
def page():
    async def answer(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await flights.put.aio(message["type"], True)
                await send({"type": message["type"] + ".complete"})
                if message["type"].endswith("shutdown"):
                    return
        body = (await receive())["body"]
        said = f"{scope['method']} {scope['path']} {dict(scope['headers'])[b'x-key'].decode()} ".encode() + body
        await send({"type": "http.response.start", "status": 202, "headers": []})
        await send({"type": "http.response.body", "body": said})
    return answer

@app.cls()
class Scale:
    factor: int = modal.parameter(default=2)

    @modal.method()
    def times(self, number: int):
        return number * self.factor

@app.local_entrypoint()
def main(number: int):
    print("the answer is", Model().generate.remote(number))
    print("scaled", Scale().times.remote(number), Scale(factor=10).times.remote(number))
'''
DISPATCH = """
  function dispatch
    schedule: cron */5 * * * * UTC
    timeout: 1 min
    startup timeout: 1 min
    retries: 0
    containers: at most 1
    inputs at once: 1
    preemptible: yes
    secrets: queue (QUEUE_URL)
    layer: 4
"""
SPAWNER = """
  function spawner
    cpu: 0.5 cores
    memory: 0.5 GiB
    timeout: 5 min
    startup timeout: 5 min
    retries: 0
    containers: at most 1
    inputs at once: 1
    region: eu
    preemptible: no
    secrets: queue (QUEUE_URL)
    variables: MODE
    layer: 4
"""
FILES = """
  files of Model, Scale, Single, dispatch, page, process, scribble, spawner
    /root: app.py
    /root/toypack: __init__.py
"""
SECRET = {"QUEUE_URL": "https://queue.invalid", "SPARE": "1"}


def write_app(folder: Path, source: str = APP) -> Path:
    """The app with its package, in a folder of its own."""
    (folder / "toypack").mkdir(parents=True)
    (folder / "toypack" / "__init__.py").write_text("FACTOR = 7\n")
    app = folder / "app.py"
    app.write_text(source)
    return app


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The deployed app; every test uses names of its own in it."""
    folder = tmp_path_factory.mktemp("toy")
    with Cloud(folder / "cloud") as cloud:
        cloud.create_secret("queue", SECRET)
        done = cloud.deploy(write_app(folder / "app"))
        assert done.returncode == 0, done.stdout + done.stderr
        yield cloud
        cloud.show()


def test_tick(toy):
    """A schedule's tick spawns, the container of the class has what it needs, results and entries come back."""
    tick = toy.fire("dispatch")
    toy.until_idle()
    assert tick.value == [0, 0, 0, 0]
    call = toy.calls("Model.generate")[-1]
    assert call.value == 21
    assert call.arguments == ((3,), {})
    assert toy.entries("toy-flights")["first"] == SECRET["QUEUE_URL"]
    assert toy.entries("toy-flights")["call"] == call.call_id
    assert "entered with hello there" in call.containers[0].logs()


def test_two_inputs_share_a_container(toy):
    """`@modal.concurrent(max_inputs=2)`: both are in the same process at the same time."""
    first, second = toy.spawn("Model.meet", "left", "right"), toy.spawn("Model.meet", "right", "left")
    toy.until_idle()
    assert first.value == second.value


def test_limits_and_backlog(toy):
    """Two containers of two inputs each are full; the fifth input waits, and the statistics say so."""
    items = [toy.spawn("Model.meet", f"guest {number}", "gate") for number in range(5)]
    until(lambda: sum(it.state == "running" for it in items) == 4, 20, "four are in")
    tick = toy.fire("dispatch")
    until(lambda: tick.has_ended, 20, "the statistics are there")
    assert tick.value == [1, 2, 4, 0]
    toy.spawn("process", "gate", opens=True)
    toy.until_idle()
    assert len({it.value for it in items}) == 2


def test_dict(toy):
    """What a `modal.Dict` can do, it does."""
    item = toy.spawn("scribble")
    toy.until_idle()
    assert item.value == [False, 3, 2, False, "none", [("a", 1), ("c", 3)], ["a", "c"], [1, 3]]
    assert toy.entries("pad") == {"a": 1, "c": 3}


def test_web_endpoint(toy):
    """An ASGI application gets the request and its body, and what it answers comes back; it is opened and closed."""
    items = [toy.post("page", "/there", f"body {number}".encode(), x_key="secret") for number in range(3)]
    assert toy.answer(items[2]) == (202, b"POST /there secret body 2")
    toy.until_idle()
    assert {it.containers[0] for it in items} == {items[0].containers[0]}
    toy.until_gone(items[0].containers[0])
    assert toy.entries("toy-flights")["lifespan.startup"]
    assert toy.entries("toy-flights")["lifespan.shutdown"]


def test_preemption_of_async_work(toy):
    """The method sees its cancellation, the exit handler runs, and the same input goes on in a new container."""
    item = toy.spawn("Model.hold", "preempted")
    container = toy.until_running(item)
    until(lambda: "preempted" in toy.entries("toy-flights"), 20, "the method is at work")
    toy.preempt(container)
    toy.until_idle()
    assert item.value == toy.entries("toy-flights")["preempted"] == item.id
    assert toy.until_gone(container) == 0
    assert container.stdout().splitlines()[-2:] == ["cancelled", "left"]
    assert [it.is_preempted for it in item.containers] == [True, False]


def test_preemption_of_blocking_work(toy):
    """A method that is not async sees KeyboardInterrupt."""
    item = toy.spawn("Single.hold", "interrupted")
    container = toy.until_running(item)
    until(lambda: "interrupted" in toy.entries("toy-flights"), 20, "the method is at work")
    toy.preempt(container)
    toy.until_idle()
    assert item.value == item.id
    assert container.stdout().splitlines() == ["interrupted", "left"]


def test_preemption_of_stubborn_work(toy):
    """Who does not go is killed after the grace; with `overlap` the input is elsewhere long before."""
    item = toy.spawn("Model.hold", "overlapping")
    container = toy.until_running(item)
    until(lambda: "overlapping" in toy.entries("toy-flights"), 20, "the method is at work")
    toy.preempt(container, overlap=True)
    stubborn = toy.spawn("Single.hold", "stubborn", stubborn=True)
    held = toy.until_running(stubborn)
    until(lambda: "stubborn" in toy.entries("toy-flights"), 20, "the method is at work")
    toy.preempt(held, grace_s=0.5)
    toy.until_idle()
    assert toy.until_gone(held) == -9
    assert [item.value, stubborn.value] == [item.id, stubborn.id]
    assert len(item.containers) == len(stubborn.containers) == 2


def test_kill(toy):
    """After SIGKILL nothing of the container runs any more, and the same input goes on in a new one."""
    item = toy.spawn("Model.hold", "killed")
    container = toy.until_running(item)
    until(lambda: "killed" in toy.entries("toy-flights"), 20, "the method is at work")
    toy.kill(container)
    toy.until_idle()
    assert item.value == item.id
    assert toy.until_gone(container) == -9
    assert "left" not in container.stdout()
    assert len(item.containers) == 2


def test_cancelled_call(toy):
    """A call that its user cancels ends, and nobody tries it again."""
    item = toy.spawn("Model.hold", "cancelled")
    toy.until_running(item)
    until(lambda: "cancelled" in toy.entries("toy-flights"), 20, "the method is at work")
    toy.cancel(item)
    toy.until_idle()
    assert (item.state, len(item.containers)) == ("cancelled", 1)


def test_refused_spawn(toy):
    """A spawn that Modal refuses is an exception where it was made; the next one is taken."""
    toy.refuse_spawns("Model", 1)
    refused, taken = toy.spawn("spawner"), toy.spawn("spawner")
    toy.until_idle()
    assert "too many inputs wait" in refused.error
    assert taken.state == "succeeded"


def test_ticks_do_not_overlap(toy):
    """With max_containers=1 the second tick waits for the first, and finds its entry."""
    ticks = [toy.fire("dispatch"), toy.fire("dispatch")]
    toy.until_idle()
    assert [it.state for it in ticks] == ["succeeded", "succeeded"]
    assert ticks[0].containers == ticks[1].containers
    assert toy.schedules == {"dispatch": "cron */5 * * * * UTC"}


def test_run_with_result(toy, tmp_path):
    """`modal run app.py::process`: logs are streamed, the result lands in the file, the containers end."""
    app = write_app(tmp_path / "app")
    done = toy.run_cli("run", "-w", "result", "app.py::process", "--item", "a photo", "--count", "2", cwd=app.parent)
    assert done.returncode == 0, done.stderr
    assert "working on a photo" in done.stdout
    assert (app.parent / "result").read_text() == "a photo x 2"
    assert all(it.exit_code == 0 for it in toy.containers("process"))


def test_run_that_fails(toy, tmp_path):
    """An exception in the function is the exit code of the command, and its message is there to read."""
    app = write_app(tmp_path / "app")
    done = toy.run_cli("run", "app.py::process", "--item", "x", "--count", "0", cwd=app.parent)
    assert done.returncode == 1
    assert "nothing to do" in done.stderr


def test_run_that_its_user_interrupts(toy, tmp_path):
    """Ctrl-C: the container is told, what it still says is shown, and the command calls that a success."""
    app = write_app(tmp_path / "app")
    command = toy.start_cli("run", "app.py::Single.hold", "--key", "ctrl-c", cwd=app.parent)
    until(lambda: "ctrl-c" in toy.entries("toy-flights"), 30, "the method is at work")
    command.send_signal(signal.SIGINT)
    stdout, _ = command.communicate(timeout=30)
    assert command.returncode == 0
    assert "interrupted\nleft\n" in stdout


def test_local_entrypoint(toy, tmp_path):
    """`modal run app.py` with an entrypoint on the user's machine and the class on Modal."""
    app = write_app(tmp_path / "app")
    done = toy.run_cli("run", "app.py", "--number", "6", cwd=app.parent)
    assert "the answer is 42" in done.stdout, done.stdout + done.stderr
    assert "scaled 12 60" in done.stdout


def test_forgotten_package(tmp_path):
    """A package that nobody added is missing in the container, though the machine has it; this ends, and is seen."""
    app = write_app(tmp_path / "app", APP.replace('\n    .add_local_python_source("toypack")', ""))
    with Cloud(tmp_path / "cloud", max_restarts=1) as cloud:
        cloud.create_secret("queue", SECRET)
        assert cloud.deploy(app).returncode == 0
        item = cloud.spawn("Model.generate", 1)
        with pytest.raises(AssertionError, match="a crash loop, 2 in a row"):
            cloud.until_idle()
        assert item.state == "failed"
        assert cloud.function("Model").crashes == 2
        assert all("No module named 'toypack'" in it.logs() for it in cloud.containers("Model"))


def test_secrets_are_checked(tmp_path):
    """A deployment without its secret, or with a key too few, says which."""
    app = write_app(tmp_path / "app")
    with Cloud(tmp_path / "cloud") as cloud:
        absent = cloud.deploy(app)
        assert (absent.returncode, "Secret 'queue' not found" in absent.stderr) == (1, True), absent.stderr
        cloud.create_secret("queue", {"OTHER": "1"})
        short = cloud.deploy(app)
        assert (short.returncode, "missing key(s): QUEUE_URL" in short.stderr) == (1, True), short.stderr


def test_golden(tmp_path):
    """The description says what matters, and is the same from another folder, where it all is deployed again."""
    texts = []
    with Cloud(tmp_path / "cloud") as cloud:
        cloud.create_secret("queue", SECRET)
        for name in ("here", "there"):
            assert cloud.deploy(write_app(tmp_path / name)).returncode == 0
            texts.append(golden.render(cloud))
    text, again = texts
    assert text == again
    blocks = text.rstrip().split("\n\n")
    for block in (DISPATCH, SPAWNER, FILES):
        assert block.strip("\n") in blocks, text
    step = blocks[-1].splitlines()
    assert step[0:2] == ["  layer 4 on 3", "    run_function app.download('tiny', quick=True)"]
    assert step[3:] == ["      globals: REVISION='r1'", "      timeout: 60 min", "      files below: /root/app.py"]
    assert not any(str(it) in text for it in (tmp_path, sys.prefix, Path(__file__).parent))


def test_layers_are_built_again_when_their_recipe_changes(tmp_path):
    """A build step keeps its layer when code around it changes, and loses it with a global it refers to."""
    with Cloud(tmp_path / "cloud") as cloud:
        cloud.create_secret("queue", SECRET)

        def layers(name: str, source: str) -> list[str]:
            assert cloud.deploy(write_app(tmp_path / name, source)).returncode == 0
            return [it.id for it in cloud.layers("Model")]

        first = layers("first", APP)
        assert layers("second", APP.replace("nothing to do", "idle")) == first
        third = layers("third", APP.replace('"r1"', '"r2"'))
        assert [one == other for one, other in zip(first, third, strict=True)] == [True, True, True, False]


def test_unknown_call(tmp_path):
    """What the control plane has no answer to is an error for who asks, and for the test."""
    with Cloud(tmp_path / "cloud") as cloud:
        assert cloud.run_cli("app", "list", cwd=tmp_path).returncode == 1
        with pytest.raises(AssertionError, match="does not know: AppList"):
            cloud.until_idle()


def test_nothing_is_left(tmp_path):
    """A warm container, there before its first input, is gone with the cloud, as are the cloud's threads."""
    app = write_app(tmp_path / "app", APP.replace("max_containers=2", "min_containers=1"))
    threads = set(threading.enumerate())
    with Cloud(tmp_path / "cloud", container_env={"GREETING": "a test's own"}) as cloud:
        cloud.create_secret("queue", SECRET)
        assert cloud.deploy(app).returncode == 0
        until(lambda: cloud.containers("Model"), 10, "a container is warm")
        container = cloud.until_running(cloud.spawn("Model.hold", "for ever"))
        assert container.stdout() == "entered with a test's own\n"
        pids = [it.pid for it in cloud.containers()]
    assert [it.exit_code for it in cloud.containers()] == [-9]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert set(threading.enumerate()) - threads == set()


def test_interpreter_without_this_project(tmp_path):
    """What a container imports came with it: this project, installed here, is not among that."""
    python = make_interpreter(tmp_path)
    run = [python, "-c", "import modal, httpx\nimport inference"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'inference'"
