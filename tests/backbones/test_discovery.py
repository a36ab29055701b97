"""A backbone is one file: an unknown model, with other conditioning and latents, goes through the command line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tmpo_trainer import backbones
from tmpo_trainer.commands import loading, main
from tmpo_trainer.settings import discovery

#: Prompts of different length with a mask and no pooled vector, latents with an axis of frames, a VAE without scaling.
DUMMY = """
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn.utils.rnn import pad_sequence

from tmpo_trainer import tree
from tmpo_trainer.backbones.base import Backbone, rows_per_prompt


class DummyPipeline(StableDiffusion3Pipeline):
    pass


class DummyBackbone(Backbone):
    family = "Dummy"
    pipeline_class = DummyPipeline
    transformer_class = SD3Transformer2DModel
    optional_parts = ("text_encoder_3", "tokenizer_3")
    lora_targets = dict.fromkeys(("paper", "attention", "text", "all-linear"), ("attn.to_q", "attn.to_v"))

    @property
    def architecture(self):
        return "dummy"

    def check_vae(self, model):
        pass

    @staticmethod
    def encode_prompts(pipeline, prompts, device, max_sequence_length):
        found = []
        for prompt in prompts:
            tokens = pipeline.tokenizer(prompt, return_tensors="pt").to(device)
            states = pipeline.text_encoder(tokens.input_ids).last_hidden_state[0]
            found.append({"states": torch.cat([states, states], 1), "mask": tokens.attention_mask[0].bool()})
        return found

    def blank_conditioning(self, folder):
        width, dtype = self.transformer.config.joint_attention_dim, self.transformer.dtype
        length = self.max_sequence_length
        return {"states": torch.empty(length, width, dtype=dtype), "mask": torch.ones(length, dtype=torch.bool)}

    def latent_shape(self, height, width):
        return 16, 1, height // 8, width // 8

    def sigmas(self, num_steps, height, width):
        return self.shifted_sigmas(num_steps, 0, 1.0)

    def velocity(self, prompts, guidance):
        text = self.encode(prompts)
        assert {name for features in text for name in features} == {"states", "mask"}
        states, mask = (pad_sequence([features[name] for features in text], True) for name in ("states", "mask"))

        def velocity(x, sigma):
            times = rows_per_prompt(len(x), len(prompts))
            return self.transformer(
                hidden_states=x.squeeze(2).to(self.transformer.dtype),
                timestep=1000 * sigma,
                encoder_hidden_states=tree.tile(states * mask[..., None], times),
                pooled_projections=states.new_zeros(len(x), self.transformer.config.pooled_projection_dim),
                return_dict=False,
            )[0].unsqueeze(2)

        return velocity

    def unscale(self, latents):
        return latents.squeeze(2).to(self.vae.dtype)


PIPELINES = {"DummyPipeline": DummyBackbone}
"""
FLAGS = """--model model --prompts good.txt --eval-prompts good.txt --updates 1 --sample-every 1 --eval-images 2 --eval-steps 2
    --rollout-steps 6 --branch-early 1 2 3 --branch-late 1 2 3 --resolution 32 48 --output-dir out --lora-rank 4
    --prompts-per-update 2 --prompts-per-batch 2 --max-sequence-length 8 --text-cache text --no-report
    --learning-rate 1e-2 --ema-every 1"""


@pytest.fixture
def place(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, red_scorer: Any) -> Iterator[Path]:
    """A working directory with a model of an unknown kind, and a folder with its backbone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_scorer", lambda name, *more, **rest: red_scorer)
    shutil.copytree(tiny_model, "model")
    index = json.loads(Path("model/model_index.json").read_text())
    Path("model/model_index.json").write_text(json.dumps({**index, "_class_name": "DummyPipeline"}))
    Path("good.txt").write_text("a red circle\ntwo blue squares\na pink circle and a cyan square\n")
    Path("more").mkdir()
    Path("more/dummy.py").write_text(DUMMY)
    # A file that is not chosen is not imported.
    Path("more/a_broken.py").write_text('raise RuntimeError("imported")')
    monkeypatch.setattr(backbones, "__path__", [*backbones.__path__, str(tmp_path / "more")])
    yield tmp_path
    sys.modules.pop("tmpo_trainer.backbones.dummy", None)


def test_names_are_the_files(place: Path) -> None:
    assert discovery.names("backbones") == ["a-broken", "dummy", "flux", "sd3"]


def test_an_update_of_an_unknown_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(FLAGS.split()) == 0
    (line,) = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert line["replay_ratio_error"] < 1e-4
    assert all(set(load_file(file)) == {"states", "mask"} for file in Path("text").glob("*.safetensors"))
    # Three prompts and the empty one, which the encoders were freed after.
    assert len(list(Path("text").iterdir())) == 4
    assert any(value.any() for name, value in load_file("out/pytorch_lora_weights.safetensors").items() if "_B" in name)
    assert list(Path("out/samples").iterdir())
    capsys.readouterr()
    assert main.main(["inspect", "out"]) == 0
    assert "dummy/lora" in capsys.readouterr().out


def test_a_dry_run_of_an_unknown_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*FLAGS.split(), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for phase in ("text encoding: ", "rollout, ", "decoding, ", "replay, "):
        assert out.count(f"\n  {phase}") == 1
    assert not Path("text").exists()


def test_a_model_that_no_file_declares(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("more/a_broken.py").unlink()
    Path("more/dummy.py").write_text(DUMMY.replace('PIPELINES = {"DummyPipeline"', 'PIPELINES = {"OtherPipeline"'))
    assert main.main(FLAGS.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    kinds = "OtherPipeline, FluxPipeline and StableDiffusion3Pipeline"
    assert line == f"tmpo_trainer: model model is a DummyPipeline: this version trains {kinds} models"
    index = json.loads(Path("model/model_index.json").read_text())
    Path("model/model_index.json").write_text(json.dumps({**index, "_class_name": ["FluxPipeline"]}))
    assert main.main(FLAGS.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("model_index.json has no _class_name: give a diffusers pipeline folder")
