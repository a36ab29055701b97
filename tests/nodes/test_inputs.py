"""Paths that a workflow gives. ComfyUI itself is not needed: its output folder is stood in for."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_paths_stay_inside_and_others_are_never_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("folder_paths")
    output = tmp_path / "output"
    (output / "run").mkdir(parents=True)
    (output / "away").symlink_to(tmp_path)
    stand_in.get_output_directory = lambda: str(output)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", stand_in)
    for name, place in (("pack_of_test", REPOSITORY), ("pack_of_test.nodes", REPOSITORY / "nodes")):
        package = types.ModuleType(name)
        package.__path__ = [str(place)]
        monkeypatch.setitem(sys.modules, name, package)
    inputs = importlib.import_module("pack_of_test.nodes.inputs")
    resolved: list[Path] = []
    original = Path.resolve

    def resolve(path: Path, strict: bool = False) -> Path:
        resolved.append(path)
        return original(path, strict)

    monkeypatch.setattr(Path, "resolve", resolve)
    assert inputs.inside("run", "x") == inputs.inside(str(output / "run"), "x") == output / "run"
    for given in ("../secret", "/etc/passwd", "run/../../secret", "~/x", "//machine/share", "away/secret"):
        resolved.clear()
        with pytest.raises(ValueError, match=r"^x .* is outside of"):
            inputs.inside(given, "x")
        # A symbolic link inside is found out only by resolving it. On Windows, resolving another machine's path asks it.
        assert given.startswith("away") or all(path == output for path in resolved)
    for name in [name for name in sys.modules if name.startswith("pack_of_test")]:
        del sys.modules[name]
