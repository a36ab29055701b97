"""LoRAs: what `inspect` says of a file, runs that start from one, and how one is attached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tmpo_trainer.backbones import load_backbone
from tmpo_trainer.backbones.base import LoadOptions
from tmpo_trainer.commands import main
from tmpo_trainer.evaluation import held_out
from tmpo_trainer.lora import adapter as lora
from tmpo_trainer.lora import file as lora_file
from tmpo_trainer.lora.export import export_lora
from tmpo_trainer.lora.file import FILE_NAME
from tmpo_trainer.settings.errors import ConfigError
from tmpo_trainer.training import memory
from tmpo_trainer.training.loop import Trainer

ABOUT = {"method": "tmpo", "step": "1", "rewards": "red", "base_model": "local"}
Shake = Callable[[Trainer, float], None]


def picture(trainer: Trainer) -> Tensor:
    how = held_out.Sampling(4, 5, 1.0, (32, 32), batch=4)
    return torch.cat([x.flatten(0, 1) for x, _ in held_out.sample(trainer.backbone, ["a red circle"], 2, how)])


@pytest.fixture
def trained(make_trainer: Callable[..., Trainer], shake: Shake) -> Trainer:
    trainer = make_trainer(lora_rank=4, lora_alpha=8)
    shake(trainer, 0.2)
    return trainer


@pytest.fixture
def file(trained: Trainer, tmp_path: Path) -> Path:
    export_lora(trained.backbone, tmp_path, ABOUT)
    return tmp_path / FILE_NAME


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object], **metadata: str) -> None:
    with safe_open(file, "pt") as opened:
        kept = opened.metadata()
    state = load_file(file)
    change(state)
    save_file(state, file, kept | metadata)


# Starting from one


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 6, "lora_alpha": 3}], ids=["same", "larger"])
def test_a_run_starts_with_the_files_pictures(
    trained: Trainer, file: Path, make_trainer: Callable[..., Trainer], settings: dict[str, int]
) -> None:
    expected = picture(trained)
    fresh = make_trainer(**{"lora_rank": 4, "lora_alpha": 8, **settings, "init_lora": file})
    torch.testing.assert_close(picture(fresh), expected, atol=1e-4, rtol=0)
    with fresh.weights.averaged():
        torch.testing.assert_close(picture(fresh), expected, atol=1e-4, rtol=0)
    with fresh.weights.pretrained():
        assert (picture(fresh) - expected).abs().max() > 1e-2
    fresh.update()
    assert (picture(fresh) - expected).abs().max() > 1e-4


def test_fewer_modules_leave_the_others_at_zero(
    make_trainer: Callable[..., Trainer], shake: Shake, tmp_path: Path
) -> None:
    attention = make_trainer(lora_targets="attention")
    shake(attention, 0.2)
    export_lora(attention.backbone, tmp_path, ABOUT)
    fresh = make_trainer(init_lora=tmp_path)
    torch.testing.assert_close(picture(fresh), picture(attention), atol=1e-4, rtol=0)
    assert len(fresh.weights.lora) > len(attention.weights.lora)


def test_the_strength_in_the_file_counts(trained: Trainer, file: Path, make_trainer: Callable[..., Trainer]) -> None:
    """A file whose alpha / rank is 2, said by alpha keys, holds half of the same lora_B."""

    def halve(state: dict[str, Tensor]) -> None:
        for key in list(state):
            if ".lora_B." in key:
                state[key] = state[key] / 2
                state[key.replace(".lora_B.weight", ".alpha")] = torch.tensor(8.0)

    rewrite(file, halve)
    with pytest.raises(ConfigError, match=r"the strength of .* in alpha keys, also in its metadata"):
        make_trainer(init_lora=file)
    rewrite(file, lambda state: None, lora_adapter_metadata="")
    fresh = make_trainer(init_lora=file)
    torch.testing.assert_close(picture(fresh), picture(trained), atol=1e-4, rtol=0)


def test_a_file_that_does_not_fit_is_refused(
    trained: Trainer, file: Path, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"has rank 4 in .* and 18 more, but the run 2: give --lora-rank 4"):
        make_trainer(lora_rank=2, init_lora=file)
    with pytest.raises(ConfigError, match=r"ff.* are no LoRA targets of this run: give --lora-targets"):
        make_trainer(lora_targets="attention", init_lora=file)
    with pytest.raises(ConfigError, match="does not exist: give a LoRA's safetensors file"):
        make_trainer(init_lora=tmp_path / "missing.safetensors")

    def widen(state: dict[str, Tensor]) -> None:
        key = next(key for key in state if ".lora_A." in key)
        state[key] = torch.cat([state[key], state[key]], 1)

    rewrite(file, widen)
    with pytest.raises(ConfigError, match="give a LoRA of the same model"):
        make_trainer(init_lora=file)


# inspect


def test_inspect_prints_what_it_was_trained_on(
    file: Path, capsys: pytest.CaptureFixture[str], trained: Trainer
) -> None:
    assert main.main(["inspect", str(file)]) == 0
    text = capsys.readouterr().out
    for word in ("tmpo", "red", "local", "stable-diffusion-v3-medium/lora", f"{len(trained.weights.lora) // 2}, "):
        assert word in text
    assert "rank            4" in text and "NO" not in text
    # A run's folder does as well.
    assert main.main(["inspect", str(file.parent)]) == 0
    assert capsys.readouterr().out == text


BREAKS: dict[str, tuple[Callable[[dict[str, Tensor]], object], dict[str, str]]] = {
    "every lora_A has its lora_B": (lambda state: state.pop(next(iter(state))), {}),
    "all numbers are finite": (lambda state: next(iter(state.values())).view(-1)[:1].fill_(float("nan")), {}),
    "it differs from zero": (lambda state: [v.zero_() for k, v in state.items() if ".lora_B." in k], {}),
    "alpha is folded in": (
        lambda state: None,
        {"lora_adapter_metadata": '{"transformer.lora_alpha": 8, "transformer.r": 4}'},
    ),
    "module names are those of a transformer's blocks": (
        lambda state: [state.update({k.replace("_blocks.", "_parts."): state.pop(k)}) for k in list(state)],
        {},
    ),
}


@pytest.mark.parametrize("claim", BREAKS)
def test_inspect_finds_each_fault(file: Path, capsys: pytest.CaptureFixture[str], claim: str) -> None:
    change, metadata = BREAKS[claim]
    rewrite(file, change, **metadata)
    assert main.main(["inspect", str(file)]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NO ")]
    assert len(wrong) == 1 and claim in wrong[0]


def test_inspect_of_something_else_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors here")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name, complaint in (
        ("missing.safetensors", "does not exist"),
        ("text.safetensors", "cannot be read as safetensors"),
        ("other.safetensors", "holds no LoRA"),
    ):
        assert main.main(["inspect", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert complaint in error and str(tmp_path / name) in error and error.count("\n") == 1
    assert main.main(["inspect"]) == 2


def test_the_change_of_a_module_is_measured() -> None:
    down, up = torch.randn(3, 7), torch.randn(5, 3)
    assert lora_file.delta_norm(down, up) == pytest.approx((up @ down).norm().item(), rel=1e-5)


def test_metadata_cannot_command_the_terminal_or_add_lines(tmp_path: Path) -> None:
    name = "transformer.blocks.0.\x1b[2Ja"
    state = {f"{name}.lora_A.weight": torch.ones(1, 2), f"{name}.lora_B.weight": torch.ones(2, 1)}
    foreign = {"modelspec.architecture": "flux\nyes  all fine", "tmpo.\x1b]0;x\x07": "\x1b[31m"}
    save_file(state, tmp_path / "lora.safetensors", foreign)
    text, _ = lora_file.describe(lora_file.read(tmp_path / "lora.safetensors"))
    assert text.replace("\n", "").isprintable()
    assert not any(line.startswith("yes  all fine") for line in text.splitlines())


def test_a_name_of_many_dots_is_refused(tmp_path: Path) -> None:
    """Patterns of the metadata are tried at each of them, which took minutes."""
    name = f"transformer.{'a.' * 60}b"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(1, 2), f"{name}.lora_B.weight": torch.ones(2, 1)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(ConfigError, match="too many dots"):
        lora_file.read(tmp_path / "a.safetensors")


def test_the_architecture_is_the_metadatas(tmp_path: Path) -> None:
    name = "transformer.blocks.0.a"
    state = {f"{name}.lora_A.weight": torch.ones(1, 2), f"{name}.lora_B.weight": torch.ones(2, 1)}
    for metadata, told in (({}, "not stated"), ({"modelspec.architecture": "flux-1-dev/lora"}, "flux-1-dev/lora")):
        save_file(state, tmp_path / "lora.safetensors", metadata)
        text, sound = lora_file.describe(lora_file.read(tmp_path / "lora.safetensors"))
        assert f"architecture    {told}\n" in text and sound


# attach


@pytest.mark.parametrize("kind", ["flux", "sd35"])
def test_beside_bfloat16_layers_it_computes_in_bfloat16(
    kind: str, tiny_flux: Callable[[bool], Path], tiny_sd35: Path, tmp_path: Path
) -> None:
    """Nearly the gradient of peft's own float32 path, in float32 weights, and no float32 copies of activations."""
    folder = tiny_flux(True) if kind == "flux" else tiny_sd35
    gradients, peaks, starts = [], [], []
    for ours in (True, False):
        options = LoadOptions(torch.bfloat16, torch.device("cpu"), 12, prompts=["a red circle"], text_cache=tmp_path)
        backbone = load_backbone(str(folder), options)
        config = backbone.adapter("paper", 4, 8)
        torch.manual_seed(0)
        if ours:
            lora.attach(backbone.transformer, config)
        else:
            backbone.transformer.add_adapter(config)
            cast_training_params(backbone.transformer, dtype=torch.float32)
        parameters = {n: p for n, p in backbone.transformer.named_parameters() if p.requires_grad}
        starts.append({name: value.detach().clone() for name, value in parameters.items()})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in parameters.values():
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        network = backbone.velocity(["a red circle"], 1.0)
        x = torch.randn(6, *backbone.latent_shape(64, 64), generator=generator)

        def work(network: Any = network, x: Tensor = x) -> None:
            network(x, torch.full((6,), 0.5)).float().square().mean().backward()

        peaks.append(memory.peak_bytes(backbone.transformer, work, gradient=True))
        assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in parameters.values())
        gradients.append({name: p.grad for name, p in parameters.items()})
    # peft's random lora_A is kept.
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[1])
    flat = [torch.cat([value.flatten() for value in found.values()]) for found in gradients]
    assert gradients[0].keys() == gradients[1].keys()
    assert torch.cosine_similarity(flat[0], flat[1], dim=0) > 0.999
    assert flat[0].norm().item() == pytest.approx(flat[1].norm().item(), rel=0.02)
    assert peaks[0] < 0.9 * peaks[1]


def test_a_layer_adds_its_lora_without_further_tensors(tiny_flux: Callable[[bool], Path], tmp_path: Path) -> None:
    """In float32 the numbers are peft's to the bit; a layer makes its output and the small product, nothing else."""
    options = LoadOptions(torch.float32, torch.device("cpu"), 12, prompts=["a red circle"], text_cache=tmp_path)
    outputs, peaks = [], []
    for ours in (True, False):
        transformer = load_backbone(str(tiny_flux(True)), options).transformer
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q"], init_lora_weights=False)
        torch.manual_seed(0)
        if ours:
            lora.attach(transformer, config)
        else:
            transformer.add_adapter(config)
        layer = next(part for part in transformer.modules() if isinstance(part, LoraLayer))
        x = torch.randn(3, 50, 32, requires_grad=True)
        with_lora = layer(x)
        (gradient,) = torch.autograd.grad(with_lora.square().sum(), x)
        peaks.append(memory.peak_bytes(transformer, lambda x=x, layer=layer: layer(x), gradient=False))
        transformer.disable_adapters()
        outputs.append((with_lora, gradient, layer(x)))
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    assert not torch.equal(outputs[0][0], outputs[0][2])
    width, rank = 4 * 150 * 32, 4 * 150 * 4
    # Input, output and the product with lora_A, before and after the scale.
    assert peaks[0] <= 2 * width + 2 * rank < peaks[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["flux-dev", "flux-schnell", "flux2", "qwen", "z-image", "sd3", "sd35"])
def test_gradients_reach_attention_as_contiguous_tensors(
    tiny_flux: Callable[[bool], Path],
    tiny_flux2: Callable[[str], Path],
    tiny_qwen: Path,
    tiny_z_image: Callable[[bool], Path],
    tiny_model: Path,
    tiny_sd35: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    checkpointing: bool,
) -> None:
    """cuDNN's attention takes others for packed ones: wrong gradients on a Hopper GPU, see `ContiguousGradient`."""
    models: dict[str, Callable[[], Path]] = {
        "flux-dev": lambda: tiny_flux(True),
        "flux-schnell": lambda: tiny_flux(False),
        "flux2": lambda: tiny_flux2("base"),
        "qwen": lambda: tiny_qwen,
        "z-image": lambda: tiny_z_image(False),
        "sd3": lambda: tiny_model,
        "sd35": lambda: tiny_sd35,
    }
    model = models[kind]()
    backbone = load_backbone(str(model), LoadOptions(torch.float32, torch.device("cpu"), 8, prompts=["a red circle"]))
    lora.attach(backbone.transformer, backbone.adapter("paper", 2, 2))
    if checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
    plain = torch.nn.functional.scaled_dot_product_attention
    contiguous = []

    def watched(*arguments: Any, **more: Any) -> Tensor:
        found = plain(*arguments, **more)
        if found.requires_grad:
            # [B, heads, S, D], and in memory [B, S, heads, D].
            found.register_hook(lambda gradient: contiguous.append(gradient.transpose(1, 2).is_contiguous()))
        return found

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    x = torch.randn(2, *backbone.latent_shape(32, 32))
    velocity = backbone.velocity(["a red circle"], 1.0)(x, torch.full((2,), 0.5))
    velocity.square().sum().backward()
    assert contiguous and all(contiguous)
