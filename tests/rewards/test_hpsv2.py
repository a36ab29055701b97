"""HPS: a checkpoint in open_clip's names gives open_clip's features, on tiny random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tmpo_trainer.demo.build import make_tokenizer
from tmpo_trainer.rewards import hpsv2
from tmpo_trainer.rewards.parts import openclip
from tmpo_trainer.settings.errors import ConfigError

CPU = torch.device("cpu")
WIDTH, HEAD, VOCABULARY, POSITIONS = 128, 64, 120, 12


class OpenClip(nn.Module):
    """A CLIP in open_clip's names, written from its definition; gelu, causal text, projections as matrices."""

    class Block(nn.Module):
        def __init__(self, width: int, head: int):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, width // head, batch_first=True)
            self.mlp = nn.Sequential()
            self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
            self.mlp.add_module("gelu", nn.GELU())
            self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    class Blocks(nn.Module):
        def __init__(self, width: int, head: int):
            super().__init__()
            self.resblocks = nn.ModuleList(OpenClip.Block(width, head) for _ in range(2))

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            for block in self.resblocks:
                x = block(x, mask)
            return x

    def __init__(self, projection: int = 24, patch: int = 56):
        super().__init__()
        visual: Any = nn.Module()
        visual.class_embedding = nn.Parameter(torch.randn(WIDTH))
        visual.positional_embedding = nn.Parameter(torch.randn((224 // patch) ** 2 + 1, WIDTH))
        visual.conv1 = nn.Conv2d(3, WIDTH, patch, patch, bias=False)
        visual.ln_pre, visual.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        visual.transformer = OpenClip.Blocks(WIDTH, HEAD)
        visual.proj = nn.Parameter(torch.randn(WIDTH, projection))
        self.visual = visual
        self.token_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(POSITIONS, WIDTH))
        self.transformer = OpenClip.Blocks(WIDTH, HEAD)
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, projection))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, pixels: Tensor) -> Tensor:
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        return v.ln_post(v.transformer(v.ln_pre(x))[:, 0]) @ v.proj

    def encode_text(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((POSITIONS, POSITIONS), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection


@pytest.fixture(scope="module")
def open_clip() -> OpenClip:
    torch.manual_seed(1)
    model = OpenClip().eval()
    for parameter in model.parameters():
        # Norms that are more than 1 and 0, and no tie by chance.
        nn.init.normal_(parameter, std=0.1) if parameter.dim() else None
    return model


@torch.no_grad()
def test_hps_key_map_gives_open_clips_features(open_clip: OpenClip, tmp_path: Path) -> None:
    tensors = open_clip.state_dict()
    model = openclip.build_transformers("hpsv2", tmp_path / "hps.pt", tensors, openclip.config_of(tensors)).eval()
    pixels = torch.randn(3, 3, 224, 224)
    torch.testing.assert_close(
        model.get_image_features(pixels).pooler_output, open_clip.encode_image(pixels), atol=1e-5, rtol=1e-5
    )
    # The last token has the highest id, as CLIP's end of text; what follows it does not count.
    tokens = torch.randint(1, VOCABULARY - 2, (3, POSITIONS))
    for row, end in enumerate((4, 7, POSITIONS - 1)):
        tokens[row, end:] = 0
        tokens[row, end] = VOCABULARY - 1
    torch.testing.assert_close(
        model.get_text_features(tokens).pooler_output, open_clip.encode_text(tokens), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("wrapped", [True, False])
def test_hps_checkpoints_of_both_shapes_are_read(open_clip: OpenClip, tmp_path: Path, wrapped: bool) -> None:
    tensors = {**open_clip.half().state_dict(), "attn_mask": torch.zeros(POSITIONS, POSITIONS)}
    open_clip.float()
    file = tmp_path / "hps.pt"
    torch.save({"state_dict": tensors, "epoch": 3} if wrapped else tensors, file)
    make_tokenizer().save_pretrained(tmp_path)
    scorer = hpsv2.load(CPU, str(file))
    assert all(value.dtype == torch.float32 for value in scorer.towers.model.parameters())


def test_a_checkpoints_own_picture_size(open_clip: OpenClip) -> None:
    tensors = {**open_clip.state_dict(), "visual.positional_embedding": torch.zeros(5 * 5 + 1, WIDTH)}
    vision: Any = openclip.config_of(tensors).vision_config
    assert vision.image_size == 5 * 56


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [("  A   Red\nCircle ", "a red circle"), ("Tom &amp;amp; Jerry", "tom & jerry"), ("caf\u00e9", "caf\u00e9")],
)
def test_hps_cleans_prompts_as_open_clip_does(prompt: str, cleaned: str) -> None:
    assert openclip.clean(prompt) == cleaned


def test_a_checkpoint_that_is_none_is_one_line(tmp_path: Path, open_clip: OpenClip) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("pickled code ran",)

    cut = tmp_path / "cut.safetensors"
    save_file({"x": torch.zeros(100)}, cut)
    cut.write_bytes(cut.read_bytes()[:50])
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    less = dict(open_clip.state_dict())
    less.pop("visual.ln_post.bias")
    torch.save(less, tmp_path / "less.pt")
    for name, blame in (
        ("cut.safetensors", "cannot be read"),
        ("evil.pt", "holds more than tensors"),
        ("text.pt", ""),
        ("other.pt", "is not its checkpoint"),
        ("less.pt", "is not its checkpoint (at vision_model.post_layernorm.bias)"),
        ("none.pt", "does not exist"),
    ):
        with pytest.raises(ConfigError) as caught:
            hpsv2.load(CPU, str(tmp_path / name))
        message = str(caught.value)
        assert name in message and blame in message and "\n" not in message
