"""`python -m tmpo_trainer fetch` and `prompts`, with a made-up GitHub on this machine and a made-up hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from tmpo_trainer.commands import fetch, main
from tmpo_trainer.hub import git_blob, hub_file, verify
from tmpo_trainer.prompts.lists import read_prompts
from tmpo_trainer.rewards import check_prompts
from tmpo_trainer.settings.errors import ConfigError


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is served in GitHub's place."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "github"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fetch, "RAW", f"http://127.0.0.1:{server.server_port}")
    yield root
    server.shutdown()
    server.server_close()


def publish(root: Path, content: str, monkeypatch: pytest.MonkeyPatch, path: str, name: str) -> fetch.GitFile:
    """Puts a file where a list is looked for, and makes it the one that is wanted."""
    source = fetch.GitFile("owner/name", "c0ffee", path, git_blob(content.encode()))
    file = root / "owner/name/c0ffee" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    monkeypatch.setitem(fetch.PROMPTS, "drawbench", {name: source})
    return source


def test_a_list_from_github(github: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["a dog", " two\ncats  and a hat"]
    publish(github, json.dumps(prompts), monkeypatch, "lists/draw.json", "drawbench.txt")
    assert main.main(["fetch", "--prompts", "drawbench"]) == 0
    assert "prompts/drawbench.txt: 2 prompts, use --prompts prompts/drawbench.txt" in capsys.readouterr().out
    assert read_prompts(Path("prompts/drawbench.txt")).texts == ["a dog", "two cats and a hat"]


def test_a_list_with_metadata_is_kept_as_it_is(github: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    publish(github, json.dumps(line) + "\n", monkeypatch, "meta.jsonl", "geneval.jsonl")
    (path,) = fetch.fetch_prompts("drawbench", Path("there"))
    assert path == Path("there/geneval.jsonl")
    check_prompts(["geneval"], read_prompts(path))


def test_a_full_disk_is_one_line(
    github: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(github, '["a dog"]', monkeypatch, "draw.json", "drawbench.txt")

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main.main(["fetch", "--prompts", "drawbench"]) == 2
    said = "prompts/drawbench.txt cannot be written (No space left on device): give another --output-dir"
    assert said in capsys.readouterr().err.replace("\\", "/")
    assert list(Path("prompts").iterdir()) == []


def test_a_changed_or_missing_file_is_refused(
    github: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = publish(github, '["a dog"]', monkeypatch, "draw.json", "drawbench.txt")
    file = github / "owner/name/c0ffee/draw.json"
    file.write_text('["a cat"]')
    assert main.main(["fetch", "--prompts", "drawbench"]) == 2
    file.unlink()
    assert main.main(["fetch", "--prompts", "drawbench"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert source.url in first and "is not the expected file" in first
    assert source.url in second and "cannot be downloaded" in second and "404" in second
    assert not list(Path("prompts").iterdir())


def test_git_ids_are_gits(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some\nbytes\0")
    found = subprocess.run(["git", "hash-object", "file"], cwd=tmp_path, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("git is not installed")
    assert git_blob(b"some\nbytes\0") == found.stdout.strip()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as the hub makes it: files are links to blobs that are named by their hashes."""
    cache = tmp_path / "cache"

    def download(repository: str, name: str, repo_type: str | None = None) -> str:
        found = cache / repository / name
        if not found.exists():
            raise LocalEntryNotFoundError("no network")
        return str(found)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return cache


def put(cache: Path, repository: str, name: str, content: bytes, large: bool) -> Path:
    blob = cache / "blobs" / (hashlib.sha256(content).hexdigest() if large else git_blob(content))
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link = cache / repository / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(blob)
    return blob


def test_a_scorers_files_are_checked(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tmpo_trainer.rewards import hpsv2

    for repository, names in hpsv2.SOURCES:
        blobs = [put(hub, repository, name, name.encode(), name.endswith(".pt")) for name in names]
        if repository == "xswu/HPSv2":
            (weights,) = blobs
    assert main.main(["fetch", "--reward", "hpsv2", "shapes-partial", "shapes"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "HPS_v2.1_compressed.pt" in out[0] and "SHA-256 checked" in out[0]
    assert "git id checked" in out[1] and out[-1] == "reward shapes: has no weights to fetch"
    assert out[-2] == "reward shapes-partial: has no weights to fetch"
    weights.write_bytes(b"something else")
    assert main.main(["fetch", "--reward", "hpsv2"]) == 2
    assert "is damaged (SHA-256" in capsys.readouterr().err


def test_a_blob_may_be_a_link_to_a_store_by_another_hash(tmp_path: Path) -> None:
    """As the hub's library makes it after a download by Xet."""
    snapshot = tmp_path / "models--owner--name/snapshots/c0ffee/deep"
    blobs, store = tmp_path / "models--owner--name/blobs", tmp_path / "blobs/ab"
    for folder in (snapshot, blobs, store):
        folder.mkdir(parents=True)
    (store / ("ab" * 32)).write_bytes(b"weights")
    blob = blobs / hashlib.sha256(b"weights").hexdigest()
    blob.symlink_to(store / ("ab" * 32))
    path = snapshot / "weights.bin"
    path.symlink_to(Path("../../../blobs") / blob.name)
    assert verify(path) == "SHA-256"
    (store / ("ab" * 32)).write_bytes(b"others")
    with pytest.raises(ConfigError, match=r"run `hf download owner/name deep/weights\.bin --force-download`"):
        verify(path)


def test_a_data_set_is_named_as_one(hub: Path) -> None:
    with pytest.raises(ConfigError) as error:
        hub_file("prompts", "owner/list", "a.json", "--prompts FILE", "dataset")
    assert "a.json of https://huggingface.co/datasets/owner/list, which" in str(error.value)
    assert "`hf download owner/list a.json --repo-type dataset`" in str(error.value)


def test_a_file_that_cannot_be_had_says_which_and_where_to_put_it(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["fetch", "--reward", "pickscore"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("config.json of https://huggingface.co/yuvalkirstain/PickScore_v1", "no network",
                 "--reward-models pickscore=PATH", str(Path(huggingface_hub.constants.HF_HUB_CACHE))):  # fmt: skip
        assert part in line


def test_a_copied_file_has_nothing_to_be_checked_against(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert verify(tmp_path / "model.safetensors") is None


def test_the_hubs_lists_are_joined(hub: Path, tmp_path: Path) -> None:
    for style in ("anime", "concept-art", "paintings", "photo"):
        put(
            hub,
            fetch.HUB_LISTS,
            f"benchmark/{style}.json",
            json.dumps([f"{style} one", f"{style} two"]).encode(),
            False,
        )
    source = fetch.PROMPTS["hpdv2"]["hpdv2-test.txt"]
    assert isinstance(source, tuple)
    assert fetch._from_hub(source).decode().splitlines()[:3] == ["anime one", "anime two", "concept-art one"]


@pytest.mark.parametrize(
    ("flags", "blame"),
    [
        ("", "fetch has nothing to do: give --reward"),
        ("--prompts drawbenhc", "unknown prompt list drawbenhc, did you mean drawbench?"),
        ("--reward picscore", "unknown reward picscore, did you mean pickscore?"),
        ("--reward remote", "reward remote runs on another machine"),
        ("--model nowhere", "model nowhere is not a folder"),
        ("--model ~nobody-here/x", "the home folder ~nobody-here is not known"),
        ("--features ~nobody-here/x", "the home folder ~nobody-here is not known"),
    ],
)
def test_bad_input(flags: str, blame: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["fetch", *flags.split()]) == 2
    assert blame in capsys.readouterr().err


def test_prompts_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What it prints is a prompt file; scenes of a given file are left out."""
    assert main.main(["prompts", "geneval", "--split", "heldout", "--count", "30"]) == 0
    first = tmp_path / "first.jsonl"
    first.write_text(capsys.readouterr().out)
    assert main.main(["prompts", "geneval", "--split", "heldout", "--count", "30", "--exclude", str(first)]) == 0
    second = tmp_path / "second.jsonl"
    second.write_text(capsys.readouterr().out)
    a, b = read_prompts(first), read_prompts(second)
    check_prompts(["geneval"], b)
    assert len(a.texts) == len(b.texts) == 30 and not set(a.texts) & set(b.texts)
    assert main.main(["prompts", "ocr", "--count", "5", "--seed", "2"]) == 0
    third = tmp_path / "third.jsonl"
    third.write_text(capsys.readouterr().out)
    check_prompts(["ocr"], read_prompts(third))
    for flags, blame in (
        (["ocr", "--exclude", str(first)], "--exclude is for geneval"),
        (["geneval", "--split", "heldout", "--count", "9999"], "fewer than 9999 heldout prompts"),
        (["faces"], "invalid choice: 'faces'"),
        (["geneval", "--exclude", str(third)], "third.jsonl"),
    ):
        assert main.main(["prompts", *flags]) == 2
        assert blame in capsys.readouterr().err


def test_every_list_can_be_named() -> None:
    """No two write the same file, and all are files of a hash's length."""
    files = [file for files in fetch.PROMPTS.values() for file in files]
    assert len(set(files)) == len(files)
    for sources in fetch.PROMPTS.values():
        for source in sources.values():
            if isinstance(source, fetch.GitFile):
                assert len(source.commit) == len(source.blob) == 40
    with pytest.raises(ConfigError):
        fetch.fetch_prompts("none", Path("."))
