"""One of several processes in test_distributed.py: `torchrun distributed_worker.py MODEL RUN ddp|fsdp FILE
RESUME_OR_- UPDATES METHOD`.

Two updates of one prompt per process, a checkpoint and an export; the first process writes gradients and weights to FILE.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin

from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import LoadOptions
from tmpo_trainer.lora import export
from tmpo_trainer.processes import whole
from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.training.loop import Trainer

PROMPTS = ["a red circle", "two blue squares", "a green triangle", "a pink circle and a cyan square"]
SETTINGS = {
    "branch_late": (1, 2, 3), "kappa": 1e9, "guidance": 1.0, "resolution": (32, 32), "max_sequence_length": 0,
    "lora_rank": 4, "lora_alpha": 8, "updates": 4, "learning_rate": 1e-2, "ema_every": 1, "kl_weight": 0.1,
    "replay_batch": 5,
}  # fmt: skip

GARDO = {"kernel": "flow_sde", "auxiliary": ("green", "blue"), "kl_weight": 30.0}


class RedScorer:
    name = "red"

    def score(self, images, prompts, metadata=None):
        means = torch.from_numpy(images.astype("float32") / 255).mean((1, 2))
        return means[:, 0] - means[:, 2]


class Channel:
    def __init__(self, name, number):
        self.name, self.number = name, number

    def score(self, images, prompts, metadata=None):
        return torch.from_numpy(images[..., self.number].astype("float32") / 255).mean((1, 2))


class Corner:
    name = "corner"

    def __call__(self, images):
        return torch.from_numpy(images[:, :4, :4].astype("float32") / 255).flatten(1)


def run(
    model: str,
    folder: Path,
    accelerator: Accelerator | None,
    prompts: int,
    resume: str,
    updates: int,
    method: str = "tmpo",
) -> dict:
    """Trains and returns the first update's gradients, the weights at the end and the figures of each update."""
    torch.manual_seed(0)
    own = GARDO if method == "gardo" else {}
    settings = {**SETTINGS, **own, "prompts_per_update": prompts, "method": method}
    config = make_config([("settings", settings)])
    backbone = load_backbone(model, LoadOptions(torch.float32, torch.device("cpu"), 0))
    trainer = Trainer(
        config,
        folder,
        backbone,
        [RedScorer()],
        PROMPTS,
        accelerator,
        [Channel(name, i + 1) for i, name in enumerate(config.extra_rewards)],
        Corner(),
    )
    if resume != "-":
        trainer.resume(Path(resume))
    gradients, figures = {}, []
    while trainer.done < updates:
        metrics = trainer.update()
        figures.append({key: value for key, value in metrics.items() if key != "seconds"})
        gradients = gradients or {
            n: whole(p.grad).clone() for n, p in trainer.weights.lora.items() if p.grad is not None
        }
        if trainer.done == 2:
            trainer.save()
    lora = {name: whole(value.detach()).clone() for name, value in trainer.weights.lora.items()}
    with trainer.weights.averaged():
        export.export_lora(backbone, folder, {}, trainer.accelerator.is_main_process)
    return {"gradients": gradients, "lora": lora, "figures": figures}


def main() -> None:
    torch.set_num_threads(1)
    model, folder, kind, file, resume, updates, method = sys.argv[1:]
    plugin = None
    if kind == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    if kind == "fsdp":
        # On a CPU accelerate takes DDP by itself.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    result = run(model, Path(folder), accelerator, 1, resume, int(updates), method)
    if accelerator.is_main_process:
        torch.save(result, file)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
