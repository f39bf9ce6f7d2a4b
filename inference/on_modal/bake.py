"""Steps of building the image for Modal: weights in their own layer, and the transformer compiled before anybody waits.

Modal builds a layer again when the source of the function, or its arguments, have changed. So everything that a layer
depends on is an argument here, and what does the work is imported inside: a change of other code fetches nothing again.
A step gets the files of the package that its function is in, and no others of ours: hence `inference`, not `images`.
"""


def fetch_weights(preset: str, pins: dict[str, str], *, accept_non_commercial: bool = False) -> None:
    """Puts the weights of a preset into I2V_WEIGHTS_DIR, at the revisions of `pins` (repository → revision).

    Raises SettingsError where the pins are not those of the code, WeightsError, DiskFull.
    """
    from inference.build.engines import build_weights  # noqa: PLC0415 - see above
    from inference.engines.wan import fetching, weights  # noqa: PLC0415
    from inference.engines.wan.presets import PRESETS  # noqa: PLC0415
    from inference.errors import SettingsError  # noqa: PLC0415
    from inference.settings import Settings  # noqa: PLC0415
    from inference.terminal import files  # noqa: PLC0415

    settings, chosen = Settings.load(), PRESETS[preset]
    if pins != chosen.pins:
        raise SettingsError(f"{preset}: the image asks for {pins}, the code for {chosen.pins}")
    if chosen.built_here:
        build_weights(chosen, settings.weights_dir)
        return
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    with files() as sink:
        fetching.fetch(
            chosen, settings.weights_dir, sink=sink, token=token, accept_non_commercial=accept_non_commercial
        )
    weights.require(chosen, settings.weights_dir)


def compile_kernels(preset: str, switches: dict[str, str], code: str, *, limit_s: float) -> None:
    """Compiles what the engine would compile at its start, on the GPU it will run on; the result stays in the image.

    `switches` are the settings of the engine that change the result, as variables; `code` is a digest of the modules
    that are compiled. Never fails a deployment, which could do without: whatever happens in `limit_s` seconds, or
    does not, happens in a process of its own, and a note in the image tells the engine, which tells it at its start.
    """
    import os  # noqa: PLC0415 - as above
    import signal  # noqa: PLC0415
    import subprocess  # noqa: PLC0415
    import sys  # noqa: PLC0415
    import tempfile  # noqa: PLC0415
    from contextlib import suppress  # noqa: PLC0415
    from pathlib import Path  # noqa: PLC0415

    import structlog  # noqa: PLC0415

    import inference  # noqa: PLC0415
    from inference.build.engines import compiled_dir  # noqa: PLC0415
    from inference.engines.wan.compiled import tell_failed  # noqa: PLC0415
    from inference.settings import Settings  # noqa: PLC0415

    del code
    variables = [f"{name}={value}" for name, value in switches.items()]
    command = ["env", *variables, sys.executable, "-m", "inference.commands.main", "weights", "compile", preset]
    root = Path(inference.__file__).parents[1]  # where a step's files are; nothing of ours is installed
    log = structlog.get_logger("compile")
    with tempfile.TemporaryFile("w+", errors="replace") as errors:  # no pipe: the compiler's own workers may keep one
        child = subprocess.Popen(  # noqa: S603 - our own command
            command, cwd=root, stderr=errors, start_new_session=True
        )
        try:
            code_of_end = child.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            code_of_end, why = None, str(error)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with the compiler's workers
        child.wait()
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line.strip()]
    for line in said:
        log.info("compiling", said=line)
    if code_of_end == 0:
        return
    if code_of_end is not None:
        why = f"ended by signal {-code_of_end}" if code_of_end < 0 else (said or ["it said nothing"])[-1]
    log.warning("not_compiled", preset=preset, why=why, instead="containers run it without")
    try:
        tell_failed(compiled_dir(Settings.load()), preset, why)
    except OSError as error:
        log.warning("no_note_of_that", error=str(error))
