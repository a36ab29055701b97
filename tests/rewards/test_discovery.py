"""A reward is one file, or a class anywhere: found by name, asked for what it needs, and trained with by the command line."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tmpo_trainer import rewards
from tmpo_trainer.commands import loading, main
from tmpo_trainer.prompts.lists import PromptList
from tmpo_trainer.rewards import Parked, check_prompts, check_reward, find, load_scorer, variants
from tmpo_trainer.settings import discovery
from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.errors import ConfigError

#: Everything that a file may declare. The options are a setting that no other reward takes.
DUMMY = """
import torch
from ..prompts.lists import PromptList

OPTIONS = ("seed",)
PACKAGES = {"torch": "torch"}
SOURCES = (("owner/dummy", ("weights.bin",)),)


class Dummy:
    name = "not its file's"

    def __init__(self, device, path, seed):
        self.about = (str(device), path, seed)

    def score(self, images, prompts, metadata=None):
        return torch.from_numpy(images.mean((1, 2, 3))).float() * self.about[2]

    def variants(self):
        return [("dummy once", self), ("dummy again", self)]


def load(device, path, seed=0):
    return Dummy(device, path, seed)


def check(prompt, metadata, path):
    if "blue" in prompt:
        raise ValueError(f"prompt {prompt!r} is blue")


def default_prompts(split):
    return PromptList("dummies", ["a red circle", "two red circles", split])
"""

#: The least that a file needs.
BARE = """
from . import dummy_reward

def load(device, path):
    return dummy_reward.Dummy(device, path, 1)
"""

OWN = """
import torch

class Bright:
    def __init__(self, device, path=None):
        self.about = (device, path)

    def score(self, images, prompts, metadata=None):
        return torch.from_numpy(images.mean((1, 2, 3))).float()
"""


@pytest.fixture
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory. `dummy-reward` and `bare` lie in a folder of the package, `own.rewards` beside the run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dropped").mkdir()
    (tmp_path / "dropped" / "dummy_reward.py").write_text(DUMMY)
    (tmp_path / "dropped" / "bare.py").write_text(BARE)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "rewards.py").write_text(OWN)
    (tmp_path / "own" / "broken.py").write_text("import no_such_package")
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo red squares\n")
    monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(tmp_path / "dropped")])
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("tmpo_trainer.rewards.dummy_reward", "tmpo_trainer.rewards.bare", "own", "own.rewards"):
        sys.modules.pop(name, None)
    for name in ("dummy_reward", "bare"):
        if name in vars(rewards):
            delattr(rewards, name)


@pytest.fixture
def short(tiny_model: Path) -> list[str]:
    """Flags of a run of one update on the tiny model."""
    text = f"""--model {tiny_model} --no-report --updates 1 --sample-every 0 --rollout-steps 6 --branch-early 1 2 3
        --branch-late 1 3 4 --resolution 32 32 --max-sequence-length 0 --output-dir out --lora-rank 4 --seed 3"""
    return text.split()


def logged(folder: Path) -> dict[str, float]:
    return json.loads((folder / "out" / "metrics.jsonl").read_text().splitlines()[-1])


def test_every_reward_is_a_file() -> None:
    assert discovery.names("rewards") == [
        "clipscore", "geneval", "hpsv2", "imagereward", "ocr", "pickscore", "remote", "shapes", "shapes-partial", "sharpness",
    ]  # fmt: skip
    for name in discovery.names("rewards"):
        found = find(name)
        assert set(found.OPTIONS) <= TrainConfig.model_fields.keys()
        assert bool(found.SOURCES) == (found.WEIGHTS == "file")
        # A helper imported under a declaration's name would be taken for it.
        options = dict.fromkeys(found.OPTIONS)
        for hook, arguments in [(found.load, ("cpu", None)), (found.check_path, ("path",)), (found.state, (None,))]:
            if hook is not None:
                inspect.signature(hook).bind(*arguments, **options)
        if found.check is not None:
            inspect.signature(found.check).bind("prompt", None, None)


@pytest.mark.parametrize("name", ["dummy-reward", "bare"])
def test_a_file_is_all_that_a_reward_needs(dropped: Path, short: list[str], name: str) -> None:
    assert name in discovery.names("rewards")
    assert main.main([*short, "--reward", name, "--prompts", "prompts.txt", "--eval-prompts", "prompts.txt"]) == 0
    assert 0 < logged(dropped)[f"reward/{name}"] < 255 * 3


def test_what_a_file_declares_is_heard(
    dropped: Path, short: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*short, "--reward", "dummy-reward", "--dry-run"]
    assert main.main(run) == 0
    assert "prompts: 3 for training, 3 held out" in capsys.readouterr().out
    (dropped / "blue.txt").write_text("a blue circle\n")
    assert main.main([*run, "--prompts", "blue.txt"]) == 2
    assert "blue.txt: prompt 'a blue circle' is blue" in capsys.readouterr().err
    assert main.main([*run, "--reward-models", "dummy-reward=nowhere"]) == 2
    assert "--reward-models dummy-reward=nowhere: nowhere does not exist" in capsys.readouterr().err
    config = TrainConfig(reward=("dummy-reward",), reward_models=("dummy-reward=prompts.txt",), seed=5)
    (scorer,) = loading.scorers(config, torch.device("cpu"))
    assert scorer.name == "dummy-reward" and vars(scorer)["about"] == ("cpu", "prompts.txt", 5)
    assert [label for label, _ in loading.evaluation_scorers([scorer])] == ["dummy once", "dummy again"]
    before = loading.identity(config)
    assert loading.identity(config.model_copy(update={"seed": 6})) != before
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "tmpo_trainer.hub.hub_file", lambda what, *source: asked.append(source[:2]) or dropped / "prompts.txt"
    )
    assert main.main(["fetch", "--reward", "dummy-reward"]) == 0
    assert asked == [("owner/dummy", "weights.bin")]
    capsys.readouterr()
    monkeypatch.setattr(
        sys.modules["tmpo_trainer.rewards.dummy_reward"], "PACKAGES", {"no_such": "no-such", "torch": "x"}
    )
    assert main.main(run) == 2
    assert capsys.readouterr().err == "tmpo_trainer: reward dummy-reward needs no_such: pip install no-such\n"


@pytest.mark.parametrize("given", ["flag", "file"])
def test_a_class_is_a_reward(dropped: Path, short: list[str], given: str) -> None:
    """By its name on the command line or in YAML; metrics and the saved settings have the same name."""
    name = "own.rewards:Bright"
    (dropped / "run.yaml").write_text(f"reward: ['{name}']\n")
    chosen = ["--reward", name] if given == "flag" else ["--config", "run.yaml"]
    # Without a file, its prompts are the preference list.
    assert main.main([*short, *chosen]) == 0
    assert yaml.safe_load((dropped / "out" / "config.yaml").read_text())["reward"] == [name]
    assert 0 < logged(dropped)[f"reward/{name}"] < 255


def test_a_class_takes_device_and_path(dropped: Path) -> None:
    name = "own.rewards:Bright"
    cpu = torch.device("cpu")
    plain, with_path = load_scorer(name), load_scorer(name, cpu, "prompts.txt")
    assert vars(plain)["about"] == (cpu, None) and vars(with_path)["about"] == (cpu, "prompts.txt")
    assert plain.name == with_path.name == name
    assert variants(plain) == [(name, plain)]


@pytest.mark.parametrize(
    ("name", "blame"),
    [
        ("own.nowhere:Bright", "reward own.nowhere:Bright cannot be imported: No module named 'own.nowhere'"),
        ("own.broken:Bright", "reward own.broken:Bright cannot be imported: No module named 'no_such_package'"),
        ("own.rewards:Brihgt", "reward own.rewards:Brihgt: own.rewards has no Brihgt, did you mean Bright?"),
        (":Bright", "reward :Bright: write package.module:Class"),
        ("own.rewards:", "reward own.rewards:: write package.module:Class"),
        ("..own:Bright", "reward ..own:Bright: write package.module:Class"),
    ],
)
def test_a_class_that_is_not_there_is_one_line(
    dropped: Path, short: list[str], capsys: pytest.CaptureFixture[str], name: str, blame: str
) -> None:
    assert main.main([*short, "--reward", name, "--dry-run"]) == 2
    assert capsys.readouterr().err == f"tmpo_trainer: {blame}\n"


MISTAKES = """
class Base:
    def __init__(self, device): pass
    def score(self, images, prompts, metadata=None): return self.give(images)
class NoDevice:
    def score(self, images, prompts, metadata=None): ...
class NoScore:
    def __init__(self, device): pass
class Breaks:
    def __init__(self, device): {}["weights"]
class Array(Base):
    give = lambda self, images: images.mean((1, 2, 3))
class Numbers(Base):
    give = lambda self, images: [0.5] * len(images)
class Forgets(Base):
    give = lambda self, images: {}["colour"]
class Elsewhere(Base):
    give = lambda self, images: __import__("json").loads(images)
class Full:
    def __init__(self, device): raise __import__("torch").OutOfMemoryError("CUDA out of memory.")
number = 3
"""


@pytest.mark.parametrize(
    ("name", "code", "blame"),
    [
        ("syntax:A", 2, "reward syntax:A cannot be imported: SyntaxError: invalid syntax (syntax.py, line 2)"),
        ("mine:number", 2, "reward mine:number: number is no class"),
        ("mine:NoDevice", 2, "reward mine:NoDevice: NoDevice(device) failed with TypeError: NoDevice() takes no arguments"),
        ("mine:NoScore", 2, "reward mine:NoScore: NoScore(device) has no method score(images, prompts, metadata)"),
        ("mine:Breaks", 2, "reward mine:Breaks: Breaks(device) failed with KeyError: 'weights' (mine.py, line 10)"),
        ("mine:Array", 1, "reward mine:Array gave ndarray: score must return a torch.Tensor, float32 [N]"),
        ("mine:Numbers", 1, "reward mine:Numbers gave list: score must return a torch.Tensor, float32 [N]"),
        ("mine:Forgets", 1, "reward mine:Forgets failed with KeyError: 'colour' (mine.py, line 16)"),
        # Raised in a library, by a line of the class.
        ("mine:Elsewhere", 1, "not ndarray (mine.py, line 18)"),
        ("mine:Full", 1, "--offload-scorers needs less, see docs/troubleshooting.md"),
    ],
)  # fmt: skip
def test_mistakes_in_a_class_of_ones_own_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    short: list[str],
    name: str,
    code: int,
    blame: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("mine", "syntax"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "mine.py").write_text(MISTAKES)
    (tmp_path / "syntax.py").write_text("\n)\n")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    assert main.main(["score", "picture.png", "--prompt", "a red circle", "--reward", name]) == code
    said = capsys.readouterr().err.splitlines()[-1]
    # Python's own words for a syntax error vary.
    assert said.startswith("tmpo_trainer: ") and said.endswith("(syntax.py, line 2)" if name == "syntax:A" else blame)
    # In training, too, what a method returns is seen after a rollout at the earliest.
    assert main.main([*short, "--reward", name, "--prompts", "prompts.txt", "--eval-prompts", "prompts.txt"]) == code
    assert blame.partition(": SyntaxError")[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_mistake_in_a_parked_scorer_is_found_in_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(f"{MISTAKES}\nForgets.to = lambda self, device: None\n")
    parked = Parked(load_scorer("mine:Forgets"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"mine:Forgets failed with KeyError: 'colour' \(mine\.py, line 16\)"):
        rewards.score_all([("mine:Forgets", parked)], np.zeros((1, 8, 8, 3), np.uint8), ["a"], None)


def test_only_a_reward_on_a_server_may_be_several() -> None:
    check_reward("remote-a", "http://127.0.0.1:1")
    for name in ("shapes-b", "remote2", "-remote", "sharpness-"):
        with pytest.raises(ConfigError, match=f"unknown reward {name}"):
            check_reward(name)


def test_every_prompt_suits_a_reward_that_checks_none() -> None:
    check_prompts(["sharpness", "pickscore", "remote-b"], PromptList("list", ["", "a dog"]))


def test_a_name_imports_no_other_reward() -> None:
    import subprocess

    code = (
        "import sys; from tmpo_trainer import rewards; from tmpo_trainer.settings import discovery; "
        "discovery.names('rewards'); a = {*sys.modules}; rewards.load_scorer('sharpness'); "
        "print(*sorted({*sys.modules} - a), 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tmpo_trainer.rewards.sharpness", "False"]


def test_variants_of_a_parked_scorer_are_parked() -> None:
    places: list[str] = []

    class Movable:
        name = "movable"

        def to(self, device: torch.device) -> None:
            places.append(str(device))

        def score(self, *arguments: object) -> torch.Tensor:
            places.append("score")
            return torch.zeros(1)

        def variants(self) -> list[tuple[str, object]]:
            return [("one", self), ("two", Movable())]

    pairs = variants(Parked(Movable(), torch.device("cpu:0")))
    assert [label for label, _ in pairs] == ["one", "two"]
    for _, scorer in pairs:
        places.clear()
        scorer.score(None, [])  # type: ignore[arg-type]
        assert places == ["cpu:0", "score", "cpu"]
