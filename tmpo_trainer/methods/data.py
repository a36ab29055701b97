"""The anchor on data (DDRL, arXiv:2512.04332): a flow-matching loss on pictures of the pretrained model, beside any method.

It is a KL in the other direction than a method's own: what the pretrained model draws must stay likely. The pictures are drawn
for the prompts of the update, with the rollout's steps, solver and guidance, and regressed at noised levels as in `noised`.
Pictures of the user's with captions can take their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..prompts.lists import prompt_index
from .leaves import NoisedLeaves, mean_square

if TYPE_CHECKING:
    from torch import Tensor

    from .. import tree
    from ..settings.config import TrainConfig
    from .base import Figures, Method
    from .batch import Network, PromptBatch


@dataclass(frozen=True)
class Examples:
    """Pictures with captions, in the place of those that the pretrained model draws.

    latents: `[M, ...latent]`. captions: of each. velocity: the network's, for some captions. prompts: of an update, on all
    processes.
    """

    latents: Tensor
    captions: Sequence[str]
    velocity: Callable[[Sequence[str]], tree.Velocity]
    prompts: int

    def chosen(self, update: int, slots: Sequence[int], each: int, seed: int) -> list[int]:
        """The numbers of `each` examples for every prompt of a batch, row i * P + p: all in turn, shuffled for every pass."""
        count = len(self.captions)
        return [
            prompt_index((update * self.prompts + slot) * each + i, count, seed) for i in range(each) for slot in slots
        ]


def images(config: TrainConfig) -> int:
    """Pictures per prompt and update."""
    return config.data_images if config.data_weight else 0


def evaluations(method: Method) -> dict[str, int]:
    """Network evaluations of one prompt in one update, beside the method's own."""
    config = method.config
    drawn = 0 if config.data_folder else images(config) * config.rollout_steps
    return {"reference": drawn, "replay": images(config) * config.inner_updates}


def backward(method: Method, batch: PromptBatch, network: Network, examples: Examples | None = None) -> Figures:
    """Adds the gradient of the anchor on a batch's prompts, as `Method.backward` does; figures, a value per prompt."""
    import torch

    config, count = method.config, batch.count
    if not config.data_weight:
        return {}
    if examples is None:
        pictures, captions = _drawn(method, batch, network), []
    else:
        chosen = examples.chosen(batch.update, batch.slots, config.data_images, config.seed)
        pictures, captions = examples.latents[chosen].to(batch.rollout.leaves), [examples.captions[i] for i in chosen]
    noised = NoisedLeaves(pictures, batch.slots, (config.seed, batch.update, "data"))
    errors = torch.zeros_like(noised.t)
    with network.phase("replay"):
        for part in noised.parts(network.max_batch):
            own = nullcontext()
            if examples is not None:
                own = network.prompted(examples.velocity(captions[part.rows]))
            with own:
                error = mean_square(network(part.x, part.t).to(part.x) - part.v)
            errors[part.rows] = error.detach()
            network.backward(config.data_weight * error.sum() * batch.share / len(noised.t))
    return {"data_loss": errors.view(-1, count).mean(0).tolist()}


def _drawn(method: Method, batch: PromptBatch, network: Network) -> Tensor:
    """Pictures of the pretrained model for a batch's prompts, row i * P + p, kept until the update ends."""
    import torch

    from .. import tree

    config, count, like = method.config, batch.count, batch.rollout.leaves
    if "data" not in batch.own:
        plan = tree.TreePlan(config.rollout_steps, config.data_images, {}).forest(count)
        sources = [tree.keyed_noise((config.seed, batch.update, slot, "data"), like.shape[1:]) for slot in batch.slots]

        def noise(step: int, path: tree.NodePath) -> torch.Tensor:
            image, p = divmod(path[0], count)
            return sources[p](step, (image,)).to(like)

        with network.phase("reference"), method.weights.pretrained():
            drawn = tree.rollout(network, noise, method.sigmas, plan, solver=config.solver, max_batch=network.max_batch)
        batch.own["data"] = drawn.leaves
    return batch.own["data"]
