"""Seconds by phase, network evaluations and peak memory of an iteration: `python benchmarks/iteration.py [train flags]`.

Takes the flags of `python -m tmpo_trainer`; `--updates` sets the number of measured updates, which follow a
warm-up. For full size without real weights, see benchmarks/random_model.py.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from tmpo_trainer.commands import loading
from tmpo_trainer.commands.flags import configure, parse
from tmpo_trainer.rewards import load_scorer
from tmpo_trainer.training.loop import Trainer


def main() -> int:
    actions, flags = parse(sys.argv[1:])
    flags.setdefault("updates", "8")
    config, preset = configure(actions, flags, None)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = loading.choose_device(config.device)
    prompts = loading.train_prompts(config).texts[: (config.updates + 1) * config.prompts_per_update]
    # All prompts are encoded at once, as in a run, because the text encoders are then freed.
    backbone = loading.load_model(config, device, prompts)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            config, Path(folder), backbone, [load_scorer(name, device) for name in config.reward], prompts
        )
        trainer.update()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        lines = [trainer.update() for _ in range(config.updates)]
    seconds: defaultdict[str, float] = defaultdict(float)
    for line in lines:
        for phase, value in line["seconds"].items():
            seconds[phase] += value / len(lines)
    print(f"preset {preset}, {device}, {torch.get_num_threads()} threads, mean of {len(lines)} updates")
    for phase, value in seconds.items():
        print(f"{phase:10} {value:8.3f} s  {value / seconds['total']:6.1%}")
    for phase in ("rollout", "replay"):
        count = sum(line[f"evaluations/{phase}"] for line in lines) / len(lines)
        print(f"network evaluations per prompt, {phase}: {count:.1f}")
    if device.type == "cuda":
        print(
            f"{torch.cuda.get_device_name(device)}, peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
