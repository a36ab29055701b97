"""The package as pip installs it: complete, and silent on the network until it is asked to download."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
#: Files beside the code that a user needs, by their endings.
DATA = ("*.yaml", "*.txt", "*.json", "*.safetensors", "*.md")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a wheel, built from a copy of the tracked files, was unpacked as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        # A file that is deleted but not yet committed is still listed.
        if (REPOSITORY / name).is_file():
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((REPOSITORY / name).read_bytes())
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "-q",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "-w", str(folder), str(folder / "source")], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_all_data_and_licences(installed: Path) -> None:
    package = REPOSITORY / "tmpo_trainer"
    wanted = {
        p.relative_to(REPOSITORY) for ending in DATA for p in package.rglob(ending) if "__pycache__" not in p.parts
    }
    found = {path.relative_to(installed) for path in installed.rglob("*")}
    assert not wanted - found and len(wanted) > 30
    assert {"LICENSE", "NOTICE"} <= {path.name for path in found if "dist-info" in str(path)}
    assert not [path for path in found if path.parts[0] in ("tests", "nodes", "benchmarks")]


def run(installed: Path, cwd: Path, *arguments: str, code: str | None = None) -> str:
    """Python away from the repository, with the installed package alone on its path."""
    what = ["-c", code] if code else ["-m", "tmpo_trainer", *arguments]
    # -P: not the current folder, not the repository. The wheel's folder comes before an editable installation.
    start = f"import sys, runpy; sys.path.insert(0, {str(installed)!r}); sys.argv = ['tmpo_trainer', *{what[2:]!r}]; "
    start += code or "runpy.run_module('tmpo_trainer', run_name='__main__')"
    done = subprocess.run([sys.executable, "-P", "-c", start], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_package_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, code="import tmpo_trainer; print(tmpo_trainer.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    assert "reward:" in run(installed, tmp_path, "--preset", "joint", "flux-80gb", "--print-config")
    assert "demo" in run(installed, tmp_path, "--dry-run", "--threads", "1")
    about = run(
        installed, tmp_path, "inspect", str(installed / "tmpo_trainer/demo/lora/pytorch_lora_weights.safetensors")
    )
    assert "by tmpo_trainer" in about


IMPORT_ALL = """
import importlib, pkgutil, socket
def refuse(*args, **kwargs):
    raise AssertionError(f'network at import: {args}')
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
import tmpo_trainer
names = [info.name for info in pkgutil.walk_packages(tmpo_trainer.__path__, 'tmpo_trainer.') if 'main' not in info.name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_no_module_uses_the_network_when_it_is_imported(installed: Path, tmp_path: Path) -> None:
    assert int(run(installed, tmp_path, code=IMPORT_ALL)) > 90


def test_every_workflow_has_a_thumbnail() -> None:
    """ComfyUI's template browser shows the picture of the same name, without it a placeholder."""
    folder = Path(__file__).parents[1] / "workflows"
    names = {file.stem for file in folder.glob("*.json")}
    assert len(names) > 6 and {file.stem for file in folder.glob("*.jpg")} == names


def test_the_page_knows_the_largest_tree() -> None:
    root = Path(__file__).parents[1]
    known = [
        re.findall(r"^(?:const )?MOST_LEAVES = (\d+)", (root / file).read_text(encoding="utf-8"), re.MULTILINE)
        for file in ("nodes/tree_sampler.py", "web/tmpo_size.js")
    ]
    assert known[0] == known[1] and len(known[0]) == 1
