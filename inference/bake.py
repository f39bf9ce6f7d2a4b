"""Steps of building an image: weights in their own layer, and kernels compiled before anybody waits for them.

Image builders tell by a step's own source and arguments whether it has to be done again. So everything that a layer
depends on is an argument here, and what does the work is imported inside: a change of code fetches nothing again.
"""


def fetch_weights(preset: str, pins: dict[str, str], *, accept_non_commercial: bool = False) -> None:
    """Puts the weights of a preset into I2V_WEIGHTS_DIR, at the revisions of `pins` (repository → revision).

    Raises SettingsError where the pins are not those of the code, WeightsError, DiskFull.
    """
    from inference.build import build_weights  # noqa: PLC0415 - see above
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


def compile_kernels(preset: str, settings: dict[str, str]) -> None:
    """Compiles what the engine would compile at its start, on the GPU it will run on; the cache stays in the image.

    `settings` are those of the environment that change the result. Where a change of code does, too, containers
    compile at their start what is missing, until the next deployment with other settings. Raises EngineError.
    """
    from inference.build import build_engine  # noqa: PLC0415 - as above
    from inference.settings import Settings  # noqa: PLC0415

    del settings
    build_engine(Settings.load(engine="wan", wan_preset=preset))
