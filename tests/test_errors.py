"""The tree of errors: drawn as it is, and each knows what is to be done about it."""

import re

import pytest

from inference import errors


def tree():
    """Every error there is."""

    def below(kind):
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    return [kind for kind in below(errors.I2VError) if kind.__module__ == errors.__name__]


def test_the_drawing_is_the_tree():
    """Names, parents and marks of the docstring are those of the classes."""
    drawn, path = {}, []
    for line in errors.__doc__.splitlines():
        if match := re.match(r"^ {4}([│ ├└─]*)(\w+) *([RHSOT]*)(?:  | [a-z]|$)", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            drawn[match[2]] = (path[depth - 1] if depth else "Exception", match[3])
    real = {kind.__name__: (kind.__base__.__name__, marks(kind)) for kind in [errors.I2VError, *tree()]}
    assert drawn == real


def marks(kind):
    """The letters of the drawing."""
    meanings = {
        "R": kind.retryable,
        "H": kind.hand_back,
        "S": kind.stops_worker,
        "O": kind.is_outage,
        "T": kind.task_at_fault,
    }
    return "".join(letter for letter, is_so in meanings.items() if is_so)


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
def test_nobody_is_at_fault_twice(kind):
    """A task is handed back or failed, never both; what concerns the worker alone never fails a task."""
    assert kind.hand_back + kind.task_at_fault <= 1
    assert kind.stops_worker + kind.is_outage <= kind.hand_back
