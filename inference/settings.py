"""What can be configured, and the only reader of the environment.

Names that the documents of the systems we serve use are kept as they are; all others start with I2V_. A `.env`
file in the working directory is read too, and a file that `--config` names; the environment wins over both, and `.env`
over the other. `python -m inference.settings` prints the contents of `.env.example`.
"""

import json
import re
import socket
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import httpx
from pydantic import Field, SecretStr, field_validator, model_validator

from inference.errors import SettingsError
from inference.providers import RUNWAY, EngineName, QueueName, WorkerType
from inference.settings_base import LoadableSettings, names_of, setting
from inference.task import MIN_DURATION_S
from inference.transfer.addresses import worker_api_url
from inference.transfer.network import flaw_in, safe_for_a_key

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Bytes = Annotated[int, Field(gt=0)]

WAN_PRESETS = ("5b-fast", "5b-turbo", "5b-quality", "a14b-fast", "a14b-quality", "tiny", "tiny-a14b")
RUNWAY_MODELS = tuple(dict.fromkeys(model for model in RUNWAY.models.values() if model))
"""What can be chosen. Only names, so that settings need no engine; the engines have what is behind them."""

QUEUE_URL_FIELDS: dict[QueueName, str] = {
    "lifeisshort": "api_url",
    "gmanimato": "gmanimato_url",
    "video_jobs": "jobs_database_url",
}
"""The setting that holds the address of each queue."""

DATABASE_URL = re.compile(r"(\w+(?:\+\w+)?://)(?:[^@/?]*@)?([\w.:\[\]-]*(?:/[\w.-]*)?)(?:\?.*)?")
"""An address of a database: its scheme, who, where, and what else."""

OF_ONE_MACHINE = {"api_url", "public_url", "engine", "worker_id", "worker_type", "host", "port"}
OF_ONE_MACHINE |= {"temp_dir", "log_dir", "log_format", "notify_socket"}
OF_ONE_MACHINE |= {"weights_dir", "wan_compiled_dir", "data_dir", "ledger_path"}
OF_ONE_MACHINE |= {"runpod_endpoint_id", "runpod_url", "runpod_max_workers", "runpod_init_timeout_s", "runpod_webhook"}
OF_ONE_MACHINE |= {"queue", "gmanimato_url", "gmanimato_callback_url", "webhook_bytes"}
OF_ONE_MACHINE |= {"comfy_host", "comfy_workflow", "comfy_mapping", "comfy_patience_s"}
OF_ONE_MACHINE |= {"push_url", "push_at_once", "push_sweep_s", "push_tasks_queue", "push_service_account"}
OF_ONE_MACHINE |= {"push_emulator", "push_retry_window_s", "wake_port"}
OF_ONE_MACHINE |= {"bucket_url", "bucket_name", "bucket_key_id", "bucket_region"}
"""Settings that mean something else, or nothing, in a container: its address of the queue comes with its secret."""

OF_A_TABLE = {"queue", "bucket_url", "bucket_name", "bucket_region"}
"""Of those, what containers that take jobs from a table have to know; all that is secret comes with their secret."""


class Settings(LoadableSettings):
    """Every setting, with its unit and default. Build it with `Settings.load`."""

    OPTION_NAMES: ClassVar[Mapping[str, str]] = dict.fromkeys(QUEUE_URL_FIELDS.values(), "--url")

    # As the document of the Runway worker has them in its config.yaml.
    FILE_NAMES: ClassVar[Mapping[str, str]] = {
        "worker_token": "api_key",
        "worker_type": "worker_type",
        "lease_duration_seconds": "lease_duration_s",
        "polling_interval_slow": "poll_interval_s",
    }
    FILE_EXTRAS: ClassVar[Mapping[str, str]] = {
        "api_timeout": "every call has a limit of its own",
        "polling_interval_fast": "after a task the next question is asked at once",
        "fast_polling_duration": "as above",
    }

    # The queue a worker takes its tasks from
    queue: QueueName = setting(
        "lifeisshort",
        "I2V_QUEUE",
        about="Whose queue it is: `lifeisshort`, which `i2v serve` speaks, too, `gmanimato`, or `video_jobs`, a table "
        "of jobs in PostgreSQL.",
    )
    api_url: str | None = setting(
        None,
        "VERCEL_API_URL",
        "NEXT_API_URL",
        about="Base URL of the queue, with or without /api; needed to take tasks.",
    )
    api_key: SecretStr | None = setting(
        None, "WORKER_API_KEY", about="Key of the queue; the embedded server asks for the same one."
    )
    auth_scheme: Literal["worker", "bearer"] = setting(
        "worker", "I2V_AUTH_SCHEME", about="How the key is sent: `worker` or `bearer`."
    )
    vercel_bypass: SecretStr | None = setting(
        None,
        "VERCEL_AUTOMATION_BYPASS_SECRET",
        "VERCEL_PROTECTION_BYPASS",
        about="Secret that lets calls to the queue through Vercel's Deployment Protection, where that is on.",
    )
    worker_id: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._:-]+$")] = setting(
        "",
        "WORKER_ID",
        "MODAL_TASK_ID",
        "RUNPOD_POD_ID",
        about="Name of this worker in the queue; every lease adds its own suffix. Default: host name.",
    )
    worker_type: WorkerType | None = setting(
        None, "I2V_WORKER_TYPE", about="Take only tasks for this engine: `wan` or `runway`. Default: any."
    )
    queue_knows_worker_type: bool = setting(
        False, "I2V_QUEUE_LANES", about="The queue hands out tasks by worker_type; a dispatcher then asks for each."
    )
    poll_interval_s: Annotated[float, Field(ge=0.1, le=3600)] = setting(
        5.0,
        "POLL_INTERVAL",
        "POLLING_INTERVAL",
        "WORKER_POLL_INTERVAL",
        about="Seconds between questions to an empty queue.",
    )
    lease_duration_s: Annotated[float, Field(ge=2, le=86_400)] = setting(
        600.0, "LEASE_DURATION", about="Seconds for which a task is taken: longer than a cold start."
    )
    lease_extension_s: Annotated[float, Field(ge=2, le=86_400)] = setting(
        300.0, "I2V_LEASE_EXTENSION", about="Seconds that each heartbeat adds; a silent worker's task is free after it."
    )
    heartbeat_interval_s: Seconds = setting(
        120.0, "HEARTBEAT_INTERVAL", about="Seconds between heartbeats; at most half of I2V_LEASE_EXTENSION."
    )

    # A queue of GmAnimato, where I2V_QUEUE says so
    gmanimato_url: str | None = setting(
        None,
        "GMANIMATO_API_URL",
        "WORKER_API_URL",
        about="Base URL of the application; needed to take its tasks.",
    )
    gmanimato_secret: SecretStr | None = setting(
        None, "WORKER_TASK_SECRET", about="Secret of the application's task route, the same as it has itself."
    )
    gmanimato_callback_url: str | None = setting(
        None,
        "CALLBACK_BASE_URL",
        about="Base URL under which this worker reaches the application's webhook. Default: what each task says.",
    )
    webhook_bytes: Annotated[int, Field(ge=100_000)] = setting(
        524_288,
        "I2V_WEBHOOK_BYTES",
        about="Bytes that the application takes in one request, its BODY_SIZE_LIMIT: without a bucket, a video has to "
        "fit into them as base64.",
    )
    webhook_retries: Annotated[int, Field(ge=5, le=1000)] = setting(
        40, "I2V_WEBHOOK_RETRIES", about="How often a call is tried while the queue does not answer, its last one too."
    )

    # Jobs in a table of an application's own PostgreSQL, where I2V_QUEUE says so; their videos need the bucket below
    jobs_database_url: SecretStr | None = setting(
        None,
        "I2V_JOBS_DATABASE_URL",
        about="The database that has the jobs: postgresql://user:password@host/db; a pooler's address will do.",
    )
    jobs_table: str = setting("video_jobs", "I2V_JOBS_TABLE", about="Its table of jobs; may begin with a schema.")
    jobs_columns: str | None = setting(
        None,
        "I2V_JOBS_COLUMNS",
        about='JSON of what columns of that table are called where they have other names: {"input": "payload"}.',
    )
    jobs_stale_s: Annotated[float, Field(ge=60, le=86_400)] = setting(
        480.0,
        "I2V_JOBS_STALE",
        about="Seconds without a beat after which a job's holder is dead; the same for all who use the table.",
    )

    # The worker
    engine: EngineName = setting(
        "preview",
        "I2V_ENGINE",
        about="What makes the videos. `preview`: a camera move over the photo, no model. `wan`: Wan2.2 on this GPU. "
        "`runway`: Runway's API, paid by the clip. `comfyui`: graphs on a ComfyUI server. Where this is not set, a "
        "Runway key makes `i2v work` take `runway`; without one it takes `preview`, but only for a queue on this "
        "machine.",
    )
    concurrency: Annotated[int, Field(ge=1, le=64)] = setting(
        2, "I2V_CONCURRENCY", about="Tasks held at once: one generates while the others download and upload."
    )
    attempt_limit_s: Seconds = setting(
        1800.0, "I2V_ATTEMPT_LIMIT", about="Seconds after which a generation counts as hung, and its task as failed."
    )
    max_tries: Annotated[int, Field(ge=1, le=20)] = setting(
        3, "WORKER_MAX_RETRIES", about="Tries of a download, a generation or an upload whose error may pass."
    )
    shutdown_grace_s: Annotated[float, Field(ge=0, le=3600)] = setting(
        8.0, "I2V_SHUTDOWN_GRACE", about="Seconds to finish in after SIGTERM, then tasks are handed back."
    )
    # Of what strangers send, so a larger photo fails its task. The floor keeps out a limit that was meant in megabytes.
    max_photo_bytes: Annotated[int, Field(ge=1_000_000)] = setting(
        50_000_000, "I2V_MAX_PHOTO_BYTES", about="Bytes of the largest photo taken, a million at least."
    )
    allow_private_addresses: bool = setting(
        False,
        "I2V_ALLOW_PRIVATE_ADDRESSES",
        about="Let presigned URLs lead to private addresses, other than the queue's own host.",
    )
    temp_dir: Path | None = setting(None, "TEMP_DIR", about="Folder for temporary files. Default: the system's.")
    auto_cleanup_temp: bool = setting(
        True, "AUTO_CLEANUP_TEMP", about="Remove each task's temporary files when it ends; `false` leaves them."
    )
    log_dir: Path | None = setting(
        None, "LOG_DIR", about="Folder for log files besides the terminal, one a worker. Default: none."
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "I2V_LOG_LEVEL", about="`debug`, `info`, `warning` or `error`."
    )

    log_format: Literal["auto", "human", "json"] = setting(
        "auto",
        "I2V_LOG_FORMAT",
        about="`human`: a sentence a line, with the steps of a task. `json`: an object a line. `auto`: columns on a "
        "terminal, JSON elsewhere.",
    )
    notify_socket: str | None = setting(
        None, "NOTIFY_SOCKET", about="Where systemd's watchdog listens; systemd itself sets it for a service."
    )

    # The Wan engine
    wan_preset: str = setting(
        "a14b-fast",
        "I2V_WAN_PRESET",
        about=f"Model and schedule, one of {', '.join(f'`{name}`' for name in WAN_PRESETS)}.",
    )
    weights_dir: Path = setting(
        Path("~/.cache/serverless-i2v"), "I2V_WEIGHTS_DIR", about="Folder of the weights; `i2v weights fetch` fills it."
    )
    hf_token: SecretStr | None = setting(
        None, "HF_TOKEN", about="Token of huggingface.co, for `i2v weights fetch`; public weights need none."
    )
    accept_non_commercial: bool = setting(
        False,
        "I2V_ACCEPT_NON_COMMERCIAL",
        about="Let `modal deploy` put weights into an image whose licence forbids commercial use (`5b-turbo`).",
    )
    wan_area_px: Annotated[int, Field(ge=64 * 64)] | None = setting(
        None, "I2V_WAN_AREA", about="Largest width x height of a clip; 399360 is 480p. Default: the preset's, 720p."
    )
    wan_offload: Literal["auto", "none", "text", "models", "blocks"] = setting(
        "auto",
        "I2V_WAN_OFFLOAD",
        about="What visits the GPU instead of staying: `none`, the `text` encoder, all `models`, or `blocks` of them. "
        "`auto` goes by its memory.",
    )
    wan_attention: str = setting(
        "auto", "I2V_WAN_ATTENTION", about="Attention backend of diffusers; `auto` takes the fastest installed."
    )
    wan_compile: Literal["auto", "on", "off"] = setting(
        "auto",
        "I2V_WAN_COMPILE",
        about="Compile the transformer, for faster clips. `auto`: where a build or `i2v weights compile` did it for "
        "this machine. `on`: also at the start, which takes minutes. `off`: never.",
    )
    wan_compiled_dir: Path | None = setting(
        None, "I2V_WAN_COMPILED", about="Folder of compiled code. Default: `compiled` in I2V_WEIGHTS_DIR."
    )
    wan_fp8: bool = setting(
        False, "I2V_WAN_FP8", about="Keep the transformers in 8 bits: half the memory, a little less exact."
    )

    # The ComfyUI engine
    comfy_host: str = setting(
        "127.0.0.1:8188", "COMFY_HOST", about="Where ComfyUI listens: host and port, or a URL such as https://…"
    )
    comfy_workflow: Path | None = setting(
        None,
        "I2V_COMFY_WORKFLOW",
        about="Graph in API format for tasks that bring a photo and no graph; `i2v comfy check` reads it.",
    )
    comfy_mapping: Path | None = setting(
        None,
        "I2V_COMFY_MAPPING",
        about="JSON file that says where photo and prompt go in that graph, instead of titles such as `i2v:photo`.",
    )
    comfy_patience_s: Seconds = setting(
        120.0, "I2V_COMFY_PATIENCE", about="Seconds for which a ComfyUI that went away in mid-task is waited for."
    )

    # The Runway engine
    runway_key: SecretStr | None = setting(
        None,
        "RUNWAYML_API_SECRET",
        "RUNWAY_API_KEY",
        about="Key of the Runway API; without one nothing goes there. For Modal it has to be set where you deploy, and "
        "in the Modal secret.",
    )
    runway_model: str = setting(
        "gen4_turbo",
        "RUNWAY_MODEL",
        about=f"Model for tasks that name none, one of {', '.join(f'`{name}`' for name in RUNWAY_MODELS)}.",
    )
    runway_ratio: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None = setting(
        None,
        "RUNWAY_DEFAULT_RATIO",
        about="Size of the clips, e.g. 1280:720, where a task's model makes it. Default: the one nearest to the photo.",
    )
    runway_audio: bool = setting(
        False,
        "I2V_RUNWAY_AUDIO",
        about="Buy sound of `veo3.1` (twice the price) and `veo3.1_fast` (half as much again).",
    )
    runway_duration_s: Annotated[float, Field(ge=MIN_DURATION_S, le=10)] | None = setting(
        None,
        "RUNWAY_DEFAULT_DURATION",
        about="Seconds of a Runway clip where a task names no length. Default: 5, as the queue means it.",
    )
    runway_timeout_s: Annotated[float, Field(gt=0, le=3600)] = setting(
        600.0, "RUNWAY_TIMEOUT", about="Seconds after which a generation at Runway is cancelled; waiting there counts."
    )
    runway_poll_interval_s: Annotated[float, Field(ge=0.05, le=60)] = setting(
        5.0, "RUNWAY_POLL_INTERVAL", about="Seconds between questions to Runway, which asks for no fewer than 5."
    )
    runway_budget_usd: Annotated[float, Field(ge=0)] = setting(
        10.0, "I2V_RUNWAY_BUDGET", about="Dollars that may be spent at Runway in one day (UTC)."
    )
    runway_concurrency: Annotated[int, Field(ge=1, le=100)] = setting(
        2, "I2V_RUNWAY_CONCURRENCY", about="Generations at once that your Runway tier allows; more only wait there."
    )
    runway_replay: bool = setting(
        False,
        "I2V_RUNWAY_REPLAY",
        about="Ask once more when Runway's answer to a paid request was lost: may pay twice.",
    )
    runway_url: str = setting("https://api.dev.runwayml.com", "I2V_RUNWAY_URL", about="Base URL of the Runway API.")
    ledger_path: Path = setting(
        Path("~/.local/state/serverless-i2v/ledger.db"),
        "I2V_LEDGER",
        about="File with what was paid for, so that workers that share it pay nothing twice. On Modal a `modal.Dict` "
        "of the app takes its place, which forgets after a week.",
    )

    # The fleet on Modal: read by `modal deploy app.py`, and told to the containers
    modal_app: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,60}$")] = setting(
        "serverless-i2v", "I2V_MODAL_APP", about="Name of the app on Modal, of its secret and of its ledger."
    )
    modal_cron: str = setting("* * * * *", "I2V_MODAL_CRON", about="When tasks are dispatched (cron, UTC).")
    modal_gpu: str = setting(
        "H100",
        "I2V_MODAL_GPU",
        about="GPU of a container, e.g. H100, H200, A100-80GB, L40S. For `H100` Modal may give an H200, on which the "
        "transformer runs uncompiled; `H100!` is an H100.",
    )
    modal_region: str | None = setting(
        None, "I2V_MODAL_REGION", about="Region of GPU containers, e.g. us or eu; costs more. Default: anywhere."
    )
    modal_max_containers: Annotated[int, Field(ge=1, le=100)] = setting(
        4, "I2V_MODAL_MAX_CONTAINERS", about="GPU containers at once, `modal run` aside: bounds what an hour can cost."
    )
    modal_timeout_s: Annotated[int, Field(ge=60, le=86_400)] = setting(
        14_400, "I2V_MODAL_TIMEOUT", about="Seconds for which a GPU container takes tasks before it starts afresh."
    )
    modal_startup_timeout_s: Annotated[int, Field(ge=10, le=3600)] = setting(
        900, "I2V_MODAL_STARTUP_TIMEOUT", about="Seconds in which a container has to have loaded its weights."
    )
    modal_linger_s: Annotated[float, Field(ge=0, le=1200)] = setting(
        0.0, "I2V_MODAL_LINGER", about="Seconds for which a warm GPU container asks an empty queue for more. Billed."
    )
    modal_drain: bool = setting(
        True, "I2V_MODAL_DRAIN", about="Let a warm container take the next task itself instead of waiting for the cron."
    )
    modal_snapshot: bool = setting(
        False,
        "I2V_MODAL_SNAPSHOT",
        about="Snapshots of containers with their imports done, for faster cold starts.",
    )
    overflow_after_s: Annotated[float, Field(ge=0)] = setting(
        600.0,
        "I2V_OVERFLOW_AFTER",
        about="Expected wait in seconds beyond which tasks go to Runway, if there is a key.",
    )
    overflow_wan_local: bool = setting(
        False, "I2V_OVERFLOW_WAN_LOCAL", about="Let tasks that ask for `wan_local` overflow to Runway, too."
    )

    # The endpoint on RunPod: for who calls it, and for its workers
    runpod_key: SecretStr | None = setting(
        None, "RUNPOD_API_KEY", about="Key of the RunPod API, for `i2v runpod`; workers need none."
    )
    runpod_endpoint_id: str | None = setting(
        None, "RUNPOD_ENDPOINT_ID", about="Endpoint that `i2v runpod` calls; workers are told theirs."
    )
    runpod_url: str = setting(
        "https://api.runpod.ai/v2", "RUNPOD_ENDPOINT_BASE_URL", about="Base URL of RunPod's endpoints."
    )
    runpod_max_workers: Annotated[int, Field(ge=1, le=100)] = setting(
        3,
        "I2V_RUNPOD_MAX_WORKERS",
        about="Max workers of the endpoint, as set there; `i2v runpod dispatch` sends two jobs for each.",
    )
    runpod_init_timeout_s: Annotated[int, Field(ge=10, le=7200)] = setting(
        800, "RUNPOD_INIT_TIMEOUT", about="Seconds in which a worker has to be ready; RunPod itself defaults to 420."
    )
    runpod_webhook: str | None = setting(
        None, "I2V_RUNPOD_WEBHOOK", about="URL that RunPod tells of the end of each job that was dispatched."
    )
    bucket_url: str | None = setting(
        None,
        "BUCKET_ENDPOINT_URL",
        about="S3-compatible storage for videos of direct invocations, e.g. https://s3.eu-central-1.amazonaws.com.",
    )
    bucket_name: str | None = setting(None, "BUCKET_NAME", about="Bucket in that storage.")
    bucket_key_id: str | None = setting(None, "BUCKET_ACCESS_KEY_ID", about="Access key that may write there.")
    bucket_secret: SecretStr | None = setting(None, "BUCKET_SECRET_ACCESS_KEY", about="Its secret.")
    bucket_region: str | None = setting(
        None, "BUCKET_REGION", about="Region that requests are signed for. Default: the one in BUCKET_ENDPOINT_URL."
    )

    # Calls: `i2v push`, and `/jobs/run` and `/wake` on Modal
    push_token: SecretStr | None = setting(
        None, "I2V_PUSH_TOKEN", about="Secret of callers: `Authorization: Bearer …`, or in the header below."
    )
    push_token_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,100}$")] = setting(
        "X-Worker-Token", "I2V_PUSH_TOKEN_HEADER", about="Header that may carry the secret instead."
    )
    push_audience: str | None = setting(
        None, "I2V_PUSH_AUDIENCE", about="Audience of Google's OIDC tokens: exactly what the caller's task names."
    )
    push_callers: str = setting(
        "", "I2V_PUSH_CALLERS", about="Service accounts whose tokens are taken, with commas between them."
    )
    push_deadline_s: Annotated[float, Field(ge=15, le=1800)] = setting(
        1800.0,
        "I2V_PUSH_DEADLINE",
        about="Seconds for which a caller waits for an answer; a job that takes longer is answered 202 and goes on. "
        "Tasks that we make tell it to Cloud Tasks, too.",
    )
    push_at_once: Annotated[int, Field(ge=1, le=64)] = setting(
        1, "I2V_PUSH_AT_ONCE", about="Jobs that one process runs at once; further callers are told to come again."
    )
    push_sweep_s: Annotated[float, Field(ge=1, le=3600)] = setting(
        60.0, "I2V_PUSH_SWEEP", about="Seconds between looks for jobs whose holder died, or that nobody asked for."
    )
    push_url: str | None = setting(
        None,
        "I2V_PUSH_URL",
        about="Address of `/jobs/run` for tasks that we make, e.g. https://i2v.example.com/jobs/run",
    )
    push_tasks_queue: Annotated[str, Field(pattern=r"^projects/[^/]+/locations/[^/]+/queues/[^/]+$")] | None = setting(
        None, "I2V_PUSH_TASKS_QUEUE", about="Queue of Cloud Tasks: projects/P/locations/L/queues/Q."
    )
    push_service_account: str | None = setting(
        None, "I2V_PUSH_SERVICE_ACCOUNT", about="Account whose OIDC token those tasks bring. Default: the secret above."
    )
    push_emulator: str | None = setting(
        None, "CLOUD_TASKS_EMULATOR_HOST", about="Host and port of an emulator of Cloud Tasks, without TLS or account."
    )
    push_retry_window_s: Annotated[float, Field(ge=0)] | None = setting(
        None,
        "I2V_PUSH_RETRY_WINDOW",
        about="Seconds for which the caller delivers a job again, for `i2v doctor push` where it cannot ask.",
    )
    wake_port: Annotated[int, Field(ge=0, le=65535)] | None = setting(
        None,
        "I2V_WAKE_PORT",
        about="Port on which `i2v work` and `i2v up` take `POST /wake`, with the secret above. Default: none.",
    )

    # Live progress
    redis_url: SecretStr | None = setting(
        None,
        "REDIS_URL",
        about="Redis through which several processes share live progress, e.g. redis://:password@host:6379/0. Without "
        "it, only the embedded server tells it, of its own tasks. On Modal it belongs into the secret.",
    )
    gpu_usd_per_hour: Annotated[float, Field(ge=0)] | None = setting(
        None,
        "I2V_GPU_PRICE",
        about="Dollars that an hour of this worker's GPU costs, for the price of each clip. Default: not known.",
    )

    # The embedded queue server
    host: str = setting("127.0.0.1", "I2V_HOST", about="Address the server binds to; others than loopback need a key.")
    port: Annotated[int, Field(ge=0, le=65535)] = setting(8000, "I2V_PORT", about="Port of the server; 0 picks one.")
    data_dir: Path = setting(Path("i2v-data"), "I2V_DATA_DIR", about="Folder of the server's database and objects.")
    database_url: SecretStr | None = setting(
        None, "I2V_DATABASE_URL", about="SQLAlchemy URL, e.g. postgresql://… Default: SQLite in I2V_DATA_DIR."
    )
    public_url: str | None = setting(
        None, "I2V_PUBLIC_URL", about="URL under which clients reach the server, for presigned URLs. Default: as asked."
    )
    max_video_bytes: Bytes = setting(500_000_000, "I2V_MAX_VIDEO_BYTES", about="Bytes of the largest upload taken.")
    retention_days: Annotated[float, Field(gt=0, le=36_500)] | None = setting(
        None,
        "I2V_RETENTION_DAYS",
        about="Days after which the server deletes tasks that ended, with their photos and videos. Default: never.",
    )

    @property
    def queue_url(self) -> str | None:
        """The address of the queue that is used, fit to be shown: a database's has no password in it."""
        url: str | SecretStr | None = getattr(self, QUEUE_URL_FIELDS[self.queue])
        if not isinstance(url, SecretStr):
            return url
        found = DATABASE_URL.fullmatch(url.get_secret_value())
        return f"{found[1]}{found[2]}" if found else "postgresql://(hidden)"

    @field_validator(
        "api_url",
        "public_url",
        "bucket_url",
        "runpod_webhook",
        "gmanimato_url",
        "gmanimato_callback_url",
        "push_url",
    )
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        if not value:
            return None
        try:
            flaw = flaw_in(httpx.URL(value.strip()))
        except (httpx.InvalidURL, UnicodeError):
            flaw = "not a URL"
        if flaw:
            raise ValueError(f"has to be a URL such as https://app.example.com: {flaw}")
        return value.strip()

    @field_validator("api_url")
    @classmethod
    def _is_safe_for_the_key(cls, value: str | None) -> str | None:
        try:
            if value:
                worker_api_url(value)
        except SettingsError as error:
            raise ValueError(str(error).removeprefix("VERCEL_API_URL: ")) from None
        return value

    @field_validator("jobs_columns")
    @classmethod
    def _is_json_of_names(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            names = json.loads(value)
        except ValueError:
            names = None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError('has to be a JSON object of names, such as {"input": "payload"}')
        return value

    @field_validator("runway_url", "runpod_url")
    @classmethod
    def _is_safe_for_a_key(cls, value: str) -> str:
        try:
            return str(safe_for_a_key(value)).rstrip("/")
        except SettingsError as error:
            raise ValueError(str(error)) from None

    @field_validator("runpod_endpoint_id")
    @classmethod
    def _is_an_endpoint_id(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", value):  # part of a URL's path
            raise ValueError("has to be an endpoint's id, such as 4lrqs0ab1cd2ef, from console.runpod.io/serverless")
        return value

    @field_validator("runway_model")
    @classmethod
    def _is_a_runway_model(cls, value: str) -> str:
        if value not in RUNWAY_MODELS:
            raise ValueError(f"there is no model {value!r}; choose one of {', '.join(RUNWAY_MODELS)}")
        return value

    @field_validator(
        "api_key",
        "gmanimato_secret",
        "push_token",
        "vercel_bypass",
        "runway_key",
        "runpod_key",
        "hf_token",
        "bucket_key_id",
        "bucket_secret",
        mode="before",
    )
    @classmethod
    def _fits_into_a_header(cls, value: object) -> object:
        """Keys are copied with a line break or a blank around them, which no header can carry and no key has."""
        key = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not isinstance(key, str):
            return value
        key = key.strip()
        if not key:
            raise ValueError("has only blanks: leave it out, or set it to the key")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError("has to be printable ASCII without blanks")
        return key

    @field_validator("wan_preset")
    @classmethod
    def _is_a_preset(cls, value: str) -> str:
        if value not in WAN_PRESETS:
            raise ValueError(f"there is no preset {value!r}; choose one of {', '.join(WAN_PRESETS)}")
        return value

    @field_validator("wan_compile", mode="before")
    @classmethod
    def _was_a_switch(cls, value: object) -> object:
        """`true` and `false`, as this setting was before it had three values, and pydantic's other words for them."""
        words = {"off": {"false", "0", "no", "f", "n"}, "on": {"true", "1", "yes", "t", "y"}}
        given = str(value).lower()
        return next((name for name, others in words.items() if given in others), given)

    @field_validator("weights_dir", "wan_compiled_dir", "ledger_path")
    @classmethod
    def _of_a_person(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @field_validator("worker_id", mode="before")
    @classmethod
    def _host_name(cls, value: object) -> object:
        return value or socket.gethostname()

    @model_validator(mode="after")
    def _beats_fit(self) -> Self:
        if self.heartbeat_interval_s > self.lease_extension_s / 2:
            raise ValueError(
                f"HEARTBEAT_INTERVAL ({self.heartbeat_interval_s:g} s) has to be at most half of "
                f"I2V_LEASE_EXTENSION ({self.lease_extension_s:g} s): one late beat must not lose the lease"
            )
        return self

    def for_containers(self) -> dict[str, str]:
        """What was set, as environment variables for containers elsewhere; no secret, and nothing of this machine."""
        kept_back = OF_ONE_MACHINE - (OF_A_TABLE if self.queue == "video_jobs" else set())
        given = {name: getattr(self, name) for name in sorted(self.model_fields_set - kept_back)}
        names = {name: names_of(field)[0] for name, field in type(self).model_fields.items()}
        return {
            names[name]: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in given.items()
            if value is not None and not isinstance(value, SecretStr)
        }


def example() -> str:
    """The contents of `.env.example`: every setting, commented out, with its meaning, unit and default."""
    lines = ["# Every setting of serverless-i2v. Copy to `.env` and uncomment what you need.", ""]
    for field in Settings.model_fields.values():
        names = names_of(field)
        also = f" (also {', '.join(names[1:])})" if names[1:] else ""
        lines += [f"# {line}" for line in textwrap.wrap(f"{field.description}{also}", 100)]
        default = field.default
        shown = "" if default is None else str(default).lower() if isinstance(default, bool) else default
        shown = f"{shown:g}" if isinstance(shown, float) else shown
        lines += [f"# {names[0]}={shown}", ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(example(), end="")  # noqa: T201 - printing is what it is for
