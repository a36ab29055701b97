"""Runs the sweep that chose TMPO's settings on the demo model.

Trains on the training prompts with one seed that no reported run uses, judges on the validation prompts (60 prompts x 8
images, 28 steps, averaged weights), and prints a row of results per variant.
Variants already in the output folder are not run again. docs/demo-settings.md has the table and what follows from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from tmpo_trainer.demo.split import FOLDER
from tmpo_trainer.settings.errors import ConfigError

SEED = 100
#: Where the sweep starts: what all variants share unless they say otherwise. Preset demo, below it, has other values by now.
START = {
    "method": "tmpo", "updates": "60", "kernel": "cps", "eta": "0.7", "rollout-steps": "10", "kappa": "12",
    "learning-rate": "1e-3",
    "branch-early": "1 5 6", "branch-late": "1 5 6", "branching": "3", "prompts-per-update": "8",
    "prompts-per-batch": "8", "baseline": "siblings", "max-grad-norm": "1", "solver": "euler", "leaf-steps": "1000",
    "kl-weight": "0", "lora-targets": "paper",
}  # fmt: skip
SPREAD = {"kernel": "flow_sde", "branch-early": "1 4 6", "branch-late": "1 4 6", "kappa": "2"}
#: Gradients of late branch steps are several times longer: a low clip gives every update the same weight.
CLIPPED = SPREAD | {"kappa": "4", "max-grad-norm": "3e-4"}
#: Neighbouring middle positions have the best signal (gradient_signal.py); a KL penalty holds the contrast down.
MIDDLE = {
    "kernel": "flow_sde", "eta": "1", "branch-early": "1 4 5", "branch-late": "1 4 5", "kappa": "20",
    "lora-targets": "attention", "kl-weight": "0.3", "updates": "110",
}  # fmt: skip
VARIANTS = {
    "start": {},
    "eta-1": {"eta": "1"},
    "steps-14": {"rollout-steps": "14", "branch-early": "1 7 8", "branch-late": "1 7 8"},
    "flow-sde": {"kernel": "flow_sde", "eta": "1"},
    "flow-sde-early": {"kernel": "flow_sde", "eta": "1", "branch-early": "1 3 5", "branch-late": "1 3 5"},
    "spread": SPREAD,
    "spread-14": SPREAD | {"rollout-steps": "14", "branch-early": "1 5 8", "branch-late": "1 5 8"},
    "spread-400": SPREAD | {"updates": "400"},
    "spread-20-300": SPREAD
    | {"rollout-steps": "20", "branch-early": "1 8 12", "branch-late": "1 8 12", "updates": "300"},
    "clipped-500": CLIPPED | {"updates": "500"},
    "clipped-500-slow": CLIPPED | {"updates": "500", "learning-rate": "5e-4"},
    "middle": MIDDLE,
    "middle-no-kl": MIDDLE | {"kl-weight": "0"},
    "middle-kl-0.6": MIDDLE | {"kl-weight": "0.6"},
    "middle-paper": MIDDLE | {"lora-targets": "paper"},
    "middle-450": MIDDLE | {"updates": "450", "kl-weight": "0.15"},
    "middle-moving": MIDDLE | {"updates": "450", "kl-weight": "0.15", "branch-early": "1 3 4", "branch-late": "1 6 7"},
}
ROWS = ("shapes strict", "LGMD", "cosine diversity", "latent standard deviation")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("variants", nargs="*", default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--output", type=Path, default=Path("outputs/sweep"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        parser.error(f"unknown variant {unknown[0]} (known: {', '.join(VARIANTS)})")
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"| variant | {' | '.join(ROWS)} | rollout reward, first and last 20 | s/update |\n|{'---|' * 7}")
    for name in args.variants:
        folder = args.output / name
        if not (folder / "report.json").exists():
            # A run that was told to stop, or that ended before its report, has saved.
            begun = any(folder.glob("checkpoint-*"))
            if not begun:
                shutil.rmtree(folder, ignore_errors=True)
            settings = START | VARIANTS[name]
            flags = [part for key, value in settings.items() for part in (f"--{key}", *value.split())]
            fixed = {
                "seed": SEED, "eval-prompts": FOLDER / "validation.txt", "output-dir": folder, "threads": args.threads,
                "sample-every": 0, "checkpoint-every": 0, "eval-solver": "euler", "eval-steps": 28,
            }  # fmt: skip
            flags += [part for key, value in fixed.items() for part in (f"--{key}", str(value))]
            flags = ["--resume", str(folder)] if begun else flags
            path = args.output / f"{name}.log"
            with open(path, "a") as log:
                code = subprocess.run([sys.executable, "-m", "tmpo_trainer", *flags], stderr=log).returncode
            if code:
                raise ConfigError(f"variant {name} ended with exit code {code}, see {path}")
        print(row(name, folder), flush=True)
    return 0


def row(name: str, folder: Path) -> str:
    lines = (folder / "report.md").read_text().splitlines()
    cells = [next(line for line in lines if line.startswith(f"| {key} |")).split("|")[2:5] for key in ROWS]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [entry["reward/shapes"] for entry in metrics]
    seconds = [entry["seconds"]["total"] for entry in metrics]
    ends = f"{sum(rewards[:20]) / 20:.3f} {sum(rewards[-20:]) / 20:.3f}"
    figures = [f"{base.strip()} -> {trained.strip()} ({gain.strip()})" for base, trained, gain in cells]
    return f"| {name} | {' | '.join(figures)} | {ends} | {sum(seconds) / len(seconds):.2f} |"
