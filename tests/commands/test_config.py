"""`--config`: the commands that take settings from a file beside the environment."""

import json

import pytest

from tests.support.processes import KEY, Site, i2v_here


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A queue without tasks."""
    with Site(tmp_path_factory.mktemp("site")) as site:
        yield site


def test_a_worker_and_its_check_take_the_same_file(capsys, tmp_path, site):
    """Queue, key and name from it; what the command line says goes before it."""
    (tmp_path / "config.yaml").write_text(
        f'vercel_api_url: "{site.url}"\nworker_token: "${{KEY_OF_THE_TEST}}"\nworker_id: from-file\nlog_dir: logs\n'
    )
    given = {"KEY_OF_THE_TEST": KEY, "TMPDIR": tmp_path}
    ran = i2v_here(capsys, tmp_path, "work", "--once", "--config", "config.yaml", **given)
    assert ran.returncode == 0, ran.stderr
    events = {line["event"]: line for line in map(json.loads, ran.stderr.splitlines())}
    assert (events["worker_started"]["worker_id"], events["worker_started"]["queue"]) == ("from-file", site.url)
    assert "no_task" in events
    assert (tmp_path / "logs" / "i2v-from-file.log").read_text() == ran.stderr
    checked = i2v_here(capsys, tmp_path, "doctor", "--config", "config.yaml", **given)
    assert "worker from-file" in checked.stdout + checked.stderr
    assert f"{site.url} answers and accepts the key" in checked.stdout + checked.stderr
    elsewhere = ("work", "--once", "--config", "config.yaml", "--url", "http://127.0.0.1:1")
    assert "no queue at http://127.0.0.1:1" in i2v_here(capsys, tmp_path, *elsewhere, **given).stderr


@pytest.mark.parametrize("command", ["work", "up", "serve", "doctor"])
def test_a_mistake_in_it_is_one_line(capsys, tmp_path, command):
    """Whichever command is told to read it."""
    (tmp_path / "config.yaml").write_text("worker_tokn: k\n")
    ran = i2v_here(capsys, tmp_path, command, "--config", "config.yaml", COLUMNS=200)
    assert ran.returncode == 1
    told = [line for line in (ran.stdout + ran.stderr).splitlines() if "worker_tokn" in line]
    assert len(told) == 1
    assert "--config: config.yaml: there is no worker_tokn: did you mean worker_token?" in told[0]
