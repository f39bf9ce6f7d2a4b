# RunPod's worker: packages, weights, code. Built with BuildKit from the root of the repository:
#
#   docker build -f images/runpod.Dockerfile -t serverless-i2v .
#   … --build-arg PRESET=5b-fast                                            another model
#   … --build-arg PRESET=tiny                                               a trial: no weights to fetch, no GPU needed
#   … --build-arg PRESET=5b-turbo --build-arg ACCEPT_NON_COMMERCIAL=true    its licence forbids commercial use
#   … --secret id=hf_token,env=HF_TOKEN                                     public weights need none
#
# The transformer is not compiled here, since the compiler asks the GPU what it can do, and a build has none: docs/runpod.md
# has how an image gets compiled code all the same.
# A layer is built again when it or one above it in this file changes. Weights are by far the largest and depend on the
# packages, on PRESET and on the modules in the stage `fetcher`: a change of other code moves no gigabyte.
# RunPod's own builder takes images of up to 80 GB and 160 minutes; that of `a14b-fast` has about 76 GB.

# What fetches weights, and no more. Without __init__.py on purpose: the version in it changes with every release.
FROM scratch AS fetcher
COPY images/fetch.py /
COPY inference/errors.py inference/task.py /inference/
COPY inference/progress/files.py /inference/progress/
COPY inference/engines/wan/bf16.py inference/engines/wan/fetching.py inference/engines/wan/hub.py \
     inference/engines/wan/presets.py inference/engines/wan/weights.py /inference/engines/wan/

# As BASE in images/__init__.py: torch brings its CUDA libraries, imageio-ffmpeg brings ffmpeg.
FROM python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c

# The user first: a layer that never changes. A number, so that whoever runs it can see that it is not root.
RUN groupadd --gid 10001 worker \
    && useradd --no-log-init --uid 10001 --gid worker --create-home worker

# Triton compiles its launchers. Debian keeps one version of each package, so one that is pinned is gone one day.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The file is complete and has a hash of everything: nothing is resolved, nothing else is taken. Compiled to bytecode
# here, for the worker may not write there. uv itself is not needed afterwards.
RUN --mount=type=bind,source=images/runpod.txt,target=/tmp/runpod.txt \
    pip install --no-cache-dir --root-user-action=ignore uv==0.13.9 \
    && uv pip install --system --no-cache --no-deps --require-hashes --compile-bytecode -r /tmp/runpod.txt \
    && pip uninstall -y --root-user-action=ignore uv

ARG PRESET=a14b-fast
ARG ACCEPT_NON_COMMERCIAL=false
# Layer by layer: registries take up to a size (ghcr.io 10 GB), pulls unpack several at a time, and a push that broke goes
# on where it was. Each step fetches what comes next; the last one whatever is left, and looks whether all is there.
# hadolint global ignore=DL3059
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token --at-most-gb 9.95
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token --at-most-gb 9.95
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token --at-most-gb 9.95
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token --at-most-gb 9.95
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token --at-most-gb 9.95
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token --at-most-gb 9.95
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token --at-most-gb 9.95
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token --at-most-gb 9.95
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token --at-most-gb 9.95
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token --at-most-gb 9.95
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token --at-most-gb 9.95
RUN --mount=type=bind,from=fetcher,target=/fetch --mount=type=secret,id=hf_token python /fetch/fetch.py "$PRESET" \
    /weights --accept-non-commercial "$ACCEPT_NON_COMMERCIAL" --token-file /run/secrets/hf_token

# Nothing is fetched at run time. RunPod's limit of 420 s for a start would be tight for a first one from a cold disk.
ENV HF_HUB_OFFLINE=1 \
    I2V_ENGINE=wan \
    I2V_WAN_PRESET=$PRESET \
    I2V_WEIGHTS_DIR=/weights \
    PYTHONUNBUFFERED=1 \
    RUNPOD_INIT_TIMEOUT=800 \
    TRANSFORMERS_OFFLINE=1
LABEL org.opencontainers.image.title="serverless-i2v" \
      org.opencontainers.image.description="Turns a photo into a short video with Wan2.2: a RunPod serverless worker" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /app
COPY inference/ inference/
COPY images/bake.py runpod_handler.py ./
# Root owns code and weights; the worker owns its home, and the one folder beside the weights that compilers write to.
RUN python -m compileall -q . \
    && python bake.py build \
    && install -d -o worker -g worker /weights/compiled

USER 10001:10001
# An image that could not work is not built. A build has no GPU, so that is what stays unchecked.
RUN --network=none python bake.py check && python -c "import runpod_handler"

# No HEALTHCHECK: RunPod reads none; the SDK pings it, and the worker itself says when it can do no more.
# SIGTERM lets the job at hand finish.
STOPSIGNAL SIGTERM
CMD ["python", "-u", "runpod_handler.py"]
