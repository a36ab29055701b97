"""The limit of training on the demo model: the base's pictures tilted by the reward, and what LoRAs lose beside it.

The first table has points of the front: mean strict score, share kept of the cosine diversity and of each factor's standard
deviation, KL in nats. The column `in eights` is the cosine diversity kept at the same score if every 8 pictures are tilted by
themselves: how far the estimate depends on the number of pictures. The second table has a row for each LoRA and spread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tmpo_trainer.commands import loading
from tmpo_trainer.demo.split import FOLDER
from tmpo_trainer.evaluation import held_out, limit
from tmpo_trainer.evaluation.held_out import Evaluation
from tmpo_trainer.evaluation.report import limit_section
from tmpo_trainer.evaluation.statistics import markdown_table
from tmpo_trainer.lora.attach import attach
from tmpo_trainer.prompts.lists import read_prompts
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.settings.presets import make_config, preset

#: Pictures in a group of the column `in eights`.
GROUP = 8
POINTS = 9


def in_groups(base: Evaluation) -> limit.Front:
    """The front with every `GROUP` pictures of a prompt as a prompt of their own."""
    assert base.distances is not None
    rewards = limit.target(base)
    firsts = range(0, rewards.shape[1] - GROUP + 1, GROUP)
    parts = [(p, slice(first, first + GROUP)) for p in range(len(rewards)) for first in firsts]
    return limit.Front.of(
        [base.prompts[p] for p, _ in parts],
        [rewards[p, own] for p, own in parts],
        [base.distances[p, own, own] for p, own in parts],
    )


def front_table(base: Evaluation) -> str:
    """The first table."""
    curve, eights = limit.front(base), in_groups(base)
    assert curve is not None
    reward = curve.reward.mean(0)
    levels = np.linspace(reward[0], reward[-1], POINTS)
    columns = {name: np.interp(levels, reward, curve.kept(name)) for name in curve.spread}
    columns["in eights"] = np.interp(levels, eights.reward.mean(0), eights.kept(limit.COSINE), right=np.nan)
    divergence = np.interp(levels, reward, curve.divergence.mean(0))
    rows = [
        [
            f"{level:.3f}",
            *("-" if np.isnan(values[i]) else f"{values[i]:.1%}" for values in columns.values()),
            f"{divergence[i]:.3f}",
        ]
        for i, level in enumerate(levels)
    ]
    return markdown_table(["strict", *columns, "KL"], rows)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks limit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lora", type=Path, nargs="+", default=[], help="runs or LoRA files of the demo model")
    parser.add_argument("--prompts", type=int, default=60, help="of the validation list")
    parser.add_argument("--images", type=int, default=64, help="pictures per prompt")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--solver", choices=("euler", "ab2"), default="euler")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.images < GROUP:
        raise ConfigError(f"--images {args.images}: at least {GROUP}")
    torch.set_num_threads(args.threads)
    given = {
        "eval_images": args.images, "eval_steps": args.steps, "eval_solver": args.solver, "seed": args.seed
    }  # fmt: skip
    config, device = make_config([("demo", preset("demo")), ("flags", given)]), torch.device("cpu")
    prompts = read_prompts(FOLDER / "validation.txt").first(args.prompts)
    backbone = loading.load_model(config, device, prompts.texts)
    protocol = loading.evaluation_protocol(
        config, prompts, loading.scorers(config, device), loading.features(config, device)
    )
    runs: dict[str, list[Evaluation]] = {}
    with tqdm(total=len(prompts.texts) * (1 + len(args.lora)), unit="prompt", dynamic_ncols=True) as bar:
        base = held_out.evaluate(backbone, protocol, show=1, progress=bar.update)
        for path in args.lora:
            attach(backbone, path)
            runs[str(path)] = [held_out.evaluate(backbone, protocol, show=1, progress=bar.update)]
            backbone.pipeline.unload_lora_weights()
    print(f"{len(prompts.texts)} prompts x {args.images} pictures, {protocol.sampling.about}, seed {args.seed}\n")
    print(front_table(base))
    curve = limit.front(base)
    if runs and curve is not None:
        print(f"\n{limit_section(curve, base, runs)[1]}")
    return 0
