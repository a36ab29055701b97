"""`python -m tmpo_trainer evaluate`: base and LoRA in one table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tmpo_trainer.commands import evaluate, evaluation, loading, main
from tmpo_trainer.diversity import MEASURES, Measure
from tmpo_trainer.evaluation import held_out
from tmpo_trainer.evaluation.features import EfficientNetLite
from tmpo_trainer.lora import attach
from tmpo_trainer.lora.export import export_lora
from tmpo_trainer.lora.file import FILE_NAME
from tmpo_trainer.prompts.lists import PromptList
from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.training.loop import Trainer


class Green:
    """A second reward."""

    name = "green"

    def score(self, images: np.ndarray, prompts: Any, metadata: Any = None) -> torch.Tensor:
        return torch.from_numpy(images[..., 1].astype(np.float32) / 255).mean((1, 2))


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_model: Path,
    make_trainer: Callable[..., Trainer],
    shake: Callable[[Trainer, float], None],
    red_scorer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with prompts and a run: its settings and a LoRA that does something."""
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer()
    shake(trainer, 0.3)
    export_lora(trainer.backbone, tmp_path / "run", {"rewards": "red"})
    settings = {"model": str(tiny_model), "reward": ["shapes"], "guidance": 1.0, "resolution": [32, 32],
                "max_sequence_length": 0, "eval_images": 3, "eval_steps": 4, "learning_rate": 0.1, "seed": 3,
                "output_dir": str(tmp_path / "run")}  # fmt: skip
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(settings))
    (tmp_path / "list.txt").write_text("a red circle\ntwo blue squares\na green triangle\n")
    (tmp_path / "other.txt").write_text("a pink circle\ntwo cyan squares\n")
    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: red_scorer if name == "shapes" else Green())
    return tmp_path


def run(*flags: str) -> dict[str, Any]:
    shutil.rmtree("out", ignore_errors=True)
    assert main.main(["evaluate", *flags, "--output-dir", "out"]) == 0
    return json.loads(Path("out/table.json").read_text())


FLAGS = ("run", "--prompts", "list.txt", "--reward", "shapes", "pickscore")


def test_the_row_of_base_and_lora(
    place: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], red_scorer: Any
) -> None:
    """What `held_out.evaluate` measures on the same noise, with the LoRA as diffusers loads it; settings from the run."""
    content = run(*FLAGS)
    assert content["settings"]["seed"] == 3 and content["settings"]["images"] == 3 and content["settings"]["steps"] == 4
    config = TrainConfig(model=str(tiny_model), max_sequence_length=0)
    backbone = loading.load_model(config, torch.device("cpu"))
    how = held_out.Sampling(4, 3, 1.0, (32, 32))
    features = EfficientNetLite(torch.device("cpu"))
    prompts = Path("list.txt").read_text().splitlines()
    scorers = [("red", red_scorer), ("green", Green())]
    protocol = held_out.EvaluationProtocol(PromptList("list.txt", prompts), scorers, features, 3, how)
    for label in ("base", "LoRA"):
        if label == "LoRA":
            backbone.pipeline.load_lora_weights("run", weight_name=FILE_NAME)
        expected = held_out.evaluate(backbone, protocol)
        if label == "base":
            dark = float(expected.statistics["brightness"].mean())
        found = content["models"][label]
        assert list(found) == ["red", "green", *MEASURES]
        for name in ("red", "green"):
            per_prompt = expected.scores[name].mean(1)
            assert found[name]["mean"] == pytest.approx(float(per_prompt.mean()), abs=1e-5)
            assert per_prompt.min() - 1e-6 <= found[name]["low"] < found[name]["high"] <= per_prompt.max() + 1e-6
        for name in MEASURES:
            assert found[name]["mean"] == pytest.approx(float(expected.diversity[name].mean()), abs=1e-4)
    gain = content["gain"]["red"]
    models = content["models"]
    assert gain["mean"] == pytest.approx(models["LoRA"]["red"]["mean"] - models["base"]["red"]["mean"], abs=1e-6)
    drift = content["drift"]["brightness"]
    assert drift["shift"]["mean"] == pytest.approx(drift["trained"] - drift["base"]) != 0
    assert drift["base"] == pytest.approx(dark, abs=1e-4)
    assert abs(gain["mean"]) > 1e-3 and gain["low"] <= gain["mean"] <= gain["high"]
    out = capsys.readouterr().out
    table, limit = out.strip().split("\n\n")
    assert [line.split("|")[1].strip() for line in table.splitlines()] == ["", "---", "base", "LoRA", "change, paired"]
    assert [line.split("|")[2].strip() for line in limit.splitlines()[2:]] == ["cosine diversity"]
    text = Path("out/table.md").read_text()
    assert table in text and limit in text and "3 prompts x 3 images, 4 steps" in text and str(place) not in text
    assert min(Image.open(f"out/{picture}.png").size[0] for picture in ("samples", "pareto")) > 100
    front = content["limit"]["front"]
    assert front["reward"][0] == pytest.approx(models["base"]["red"]["mean"], abs=1e-5)
    lost = content["limit"]["models"]["LoRA"]["cosine diversity"]["lost"]["mean"]
    cosine = {label: found["cosine diversity"]["mean"] for label, found in models.items()}
    assert lost == pytest.approx(1 - cosine["LoRA"] / cosine["base"], abs=1e-5)
    # The run's own folder is as it was.
    assert {path.name for path in Path("run").iterdir()} == {FILE_NAME, "config.yaml"}


def test_flags_beat_the_run(place: Path) -> None:
    content = run(*FLAGS, "--images", "2", "--seed", "5", "--limit", "2", "--steps", "3", "--solver", "ab2")
    expected = {"resolution": [32, 32], "rewards": ["shapes", "pickscore"], "preference_prompts": 0,
                "images": 2, "seed": 5, "prompts": 2, "steps": 3, "solver": "ab2", "guidance": 1.0,
                "model": "local", "features": "efficientnet-lite0"}  # fmt: skip
    assert content["settings"] == expected


def test_a_file_and_a_base_alone(place: Path, tiny_model: Path) -> None:
    """Without a run's settings they are flags; without a LoRA there is one row."""
    flags = ["--model", str(tiny_model), "--prompts", "list.txt", "--reward", "shapes", "--resolution", "32", "32"]
    flags += ["--max-sequence-length", "0", "--guidance", "1", "--images", "3", "--steps", "4", "--seed", "3"]
    whole = run(*FLAGS)["models"]
    alone = run(*flags)
    assert list(alone["models"]) == ["base"] and "gain" not in alone and "drift" not in alone
    assert alone["models"]["base"]["red"] == whole["base"]["red"]
    other = run(f"run/{FILE_NAME}", *flags)
    assert other["models"]["LoRA"]["red"] == whole["LoRA"]["red"]


def test_preference_and_diversity_on_other_prompts(place: Path) -> None:
    """The first reward on its own prompts, all else on the second list, as if each were evaluated by itself."""
    whole = run(*FLAGS, "--preference-prompts", "other.txt")
    alone = run(*FLAGS)
    # The limit is about the reward that was trained for, and so on its prompts.
    assert whole["limit"] == alone["limit"] and whole["limit"]["models"]
    both, task = whole["models"]["LoRA"], alone["models"]["LoRA"]
    rest = run("run", "--prompts", "other.txt", "--reward", "shapes", "pickscore")["models"]["LoRA"]
    assert list(both) == ["red", "green", *MEASURES]
    assert both["red"] == task["red"] and both["red"] != rest["red"]
    assert all(both[name] == rest[name] for name in ("green", *MEASURES))
    assert Path("out/samples.png").exists()


def test_a_killed_evaluation_keeps_the_base(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = run(*FLAGS)
    measured: list[int] = []
    original = held_out.evaluate
    monkeypatch.setattr(held_out, "evaluate", lambda *args, **kwargs: measured.append(1) or original(*args, **kwargs))
    assert main.main(["evaluate", *FLAGS, "--output-dir", "out"]) == 0
    assert len(measured) == 1
    assert json.loads(Path("out/table.json").read_text()) == content


@pytest.mark.parametrize("lost", ["base.npz", "samples.png"])
def test_a_file_that_cannot_be_written_takes_no_figures_along(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    shutil.rmtree("out", ignore_errors=True)
    monkeypatch.setattr(*((held_out, "_write") if lost == "base.npz" else (evaluation, "show")), full)
    assert main.main(["evaluate", *FLAGS, "--output-dir", "out"]) == (0 if lost == "base.npz" else 1)
    out, err = capsys.readouterr()
    assert "| LoRA |" in out and "No space left on device" in err
    assert json.loads(Path("out/table.json").read_text())["models"].keys() == {"base", "LoRA"}
    assert ("base.npz cannot be written" in err) == (lost == "base.npz")


def test_what_is_measured_unless_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's rewards and the paper's three for a model of the user's; the shapes alone for the demo model."""
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(evaluation, "run", lambda config, *more: seen.append(config.reward) or 0)
    for flags in (["run"], ["--model", "x/y", "--reward", "hpsv2"], ["--model", "demo"], [], ["--model", "x/y"]):
        assert main.main(["evaluate", *flags]) == 0
    preference = ("hpsv2", "imagereward", "pickscore")
    assert seen == [("shapes", *preference), ("hpsv2",), ("shapes",), ("shapes",), preference]
    # The first one is what the run was trained for, also if it is one of the three.
    settings = json.loads(Path("run/config.yaml").read_text())
    Path("run/config.yaml").write_text(json.dumps({**settings, "reward": ["pickscore", "ocr"]}))
    assert main.main(["evaluate", "run"]) == 0
    assert seen[-1] == ("pickscore", "ocr", "hpsv2", "imagereward")


@pytest.mark.parametrize(
    ("odd", "blame"),
    [
        ({"reward": None}, "reward None: input should be a valid tuple"),
        ({"reward": "shapes"}, "reward 'shapes': input should be a valid tuple"),
        ({"reward_models": [3]}, "reward_models 3: "),
        ({"neutral": "contrast"}, "neutral 'contrast': input should be a valid tuple"),
        ({"remote_hosts": 5}, "remote_hosts 5: input should be a valid tuple"),
    ],
)
def test_a_run_with_odd_settings_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], odd: dict[str, Any], blame: str
) -> None:
    settings = json.loads(Path("run/config.yaml").read_text())
    Path("run/config.yaml").write_text(json.dumps({**settings, **odd}))
    assert main.main(["evaluate", "run", "--device", "cpu", "--model", "demo"]) == 2
    assert capsys.readouterr().err.startswith(f"tmpo_trainer: {Path('run/config.yaml')}: {blame}")


def test_what_a_run_took_out_may_be_written_as_one_number(place: Path) -> None:
    for share, taken in [(1, ("contrast",)), (0.5, ()), ([1], ("contrast",)), ([], ())]:
        Path("run/config.yaml").write_text(json.dumps({"neutral": ["contrast"], "neutral_share": share}))
        assert evaluation._taken_out(Path("run")) == taken


def test_scorers_of_training_alone_are_no_part_of_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GARDO's auxiliary scorers are not evaluated, so where their weights are does not matter."""
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(evaluation, "run", lambda config, *more: seen.append(config.reward_models) or 0)
    settings = json.loads(Path("run/config.yaml").read_text())
    Path("run/config.yaml").write_text(json.dumps({**settings, "reward_models": ["pickscore=a", "ocr=b"]}))
    assert main.main(["evaluate", "run"]) == 0
    assert seen == [("pickscore=a",)]


BAD: list[tuple[str, list[str]]] = [
    ("nowhere", ["nowhere does not exist"]),
    ("list.txt", ["list.txt cannot be read as safetensors"]),
    ("run --prompts none.txt", ["prompt file none.txt does not exist"]),
    ("run --learning-rate 1", ["unknown flag --learning-rate"]),
    ("run --imagez 3", ["unknown flag --imagez", "did you mean --images?"]),
    ("run --preference-prompts other.txt --reward shapes", ["--preference-prompts is for the rewards after the first"]),
    (
        "run --reward remote --reward-models remote=http://127.0.0.1:1",
        ["reward remote has no prompt list of its own: give --prompts FILE"],
    ),
    ("run --images 1", ["--images '1': input should be greater than or equal to 2"]),
    ("run --steps none", ["--steps 'none': input should be a valid integer"]),
    ("run --features none", ["features none: no such folder"]),
    ("wide", ["transformer_blocks.0.attn.to_q is 8 x 8 and does not fit SD3Transformer2DModel, where it is 32 x 32"]),
    ("--model x/y", ["model x/y needs a CUDA GPU"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "blame"), BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: str, blame: list[str]
) -> None:
    from safetensors.torch import save_file

    monkeypatch.undo()
    monkeypatch.chdir(place)
    shutil.copytree("run", "wide")
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}, f"wide/{FILE_NAME}"
    )
    capsys.readouterr()
    assert main.main(["evaluate", *flags.split(), *(() if "--reward" in flags else ("--reward", "shapes"))]) == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("tmpo_trainer: ")]
    for part in blame:
        assert part in line
    assert not Path("outputs").exists()


def test_a_lora_diffusers_cannot_place_is_refused(place: Path, load: Callable[..., Any]) -> None:
    from safetensors.torch import save_file

    name = "transformer.nowhere.to_q"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}, "odd.safetensors")
    with pytest.raises(ConfigError, match=r"odd.safetensors: nowhere.to_q is no linear layer of SD3"):
        attach.attach(load(), Path("odd.safetensors"))


def test_the_base_of_another_model_is_not_taken_for_this_ones(place: Path, tiny_model: Path) -> None:
    """The same output folder, prompts and noise, but other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, "second")
    file = Path("second/transformer/diffusion_pytorch_model.safetensors")
    state = load_file(file)
    save_file({**state, "proj_out.weight": 2 * state["proj_out.weight"]}, file, {"format": "pt"})
    first = run(*FLAGS)["models"]["base"]["red"]["mean"]
    assert main.main(["evaluate", *FLAGS, "--model", "second", "--output-dir", "out"]) == 0
    second = json.loads(Path("out/table.json").read_text())["models"]["base"]["red"]["mean"]
    assert abs(second - first) > 1e-4
    Path("out/base.npz").write_bytes(b"cut short")
    assert main.main(["evaluate", *FLAGS, "--output-dir", "out"]) == 0
    assert json.loads(Path("out/table.json").read_text())["models"]["base"]["red"]["mean"] == first


def test_what_fails_on_the_way_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dead:
        name = "remote"

        def score(self, *arguments: Any) -> torch.Tensor:
            raise RuntimeError("reward remote at http://127.0.0.1:1: Connection refused\n(5 tries)")

    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: Dead())
    assert main.main(["evaluate", *FLAGS, "--output-dir", "out"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "tmpo_trainer: reward remote at http://127.0.0.1:1: Connection refused (5 tries)"


def test_numbers_that_are_not_finite_are_refused(place: Path, capsys: pytest.CaptureFixture[str], load: Any) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(f"run/{FILE_NAME}")
    name = next(iter(state))
    save_file({**state, name: torch.full_like(state[name], torch.nan)}, f"run/{FILE_NAME}")
    assert main.main(["evaluate", *FLAGS]) == 2
    assert "has numbers that are not finite" in capsys.readouterr().err
    backbone = load()
    with torch.no_grad():
        backbone.transformer.proj_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="non-finite latents for prompt 'a red circle'"):
        held_out.evaluate(backbone, held_out.EvaluationProtocol(
            PromptList("prompts", ["a red circle"]), [("green", Green())], EfficientNetLite(torch.device("cpu")), 2,
            held_out.Sampling(2, 0, 1.0, (32, 32)),
        ))  # fmt: skip


def test_each_reward_wants_its_own_prompts_only(place: Path) -> None:
    """The first on the first list, the others on the second: no prompt need suit all."""
    Path("signs.jsonl").write_text('{"prompt": "a shop", "target": "open"}\n{"prompt": "a door", "target": "push"}\n')
    content = run("run", "--prompts", "list.txt", "--reward", "shapes", "ocr", "--preference-prompts", "signs.jsonl")
    assert content["settings"]["prompts"] == 3 and content["settings"]["preference_prompts"] == 2


def test_defaults_are_the_papers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 pictures, and for a model from the hub the preset's features and batch; the demo has its own steps."""
    seen: list[TrainConfig] = []
    monkeypatch.setattr(evaluation, "run", lambda config, *more: seen.append(config) or 0)
    for flags in (["--model", "black-forest-labs/FLUX.1-dev"], [], ["--model", "x/y", "--reward", "geneval"], ["run"]):
        assert main.main(["evaluate", *flags]) == 0
    assert [(c.eval_images, c.eval_steps, c.eval_solver, c.features, c.max_batch) for c in seen] == [
        (10, 28, "euler", "facebook/dinov2-large", 27), (10, 12, "ab2", "efficientnet-lite0", None),
        (10, 28, "euler", "facebook/dinov2-large", 27), (3, 4, "euler", "efficientnet-lite0", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names", ["lora_unet_transformer_blocks_0_attn_to_q", "diffusion_model.transformer_blocks.0.attn.to_q"]
)
def test_names_that_diffusers_does_not_know_are_one_line(
    place: Path, names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    save_file(
        {f"{names}.lora_down.weight": torch.ones(2, 32), f"{names}.lora_up.weight": torch.ones(32, 2)}, "k.safetensors"
    )
    flags = [*FLAGS[1:], "--model", str(json.loads(Path("run/config.yaml").read_text())["model"])]
    assert (
        main.main(["evaluate", "k.safetensors", *flags, "--resolution", "32", "32", "--max-sequence-length", "0"]) == 2
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tmpo_trainer: ")]
    assert "k.safetensors" in line


def test_a_new_measure_needs_its_entry_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEASURES, "largest", Measure(lambda latents: latents.max(), "latents"))
    content = run(*FLAGS)
    assert list(content["models"]["LoRA"]) == ["red", "green", *MEASURES] and "largest" in content["gain"]
    assert "| largest |" in Path("out/table.md").read_text()


def test_a_run_from_elsewhere_names_no_code_and_no_hosts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.yaml may be anybody's: what it would have this machine do must be asked for by flags."""
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    Path("evil.py").write_text("raise SystemExit('it ran')")
    remote = {"reward": ["remote"], "reward_models": ["remote=http://10.0.0.5:1"], "remote_hosts": ["10.0.0.5"]}
    for more, told in (
        (
            {"reward": ["evil:Scorer"]},
            "has the reward 'evil:Scorer', which is code: if you trust it, give --reward evil:Scorer",
        ),
        (remote, "sends pictures to other machines: if you trust them, give --remote-hosts 10.0.0.5"),
    ):
        Path("run/config.yaml").write_text(yaml.safe_dump(saved | more))
        assert main.main(["evaluate", "run", "--prompts", "list.txt"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"tmpo_trainer: run/config.yaml {told}"
    # Naming the reward does not name its host.
    assert main.main(["evaluate", "run", "--prompts", "list.txt", "--reward", "remote"]) == 2
    assert "give --remote-hosts 10.0.0.5" in capsys.readouterr().err
    # Hosts that nothing is sent to are nobody's business; the folder for text features is this machine's.
    Path("run/config.yaml").write_text(yaml.safe_dump(saved | remote | {"text_cache": "/elsewhere"}))
    layers = dict(evaluate._layers(Path("run"), {"reward": ["shapes"]}))
    assert not {"remote_hosts", "text_cache"} & layers["run/config.yaml"].keys()


@pytest.mark.parametrize("reward", ["geneval", "remote-b"])
def test_genevals_overall_score_is_the_mean_of_its_tasks(
    place: Path, monkeypatch: pytest.MonkeyPatch, reward: str
) -> None:
    """Not of the pictures: here one task has one prompt and the other two."""
    lines = [{"prompt": "a red circle", "tag": "colors", "include": [{"class": "apple", "count": 1}]}]
    lines += [
        {"prompt": text, "tag": "counting", "include": [{"class": "apple", "count": 2}]}
        for text in ("two blue squares", "two cats")
    ]
    Path("tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(Green, "name", reward)
    monkeypatch.setattr(loading, "check_rewards", lambda config: None)
    content = run("run", "--prompts", "tasks.jsonl", "--reward", reward)
    (found,) = content["geneval"].values()
    for label in ("base", "LoRA"):
        tasks = {tag: own[label] for tag, own in found["tasks"].items()}
        assert found["mean of the tasks"][label] == pytest.approx((tasks["colors"] + tasks["counting"]) / 2)
        assert content["models"][label][reward]["mean"] == pytest.approx((tasks["colors"] + 2 * tasks["counting"]) / 3)
    assert found["gain"]["mean"] == pytest.approx(
        found["mean of the tasks"]["LoRA"] - found["mean of the tasks"]["base"]
    )
    named = " (GenEval's overall score)" if reward == "geneval" else ""
    assert f"| mean of the tasks{named} |" in Path("out/table.md").read_text()


def test_a_reward_whose_code_has_changed_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "changing_reward.py"
    code = "class Scorer:\n    name = 'changing'\n    def __init__(self, device): pass\n"
    found = []
    for more in ("", "# other rules\n", ""):
        module.write_text(code + more)
        found.append(loading.identity(TrainConfig(reward=("changing_reward:Scorer",))))
    assert found[0] == found[2] != found[1]
