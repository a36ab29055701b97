"""The shipped workflows: 01 to 03 and 07 run as they are, the others ask for their models in ComfyUI's usual words. FLUX.2's
also runs, on a tiny network of random weights.
"""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.workflows import FOLDER, NOTES, as_prompt

OFFLINE = ["01 demo tree", "02 score and select", "03 base and LoRA", "07 variations, choose, refine"]
FLUX2 = "06 FLUX.2 klein tree"
OTHERS = ["04 FLUX.1-dev tree", "05 SD3.5 tree", FLUX2]
DEMO = Path(__file__).parents[2] / "tmpo_trainer" / "demo" / "model"


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def load_known(name: str, info: dict[str, Any]) -> dict[str, Any]:
    """A workflow, or a skip if this ComfyUI is too old for its nodes."""
    workflow = load(name)
    missing = {entry["type"] for entry in workflow["nodes"]} - info.keys() - set(NOTES)
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


@pytest.mark.parametrize("name", [*OFFLINE, *OTHERS])
def test_a_workflow_reads_from_left_to_right(name: str) -> None:
    """No cable runs backwards, no node lies on another, no title stands twice, and all of it is in view on a laptop."""
    workflow = load(name)
    nodes = {entry["id"]: entry for entry in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and workflow["last_node_id"] == max(nodes)
    for _, source, _, target, _, _ in workflow["links"]:
        assert tuple(nodes[source]["pos"]) < tuple(nodes[target]["pos"]), (nodes[source], nodes[target])
    titles = [entry.get("title", entry["type"]) for entry in nodes.values()]
    assert len(set(titles)) == len(titles)
    boxes = [(x, y - 30, x + w, y + h) for (x, y), (w, h) in ((n["pos"], n["size"]) for n in nodes.values())]
    for i, (left, top, right, low) in enumerate(boxes):
        assert not any(left < b[2] and b[0] < right and top < b[3] and b[1] < low for b in boxes[i + 1 :]), titles[i]
        held = [g for g in workflow["groups"] if (b := g["bounding"])[0] <= left and right <= b[0] + b[2]]
        assert held and held[0]["bounding"][1] <= top and low <= sum(held[0]["bounding"][1::2]), titles[i]
    scale, (x, y) = (workflow["extra"]["ds"][key] for key in ("scale", "offset"))
    groups = [group["bounding"] for group in workflow["groups"]]
    assert groups == sorted(groups)
    # The page's menu and tabs take 80 pixels, its side bar 60.
    assert (min(b[0] for b in groups) + x) * scale >= 60 and (min(b[1] for b in groups) + y) * scale >= 80
    assert (max(b[0] + b[2] for b in groups) + x) * scale <= 1366 and (
        max(b[1] + b[3] for b in groups) + y
    ) * scale <= 720


@pytest.mark.parametrize("name", [*OFFLINE, *OTHERS])
def test_one_prompt_feeds_encoder_and_scorer(comfy: Any, info: dict[str, Any], name: str) -> None:
    prompt = as_prompt(load_known(name, info), info)
    (source,) = (key for key, node in prompt.items() if node["class_type"] == "PrimitiveStringMultiline")
    scorers = [node["inputs"]["prompt"] for node in prompt.values() if node["class_type"] == "TMPO_ScoreImages"]
    encoders = [node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "CLIPTextEncode"]
    assert scorers and all(link == [source, 0] for link in scorers)
    # What is left is the negative prompt.
    assert encoders.count([source, 0]) == 1 and all(text in ("", [source, 0]) for text in encoders)


@pytest.mark.parametrize("name", [*OFFLINE, *OTHERS])
def test_the_form_for_scripts_is_that_of_the_workflow(comfy: Any, info: dict[str, Any], name: str) -> None:
    """If it fails: python -m benchmarks workflows URL"""
    written = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    found = as_prompt(load_known(name, info), info)
    assert found.keys() == written.keys()
    for key, node in found.items():
        assert node["class_type"] == written[key]["class_type"]
        # Newer versions of ComfyUI add widgets to their own nodes.
        inputs, others = node["inputs"], written[key]["inputs"]
        assert {k: inputs[k] for k in inputs if k in others} == {k: others[k] for k in others if k in inputs}


def test_loaders_say_where_their_files_come_from() -> None:
    """The page offers to fetch what is missing."""
    for name in OTHERS:
        for entry in load(name)["nodes"]:
            if entry["type"].endswith(("Loader", "LoaderSimple")):
                files = [value for value in entry["widgets_values"] if value.endswith(".safetensors")]
                models = entry["properties"]["models"]
                assert [model["name"] for model in models] == files
                assert all(model["url"].endswith("/" + model["name"]) and model["directory"] for model in models)


def test_the_blueprint_runs_on_the_demo_model(comfy: Any, info: dict[str, Any]) -> None:
    (path,) = (FOLDER.parent / "subgraphs").glob("*.json")
    try:
        listed = json.loads(comfy.get("/global_subgraphs"))
    except urllib.error.HTTPError as error:
        # ComfyUI 0.3.64 has no list of blueprints.
        assert error.code == 404
    else:
        assert path.stem in {entry["name"] for entry in listed.values()}
    (graph,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    outside = {link["id"]: link for link in graph["links"] if link["origin_id"] == -10}
    given: dict[str, Any] = {
        "model": ["demo", 0],
        "vae": ["demo", 2],
        "latent_image": ["size", 0],
        "prompt": "three green circles",
    }
    given |= {"positive": ["text", 0], "negative": ["text", 0]}
    filled = {
        (str(link["target_id"]), entry["name"]): given[graph["inputs"][outside[entry["link"]]["origin_slot"]]["name"]]
        for node in graph["nodes"] for entry in node["inputs"] if entry["link"] in outside
        for link in [outside[entry["link"]]] if link["target_id"] == node["id"]
    }  # fmt: skip
    for node in graph["nodes"]:
        node["inputs"] = [entry for entry in node["inputs"] if entry["link"] not in outside]
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    inside = [[link[key] for key in keys] for link in graph["links"] if link["origin_id"] != -10]
    prompt = as_prompt({"nodes": graph["nodes"], "links": inside}, info)
    for (node, name), source in filled.items():
        prompt[node]["inputs"][name] = source
    (end,) = (link for link in inside if link[3] == -20 and link[5] == "IMAGE")
    prompt |= {
        "demo": {"class_type": "TMPO_DemoModelLoader", "inputs": {}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["demo", 1], "text": given["prompt"]}},
        "size": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "save": {"class_type": "SaveImage", "inputs": {"images": [str(end[1]), end[2]], "filename_prefix": "chosen"}},
    }
    for node in prompt.values():
        if node["class_type"] == "TMPO_TreeSampler":
            node["inputs"] |= {"steps": 6, "branch_steps": "1, 2", "branching": 2}
        elif node["class_type"] == "TMPO_ScoreImages":
            node["inputs"]["reward"] = "shapes"
    assert comfy.run(prompt)["save"]["images"]
