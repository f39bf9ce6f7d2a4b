"""Where log lines go, and what must never be in them."""

import json
import logging
import os

import httpx
import pytest
import structlog

from inference import logs


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
    logs.configure("info", as_json=True)
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
    logs.configure("info", as_json=True)
    hostile = "천\x9b2J\u202e\ud800\x7f👨\u200d👩"
    structlog.get_logger().info("lease_started", prompt=hostile)
    said = capsys.readouterr().err
    assert lines(said)[0]["prompt"] == hostile
    assert '"천\\u009b2J\\u202e\\ud800\\u007f👨‍👩"' in said


def test_an_exception_stays_on_one_line(capsys):
    """Its traceback is a field, so that what collects logs does not tear it apart."""
    logs.configure("info", as_json=True)
    structlog.get_logger().error("unexpected_error", exc_info=ValueError("two\nlines"))
    [line] = lines(capsys.readouterr().err)
    assert "ValueError: two\nlines" in line["exception"]


def test_the_level_holds_for_both(capsys):
    """Below it nothing is said."""
    logs.configure("warning", as_json=True)
    structlog.get_logger().info("quiet")
    logging.getLogger("library").info("quiet")
    structlog.get_logger().warning("loud")
    assert [line["event"] for line in lines(capsys.readouterr().err)] == ["loud"]


@pytest.mark.anyio
async def test_urls_stay_out_even_at_debug(capsys):
    """Libraries log requests with their URLs, and presigned ones carry credentials in the query."""
    logs.configure("debug", as_json=True)
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200))) as client:
        await client.get("https://storage.example.com/object?token=secret")
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:1/object?token=secret")
    assert "secret" not in capsys.readouterr().err


def test_a_file_is_written_besides(capsys, tmp_path):
    """JSON in any case; the folder is made."""
    logs.configure("info", as_json=False, log_dir=tmp_path / "new" / "logs")
    structlog.get_logger().info("lease_started", item_id="1")
    assert '{"' not in capsys.readouterr().err
    [line] = lines((tmp_path / "new" / "logs" / "i2v.log").read_text())
    assert line["event"] == "lease_started"


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
    logs.configure("info", as_json=False)

    def ask(api_key, url):
        raise ValueError(f"unexpected, {len(api_key)} and {len(url)} characters")

    try:
        ask("SECRET-KEY", "https://storage.example/v?token=SECRET-TOKEN")
    except ValueError as error:
        structlog.get_logger().error("unexpected_error", exc_info=error)
    said = capsys.readouterr().err
    assert "ValueError: unexpected, 10 and 44 characters" in said
    assert "SECRET" not in said.replace('ask("SECRET-KEY", "https://storage.example/v?token=SECRET-TOKEN")', "")
