"""A CLIP model in one file, as in ComfyUI's clip_vision, on tiny random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from tmpo_trainer.demo.build import make_tokenizer
from tmpo_trainer.rewards import clipscore, pickscore
from tmpo_trainer.rewards.parts import clip_file
from tmpo_trainer.settings.errors import ConfigError

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a red circle", "a green triangle"]


@pytest.fixture(scope="module", params=[(128, "quick_gelu"), (1280, "gelu")], ids=["openai", "laion"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The widths say what cannot be seen: a vision tower as wide as ViT-H's has heads of 80 and plain GELU."""
    width, activation = request.param
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = CLIPModel(
        CLIPConfig(
            projection_dim=16,
            text_config={
                "hidden_size": 128,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "hidden_act": activation,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": tokenizer.model_max_length,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={
                "hidden_size": width,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": width // (80 if width == 1280 else 64),
                "hidden_act": activation,
                "image_size": 32,
                "patch_size": 8,
            },
        )
    )
    # Random weights are near zero, where both activations and any split into heads look alike.
    for name, value in model.named_parameters():
        if "fc1" in name or "q_proj" in name or "k_proj" in name:
            value.data *= 20
    found = tmp_path_factory.mktemp("clip")
    model.save_pretrained(found / "whole")
    tokenizer.save_pretrained(found / "whole")
    tokenizer.save_pretrained(found / "clip_vision")
    tensors = load_file(found / "whole" / "model.safetensors")
    # Older files have these too.
    tensors["text_model.embeddings.position_ids"] = torch.arange(tokenizer.model_max_length)[None]
    save_file(tensors, found / "clip_vision" / "a.safetensors")
    return found


def test_a_tokenizer_beside_it_without_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "clip_vision", tmp_path / "clip_vision")
    (tmp_path / "clip_vision" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"the tokenizer in .*clip_vision knows 0 words"):
        pickscore.load(CPU, str(tmp_path / "clip_vision" / "a.safetensors"))


def test_a_file_scores_as_the_folder_does(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 40, 60, 3), dtype=np.uint8)
    for scorer in (pickscore, clipscore):
        expected = scorer.load(CPU, str(folder / "whole")).score(images, PROMPTS)
        found = scorer.load(CPU, str(folder / "clip_vision" / "a.safetensors")).score(images, PROMPTS)
        torch.testing.assert_close(found, expected, atol=0, rtol=1e-5)
        assert expected.std() > 2e-2 * expected.abs().max()


def test_a_file_that_is_not_a_whole_model_is_one_line(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "whole" / "model.safetensors")
    vision = {k: v for k, v in tensors.items() if k.startswith("vis")}
    cases = {
        "vision": (vision, "holds only the vision tower: give the whole model"),
        "text": ({k: v for k, v in tensors.items() if k.startswith("text")}, "holds only the text tower"),
        "other": ({"conv1.weight": torch.ones(2)}, "not a CLIP model in transformers' names"),
        "open-clip": ({"visual.conv1.weight": torch.ones(2)}, "needs the open_clip_config.json of its hub repository"),
        "cut": (
            vision | {"text_model.final_layer_norm.weight": torch.ones(2)},
            "not a CLIP model in transformers' names",
        ),
        "more": (tensors | {"head": torch.ones(2)}, r"not its checkpoint \(at head\)"),
    }
    for name, (content, said) in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(ConfigError, match=f"reward pickscore: .*{name}.safetensors (is )?{said}"):
            pickscore.load(CPU, str(tmp_path / f"{name}.safetensors"))
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"cannot be read .*: give a folder with the model, or its model.safetensors"):
        pickscore.load(CPU, str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("name", "config", "text", "vision"),
    [
        ("vit-l", {}, (768, 12, 12), (1024, 24, 16)),
        ("vit-h", {"projection_dim": 1024}, (1024, 24, 16), (1280, 32, 16)),
        ("vit-g", {"projection_dim": 1280}, (1280, 32, 20), (1664, 48, 16)),
    ],
)
def test_published_sizes(name: str, config: dict[str, int], text: tuple[int, ...], vision: tuple[int, ...]) -> None:
    """Widths, layers and heads of CLIP's published models, from shapes alone."""
    towers = [
        {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
        }
        for width, layers, heads in (text, vision)
    ]
    expected = CLIPConfig(
        projection_dim=config.get("projection_dim", 768),
        text_config={**towers[0], "vocab_size": 49408},
        vision_config={**towers[1], "image_size": 224, "patch_size": 14},
    )
    with torch.device("meta"):
        weights = CLIPModel(expected).state_dict()
    found = clip_file.config_of(weights)
    assert found.projection_dim == expected.projection_dim
    for mine, theirs in ((found.text_config, expected.text_config), (found.vision_config, expected.vision_config)):
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            assert getattr(mine, key) == getattr(theirs, key), (name, key)
    assert found.vision_config.image_size == 224 and found.vision_config.patch_size == 14
    assert found.text_config.eos_token_id == 49407
