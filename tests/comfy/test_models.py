"""The tree sampler on FLUX.2, Qwen-Image and Z-Image: tiny random networks of ComfyUI's own classes, against its KSampler.

A model that the installed ComfyUI does not know is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from tmpo_trainer import diversity
from tmpo_trainer.backbones.flux import pack, unpack

pytestmark = pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no checkout of ComfyUI")
STEPS, SEED, TEXT = 6, 5, 24
#: ComfyUI's class and what it derives from the weights; as small as each allows.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen-Image": (
        "QwenImage",
        {"image_model": "qwen_image", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32,
         "axes_dims_rope": (8, 12, 12), "joint_attention_dim": TEXT},
    ),
    "FLUX.2": (
        "Flux2",
        {"image_model": "flux2", "in_channels": 128, "out_channels": 128, "hidden_size": 64, "num_heads": 2,
         "axes_dim": [8, 8, 8, 8], "mlp_ratio": 3.0, "theta": 2000, "depth": 1, "depth_single_blocks": 1,
         "context_in_dim": TEXT, "patch_size": 1, "qkv_bias": False, "ops_bias": False, "guidance_embed": False,
         "vec_in_dim": None, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True},
    ),
    "Z-Image": (
        "ZImage",
        {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": TEXT, "n_layers": 1,
         "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [64, 64, 64],
         "rope_theta": 256.0, "multiple_of": 1, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0,
         "qk_norm": True, "pad_tokens_multiple": 32},
    ),
}  # fmt: skip
#: The shape of a latent of 96x64 pixels inside ComfyUI.
SHAPES = {"Qwen-Image": (16, 1, 12, 8), "FLUX.2": (128, 6, 4), "Z-Image": (16, 12, 8)}


def make(name: str) -> Any:
    """ComfyUI's model of random weights, or a skip."""
    import comfy.model_patcher  # type: ignore[import-not-found]
    import comfy.supported_models  # type: ignore[import-not-found]
    import comfyui_version  # type: ignore[import-not-found]

    kind, settings = CLASSES[name]
    known = vars(comfy.supported_models)
    if kind not in known:
        pytest.skip(f"ComfyUI {comfyui_version.__version__} does not know {name}")
    config = known[kind](dict(settings))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({})
    generator = torch.Generator().manual_seed(0)
    for key, value in model.diffusion_model.named_parameters():
        drawn = torch.randn(value.shape, generator=generator) * (0.1 if value.dim() > 1 else 0.05)
        value.data.copy_(drawn + (1 if "norm" in key and value.dim() == 1 else 0))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@pytest.fixture(scope="module", params=list(CLASSES))
def family(request: pytest.FixtureRequest, nodes: Any) -> tuple[str, Any]:
    """The name of a family, and its model."""
    return request.param, make(request.param)


def conditioning(count: int, seed: int = 0, length: int = 7) -> Any:
    """One row per prompt, of at most two."""
    return [[torch.randn(2, length, TEXT, generator=torch.Generator().manual_seed(seed))[:count], {}]]


def empty(name: str, count: int = 1) -> dict[str, Any]:
    """As the family's own node gives it, e.g. EmptySD3LatentImage: for Qwen-Image without the dimension of frames."""
    return {"samples": torch.zeros(count, SHAPES[name][0], *SHAPES[name][-2:])}


def sample(nodes: Any, family: tuple[str, Any], latent: Any = None, cfg: float = 1.0, **changes: Any) -> Any:
    """The outputs of Tree Sampler."""
    settings = {"branch_steps": "1, 2, 3", "branching": 2, "kernel": "cps", "eta": 0.7, "max_batch": 0} | changes
    name, model = family
    latent = empty(name) if latent is None else latent
    count = len(latent["samples"])
    return nodes.sampling.TreeSamplerNode.execute(
        model, conditioning(count), conditioning(count, 1, 5), latent, SEED, STEPS, cfg, "simple", **settings
    ).result


@pytest.mark.parametrize(("cfg", "denoise"), [(1.0, 1.0), (4.0, 1.0), (1.0, 0.6)])
def test_without_noise_it_is_ksampler(nodes: Any, family: tuple[str, Any], cfg: float, denoise: float) -> None:
    """A batch of two prompts, with the shift of the model; the shape is KSampler's too. Also from pictures."""
    import nodes as stock  # type: ignore[import-not-found]

    name, model = family
    latent = empty(name, 2)
    if denoise < 1:
        generator = torch.Generator().manual_seed(1)
        latent = {"samples": torch.randn(2, *SHAPES[name], generator=generator)}
    (expected,) = stock.common_ksampler(
        model, SEED, STEPS, cfg, "euler", "simple", conditioning(2), conditioning(2, 1, 5), latent, denoise
    )
    out, _ = sample(nodes, family, latent, cfg, branch_steps="2", branching=1, eta=0.0, denoise=denoise)
    assert out["samples"].shape == (2, *SHAPES[name]) and torch.equal(out["samples"], expected["samples"])
    assert (expected["samples"][0] - expected["samples"][1]).abs().max() > 0.1


def test_seeds_and_chunks(nodes: Any, family: tuple[str, Any]) -> None:
    """The leaves differ, in any chunks they are the same, and a latent taken from a batch keeps its tree."""
    name, _ = family
    whole, found = sample(nodes, family, empty(name, 2))
    whole = whole["samples"]
    assert whole.shape == (16, *SHAPES[name]) and found.leaves == 16 and found.prompts == 2
    assert torch.cdist(whole.flatten(1), whole.flatten(1)).add(torch.eye(16) * 9).min() > 1
    chunks = sample(nodes, family, empty(name, 2), max_batch=4)[0]["samples"]
    # Batches of other sizes round differently; other noise would differ by 1 and more.
    torch.testing.assert_close(chunks, whole, atol=1e-4, rtol=0)
    # The first prompt of both batches is the same.
    taken = sample(nodes, family, {**empty(name), "batch_index": [0]})[0]["samples"]
    torch.testing.assert_close(taken, whole[::2], atol=1e-4, rtol=0)


def test_masks_keep_the_rest(nodes: Any, family: tuple[str, Any]) -> None:
    name, _ = family
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, *SHAPES[name], generator=generator)
    mask = torch.zeros(1, *SHAPES[name][-2:])
    mask[..., : SHAPES[name][-1] // 2] = 1
    out, _ = sample(nodes, family, {"samples": given, "noise_mask": mask})
    half = SHAPES[name][-1] // 2
    torch.testing.assert_close(out["samples"][..., half:], given[..., half:].expand(8, *[-1] * given[0].dim()))
    assert out["samples"][..., :half].std(0).mean() > 0.05
    # It stays, as in KSampler: a second pass keeps the rest, too, also of leaves that were chosen.
    assert torch.equal(out["noise_mask"], mask)
    images = torch.zeros(8, 8, 8, 3)
    for masks in (mask, torch.arange(8.0).view(8, 1, 1).expand(8, *mask.shape[1:])):
        chosen = nodes.diversity.SelectBranches.execute(
            images, "by choice", 1, 0.0, 1.0, 0, 0, {**out, "noise_mask": masks}, None, "5, 2"
        ).result[1]
        assert torch.equal(chosen["noise_mask"], masks.expand(8, *mask.shape[1:])[[5, 2]])


def test_a_model_without_flow_matching_is_refused_before_it_is_loaded(
    nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_sampling  # type: ignore[import-not-found]

    model = make("FLUX.2")
    model.add_object_patch("model_sampling", comfy.model_sampling.EPS())
    guider, sigmas = nodes.comfy.samplers.CFGGuider(model), torch.linspace(1, 0, STEPS + 1)
    monkeypatch.setattr(guider, "sample", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="needs a flow-matching model"):
        nodes.sampling.TreeSamplerAdvanced.execute(
            nodes.sampling.Seeded(SEED), guider, sigmas, empty("FLUX.2"), "1", 2, "cps", 0.7, 0
        )


def test_previews_are_those_of_comfyui(nodes: Any, family: tuple[str, Any]) -> None:
    """FLUX.2's latents are 2x2 folded, so its previews have twice the size of the latents."""
    import latent_preview  # type: ignore[import-not-found]

    name, model = family
    _, found = sample(nodes, family, branch_steps="1, 3")
    kind = model.model.latent_format
    (x0,), (picture,) = found.previews.values(), found.colours.values()
    assert x0.shape == (2, *SHAPES[name])
    more = [kind.latent_rgb_factors_reshape] if name == "FLUX.2" else []
    previewer = latent_preview.Latent2RGBPreviewer(kind.latent_rgb_factors, kind.latent_rgb_factors_bias, *more)
    scale = 2 if name == "FLUX.2" else 1
    shown = previewer.decode_latent_to_preview(kind.process_in(x0)[1:])
    assert picture.shape == (2, SHAPES[name][-2] * scale, SHAPES[name][-1] * scale, 3)
    assert shown.size == (picture.shape[2], picture.shape[1])
    shown = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).view(picture.shape[1:])
    assert ((picture[1] * 255).to(torch.uint8).int() - shown.int()).abs().max() <= 1


def test_latents_of_another_model_are_refused(nodes: Any, family: tuple[str, Any]) -> None:
    name, _ = family
    channels, dimensions = SHAPES[name][0], len(SHAPES[name]) + 1
    wrong = [torch.ones(1, 4, 12, 8), torch.ones(1, channels, *[1] * (5 - dimensions), 1, 12, 8)]
    for samples in wrong[: 2 if dimensions == 4 else 1]:
        with pytest.raises(ValueError, match=f"takes {channels} channels in {dimensions} dimensions: encode .* VAE"):
            sample(nodes, family, {"samples": samples})


def test_an_empty_latent_of_another_scale(nodes: Any) -> None:
    """EmptySD3LatentImage gives 8 pixels per latent and FLUX.2 takes 16: the picture keeps its size, as in KSampler."""
    family = "FLUX.2", make("FLUX.2")
    out, _ = sample(nodes, family, {"samples": torch.zeros(1, 16, 12, 8), "downscale_ratio_spacial": 8})
    assert out.keys() == {"samples"} and out["samples"].shape == (8, *SHAPES["FLUX.2"])


def test_qwen_images_pictures_in_the_nodes(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through ComfyUI's VAE, whose pictures have a frame too: views and choice as for any model."""
    from comfy.ldm.wan.vae import WanVAE  # type: ignore[import-not-found]
    from comfy.sd import VAE  # type: ignore[import-not-found]

    import nodes as stock  # type: ignore[import-not-found]

    network = WanVAE(
        dim=96,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
    )
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.ones(value.shape) if "gamma" in key else 0.02 * torch.randn(value.shape, generator=generator)
        for key, value in network.state_dict().items()
    }
    vae = VAE(sd=state)
    family = "Qwen-Image", make("Qwen-Image")
    out, found = sample(nodes, family, {"samples": torch.zeros(1, 16, 4, 2)}, branch_steps="1, 3")
    (images,) = stock.VAEDecode().decode(vae, out)
    assert images.shape == (4, 32, 16, 3)
    monkeypatch.setattr(nodes.tree_view, "save", lambda pictures: [{} for _ in pictures])
    picture, chosen, image, choice = nodes.tree_view.TreeView.execute(found, images, "dark", 1.0, "2", None, vae).result
    assert (chosen, choice) == (2, "2") and torch.equal(image, images[2:3]) and picture.shape[-1] == 3
    with pytest.raises(ValueError, match="not the leaves of this tree"):
        nodes.tree_view.TreeView.execute(found, 1 - images.flip(0), "dark", 1.0, "2", None, vae)
    picked = nodes.diversity.SelectBranches.execute(images, "by index", 1, 0, 2.0, 0, 3, out).result
    assert torch.equal(picked[1]["samples"], out["samples"][3:])
    lgmd = nodes.diversity.DiversityNode.execute("efficientnet-lite0", None, out, family[1]).result[0]
    scaled = family[1].model.latent_format.process_in(out["samples"])
    assert lgmd == pytest.approx(diversity.lgmd(scaled).item(), abs=1e-5)
    table = nodes.lora.Compare.execute(images, images, 2, False, None, None, out, out).result[1]
    assert "latent norm" in table


#: diffusers' classes, and the linear layers that get a LoRA, as patterns of whole names.
DIFFUSERS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "Qwen-Image": (
        QwenImageTransformer2DModel, QwenImagePipeline,
        {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12),
         "joint_attention_dim": TEXT},
        r".*\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|(img|txt)_mlp\.net\.(0\.proj|2))",
    ),
    "FLUX.2": (
        Flux2Transformer2DModel, Flux2KleinPipeline,
        {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32,
         "axes_dims_rope": (8, 8, 8, 8), "joint_attention_dim": TEXT, "guidance_embeds": False},
        r".*\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out|to_qkv_mlp_proj)|ff(_context)?\.linear_(in|out))"
        r"|single_.*\.attn\.to_out",
    ),
    "Z-Image": (
        ZImageTransformer2DModel, ZImagePipeline,
        {"dim": 256, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": TEXT,
         "axes_lens": [64, 64, 64]},
        r".*\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
    ),
}  # fmt: skip
#: What ComfyUI's tables of names for LoRAs lack of FLUX.2.
REST = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}


def give_weights(name: str, weights: dict[str, Tensor], model: Any) -> None:
    """Gives ComfyUI's network the weights of diffusers' network."""
    import comfy.utils as names  # type: ignore[import-not-found]

    config = model.model_config.unet_config
    table: dict[str, Any] = {}
    if name != "Qwen-Image":
        table = {"FLUX.2": names.flux_to_diffusers, "Z-Image": names.z_image_to_diffusers}[name](config)
        table |= {f"{key}.weight": f"{value}.weight" for key, value in REST.items()}
    target, written = model.diffusion_model.state_dict(), 0
    for key, value in weights.items():
        place, part = (table.get(key, key), None) if isinstance(table.get(key, key), str) else table[key]
        if key == "norm_out.linear.weight" and name == "FLUX.2":
            value = torch.cat(value.chunk(2)[::-1])
        where = target[place] if part is None else target[place].narrow(*part)
        where.copy_(value)
        written += value.numel()
    # ComfyUI keeps no other parameters.
    assert written == sum(value.numel() for value in target.values())


def test_a_lora_in_diffusers_form_acts_as_in_diffusers(nodes: Any, family: tuple[str, Any], tmp_path: Path) -> None:
    """With Load TMPO LoRA, in ComfyUI's network on the same weights: every layer of the file is found."""
    name, _ = family
    kind, pipeline, settings, targets = DIFFUSERS[name]
    torch.manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        transformer = kind(**settings).eval()
        if name == "Z-Image":
            # ComfyUI makes it as wide as such a small network.
            transformer.t_embedder = TimestepEmbedder(256, mid_size=256)
        transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        for key, value in transformer.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1)
        pipeline.save_lora_weights(
            tmp_path,
            get_peft_model_state_dict(transformer),
            transformer_lora_adapter_metadata={"r": 4, "lora_alpha": 4},
        )
        x, sigma = torch.randn(1, *SHAPES[name]), torch.full((1,), 0.6)
        context = torch.randn(1, 7, TEXT)
        with_lora = diffusers_output(name, transformer, x, sigma, context)
        transformer.disable_adapters()
        without = diffusers_output(name, transformer, x, sigma, context)
        kept = {
            key.replace(".base_layer", ""): value
            for key, value in transformer.state_dict().items()
            if "lora_" not in key
        }
    model = make(name)
    give_weights(name, kept, model.model)
    more = {"num_tokens": 7} if name == "Z-Image" else {}
    found = model.model.diffusion_model(x, sigma, context, **more)
    torch.testing.assert_close(found, without, atol=1e-4, rtol=1e-3)
    lora = nodes.lora.lora_file.read(tmp_path / "pytorch_lora_weights.safetensors")
    patched = nodes.lora.apply_lora(model, lora, 1.0)
    patched.patch_model()
    found = patched.model.diffusion_model(x, sigma, context, **more)
    torch.testing.assert_close(found, with_lora, atol=1e-4, rtol=1e-3)
    assert (with_lora - without).abs().max() > 0.01
    patched.unpatch_model()

    def packed(module: torch.nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        state[f"{prefix}weight"] = torch.empty(7, device="meta")

    # As layers of GGUF files do.
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_state_dict_post_hook(packed)
    assert nodes.lora.apply_lora(model, lora, 1.0).patches.keys() == patched.patches.keys()


def diffusers_output(name: str, transformer: Any, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
    """The velocity of diffusers' network for a latent in ComfyUI's shape."""
    rows, columns = x.shape[-2:]
    if name == "Z-Image":
        return -torch.stack(transformer([x[0].unsqueeze(1)], 1 - sigma, [context[0]], return_dict=False)[0])[:, :, 0]
    if name == "Qwen-Image":
        out = transformer(
            hidden_states=pack(x[:, :, 0]), timestep=sigma, encoder_hidden_states=context,
            img_shapes=[[(1, rows // 2, columns // 2)]], return_dict=False,
        )[0]  # fmt: skip
        return unpack(out, rows // 2, columns // 2).unsqueeze(2)
    places = torch.cartesian_prod(*(torch.arange(count).float() for count in (1, rows, columns, 1)))
    text = torch.zeros(context.shape[1], 4)
    text[:, 3] = torch.arange(len(text))
    out = transformer(
        hidden_states=x.flatten(2).mT, timestep=sigma, encoder_hidden_states=context, txt_ids=text, img_ids=places,
        return_dict=False,
    )[0]  # fmt: skip
    return out.mT.unflatten(2, (rows, columns))


@pytest.mark.parametrize("name", ["FLUX.2", "Z-Image"])
def test_noise_levels_are_those_of_diffusers(nodes: Any, name: str) -> None:
    """Flux2Scheduler, and the scheduler `simple` with Z-Image's own shift."""
    model, even = make(name), torch.linspace(1, 0.1, 10).numpy()
    if name == "FLUX.2":
        from comfy_extras.nodes_flux import Flux2Scheduler  # type: ignore[import-not-found]

        (found,) = Flux2Scheduler.execute(10, 512, 768).result
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=even, mu=compute_empirical_mu(32 * 48, 10))
    else:
        found = nodes.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 10)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=even)
    torch.testing.assert_close(found, scheduler.sigmas, atol=1e-5, rtol=0)
