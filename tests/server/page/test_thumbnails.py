"""Small pictures are made once, a few at a time, and kept within bounds."""

import anyio
import pytest

from inference.errors import InvalidPhoto, ItemMissing
from inference.server.objects import ObjectStore
from inference.server.page import thumbnails as module
from inference.server.page.thumbnails import Thumbnails
from inference.server.rows.store import NewItem, NewPhoto, Store, new_id
from tests.server.harness import jpeg


@pytest.fixture
def site(tmp_path):
    """Rows and objects, and a way to add a photo."""

    class Site:
        store, objects = Store(f"sqlite:///{tmp_path / 'queue.db'}"), ObjectStore(tmp_path / "objects")

        def add(self, content):
            """Stores what is said to be a photo; returns its id."""
            photo = NewPhoto(group := new_id(), f"{group}/p_original.jpg")
            with self.objects.incoming() as file:
                file.write(content)
                self.objects.place(file, photo.storage_path)
            self.store.add(photo, [NewItem()])
            return photo.id

    site = Site()
    yield site
    site.store.close()


@pytest.fixture
def made(monkeypatch):
    """Every photo that a picture was made of, with the real thing done."""
    paths = []
    real = module.thumbnail

    def noted(path):
        paths.append(path)
        return real(path)

    monkeypatch.setattr(module, "thumbnail", noted)
    return paths


def test_who_asks_at_once_waits_for_one(site, made):
    """Twenty clips of one photo show one picture."""
    photo = site.add(jpeg())
    found = []

    async def main():
        pictures = Thumbnails(site.store, site.objects)

        async def ask():
            found.append(await pictures.get(photo))

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(ask)
        await ask()

    anyio.run(main)
    assert len(found) == 21
    assert len(set(found)) == 1
    assert len(made) == 1


def test_what_nobody_asks_for_is_forgotten_first(site, made, monkeypatch):
    """Memory is bounded in bytes."""
    photos = [site.add(jpeg(64, 48, color)) for color in ("red", "green", "blue")]

    async def main():
        pictures = Thumbnails(site.store, site.objects)
        sizes = [len(await pictures.get(photo)) for photo in photos[:2]]
        monkeypatch.setattr(module, "MAX_KEPT_BYTES", sum(sizes) + 10)
        await pictures.get(photos[0])  # so that the second is the one that was not used for longest
        await pictures.get(photos[2])
        await pictures.get(photos[0])
        assert len(made) == 3
        await pictures.get(photos[1])
        assert len(made) == 4

    anyio.run(main)


def test_an_error_is_told_to_each_and_not_kept(site, made):
    """A file that was damaged on disk, and a photo that there is not."""
    photo = site.add(b"no photo")

    async def main():
        pictures = Thumbnails(site.store, site.objects)
        for _ in range(2):
            with pytest.raises(InvalidPhoto):
                await pictures.get(photo)
        with pytest.raises(ItemMissing):
            await pictures.get("nothing")

    anyio.run(main)
    assert len(made) == 2
