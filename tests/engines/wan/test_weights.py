"""Weights, from a hub on loopback: fetched, interrupted, damaged, refused."""

import functools
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
import torch
import trustme
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from inference.engines.wan import bf16, fetching, weights
from inference.engines.wan.presets import PRESETS, Preset, Repository
from inference.engines.wan.weights import LOCK, check, folder_of, read_ahead, require, weight_files
from inference.errors import DiskFull, WeightsError
from tests.engines.wan.conftest import tiny_weights
from tests.engines.wan.hub import Fault, Hub, git_sha1, sha256
from tests.support.disk import small_disk
from tests.support.processes import until

ROOT = Path(__file__).parents[3]
MODEL, LORAS = "wan/model", "light/loras"
TOKEN = "hf_c2VjcmV0"
SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
VAE = "vae/diffusion_pytorch_model.safetensors"
CONFIG = "transformer/config.json"


@functools.cache
def published() -> dict[str, bytes]:
    """The tiny checkpoint of the A14B's shape, in fp32 and in shards, among files that nobody needs."""
    folder = tiny_weights() / "tiny-a14b"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    unneeded = ["README.md", "transformer/pickle.bin", "transformer/a.png", "assets/a.json", "transformerx/b.json"]
    return files | dict.fromkeys(unneeded, b"unneeded")


@pytest.fixture(scope="module", autouse=True)
def _few_certificates(tmp_path_factory):
    """One instead of all the world's, which every client would take 80 ms to read; these tests speak plain HTTP."""
    path = tmp_path_factory.mktemp("certificates") / "ca.pem"
    trustme.CA().cert_pem.write_to_path(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(path))
        yield


@contextmanager
def hub_with_the_model():
    """And with its LoRAs, in another repository."""
    files = dict(published())
    loras = {lora.path: files.pop(f"loras/{Path(lora.path).name}") for lora in PRESETS["a14b-fast"].loras}
    with Hub() as hub:
        hub.publish(MODEL, files)
        hub.publish(LORAS, loras)
        yield hub


@pytest.fixture
def hub():
    """Where to fetch from."""
    with hub_with_the_model() as hub:
        yield hub


def whole_at(hub: Hub) -> Preset:
    """`a14b-fast` as this hub has it."""
    preset = PRESETS["a14b-fast"]
    model = Repository(MODEL, hub.revision(MODEL), "Apache-2.0")
    loras = Repository(LORAS, hub.revision(LORAS), "Apache-2.0")
    return replace(
        preset,
        components={name: replace(it, repository=model) for name, it in preset.components.items()},
        loras=tuple(replace(lora, repository=loras) for lora in preset.loras),
    )


def preset_at(hub: Hub, **changes) -> Preset:
    """Two parts of it, from a repository that differs in something."""
    whole = whole_at(hub)
    parts = {name: whole.components[name] for name in ("vae", "transformer")}
    parts = {name: replace(it, repository=replace(it.repository, **changes)) for name, it in parts.items()}
    return replace(whole, components=parts, loras=())


@pytest.fixture
def preset(hub) -> Preset:
    """The parts that suffice for most tests."""
    return preset_at(hub)


@pytest.fixture
def fetch(hub, preset, tmp_path):
    """Fetches from the hub into the test's folder, without pauses."""

    def fetch(preset=preset, folder=tmp_path, **options) -> int:
        return fetching.fetch(preset, folder, **{"endpoint": hub.url, "pauses_s": (0, 0), **options})

    return fetch


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """What a fetch leaves."""
    folder = tmp_path_factory.mktemp("finished")
    with hub_with_the_model() as hub:
        fetching.fetch(whole_at(hub), folder, endpoint=hub.url)
    return folder


@pytest.fixture
def there(finished, tmp_path) -> None:
    """All was fetched before."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def folder(preset, tmp_path) -> Path:
    """Where the model will lie."""
    return folder_of(tmp_path, preset.components["vae"].repository)


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything but the lock of the running process."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(files.items()) if path.name != ".fetch.lock"}


# What is fetched


def test_what_is_there_after_a_fetch(hub, fetch, finished, tmp_path, folder):
    """All that is needed and nothing else: as published, or as bf16 where the preset says so.

    Then all is well; and two machines that fetch the same have the same bytes, locks included.
    """
    whole = whole_at(hub)
    assert fetch(whole) == 16
    assert files_in(tmp_path) == files_in(finished)
    files = files_in(folder)
    lock = json.loads(files.pop(LOCK))
    originals = {path: it for path, it in hub.files(MODEL).items() if it != b"unneeded" and "/" in path}
    originals = {path: it for path, it in originals.items() if not path.startswith("scheduler/")}
    assert files.keys() == originals.keys() == lock["files"].keys()
    assert (lock["repository"], lock["revision"]) == (MODEL, hub.revision(MODEL))
    for path, content in files.items():
        assert lock["files"][path] == {
            "published_bytes": len(originals[path]),
            "published_digest": (sha256 if path.endswith(".safetensors") else git_sha1)(originals[path]),
            "sha256": sha256(content),
            "size_bytes": len(content),
        }
        as_bf16 = path.startswith("transformer") and path.endswith((".safetensors", ".index.json"))
        assert (content == originals[path]) != as_bf16, path
    loras = files_in(folder_of(tmp_path, whole.loras[0].repository))
    assert {path: it for path, it in loras.items() if path != LOCK} == hub.files(LORAS)
    assert check(whole, tmp_path) == []
    require(whole, tmp_path)
    assert {path.name for path in weight_files(whole, tmp_path)} >= {Path(SHARD).name, "high_noise_model.safetensors"}


def test_a_fetch_in_pieces(hub, fetch, finished, tmp_path):
    """As layers of an image are made: each call puts no more there than it may, but one file at least."""
    whole = whole_at(hub)
    sizes = []
    while taken := fetch(whole, at_most_bytes=100_000):
        here = sum(len(it) for it in files_in(tmp_path).values())
        sizes.append(here - sum(sizes))
        assert taken == 1 or sizes[-1] < 110_000
    assert len(sizes) > 2
    assert files_in(tmp_path) == files_in(finished)


@pytest.mark.usefixtures("there")
def test_a_second_fetch_asks_for_nothing(hub, fetch, tmp_path):
    """Names and sizes are compared, and that is all; it says so."""
    before, hub.requests[:] = files_in(tmp_path), []
    with structlog.testing.capture_logs() as logs:
        assert fetch() == 0
    assert [it["event"] for it in logs] == ["weights were there already"]
    assert hub.requests == []
    assert files_in(tmp_path) == before


def test_progress(fetch, preset, tmp_path, folder):
    """Every file from its first to its last byte, in each step; and of a check as well."""
    seen = []
    count = fetch(sink=seen.append)
    assert {it.number for it in seen} == set(range(1, count + 1))
    assert all(it.count == count and 0 <= it.done_bytes <= it.size_bytes for it in seen)
    ends = {(it.path, it.step) for it in seen if it.done_bytes == it.size_bytes}
    assert {(SHARD, "download"), (SHARD, "verify"), (CONFIG, "download"), (CONFIG, "verify")} <= ends
    assert [it.step for it in seen if it.path == SHARD and it.step == "convert"] == ["convert"] * len(
        load_file(folder / SHARD)
    )
    seen.clear()
    check(preset, tmp_path, sink=seen.append)
    assert {it.path for it in seen} == files_in(folder).keys() - {LOCK}
    assert {it.step for it in seen} == {"verify"}


@pytest.mark.usefixtures("there")
def test_bf16_is_what_loading_would_make_of_it(folder):
    """The transformer loads to the same bits as the published one does with the same arguments."""
    for expert in ("transformer", "transformer_2"):
        models = [
            WanTransformer3DModel.from_pretrained(where / expert, torch_dtype=torch.bfloat16)
            for where in (tiny_weights() / "tiny-a14b", folder)
        ]
        want, have = (model.state_dict() for model in models)
        assert {name: it.dtype for name, it in have.items()} == {name: it.dtype for name, it in want.items()}
        assert {it.dtype for it in have.values()} == {torch.bfloat16, torch.float32}
        assert all(torch.equal(have[name], want[name]) for name in want)


@pytest.mark.usefixtures("there")
def test_bf16_on_disk(folder, tmp_path):
    """Tensor by tensor; the index says how large they are now; and whoever may read the folder may read the file."""
    index = json.loads((folder / INDEX).read_bytes())
    original = json.loads((tiny_weights() / "tiny-a14b" / INDEX).read_bytes())
    total_bytes = 0
    assert len(set(index["weight_map"].values())) == 2
    for shard in set(index["weight_map"].values()):
        have = load_file(folder / "transformer" / shard)
        want = load_file(tiny_weights() / "tiny-a14b" / "transformer" / shard)
        assert have.keys() == want.keys()
        for name, tensor in have.items():
            kept = not bf16.KEPT_IN_FP32.isdisjoint(name.split("."))
            assert tensor.dtype == (torch.float32 if kept else torch.bfloat16)
            assert torch.equal(tensor, want[name].to(tensor.dtype))
            total_bytes += tensor.nbytes
    assert index == {**original, "metadata": {**original["metadata"], "total_size": total_bytes}}
    assert total_bytes < original["metadata"]["total_size"] * 0.6
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*.safetensors")}
    (tmp_path / "any").touch()
    assert modes == {stat.S_IMODE((tmp_path / "any").stat().st_mode)}


def test_what_stays_fp32_is_what_diffusers_keeps():
    """Should diffusers keep more one day, files saved before would have lost it."""
    assert set(WanTransformer3DModel._keep_in_fp32_modules) == bf16.KEPT_IN_FP32


def test_presets_share_a_folder(hub, preset, fetch, folder):
    """What the second needs beyond the first is told, then added; what is there is left alone."""
    whole, weights_dir = whole_at(hub), folder.parent
    loras = folder_of(weights_dir, whole.loras[0].repository)
    assert fetch() == 6
    assert check(preset, weights_dir) == []
    said = f"there are no weights of a14b-fast in {loras}: run: i2v weights fetch a14b-fast"
    with pytest.raises(WeightsError, match=f"^{said}$"):
        require(whole, weights_dir)
    problems = check(whole, weights_dir)
    assert [it for it in problems if str(loras) in it] == [said]
    assert f"{folder / 'text_encoder/config.json'} is missing" in problems
    loras.mkdir()
    assert f"{loras / LOCK} is missing" in check(whole, weights_dir)
    assert fetch(whole) == 10
    assert len(hub.asked(VAE)) == 1
    assert check(preset, weights_dir) == check(whole, weights_dir) == []


# Interrupted


def cut(*after: int) -> list[Fault]:
    """Connections that drop after so many bytes."""
    return [Fault(cut_after=count) for count in after]


def busy(*statuses: int) -> list[Fault]:
    """Answers without what was asked for."""
    return [Fault(status=status) for status in statuses]


@pytest.mark.parametrize(
    "case",
    [
        (VAE, cut(1000, 0, 500, 0), [0, 1000, 1000, 1500, 1500]),  # more tries than pauses, since bytes arrived
        (CONFIG, cut(10), [0, 10]),
        (VAE, [*cut(1000), Fault(ignore_range=True)], [0, 1000]),  # all of it comes again, and is taken
        (VAE, busy(500, 502), [0, 0, 0]),
        (MODEL, busy(503, 429), [0, 0, 0]),  # the listing
        (VAE, [Fault(body=bytes(5_000_000))], [0, 0]),  # too long is cut off, and does not fill the disk
        (CONFIG, [Fault(body=b"{}")] * 2, [0, 2, 0]),  # too short ends with no such range
        *[(path, [Fault(garble=True)], [0, 0]) for path in (SHARD, VAE, CONFIG)],
    ],
)
def test_what_a_fetch_gets_over(hub, fetch, preset, tmp_path, case):
    """It asks for what it lacks, or again for all of it, and in the end all is well."""
    path, faults, starts = case
    hub.go_wrong(path, *faults)
    seen = []
    fetch(sink=seen.append)
    assert [it.start for it in hub.asked(path)] == starts
    assert max(it.done_bytes for it in seen) < 2_000_000
    assert check(preset, tmp_path) == []


@pytest.mark.parametrize(
    "case",
    [
        (
            VAE,
            cut(1000, 0, 0),
            r"127\.0\.0\.1 could not be reached .*run the same command again, it c",
            [0] + [1000] * 3,
        ),
        (CONFIG, busy(503, 503, 503), r"could not be reached \(HTTP 503\)", [0] * 4),
        *[
            (path, [Fault(garble=True)] * 2, f"{path} came twice with another content", [0] * 3)
            for path in (SHARD, VAE, CONFIG)
        ],
    ],
)
def test_what_ends_a_fetch_and_the_next_goes_on(hub, fetch, preset, folder, case):
    """The message says what to do. Nothing is at the file's name until it is whole."""
    path, faults, said, starts = case
    hub.go_wrong(path, *faults)
    with pytest.raises(WeightsError, match=said):
        fetch()
    assert f"{folder / path} is missing" in check(preset, folder.parent)
    fetch()
    assert [it.start for it in hub.asked(path)] == starts
    assert check(preset, folder.parent) == []


def test_a_killed_process_goes_on(hub, fetch, preset, tmp_path, folder):
    """SIGKILL in the middle of a file loses at most what was not written yet; finished files are not asked for."""
    hold = threading.Event()
    hub.go_wrong(SHARD, Fault(cut_after=200_000, hold=hold))
    program = f"""
from dataclasses import replace
from pathlib import Path
from inference.engines.wan.presets import *
from inference.engines.wan.presets import Repository
from inference.engines.wan.fetching import fetch
model = Repository({MODEL!r}, {hub.revision(MODEL)!r}, "")
parts = {{name: replace(it, repository=model) for name, it in PRESETS["a14b-quality"].components.items()}}
fetch(replace(PRESETS["a14b-quality"], components=parts), Path({str(tmp_path)!r}), endpoint={hub.url!r})
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    partial = folder / ".partial" / sha256(hub.files(MODEL)[SHARD])
    try:
        until(lambda: partial.exists() and partial.stat().st_size > 100_000, 30, "some of the shard is on disk")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        hold.set()
    there_bytes, finished = partial.stat().st_size, [path for path in files_in(folder) if path == CONFIG]
    assert finished == [CONFIG]
    hub.requests.clear()
    fetch()
    assert [it.start for it in hub.asked(SHARD)] == [there_bytes]
    assert hub.asked(CONFIG) == []
    assert check(preset, tmp_path) == []


@pytest.mark.parametrize("step", ["download", "verify", "convert"])
def test_ctrl_c(hub, fetch, preset, tmp_path, step):
    """In any step; what had arrived is not asked for again."""

    def stop(progress) -> None:
        if (progress.path, progress.step) == (SHARD, step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(sink=stop)
    assert check(preset, tmp_path) != []
    fetch()
    assert check(preset, tmp_path) == []
    starts = [it.start for it in hub.asked(SHARD)]
    assert len(starts) == (2 if step == "download" else 1)
    assert starts.count(0) == 1


def test_no_network(fetch):
    """A closed port."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(WeightsError, match=r"could not be reached .*refused.* run the same command again"):
            fetch(endpoint=f"http://127.0.0.1:{closed.getsockname()[1]}")


def test_two_at_once(fetch):
    """The second says who is there, and does nothing."""
    refused = []

    def second(_: object) -> None:
        if not refused:
            with pytest.raises(WeightsError, match="another fetch is at work in") as caught:
                fetch()
            refused.append(caught.value)

    assert fetch(sink=second) == 6
    assert len(refused) == 1


# Damaged


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("said", ["is missing", "is not whole", "is damaged: remove it"])
def test_a_shard_that_is_not_what_was_fetched(fetch, preset, tmp_path, folder, said):
    """An engine that starts says which, by size, and the way out: a fetch. A thorough check reads the contents, too."""
    shard = folder / SHARD
    content = shard.read_bytes()
    shard.unlink()
    if "missing" not in said:
        shard.write_bytes(b"short" if "whole" in said else content[:-1] + bytes([content[-1] ^ 1]))
    if "damaged" in said:
        require(preset, tmp_path)
        assert check(preset, tmp_path, thorough=False) == []
    else:
        with pytest.raises(WeightsError, match=f"{SHARD} {said}; run: i2v weights fetch a14b-fast$"):
            require(preset, tmp_path)
    assert check(preset, tmp_path) == [f"{shard} {said}"]
    shard.unlink(missing_ok=True)
    assert fetch() == 1
    require(preset, tmp_path)
    assert shard.read_bytes() == content


@pytest.mark.parametrize("name", ["a14b-fast", "tiny", "tiny-a14b"])
def test_nothing_there(tmp_path, name):
    """Of a preset that is fetched and of one that is built: one line, in plain words, with the way out."""
    said = f"there are no weights of {name} in {tmp_path}: run: i2v weights fetch {name}"
    assert check(PRESETS[name], tmp_path) == [said]
    with pytest.raises(WeightsError, match=f"^{said}$"):
        require(PRESETS[name], tmp_path)


@pytest.mark.parametrize("name", ["tiny", "tiny-a14b"])
def test_what_is_built_here(name, tmp_path):
    """Has no lock, but what loading needs; it is not fetched."""
    require(PRESETS[name], tiny_weights())
    assert check(PRESETS[name], tiny_weights()) == []
    shutil.copytree(tiny_weights() / name, tmp_path / name)
    (tmp_path / name / "tokenizer/tokenizer_config.json").unlink()  # which the engine does not read
    assert check(PRESETS[name], tmp_path) == []
    for path in ("tokenizer/tokenizer.json", SHARD):
        (tmp_path / name / path).unlink()
        assert f"{tmp_path / name / path} is missing" in check(PRESETS[name], tmp_path)
    with pytest.raises(WeightsError, match=f"tokenizer.json is missing; run: i2v weights fetch {name}$"):
        require(PRESETS[name], tmp_path)
    with pytest.raises(ValueError, match="is built here"):
        fetching.fetch(PRESETS[name], tmp_path)


NO_LOCKS = [b"", b"{}", b"[]", b'{"repository": "a", "revision": "main", "files": {}}', b"\xff"]
NO_INDEXES = [b"", b"[]", b'{"weight_map": []}', b"\xff"]


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("path,content", [*[(LOCK, it) for it in NO_LOCKS], *[(INDEX, it) for it in NO_INDEXES]])
def test_a_damaged_lock_or_index(fetch, preset, folder, path, content):
    """They are read at every start, so they must not end in a traceback: it says which, and what to remove."""
    size_bytes = (folder / path).stat().st_size if path == INDEX else 0  # by its size, an index would be fetched anew
    (folder / path).write_bytes(content.ljust(size_bytes))
    said = f"{folder / path} is damaged: remove {folder if path == LOCK else 'it'}"
    assert check(preset, folder.parent) == [said]
    with pytest.raises(WeightsError, match=f"^{said}; run: i2v weights fetch a14b-fast$"):
        require(preset, folder.parent)
    with pytest.raises(WeightsError, match=f"^{said}"):
        fetch()


@pytest.mark.parametrize("path", [SHARD, "tokenizer/tokenizer.json"])
def test_what_was_published_without_a_file_that_is_needed(hub, fetch, path):
    """A shard that the index knows, and the repository does not; a tokenizer that nothing here reads."""
    hub.publish(MODEL, {name: content for name, content in hub.files(MODEL).items() if name != path})
    preset = preset_at(hub)
    vae = preset.components["vae"]  # which is kept as published
    parts = {name: replace(vae, path=name) for name in ("tokenizer", "transformer")}
    with pytest.raises(WeightsError, match=f"{path} is missing, and was not published either"):
        fetch(replace(preset, components=parts))


def test_what_is_no_safetensors_file(hub, fetch):
    """Though it came as it was published."""
    hub.publish(MODEL, {**hub.files(MODEL), SHARD: b"pickle" * 100})
    with pytest.raises(WeightsError, match=r"is no safetensors file: .*header"):
        fetch(preset_at(hub))


# Which revision


@pytest.mark.usefixtures("there")
def test_a_lock_of_another_revision(hub, fetch, tmp_path, folder):
    """Nothing is overwritten and nothing is asked for: a person decides."""
    before, hub.requests[:] = files_in(tmp_path), []
    newer = preset_at(hub, revision="0" * 40)
    said = rf"{folder} holds revision {hub.revision(MODEL)}, not the pinned 0{{40}}: remove it"
    with pytest.raises(WeightsError, match=said):
        fetch(newer)
    with pytest.raises(WeightsError, match=f"{said}; run: i2v weights fetch a14b-fast"):
        require(newer, tmp_path)
    assert [line for line in check(newer, tmp_path) if "revision" in line] == check(newer, tmp_path)
    assert files_in(tmp_path) == before
    assert hub.requests == []


def test_no_revision_is_pinned(hub, fetch, tmp_path, folder):
    """The first fetch takes `main`, warns, and keeps to it when `main` moves on."""
    preset = preset_at(hub, revision=None)
    first = hub.revision(MODEL)
    with structlog.testing.capture_logs() as logs:
        fetch(preset)
    assert [it for it in logs if it["log_level"] == "warning"] == [
        {"event": "no revision is pinned", "log_level": "warning", "repository": MODEL, "taken": first}
    ]
    assert json.loads((folder / LOCK).read_bytes())["revision"] == first
    assert check(preset, tmp_path) == []
    hub.publish(MODEL, {**hub.files(MODEL), CONFIG: b"{}"})
    assert fetch(preset) == 0
    more = replace(preset, components={**preset.components, "vae": replace(preset.components["vae"], path="tokenizer")})
    with pytest.raises(WeightsError, match=rf"{MODEL} at {first}: not there \(404\)"):
        fetch(more)


# Refused


def test_non_commercial(hub, fetch):
    """Not without saying so."""
    preset = preset_at(hub, commercial_use=False, license="CC BY-NC-SA 4.0")
    with pytest.raises(WeightsError, match=rf"{MODEL} is for non-commercial use only \(CC BY-NC-SA 4\.0\)"):
        fetch(preset)
    assert hub.requests == []
    assert fetch(preset, accept_non_commercial=True) == 6


@pytest.mark.parametrize("status,said", [(401, "refused"), (403, "refused"), (404, "not there"), (400, "not there")])
@pytest.mark.parametrize("about", [MODEL, VAE, CONFIG])
def test_refusals(hub, fetch, about, status, said):
    """Gated, private, misspelled: at once, since asking again does not help, and in one line."""
    hub.go_wrong(about, Fault(status=status, headers={"X-Error-Message": "a\tb"}, body=b"<html>"))
    what = f"{MODEL} at {hub.revision(MODEL)}" if about == MODEL else f"{MODEL}: {about}"
    with pytest.raises(WeightsError, match=rf"^{what}: {said} \({status}\).*$"):
        fetch()
    assert len(hub.asked(about)) == 1


def test_names_that_the_hub_does_not_know(hub, fetch):
    """A repository, a revision, a folder, a file."""
    whole = whole_at(hub)
    with pytest.raises(WeightsError, match=r"wan/other at [0-9a-f]+: refused \(401\)"):
        fetch(preset_at(hub, name="wan/other"))
    with pytest.raises(WeightsError, match=r"wan/model at 0+: not there \(404\)"):
        fetch(preset_at(hub, revision="0" * 40))
    part = replace(whole.components["vae"], path="vae_2")
    with pytest.raises(WeightsError, match=rf"{MODEL} has no vae_2 at revision {hub.revision(MODEL)}"):
        fetch(replace(whole, components={**whole.components, "vae": part}))
    with pytest.raises(WeightsError, match=rf"{LORAS} has no other\.safetensors at revision"):
        fetch(replace(whole, loras=(replace(whole.loras[0], path="other.safetensors"),)))


NO_HUB = r"127\.0\.0\.1 does not answer as a hub about wan/model"


@pytest.mark.parametrize(
    "body,said",
    [
        (b"<html>Sign in to the hotel</html>", NO_HUB),
        (b"[]", NO_HUB),
        (b"{}", NO_HUB),
        (b'{"sha": "main", "siblings": []}', NO_HUB),
        (b'{"sha": "%s", "siblings": [{"rfilename": "vae/config.json"}]}' % (b"a" * 40), NO_HUB),
        (b'{"sha": "%s", "siblings": [{"rfilename": "a.json", "size": 1, "blobId": "../../x"}]}' % (b"a" * 40), NO_HUB),
        (b'{"sha": "%s", "siblings": []}' % (b"f" * 40), "wan/model: the hub answered with revision f+, pinned is "),
    ],
)
def test_what_is_no_hub(hub, fetch, tmp_path, body, said):
    """A captive portal; a mirror that only knows the newest; or somebody who means no good: digests name files here."""
    hub.go_wrong(MODEL, Fault(body=body))
    with pytest.raises(WeightsError, match=said):
        fetch()
    assert files_in(tmp_path) == {}


def test_a_path_that_leads_out(hub, fetch, tmp_path):
    """Of a folder that only we write to."""
    hub.publish(MODEL, {**hub.files(MODEL), "vae/../../../evil.json": b"{}"})
    fetch(preset_at(hub), tmp_path / "weights")
    assert not list(tmp_path.rglob("evil.json"))
    assert not any("evil" in it.path for it in hub.requests)


@pytest.mark.parametrize("endpoint", ["", "nowhere", "ftp://h", "http://[::1", "http://h:port", "http://h:99999"])
def test_what_is_no_address(fetch, endpoint):
    """In one line."""
    with pytest.raises(WeightsError, match=r"is not a URL|could not be reached"):
        fetch(endpoint=endpoint or "://")


def test_the_token_is_for_the_hub_alone(hub, fetch, caplog):
    """The CDN has the credential of the redirect; errors and logs have neither."""
    fetch(token=TOKEN)
    assert {it.authorization for it in hub.requests if not it.of_cdn} == {f"Bearer {TOKEN}"}
    assert {it.authorization for it in hub.requests if it.of_cdn} == {None}
    assert TOKEN not in caplog.text


def test_no_error_shows_a_credential(hub, fetch, tmp_path):
    """Not of the token, not of a redirect; nor of a token with a line feed, which httpx would print."""
    lost = Fault(status=302, headers={"Location": "http://cdn:credential/"})
    hub.go_wrong(VAE, *[Fault(status=503)] * 3, Fault(status=403), *[Fault(cut_after=0)] * 3)
    hub.go_wrong(CONFIG, *[lost] * 3)
    for _ in range(4):
        with pytest.raises(WeightsError) as caught:
            fetch(token=TOKEN)
        assert TOKEN not in str(caught.value)
        assert "credential" not in str(caught.value)
    for token in (f"{TOKEN}\n", f"{TOKEN}ß"):
        with pytest.raises(WeightsError, match="characters that no token has") as caught:
            fetch(folder=tmp_path / "other", token=token)
        assert TOKEN not in str(caught.value)


# The machine


def test_room_for_the_finished_files_and_one_more(hub, fetch, preset, finished, tmp_path):
    """That much is needed, and no more; less is known of before the first byte."""
    files = files_in(folder_of(finished, preset.components["vae"].repository))
    finished_bytes = sum(len(content) for path, content in files.items() if path.startswith(("vae", "transformer/")))
    shard_bytes = len(hub.files(MODEL)[SHARD])
    with (
        small_disk(tmp_path / "small", str(finished_bytes + shard_bytes // 2)) as disk,
        pytest.raises(DiskFull, match=rf"GB are to come and 0\.00.* GB are free in {disk}: free some"),
    ):
        fetch(folder=disk)
    assert not any("/resolve/" in it.path for it in hub.requests)
    with small_disk(tmp_path / "enough", str(finished_bytes + shard_bytes + 100_000)) as disk:
        assert fetch(folder=disk) == 6
        assert not list(disk.rglob(".partial"))


def test_room_that_is_taken_already(hub, fetch, preset, tmp_path):
    """By what has arrived: it is not asked for twice."""
    vae = replace(preset, components={"vae": preset.components["vae"]})

    def stop(progress) -> None:
        if (progress.path, progress.step) == (VAE, "verify"):
            raise KeyboardInterrupt

    with small_disk(tmp_path / "disk", str(len(hub.files(MODEL)[VAE]) * 3 // 2)) as disk:
        with pytest.raises(KeyboardInterrupt):
            fetch(vae, folder=disk, sink=stop)
        assert fetch(vae, folder=disk) == 1


@pytest.mark.parametrize("step", ["download", "convert"])
def test_a_disk_that_fills_up(fetch, preset, tmp_path, step):
    """By somebody else, half-way: what arrived is kept, and with room it goes on."""
    with small_disk(tmp_path / "disk", "30m") as disk:
        filler = tmp_path / "disk" / "filler"

        def fill(progress) -> None:
            if (progress.path, progress.step) == (SHARD, step) and not filler.exists():
                with filler.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - 4096)

        with pytest.raises(DiskFull, match=r"no room is left in .* run the same command again"):
            fetch(folder=disk, sink=fill)
        filler.unlink()
        fetch(folder=disk)
        assert check(preset, disk) == []


def test_a_folder_that_cannot_be(fetch, preset, tmp_path):
    """One line that names it."""
    (tmp_path / "file").touch()
    for call in (fetch, check, require):
        with pytest.raises(WeightsError, match="file"):
            call(preset, tmp_path / "file") if call is not fetch else fetch(folder=tmp_path / "file")


def test_torch_is_not_imported():
    """An engine's start reads ahead while torch is imported; and a machine without it can check."""
    program = f"""
import sys
from pathlib import Path
for name in ("torch", "safetensors", "huggingface_hub", "diffusers"): sys.modules[name] = None
from inference.engines.wan.presets import PRESETS
from inference.engines.wan import fetching
from inference.engines.wan.weights import check, read_ahead, require, weight_files
where = Path({str(tiny_weights())!r})
require(PRESETS["tiny"], where)
read_ahead(weight_files(PRESETS["tiny"], where)).join()
assert len(check(PRESETS["a14b-fast"], where)) == 1
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=ROOT, timeout=60)


def test_saving_as_bf16_takes_torch(hub, fetch, monkeypatch):
    """Known before the first byte of a hundred gigabytes."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"takes torch: pip install 'serverless-i2v\[wan\]'"):
        fetch()
    assert not any("/resolve/" in it.path for it in hub.requests)


@pytest.mark.parametrize("text", [None, "", "MemTotal: 1 kB\n", "MemTotal: 1 kB\nMemAvailable:  1000000 kB\n"])
def test_reading_ahead(monkeypatch, tmp_path, text):
    """Beside whatever else goes on it reads to the end, and complains of nothing on the way."""
    monkeypatch.setattr(weights, "MEMINFO", tmp_path / "meminfo")
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    os.mkfifo(tmp_path / "pipe")
    thread = read_ahead([tmp_path / "missing", tmp_path, tmp_path / "pipe"])
    (tmp_path / "pipe").write_bytes(bytes(300_000))  # a pipe holds 64 KiB: the rest waits for a reader
    thread.join(10)
    assert not thread.is_alive()


def test_no_more_is_read_ahead_than_memory_holds(monkeypatch, tmp_path):
    """Three quarters of what is available, within a file and over files: more would push out what was read."""
    monkeypatch.setattr(weights, "MEMINFO", tmp_path / "meminfo")
    weights.MEMINFO.write_text("MemFree: 1 kB\nMemAvailable:    2000 kB\nSwapFree: 9 kB\n")
    monkeypatch.setattr(weights, "READ_AHEAD_BYTES", 10_000)
    (tmp_path / "first").write_bytes(bytes(1_000_000))
    for name in ("second", "third"):
        os.mkfifo(tmp_path / name)  # to open the third would wait for somebody who writes
    thread = read_ahead([tmp_path / name for name in ("first", "second", "third")])
    taken_bytes = 0
    with suppress(BrokenPipeError), (tmp_path / "second").open("wb", buffering=0) as pipe:
        while taken_bytes < 2_000_000:
            taken_bytes += pipe.write(bytes(1000))
    thread.join(10)
    assert not thread.is_alive()
    assert 0 <= 1_000_000 + taken_bytes - 1500 * 1024 <= 10_000 + 65_536 + 1000  # read, in the pipe, at once


# The hub of these tests


def test_the_hub_is_one_to_its_own_client(hub, tmp_path):
    """huggingface_hub lists and downloads from it: what it takes for an answer, these tests may, too."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=False)
    info = api.model_info(MODEL, revision=hub.revision(MODEL), files_metadata=True)
    assert info.sha == hub.revision(MODEL)
    listed = {it.rfilename: it.lfs.sha256 if it.lfs else it.blob_id for it in info.siblings}
    assert listed[SHARD] == sha256(hub.files(MODEL)[SHARD])
    assert listed[CONFIG] == git_sha1(hub.files(MODEL)[CONFIG])
    for path in (SHARD, CONFIG):
        got = api.hf_hub_download(MODEL, path, revision=info.sha, local_dir=tmp_path / "got")
        assert Path(got).read_bytes() == hub.files(MODEL)[path]
