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
        if match := re.match(r"^ {4}([│ ├└─]*)(\w+) *([RHT])?(?:  | [a-z]|$)", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            drawn[match[2]] = (path[depth - 1] if depth else "Exception", match[3])
    real = {kind.__name__: (kind.__base__.__name__, mark(kind)) for kind in [errors.I2VError, *tree()]}
    assert drawn == real


def mark(kind):
    """The letter of the drawing."""
    return "R" if kind.retryable else "H" if kind.hand_back else "T" if kind.task_at_fault else None


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
def test_nobody_is_at_fault_twice(kind):
    """A task is handed back or failed; trying again here is for neither."""
    assert kind.retryable + kind.hand_back + kind.task_at_fault <= 1
