"""Scorers over CLIP and BLIP against their definitions, on tiny random weights."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel

from tmpo_trainer.commands import loading
from tmpo_trainer.demo.build import make_tokenizer
from tmpo_trainer.rewards import Parked, clipscore, hpsv2, imagereward, pickscore
from tmpo_trainer.rewards.parts import clip, openclip
from tmpo_trainer.settings.config import TrainConfig
from tmpo_trainer.settings.errors import ConfigError

CPU = torch.device("cpu")
WIDTH, HEAD, VOCABULARY, POSITIONS = 128, 64, 50, 12
PROMPTS = ["a red circle", "two blue squares", "a red circle", "a green triangle"]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Wide pictures, so that cropping and padding differ."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (4, 40, 60, 3), dtype=np.uint8)


# PickScore and CLIP score


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(
            projection_dim=16,
            text_config={
                **tower,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": tokenizer.model_max_length,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={**tower, "image_size": 32, "patch_size": 8},
        )
    )
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepared(images: np.ndarray, size: int) -> Tensor:
    """Shortest side to `size`, centre crop, CLIP's mean and std: by hand."""
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    found = []
    for image in images:
        height, width = image.shape[:2]
        scale = size / min(height, width)
        # As torchvision and transformers: the longer side is cut, not rounded.
        whole = Image.fromarray(image).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        left, top = (whole.width - size) // 2, (whole.height - size) // 2
        pixels = np.asarray(whole.crop((left, top, left + size, top + size))) / 255
        found.append(((pixels - mean) / std).transpose(2, 0, 1))
    return torch.tensor(np.stack(found), dtype=torch.float32)


@torch.no_grad()
def test_pickscore_is_the_formula(clip_folder: Path, images: np.ndarray) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = make_tokenizer()(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    image = model.visual_projection(model.vision_model(prepared(images, 32)).pooler_output)
    text = model.text_projection(model.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output)
    expected = model.logit_scale.exp() * F.cosine_similarity(image, text)
    scorer = pickscore.load(CPU, str(clip_folder))
    scores = scorer.score(images, PROMPTS)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    assert scores.dtype == torch.float32 and scores.std() > 1e-3
    # One by one, and in small batches, the same.
    alone = torch.cat([scorer.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, scores, atol=1e-5, rtol=1e-5)
    scorer.towers.batch = 3
    torch.testing.assert_close(scorer.score(images, PROMPTS), scores, atol=1e-5, rtol=1e-5)


def test_a_prompt_is_encoded_once(clip_folder: Path, images: np.ndarray) -> None:
    scorer = pickscore.load(CPU, str(clip_folder))
    rows: list[int] = []
    scorer.towers.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs.get("input_ids", args[0] if args else ()))),
        with_kwargs=True,
    )
    for _ in range(2):
        scorer.score(images, PROMPTS)
    assert rows == [3]


# HPS


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


def test_padding_keeps_the_whole_picture() -> None:
    white = Image.new("RGB", (60, 40), "white")
    pixels = clip.pad(24)([white])[0]
    black, full = (-0.48145466 / 0.26862954), (1 - 0.48145466) / 0.26862954
    assert pixels.shape == (3, 24, 24)
    # 60 x 40 becomes 24 x 16, with four black rows above and below.
    assert torch.allclose(pixels[0, :4], torch.tensor(black)) and torch.allclose(pixels[0, 20:], torch.tensor(black))
    assert torch.allclose(pixels[0, 4:20], torch.tensor(full), atol=1e-5)


#: Of a picture (width, height) after preprocessing: mean, standard deviation, and three values of the red channel. The
#: padded ones agree with open_clip's own (test_open_clip.py).
PINNED: dict[str, dict[tuple[int, int], tuple[float, ...]]] = {
    "crop": {
        (224, 224): (0.1625, 1.0751, -0.3908, 0.1785, -1.5003),
        (300, 200): (0.1732, 0.9796, -0.7704, -0.6682, 1.58),
        (90, 401): (0.1733, 1.0063, 0.3391, -1.6755, 1.3902),
    },
    "pad": {
        (224, 224): (0.1625, 1.0751, -0.3908, 0.1785, -1.5003),
        (300, 200): (-0.4538, 1.1487, -0.7266, -1.7923, -1.7923),
        (90, 401): (-1.2657, 0.8784, 0.4413, -1.7923, 1.3902),
    },
}


@pytest.mark.parametrize("kind", PINNED)
@pytest.mark.parametrize("size", [(224, 224), (300, 200), (90, 401)])
def test_preprocessing_is_pinned(kind: str, size: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    picture = np.stack([(7 * x + 3 * y) % 256, (x * y) % 251, (5 * x + 11 * y) % 253], -1).astype(np.uint8)
    pixels = getattr(clip, kind)(224)([Image.fromarray(picture)])[0]
    assert pixels.shape == (3, 224, 224)
    found = [pixels.mean(), pixels.std(), pixels[0, 112, 112], pixels[0, 5, 200], pixels[0, 200, 100]]
    assert [value.item() for value in found] == pytest.approx(PINNED[kind][size], abs=2e-4)


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [("  A   Red\nCircle ", "a red circle"), ("Tom &amp;amp; Jerry", "tom & jerry"), ("caf\u00e9", "caf\u00e9")],
)
def test_hps_cleans_prompts_as_open_clip_does(prompt: str, cleaned: str) -> None:
    assert openclip.clean(prompt) == cleaned


# ImageReward

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**VISION, "vocab_size": 40, "encoder_hidden_size": 32, "max_position_embeddings": 64, "layer_norm_eps": 1e-12}


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + (1 - mask[:, None, None].float()) * -1e9
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def original_forward(w: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor, heads: int) -> Tensor:
    """ImageReward from its definition, over a checkpoint in the original names."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    v = "blip.visual_encoder"
    patch = w[f"{v}.patch_embed.proj.weight"]
    x = F.conv2d(pixels, patch, w[f"{v}.patch_embed.proj.bias"], stride=patch.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{v}.cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{v}.pos_embed"]
    for i in range(2):
        b = f"{v}.blocks.{i}"
        x = x + linear(
            attend(*linear(norm(x, f"{b}.norm1", 1e-6), f"{b}.attn.qkv").chunk(3, -1), heads), f"{b}.attn.proj"
        )
        x = x + linear(F.gelu(linear(norm(x, f"{b}.norm2", 1e-6), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    seen = norm(x, f"{v}.norm", 1e-6)
    t = "blip.text_encoder"
    y = (
        w[f"{t}.embeddings.word_embeddings.weight"][tokens]
        + w[f"{t}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    )
    y = norm(y, f"{t}.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        b = f"{t}.encoder.layer.{i}"
        for kind, source, m in (("attention", None, mask), ("crossattention", seen, None)):
            s = y if source is None else source
            q, k, v = (
                linear(y, f"{b}.{kind}.self.query"),
                linear(s, f"{b}.{kind}.self.key"),
                linear(s, f"{b}.{kind}.self.value"),
            )
            got = attend(q, k, v, heads, m)
            y = norm(linear(got, f"{b}.{kind}.output.dense") + y, f"{b}.{kind}.output.LayerNorm", 1e-12)
        inner = F.gelu(linear(y, f"{b}.intermediate.dense"))
        y = norm(linear(inner, f"{b}.output.dense") + y, f"{b}.output.LayerNorm", 1e-12)
    z = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        z = linear(z, f"mlp.layers.{i}")
    return (z.squeeze(-1) - 0.16717362830052426) / 1.0333394966054072


def original_names(network: imagereward.ImageReward) -> dict[str, Tensor]:
    """A checkpoint as the authors name it, from ours."""
    back = {ours: theirs for theirs, ours in imagereward.VISION.items()}
    found: dict[str, Tensor] = {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    for key, value in network.state_dict().items():
        part, _, name = key.partition(".")
        if part == "vision":
            name = name.replace("post_layernorm", "norm")
            for ours, theirs in back.items():
                name = name.replace(ours, theirs)
        prefix = {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "head": "mlp.layers."}[part]
        found[prefix + name] = value
    return found


@pytest.fixture(scope="module")
def network() -> imagereward.ImageReward:
    torch.manual_seed(2)
    vision = BlipVisionConfig(**VISION, image_size=32, patch_size=8, layer_norm_eps=1e-6, hidden_act="gelu")
    network = imagereward.ImageReward(vision, BlipTextConfig(**TEXT, hidden_act="gelu"))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15)
    return network


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "blue", "squares", "green"]
    file = tmp_path_factory.mktemp("bert") / "vocab.txt"
    file.write_text("\n".join(words))
    return BertTokenizer(vocab=str(file))


@torch.no_grad()
def test_imagereward_is_its_definition(network: imagereward.ImageReward, bert: Any, images: np.ndarray) -> None:
    scorer = imagereward.ImageRewardScorer(network, bert, CPU)
    scores = scorer.score(images, PROMPTS)
    text = bert(PROMPTS, padding="max_length", max_length=35, truncation=True, return_tensors="pt")
    assert text["input_ids"].shape == (4, 35)
    expected = original_forward(
        original_names(network), prepared(images, 32), text["input_ids"], text["attention_mask"], heads=2
    )
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    assert scores.std() > 1e-3
    alone = torch.cat([scorer.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, scores, atol=1e-5, rtol=1e-5)


def test_half_precision_weights_score_in_float32(clip_folder: Path, images: np.ndarray, tmp_path: Path) -> None:
    """On a CPU; transformers would otherwise compute in whatever the file has."""
    shutil.copytree(clip_folder, tmp_path / "half")
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(tmp_path / "half")
    scorer = pickscore.load(CPU, str(tmp_path / "half"))
    assert all(value.dtype == torch.float32 for value in scorer.towers.model.parameters())
    full = pickscore.load(CPU, str(clip_folder)).score(images, PROMPTS)
    torch.testing.assert_close(scorer.score(images, PROMPTS), full, atol=2e-2, rtol=2e-3)


def test_imagereward_key_map_is_complete(network: imagereward.ImageReward) -> None:
    mapped = imagereward.from_original(original_names(network))
    own = network.state_dict()
    assert mapped.keys() == own.keys() and all(torch.equal(mapped[key], own[key]) for key in own)


# Files


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


def test_a_folder_that_is_no_clip_is_one_line(tmp_path: Path, clip_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut"
    shutil.copytree(clip_folder, cut)
    weights_file = cut / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-10])
    for folder in (tmp_path / "empty", cut):
        for load in (pickscore.load, clipscore.load):
            with pytest.raises(ConfigError, match=folder.name) as caught:
                load(CPU, str(folder))
            assert "\n" not in str(caught.value)


def test_clipscore_is_a_thirtieth_of_the_formula(clip_folder: Path, images: np.ndarray) -> None:
    folder = str(clip_folder)
    torch.testing.assert_close(
        30 * clipscore.load(CPU, folder).score(images, PROMPTS), pickscore.load(CPU, folder).score(images, PROMPTS)
    )


def test_pickscores_scale_is_a_setting(clip_folder: Path, images: np.ndarray) -> None:
    raw = pickscore.load(CPU, str(clip_folder)).score(images, PROMPTS)
    settings: dict[str, Any] = {"reward": ("pickscore",), "reward_models": (f"pickscore={clip_folder}",)}
    for scale, divisor in (("raw", 1), ("flow", 26)):
        (scorer,) = loading.scorers(TrainConfig(**settings, pickscore_scale=scale), CPU)
        torch.testing.assert_close(divisor * scorer.score(images, PROMPTS), raw)


def test_without_a_network_the_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repository: str, name: str, repo_type: str | None = None) -> str:
        raise LocalEntryNotFoundError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for load, parts in (
        (pickscore.load, ("config.json", "yuvalkirstain/PickScore_v1", "pickscore=PATH")),
        (hpsv2.load, ("HPS_v2.1_compressed.pt", "xswu/HPSv2", "hpsv2=PATH")),
        (imagereward.load, ("ImageReward.pt", "zai-org/ImageReward", "imagereward=PATH")),
    ):
        with pytest.raises(ConfigError) as caught:
            load(CPU)
        assert all(part in str(caught.value) for part in (*parts, "no connection")) and "\n" not in str(caught.value)


# Parked


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward"])
def test_parking_changes_no_score(
    name: str, clip_folder: Path, network: imagereward.ImageReward, bert: Any, images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The weights are where they are wanted while the scorer works, and go back: read off what modules are told."""
    scorer: Any
    if name == "pickscore":
        scorer = pickscore.load(CPU, str(clip_folder))
    elif name == "hpsv2":
        scorer = hpsv2.HpsScorer(pickscore.load(CPU, str(clip_folder)).towers)
    else:
        scorer = imagereward.ImageRewardScorer(network, bert, CPU)
    expected = scorer.score(images, PROMPTS)
    assert expected.std() > 1e-4
    events: list[str] = []
    move, run = nn.Module.to, nn.Module.__call__

    def to(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        events.extend(str(found) for found in (*arguments, *options.values()) if isinstance(found, torch.device))
        return move(module, *arguments, **options)

    def call(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        events.append("works")
        return run(module, *arguments, **options)

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(nn.Module, "__call__", call)
    # The same device by another name.
    parked = Parked(scorer, torch.device("cpu:0"))
    scorer.towers._texts.clear() if name != "imagereward" else None
    assert torch.equal(parked.score(images, PROMPTS), expected)
    assert [event for event, _ in itertools.groupby(events)] == ["cpu", "cpu:0", "works", "cpu"]
    assert parked.name == name


@pytest.mark.parametrize("fails", ["score", "to"])
def test_a_parked_scorer_that_fails_comes_back(fails: str, images: np.ndarray) -> None:
    """While it scores, or half-way to a device without room."""

    class Failing:
        name, device = "failing", ""

        def to(self, device: torch.device) -> None:
            self.device = str(device)
            if fails == "to" and self.device == "cpu:0":
                raise RuntimeError("out of memory")

        def score(self, *arguments: Any) -> Tensor:
            assert self.device == "cpu:0"
            raise ValueError("no such picture")

    scorer = Failing()
    with pytest.raises((RuntimeError, ValueError), match="out of memory" if fails == "to" else "no such picture"):
        Parked(scorer, torch.device("cpu:0")).score(images, PROMPTS)
    assert scorer.device == "cpu"
