"""What the CLIP scorers share: two towers. The text features of a prompt are computed once."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ...hub import check_vocabulary, checked_model, checked_tokenizer, read_json, readable_errors
from . import clip_file
from .weights import Source, hub_folder

#: The tokenizer of OpenAI's CLIP, which all CLIP scorers use.
TOKENIZER: Source = (
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ("tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.json"),
)

#: Number of words in CLIP's tokenizer.
VOCABULARY = 49408

#: Images in one call of the vision tower.
BATCH = 32
#: Prompts whose features are kept.
KEPT = 4096

Prepare = Callable[[Sequence[Image.Image]], Tensor]


def crop(
    size: int,
    mean: Sequence[float] = OPENAI_CLIP_MEAN,
    std: Sequence[float] = OPENAI_CLIP_STD,
    offset: Callable[[float], int] = round,
) -> Prepare:
    """CLIP's own preprocessing: shortest side to `size` (bicubic), centre crop, mean and std. `[N, 3, size, size]`.

    Args:
        offset: makes a whole number of half the pixels that are cut off. `round`, half to even, is torchvision's, with
            which ImageReward and GenEval crop. `math.floor` is transformers', with which PickScore and CLIP score crop.
    """
    # A pixel has one of 256 values, so a table of what each becomes takes the place of arithmetic on whole pictures.
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    tables = [(levels - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]

    def middle(image: Image.Image) -> Image.Image:
        # The longer side is rounded down, as in both libraries.
        width, height = (size * side // min(image.size) for side in image.size)
        left, top = (offset((side - size) / 2) for side in (width, height))
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + size, top + size))

    def prepare(images: Sequence[Image.Image]) -> Tensor:
        # PIL releases the interpreter lock while it resizes.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            pixels = np.stack([np.asarray(image) for image in pool.map(middle, images)])
        return torch.from_numpy(np.stack([table[pixels[..., i]] for i, table in enumerate(tables)], 1))

    return prepare


def pad(size: int) -> Prepare:
    """HPS's own: longest side to `size` (bicubic), black bars to a square, CLIP's mean and std. `[N, 3, size, size]`.

    The original resizes floating-point pixels, and neither rounds them nor clips what the bicubic filter overshoots.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    def square(image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
        scale = size / max(image.size)
        height, width = (max(1, round(side * scale)) for side in pixels.shape[1:])
        resized = torch.nn.functional.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
        left, top = (size - width) // 2, (size - height) // 2
        whole = torch.nn.functional.pad(resized, (left, size - width - left, top, size - height - top))
        return (whole - mean) / std

    return lambda images: torch.stack([square(image) for image in images])


def open_clip_tokenizer() -> CLIPTokenizer | None:
    """CLIP's tokenizer from the vocabulary in open_clip's package, which needs no hub. None if that is not installed.

    The package itself is not imported: it needs torchvision.
    """
    spec = importlib.util.find_spec("open_clip")
    file = Path(spec.origin or "").with_name("bpe_simple_vocab_16e6.txt.gz") if spec else None
    if file is None or not file.is_file():
        return None
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")
    # The first line is a title. CLIP uses as many of the merges after it as its vocabulary of 49,408 has room for.
    letters = list(bytes_to_unicode().values())
    merges: list[Any] = [tuple(line.split()) for line in lines[1 : VOCABULARY - 2 * len(letters) - 2 + 1]]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def load_tokenizer(scorer: str, folder: Path, rows: int) -> CLIPTokenizer:
    """The tokenizer in a model's folder, or CLIP's: from open_clip's package, or the hub.

    Args:
        rows: of the model's embedding of words. Raises ConfigError if the tokenizer's vocabulary is another one.
    """
    if not (folder / "tokenizer_config.json").is_file():
        found = open_clip_tokenizer()
        if found is not None:
            check_vocabulary(f"reward {scorer}", folder, found, rows)
            return found
        folder = hub_folder(scorer, TOKENIZER)
    return checked_tokenizer(CLIPTokenizer, f"reward {scorer}", folder, rows)


class ClipTowers:
    """A frozen CLIP model. Features have unit length and are float32, whatever the towers run in.

    Args:
        model: a transformers CLIPModel; subclasses take others.
        prepare: images -> pixel values `[N, 3, H, W]`. clean: applied to a prompt before the tokenizer.
        device: where the towers run, in float16 on a GPU.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prepare: Prepare,
        device: torch.device,
        clean: Callable[[str], str] = str,
        batch: int = BATCH,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.prepare, self.clean, self.batch = tokenizer, prepare, clean, batch
        #: exp(logit_scale), float32.
        self.scale = model.logit_scale.detach().float().exp().cpu()
        self._dtype = torch.float16 if device.type == "cuda" else torch.float32
        self._texts: dict[str, Tensor] = {}
        self.to(device)

    def to(self, device: torch.device) -> None:
        self.device = device
        self.model.to(device=device, dtype=self._dtype)

    @torch.no_grad()
    def image_features(self, images: np.ndarray) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` -> `[N, D]`, on the CPU."""
        found = []
        for first in range(0, len(images), self.batch):
            pixels = self.prepare([Image.fromarray(image) for image in images[first : first + self.batch]])
            found.append(_unit(self._encode_images(pixels.to(self.device, self._dtype))))
        return torch.cat(found)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """`[N, D]`, on the CPU. The features of the last prompts are reused."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        for first in range(0, len(missing), self.batch):
            chosen = missing[first : first + self.batch]
            self._texts.update(zip(chosen, _unit(self._encode_texts(chosen)), strict=True))
        found = torch.stack([self._texts[prompt] for prompt in prompts])
        # A server sees any number of prompts. A dictionary has them in the order in which they came.
        for prompt in list(itertools.islice(self._texts, max(len(self._texts) - KEPT, 0))):
            del self._texts[prompt]
        return found

    def cosine(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Cosine of every image with its prompt, float32 `[N]`."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixels).pooler_output

    def _encode_texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            [self.clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        return self.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


class ClipScorer:
    """exp(logit_scale) * cos of a CLIP model, divided by a constant.

    Args:
        name: the scorer's. towers: the model's. divisor: see `pickscore` and `clipscore`.
    """

    def __init__(self, name: str, towers: ClipTowers, divisor: float = 1.0):
        self.name, self.towers, self.divisor = name, towers, divisor

    def to(self, device: torch.device) -> None:
        self.towers.to(device)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Any] | None = None) -> Tensor:
        """uint8 RGB `[N, H, W, 3]` and N prompts -> float32 `[N]`."""
        return self.towers.scale * self.towers.cosine(images, prompts) / self.divisor


def load_clip(scorer: str, folder: Path, device: torch.device, offset: Callable[[float], int] = round) -> ClipTowers:
    """The towers of a transformers CLIPModel in a folder or one .safetensors file, with CLIP's own preprocessing.

    Args:
        offset: see `crop`.

    Raises:
        ConfigError: there is no such model.
    """
    if folder.is_file():
        model: Any = clip_file.build(scorer, folder)
        tokenizer = load_tokenizer(scorer, folder.parent, model.config.text_config.vocab_size)
    else:
        with readable_errors(f"reward {scorer}", folder):
            config: Any = CLIPConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = load_tokenizer(scorer, folder, config.text_config.vocab_size)
        model = checked_model(CLIPModel, f"reward {scorer}", folder, dtype=torch.float32)
    size = model.config.vision_config.image_size
    mean, std = _normalisation(scorer, folder.parent if folder.is_file() else folder, size)
    return ClipTowers(model, tokenizer, crop(size, mean, std, offset), device)


def _normalisation(scorer: str, folder: Path, size: int) -> tuple[list[float], list[float]]:
    """Mean and std of a transformers model: those of its `preprocessor_config.json`, or as transformers 5 writes it
    `processor_config.json`. Without either they are CLIP's own.

    Raises:
        ConfigError: the file asks for another size, crop or filter than `crop`.
    """
    places = (folder / "preprocessor_config.json", folder / "processor_config.json")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)
    found = read_json(f"reward {scorer}", file)
    found = found.get("image_processor", found)
    with readable_errors(f"reward {scorer}", file):
        for key, values in {
            "size": (size, {"shortest_edge": size}),
            "crop_size": (size, {"height": size, "width": size}),
            "resample": (int(Image.Resampling.BICUBIC),),
        }.items():
            if key in found and found[key] not in values:
                raise ValueError(f"{key} {found[key]!r} is not supported, only {values[-1]!r}")
        mean, std = ([float(value) for value in found.get(key, ())] for key in ("image_mean", "image_std"))
        if len(mean) not in (0, 3) or len(std) not in (0, 3):
            raise ValueError("image_mean and image_std need three values each")
    return mean or list(OPENAI_CLIP_MEAN), std or list(OPENAI_CLIP_STD)
