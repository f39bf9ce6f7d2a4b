"""Paints inference/assets/sample.jpg: mountains over a lake at sunset.

    python tests/support/make_sample_photo.py [PATH]

Nothing but numpy and a seed, so the photo that ships with the package is nobody's, and can be painted again.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 1600, 1200  # 4:3, as phones take them
HORIZON = 0.60  # of the height
SUN = (0.695, 0.405)  # of width and height
ASSET = Path(__file__).parents[2] / "inference" / "assets" / "sample.jpg"

rng = np.random.default_rng(20)
x = np.linspace(0, 1, WIDTH)[None, :]
y = np.linspace(0, 1, HEIGHT)[:, None]


def noise_1d(octaves: int, lowest: float, roughness: float = 0.5) -> np.ndarray:
    """Fractal noise along a ridge: [WIDTH], about -1..1."""
    total, amplitude, frequency = np.zeros(WIDTH), 1.0, lowest
    for _ in range(octaves):
        knots = rng.uniform(-1, 1, int(frequency) + 3)
        at = np.linspace(0, frequency, WIDTH) + rng.uniform()
        low = at.astype(int)
        t = at - low
        t = t * t * (3 - 2 * t)
        total += amplitude * (knots[low] * (1 - t) + knots[low + 1] * t)
        amplitude, frequency = amplitude * roughness, frequency * 2
    return total


def noise_2d(octaves: int, columns: int, rows: int, roughness: float = 0.55) -> np.ndarray:
    """Fractal noise over the picture: [HEIGHT, WIDTH], 0..1."""
    total, amplitude = np.zeros((HEIGHT, WIDTH)), 1.0
    for octave in range(octaves):
        grid = rng.uniform(0, 1, (rows << octave, columns << octave)).astype(np.float32)
        total += amplitude * np.asarray(Image.fromarray(grid).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        amplitude *= roughness
    return (total - total.min()) / np.ptp(total)


def mix(below: np.ndarray, above: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    """`above` over `below`, [H, W, 3], by weight [H, W] or one number."""
    weight = np.asarray(weight)
    return below + (above - below) * (weight[..., None] if weight.ndim == 2 else weight)


def rgb(code: str) -> np.ndarray:
    """#rrggbb as [3] in 0..1."""
    return np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def sky() -> np.ndarray:
    """Dusk above, gold at the horizon, a low sun, and streaks of cloud lit from below."""
    stops = np.array([0.0, 0.22, 0.42, 0.54, 0.62, 1.0])
    colours = np.array([rgb(c) for c in ("#2b3a67", "#5a5f96", "#c5798a", "#f4a46c", "#ffd08a", "#ffd08a")])
    rows = np.stack([np.interp(y[:, 0], stops, colours[:, c]) for c in range(3)], axis=-1)
    picture = np.repeat(rows[:, None, :], WIDTH, axis=1)
    from_sun = np.hypot((x - SUN[0]) * WIDTH / HEIGHT, y - SUN[1])
    picture = mix(picture, rgb("#ffdf9e"), 0.75 * np.exp(-((from_sun / 0.22) ** 1.2)))
    picture = mix(picture, rgb("#fff6dc"), np.clip((0.036 - from_sun) / 0.003, 0, 1))
    clouds = np.clip((noise_2d(6, 3, 11) - 0.50) / 0.28, 0, 1) * np.clip((0.52 - y) / 0.16, 0, 1)
    lit = np.exp(-from_sun / 0.35)
    return mix(picture, mix(rgb("#8d6f93") * np.ones_like(picture), rgb("#ffc39a"), lit), 0.75 * clouds)


def ridges(picture: np.ndarray) -> np.ndarray:
    """Five ranges of mountains, paler the farther; the nearest one wears a line of firs."""
    layers = (
        (0.455, 0.075, 3, "#c99aa0"),
        (0.500, 0.070, 4, "#a07c96"),
        (0.535, 0.055, 5, "#75628a"),
        (0.565, 0.040, 6, "#4b4a73"),
        (0.590, 0.022, 7, "#26304f"),
    )
    haze = rgb("#ffcf9b")
    for number, (level, height, lowest, colour) in enumerate(layers):
        line = level - height * noise_1d(8, lowest, 0.48)
        line = np.minimum(line, HORIZON - 0.004)
        if number == len(layers) - 1:
            line -= firs()
        edge = np.clip((y - line[None, :]) * HEIGHT + 0.5, 0, 1)  # anti-aliased by one pixel
        depth = np.clip((y - line[None, :]) / 0.12, 0, 1)
        near_sun = np.exp(-np.abs(x - SUN[0]) / 0.22)
        body = mix(rgb(colour) * np.ones_like(picture), haze, (0.38 - 0.08 * number) * depth)
        body = mix(body, haze, (0.30 - 0.06 * number) * near_sun * np.ones_like(y))
        body *= (0.94 + 0.12 * noise_2d(5, 14, 20))[..., None]
        picture = mix(picture, body, edge)
    return picture


def firs() -> np.ndarray:
    """How far the tree tops rise above the last ridge: [WIDTH], in heights of the picture."""
    rise = np.zeros(WIDTH)
    at = np.arange(WIDTH)
    for centre in rng.uniform(0, WIDTH, 420):
        tall, wide = rng.uniform(7, 30), rng.uniform(3.0, 6.5)
        rise = np.maximum(rise, tall * np.clip(1 - np.abs(at - centre) / wide, 0, 1) ** 0.8)
    return rise / HEIGHT


def lake(picture: np.ndarray) -> np.ndarray:
    """Below the horizon: what is above it, mirrored, darker, and broken by ripples that grow towards us."""
    shore = int(HORIZON * HEIGHT)
    rows, columns = np.mgrid[shore:HEIGHT, 0:WIDTH].astype(np.float64)
    nearness = (rows - shore) / (HEIGHT - shore)
    ripple = noise_2d(6, 5, 90, 0.7)[shore:] - 0.5
    fine = noise_2d(4, 24, 260, 0.7)[shore:] - 0.5
    mirrored = 2 * shore - rows - 1 - (90 * ripple + 26 * fine) * (0.06 + nearness)
    aside = columns + (20 * ripple + 10 * fine) * (0.1 + nearness)
    source_y = np.clip(mirrored, 0, shore - 1).astype(int)
    source_x = np.clip(aside, 0, WIDTH - 1).astype(int)
    water = picture[source_y, source_x] * np.array([0.92, 0.84, 0.82])
    water = mix(water, rgb("#1c2747"), 0.12 + 0.48 * nearness**1.4)
    glitter = np.clip(fine + 0.6 * ripple - 0.06, 0, 1) * np.exp(-(((x - SUN[0]) / (0.05 + 0.10 * nearness)) ** 2))
    water = mix(water, rgb("#ffe2ae"), np.clip(3.2 * glitter, 0, 0.9))
    water = mix(water, rgb("#e9b48f"), 0.35 * np.exp(-nearness / 0.012))  # mist along the far shore
    return np.concatenate([picture[:shore], water])


def foreground(picture: np.ndarray) -> np.ndarray:
    """A dark near bank with reeds in the lower left corner, for parallax-like depth."""
    bank = 0.925 + 0.11 * x[0] ** 0.8 + 0.008 * noise_1d(6, 6)
    for _ in range(260):
        at, tall = rng.beta(1.0, 2.6) * 0.62 * WIDTH, rng.uniform(30, 150)
        lean, wide = rng.normal(0, 0.12), rng.uniform(1.0, 2.2)
        top = bank[int(at)] * HEIGHT - tall * (1 - at / WIDTH)
        for row in range(max(int(top), 0), min(int(bank[int(at)] * HEIGHT) + 4, HEIGHT)):
            up = (bank[int(at)] * HEIGHT - row) / max(tall, 1)
            left = at + lean * tall * up**2 * 2 - wide * (1 - up) / 2
            span = slice(max(int(left), 0), max(int(left + wide * (1 - 0.7 * up)) + 1, 0))
            picture[row, span] = mix(picture[row, span], rgb("#141a2b"), 0.85)
    edge = np.clip((y - bank[None, :]) * HEIGHT + 0.5, 0, 1)
    ground = rgb("#10162a") * (0.75 + 0.5 * noise_2d(5, 30, 24))[..., None]
    return mix(picture, ground, edge)


def photograph(picture: np.ndarray) -> np.ndarray:
    """What a lens and a sensor add: a vignette and a little grain. uint8 [HEIGHT, WIDTH, 3]."""
    vignette = 1 - 0.22 * (((x - 0.5) * 1.25) ** 2 + (y - 0.5) ** 2) / 0.5
    grain = rng.normal(0, 0.009, (HEIGHT, WIDTH, 1))
    return (np.clip(picture * vignette[..., None] + grain, 0, 1) * 255 + 0.5).astype(np.uint8)


def main() -> None:
    """Paints, and says how large the file became."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ASSET
    pixels = photograph(foreground(lake(ridges(sky()))))
    Image.fromarray(pixels).save(path, quality=80, optimize=True, progressive=True)
    print(f"{path}: {WIDTH}x{HEIGHT}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
