"""One leaf of a tree sampled alone, without the rest of the tree."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..tmpo_trainer import tree
from .inputs import workflow_id
from .newer import aliases
from .sampling import (
    DENOISE,
    MOST_STEPS,
    Seeded,
    TreeSamplerAdvanced,
    TreeSamplerNode,
    check_steps,
    new_sampler,
    parse_steps,
    simple_guider,
)
from .tree_sampler import sample_tree
from .types import CATEGORY

#: Inputs of a tree sampler that do not change a leaf.
WHOLE_TREE = ("branching", "max_batch")

PATH_TIP = (
    "The seed, then the child taken at each branch step after step 1, counted from 0, as Tree View shows it. Numbers beyond "
    "the tree's branching give new leaves beside its own."
)


def parse_path(text: str, branch_steps: tuple[int, ...]) -> tuple[int, ...]:
    """`2, 0, 1` -> (2, 0, 1).

    Raises:
        ValueError: no whole numbers from 0, or not one for the seed and one for each branch step after step 1.
    """
    words = text.replace(",", " ").replace("\u2192", " ").split()
    if not words or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise ValueError(f"path {text[:60]!r}: write whole numbers from 0, e.g. 2, 0, 1")
    later = [step for step in branch_steps if step > 1]
    if len(words) != 1 + len(later):
        needed = "the seed" + (f", then the child at each of steps {', '.join(map(str, later))}" if later else "")
        raise ValueError(f"path {text[:60]!r} has {len(words)} numbers, but it needs {1 + len(later)}: {needed}")
    path = tuple(int(word) for word in words)
    if branch_steps[0] > 1 and path[0]:
        raise ValueError(
            f"path {text[:60]!r} begins with seed {path[0]}, but without branch step 1 there is only seed 0"
        )
    return path


def sample_leaf(
    guider: Any,
    noise: Any,
    sigmas: Tensor,
    latent: dict[str, Any],
    path: str,
    last_steps: int,
    branch_steps: str,
    kernel: str,
    eta: float,
    solver: str,
    workflow: str | None,
) -> dict[str, Any]:
    """Runs the path of one leaf, for each latent. Returns a LATENT.

    last_steps: the steps after the last branch point, 0 for as many as the sigmas have. workflow: see `sample_tree`.
    """
    sampler = new_sampler(branch_steps, 1, kernel, eta, 0, solver)
    sampler.path = parse_path(path, sampler.branch_steps)
    sampler.plan(len(sigmas) - 1, 1)
    if last_steps:
        last = max((step for step in sampler.branch_steps if step > 1), default=0)
        if last == len(sigmas) - 1:
            raise ValueError(f"last_steps: no steps follow branch step {last}, so leave it at 0")
        sigmas = tree.shortened_sigmas(sigmas, sampler.plan(last + last_steps, 1))
    return sample_tree(guider, noise, sigmas, latent, sampler, workflow)[0]


def check_path(path: str | None, branch_steps: str | None, steps: int | None = None) -> bool | str:
    """As `check_steps`, and for the path."""
    found = check_steps(branch_steps, steps)
    if found is True and path is not None and branch_steps is not None:
        try:
            parse_path(path, parse_steps(branch_steps))
        except ValueError as error:
            return str(error)
    return found


def _inputs(sampler: type[io.ComfyNode]) -> list[Any]:
    return [
        *(each for each in sampler.define_schema().inputs if each.id not in (*WHOLE_TREE, DENOISE.id)),
        io.String.Input("path", default="0, 0, 0", tooltip=PATH_TIP),
        io.Int.Input(
            "last_steps",
            default=0,
            min=0,
            max=MOST_STEPS,
            tooltip="Denoising steps after the last branch step, for a finer picture of the same leaf. 0 takes as many as "
            "the tree, which gives exactly its leaf.",
        ),
    ]


class Leaf(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_Leaf",
            display_name="Leaf",
            category=CATEGORY,
            **aliases("variation", "re-sample leaf"),
            description="Samples one leaf of a tree again, alone. With the inputs of the tree sampler it is the same picture. "
            "More last steps make it finer.",
            inputs=[*_inputs(TreeSamplerNode), DENOISE],
            outputs=[io.Latent.Output(display_name="leaf", tooltip="The leaf, one for each latent of the batch.")],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, path=None, branch_steps=None, steps=None) -> bool | str:
        return check_path(path, branch_steps, steps)

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed, steps, cfg, scheduler, branch_steps, kernel, eta, path,
        last_steps, solver="euler", denoise=1.0,
    ) -> io.NodeOutput:  # fmt: skip
        guider, sigmas = simple_guider(model, positive, negative, steps, cfg, scheduler, denoise)
        leaf = sample_leaf(
            guider, Seeded(seed), sigmas, latent_image, path, last_steps, branch_steps, kernel, eta, solver,
            workflow_id(cls),
        )  # fmt: skip
        return io.NodeOutput(leaf)


class LeafAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_LeafAdvanced",
            display_name="Leaf (advanced)",
            category=CATEGORY,
            **aliases("variation", "re-sample leaf"),
            description="Samples one leaf of Tree Sampler (advanced) again, alone.",
            inputs=_inputs(TreeSamplerAdvanced),
            outputs=[io.Latent.Output(display_name="leaf", tooltip="The leaf, one for each latent of the batch.")],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, path=None, branch_steps=None) -> bool | str:
        return check_path(path, branch_steps)

    @classmethod
    def execute(
        cls, noise, guider, sigmas, latent_image, branch_steps, kernel, eta, path, last_steps, solver="euler"
    ) -> io.NodeOutput:
        leaf = sample_leaf(
            guider, noise, sigmas, latent_image, path, last_steps, branch_steps, kernel, eta, solver, workflow_id(cls)
        )
        return io.NodeOutput(leaf)
