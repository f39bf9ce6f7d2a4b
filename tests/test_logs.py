"""Where log lines go, and what must never be in them."""

import errno
import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import structlog

from inference import logs, private
from tests.support.disk import small_disk


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """What `configure` does to the root logger does not reach the next test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(text):
    """Parsed log lines; every line has to be one."""
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_is_json_ours_and_the_libraries(capsys):
    """With the fields they were given, the level and the time; text stays readable."""
    logs.configure("info", log_format="json")
    structlog.get_logger("inference.x").info("lease_started", item_id="1", prompt="천천히")
    logging.getLogger("uvicorn.error").warning("a library says %s", "this")
    said = capsys.readouterr().err
    assert "천천히" in said
    ours, theirs = lines(said)
    assert (ours["event"], ours["item_id"], ours["level"]) == ("lease_started", "1", "info")
    assert (theirs["event"], theirs["level"]) == ("a library says this", "warning")
    assert ours["timestamp"].endswith("Z")


def test_what_is_not_legible_is_escaped(capsys):
    """JSON that means the same: whoever looks at it on a terminal gives no orders to it."""
    logs.configure("info", log_format="json")
    hostile = "천\x9b2J\u202e\ud800\x7f👨\u200d👩"
    structlog.get_logger().info("lease_started", prompt=hostile)
    said = capsys.readouterr().err
    assert lines(said)[0]["prompt"] == hostile
    assert '"천\\u009b2J\\u202e\\ud800\\u007f👨‍👩"' in said


def test_an_exception_stays_on_one_line(capsys):
    """Its traceback is a field, so that what collects logs does not tear it apart."""
    logs.configure("info", log_format="json")
    structlog.get_logger().error("unexpected_error", exc_info=ValueError("two\nlines"))
    [line] = lines(capsys.readouterr().err)
    assert "ValueError: two\nlines" in line["exception"]


def test_the_level_holds_for_both(capsys):
    """Below it nothing is said."""
    logs.configure("warning", log_format="json")
    structlog.get_logger().info("quiet")
    logging.getLogger("library").info("quiet")
    structlog.get_logger().warning("loud")
    assert [line["event"] for line in lines(capsys.readouterr().err)] == ["loud"]


@pytest.mark.anyio
async def test_urls_stay_out_even_at_debug(capsys):
    """Libraries log requests with their URLs, and presigned ones carry credentials in the query."""
    logs.configure("debug", log_format="json")
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200))) as client:
        await client.get("https://storage.example.com/object?token=secret")
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:1/object?token=secret")
    assert "secret" not in capsys.readouterr().err


def test_a_file_is_written_besides(capsys, tmp_path):
    """JSON in any case; the folder is made."""
    logs.configure("info", log_format="console", log_dir=tmp_path / "new" / "logs")
    structlog.get_logger().info("lease_started", item_id="1")
    assert '{"' not in capsys.readouterr().err
    [line] = lines((tmp_path / "new" / "logs" / "i2v.log").read_text())
    assert line["event"] == "lease_started"


def test_two_of_one_name_never_turn_over_one_file(tmp_path, monkeypatch):
    """Each worker has a file by its name. A second process of that name has a second one, until the first ends."""
    monkeypatch.setattr(logs, "LOG_FILE_BYTES", 200)
    folder = tmp_path / "logs"
    other = logs._PrivateFile.claimed(folder_of(folder), "i2v-w1")
    other.handle(logging.makeLogRecord({"msg": "from the other process"}))
    logs.configure("info", log_dir=folder, worker_id="w1")
    for number in range(5):
        structlog.get_logger().info("lease_started", number=number, prompt="x" * 150)
    other.handle(logging.makeLogRecord({"msg": "again"}))
    other.close()
    assert (folder / "i2v-w1.log").read_text() == "from the other process\nagain\n"
    kept = [line["number"] for path in folder.glob("i2v-w1.2.log*") for line in lines(path.read_text())]
    assert sorted(kept) == [0, 1, 2, 3, 4]
    logs.configure("info", log_dir=folder, worker_id="w1")
    structlog.get_logger().info("stopping")
    assert "stopping" in (folder / "i2v-w1.log").read_text()
    logs.configure("info", log_dir=folder, worker_id="w2")
    assert (folder / "i2v-w2.log").exists()


def test_a_file_that_is_being_turned_over_is_not_free(tmp_path):
    """Not even in the moment in which the next one is not there yet."""
    log = logs._PrivateFile.claimed(tmp_path, "i2v-w1")
    log.handle(logging.makeLogRecord({"msg": "x"}))
    claimed = []

    def turn_over(source, target):
        Path(source).rename(target)
        claimed.append(logs._PrivateFile.claimed(tmp_path, "i2v-w1"))

    log.rotator = turn_over
    log.doRollover()
    log.close()
    claimed[0].close()
    assert Path(claimed[0].baseFilename).name == "i2v-w1.2.log"


def test_a_folder_without_locks_takes_a_log(tmp_path, monkeypatch):
    """As NFS refuses them. One file is written; nobody looks for a free one for ever."""

    def refuse(*_arguments):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(private.fcntl, "flock", refuse)
    monkeypatch.setattr(logs, "itertools", SimpleNamespace(count=lambda first: range(first, 5)))
    logs.configure("info", log_dir=tmp_path, worker_id="w1")
    structlog.get_logger().info("stopping")
    assert "stopping" in (tmp_path / "i2v-w1.log").read_text()


def test_a_full_disk_is_told_once(capsys, tmp_path):
    """And not with a traceback for each line; what is logged when there is room again is in the file."""
    with small_disk(tmp_path / "disk", "100k") as disk:
        logs.configure("info", log_format="json", log_dir=disk / "logs")
        for _ in range(2):
            with suppress(OSError):
                (disk / "much").write_bytes(bytes(200_000))
            for _ in range(3):
                structlog.get_logger().info("lease_started", prompt="x" * 5000)
            (disk / "much").unlink()
            structlog.get_logger().info("stopping")
        told = [line["event"] for line in lines(capsys.readouterr().err)]
        assert told == ["lease_started", "log_file_not_written", *["lease_started"] * 2, "stopping"] * 2
        assert (disk / "logs" / "i2v.log").read_text().count("stopping") == 2
        logging.getLogger().handlers[1].close()


def folder_of(path):
    """The folder, made."""
    path.mkdir()
    return path


def test_sentences_have_the_documents_steps(capsys, tmp_path):
    """The same on stderr and in the file: when, how important, who; then what, and what else was said of it."""
    logs.configure("info", log_format="human", log_dir=tmp_path, worker_id="runway-worker-001")
    log, lease = structlog.get_logger(), {"item_id": "1", "worker_id": "runway-worker-001.x"}
    log.info("worker_started", queue="https://app.example.com", worker_id="runway-worker-001", engine="runway")
    log.info("idle", polls=60, last_item_id="0", last_status="completed", last_s_ago=300)
    log.info("lease_started", **lease, prompt_chars=3, duration_s=5.0)
    for stage in ("download", "wait", "generate", "upload", "report", "done"):
        log.info("stage", item_id="1", stage=stage)
        if stage in ("download", "upload"):
            log.info("presigned", item_id="1", operation=stage)
    log.info("lease_ended", **lease, status="completed", stage_seconds={"download": 0.1, "generate": 31.2})
    log.warning("lease_ended", **lease, status="failed", error="Runway: refused\n\x1b[2J")
    log.warning("lease_ended", **lease, status="released", error="away", machine_at_fault=False)
    log.warning("heartbeat_failed", item_id="1", error="no answer")
    logging.getLogger("library").error("a library says so")
    said = capsys.readouterr().err
    assert (tmp_path / "i2v-runway-worker-001.log").read_text() == said
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    told = [re.fullmatch(rf"{when} \[(\w+)\] \[runway-worker-001\] (.+)", line) for line in said.splitlines()]
    assert [f"{line[1]} {line[2]}" for line in told] == [
        "INFO Worker started, engine runway, queue https://app.example.com",
        "INFO [IDLE] No task: 60 questions since the last line last_item_id=0 last_status=completed last_s_ago=300",
        "INFO Task started: 1 prompt_chars=3 duration_s=5.0",
        "INFO [STEP 1/6] Asking where the photo is item_id=1",
        "INFO [STEP 2/6] Downloading the photo item_id=1",
        "INFO Waiting for the engine item_id=1",
        "INFO [STEP 3/6] Making the video: generate item_id=1",
        "INFO [STEP 4/6] Asking where the video goes item_id=1",
        "INFO [STEP 5/6] Uploading the video item_id=1",
        "INFO [STEP 6/6] Reporting the video item_id=1",
        "INFO Reported item_id=1",
        "INFO Task complete: 1 (SUCCESS) stage_seconds=download:0.1,generate:31.2",
        "WARNING Task complete: 1 (FAILED): Runway: refused\ufffd\ufffd[2J",
        "WARNING Task ended here: 1 (released): away machine_at_fault=False",
        'WARNING heartbeat_failed item_id=1 error="no answer"',
        "ERROR a library says so",
    ]


def test_a_traceback_among_sentences_stays_whole(capsys):
    """Below its line, without local variables."""
    logs.configure("info", log_format="human")
    structlog.get_logger().error("unexpected_error", exc_info=ValueError("two\nlines"))
    first, *traceback = capsys.readouterr().err.splitlines()
    assert first.endswith("[ERROR] unexpected_error")
    assert traceback[-2:] == ["ValueError: two", "lines"]


def test_a_file_is_for_this_user_alone(tmp_path, monkeypatch):
    """Prompts and paths are in it. The current one, those before it, and what an earlier version left open."""
    monkeypatch.setattr(logs, "LOG_FILE_BYTES", 200)
    folder = tmp_path / "logs"
    for _ in range(2):
        before = os.umask(0)
        try:
            logs.configure("info", log_dir=folder)
            for _ in range(3):
                structlog.get_logger().info("lease_started", prompt="x" * 200)
        finally:
            os.umask(before)
        kept = [folder, *folder.iterdir()]
        assert len(kept) > 3
        assert not [path for path in kept if path.stat().st_mode & 0o077]
        for path in kept:
            path.chmod(0o777 if path.is_dir() else 0o666)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    """Better at the start than a log that is not there when it is needed."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        logs.configure("info", log_dir=tmp_path / "file" / "logs")


def test_a_traceback_for_people_shows_no_local_variables(capsys):
    """Among them are keys, and URLs whose query is as good as a key."""
    logs.configure("info", log_format="console")

    def ask(api_key, url):
        raise ValueError(f"unexpected, {len(api_key)} and {len(url)} characters")

    try:
        ask("SECRET-KEY", "https://storage.example/v?token=SECRET-TOKEN")
    except ValueError as error:
        structlog.get_logger().error("unexpected_error", exc_info=error)
    said = capsys.readouterr().err
    assert "ValueError: unexpected, 10 and 44 characters" in said
    assert "SECRET" not in said.replace('ask("SECRET-KEY", "https://storage.example/v?token=SECRET-TOKEN")', "")
