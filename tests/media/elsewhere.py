"""What the tests of child processes run there. It imports little, since each new process imports it again."""

import os
from pathlib import Path

from inference.errors import InvalidPhoto
from inference.media.child_process import in_child_process


@in_child_process
def process_id() -> int:
    """Where this runs."""
    return os.getpid()


@in_child_process
def meet(folder: Path) -> None:
    """Ends when two processes are here."""
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        pass


@in_child_process
def fail(message: str) -> None:
    """A refusal."""
    raise InvalidPhoto(message)


@in_child_process
def die(number: int) -> None:
    """As a decoder that crashes, or a process that is killed."""
    os.kill(os.getpid(), number)


@in_child_process
def leave(code: int) -> None:
    """As an interpreter that cannot go on."""
    os._exit(code)


@in_child_process
def work(begun: Path) -> None:
    """Never ends."""
    begun.open("w").close()  # a pipe, at whose other end somebody waits for that
    while True:
        pass


@in_child_process
def threads_with_numpy() -> int:
    """Of this process, once what photos need is there."""
    import numpy  # noqa: F401, ICN001 - here and nowhere else

    return len(os.listdir("/proc/self/task"))  # noqa: PTH208
