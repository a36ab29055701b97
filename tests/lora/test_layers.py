"""LoRA files of all kinds have the effect that diffusers gives them, in `evaluate` and as the start of a run."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import Backbone, LoadOptions
from tmpo_trainer.commands import main
from tmpo_trainer.lora import adapter, attach, layers
from tmpo_trainer.settings.errors import ConfigError

State = dict[str, Tensor]
FF, QUERY = "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def backbones(tiny_flux: Callable[[bool], Path], tiny_sd35: Path) -> dict[str, Backbone]:
    options = LoadOptions(torch.float32, torch.device("cpu"), 12)
    return {"flux": load_backbone(str(tiny_flux(True)), options), "sd3": load_backbone(str(tiny_sd35), options)}


@pytest.fixture
def backbone(request: pytest.FixtureRequest, backbones: dict[str, Backbone]) -> Backbone:
    """A backbone with a transformer of its own; FLUX unless a parameter says otherwise."""
    backbone = backbones[getattr(request, "param", "flux")]
    kept = backbone.transformer
    backbone.transformer = backbone.pipeline.transformer = copy.deepcopy(kept)
    request.addfinalizer(
        lambda: (setattr(backbone, "transformer", kept), setattr(backbone.pipeline, "transformer", kept))
    )
    return backbone


def random_lora(backbone: Backbone, ranks: dict[str, int] | None = None) -> State:
    """A LoRA of rank 4 in diffusers' names, and of other ranks for some modules."""
    state: State = {}
    generator = torch.Generator().manual_seed(0)
    for name, (inputs, outputs) in sorted(backbone.target_shapes("paper").items()):
        rank = (ranks or {}).get(name, 4)
        state[f"transformer.{name}.lora_A.weight"] = 0.1 * torch.randn(rank, inputs, generator=generator)
        state[f"transformer.{name}.lora_B.weight"] = 0.1 * torch.randn(outputs, rank, generator=generator)
    return state


def metadata(**changes: Any) -> dict[str, str]:
    about = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q"], **changes}
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in about.items()})}


def with_alphas(state: State) -> State:
    modules = [key.removesuffix(".lora_A.weight") for key in state if ".lora_A." in key]
    return state | {f"{module}.alpha": torch.tensor(2.0 + i) for i, module in enumerate(modules)}


def mixture(state: State) -> State:
    """The names of one of kohya's descendants, with alphas."""
    names = {".lora_A.": ".lora_down.", ".lora_B.": ".lora_up.", ".alpha": ".alpha"}
    renamed = {}
    for key, value in with_alphas(state).items():
        if "single" not in key and ".attn." in key:
            (ending,) = [ending for ending in names if ending in key]
            module, _, rest = key.partition(ending)
            renamed[f"lora_{module.replace('.', '_')}{names[ending]}{rest}"] = value
    return renamed


def xlabs(state: State) -> State:
    generator = torch.Generator().manual_seed(0)
    sizes = {"qkv_lora1": 96, "qkv_lora2": 96, "proj_lora1": 32, "proj_lora2": 32}
    shapes = {
        f"{name}.{half}": shape
        for name, size in sizes.items()
        for half, shape in (("down", (4, 32)), ("up", (size, 4)))
    }
    return {
        f"double_blocks.{block}.processor.{name}.weight": 0.1 * torch.randn(*shape, generator=generator)
        for block in range(2) for name, shape in shapes.items()
    }  # fmt: skip


def text_encoder(state: State) -> State:
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    return state | {f"{module}.lora_A.weight": torch.ones(4, 32), f"{module}.lora_B.weight": torch.ones(32, 4)}


#: {kind: (change of the state, metadata, modules of rank 2)}
KINDS: dict[str, tuple[Callable[[State], State], dict[str, str], tuple[str, ...]]] = {
    "plain": (lambda state: state, {}, ()),
    "mixed ranks": (lambda state: state, {}, (FF,)),
    "alpha": (lambda state: state, metadata(), ()),
    "rslora": (lambda state: state, metadata(use_rslora=True), ()),
    "alpha-pattern": (lambda state: state, metadata(alpha_pattern={QUERY: 16, "net.0.proj": 2, "^no": 1}), ()),
    "rank-pattern": (lambda state: state, metadata(rank_pattern={f"^{FF}": 2}), (FF,)),
    "alpha keys": (with_alphas, {}, ()),
    "mixture": (mixture, {}, ()),
    "xlabs": (xlabs, {}, ()),
    "text-encoder": (text_encoder, {}, ()),
}
FLUX_ALONE = ("alpha keys", "mixture", "xlabs")
CASES = [("flux", kind) for kind in KINDS] + [("sd3", kind) for kind in KINDS if kind not in FLUX_ALONE]


def write(backbone: Backbone, kind: str, file: Path) -> None:
    change, about, low = KINDS[kind]
    save_file(change(random_lora(backbone, dict.fromkeys(low, 2))), file, about)


def changes(transformer: Any) -> State:
    """{module: what its LoRA adds to its weight}, where that is not zero."""
    found = {}
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            (of,) = module.scaling
            with torch.no_grad():
                delta = module.lora_B[of].weight @ module.lora_A[of].weight * module.scaling[of]
            if delta.any():
                found[name] = delta
    return found


@pytest.mark.parametrize(("backbone", "kind"), CASES, indirect=["backbone"], ids=[" ".join(case) for case in CASES])
def test_every_module_has_diffusers_strength(backbone: Backbone, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    write(backbone, kind, file)
    plain = backbone.transformer
    found = {}
    for way in ("diffusers", "evaluate", "init-lora"):
        backbone.transformer = backbone.pipeline.transformer = copy.deepcopy(plain)
        if way == "diffusers":
            backbone.pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        elif way == "evaluate":
            attach.attach(backbone, file)
        else:
            lora = adapter.check_fits(file, backbone, "paper", 6)
            adapter.attach(backbone.transformer, backbone.adapter("paper", 6, 3))
            parameters = {name: p for name, p in backbone.transformer.named_parameters() if p.requires_grad}
            adapter.start(parameters, 0.5, lora)
        found[way] = changes(backbone.transformer)
        if way == "diffusers" and kind == "text-encoder":
            backbone.pipeline.unload_lora_weights()
    assert found["diffusers"]
    for way in ("evaluate", "init-lora"):
        torch.testing.assert_close(found[way], found["diffusers"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_magnitudes_and_biases(backbone: Backbone, kind: str, tmp_path: Path) -> None:
    """diffusers' network output in `evaluate`; `--init-lora` says that a run's LoRA has neither."""
    file = tmp_path / "lora.safetensors"
    state = random_lora(backbone)
    key = {"dora": "lora_magnitude_vector", "bias": "lora_B.bias"}[kind]
    for name, (_, outputs) in backbone.target_shapes("paper").items():
        state[f"transformer.{name}.{key}"] = torch.rand(outputs)
    save_file(state, file, metadata(**{{"dora": "use_dora", "bias": "lora_bias"}[kind]: True}))
    fault = r"DoRA: the magnitudes of .* and \d+ more" if kind == "dora" else r"biases: those of .* and \d+ more"
    with pytest.raises(ConfigError, match=f"{fault} are beyond a run's LoRA"):
        adapter.check_fits(file, backbone, "paper", 4)
    network = backbone.velocity(["a red circle"], 1.0)
    x, outputs, plain = torch.randn(1, *backbone.latent_shape(32, 32)), [], backbone.transformer
    for load in (lambda: None, lambda: backbone.pipeline.load_lora_weights(tmp_path, weight_name=file.name),
                 lambda: attach.attach(backbone, file)):  # fmt: skip
        backbone.transformer = backbone.pipeline.transformer = copy.deepcopy(plain)
        load()
        with torch.no_grad():
            outputs.append(network(x, torch.full((1,), 0.5)))
    torch.testing.assert_close(outputs[2], outputs[1])
    assert (outputs[1] - outputs[0]).abs().max() > 0.01


def test_float8_is_computed_in_float32(backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lora.safetensors"
    state = {key: value.to(torch.float8_e4m3fn) for key, value in random_lora(backbone).items()}
    save_file(state, file)
    attach.attach(backbone, file)
    delta = state[f"transformer.{QUERY}.lora_B.weight"].float() @ state[f"transformer.{QUERY}.lora_A.weight"].float()
    torch.testing.assert_close(changes(backbone.transformer)[QUERY], delta)
    with torch.no_grad():
        out = backbone.velocity(["a red circle"], 1.0)(torch.randn(1, *backbone.latent_shape(32, 32)), torch.ones(1))
    assert torch.isfinite(out).all()
    assert main.main(["inspect", str(file)]) == 0
    assert "float8_e4m3fn" in capsys.readouterr().out


def test_layers_that_a_converter_drops_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """diffusers says it in a warning alone, and ours must not be the only one who reads that."""
    file = tmp_path / "lora.safetensors"
    shapes = {"double_blocks_0_img_attn_proj": 32, "guidance_in_in_layer": 32, "single_stream_modulation_lin": 96}
    save_file({
        f"lora_unet_{name}.{half}.weight": torch.ones(*shape)
        for name, outputs in shapes.items()
        for half, shape in (("lora_down", (4, 32)), ("lora_up", (outputs, 4)))
    }, file)  # fmt: skip
    logger = logging.getLogger("diffusers.loaders.lora_conversion_utils")
    before = (logger.level, logger.propagate, list(logger.handlers), diffusers.utils.logging.get_verbosity())
    read = layers.read(file, diffusers.Flux2Pipeline)
    assert list(read.pairs) == ["transformer_blocks.0.attn.to_out.0"]
    assert read.left_out.endswith(
        ": 1 layers of the transformer are applied; 2 that diffusers does not place (lora_unet_guidance_in_in_layer, "
        "lora_unet_single_stream_modulation_lin) are left out"
    )
    assert before == (logger.level, logger.propagate, logger.handlers, diffusers.utils.logging.get_verbosity())
    assert not caplog.records


def test_what_is_left_out_is_named(backbone: Backbone, tmp_path: Path) -> None:
    write(backbone, "text-encoder", tmp_path / "lora.safetensors")
    said = adapter.check_fits(tmp_path / "lora.safetensors", backbone, "paper", 4).left_out
    assert said.endswith(".safetensors: 30 layers of the transformer are applied; 1 of text encoders are left out")


def kohya(state: State) -> State:
    name = "lora_unet_single_blocks_0_linear1"
    return {f"{name}.lora_down.weight": torch.ones(4, 32), f"{name}.lora_up.weight": torch.ones(224, 4)}


def changed(ending: str, value: Tensor) -> Callable[[State], State]:
    """A change of the state: a tensor of one module, in place of the file's or beside them."""
    return lambda state: {**state, f"transformer.{QUERY}.{ending}": value}


def same(state: State) -> State:
    return state


#: {kind: (change of the state, metadata, what the error says)}
REFUSED: dict[str, tuple[Callable[[State], State], dict[str, str], str]] = {
    "kohya of another size": (kohya, {}, r"_0_linear1 is 224 x 32, but .* for FLUX.1, where it is 21504 x 3072"),
    "nan": (changed("lora_A.weight", torch.full((4, 32), torch.nan)), {}, f"{QUERY}.* not finite"),
    "wide": (changed("lora_A.weight", torch.ones(4, 64)), {}, f"{QUERY} is 32 x 64 and does not fit .* it is 32 x 32"),
    "no prefix": (lambda s: {k[12:]: v for k, v in s.items()}, {}, "finds no layers of a transformer"),
    "dora_scale": (changed("dora_scale", torch.ones(32)), {}, "is a DoRA"),
    "full weight": (changed("diff", torch.ones(32, 32)), {}, f"more than the pairs of a LoRA: {QUERY}.diff"),
    "some alphas": (changed("alpha", torch.tensor(2.0)), {}, "in alpha keys, but not of"),
    "negative alpha": (changed("alpha", torch.tensor(-2.0)), {}, "has the alpha -2"),
    "other rank": (same, metadata(r=8), r"has rank 4, but 8 in its lora_adapter_metadata"),
    "pissa": (same, metadata(init_lora_weights="pissa"), "a base that its training changed"),
    "regular expression": (same, metadata(alpha_pattern={"(a+)+": 2}), "is not the name of a module"),
    "nothing of the transformer": (same, {"lora_adapter_metadata": "{}"}, "it must be a rank"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_without_a_certain_effect_is_refused(backbone: Backbone, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    change, about, said = REFUSED[kind]
    save_file(change(random_lora(backbone)), file, about)
    for refuse in (lambda: attach.check_lora(file, backbone), lambda: adapter.check_fits(file, backbone, "paper", 4)):
        with pytest.raises(ConfigError, match=said) as caught:
            refuse()
        assert str(file) in str(caught.value)


def test_a_rank_that_is_only_nominal_fits(backbone: Backbone, tmp_path: Path) -> None:
    """Rows that add nothing do not count, nor do layers without an effect that the run does not train."""
    state = random_lora(backbone)
    for key in [key for key in state if ".lora_B." in key]:
        state[key][:, :2] = 0
        if ".ff" in key:
            state[key].zero_()
    save_file(state, tmp_path / "lora.safetensors")
    lora = adapter.check_fits(tmp_path / "lora.safetensors", backbone, "attention", 2)
    assert lora.pairs and all(".ff" not in name for name in lora.pairs)
    down, up = lora.pairs[QUERY]
    expected = state[f"transformer.{QUERY}.lora_B.weight"] @ state[f"transformer.{QUERY}.lora_A.weight"]
    torch.testing.assert_close(up @ down, expected)
    assert len(down) == 2


SOUND = ("plain", "alpha keys", "xlabs", "text-encoder")


@pytest.mark.parametrize("kind", [*SOUND, "rslora", "alpha-pattern", "rank-pattern"])
def test_inspect_says_whether_the_strength_is_the_same(
    backbone: Backbone, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = kind in SOUND
    write(backbone, kind, tmp_path / "lora.safetensors")
    assert main.main(["inspect", str(tmp_path / "lora.safetensors")]) == (0 if sound else 1)
    text = capsys.readouterr().out
    wrong = [line for line in text.splitlines() if line.startswith("NO ")]
    assert sound or (
        len(wrong) == 1 and "same strength" in wrong[0] and "by its metadata, which ComfyUI ignores" in text
    )
    assert ("diffusers converts its names for FLUX" in text) == (kind == "xlabs")
    assert ("1 of the modules: tmpo_trainer leaves these out" in text) == (kind == "text-encoder")
