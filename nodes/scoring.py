"""Nodes that score a batch, combine scores, and show what training makes of them on a tree."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..tmpo_trainer import objectives, rewards, selection
from ..tmpo_trainer.settings import discovery
from ..tmpo_trainer.settings.errors import ConfigError, one_line
from .images import in_chunks, pixels, thumbs, unlike
from .inputs import notice, one_of, prompt_texts, verdict
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
#: Pictures between two looks at the stop button. The scorers' own batches divide it, so that scores are those of one call.
CHUNK = 32
#: Seconds that the hub has to answer before anything is sampled.
PATIENCE = 5

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
def kept_scorer(name: str, path: str | None, changed: int) -> Any:
    """A scorer, which is kept between runs because loading takes longer than scoring. Its weights wait in the CPU's memory.

    Args:
        changed: when the file was last changed, so that a newer file is loaded again.
    """
    device = comfy.model_management.get_torch_device()
    scorer = rewards.load_scorer(name, device, path)
    return rewards.Parked(scorer, device) if hasattr(scorer, "to") else scorer


def check_weights(reward: str, path: str | None) -> None:
    """Raises ValueError if a reward cannot be loaded: a package is missing, or its weights are neither here nor on the hub.

    It asks the hub once. Downloading retries for half a minute.
    """
    in_node(reward, lambda: rewards.check_reward(reward, path))
    if path is not None:
        return
    import huggingface_hub

    from ..tmpo_trainer.rewards.parts.clip import TOKENIZER, open_clip_tokenizer

    sources = rewards.find(reward).SOURCES
    if TOKENIZER in sources and open_clip_tokenizer() is not None:
        # Its package has the vocabulary, so that the tokenizer is not loaded from the hub.
        sources = tuple(source for source in sources if source != TOKENIZER)
    for repository, names in sources:
        for name in names:
            if isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str):
                continue
            try:
                huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, name), timeout=PATIENCE)
            # Its own errors, and those of the HTTP library, which depends on its version.
            except Exception as error:
                reason = one_line(str(error).partition("\n")[0], 100)
                raise ValueError(
                    f"reward {reward}: {name} of https://huggingface.co/{repository} is not on this machine and cannot be "
                    f"downloaded ({reason}): put the scorer's files into {weights_folder()} and choose them as `model`"
                ) from None
            return


def weights_folder() -> str:
    return folder_paths.get_folder_paths(FOLDER)[0]


def in_node(reward: str, call: Any) -> Any:
    """Calls a function of the trainer. Its errors name an option of the command line, for which the node has an input."""
    try:
        return call()
    except ConfigError as error:
        text = str(error).replace(
            f"give --reward-models {reward}=PATH", f"put it into {weights_folder()} and choose it as `model`"
        )
        start = f"--reward-models {reward}="
        if text.startswith(start):
            text = f"model {text.removeprefix(start)}".replace("leave it out", f"choose {HUB}")
        raise ValueError(text) from None


def parsed(metadata: str) -> Any:
    """The metadata of all pictures, None for none. Raises ValueError if it is not JSON."""
    if not metadata.strip():
        return None
    try:
        return json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata is not JSON: {error}") from None


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


def check_inputs(prompt: str, reward: str) -> None:
    """What can be known when a graph is queued. Raises ValueError."""
    prompts_of(prompt, 1)
    rewards.check_packages(one_of(reward, REWARDS, "reward"))


def other_prompt(graph: Any, node: str, prompt: str) -> str | None:
    """A notice if all prompts with which the pictures were made differ from the one by which they are scored."""
    made = prompt_texts(graph or {}, node, "images") if graph and node in graph else {}
    words = " ".join(prompt.split())
    lines = {" ".join(line.split()) for line in prompt.splitlines()}
    if not made or any(" ".join(text.split()) in {words, *lines} for text in made.values()):
        return None
    encoder, text = next(iter(made.items()))
    return (
        f"The pictures were made with another prompt than the one that is scored: node {encoder} has "
        f"{one_line(text, 80)!r}, this one {one_line(words, 80)!r}. Connect both to one text node."
    )


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


def scored(scorer: Any, images: Any, prompts: list[str], about: Any) -> Tensor:
    """The scores of a batch."""
    with scorer.on_device() if isinstance(scorer, rewards.Parked) else nullcontext(scorer) as ready:

        def score(rows: slice) -> Tensor:
            part = images[rows]
            return ready.score(part, prompts[rows], None if about is None else [about] * len(part))

        return in_chunks(len(images), CHUNK, score)


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
                # Lazy, so that the other inputs are checked before pictures are sampled.
                io.Image.Input("images", lazy=True, tooltip="A batch of pictures."),
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
                    "tree", optional=True, lazy=True,
                    tooltip="The tree of these images, if it has several prompts: each line of the prompt then belongs to one.",
                ),
            ],
            outputs=[
                ScoresSocket.Output(display_name="scores", tooltip="For Select Branches, Tree View, Compare."),
                io.String.Output(display_name="text", tooltip="Mean, best and worst in words."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prompt, reward) -> bool | str:
        # A value that comes over a link is None here. `check_lazy_status` knows it.
        return verdict(check_inputs, "-" if prompt is None else prompt, REWARDS[0] if reward is None else reward)

    @classmethod
    def check_lazy_status(cls, prompt, reward, model, images=None, metadata="", tree="none") -> list[str]:
        """Checks everything but the pictures, which are sampled only after that."""
        check_inputs(prompt, reward)
        path = model_path(one_of(model, model_files(), "model"))
        about = parsed(metadata)
        check_weights(reward, path)
        check = rewards.find(reward).check
        # With a tree, only it tells whether lines are prompts of their own.
        if check is not None and (tree == "none" or len(prompt.split("\n")) == 1):
            check(prompts_of(prompt, 1)[0], about, path)
        return [name for name, value in (("images", images), ("tree", tree)) if value is None]

    @classmethod
    def execute(cls, images, prompt, reward, model, metadata="", tree=None) -> io.NodeOutput:
        one_of(reward, REWARDS, "reward")
        path = model_path(one_of(model, model_files(), "model"))
        prompts = prompts_of(prompt, len(images), tree)
        about = parsed(metadata)
        device = comfy.model_management.get_torch_device()
        if device.type != "cpu":
            comfy.model_management.free_memory(ROOM, device)
        scorer = in_node(reward, lambda: kept_scorer(reward, path, Path(path).stat().st_mtime_ns if path else 0))
        values = rewards.check_finite(reward, scored(scorer, pixels(images), prompts, about), prompts)
        scores = Scores({reward: values}, prompts, thumbs(images))
        # Called without a graph, as in tests, there is nothing hidden.
        found = None if cls.hidden is None else other_prompt(cls.hidden.prompt, cls.hidden.unique_id, prompt)
        return io.NodeOutput(scores, "\n".join([summary(scores), *([found] if found else [])]), ui=notice(found))


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
        scores = replace(first, values={"combined": total, **named})
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
        found = replace(scores, values=values)
        return io.NodeOutput(found, sum(numbers) / len(numbers), "\n".join(lines))
