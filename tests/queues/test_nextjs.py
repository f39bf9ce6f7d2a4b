"""examples/nextjs beyond the contract: people's side, who may do what, calls to us, and a worker that drains it all."""

import json
import os
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psycopg
import pytest

from inference.providers import PROVIDERS, provider_of
from inference.queues.lifeisshort_wire import SignedDownload
from inference.task import Task, parse_task
from tests.server import harness
from tests.support import next_app, postgres
from tests.support.processes import I2V, until
from tests.support.supabase import EARLIER, SERVICE_KEY

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "nextjs.md").read_text()
TOKEN = "push-token"

FIELDS = {"item_id", "group_id", "photo_id", "prompt", "photo_storage_path", "leased_until", "frame_num"}
FIELDS |= {"inference_provider"}
"""Of a task, as the documents of the worker API have it."""


@contextmanager
def waking():
    """Where `POST /wake` goes: its address, and what arrives there."""
    heard = []

    class Wake(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"] or 0))
            heard.append((self.path, self.headers["authorization"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Wake) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", heard
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def postgres_server():
    """One for this module."""
    with postgres.server() as url:
        yield url


@pytest.fixture(scope="module")
def app(postgres_server, tmp_path_factory):
    """The application's address, its Supabase, what its wake calls said."""
    with (
        postgres.database(postgres_server) as url,
        next_app.project(url, tmp_path_factory.mktemp("supabase")) as supabase,
        waking() as (wake_url, heard),
        next_app.running(supabase, I2V_URL=wake_url, I2V_PUSH_TOKEN=TOKEN) as address,
    ):
        yield address, supabase, heard


def submit(address, token, photo=None, **fields):
    """As a page sends its form."""
    files = {"photo": ("a.jpg", photo or harness.jpeg(), "image/jpeg")}
    return httpx.post(f"{address}/api/videos", headers={"authorization": f"Bearer {token}"}, data=fields, files=files)


def test_a_photo_becomes_a_clip(app, tmp_path):
    """Somebody who is signed in submits; workers are woken, and one of ours takes it, makes it and reports."""
    address, supabase, heard = app
    supabase.sign_up("anna")
    photo = harness.jpeg(64, 48)
    answer = submit(address, "anna", photo, prompt="pan left", seconds="1")
    assert answer.status_code == 201, answer.text
    until(lambda: heard, 10, "the wake call arrives")
    assert heard == [("/wake", f"Bearer {TOKEN}")]
    env = {"PATH": os.environ["PATH"], "VERCEL_API_URL": address, "WORKER_API_KEY": harness.KEY, "HOME": str(tmp_path)}
    env |= {"I2V_ALLOW_PRIVATE_ADDRESSES": "true", "POLL_INTERVAL": "0.2"}
    subprocess.run([I2V, "work", "--once"], env=env, cwd=tmp_path, timeout=60, check=True)
    [[row]] = supabase.sql("select to_json(it) from video_items it where id = %s", answer.json()["id"])
    assert (row["status"], row["fraction"], row["prompt"], row["frame_num"]) == ("completed", 1, "pan left", 25)
    assert row["video_storage_path"] == f"videos/{row['id']}.mp4"
    assert supabase.objects.path(row["video_storage_path"]).read_bytes()[4:8] == b"ftyp"
    assert supabase.objects.path(row["photo_storage_path"]).read_bytes() == photo
    supabase.sql("truncate video_items")


def test_strangers_and_files_that_are_none(app):
    """Nothing is stored for them."""
    address, supabase, _ = app
    supabase.sign_up("berta")
    assert submit(address, "nobody").status_code == 401
    url, headers = f"{address}/api/videos", {"authorization": "Bearer berta"}
    text = {"photo": ("a.txt", b"hello", "text/plain")}
    assert httpx.post(url, headers=headers, files=text).status_code == 400
    assert httpx.post(url, headers=headers, data={"photo": "x"}, files={"other": b"x"}).status_code == 400
    assert supabase.sql("select count(*) from video_items") == [(0,)]


def test_photos_that_browsers_do_not_know(app):
    """Outside of Apple's, HEIC files have no media type of their own. A field left blank is the default."""
    address, supabase, _ = app
    supabase.sign_up("h")
    files = {"photo": ("IMG_0001.HEIC", b"x", "application/octet-stream")}
    headers = {"authorization": "Bearer h"}
    answer = httpx.post(f"{address}/api/videos", headers=headers, data={"seconds": ""}, files=files)
    assert answer.status_code == 201, answer.text
    [(path, frames)] = supabase.sql("select photo_storage_path, frame_num from video_items")
    assert (path.endswith("_original.heic"), frames) == (True, 121)
    supabase.sql("truncate video_items")


def test_people_see_their_own_and_call_no_function(app):
    """Under the policies, as a page with a session asks."""
    address, supabase, _ = app
    anna, berta = supabase.sign_up("a"), supabase.sign_up("b")
    own = submit(address, "a").json()["id"]
    other = submit(address, "b").json()["id"]
    assert supabase.sql("select id::text from video_items", as_user=anna) == [(own,)]
    assert supabase.sql("select id::text from video_items", as_user=berta) == [(other,)]
    refuses_people(supabase, anna, own)
    supabase.sql("truncate video_items")


def refuses_people(supabase, user_id, item_id):
    """Whatever is more than reading."""
    for text in (
        "select claim_video('w', 600)",
        f"select renew_video('{item_id}', 'w', 600)",
        f"select end_video('{item_id}', 'w', 'completed')",
        f"select cancel_video('{item_id}')",
        f"insert into video_items (user_id, group_id, photo_storage_path) values ('{user_id}', '{item_id}', 'x')",
        "update video_items set status = 'completed'",
        "delete from video_items",
        "truncate video_items",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            supabase.sql(text, as_user=user_id)


def test_a_project_where_all_roles_may_use_new_tables(postgres_server, tmp_path):
    """As all had them before: people may do no more there, and who is not signed in sees nothing."""
    with postgres.database(postgres_server) as url, next_app.project(url, tmp_path, EARLIER) as supabase:
        anna = supabase.sign_up("anna")
        text = "insert into video_items (user_id, group_id, photo_storage_path) values (%s, gen_random_uuid(), 'x')"
        [[item_id]] = supabase.sql(f"{text} returning id::text", anna)
        refuses_people(supabase, anna, item_id)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            supabase.sql("set role anon; select from video_items")


def test_every_hint_means_the_provider_that_it_means_elsewhere(app):
    """One that is in no table, too: a worker that takes money would refuse such a task, and it would end failed."""
    address, supabase, _ = app
    supabase.sign_up("k")
    item_id = submit(address, "k").json()["id"]
    kinds = {provider.worker_type for provider in PROVIDERS}
    for hint in (None, "", "sora", "gen4", "veo3.10", *(hint for provider in PROVIDERS for hint in provider.models)):
        supabase.sql("update video_items set inference_provider = %s", hint)
        meant = provider_of(hint).worker_type
        for kind in kinds - {meant}:
            assert supabase.sql("select claim_video('w', 600, %s)", kind) == [], hint
        assert len(supabase.sql("select claim_video('w', 600, %s)", meant)) == 1, hint
        assert len(supabase.sql("select renew_video(%s, 'w', 1)", item_id)) == 1
    supabase.sql("truncate video_items")


@pytest.mark.parametrize("worker", ["mine", "other"])
def test_a_clip_that_is_done_late(app, worker):
    """Of a worker that was away when its lease ran out: kept, unless the task has gone to another by then."""
    address, supabase, _ = app
    supabase.sign_up("e")
    item_id = submit(address, "e").json()["id"]
    supabase.sql("update video_items set inference_provider = 'veo3.1'")
    supabase.sql("select claim_video('mine', 600)")
    supabase.sql("select renew_video(%s, 'mine', 600)", item_id)
    supabase.sql("update video_items set leased_until = now() - interval '1 s'")
    assert supabase.sql("select claim_video('wan worker', 600, 'wan')") == []
    if worker == "other":
        assert len(supabase.sql("select claim_video('other', 600, 'runway')")) == 1
    kept = supabase.sql("select status from end_video(%s, 'mine', 'completed', 'videos/x.mp4')", item_id)
    assert kept == ([("completed",)] if worker == "mine" else [])
    assert supabase.sql("select worker_id, crash_count from video_items") == [(worker, int(worker == "other"))]
    supabase.sql("truncate video_items")


def test_workers_that_ask_at_once_get_one_task_each(app):
    """Also tasks whose leases ran out, of which none is given away twice or counted twice."""
    address, supabase, _ = app
    supabase.sign_up("f")
    for _ in range(8):
        submit(address, "f")
    supabase.sql("update video_items set status = 'processing', renewed = true, leased_until = now()")
    together = threading.Barrier(16)

    def claim(number):
        together.wait()
        return [row for [row] in supabase.sql("select id from claim_video(%s, 600)", f"w{number}")]

    with ThreadPoolExecutor(16) as pool:
        given = [item_id for claimed in pool.map(claim, range(16)) for item_id in claimed]
    assert len(given) == len(set(given)) == 8
    assert supabase.sql("select distinct status, crash_count from video_items") == [("processing", 1)]
    supabase.sql("truncate video_items")


def in_node(program, supabase, key, *arguments):
    """What a module of the example's folder prints, with this key of the project."""
    env = {"SUPABASE_URL": supabase.url, "SUPABASE_SERVICE_ROLE_KEY": key}
    program = f"const lib = await import({str(next_app.EXAMPLE / 'lib' / 'supabase.ts')!r});" + program
    command = [next_app.node(), "--input-type=module", "-e", program, *arguments]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, timeout=30, check=True, text=True).stdout.split()


def test_a_person_has_changed_their_mind(app):
    """As a route of the application's own would call it; here with the key that earlier projects have."""
    address, supabase, _ = app
    supabase.sign_up("g")
    item_id = submit(address, "g").json()["id"]
    program = 'console.log((await lib.rpc("cancel_video", { item: process.argv[1] }))?.status)'
    assert in_node(program, supabase, SERVICE_KEY, item_id) == ["cancelled"]
    assert in_node(program, supabase, SERVICE_KEY, item_id) == ["undefined"]
    supabase.sql("truncate video_items")


def test_a_task_that_was_cancelled_is_tried_again(app):
    """As schema.sql says how. Its worker is not told to stop for what somebody wanted before."""
    address, supabase, _ = app
    supabase.sign_up("l")
    item_id = submit(address, "l").json()["id"]
    supabase.sql("select claim_video('w1', 600)")
    supabase.sql("select cancel_video(%s)", item_id)
    assert supabase.sql("select status from renew_video(%s, 'w1', 1)", item_id) == [("cancelled",)]
    supabase.sql("update video_items set status = 'pending', retry_count = 0, crash_count = 0")
    assert supabase.sql("select cancel_requested from claim_video('w2', 600)") == [(False,)]
    assert supabase.sql("select status from end_video(%s, 'w2', 'completed', 'v')", item_id) == [("completed",)]
    supabase.sql("truncate video_items")


def test_a_worker_reaches_one_bucket_and_nothing_else(app):
    """The address that is asked with the project's key is what it looks like."""
    address, supabase, _ = app
    supabase.put("secret.jpg", b"x")
    headers = {"authorization": f"Worker {harness.KEY}"}
    for path in ("../other-bucket/secret.jpg", "a/../../other-bucket/secret.jpg", "./secret.jpg"):
        body = {"operation": "download", "storage_path": path}
        answer = httpx.post(f"{address}/api/worker/presign", headers=headers, json=body)
        assert (answer.status_code, answer.json()["success"]) == (500, False)


def test_a_lease_is_fenced_where_the_row_is_written(app):
    """Not only by the route, which looks before: another worker may have the task by the time it writes."""
    address, supabase, _ = app
    supabase.sign_up("d")
    item_id = submit(address, "d").json()["id"]
    assert len(supabase.sql("select claim_video('mine', 600)")) == 1
    for text in (
        f"select renew_video('{item_id}', 'other', 600)",
        f"select end_video('{item_id}', 'other', 'completed', 'videos/x.mp4')",
        f"select end_video('{item_id}', 'other', 'failed')",
    ):
        assert supabase.sql(text) == []
    assert supabase.sql("select status, worker_id, retry_count from video_items") == [("processing", "mine", 0)]
    assert len(supabase.sql(f"select end_video('{item_id}', 'mine', 'failed')")) == 1
    supabase.sql("truncate video_items")


@pytest.mark.parametrize("authorization", ["", "Worker wrong", "Basic x", f"Worker {harness.KEY}x", "Worker"])
def test_workers_need_the_key(app, authorization):
    """And are told as the contract says."""
    answer = httpx.post(f"{app[0]}/api/worker/next-task", headers={"authorization": authorization}, json={})
    assert (answer.status_code, answer.json()) == (401, {"success": False, "error": "Unauthorized"})


def test_what_is_answered_is_what_the_contract_says(app):
    """Every field of a task, times with Z, both schemes of the key, and bodies of any media type."""
    address, supabase, _ = app
    supabase.sign_up("c")
    submit(address, "c", prompt="줌아웃", seconds="3")

    def ask(call, body, scheme="Worker"):
        headers = {"authorization": f"{scheme} {harness.KEY}", "content-type": "text/plain"}
        return httpx.post(f"{address}/api/worker/{call}", headers=headers, content=json.dumps(body))

    given = ask("next-task", {"worker_id": 7, "lease_duration_seconds": "600.5"}, "Bearer").json()["data"]
    assert set(given) == FIELDS
    assert isinstance(parse_task(given), Task)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", given["leased_until"])
    photo = ask("presign", {"operation": "download", "storage_path": given["photo_storage_path"]}).json()["data"]
    assert (set(photo), photo["expires_in"]) == ({"url", "expires_in"}, 3600)
    assert SignedDownload.model_validate(photo)
    beat = {"item_id": given["item_id"], "worker_id": 7}
    assert ask("heartbeat", beat).json()["data"]["leased_until"].endswith("Z")
    assert ask("heartbeat", beat | {"worker_id": "8"}).status_code == 404
    assert ask("report", beat | {"worker_id": "8", "status": "failed"}).status_code == 403
    assert ask("report", beat | {"status": "done"}).status_code == 400
    assert ask("report", beat | {"item_id": "1", "status": "failed"}).status_code == 404
    missing = beat | {"status": "completed", "video_storage_path": f"videos/{given['item_id']}.mp4"}
    assert ask("report", missing).json() == {"success": False, "error": "Failed to generate video URL"}
    assert ask("report", beat | {"status": "failed"}).json()["data"]["status"] == "failed"
    submit(address, "c")
    assert ask("next-task", {"worker_id": "9", "lease_duration_seconds": "Infinity"}).json()["data"]
    held = "select 1 from video_items where worker_id = '9' and leased_until < now() + interval '2 d'"
    assert len(supabase.sql(held)) == 1
    for call, body, status in (("toString", {}, 404), ("next-task", {}, 400), ("next-task", [], 400)):
        answer = ask(call, body)
        assert (answer.status_code, answer.json()["success"]) == (status, False)
    supabase.sql("truncate video_items")


def test_the_call_to_the_embedded_queue(tmp_path):
    """`submit` of lib/i2v.ts makes a task; the same key makes nothing new."""
    program = """
    import { readFileSync } from "node:fs";
    const { submit } = await import(process.argv[1]);
    const photo = new File([readFileSync(0)], "a.jpg", { type: "image/jpeg" });
    for (const _ of [1, 2]) console.log((await submit(photo, "pan left", 3, "wish-1"))[0].id);
    """
    with harness.running_server(harness.config(tmp_path)) as url:
        env = {"WORKER_API_KEY": harness.KEY, "I2V_SERVE_URL": url}
        said = subprocess.run(
            [next_app.node(), "--input-type=module", "-e", program, next_app.EXAMPLE / "lib" / "i2v.ts"],
            env=env,
            input=harness.jpeg(),
            stdout=subprocess.PIPE,
            timeout=30,
            check=True,
        )
        first, again = said.stdout.decode().split()
        task = httpx.get(f"{url}/api/tasks/{first}", headers={"authorization": f"Bearer {harness.KEY}"}).json()["data"]
    assert first == again
    assert (task["prompt"], task["seconds"], task["photo_filename"]) == ("pan left", 3, "a.jpg")


def test_what_is_no_queue_is_told_by_its_status():
    """Such as a proxy whose server is away, and which answers in HTML."""
    program = """
    const { submit } = await import(process.argv[1]);
    await submit(new File(["x"], "a.jpg"), "pan left", 3, "wish-1").catch((error) => console.log(error.message));
    """
    with waking() as (url, _):
        command = [next_app.node(), "--input-type=module", "-e", program, next_app.EXAMPLE / "lib" / "i2v.ts"]
        said = subprocess.run(command, env={"I2V_SERVE_URL": url}, stdout=subprocess.PIPE, timeout=30, check=True)
    assert said.stdout.decode().startswith("i2v: 200 ")


def test_the_guide_names_what_is_there():
    """Files, functions and variables of the example."""
    folder = next_app.EXAMPLE
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file()} - {"tsconfig.json"}
    assert set(re.findall(r"^\| `((?:app|lib)/\S+|schema\.sql)`", GUIDE, re.MULTILINE)) == files
    sources = "".join((folder / name).read_text() for name in files)
    names = set(re.findall(r"^\| `(\w+)`", GUIDE, re.MULTILINE))
    variables = set(re.findall(r"process\.env\.(\w+)", sources))
    assert names == variables | set(re.findall(r"create function (\w+)", sources))
