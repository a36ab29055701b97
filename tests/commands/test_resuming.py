"""`--resume` and `evaluate` from another folder, with other settings, with other prompts; `~` in every path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tmpo_trainer.commands import loading, main, resuming
from tmpo_trainer.evaluation import drift
from tmpo_trainer.lora.file import FILE_NAME
from tmpo_trainer.prompts.lists import PromptList, read_prompts
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.settings.presets import make_config

RUN = """--model model --prompts p.txt --eval-prompts p.txt --no-report --updates 1 --sample-every 0 --branching 2
    --rollout-steps 6 --branch-early 1 2 --branch-late 1 2 --resolution 32 32 --output-dir run --lora-rank 4 --guidance 1
    --max-sequence-length 0 --device cpu --threads 1 --ema-every 1"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, red_scorer: Any) -> None:
    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: red_scorer)


@pytest.fixture
def a(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a run began, with all that it needs; it is the current folder."""
    shutil.copytree(tiny_model, tmp_path / "a" / "model")
    (tmp_path / "a" / "p.txt").write_text("a red circle\ntwo blue squares\n")
    monkeypatch.chdir(tmp_path / "a")
    return tmp_path / "a"


def start(flags: str) -> int:
    return main.main(flags.split())


def log(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [
        line for line in capsys.readouterr().err.splitlines() if line.startswith(("settings", "the ", "tmpo_trainer"))
    ]


def test_a_run_that_was_moved_is_resumed_and_evaluated_from_elsewhere(
    a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(RUN) == 0
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert [saved[key] for key in ("model", "prompts", "eval_prompts")] == [str(a / "model"), *[str(a / "p.txt")] * 2]
    assert saved["features"] == "efficientnet-lite0" and saved["text_cache"] is None
    (tmp_path / "b").mkdir()
    shutil.move("run", tmp_path / "b" / "moved")
    monkeypatch.chdir(tmp_path / "b")
    log(capsys)
    assert main.main(["--resume", "moved", "--updates", "2"]) == 0
    assert log(capsys) == ["settings that differ from the run's config.yaml: updates 1 -> 2"]
    assert len(Path("moved/metrics.jsonl").read_text().splitlines()) == 2
    assert main.main(["evaluate", "moved", "--images", "2", "--steps", "2", "--output-dir", "table"]) == 0
    # Neither the LoRA nor what may be published says where they lay.
    for file in (f"moved/{FILE_NAME}", "moved/env.json", "table/table.json", "table/table.md"):
        assert str(tmp_path).encode() not in Path(file).read_bytes()


def test_drift_advice_knows_what_a_run_takes_out(a: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the log and report of the run and in `evaluate RUN`; of a LoRA file alone nothing is known."""
    seen, section, warning = [], drift.section, drift.warning
    monkeypatch.setattr(drift, "section", lambda found, own=(): (seen.append(("section", own)), section(found, own))[1])
    monkeypatch.setattr(drift, "warning", lambda found, own=(): (seen.append(("warning", own)), warning(found, own))[1])
    flags = "--neutral contrast --branching 3 --report --eval-images 2 --eval-steps 2"
    assert start(RUN.replace("--no-report", "").replace("--branching 2", flags)) == 0
    # section() asks for the warning, too.
    assert len(seen) == 3 and {own for _, own in seen} == {("contrast",)}
    for lora, taken_out in (("run", ("contrast",)), (f"run/{FILE_NAME}", ())):
        seen.clear()
        given = ["evaluate", lora, "--images", "2", "--steps", "2", "--output-dir", "table", "--device", "cpu"]
        more = (
            []
            if lora == "run"
            else ["--model", "model", "--prompts", "p.txt", "--reward", "shapes", "--resolution", "32", "32"]
        )
        assert main.main(given + more) == 0
        assert len(seen) == 3 and {own for _, own in seen} == {taken_out}


def test_changed_settings_and_prompts_are_named(a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(RUN) == 0
    # The same prompts in a file of another kind, by a relative path.
    Path("p.json").write_text('["a red circle", "two blue squares"]')
    log(capsys)
    assert start("--resume run --updates 2 --kernel flow_sde --branching 3 --prompts p.json") == 0
    (line,) = log(capsys)
    for part in (
        "updates 1 -> 2",
        "kernel cps -> flow_sde",
        "branching 2 -> 3",
        f"prompts {a / 'p.txt'} -> {a / 'p.json'}",
    ):
        assert part in line
    assert line.count("->") == 4
    # They are the run's now.
    Path("p.txt").write_text("a red circle\n")
    assert start("--resume run --updates 3") == 0
    assert log(capsys)[1:] == ["the held-out prompts are not those that the run was started with"]
    Path("p.json").write_text('["a green triangle"]')
    assert start("--resume run --updates 3") == 0
    assert log(capsys) == ["the training prompts are not those that the run was started with"]
    # A run of an earlier version recorded no prompts.
    Path("run/env.json").write_text('{"torch": "2"}')
    assert start("--resume run") == 0
    assert log(capsys) == []


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({}, {"seed": 1}, "continues with seed 0: for 1, start a new run with --init-lora"),
        ({}, {"lora_rank": 8}, "lora_rank 64: for 8"),
        ({}, {"lora_targets": "text"}, "lora_targets paper: for text"),
        ({}, {"lora_alpha": 8}, "lora_alpha 128: for 8"),
        ({}, {"model": "owner/other"}, "model demo: for owner/other"),
        ({"model": "owner/one"}, {"model": "owner/other"}, "model owner/one: for owner/other"),
        ({}, {"transformer": "x.safetensors"}, "transformer none: for"),
        ({"transformer": "x.safetensors"}, {"transformer": None}, "for none"),
        ({}, {"init_lora": "x.safetensors"}, "leave out --init-lora"),
    ],
)  # fmt: skip
def test_what_a_checkpoint_depends_on_stays(before: dict[str, Any], now: dict[str, Any], told: str) -> None:
    old = make_config([("run", before)])
    with pytest.raises(ConfigError) as caught:
        resuming.check(old, make_config([("run", before), ("flags", now)]))
    assert told in str(caught.value)
    resuming.check(old, old)


def test_what_may_have_been_moved_may_be_given_anew(tmp_path: Path) -> None:
    before = {"model": "/gone/flux", "transformer": "/gone/x.safetensors", "init_lora": "/gone/y.safetensors"}
    now = {"model": str(tmp_path), "transformer": str(tmp_path / "x.safetensors"), "init_lora": None}
    old, new = (make_config([("run", settings)]) for settings in (before, now))
    resuming.check(old, new)
    assert [change.split()[0] for change in resuming.changes(old, new)] == ["model", "transformer", "init_lora"]


def test_another_method_is_refused_before_its_settings(a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(RUN) == 0
    log(capsys)
    assert start("--resume run --method gardo") == 2
    assert log(capsys) == [
        "tmpo_trainer: --resume continues with method tmpo: for gardo, start a new run with --init-lora"
    ]


def test_a_digest_is_that_of_prompts_and_metadata(tmp_path: Path) -> None:
    contents = {"a.csv": "prompt,n\na,1\nb,\n", "a.jsonl": '{"prompt": "a", "n": "1"}\n\n{"prompt": "b"}\n'}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    one, other = (resuming.digest(read_prompts(tmp_path / name)) for name in contents)
    assert one == other
    assert len({one, *(resuming.digest(PromptList("", list("ab"), m)) for m in ({}, {"a": {"n": 1}}))}) == 3


# -- ~ -------------------------------------------------------------------------------------------------------------


def test_the_home_folder_in_every_path(
    a: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(a))
    elsewhere = a / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    flags = [word.replace("p.txt", "~/p.txt") for word in RUN.split() if word not in ("--output-dir", "run")]
    flags[flags.index("--model") + 1] = "~/model"
    (a / "c.yaml").write_text("output_dir: ~/run\ntext_cache: ~/text\n")
    assert main.main([*flags, "--config=~/c.yaml"]) == 0
    assert (a / "run" / FILE_NAME).is_file()
    assert yaml.safe_load((a / "run" / "config.yaml").read_text())["text_cache"] == str(a / "text")
    assert main.main(["--resume=~/run", "--updates", "2"]) == 0
    assert main.main(["--resume", "latest", "--output-dir=~", "--updates", "3"]) == 0
    evaluation = ["--images", "2", "--steps", "2", "--output-dir=~/table", "--prompts=~/p.txt"]
    assert main.main(["evaluate", "~/run", *evaluation]) == 0
    assert (a / "table" / "table.json").is_file()
    assert main.main(["inspect", "~/run"]) == 0
    (a / "q.jsonl").write_text(
        json.dumps({"prompt": "a dog", "tag": "single_object", "include": [{"class": "dog", "count": 1}]})
    )
    assert main.main(["prompts", "geneval", "--count", "2", "--exclude=~/q.jsonl"]) == 0
    assert not list(elsewhere.iterdir())
