"""On a GPU: what an update takes is what the estimate says, with and without four bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tmpo_trainer import methods, tree
from tmpo_trainer.backbones import load_backbone, load_skeleton
from tmpo_trainer.backbones.base import LoadOptions
from tmpo_trainer.rewards.sharpness import SharpnessScorer
from tmpo_trainer.settings.presets import make_config
from tmpo_trainer.training import memory
from tmpo_trainer.training.loop import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
PROMPT = "a red circle"


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_takes_what_was_estimated(model: Path, tmp_path: Path, quantize: Any, checkpointing: bool) -> None:
    settings = {
        "quantize": quantize, "gradient_checkpointing": checkpointing, "branch_late": (1, 2, 3), "kappa": 1e9,
        "replay_batch": 6, "decode_batch": 4,
    }  # fmt: skip
    config = make_config([("settings", settings)])
    tokens, device = config.max_sequence_length, torch.device("cuda")
    skeleton = load_skeleton(str(model), torch.bfloat16, tokens)
    plan = tree.TreePlan.tmpo(6, (1, 2, 3), 3)
    method = methods.make(config, skeleton.sigmas(config.rollout_steps, *config.resolution))
    phases = memory.estimate(skeleton, model, config, method, [plan], device)
    options = LoadOptions(torch.bfloat16, device, tokens, prompts=[PROMPT], text_cache=tmp_path, nf4=quantize == "nf4")
    backbone = load_backbone(str(model), options)
    trainer = Trainer(config, tmp_path, backbone, [SharpnessScorer()], [PROMPT])
    trainer.update()
    torch.cuda.reset_peak_memory_stats()
    assert trainer.update()["replay_ratio_error"] < 0.05
    during = [parts for title, parts in phases.items() if not title.startswith(("text", "sample"))]
    most = max(sum(parts.values()) for parts in during)
    assert torch.cuda.max_memory_allocated() == pytest.approx(most, rel=0.1)
