"""Steps of building RunPod's image that come after its weights. Those of Modal's are in `inference/on_modal/bake.py`.

python bake.py build    weights of a preset that are made, not fetched
python bake.py check    whether the image can work
"""

import sys
import tempfile
from pathlib import Path

import anyio

from inference import doctor
from inference.build.engines import build_weights, compiled_dir
from inference.build.extras import needing_extra
from inference.engines.wan import weights
from inference.engines.wan.presets import PRESETS
from inference.errors import SettingsError
from inference.process import told_errors
from inference.settings import Settings


def build_unpublished() -> None:
    """Makes the weights of a preset that nobody publishes (`tiny`); of another one nothing is missing.

    Raises SettingsError, DiskFull.
    """
    settings = Settings.load()
    build_weights(PRESETS[settings.wan_preset], settings.weights_dir)


def check_image() -> None:
    """Whether containers of this image could work, as the user they run as; a build has no GPU, so that is left out.

    Settings are sound, weights are those of the preset, every package of the engine imports, ffmpeg writes a video,
    and what has to be writable is. Asks nobody on the network. Raises SettingsError with a line for each problem,
    WeightsError.
    """

    async def examined() -> list[doctor.Finding]:
        return [it async for it in doctor.examine(Settings.load)]

    needed = {"settings", "photos", "ffmpeg", "disk", "extra wan"}
    findings = [it for it in anyio.run(examined) if it.name in needed]
    problems = [f"{it.name}: {it.text}" for it in findings if it.verdict != "ok"]
    problems += [f"{name}: not looked at" for name in sorted(needed - {it.name for it in findings})]
    if not problems:
        settings = Settings.load()
        weights.require(PRESETS[settings.wan_preset], settings.weights_dir)
        for folder in (Path.home(), compiled_dir(settings)):  # where compilers keep what they made
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
    with told_errors(verbose=False):
        {"build": build_unpublished, "check": check_image}[sys.argv[1]]()
