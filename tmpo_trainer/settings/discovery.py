"""What the package offers by file name: every method, reward and backbone is one file in the folder of its kind.

A new one needs no list to be changed. `flow-grpo` is the file `flow_grpo.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

#: `tmpo_trainer`, under whatever name ComfyUI imports it.
_ROOT = __name__.rsplit(".", 2)[0]


def names(kind: str) -> list[str]:
    """The names of a kind (`methods`, `rewards`, `backbones`), without importing their files.

    Files that several share are named in `SHARED` of the kind's `__init__.py` and are not listed.
    """
    package = importlib.import_module(f"{_ROOT}.{kind}")
    files = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.ispkg]
    return sorted(name.replace("_", "-") for name in files if name not in package.SHARED)


def load(kind: str, name: str) -> ModuleType:
    """Imports the file of a name from `names`."""
    return importlib.import_module(f"{_ROOT}.{kind}.{name.replace('-', '_')}")
