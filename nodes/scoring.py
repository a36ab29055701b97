"""Nodes that score a batch, combine scores, and show what training makes of them on a tree."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..tmpo_trainer import objectives, rewards, selection
from ..tmpo_trainer.settings import discovery
from .images import pixels, thumbs, unlike
from .inputs import one_of
from .newer import aliases
from .types import CATEGORY, Scores, ScoresSocket, Tree, TreeSocket

#: The folder for scorers' files, besides the hub's cache: models/tmpo_rewards.
FOLDER = "tmpo_rewards"
#: ComfyUI's own folder, which may hold whole CLIP models.
VISION = "clip_vision"
HUB = "(hub)"
#: The node has no field for the address that `remote` needs.
REWARDS = [name for name in discovery.names("rewards") if name != "remote"]
#: Bytes that the largest scorer needs on a GPU.
ROOM = 4 * 2**30

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def model_files() -> list[str]:
    """The choices of models: the hub, the names of files and folders in FOLDER, and the files of `clip_vision/`."""
    found: set[str] = set()
    for folder in folder_paths.get_folder_paths(FOLDER):
        if Path(folder).is_dir():
            found |= {entry.name for entry in Path(folder).iterdir() if not entry.name.startswith(".")}
    # Only loading a file shows whether it has the text tower as well.
    towers = [f"{VISION}/{name}" for name in folder_paths.get_filename_list(VISION) if name.endswith(".safetensors")]
    return [HUB, *sorted(found), *towers]


def model_path(name: str) -> str | None:
    """The path of a scorer's file or folder, None for the hub's. Raises ValueError if it no longer exists."""
    if name == HUB:
        return None
    for folder in folder_paths.get_folder_paths(FOLDER):
        if (Path(folder) / name).exists():
            return str(Path(folder) / name)
    found = folder_paths.get_full_path(VISION, name.removeprefix(f"{VISION}/"))
    if found is None or not name.startswith(VISION):
        raise ValueError(f"model {name} no longer exists: choose another")
    return found


@lru_cache(maxsize=2)
def _scorer(name: str, path: str | None, changed: int) -> Any:
    """A scorer, which is kept between runs because loading takes longer than scoring. Its weights wait in the CPU's memory.

    Args:
        changed: when the file was last changed, so that a newer file is loaded again.
    """
    device = comfy.model_management.get_torch_device()
    scorer = rewards.load_scorer(name, device, path)
    return rewards.Parked(scorer, device) if hasattr(scorer, "to") else scorer


def prompts_of(text: str, count: int, tree: Tree | None = None) -> list[str]:
    """One prompt per picture. Each line is a prompt if a tree of as many prompts is given. Otherwise all lines are one
    prompt for all pictures, however many there are of either.

    Raises:
        ValueError: the text is empty, or the number of pictures is not the tree's.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("the prompt is empty: write what the pictures should show")
    if tree is not None:
        tree.check(count, "images")
    if tree is None or len(lines) != tree.prompts:
        lines = [" ".join(lines)]
    return [lines[i % len(lines)] for i in range(count)]


def groups(prompts: list[str]) -> list[list[int]]:
    """Indices of the pictures of each prompt."""
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(i)
    return list(found.values())


def tree_groups(tree: Tree | None, prompts: list[str]) -> list[list[int]]:
    """Indices of the pictures of each prompt. With a tree they come from it, because two of its prompts may be equal."""
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
            **aliases("aesthetic score", "rate images", "PickScore", "HPS", "ImageReward", "CLIP score", "OCR", "GenEval"),
            description="Scores how well pictures fit a prompt, with one of the trainer's scorers.",
            inputs=[
                io.Image.Input("images", tooltip="A batch of pictures."),
                io.String.Input(
                    "prompt", multiline=True, default="",
                    tooltip="What all pictures should show; it may have several lines. Only with a tree of several prompts: as "
                    "many lines as it has prompts are one prompt each.",
                ),
                io.Combo.Input(
                    "reward", options=REWARDS, default="pickscore",
                    tooltip="pickscore, hpsv2, imagereward: human preference. clipscore: similarity to the prompt. ocr: the "
                    "text in double quotes. geneval: objects, colours, places. shapes: the same for the demo model. "
                    "shapes-partial: the share of a demo prompt's clauses that hold. sharpness: detail, noise included.",
                ),
                io.Combo.Input(
                    "model", options=model_files(), default=HUB,
                    tooltip=f"A file or folder in models/{FOLDER}, or the hub's weights, which are downloaded once. pickscore "
                    f"and clipscore also take files in models/{VISION} that hold a whole CLIP model.",
                ),
                io.String.Input(
                    "metadata", multiline=True, default="", optional=True,
                    tooltip='JSON: {"target": "text"} for ocr, {"tag": ..., "include": [...]} for geneval.',
                ),
                TreeSocket.Input(
                    "tree", optional=True,
                    tooltip="The tree of these images, if it has several prompts: each line of the prompt then belongs to one.",
                ),
            ],
            outputs=[
                ScoresSocket.Output(display_name="scores", tooltip="For Select Branches, Tree View, Compare."),
                io.String.Output(display_name="text", tooltip="Mean, best and worst in words."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, images, prompt, reward, model, metadata="", tree=None) -> io.NodeOutput:
        one_of(reward, REWARDS, "reward")
        path = model_path(one_of(model, model_files(), "model"))
        prompts = prompts_of(prompt, len(images), tree)
        about = None
        if metadata.strip():
            try:
                about = [json.loads(metadata)] * len(images)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"metadata is not JSON: {error}") from None
        device = comfy.model_management.get_torch_device()
        rewards.check_reward(reward, path)
        if device.type != "cpu":
            comfy.model_management.free_memory(ROOM, device)
        scorer = _scorer(reward, path, Path(path).stat().st_mtime_ns if path else 0)
        values = rewards.check_finite(reward, scorer.score(pixels(images), prompts, about), prompts)
        scores = Scores({reward: values}, prompts, thumbs(images))
        return io.NodeOutput(scores, summary(scores))


class CombineScores(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_CombineScores",
            display_name="Combine Scores",
            category=CATEGORY,
            **aliases("aesthetic score", "sum of scores"),
            description="Computes a weighted sum of scores. As in training, each is first z-scored among the pictures of a "
            "prompt.",
            inputs=[
                ScoresSocket.Input("first", tooltip="Scores of the batch."),
                ScoresSocket.Input("second", optional=True, tooltip="Other scores of the same batch."),
                ScoresSocket.Input("third", optional=True, tooltip="Other scores of the same batch."),
                ScoresSocket.Input("fourth", optional=True, tooltip="Other scores of the same batch."),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="One number per score, e.g. 1, 0.5. If empty, the scores are averaged.",
                ),
                io.Boolean.Input("zscore", default=True, tooltip="If this is off, the raw scores are combined."),
            ],
            outputs=[
                ScoresSocket.Output(display_name="scores", tooltip="The sum, followed by its parts."),
                io.String.Output(display_name="text", tooltip="Mean, best and worst in words."),
            ],
        )

    @classmethod
    def execute(cls, first, weights, zscore, second=None, third=None, fourth=None) -> io.NodeOutput:
        given = [scores for scores in (first, second, third, fourth) if scores is not None]
        for other in given[1:]:
            if other.prompts != first.prompts or unlike(other.seen, first.seen):
                raise ValueError("these scores are of different batches: score the same images with the same prompts")
        # Only the first score of each input counts: the output of another Combine Scores is one score, without its parts.
        values: list[tuple[str, Tensor]] = []
        for scores in given:
            name = next(iter(scores.values))
            taken = [known for known, _ in values]
            values.append((name if name not in taken else f"{name} {len(values) + 1}", scores.first()))
        try:
            factors = [float(word) for word in weights.replace(",", " ").split()]
        except ValueError:
            raise ValueError(f"weights {weights!r}: write numbers, e.g. 1, 0.5") from None
        if factors and len(factors) != len(values):
            raise ValueError(
                f"{len(factors)} weights for {len(values)} scores ({', '.join(name for name, _ in values)})"
            )
        total = torch.zeros(len(first))
        for members in groups(first.prompts):
            parts = {name: raw[members] for name, raw in values}
            total[members] = rewards.combine(parts, factors, "zscore" if zscore else "none")
        named = {f"{name} (part)" if name == "combined" else name: v for name, v in values}
        scores = Scores({"combined": total, **named}, first.prompts, first.seen)
        return io.NodeOutput(scores, summary(scores))


class BoltzmannWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_BoltzmannWeights",
            display_name="Boltzmann Weights",
            category=CATEGORY,
            **aliases("softmax of scores", "leaf weights"),
            description="Shows what training would aim at with this tree: q, the softmax of the scores; p, how likely the "
            "model's own branches are; and the advantage log q - log p of each leaf.",
            inputs=[
                ScoresSocket.Input("scores", tooltip="The scores of the leaves. The first score is used."),
                TreeSocket.Input("tree", optional=True, tooltip="Without a tree there is no p and no advantage."),
                io.Float.Input(
                    "beta", default=1.0, min=0.0, max=20.0, step=0.1,
                    tooltip="Inverse temperature: 0 weights all leaves equally, a large value only the best (training uses "
                    "0.8 to 2).",
                ),
            ],
            outputs=[
                ScoresSocket.Output(display_name="weights", tooltip="q, followed by p and the advantage."),
                io.Float.Output(
                    display_name="effective_leaves",
                    tooltip="exp of the entropy of q, averaged over prompts: 1 if one leaf has all the weight, K if all K are "
                    "equal.",
                ),
                io.String.Output(display_name="text", tooltip="The number of leaves over which q is spread, by prompt."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, scores, beta, tree=None) -> io.NodeOutput:
        if tree is not None:
            tree.check(len(scores), "scores")
        q, p, advantage = (torch.zeros(len(scores)) for _ in range(3))
        numbers, lines = [], []
        members_of = tree_groups(tree, scores.prompts)
        paths = None if tree is None else objectives.path_sum(tree.log_probs, tree.plan.index().leaf_edges)
        for members in members_of:
            own = scores.first()[members]
            weights = selection.boltzmann(own, beta)
            q[members] = weights.float()
            numbers.append(objectives.effective_number(weights.log()))
            if paths is not None:
                p[members] = paths[members].softmax(0)
                target = objectives.zscore(own.double())
                advantage[members] = objectives.softmax_tb_advantage(target, paths[members].double(), beta).float()
            lines.append(f"{scores.prompts[members[0]]}: q spread over {numbers[-1]:.1f} of {len(members)} leaves")
        values = {"q": q}
        if tree is not None:
            values |= {"p": p, "advantage": advantage}
        found = Scores(values, scores.prompts, scores.seen)
        return io.NodeOutput(found, sum(numbers) / len(numbers), "\n".join(lines))
