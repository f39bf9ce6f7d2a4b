"""A queue to look at through the page, and what a worker does to its tasks."""

from html.parser import HTMLParser

from tests.server.harness import jpeg

CLIP = b"\x00\x00\x00\x18ftypisom" + bytes(range(256)) * 8
"""Stands for a clip: nothing here looks into it."""


class Site:
    """Adds tasks through the API and moves them as a worker would."""

    def __init__(self, client):
        self.client = client

    def add(self, name="beach.jpg", photo=None, **form):
        """One task; returns the answer's item."""
        files = {"photo": (name, photo or jpeg(), "image/jpeg")}
        answer = self.client.post("/api/tasks", data=form, files=files)
        assert answer.status_code == 201, answer.text
        return answer.json()["data"]["items"][0]

    def lease(self, item, worker="mac.1"):
        """The task is worked on."""
        asked = {"worker_id": worker, "item_id": item["id"]}
        assert self.client.post("/api/worker/next-task", json=asked).json()["data"]

    def beat(self, item, stage, fraction, worker="mac.1"):
        """The worker tells how far it is."""
        said = {"item_id": item["id"], "worker_id": worker, "progress": {"stage": stage, "fraction": fraction}}
        assert self.client.post("/api/worker/heartbeat", json=said).status_code == 200

    def complete(self, item, worker="mac.1", **told):
        """The task is worked on and its clip stored."""
        self.lease(item, worker)
        asked = {"operation": "upload", "video_item_id": item["id"]}
        signed = self.client.post("/api/worker/presign", json=asked).json()["data"]
        self.client.put(signed["url"], content=CLIP, headers={"content-type": "video/mp4"})
        said = {"item_id": item["id"], "worker_id": worker, "video_storage_path": signed["storage_path"]}
        self._report(said | {"status": "completed"} | told)

    def fail(self, item, message, worker="mac.1"):
        """The task is worked on and fails."""
        self.lease(item, worker)
        self._report({"item_id": item["id"], "worker_id": worker, "status": "failed", "error_message": message})

    def _report(self, said):
        answer = self.client.post("/api/worker/report", json=said)
        assert answer.status_code == 200, answer.text

    def page(self, address="/", **headers):
        """A page, parsed."""
        answer = self.client.get(address, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        return Page(answer.text)


VOID = {"img", "input", "meta", "link", "br", "hr"}


class Element(dict):
    """An element: its attributes, its name, and the text in it."""

    def __init__(self, name, attributes, parent):
        super().__init__(attributes)
        self.name, self.parent, self.pieces = name, parent, []

    @property
    def text(self):
        """The text, its white space as it is shown."""
        return " ".join("".join(self.pieces).split())

    def within(self, other):
        """Whether it is the other element or lies in it."""
        return self is other or (self.parent is not None and self.parent.within(other))


class Page(HTMLParser):
    """What is on a page. Every element has to be closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        """See HTMLParser."""
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        element = Element(tag, attrs, self._open[-1] if self._open else None)
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        """See HTMLParser: `<path/>`."""
        self.elements.append(Element(tag, attrs, self._open[-1] if self._open else None))

    def handle_endtag(self, tag):
        """See HTMLParser."""
        assert self._open, tag
        assert self._open.pop().name == tag

    def handle_data(self, data):
        """See HTMLParser."""
        for element in self._open:
            element.pieces.append(data)

    def all(self, name=None, within=None, **attributes):
        """Elements of a name, with a class or attributes of these values; True: with any value."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [
            element
            for element in self.elements
            if name in (None, element.name)
            and (within is None or element.within(within))
            and all(self._has(element, key, value) for key, value in wanted.items())
        ]

    @staticmethod
    def _has(element, key, value):
        if value is True:
            return key in element
        if key == "class":
            return value in (element.get("class") or "").split()
        return element.get(key) == value

    def one(self, name=None, within=None, **attributes):
        """The only such element."""
        [element] = self.all(name, within, **attributes)
        return element

    def cards(self):
        """The cards, by photo."""
        return {card["data-name"]: card for card in self.all("article", class_="task")}
