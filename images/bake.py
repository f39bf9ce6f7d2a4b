"""Steps of building an image: weights in their own layer, kernels compiled before anybody waits for them, a last look.

    python bake.py build    weights of a preset that are made, not fetched
    python bake.py check    whether the image can work

Image builders tell by a step's own source and arguments whether it has to be done again. So everything that a layer
depends on is an argument here, and what does the work is imported inside: a change of code fetches nothing again.
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


def compile_kernels(preset: str, settings: dict[str, str]) -> None:
    """Compiles what the engine would compile at its start, on the GPU it will run on; the cache stays in the image.

    `settings` are those of the environment that change the result. Where a change of code does, too, containers
    compile at their start what is missing, until the next deployment with other settings. Raises EngineError.
    """
    from inference.build.engines import build_engine  # noqa: PLC0415 - as above
    from inference.settings import Settings  # noqa: PLC0415

    del settings
    build_engine(Settings.load(engine="wan", wan_preset=preset))


def build_unpublished() -> None:
    """Makes the weights of a preset that nobody publishes (`tiny`); of another one nothing is missing.

    Raises SettingsError, DiskFull.
    """
    from inference.build.engines import build_weights  # noqa: PLC0415 - as above
    from inference.engines.wan.presets import PRESETS  # noqa: PLC0415
    from inference.settings import Settings  # noqa: PLC0415

    settings = Settings.load()
    build_weights(PRESETS[settings.wan_preset], settings.weights_dir)


def check_image() -> None:
    """Whether containers of this image could work, as the user they run as; a build has no GPU, so that is left out.

    Settings are sound, weights are those of the preset, every package of the engine imports, ffmpeg writes a video,
    and what has to be writable is. Asks nobody on the network. Raises SettingsError with a line for each problem,
    WeightsError.
    """
    import tempfile  # noqa: PLC0415 - as above
    from pathlib import Path  # noqa: PLC0415

    import anyio  # noqa: PLC0415

    from inference import doctor  # noqa: PLC0415
    from inference.build.extras import needing_extra  # noqa: PLC0415
    from inference.engines.wan import weights  # noqa: PLC0415
    from inference.engines.wan.presets import PRESETS  # noqa: PLC0415
    from inference.errors import SettingsError  # noqa: PLC0415
    from inference.settings import Settings  # noqa: PLC0415

    async def examined() -> list[doctor.Finding]:
        return [it async for it in doctor.examine(Settings.load)]

    needed = {"settings", "photos", "ffmpeg", "disk", "extra wan"}
    findings = [it for it in anyio.run(examined) if it.name in needed]
    problems = [f"{it.name}: {it.text}" for it in findings if it.verdict != "ok"]
    if not problems:
        settings = Settings.load()
        weights.require(PRESETS[settings.wan_preset], settings.weights_dir)
        for folder in (Path.home(), settings.weights_dir / "compiled"):  # where compilers keep what they made
            try:
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                problems.append(f"{folder} cannot be written: {error.strerror}")
    if problems:
        raise SettingsError("\n".join(problems))
    with needing_extra("wan", "the Wan engine"):
        import inference.engines.wan.engine  # noqa: F401, PLC0415


if __name__ == "__main__":
    import sys

    from inference.process import told_errors

    with told_errors(verbose=False):
        {"build": build_unpublished, "check": check_image}[sys.argv[1]]()
