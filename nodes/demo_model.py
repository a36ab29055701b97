"""Loads the bundled demo model into ComfyUI's own classes, so that every demo workflow runs without a download."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.patcher_extension
import comfy.sd
import torch
from comfy_api.latest import io
from safetensors.torch import load_file
from torch import Tensor

from ..tmpo_trainer.demo import previews
from .newer import aliases
from .types import CATEGORY

FOLDER = Path(__file__).parents[1] / "tmpo_trainer" / "demo" / "model"


class DemoTokenizer:
    """Splits prompts of the demo domain into words. It does not parse weights such as (word:1.2)."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None):
        from transformers import CLIPTokenizer

        self.tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer", local_files_only=True)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, Any]:
        tokens = self.tokenizer(text, padding="max_length", truncation=True)["input_ids"]
        return {"demo": [[(token, 1.0, 0) if return_word_ids else (token, 1.0) for token in tokens]]}

    def untokenize(self, token_weight_pair: Any) -> Any:
        return [(pair, self.tokenizer.decode(pair[0])) for pair in token_weight_pair]

    def state_dict(self) -> dict[str, Any]:
        return {}


class DemoTextModel(torch.nn.Module):
    """Both text encoders, joined as in Stable Diffusion 3: the penultimate hidden states, and the pooled vectors."""

    def __init__(self, dtype: Any = None, device: Any = None, model_options: Any = None):
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        super().__init__()
        self.dtypes = {torch.float32}
        self.encoders = torch.nn.ModuleList()
        for name in ("text_encoder", "text_encoder_2"):
            settings = json.loads((FOLDER / name / "config.json").read_text())
            encoder: Any = CLIPTextModelWithProjection(CLIPTextConfig(**settings)).to(torch.float32)
            encoder.load_state_dict({k: v.float() for k, v in load_file(FOLDER / name / "model.safetensors").items()})
            self.encoders.append(encoder.eval())

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[Tensor, Tensor]:
        device = next(self.parameters()).device
        ids = torch.tensor([[pair[0] for pair in row] for row in tokens["demo"]], device=device)
        found = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
        hidden = torch.cat([output.hidden_states[-2] for output in found], -1)
        return hidden.cpu(), torch.cat([output.text_embeds for output in found], -1).cpu()

    def set_clip_options(self, options: Any) -> None:
        pass

    def reset_clip_options(self) -> None:
        pass

    def load_sd(self, sd: Any) -> tuple[list[str], list[str]]:
        return [], []


def load_clip() -> comfy.sd.CLIP:
    target = SimpleNamespace(params={}, clip=DemoTextModel, tokenizer=DemoTokenizer)
    return comfy.sd.CLIP(target, model_options={"dtype": torch.float32})


def load_vae() -> comfy.sd.VAE:
    config = json.loads((FOLDER / "vae" / "config.json").read_text())
    channels = config["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    state = load_file(FOLDER / "vae" / "diffusion_pytorch_model.safetensors")
    vae = comfy.sd.VAE(
        sd={key: value.float() for key, value in state.items()},
        config={"params": {"ddconfig": sizes, "embed_dim": config["latent_channels"]}},
    )
    vae.latent_channels = config["latent_channels"]
    # All of ComfyUI's own VAEs have 32 groups. The weights do not depend on the number.
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = config["norm_num_groups"]
    return vae


class DemoLatents(comfy.latent_formats.SD3):
    """Stable Diffusion 3's scale and shift, with previews of the demo VAE's latents."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_decoder_name = None
        self.decoder, factors, bias = previews.load()
        # ComfyUI's own samplers: newer versions apply a function before the linear map, in older ones the map alone must do.
        if hasattr(comfy.latent_formats.LatentFormat, "latent_rgb_factors_reshape"):
            self.latent_rgb_factors_reshape = self.rough
            self.latent_rgb_factors, self.latent_rgb_factors_bias = torch.eye(3).tolist(), None
        else:
            self.latent_rgb_factors, self.latent_rgb_factors_bias = factors.tolist(), bias.tolist()

    def rough(self, x0: Tensor) -> Tensor:
        """The network's latents `[n, 16, h, w]` -> rough pictures `[n, 3, 4h, 4w]`, about -1..1."""
        return self.decoder(x0.float().cpu())


def load_model() -> Any:
    state = load_file(FOLDER / "transformer" / "diffusion_pytorch_model.safetensors")
    # The loader changes the dictionary that it gets.
    model = comfy.sd.load_diffusion_model_state_dict({key: value.float() for key, value in state.items()})
    assert model is not None
    model.model.latent_format = DemoLatents()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "tmpo_demo", _checked)
    return model


def _checked(sample: Any, noise: Tensor, *given: Any, **more: Any) -> Tensor:
    """ComfyUI's own error for a size that has no position embedding is an AssertionError without a text."""
    most = json.loads((FOLDER / "transformer" / "config.json").read_text())["sample_size"]
    if max(noise.shape[-2:]) > most:
        height, width = (8 * side for side in noise.shape[-2:])
        side = 8 * most
        raise ValueError(
            f"the demo model draws pictures of {side}x{side}, but the latent is for {width}x{height}: set width and height "
            f"of the empty latent to {side}"
        )
    return sample(noise, *given, **more)


class DemoModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TMPO_DemoModelLoader",
            display_name="Demo Model Loader",
            category=CATEGORY,
            **aliases("example model", "test model"),
            description="Loads the bundled tiny model of coloured shapes (64x64), a small Stable Diffusion 3. An example of a "
            "prompt is 'two red circles and a blue square'.",
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The model, for a sampler."),
                io.Clip.Output(tooltip="The text encoders, for the prompts."),
                io.Vae.Output(tooltip="The VAE, which turns latents into pictures."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_model(), load_clip(), load_vae())
