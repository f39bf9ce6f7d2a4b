"""Names that are imported when something is asked of them.

To collect tests is to import their modules, and each of pytest's workers collects all of them. Torch and what builds on
it take seven seconds of a core to import, which only the workers that run the Wan tests should pay.
"""

import importlib
from typing import Any

ASKED_OF_ANYTHING = {"__bases__", "__test__", "__wrapped__", "_mock_name", "pytestmark"}
"""By pytest, of all that it finds in a module, to know whether it is a test: no reason to import it."""


class Late:
    """Stands for a module, or for a class or function of it: `torch = Late("torch")`.

    Its attributes, calls and `isinstance` are those of what it stands for. What has to be the thing itself is not for
    it: a base class, a decorator, or what `except` or `pytest.raises` catches.
    """

    def __init__(self, module: str, name: str = "") -> None:
        self._late = module, name

    def itself(self) -> Any:
        """What it stands for."""
        module, name = self._late
        found = importlib.import_module(module)
        return getattr(found, name) if name else found

    def __getattr__(self, name: str) -> Any:
        if name in ASKED_OF_ANYTHING:
            raise AttributeError(name)
        return getattr(self.itself(), name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.itself()(*arguments, **named)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self.itself())
