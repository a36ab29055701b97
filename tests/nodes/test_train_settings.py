"""What a workflow from elsewhere may ask of the Train node. ComfyUI itself is not needed: its folders are stood in for."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tmpo_trainer.settings.presets import all_settings, make_config

REPOSITORY = Path(__file__).parents[2]
PLAIN = {
    "preset": "demo", "layer": "(none)", "model": "(preset)", "transformer": "(model's own)", "reward": "", "seed": 0,
    "method": "(preset)", "prompts": "", "eval_prompts": "", "updates": 0, "learning_rate": 0.0, "lora_rank": 0,
    "init_lora": "(none)", "settings": "",
}  # fmt: skip


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, as a part of the pack that ComfyUI would import, with folders under `tmp_path / "models"`."""
    stand_in = types.ModuleType("folder_paths")
    models = tmp_path / "models"
    stand_in.get_folder_paths = lambda kind: [str(models / kind)]  # type: ignore[attr-defined]
    stand_in.get_filename_list = lambda kind: ["a b.safetensors"]  # type: ignore[attr-defined]
    stand_in.get_full_path_or_raise = lambda kind, name: str(models / kind / name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", stand_in)
    before = set(sys.modules)
    for name, place in (("pack_of_test", REPOSITORY), ("pack_of_test.nodes", REPOSITORY / "nodes")):
        package = types.ModuleType(name)
        package.__path__ = [str(place)]
        sys.modules[name] = package
    monkeypatch.setenv("TMPO_COMFYUI_SETTINGS", str(tmp_path / "owner.yaml"))
    yield importlib.import_module("pack_of_test.nodes.train_settings")
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_allow_list_holds_numbers_and_choices_alone(node: Any) -> None:
    """A new setting that takes a path or free text must not get into it."""
    settings = all_settings()
    assert set(node.MORE) <= settings.keys()
    free = {
        name for name, field in settings.items() if "Path" in str(field.annotation) or "str" in str(field.annotation)
    }
    assert free >= {"model", "reward", "prompts", "reward_models", "remote_hosts", "device", "features", "text_cache"}
    assert not free & set(node.MORE)
    page = (REPOSITORY / "web/docs/TMPO_Train.md").read_text()
    assert all(f"`{name}`" in page for name in node.MORE)


def test_what_is_asked_is_what_the_trainer_gets(node: Any, tmp_path: Path) -> None:
    (tmp_path / "models/diffusers/tiny").mkdir(parents=True)
    (tmp_path / "models/diffusers/tiny/model_index.json").write_text("{}")
    more = "resolution: 64, 96\nbranch-early: [2]\n\n report : false\nkernel: flow_sde\neta: 1e-1"
    inputs = {
        **PLAIN, "layer": "recommended", "model": "tiny", "reward": "sharpness, shapes", "method": "flow-grpo", "updates": 3,
        "learning_rate": 1e-4, "lora_rank": 8, "seed": 5, "init_lora": "a b.safetensors", "prompts": " a cat\n\na \\n dog\n",
        "settings": more,
    }  # fmt: skip
    settings, names, files = node.asked(inputs, tmp_path / "run")
    assert names == ["demo", "recommended"] and files == {"prompts.txt": "a cat\na \\n dog\n"}
    config = make_config([("asked", yaml.safe_load(yaml.safe_dump(settings)))])
    assert config.resolution == (64, 96) and config.branch_early == (2,) and config.report is False
    assert (config.reward, config.method, config.updates, config.seed) == (("sharpness", "shapes"), "flow-grpo", 3, 5)
    assert (config.learning_rate, config.lora_rank, config.eta) == (1e-4, 8, 0.1)
    assert config.model == str(tmp_path / "models/diffusers/tiny") and config.prompts == tmp_path / "run/prompts.txt"
    assert config.init_lora == tmp_path / "models/loras/a b.safetensors"
    assert node.asked(PLAIN, tmp_path) == ({"seed": 0}, ["demo"], {})


@pytest.mark.parametrize(
    "inputs",
    [
        {"settings": "prompts: /etc/passwd"},
        {"settings": "reward_models: remote=http://elsewhere"},
        {"settings": "remote-hosts: elsewhere"},
        {"settings": "output_dir: /tmp"},
        {"settings": "model: somebody/else"},
        {"settings": "tracker: wandb"},
        {"settings": "device: cuda"},
        {"settings": "text_cache: /tmp"},
        {"settings": "updat: 3"},
        {"settings": "--updates 3"},
        {"settings": "serve"},
        {"settings": "kernel: !!python/object/apply:os.system [ls]"},
        {"settings": "kernel: a\\b"},
        {"settings": "kernel:"},
        {"reward": "remote"},
        {"reward": "os:system"},
        {"reward": "picksore"},
        {"model": "/somewhere/else"},
        {"model": "somebody/else"},
        {"preset": "../../../pyproject"},
        {"layer": "--help"},
        {"method": "os"},
        {"transformer": "../../secret.safetensors"},
        {"init_lora": "/secret.safetensors"},
    ],
)
def test_files_hosts_programs_and_commands_cannot_be_asked_for(
    node: Any, tmp_path: Path, inputs: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(inputs))}: ") as caught:
        node.asked({**PLAIN, **inputs}, tmp_path)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_the_owner_of_the_machine_names_models_and_servers(node: Any, tmp_path: Path) -> None:
    owner = tmp_path / "owner.yaml"
    owner.write_text(
        "models: {big: /data/FLUX.1-dev}\n"
        "reward_models: {remote: 'http://10.0.0.5:8000', pickscore: /data/p}\nremote_hosts: [10.0.0.5]\n"
    )
    settings, _, _ = node.asked({**PLAIN, "reward": "remote", "model": "big"}, tmp_path)
    assert settings["model"] == "/data/FLUX.1-dev" and settings["remote_hosts"] == ["10.0.0.5"]
    assert settings["reward_models"] == ["remote=http://10.0.0.5:8000"]
    # Neither a host nor a scorer's file goes along with a run that does not use them.
    settings, _, _ = node.asked({**PLAIN, "preset": "pickscore"}, tmp_path)
    assert settings == {"seed": 0, "reward_models": ["pickscore=/data/p"]}
    for text in ("model: {a: b}", "models: [a]", "remote_hosts: [1]", "models: {1: a}", "- a", "[", "a: " + "[" * 5000):
        owner.write_text(text)
        with pytest.raises(ValueError, match=r"owner\.yaml") as caught:
            node.owned()
        assert len(str(caught.value)) < 600
        # The lists of the node do without it: ComfyUI drops a node that has none.
        assert node.choices()["model"] == ["(preset)", "demo"]
        with pytest.raises(ValueError, match=r"owner\.yaml"):
            node.asked(PLAIN, tmp_path)
    owner.write_text("models:\nremote_hosts:\n")
    assert node.owned() == {"models": {}, "reward_models": {}, "remote_hosts": []}
