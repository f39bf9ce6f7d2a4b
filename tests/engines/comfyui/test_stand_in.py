"""The stand-in ComfyUI, held against recordings of a real one."""

import json
from pathlib import Path

import httpx
import pytest
from httpx_ws import aconnect_ws

from tests.support.comfy_server import ComfyServer

FOLDER = Path(__file__).parents[2] / "cases" / "comfy"
CASES = [path for path in sorted(FOLDER.glob("*.json")) if path.stem != "wan22_i2v_template"]
VARYING = {"prompt_id", "timestamp", "sid", "number", "client_id"}


def same(value):
    """Without what differs from run to run; a path of an object's memory is one of those."""
    if isinstance(value, dict):
        skipped = VARYING | {"current_inputs", "executed", "current_outputs"}
        return {key: same(each) for key, each in value.items() if key not in skipped}
    if isinstance(value, list):
        return [same(each) for each in value]
    return value


@pytest.fixture
def comfy():
    """A server with the input that one recording has, and nothing installed beyond its nodes."""
    with ComfyServer(pace_s=0) as server:
        server.previews = False
        yield server


async def replay(comfy: ComfyServer, case: dict, client: httpx.AsyncClient) -> tuple[httpx.Response, list, dict]:
    """Sends the graph of a recording as the recorder did: the answer, the messages, the history."""
    heard: list = []
    if case.get("interrupt"):
        comfy.hold("SaveAnimatedPNG")
    async with aconnect_ws(f"{comfy.url}/ws?clientId=recorder", client) as socket:
        heard.append(json.loads(await socket.receive_text()))
        answer = await client.post("/prompt", json={"prompt": case["workflow"], "client_id": "recorder"})
        if answer.status_code != 200:
            return answer, heard, {}
        if case.get("interrupt"):
            while heard[-1]["data"].get("node") != "2":
                heard.append(json.loads(await socket.receive_text()))
            sent = await client.post("/interrupt", json={"prompt_id": answer.json()["prompt_id"]})
            assert sent.status_code == case["interrupt"]
        last = case["ws"][-1]
        while (heard[-1]["type"], heard[-1]["data"].get("node")) != (last["type"], last["data"].get("node")):
            heard.append(json.loads(await socket.receive_text()))
    history: dict = {}
    while not history:
        history = (await client.get(f"/history/{answer.json()['prompt_id']}")).json()
    return answer, heard, history


@pytest.mark.anyio
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
async def test_says_what_the_real_one_said(path, comfy):
    """Status, body, every message in its order, the history, and what kind of file can be viewed."""
    case = json.loads(path.read_text())
    async with httpx.AsyncClient(base_url=comfy.url) as client:
        image = (b"\x89PNG\r\n\x1a\n", "image/png") if case["tag"] == "no_outputs" else None
        await client.post("/upload/image", files={"image": ("in.png", image[0] if image else PNG)})
        cached = next((m["data"]["nodes"] for m in case["ws"] if m["type"] == "execution_cached"), [])
        if cached:  # an earlier run of the recorder left them
            before = {node: case["workflow"][node] for node in cached}
            before["99"] = {"class_type": "PreviewImage", "inputs": {"images": [cached[0], 0]}}
            earlier = (await client.post("/prompt", json={"prompt": before})).json()["prompt_id"]
            while not (await client.get(f"/history/{earlier}")).json():
                pass
        answer, heard, history = await replay(comfy, case, client)
        assert answer.status_code == case["prompt_status"]
        assert same(answer.json()) == same(case["prompt_body"])
        if not case["ws"]:
            return
        counters = json.dumps(same(heard)).replace("t_00001_", "t_00003_")
        assert json.loads(counters) == json.loads(json.dumps(same(case["ws"])).replace("t_00001_", "t_00003_"))
        (entry,), (recorded,) = history.values(), case["history"].values()
        recorded = json.loads(json.dumps(same(recorded)).replace("t_00003_", "t_00001_"))
        assert same(entry)["outputs"] == recorded["outputs"]
        assert same(entry)["status"] == recorded["status"]
        assert same(entry)["meta"] == recorded["meta"]
        assert entry["prompt"][2:3] == next(iter(case["history"].values()))["prompt"][2:3]
        for view in case["views"]:
            item = {**view["item"], "filename": view["item"]["filename"].replace("00003", "00001")}
            seen = await client.get("/view", params=item)
            assert (seen.status_code, seen.headers["Content-Type"]) == (view["status"], view["ctype"])
            assert seen.content[:4].hex() == view["magic"][:8]


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


@pytest.mark.anyio
async def test_two_of_one_name_are_two_files(comfy):
    """Unless the second is the same file, or is to replace the first."""
    async with httpx.AsyncClient(base_url=comfy.url) as client:

        async def put(content: bytes, **fields: str) -> dict:
            answer = await client.post("/upload/image", files={"image": ("a.png", content)}, data=fields)
            return answer.json()

        assert (await put(b"one"))["name"] == "a.png"
        assert (await put(b"one"))["name"] == "a.png"
        assert (await put(b"two"))["name"] == "a (1).png"
        assert (await put(b"three", overwrite="true"))["name"] == "a.png"
        assert await put(b"four", subfolder="x") == {"name": "a.png", "subfolder": "x", "type": "input"}
    assert comfy.uploads == {"a.png": b"three", "a (1).png": b"two", "x/a.png": b"four"}
