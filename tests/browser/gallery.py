"""A queue in which something of every kind is to be seen."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.resources import files

from tests.browser.photos import jpeg
from tests.browser.queue_process import PlayedWorker, QueueProcess

SIZE = (720, 540)  # pixels
REFUSAL = "Runway refused the prompt: it does not make videos of real people in danger. Write another prompt."


@dataclass(frozen=True)
class Gallery:
    """Ids of tasks by what they show."""

    completed: Sequence[str]
    failed: str
    cancelled: str
    running: str
    waiting: Sequence[str]


def furnish(queue: QueueProcess, took_s: float | None = None) -> Gallery:
    """Adds tasks in every state, the running one at 62 %. Their worker says no more.

    `took_s`: how long the finished ones are said to have taken; the running one then has a fitting time left.
    """
    worker = PlayedWorker(queue, "studio-1")
    sample = files("inference.assets").joinpath("sample.jpg").read_bytes()
    add = queue.submit
    summer, winter = {"group": "Summer at the lake"}, {"group": "겨울 여행"}

    failed = add(jpeg(4, *SIZE), name="IMG_2043.jpg", prompt="The mist lifts slowly", seconds=5, **winter)
    worker.take(failed).fail(REFUSAL)
    cancelled = add(jpeg(3, *SIZE), name="moonrise.jpg", prompt="달이 천천히 떠오른다", seconds=4, **winter)
    queue.ask("POST", f"tasks/{cancelled}/cancel")
    waiting = [
        add(jpeg(8, *SIZE), name="할머니 댁 앞마당에서.jpg", prompt="바람에 나뭇잎이 흔들린다", seconds=3, **winter)
    ]
    done = [
        add(jpeg(5, *SIZE), name="lagoon.jpg", prompt="Gentle waves, camera pans right", seconds=5, **summer),
        add(jpeg(2, *SIZE), name="last-evening.jpg", prompt="The sun sets behind the hills", seconds=6, **summer),
        add(jpeg(1, *SIZE), name="noon.jpg", prompt="Clouds drift by, slow dolly-in", seconds=5, **summer),
        add(jpeg(9, *SIZE), name="first-frost.jpg", prompt="Snow begins to fall, slow zoom in", seconds=5, **summer),
    ]
    for item_id, kind, price in zip(done, (5, 2, 1, 9), (0.25, 0.3, None, 0.25), strict=True):
        worker.make(item_id, kind, **({} if price is None else {"cost_usd": price}))
    if took_s is not None:
        _took(queue, took_s)
    running = add(sample, name="sample.jpg", prompt="She turns to the window and smiles", seconds=5, **summer)
    waiting.append(add(jpeg(0, *SIZE), name="dawn.jpg", prompt="A slow push in over the hills", seconds=5, **summer))
    lease = worker.take(running)
    for done_part in (0.1, 0.35, 0.62):
        lease.beat("denoise", done_part)
    return Gallery(done, failed, cancelled, running, waiting)


def _took(queue: QueueProcess, seconds: float) -> None:
    """Changes when finished tasks were begun.

    What the running one needs is reckoned from what the queue finds when it starts: it is to need as much as is left at
    62 %, for it was begun just now.
    """
    queue.stop()
    _began(queue, seconds * 0.38)
    queue.start()
    _began(queue, seconds)


def _began(queue: QueueProcess, before_s: float) -> None:
    with closing(sqlite3.connect(queue.data_dir / "queue.db")) as rows, rows:
        rows.execute("UPDATE video_items SET started_at = ended_at - ? WHERE status = 'completed'", (before_s,))
