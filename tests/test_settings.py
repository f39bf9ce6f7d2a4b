"""Settings: documented names, all problems at once, nothing secret in a message."""

import sys
from pathlib import Path

import pytest
import structlog

from inference.errors import SettingsError
from inference.settings import Settings, example

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_documented_names_are_accepted(monkeypatch):
    """Both names of the URL, and the intervals as the documents spell them."""
    monkeypatch.setenv("NEXT_API_URL", "https://app.example.com/api")
    monkeypatch.setenv("WORKER_API_KEY", "k")
    monkeypatch.setenv("POLL_INTERVAL", "10")
    monkeypatch.setenv("LEASE_DURATION", "900")
    settings = Settings.load("api_url", "api_key")
    assert settings.api_url == "https://app.example.com/api"
    assert (settings.poll_interval_s, settings.lease_duration_s) == (10, 900)
    assert settings.api_key.get_secret_value() == "k"


def test_the_other_documented_names_are_accepted(monkeypatch):
    """The documents of the workers spell one of them in two ways."""
    monkeypatch.setenv("POLLING_INTERVAL", "7")
    assert Settings.load().poll_interval_s == 7


def test_settings_that_nothing_reads_are_told_once(monkeypatch, tmp_path):
    """A warning each, from the environment and `.env`, by name alone; what may have been meant is said."""
    (tmp_path / ".env").write_text("I2V_ENGIN=wan\nWORKER_ID=w\nSOMEBODY_ELSES=1\n")
    monkeypatch.setenv("RUNWAY_SEED", "secret")
    monkeypatch.setenv("RUNPOD_POD_HOSTNAME", "set by RunPod")
    monkeypatch.setenv("POLLING_INTERVAL", "7")
    settings = Settings.load()
    with structlog.testing.capture_logs() as logged:
        settings.warn_of_unread()
    assert logged == [
        {"event": "nothing reads I2V_ENGIN: did you mean I2V_ENGINE?", "log_level": "warning"},
        {"event": "nothing reads RUNWAY_SEED: it is no setting", "log_level": "warning"},
    ]
    monkeypatch.delenv("RUNWAY_SEED")
    (tmp_path / ".env").unlink()
    with structlog.testing.capture_logs() as logged:
        Settings.load().warn_of_unread()
    assert logged == []


@pytest.mark.parametrize(
    "given,meant",
    [
        ("WORKER_APIKEY", "WORKER_API_KEY"),
        ("WORKER_API_KYE", "WORKER_API_KEY"),
        ("VERCEL_API_UR", "VERCEL_API_URL"),
        ("RUNWAYML_API_SECRETS", "RUNWAYML_API_SECRET"),
        ("POLL_INTERVALL", "POLL_INTERVAL"),
        ("LEASEDURATION", "LEASE_DURATION"),
        ("i2v_wan_presets", "I2V_WAN_PRESET"),
    ],
)
def test_a_slip_of_the_pen_is_known(monkeypatch, given, meant):
    """Also where the name could be any program's."""
    monkeypatch.setenv(given, "secret")
    assert Settings.unread() == [f"nothing reads {given.upper()}: did you mean {meant}?"]


OF_OTHERS = """
NEXT_APP_URL NEXT_PUBLIC_API_URL VERCEL_URL VERCEL_ENV TEMPDIR LOGDIR REDIS_URI REDIS_URLS BUCKET_PREFIX PORT HF_HOME
MODAL_TOKEN_ID MODAL_ENVIRONMENT RUNPOD_POD_HOSTNAME RUNWAYML_BASE_URL LEASE_OWNER POLL_URL AWS_ACCESS_KEY_ID
WORKER_NAME WORKER_CLASS HEARTBEAT_URL
"""


@pytest.mark.parametrize("given", OF_OTHERS.split())
def test_what_other_programs_read_is_theirs(monkeypatch, given):
    """No warning that somebody would have to explain away."""
    monkeypatch.setenv(given, "1")
    assert Settings.unread() == []


def test_a_name_beside_the_right_one_is_no_slip(monkeypatch):
    """Two applications may share an environment."""
    monkeypatch.setenv("WORKER_API_KEY", "k")
    monkeypatch.setenv("WORKER_API_KEYS", "k,l")
    assert Settings.unread() == []


def test_a_setting_that_is_missing_and_its_slip_are_told_together(monkeypatch):
    """Nobody sees a warning that would come after the start."""
    monkeypatch.setenv("VERCEL_API_UR", "https://app.example.com")
    with pytest.raises(SettingsError) as caught:
        Settings.load("api_url")
    missing, slip = str(caught.value).splitlines()
    assert missing.startswith("VERCEL_API_URL or NEXT_API_URL is not set")
    assert slip == "nothing reads VERCEL_API_UR: did you mean VERCEL_API_URL?"
    with pytest.raises(SettingsError) as caught:
        Settings.isolated(port=-1)
    assert len(str(caught.value).splitlines()) == 1


def test_all_problems_are_told_at_once_and_by_name(monkeypatch):
    """Somebody who fixes settings should not have to start the program once per mistake."""
    monkeypatch.setenv("LEASE_DURATION", "ten minutes")
    monkeypatch.setenv("I2V_CONCURRENCY", "0")
    with pytest.raises(SettingsError) as caught:
        Settings.load("api_url", "api_key")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    for name in (
        "VERCEL_API_URL or NEXT_API_URL is not set",
        "WORKER_API_KEY is not set",
        "LEASE_DURATION",
        "I2V_CONC",
    ):
        assert any(line.startswith(name) for line in lines), lines


def test_a_malformed_secret_is_not_repeated(monkeypatch):
    """Values never appear in messages: one of them may be a key in the wrong variable."""
    monkeypatch.setenv("VERCEL_API_URL", "sk_live_1234567890")
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert "sk_live" not in str(caught.value)
    assert "VERCEL_API_URL" in str(caught.value)


@pytest.mark.parametrize("given", ["a/b", "https://api.runpod.ai/v2/ep1", "ep1\n", "my endpoint", "..", "x" * 101])
def test_an_endpoint_id_is_told_by_an_example(given):
    """Nobody reads a pattern."""
    with pytest.raises(SettingsError) as caught:
        Settings.isolated(runpod_endpoint_id=given)
    assert str(caught.value).startswith("RUNPOD_ENDPOINT_ID: has to be an endpoint's id, such as 4lrqs0ab1cd2ef")
    assert "pattern" not in str(caught.value)
    assert Settings.isolated(runpod_endpoint_id="4lrqs0ab1cd2ef").runpod_endpoint_id == "4lrqs0ab1cd2ef"


def test_beats_have_to_fit_into_the_lease(monkeypatch):
    """A heartbeat interval above half the extension would lose leases to one late beat."""
    monkeypatch.setenv("HEARTBEAT_INTERVAL", "200")
    with pytest.raises(SettingsError, match="HEARTBEAT_INTERVAL"):
        Settings.load()


def test_settings_that_would_fail_every_task_are_refused_at_the_start():
    """A limit that was meant in megabytes."""
    with pytest.raises(SettingsError, match="I2V_MAX_PHOTO_BYTES"):
        Settings.isolated(max_photo_bytes=50)


def test_a_dotenv_file_is_read_and_the_environment_wins(monkeypatch, tmp_path):
    """`.env` in the working directory, as the documents of the served systems use it."""
    (tmp_path / ".env").write_text("POLL_INTERVAL=7\nWORKER_ID=from-file\nSOMEBODY_ELSES=1\n")
    monkeypatch.setenv("WORKER_ID", "from-env")
    settings = Settings.load()
    assert (settings.poll_interval_s, settings.worker_id) == (7, "from-env")


def test_a_dotenv_file_as_other_systems_write_it(monkeypatch, tmp_path):
    """With a mark before the first name, as Windows does; what is not UTF-8 is told, and nothing that is in it."""
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("POLL_INTERVAL=7\n", encoding="utf-8-sig")
    assert Settings.load().poll_interval_s == 7
    for encoding in ("cp949", "utf-16"):
        Path(".env").write_text("# 비밀\nPOLL_INTERVAL=7\n", encoding=encoding)
        with pytest.raises(SettingsError, match=r"^\.env is not UTF-8$"):
            Settings.load()


def test_overrides_win_and_satisfy_requirements():
    """What a command line says beats everything else."""
    assert Settings.load("api_url", api_url="http://127.0.0.1:8000").api_url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    "given, meant",
    [("true", "on"), ("1", "on"), ("Yes", "on"), ("false", "off"), ("0", "off"), ("AUTO", "auto"), ("off", "off")],
)
def test_compiling_was_a_switch_before_it_had_three_values(given, meant):
    """What people have written down goes on meaning the same."""
    assert Settings.load(wan_compile=given).wan_compile == meant
    with pytest.raises(SettingsError, match=r"I2V_WAN_COMPILE: input should be 'auto', 'on' or 'off'"):
        Settings.load(wan_compile="maybe")


def test_the_example_lists_every_setting_with_its_default():
    """`.env.example` is what `python -m inference.settings` prints."""
    assert (ROOT / ".env.example").read_text() == example()
    for field in Settings.model_fields.values():
        assert f"# {field.validation_alias.choices[0]}=" in example()


@pytest.mark.parametrize(
    "name",
    ["VERCEL_API_URL", "I2V_PUBLIC_URL", "BUCKET_ENDPOINT_URL", "I2V_RUNPOD_WEBHOOK", "I2V_RUNWAY_URL"],
)
def test_a_port_that_there_is_not_is_told(monkeypatch, name):
    """Before anything connects there, which ends in a traceback."""
    monkeypatch.setenv(name, "https://app.example.com:99999")
    with pytest.raises(SettingsError, match=f"^{name}: .*there is no port 99999$"):
        Settings.load()


KEYS = ["WORKER_API_KEY", "RUNWAYML_API_SECRET", "RUNPOD_API_KEY", "HF_TOKEN"]
KEYS += ["BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"]


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_taken_without_the_blanks_around_it(monkeypatch, name):
    """Copied from a page it has some; within it they are a mistake, which is told without the key."""
    [field] = [field for field, it in Settings.model_fields.items() if name in it.validation_alias.choices]
    monkeypatch.setenv(name, " sekret\r\n")
    key = getattr(Settings.load(), field)
    assert (key if isinstance(key, str) else key.get_secret_value()) == "sekret"
    for wrong, says in (
        ("sek ret", "without blanks"),
        ("sek\tret", "ASCII"),
        ("sekrét", "ASCII"),
        ("  ", "leave it out"),
    ):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(SettingsError, match=f"^{name}: .*{says}") as caught:
            Settings.load()
        assert "sek" not in str(caught.value)


DOCUMENTED = """\
# as the document of the Runway worker has it
vercel_api_url: "${NEXT_API_URL}"
worker_token: "${WORKER_API_KEY}"
runway_api_key: "${RUNWAY_API_KEY}"
worker_id: "${WORKER_ID}"
worker_type: "runway"
api_timeout: 30
lease_duration_seconds: 900
heartbeat_interval: 110
runway_timeout: 500
runway_default_duration: 6.0
runway_default_ratio: "1280:720"
temp_dir: "./temp"
log_dir: "./logs"
auto_cleanup_temp: false
polling_interval_slow: 60
polling_interval_fast: 5
fast_polling_duration: 1800
"""


@pytest.fixture
def config(tmp_path):
    """Writes a file of settings; its path."""

    def write(text):
        (tmp_path / "config.yaml").write_text(text)
        return tmp_path / "config.yaml"

    return write


def test_the_documents_config_file_is_read(monkeypatch, tmp_path, config):
    """By its own names, with secrets from the environment or `.env`; a variable that is not set sets nothing."""
    (tmp_path / ".env").write_text("RUNWAY_API_KEY=key_of_runway\n")
    monkeypatch.setenv("NEXT_API_URL", "https://app.example.com/api")
    monkeypatch.setenv("WORKER_API_KEY", "k")
    settings = Settings.load("api_url", "api_key", config=config(DOCUMENTED))
    assert settings.api_url == "https://app.example.com/api"
    assert settings.api_key.get_secret_value() == "k"
    assert settings.runway_key.get_secret_value() == "key_of_runway"
    assert settings.worker_id == Settings.load().worker_id
    assert (settings.worker_type, settings.lease_duration_s, settings.heartbeat_interval_s) == ("runway", 900, 110)
    assert (settings.runway_timeout_s, settings.runway_duration_s, settings.runway_ratio) == (500, 6, "1280:720")
    assert (settings.temp_dir, settings.log_dir, settings.auto_cleanup_temp) == (Path("temp"), Path("logs"), False)
    assert settings.poll_interval_s == 60


def test_a_config_file_may_use_every_name(config):
    """As in `.env.example`, in small letters or not."""
    settings = Settings.load(config=config("i2v_engine: wan\nI2V_CONCURRENCY: 3\nAPI_TIMEOUT: 30\nredis_url:\n"))
    assert (settings.engine, settings.concurrency, settings.redis_url) == ("wan", 3, None)
    assert {"engine", "concurrency"} <= settings.model_fields_set
    assert Settings.load(config=config("")).model_dump() == Settings.load().model_dump()


@pytest.mark.parametrize("key", ["01234567", "1_000", "12:30:45", "2026-01-01", "0x1F", "null-key", "off"])
def test_a_config_file_says_text(config, key):
    """YAML would read other numbers, a time, a date, a yes or no where somebody left out the quotes."""
    settings = Settings.load(config=config(f"worker_token: {key}\nworker_id: ~\nauto_cleanup_temp: No\n"))
    assert settings.api_key.get_secret_value() == key
    assert (settings.worker_id, settings.auto_cleanup_temp) == (Settings.load().worker_id, False)


def test_what_goes_before_what(monkeypatch, tmp_path, config):
    """The command line, the environment, `.env`, the file, the default; under whichever of a setting's names."""
    path = config("polling_interval_slow: 1\nlease_duration_seconds: 601\nheartbeat_interval: 61\nworker_id: file\n")
    (tmp_path / ".env").write_text("POLLING_INTERVAL=2\nLEASE_DURATION=602\nHEARTBEAT_INTERVAL=62\n")
    monkeypatch.setenv("WORKER_POLL_INTERVAL", "3")
    monkeypatch.setenv("LEASE_DURATION", "603")
    settings = Settings.load(config=path, lease_duration_s=604)
    assert (settings.lease_duration_s, settings.heartbeat_interval_s, settings.worker_id) == (604, 62, "file")
    monkeypatch.delenv("WORKER_POLL_INTERVAL")
    assert Settings.load(config=path).poll_interval_s == 2
    assert Settings.load(config=path).lease_duration_s == 603
    (tmp_path / ".env").unlink()
    assert Settings.load(config=path).poll_interval_s == 1
    monkeypatch.setenv("WORKER_POLL_INTERVAL", "3")
    assert Settings.load(config=path).poll_interval_s == 3
    monkeypatch.setenv("WORKER_POLL_INTERVAL", "")
    assert Settings.load(config=path).poll_interval_s == 1


@pytest.mark.parametrize(
    "text, told",
    [
        (
            "runway_timout: 5\nwhatever: 1\n",
            ["there is no runway_timout: did you mean runway_timeout?", "there is no whatever"],
        ),
        ("polling_interval_slow: soon\n", ["polling_interval_slow: input should be a valid number"]),
        ("worker_id: [a, b]\n", ["worker_id has to have one value"]),
        ("worker:\n  id: a\n", ["worker has to have one value"]),
        ("- a\n", ["has to have lines such as"]),
        ("worker_token: 'SECRET\nworker_id: b: c\n", [", line"]),
        ("vercel_api_url: https://${NO_SUCH_HOST}/api\n", ["vercel_api_url needs NO_SUCH_HOST"]),
    ],
)
def test_mistakes_in_a_config_file_are_told(config, text, told):
    """Each with the file and the name in it, all at once; nothing secret, and no traceback."""
    path = config(text)
    with pytest.raises(SettingsError) as caught:
        Settings.load(config=path)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(told)
    for line, part in zip(lines, told, strict=True):
        assert str(path) in line
        assert part in line
        assert "SECRET" not in line


def test_a_config_file_that_is_not_there_is_told(tmp_path, monkeypatch):
    """And so is the extra that reads it."""
    with pytest.raises(SettingsError, match=r"--config: .*nowhere\.yaml cannot be read: No such file"):
        Settings.load(config=tmp_path / "nowhere.yaml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(SettingsError, match=r"pip install 'serverless-i2v\[yaml\]'"):
        Settings.load(config=tmp_path / "nowhere.yaml")
