"""The anchor on data (DDRL, arXiv:2512.04332): a flow-matching loss on pictures of the pretrained model, beside any method.

It is a KL in the other direction than a method's own: what the pretrained model draws must stay likely. The pictures are drawn
for the prompts of the update, with the rollout's steps, solver and guidance, and regressed at noised levels as in `noised`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .noised import NoisedLeaves, mean_square

if TYPE_CHECKING:
    from ..settings.config import TrainConfig
    from .base import Figures, Method
    from .batch import Network, PromptBatch


def images(config: TrainConfig) -> int:
    """Pictures of the pretrained model per prompt and update."""
    return config.data_images if config.data_weight else 0


def evaluations(method: Method) -> dict[str, int]:
    """Network evaluations of one prompt in one update, beside the method's own."""
    config = method.config
    return {"reference": images(config) * config.rollout_steps, "replay": images(config) * config.inner_updates}


def backward(method: Method, batch: PromptBatch, network: Network) -> Figures:
    """Adds the gradient of the anchor on a batch's prompts, as `Method.backward` does; figures, a value per prompt."""
    import torch

    from .. import tree

    config, count = method.config, batch.count
    if not config.data_weight:
        return {}
    like = batch.rollout.leaves
    if "data" not in batch.own:
        plan = tree.TreePlan(config.rollout_steps, config.data_images, {}).forest(count)
        sources = [tree.keyed_noise((config.seed, batch.update, slot, "data"), like.shape[1:]) for slot in batch.slots]

        def noise(step: int, path: tree.NodePath) -> torch.Tensor:
            image, p = divmod(path[0], count)
            return sources[p](step, (image,)).to(like)

        with network.phase("reference"), method.weights.pretrained():
            drawn = tree.rollout(network, noise, method.sigmas, plan, solver=config.solver, max_batch=network.max_batch)
        batch.own["data"] = drawn.leaves
    noised = NoisedLeaves(batch.own["data"], batch.slots, (config.seed, batch.update, "data"), 1, 1.0)
    errors = torch.zeros_like(noised.t)
    with network.phase("replay"):
        for part in noised.parts(network.max_batch):
            error = mean_square(network(part.x, part.t).to(part.x) - part.v)
            errors[part.rows] = error.detach()
            network.backward(config.data_weight * error.sum() * batch.share / len(noised.t))
    return {"data_loss": errors.view(-1, count).mean(0).tolist()}
