# A worker or a queue on any box, without a model: preview, Runway, a ComfyUI elsewhere. Built with BuildKit from the root
# of the repository; images/compose.yaml does it, and starts it:
#
#   docker build --platform linux/amd64 -f images/worker.Dockerfile -t serverless-i2v-worker .
#
# It runs with a read-only root: what it writes goes to /data, /logs and /temp, which are volumes, and to /tmp. It has to
# run with `--init`: the kernel lets nobody inside a container end its first process, also not the check below.

# As BASE in images/__init__.py; imageio-ffmpeg brings ffmpeg.
FROM python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c

# A number, so that whoever runs it can see that it is not root. A new volume belongs to whom its folder does here.
RUN groupadd --gid 10001 worker \
    && useradd --no-log-init --uid 10001 --gid worker --create-home worker \
    && install -d -o worker -g worker -m 700 /data /logs /temp

# The file is complete and has a hash of everything: nothing is resolved, nothing else is taken. Compiled to bytecode
# here, for the worker may not write there. uv itself is not needed afterwards.
RUN --mount=type=bind,source=images/worker.txt,target=/tmp/worker.txt \
    pip install --no-cache-dir --root-user-action=ignore uv==0.13.9 \
    && uv pip install --system --no-cache --no-deps --require-hashes --compile-bytecode -r /tmp/worker.txt \
    && pip uninstall -y --root-user-action=ignore uv

# Where a worker may write, how long a stop may take, and log lines for people; a `.env` goes before all of them.
# TMPDIR: photos that are uploaded to a queue wait in files there, and a small /tmp in memory has room for one or two.
ENV I2V_DATA_DIR=/data/queue \
    I2V_LEDGER=/data/ledger.db \
    I2V_LOG_FORMAT=human \
    I2V_SHUTDOWN_GRACE=120 \
    LOG_DIR=/logs \
    PYTHONFAULTHANDLER=1 \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    TEMP_DIR=/temp \
    TMPDIR=/temp
LABEL org.opencontainers.image.title="serverless-i2v-worker" \
      org.opencontainers.image.description="Turns photos of a queue into short videos: a worker without a model" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /app
COPY inference/ inference/
RUN python -m compileall -q . \
    && printf '%s\n' '#!/usr/local/bin/python' 'from inference.commands.main import main' 'main()' > /usr/local/bin/i2v \
    && chmod 755 /usr/local/bin/i2v

USER 10001:10001
# An image that could not work is not built: settings, ffmpeg, the folder it writes to.
RUN --network=none i2v doctor

# Docker itself starts a container again when it has ended, not when it is unhealthy: so the check ends a worker that
# hangs, and says in the log what each of its threads was doing.
HEALTHCHECK --interval=30s --timeout=30s --start-period=60s --retries=3 \
    CMD ["python", "-m", "inference.commands.health", "--end"]
# The first SIGTERM lets tasks finish for I2V_SHUTDOWN_GRACE seconds, then hands them back.
STOPSIGNAL SIGTERM
CMD ["i2v", "work", "--supervised"]
