"""The demo's build script: tokenizer, latent normalisation, and the whole way in miniature."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from tmpo_trainer.demo import build, domain


def test_every_prompt_is_one_token_a_word_and_fits() -> None:
    tokenizer = build.make_tokenizer()
    for family in domain.FAMILIES:
        for scene in domain.all_scenes(family)[::7]:
            ids = tokenizer(scene.text())["input_ids"]
            assert len(ids) == len(scene.text().split()) + 2 <= build.MAX_TOKENS
    # CLIP pools at the end token, which transformers finds as the highest id.
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    # The same numbers in every process, or a resumed build would go on with other ids.
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    ends = [f"{letter}</w>" for letter in letters]
    assert tokenizer.convert_tokens_to_ids([*letters, *ends]) == list(range(52))
    assert tokenizer.convert_ids_to_tokens([52, 53, 54]) == ["an", "re", "ang"]
    assert len(set(tokenizer("a xylophone")["input_ids"])) > 4


def test_latents_get_the_scale_of_sd3_and_pictures_stay() -> None:
    torch.manual_seed(0)
    vae = build.make_vae().eval()
    # Make one channel carry no signal, as the KL does with those that it switches off.
    with torch.no_grad():
        vae.quant_conv.weight[3] = 1e-3 * vae.quant_conv.weight[3]
        vae.post_quant_conv.weight[:, 3] = 0
        vae.quant_conv.bias[16:] = -12.0
        vae.quant_conv.bias[16 + 3] = 0.0
    rng = np.random.default_rng(0)
    pictures = np.stack([domain.render(domain.sample_scene(rng, "pair"), rng) for _ in range(32)])
    pixels = build.to_tensor(pictures)
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        build.fit_latents_to_sd3(vae, pictures)
        posterior = vae.encode(pixels).latent_dist
        torch.testing.assert_close(vae.decode(posterior.mean).sample, before, atol=1e-3, rtol=0)
        scaled = (posterior.mean - build.SD3_SHIFT) * build.SD3_SCALE
    alive = [c for c in range(16) if c != 3]
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3))[alive], torch.ones(15), atol=1e-3, rtol=0)
    assert scaled[:, 3].abs().max() < 1e-5
    assert posterior.std[:, 3].max() < 1e-5


def test_learning_rate_warms_up_holds_and_ends_at_zero() -> None:
    factors = [build.lr_factor(step, 1000, 100) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[99] == factors[399] == 1.0
    assert factors[999] == pytest.approx(1 / 600)


def test_the_whole_way_in_miniature_and_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build stopped in the middle of the last stage goes on from there."""
    monkeypatch.setattr(build, "MODEL_BATCH", 4)
    monkeypatch.setattr(build, "VAE_BATCH", 2)
    flags = ["--scenes", "24", "--vae-steps", "2", "--model-steps", "4"]
    assert build.main(["--output", str(tmp_path / "a"), "--work", str(tmp_path / "work"), *flags]) == 0
    parts = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "a", dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(["two red circles"], num_inference_steps=2, max_sequence_length=0, output_type="np").images
    assert pictures.shape == (1, 64, 64, 3)

    (tmp_path / "work" / "model-partial.pt").unlink()
    saved = build.save_state

    def stop_half_way(path: Path, state: dict) -> None:
        saved(path, state)
        if path.name == "model-partial.pt" and state["step"] == 2:
            raise KeyboardInterrupt

    stage = build.model_stage
    monkeypatch.setattr(build, "model_stage", lambda *arguments: stage(*arguments, every=2))
    monkeypatch.setattr(build, "save_state", stop_half_way)
    again = ["--output", str(tmp_path / "b"), "--work", str(tmp_path / "work"), *flags]
    with pytest.raises(KeyboardInterrupt):
        build.main(again)
    monkeypatch.setattr(build, "save_state", saved)
    assert build.main(again) == 0
    # Not bitwise: bfloat16 kernels differ by alignment even between two runs in one process.
    state = torch.load(tmp_path / "work" / "model-partial.pt", weights_only=True)
    assert state["step"] == state["ema"]["n_averaged"] == 4
    assert all(value["step"] == 4 for value in state["optimizer"]["state"].values())
    (file,) = (tmp_path / "b" / "transformer").glob("*.safetensors")
    assert all(torch.isfinite(value).all() for value in load_file(file).values())
