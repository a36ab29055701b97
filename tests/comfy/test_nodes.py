"""The nodes in a real ComfyUI."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

NODES = {
    "TMPO_DemoModelLoader", "TMPO_TreeSampler", "TMPO_TreeSamplerAdvanced", "TMPO_TreeSamplerSelect", "TMPO_BranchSchedule",
    "TMPO_ScoreImages", "TMPO_CombineScores", "TMPO_BoltzmannWeights", "TMPO_Diversity", "TMPO_SelectBranches",
    "TMPO_TreeView", "TMPO_LoadLora", "TMPO_Compare", "TMPO_Train", "TMPO_TrainingMonitor",
}  # fmt: skip
#: Without `solver`, as in prompts that were saved before the samplers had it.
TREE = {
    "seed": 5, "steps": 10, "cfg": 1.0, "scheduler": "normal", "branch_steps": "1, 4, 5", "branching": 3, "kernel": "cps",
    "eta": 0.7, "max_batch": 0,
}  # fmt: skip
#: The Train node as it is placed in a graph.
TRAINING = {
    "output_dir": "run", "preset": "demo", "layer": "(none)", "model": "(preset)", "transformer": "(model's own)", "reward": "",
    "method": "(preset)", "prompts": "", "eval_prompts": "", "updates": 0, "learning_rate": 0.0, "lora_rank": 0, "seed": 0,
    "init_lora": "(none)", "settings": "",
}  # fmt: skip


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(prompt: str = "two red circles", **changes: Any) -> dict[str, dict[str, Any]]:
    """The demo model and a tree of 27: 4 is the sampler, 5 its pictures."""
    return {
        "1": node("TMPO_DemoModelLoader"),
        "2": node("CLIPTextEncode", clip=["1", 1], text=prompt),
        "3": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "4": node("TMPO_TreeSampler", model=["1", 0], positive=["2", 0], negative=["2", 0], latent_image=["3", 0],
                  **{**TREE, **changes}),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
    }  # fmt: skip


def test_all_nodes_load_and_explain_themselves(comfy: Any) -> None:
    info = json.loads(comfy.get("/object_info"))
    ours = {name for name in info if name.startswith("TMPO_")}
    assert ours >= NODES
    for name in ours:
        assert info[name]["category"] == "TMPO" and info[name]["description"]
        for kind in ("required", "optional"):
            for key, value in info[name]["input"].get(kind, {}).items():
                assert value[1].get("tooltip"), f"{name}.{key} has no tooltip"
        assert all(info[name]["output_tooltips"]), f"{name}: {info[name]['output_tooltips']}"
    lines = [line for line in comfy.log.read_text().splitlines() if "tmpo" in line.lower()]
    assert not [line for line in lines if "fail" in line.lower() or "warning" in line.lower()], lines


def test_a_tree_is_scored_weighed_and_chosen_from(comfy: Any) -> None:
    found = comfy.run({
        **graph(),
        "6": node("TMPO_ScoreImages", images=["5", 0], prompt="two red circles", reward="shapes", model="(hub)"),
        "7": node("TMPO_BoltzmannWeights", scores=["6", 0], tree=["4", 1], beta=2.0),
        "8": node("TMPO_SelectBranches", images=["5", 0], latent=["4", 0], scores=["6", 0], mode="best by score", count=4,
                  min_score=0.0, beta=2.0, seed=0, index=0),
        "9": node("PreviewImage", images=["8", 0]),
        "10": node("TMPO_Diversity", images=["5", 0], latent=["4", 0], model=["1", 0], features="efficientnet-lite0"),
        "11": node("PreviewImage", images=["10", 3]),
        "12": node("PreviewAny", source=["6", 1]),
        "13": node("PreviewAny", source=["7", 2]),
        "14": node("PreviewAny", source=["8", 3]),
        "15": node("PreviewAny", source=["10", 4]),
        "16": node("PreviewImage", images=["5", 0]),
        "17": node("TMPO_CombineScores", first=["6", 0], second=["6", 0], weights="1, 0.5", zscore=True),
        "18": node("PreviewAny", source=["17", 1]),
    })  # fmt: skip
    assert len(found["16"]["images"]) == 27 and len(found["9"]["images"]) == 4
    text = {key: found[key]["text"][0] for key in ("12", "13", "14", "15", "18")}
    assert text["12"].startswith("shapes: mean 0.") and "best 1.0000" in text["12"]
    assert "q spread over" in text["13"] and "of 27 leaves" in text["13"]
    pictures = np.stack([comfy.image(reference) for reference in found["16"]["images"]])
    chosen = [int(word) for word in text["14"].split(",")]
    for reference, index in zip(found["9"]["images"], chosen, strict=True):
        assert (comfy.image(reference) == pictures[index]).all()
    assert "LGMD" in text["15"] and "cosine diversity 0." in text["15"]
    assert text["18"].startswith("combined: mean")


BAD = [
    ({"branch_steps": "1, 4, 12"}, "branch step 12 is beyond the 10 steps"),
    ({"branch_steps": "4, 1"}, "must increase"),
    ({"branch_steps": "a"}, "write numbers"),
    ({"branch_steps": ""}, "must increase"),
    ({"eta": 1.5}, "too large for kernel cps"),
    ({"branch_steps": "1, 2, 3, 4, 5, 6", "branching": 4}, "4096 leaves"),
    ({"branch_steps": "1, 10"}, "branch step 10 is too late"),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_input_is_an_error_of_the_node_and_the_queue_goes_on(
    comfy: Any, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(Exception, match=said):
        comfy.run({**graph(**changes), "16": node("PreviewImage", images=["5", 0])})
    assert comfy.process.poll() is None


def test_the_pack_loads_fast_and_without_the_trainers_packages(comfy: Any) -> None:
    text = comfy.log.read_text()
    (line,) = [line for line in text.splitlines() if line.strip().endswith("custom_nodes/tmpo-trainer")]
    seconds = re.search(r"([\d.]+) seconds", line)
    assert seconds and float(seconds[1]) <= 0.5, line
    for path in ("tmpo_tree.js", "tmpo_text.js", "docs/TMPO_TreeView.md", "docs/TMPO_TreeSampler.md"):
        assert comfy.get(f"/extensions/tmpo-trainer/{path}")


def test_interrupt_and_run_again(comfy: Any) -> None:
    """A run that is cancelled in the middle reports it, and the next run works as usual."""
    long = {**graph(steps=200, branch_steps="1, 60, 61, 62"), "16": node("PreviewImage", images=["5", 0])}
    prompt = comfy.queue(long)
    import time

    time.sleep(1.5)
    comfy.post("/interrupt", {})
    with pytest.raises(Exception, match="interrupted"):
        comfy.wait(prompt)
    pictures = [
        comfy.image(comfy.run({**graph(seed=seed), "16": node("PreviewImage", images=["5", 0])})["16"]["images"][3])
        for seed in (11, 12)
    ]
    again = comfy.run({**graph(seed=11, max_batch=26), "16": node("PreviewImage", images=["5", 0])})["16"]["images"][3]
    assert np.abs(pictures[0].astype(int) - comfy.image(again)).max() <= 1
    assert (pictures[0] != pictures[1]).any()


def lora_file(comfy: Any, name: str, module: str, width: int) -> None:
    from safetensors.torch import save_file

    state = {
        f"transformer.{module}.lora_A.weight": torch.full((2, width), 0.05),
        f"transformer.{module}.lora_B.weight": torch.full((width, 2), 0.5),
    }
    save_file(state, comfy.base / "models" / "loras" / name, {"tmpo.method": "tmpo", "tmpo.rewards": "shapes"})


def test_a_lora_is_compared_with_its_base(comfy: Any) -> None:
    lora_file(comfy, "ours.safetensors", "transformer_blocks.0.attn.to_q", 192)
    both = {
        **graph(),
        "20": node("TMPO_LoadLora", model=["1", 0], lora="ours.safetensors", strength=1.0),
        "21": {**graph()["4"], "inputs": {**graph()["4"]["inputs"], "model": ["20", 0]}},
        "22": node("VAEDecode", samples=["21", 0], vae=["1", 2]),
        "23": node("TMPO_ScoreImages", images=["5", 0], prompt="two red circles", reward="shapes", model="(hub)"),
        "24": node("TMPO_ScoreImages", images=["22", 0], prompt="two red circles", reward="shapes", model="(hub)"),
        "25": node("TMPO_Compare", base=["5", 0], lora=["22", 0], base_scores=["23", 0], lora_scores=["24", 0], pairs=6,
                   diversity=True),
        "26": node("PreviewImage", images=["25", 0]),
    }  # fmt: skip
    found = comfy.run(both)
    assert "shapes" in found["20"]["text"][0] and "rank" in found["20"]["text"][0]
    text = found["25"]["text"][0]
    assert "| shapes | 0." in text and "| cosine diversity | 0." in text and "| Vendi score |" in text
    assert "+0.0000 |\n| Vendi" not in text
    assert comfy.image(found["26"]["images"][0]).shape[1] > 256
    # The same at strength 0 is the base itself.
    both["20"]["inputs"]["strength"] = 0.0
    lines = [line for line in comfy.run(both)["25"]["text"][0].splitlines() if line.startswith("| ")]
    begin = next(i for i, line in enumerate(lines) if line.startswith("| drift |"))
    assert begin == 4 and all(line.endswith("| +0.0000 |") for line in lines[1:begin])
    # Of drift there are no latents here, so six statistics of pictures. Columns: name, base, trained, shift.
    assert len(lines[begin + 1 :]) == 6
    for line in lines[begin + 1 :]:
        assert float(line.split(" | ")[3]) == 0


def test_bad_loras_are_refused(comfy: Any) -> None:
    lora_file(comfy, "other.safetensors", "transformer_blocks.7.attn.to_q", 192)
    (comfy.base / "models" / "loras" / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    cases = {"other.safetensors": "LoRA of another model: 0 of its 1 layers", "cut.safetensors": "cannot be read"}
    for name, said in cases.items():
        loading = {
            "1": node("TMPO_DemoModelLoader"),
            "2": node("TMPO_LoadLora", model=["1", 0], lora=name, strength=1.0),
        }
        with pytest.raises(Exception, match=said):
            comfy.run(loading)
    with pytest.raises(Exception, match=r"none\.safetensors"):
        comfy.run({**loading, "2": node("TMPO_LoadLora", model=["1", 0], lora="none.safetensors", strength=1.0)})


def test_what_does_not_belong_together_is_an_error(comfy: Any) -> None:
    small = {
        "31": node("EmptyImage", width=64, height=64, batch_size=5, color=0),
        "32": node("TMPO_ScoreImages", images=["31", 0], prompt="two red circles", reward="shapes", model="(hub)"),
    }
    select = node("TMPO_SelectBranches", images=["5", 0], scores=["32", 0], mode="best by score", count=4, min_score=0.0,
                  beta=2.0, seed=0, index=0)  # fmt: skip
    cases: list[tuple[dict[str, Any], str]] = [
        ({"40": select, "41": node("PreviewImage", images=["40", 0])}, "scores has 5 entries for 27 images"),
        ({"40": node("TMPO_BoltzmannWeights", scores=["32", 0], tree=["4", 1], beta=1.0),
          "41": node("PreviewAny", source=["40", 2])}, "scores has 5 entries, but the tree has 27 leaves"),
        ({"40": node("TMPO_Compare", base=["5", 0], lora=["31", 0], pairs=3, diversity=False)}, "base is a batch of 27"),
        ({"40": node("TMPO_TreeView", tree=["4", 1], images=["31", 0], theme="dark", beta=1.0, selected=-1)},
         "images has 5 entries, but the tree has 27 leaves"),
        ({"40": node("TMPO_ScoreImages", images=["5", 0], prompt="a\nb", reward="shapes", model="(hub)"),
          "41": node("PreviewAny", source=["40", 1])}, "a b"),
        ({"40": node("TMPO_ScoreImages", images=["5", 0], prompt="a dog", reward="shapes", model="(hub)"),
          "41": node("PreviewAny", source=["40", 1])}, "a dog"),
        ({"40": node("TMPO_ScoreImages", images=["5", 0], prompt="a", reward="shapes", model="(hub)", metadata="{"),
          "41": node("PreviewAny", source=["40", 1])}, "metadata is not JSON"),
    ]  # fmt: skip
    for more, said in cases:
        with pytest.raises(Exception, match=said):
            comfy.run({**graph(), **small, **more})


def scored(images: list[Any], prompt: str = "two red circles", **more: Any) -> dict[str, Any]:
    return node("TMPO_ScoreImages", images=images, prompt=prompt, reward="shapes", model="(hub)", **more)


def select(images: list[Any], scores: list[Any], **more: Any) -> dict[str, Any]:
    settings = {"mode": "best by score", "count": 4, "min_score": 0.0, "beta": 2.0, "seed": 0, "index": 0, **more}
    return node("TMPO_SelectBranches", images=images, scores=scores, **settings)


def test_scores_of_another_batch_are_an_error(comfy: Any) -> None:
    """Node 55 has as many pictures of another seed, 62 their scores, and 63 the scores of the batch."""
    more = {
        **graph(),
        "44": graph(seed=6)["4"],
        "55": node("VAEDecode", samples=["44", 0], vae=["1", 2]),
        "62": scored(["55", 0]),
        "63": scored(["5", 0]),
    }
    other = "belong to other images: score these, or connect the images that were scored"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"70": select(["5", 0], ["62", 0]), "71": node("PreviewImage", images=["70", 0])}, f"scores {other}"),
        ({"70": node("TMPO_TreeView", tree=["4", 1], images=["5", 0], scores=["62", 0], theme="dark", beta=1.0, selected=-1)},
         f"scores {other}"),
        ({"70": node("TMPO_Compare", base=["5", 0], lora=["55", 0], base_scores=["63", 0], lora_scores=["63", 0], pairs=3,
                     diversity=False)}, f"lora_scores {other}"),
        ({"70": node("TMPO_CombineScores", first=["63", 0], second=["62", 0], weights="", zscore=True),
          "71": node("PreviewAny", source=["70", 1])}, "of different batches"),
        ({"70": node("TMPO_TreeView", tree=["4", 1], images=["55", 0], vae=["1", 2], theme="dark", beta=1.0, selected=-1)},
         "images are not the leaves of this tree: connect both to the same tree sampler, or disconnect vae"),
    ]  # fmt: skip
    for nodes, said in cases:
        with pytest.raises(Exception, match=said):
            comfy.run({**more, **nodes})
    # Without a VAE only the number of a tree's leaves is known.
    nodes = {"70": node("TMPO_TreeView", tree=["4", 1], images=["55", 0], theme="dark", beta=1.0, selected=-1)}
    assert comfy.run({**more, **nodes})["70"]["tmpo_tree"]


def test_scores_stay_with_pictures_that_are_worked_on(comfy: Any) -> None:
    """Upscaled and sharpened after scoring; chosen from, and chosen from again; weighed, and combined."""
    found = comfy.run({
        **graph(),
        "6": scored(["5", 0]),
        "7": node("ImageScale", image=["5", 0], upscale_method="lanczos", width=160, height=160, crop="disabled"),
        "8": node("ImageSharpen", image=["7", 0], sharpen_radius=1, sigma=1.0, alpha=1.0),
        "9": node("TMPO_BoltzmannWeights", scores=["6", 0], tree=["4", 1], beta=2.0),
        "10": select(["8", 0], ["9", 0], count=9),
        "11": select(["10", 0], ["10", 2], mode="most diverse above a score"),
        "12": scored(["8", 0]),
        "13": node("TMPO_CombineScores", first=["6", 0], second=["12", 0], weights="", zscore=True),
        "14": node("TMPO_TreeView", tree=["4", 1], images=["8", 0], scores=["13", 0], vae=["1", 2], theme="dark", beta=1.0,
                   selected=-1),
        "15": node("PreviewImage", images=["11", 0]),
    })  # fmt: skip
    assert len(found["15"]["images"]) == 4 and comfy.image(found["15"]["images"][0]).shape == (160, 160, 3)
    assert found["14"]["tmpo_tree"]
    # Chosen pictures are a batch of their own. Their scores do not fit as many other pictures.
    with pytest.raises(Exception, match="scores belong to other images"):
        comfy.run({
            **graph(),
            "6": scored(["5", 0]),
            "10": select(["5", 0], ["6", 0]),
            "11": node("ImageFromBatch", image=["5", 0], batch_index=23, length=4),
            "12": select(["11", 0], ["10", 2]),
            "13": node("PreviewImage", images=["12", 0]),
        })  # fmt: skip


def whole_clip() -> dict[str, torch.Tensor]:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(projection_dim=16, text_config={**tower, "bos_token_id": 49406, "eos_token_id": 49407},
                        vision_config={**tower, "image_size": 32, "patch_size": 8})  # fmt: skip
    return CLIPModel(config).state_dict()


def test_a_scorer_from_comfyuis_clip_vision(comfy: Any) -> None:
    """A file with both towers scores. A file with only the vision tower, like most files, gives an error that says so."""
    pytest.importorskip("open_clip", reason="the tokenizer is open_clip's")
    from safetensors.torch import save_file

    tensors = whole_clip()
    folder = comfy.base / "models" / "clip_vision"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "whole.safetensors")
    save_file({k: v for k, v in tensors.items() if k.startswith("vis")}, folder / "vision.safetensors")
    info = json.loads(comfy.get("/object_info/TMPO_ScoreImages"))["TMPO_ScoreImages"]["input"]["required"]["model"]
    offered = info[0] if isinstance(info[0], list) else info[1]["options"]
    assert {"clip_vision/whole.safetensors", "clip_vision/vision.safetensors"} <= set(offered)
    scoring = {
        **graph(),
        "6": node("TMPO_ScoreImages", images=["5", 0], prompt="two red circles", reward="pickscore",
                  model="clip_vision/whole.safetensors"),
        "7": node("PreviewAny", source=["6", 1]),
    }  # fmt: skip
    assert comfy.run(scoring)["7"]["text"][0].startswith("pickscore: mean ")
    scoring["6"]["inputs"]["model"] = "clip_vision/vision.safetensors"
    with pytest.raises(Exception, match="holds only the vision tower: give the whole model"):
        comfy.run(scoring)


def test_a_lora_in_float8_with_layers_of_a_text_encoder(comfy: Any) -> None:
    """The pictures of the same numbers in float32, without those layers, which the node names. NaN is refused."""
    from safetensors.torch import load_file, save_file

    folder = comfy.base / "models" / "loras"
    lora_file(comfy, "wide8.safetensors", "transformer_blocks.0.attn.to_q", 192)
    small = {key: value.to(torch.float8_e5m2) for key, value in load_file(folder / "wide8.safetensors").items()}
    save_file({key: value.float() for key, value in small.items()}, folder / "wide32.safetensors")
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    both = {f"{text}.lora_A.weight": torch.ones(2, 8), f"{text}.lora_B.weight": torch.ones(8, 2)}
    save_file(small | {k: v.to(torch.float8_e5m2) for k, v in both.items()}, folder / "wide8.safetensors")
    pictures = []
    for name in (None, "wide8.safetensors", "wide32.safetensors"):
        whole = {**graph(), "16": node("PreviewImage", images=["5", 0])}
        if name:
            whole["20"] = node("TMPO_LoadLora", model=["1", 0], lora=name, strength=1.0)
            whole["4"]["inputs"]["model"] = ["20", 0]
        found = comfy.run(whole)
        pictures.append(comfy.image(found["16"]["images"][3]))
        if name:
            assert ("1 of the modules: tmpo_trainer leaves these out" in found["20"]["text"][0]) == ("8" in name)
    assert (pictures[1] == pictures[2]).all() and (pictures[1] != pictures[0]).any()
    key = next(iter(small))
    save_file(small | {key: torch.full(small[key].shape, torch.nan)}, folder / "nan.safetensors")
    with pytest.raises(Exception, match=r"to_q.* has numbers that are not finite"):
        comfy.run({
            "1": node("TMPO_DemoModelLoader"),
            "2": node("TMPO_LoadLora", model=["1", 0], lora="nan.safetensors", strength=1.0),
        })  # fmt: skip


def test_a_lora_of_other_sizes_is_refused_and_none_is_none(comfy: Any) -> None:
    """The layers have the same names, as those of another size of the same family."""
    lora_file(comfy, "wide.safetensors", "transformer_blocks.0.attn.to_q", 384)
    loading = {
        "1": node("TMPO_DemoModelLoader"),
        "2": node("TMPO_LoadLora", model=["1", 0], lora="wide.safetensors", strength=1.0),
    }
    with pytest.raises(Exception, match="LoRA of another model: 0 of its 1 layers"):
        comfy.run(loading)
    for more in ({"lora": "(none)"}, {"lora": "wide.safetensors", "strength": 0.0}):
        inputs = {"model": ["1", 0], "strength": 1.0, **more}
        assert comfy.run({**loading, "2": node("TMPO_LoadLora", **inputs)})["2"]["text"][0] == "no LoRA"
    for path in ("/etc", "../elsewhere"):
        with pytest.raises(Exception, match="is outside of"):
            comfy.run({**loading, "2": node("TMPO_LoadLora", model=["1", 0], lora="(none)", strength=1.0, path=path)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": "os:system"}, "reward: os:system is not in the list"),
        ({"reward": "remote"}, "reward: remote is not in the list"),
        # Newer versions of ComfyUI find this themselves.
        ({"model": "../../../etc"}, "model: .* (is not in the list|not in)"),
    ],
)
def test_a_workflow_cannot_have_other_scorers_or_files_loaded(comfy: Any, changes: dict[str, str], said: str) -> None:
    """ComfyUI does not check the options of these inputs."""
    scoring = {"images": ["5", 0], "prompt": "two red circles", "reward": "shapes", "model": "(hub)"} | changes
    with pytest.raises(Exception, match=said):
        comfy.run({**graph(), "6": node("TMPO_ScoreImages", **scoring), "7": node("PreviewAny", source=["6", 1])})


def test_combined_scores_can_be_combined(comfy: Any) -> None:
    """The sum of a sum counts once, and a weight belongs to a socket."""
    more = {
        "6": node("TMPO_ScoreImages", images=["5", 0], prompt="two red circles", reward="shapes", model="(hub)"),
        "7": node("TMPO_CombineScores", first=["6", 0], second=["6", 0], weights="1, 2", zscore=False),
        "8": node("TMPO_CombineScores", first=["7", 0], second=["6", 0], weights="1, 10", zscore=False),
        "9": node("PreviewAny", source=["7", 1]),
        "10": node("PreviewAny", source=["8", 1]),
        "11": node("PreviewAny", source=["6", 1]),
    }
    found = comfy.run({**graph(), **more})
    means = [float(found[key]["text"][0].split("mean ")[1].split(",")[0]) for key in ("11", "9", "10")]
    assert means[0] > 0 and means[1:] == pytest.approx([3 * means[0], 13 * means[0]], abs=2e-3)


def test_training_from_a_graph(comfy: Any) -> None:
    """Two updates of the demo model in a process of its own; the LoRA loads, the monitor shows the run."""
    more = "prompts_per_update: 1\nprompts_per_batch: 1\nreport: false\nthreads: 1\nsample_every: 1\nema_every: 1"
    asked = TRAINING | {
        "output_dir": "run one",
        "updates": 2,
        "settings": more,
        "prompts": "a red circle\ntwo blue squares",
    }
    whole = {
        "1": node("TMPO_DemoModelLoader"),
        "2": node("TMPO_Train", **asked),
        "3": node("TMPO_LoadLora", model=["1", 0], lora="(demo)", strength=1.0, path=["2", 0]),
    }
    found = comfy.run(whole)
    assert "by tmpo_trainer" in found["3"]["text"][0] and found["2"]["text"][0] == "no report"
    # Nothing has changed: neither the training nor what follows it runs again.
    assert comfy.executed(whole) == set()
    # A file that another program has written is loaded again; the run is done, so nothing is trained or measured.
    lora = comfy.base / "output" / "run one" / "pytorch_lora_weights.safetensors"
    os.utime(lora, ns=(1, 1))
    assert comfy.executed(whole) == {"2", "3"} and lora.stat().st_mtime_ns == 1 and comfy.executed(whole) == set()
    lora.unlink()
    assert comfy.executed(whole) == {"2", "3"} and lora.exists() and comfy.executed(whole) == set()
    shown = comfy.run({
        "1": node("TMPO_TrainingMonitor", run="run one"),
        "2": node("PreviewImage", images=["1", 0]),
        "3": node("PreviewImage", images=["1", 1]),
    })  # fmt: skip
    assert shown["1"]["text"][0].startswith("update 2 of 2\nshapes: ")
    assert comfy.image(shown["2"]["images"][0]).shape == (440, 840, 3)
    assert comfy.image(shown["3"]["images"][0]).shape[1] > 500
    # A new grid alone, which the trainer writes after the metrics.
    Image.new("RGB", (96, 80), "red").save(comfy.base / "output" / "run one" / "samples" / "update-000003.png")
    shown = comfy.run({"1": node("TMPO_TrainingMonitor", run="run one"), "3": node("PreviewImage", images=["1", 1])})
    assert comfy.image(shown["3"]["images"][0]).shape == (80, 96, 3)
    # Before it was resumed the run had another reward.
    metrics = comfy.base / "output" / "run one" / "metrics.jsonl"
    kept = metrics.read_text()
    metrics.write_text(kept.replace("reward/shapes", "reward/sharpness", 1))
    shown = comfy.run({"1": node("TMPO_TrainingMonitor", run="run one"), "2": node("PreviewImage", images=["1", 0])})
    assert shown["1"]["text"][0].startswith("update 2 of 2\nshapes: ")
    metrics.write_text(kept)
    # A grid that cannot be read leaves the curves; one that is being written is none. A large one is shown smaller.
    samples = metrics.parent / "samples"
    (samples / ".tmp-update-000009.png").write_bytes(b"half")
    Image.new("RGB", (5000, 2500), "red").save(samples / "update-000004.png")
    both = {"1": node("TMPO_TrainingMonitor", run="run one"), "3": node("PreviewImage", images=["1", 1])}
    assert comfy.image(comfy.run(both)["3"]["images"][0]).shape == (2048, 4096, 3)
    (samples / "update-000005.png").write_bytes(b"no picture")
    assert "update-000005.png cannot be read as a picture" in comfy.run(both)["1"]["text"][0]
    (samples / "update-000005.png").unlink()
    config = (comfy.base / "output" / "run one" / "config.yaml").read_text()
    assert "run one/prompts.txt" in config and "report: false" in config
    # A run from elsewhere would be resumed with its own settings: hosts, paths, programs.
    shutil.copytree(comfy.base / "output" / "run one", comfy.base / "output" / "run of somebody")
    for change, said in (
        ({"prompts": "a red circle"}, "holds a run with other settings"),
        ({"output_dir": "run of somebody"}, "was not started by this node"),
        ({"output_dir": ""}, "already holds other files"),
        ({"output_dir": "/tmp/elsewhere"}, "is outside of"),
        ({"output_dir": "run two", "settings": "output_dir: x"}, "settings: output_dir: x is not a line"),
        ({"output_dir": "run two", "settings": "branching: 1"}, "exit code 2: .*branching 1"),
        ({"output_dir": "run two", "reward": "remote"}, "reward: remote is not known"),
        ({"output_dir": "run two", "model": "/etc"}, "model: '?/etc'? (is not in the list|not in)"),
    ):
        with pytest.raises(Exception, match=said):
            comfy.run({"2": node("TMPO_Train", **asked | change)})
    with pytest.raises(Exception, match=r"has no metrics\.jsonl, or an empty one"):
        comfy.run({"1": node("TMPO_TrainingMonitor", run="nowhere")})


def test_features_stop_between_pictures(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management  # type: ignore[import-not-found]

    pictures, seen = torch.rand(40, 8, 8, 3), []

    def extract(images: np.ndarray) -> torch.Tensor:
        seen.append(len(images))
        return torch.from_numpy(images).float().flatten(1)

    monkeypatch.setattr(nodes.diversity, "kept_features", lambda name: extract)
    whole = nodes.diversity.feature_vectors("any", pictures)
    assert seen == [16, 16, 8] and torch.equal(whole, (pictures * 255).round().flatten(1))
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        nodes.diversity.feature_vectors("any", pictures)
    assert len(seen) == 3


@pytest.mark.skipif(os.name == "nt", reason="a shell's trap stands for the run")
def test_cancel_waits_for_the_checkpoint_and_a_second_one_does_not(nodes: Any, tmp_path: Path) -> None:
    """A run looks at the signal after its update, sample grid or evaluation, which may take minutes."""
    import comfy.model_management as management  # type: ignore[import-not-found]

    saves, hangs = tmp_path / "saves", tmp_path / "hangs"
    waits = f"touch {tmp_path}/ready\nfor i in $(seq 600); do sleep 0.1; done\n"
    saves.write_text(f"#!/bin/sh\ntrap 'sleep 2; touch {tmp_path}/saved; exit 130' TERM\n{waits}")
    hangs.write_text(f"#!/bin/sh\ntrap '' TERM\n{waits}")
    for script, cancels in ((saves, 1), (hangs, 2)):
        script.chmod(0o755)
        (tmp_path / "ready").unlink(missing_ok=True)
        sent = []

        def cancel(times: int = cancels, sent: list[float] = sent) -> None:
            while not (tmp_path / "ready").exists():
                time.sleep(0.05)
            for _ in range(times):
                management.interrupt_current_processing()
                sent.append(time.monotonic())
                time.sleep(2)

        Thread(target=cancel, daemon=True).start()
        begun = time.monotonic()
        with pytest.raises(management.InterruptProcessingException):
            nodes.training.run(str(script), [], tmp_path)
        assert time.monotonic() - begun < 30
        assert len(sent) == cancels
    assert (tmp_path / "saved").exists()


def test_a_monitor_whose_run_comes_over_a_link_always_looks(nodes: Any) -> None:
    found = nodes.training.TrainingMonitor.fingerprint_inputs(run=None)
    assert found != found


def test_a_tokenizer_that_open_clip_has_is_not_asked_for(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network its weights, which the command line has downloaded, suffice."""
    import huggingface_hub
    from tmpo_pack.nodes import scoring  # type: ignore[import-not-found]
    from tmpo_pack.tmpo_trainer.rewards.parts import clip  # type: ignore[import-not-found]

    def offline(*arguments: Any, **more: Any) -> None:
        raise OSError("offline")

    kept = lambda repository, name: None if repository == clip.TOKENIZER[0] else "file"  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", kept)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    monkeypatch.setattr(clip, "open_clip_tokenizer", object)
    scoring.check_weights("pickscore", None)
    monkeypatch.setattr(clip, "open_clip_tokenizer", lambda: None)
    with pytest.raises(ValueError, match="cannot be downloaded"):
        scoring.check_weights("pickscore", None)
