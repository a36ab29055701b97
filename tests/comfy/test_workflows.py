"""The shipped workflows: the first three run as they are, the others ask for their models in ComfyUI's usual words. FLUX.2's
also runs, on a tiny network of random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "workflows"
OFFLINE = ["01 demo tree", "02 score and select", "03 base and LoRA"]
FLUX2 = "06 FLUX.2 klein tree"
OTHERS = ["04 FLUX.1-dev tree", "05 SD3.5 tree", FLUX2]
DEMO = Path(__file__).parents[2] / "tmpo_trainer" / "demo" / "model"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def as_prompt(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A workflow as the page would queue it: links by name, widgets' values by their order."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for entry in workflow["nodes"]:
        if entry["type"] == "MarkdownNote":
            continue
        declared = info[entry["type"]]["input"]
        inputs: dict[str, Any] = {}
        values = iter(entry["widgets_values"])
        for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            if isinstance(spec[0], list) or spec[0] in WIDGETS:
                inputs[name] = next(values)
                # The page adds one of its own to seeds.
                if name in ("seed", "noise_seed") or (len(spec) > 1 and spec[1].get("control_after_generate")):
                    assert next(values) in ("fixed", "increment", "decrement", "randomize")
        assert next(values, None) is None, f"{entry['type']} has more values than widgets"
        for slot in entry["inputs"]:
            if slot["link"] is not None:
                _, source, output, target, _, kind = links[slot["link"]]
                assert target == entry["id"] and kind == info_of(workflow, source, info)["output"][output]
                inputs[slot["name"]] = [str(source), output]
        prompt[str(entry["id"])] = {"class_type": entry["type"], "inputs": inputs}
    return prompt


def info_of(workflow: dict[str, Any], node: int, info: dict[str, Any]) -> dict[str, Any]:
    return next(info[entry["type"]] for entry in workflow["nodes"] if entry["id"] == node)


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def load_known(name: str, info: dict[str, Any]) -> dict[str, Any]:
    """A workflow, or a skip if this ComfyUI is too old for its nodes."""
    workflow = load(name)
    missing = {entry["type"] for entry in workflow["nodes"]} - info.keys() - {"MarkdownNote"}
    if name == FLUX2 and missing:
        pytest.skip(f"this ComfyUI does not know FLUX.2: it has no node {', '.join(sorted(missing))}")
    return workflow


@pytest.fixture
def info(comfy: Any) -> dict[str, Any]:
    return json.loads(comfy.get("/object_info"))


@pytest.mark.parametrize("name", OFFLINE)
def test_a_demo_workflow_runs_as_it_is(comfy: Any, info: dict[str, Any], name: str) -> None:
    workflow = load(name)
    found = comfy.run(as_prompt(workflow, info))
    shown = [entry for entry in workflow["nodes"] if info.get(entry["type"], {}).get("output_node")]
    assert shown and all(str(entry["id"]) in found for entry in shown)
    if name == OFFLINE[2]:
        (text,) = [out["text"][0] for key, out in found.items() if "| shapes |" in str(out.get("text"))]
        base, trained = (float(cell) for cell in text.splitlines()[2].split("|")[2:4])
        # The LoRA that comes along does what it was trained for.
        assert trained > base


@pytest.mark.parametrize("name", OTHERS)
def test_a_workflow_without_its_models_says_which(comfy: Any, info: dict[str, Any], name: str) -> None:
    with pytest.raises(Exception, match="not in") as error:
        comfy.queue(as_prompt(load_known(name, info), info))
    said = json.loads(str(error.value))["node_errors"]
    kinds = {problem["type"] for node in said.values() for problem in node["errors"]}
    assert kinds == {"value_not_in_list"}
    assert {node["class_type"] for node in said.values()} <= {
        "UNETLoader",
        "CLIPLoader",
        "DualCLIPLoader",
        "VAELoader",
        "CheckpointLoaderSimple",
    }


def flux2(text: int) -> dict[str, Tensor]:
    """Random weights of a FLUX.2 with one head, one block of each kind and text features of this width, by ComfyUI's names."""
    width, mlp = 128, 384
    shapes = {
        "img_in": (width, 128), "txt_in": (width, text), "time_in.in_layer": (width, 256), "time_in.out_layer": (width, width),
        "double_stream_modulation_img.lin": (6 * width, width), "double_stream_modulation_txt.lin": (6 * width, width),
        "single_stream_modulation.lin": (3 * width, width), "final_layer.linear": (128, width),
        "final_layer.adaLN_modulation.1": (2 * width, width), "single_blocks.0.linear1": (3 * width + 2 * mlp, width),
        "single_blocks.0.linear2": (width, width + mlp),
    }  # fmt: skip
    for stream in ("img", "txt"):
        shapes |= {
            f"double_blocks.0.{stream}_attn.qkv": (3 * width, width),
            f"double_blocks.0.{stream}_attn.proj": (width, width),
            f"double_blocks.0.{stream}_mlp.0": (2 * mlp, width),
            f"double_blocks.0.{stream}_mlp.2": (width, mlp),
        }
    generator = torch.Generator().manual_seed(0)
    state = {f"{key}.weight": 0.05 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for attention in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        state |= {f"{attention}.norm.{one}_norm.scale": torch.ones(128) for one in ("query", "key")}
    return state


def test_the_workflow_of_flux2_runs(comfy: Any, info: dict[str, Any]) -> None:
    """Its loaders, noise levels, guider and VAE. Only text encoder, scorer, size and number of leaves are others."""
    prompt = as_prompt(load_known(FLUX2, info), info)
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    models = comfy.base / "models"
    for kind in ("diffusion_models", "vae"):
        (models / kind).mkdir(exist_ok=True)
    encoders = [json.loads((DEMO / name / "config.json").read_text()) for name in ("text_encoder", "text_encoder_2")]
    save_file(
        flux2(sum(encoder["hidden_size"] for encoder in encoders)),
        models / "diffusion_models" / nodes["UNETLoader"]["unet_name"],
    )
    torch.manual_seed(0)
    vae = {key: value.half() for key, value in AutoencoderKLFlux2().state_dict().items() if value.is_floating_point()}
    save_file(vae, models / "vae" / nodes["VAELoader"]["vae_name"])
    (loader,) = (key for key, node in prompt.items() if node["class_type"] == "CLIPLoader")
    prompt["demo"] = {"class_type": "TMPO_DemoModelLoader", "inputs": {}}
    for node in prompt.values():
        if node["inputs"].get("clip") == [loader, 0]:
            node["inputs"]["clip"] = ["demo", 1]
    del prompt[loader]
    for kind in ("EmptyFlux2LatentImage", "Flux2Scheduler"):
        nodes[kind] |= {"width": 48, "height": 32}
    nodes["TMPO_TreeSamplerAdvanced"]["branching"] = 2
    nodes["TMPO_ScoreImages"]["reward"] = "sharpness"
    found = comfy.wait(comfy.queue(prompt), 300)
    (view,) = (out["tmpo_tree"][0] for out in found.values() if "tmpo_tree" in out)
    assert len(view["leaves"]) == 8 and view["steps"] == 20 and view["aspect"] == 1.5
    assert sum(branch["image"] is not None for branch in view["nodes"]) == 2 + 4
    saved = [
        comfy.image(image) for out in found.values() for image in out.get("images", []) if image["type"] == "output"
    ]
    assert [picture.shape for picture in saved] == [(32, 48, 3)] * 4 and abs(saved[0].astype(int) - saved[1]).max() > 0
    for kind, file in (("diffusion_models", "unet_name"), ("vae", "vae_name")):
        (models / kind / nodes["UNETLoader" if kind != "vae" else "VAELoader"][file]).unlink()


def test_every_shipped_workflow_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {*OFFLINE, *OTHERS}
    for path in FOLDER.glob("*.json"):
        workflow = json.loads(path.read_text())
        identities = [entry["id"] for entry in workflow["nodes"]]
        assert len(set(identities)) == len(identities) and workflow["last_node_id"] == max(identities)
