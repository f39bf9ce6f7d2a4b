"""Photos to look at, made from numbers: each `kind` is another landscape."""

import io

import numpy as np
from PIL import Image, ImageFilter

SKIES = (
    ((38, 70, 120), (250, 190, 140)),  # dawn
    ((88, 150, 210), (226, 240, 248)),  # noon
    ((52, 32, 84), (244, 132, 95)),  # dusk
    ((12, 20, 46), (70, 92, 140)),  # night
    ((120, 140, 150), (225, 225, 215)),  # haze
    ((30, 110, 130), (250, 230, 170)),  # sea
)


def landscape(kind: int = 0, width: int = 480, height: int = 320) -> Image.Image:
    """A sky, a sun or a moon, and four rows of hills; the same for the same arguments."""
    random = np.random.default_rng(kind)
    top, bottom = (np.array(colour, np.float32) for colour in SKIES[kind % len(SKIES)])
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    picture = np.repeat(top * (1 - rows) + bottom * rows, width, axis=1)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    sun = np.hypot(x - width * random.uniform(0.2, 0.8), y - height * random.uniform(0.25, 0.45))
    picture += np.exp(-((sun / (height * 0.11)) ** 4))[..., None] * (255 - picture) * 0.85
    picture += np.exp(-(sun / (height * 0.45)))[..., None] * (255 - picture) * 0.35
    for layer in range(4):
        ridge = np.full(width, 0.52 + 0.12 * layer)
        for wave in range(1, 7):
            phase, pitch = random.uniform(0, 6.3), random.uniform(0.6, 1.4) * wave
            ridge += 0.07 / wave * np.sin(np.linspace(0, 6.3 * pitch, width) + phase)
        hills = y > ridge[None, :] * height
        colour = top * (0.75 - 0.17 * layer) + bottom * (0.22 - 0.05 * layer)
        picture[hills] = picture[hills] * 0.08 + colour * 0.92
    grain = random.standard_normal((height, width, 1), np.float32) * 1.5
    return Image.fromarray(np.clip(picture + grain, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))


def jpeg(kind: int = 0, width: int = 480, height: int = 320) -> bytes:
    """A landscape as a file."""
    file = io.BytesIO()
    landscape(kind, width, height).save(file, "JPEG", quality=88)
    return file.getvalue()
