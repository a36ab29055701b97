"""The geneval reward's detector and colour classifier, on tiny random weights and planted outputs."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, SwinConfig
from transformers.models.mask2former import modeling_mask2former

from tmpo_trainer.demo.build import make_tokenizer
from tmpo_trainer.prompts.compositional import CLASSES, COLORS
from tmpo_trainer.rewards import Parked, geneval, variants
from tmpo_trainer.rewards.parts import detect
from tmpo_trainer.rewards.parts.detect import Detection, instances
from tmpo_trainer.settings.errors import ConfigError

CPU = torch.device("cpu")
PERSON, CAT, DOG = (CLASSES.index(name) for name in ("person", "cat", "dog"))
RED_DOG = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
ANY_DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`detector` and `classifier` as the hub has them; every query of the detector is fairly sure that it is a dog."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=6,
        num_labels=80,
    )
    with pytest.MonkeyPatch.context() as patch:
        # Its loss, which is not used, needs scipy.
        patch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
        model = modeling_mask2former.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.normal_(std=0.15)
        model.class_predictor.bias[DOG] += 5.5
        # Fresh ones see hardly any difference between pictures, nor within one.
        for parameter in model.model.pixel_level_module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        # Surer of outlines.
        model.model.transformer_module.decoder.mask_predictor.mask_embedder.layers[-1].layers[0].weight.mul_(50)
    tokenizer = make_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPModel(
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
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    folder = tmp_path_factory.mktemp("geneval")
    model.save_pretrained(folder / "detector")
    clip.save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    return folder


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Wide pictures of coarse noise."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (4, 4, 6, 3), dtype=np.uint8)
    return coarse.repeat(16, 1).repeat(16, 2)


@pytest.fixture
def scorer(folder: Path) -> geneval.GenevalScorer:
    """As `load` makes it, but for the detector's resolution."""
    detector = detect.load_detector(folder / "detector", CPU)
    small = detect.Detector(detector.network, CPU, sides=(64, 128), batch=3)
    return geneval.GenevalScorer(small, geneval.load(CPU, str(folder)).classifier)


# The network


@torch.no_grad()
def test_the_network_is_transformers_own(
    folder: Path, scorer: geneval.GenevalScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
    whole = modeling_mask2former.Mask2FormerForUniversalSegmentation.from_pretrained(folder / "detector").eval()
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    output = whole(pixels)
    classes, masks = scorer.detector.network(pixels)
    assert classes.shape == (2, 6, 81) and masks.shape == (2, 6, 16, 24)
    torch.testing.assert_close(classes, output.class_queries_logits, atol=1e-5, rtol=1e-5)
    assert masks.abs().max() > 1
    torch.testing.assert_close(masks, output.masks_queries_logits, atol=1e-3, rtol=1e-3)


def test_pictures_are_resized_and_normalised_as_in_training(folder: Path, images: np.ndarray) -> None:
    detector = geneval.load(CPU, str(folder)).detector
    seen: list[Tensor] = []
    detector.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    detector.detect(images[:1])
    # 96 x 64 to 1200 x 800, and its width up to a multiple of 32.
    resized = Image.fromarray(images[0]).resize((1216, 800), Image.Resampling.BILINEAR)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((np.asarray(resized) / 255 - mean) / std).transpose(2, 0, 1)
    torch.testing.assert_close(seen[0], torch.tensor(expected, dtype=torch.float32)[None], atol=1e-4, rtol=1e-4)


# What is made of its output


def logits(**chances: float) -> Tensor:
    """Class logits `[81]` with these probabilities; the rest is for no class."""
    found = torch.full((81,), -50.0)
    for name, chance in chances.items():
        found[CLASSES.index(name)] = math.log(chance)
    found[80] = math.log(max(1 - sum(chances.values()), 1e-9))
    return found


def planted(
    boxes: list[tuple[int, int, int, int]], size: tuple[int, int], inside: float = 20, outside: float = -20
) -> Tensor:
    """Mask logits `[Q, H, W]` with rectangles (left, top, right, bottom)."""
    masks = torch.full((len(boxes), *size), float(outside))
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = inside
    return masks


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_boxes_classes_scores_and_outlines() -> None:
    size = (32, 48)
    masks = planted([(3, 5, 20, 30), (10, 0, 48, 9), (0, 31, 1, 32)], size, inside=2)
    # A notch in the first: its box stays, its outline does not.
    masks[0, 5:10, 3:8] = -1
    found = instances(torch.stack([logits(dog=0.9), logits(cat=0.6), logits(person=0.5)]), masks, size, size)
    assert [(item.name, item.box) for item in found] == [
        ("dog", (3, 5, 20, 30)),
        ("cat", (10, 0, 48, 9)),
        ("person", (0, 31, 1, 32)),
    ]
    assert [item.score for item in found] == pytest.approx([p * sigmoid(2) for p in (0.9, 0.6, 0.5)], abs=1e-5)
    outline = np.ones((25, 17), bool)
    outline[:5, :5] = False
    assert found[0].mask is not None and np.array_equal(found[0].mask, outline)
    assert found[0].color is None


def test_a_score_is_the_class_times_the_pixels_that_are_in() -> None:
    size = (8, 8)
    masks = planted([(0, 0, 4, 8)], size, inside=1, outside=-3)
    masks[0, :, 0] = 3
    (item,) = instances(logits(dog=0.8)[None], masks, size, size)
    # A column at 3 and three at 1; what is out does not count.
    assert item.score == pytest.approx(0.8 * (sigmoid(3) + 3 * sigmoid(1)) / 4, abs=1e-6)


def test_thresholds_and_what_is_nothing() -> None:
    size, box = (8, 8), (2, 2, 6, 6)

    def names(inside: float, **chances: float) -> list[str]:
        return [item.name for item in instances(logits(**chances)[None], planted([box], size, inside), size, size)]

    # .4 * .731 = .292; .42 * .731 = .307.
    assert names(1, dog=0.4) == [] and names(1, dog=0.42) == ["dog"]
    assert names(20, dog=0.301) == ["dog"] and names(20, dog=0.299) == []
    # One outline can be two things.
    assert names(20, cat=0.35, dog=0.5) == ["dog", "cat"]
    # A query of no class gives no object, nor does one without a pixel.
    assert names(20) == [] and names(-1, dog=0.9) == []


def test_outlines_may_overlap() -> None:
    size = (16, 16)
    found = instances(logits(dog=0.9).repeat(2, 1), planted([(0, 0, 12, 12), (4, 4, 16, 16)], size), size, size)
    assert [item.box for item in found] == [(0, 0, 12, 12), (4, 4, 16, 16)]
    assert all(item.mask is not None and item.mask.all() for item in found)


def test_at_most_a_hundred() -> None:
    size, three = (4, 4), logits(dog=0.33, cat=0.32, person=0.31)
    found = instances(three.repeat(40, 1), planted([(0, 0, 2, 2)] * 40, size), size, size)
    names = [item.name for item in found]
    assert (names.count("dog"), names.count("cat"), names.count("person")) == (40, 40, 20)


def test_outlines_come_to_the_size_of_the_picture() -> None:
    # From 8 x 8 to 32 x 32 to 48 wide and 16 high: edges between equal and opposite logits stay where they are.
    found = instances(logits(dog=0.9)[None], planted([(2, 4, 6, 8)], (8, 8), 5, -5), (32, 32), (16, 48))
    assert [item.box for item in found] == [(12, 8, 36, 16)]
    # Bilinear, so that an edge is where the logit is 0, 3 : 1 between the centres of cells of 8: 12 + .75 * 8.
    found = instances(logits(dog=0.9)[None], planted([(0, 0, 2, 8)], (8, 8), 6, -2), (64, 64), (64, 64))
    assert [item.box for item in found] == [(0, 0, 18, 64)]
    # Through what the detector saw, though cells and pixels are the same: an eighth of a cell off the centre.
    (item,) = instances(logits(dog=0.9)[None], planted([(2, 2, 3, 3)], (8, 8), 5, -5), (32, 32), (8, 8))
    assert item.box == (2, 2, 3, 3) and item.score == pytest.approx(0.9 * sigmoid(10 * (7 / 8) ** 2 - 5), abs=1e-6)


# The detector


class Planted(nn.Module):
    """A network that answers with what it is given, picture by picture, and counts calls."""

    def __init__(self, classes: Tensor, masks: Tensor):
        super().__init__()
        self.classes, self.masks, self.calls, self.next = classes, masks, [], 0

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(len(pixels))
        rows = [(self.next + i) % len(self.classes) for i in range(len(pixels))]
        self.next += len(pixels)
        return self.classes[rows], self.masks[rows]


class Known:
    """A classifier that gives the colours it was made with and keeps the pictures it gets."""

    def __init__(self, *colors: str):
        self.answers, self.cuts, self.names = list(colors), [], []

    def colors(self, cuts: list[np.ndarray], names: list[str]) -> list[str]:
        self.cuts += cuts
        self.names += names
        return self.answers[: len(cuts)]


def planted_scorer(
    classes: Tensor, masks: Tensor, *colors: str, mode: str = "strict"
) -> tuple[geneval.GenevalScorer, Planted, Known]:
    network, classifier = Planted(classes, masks), Known(*colors)
    detector = detect.Detector(network, CPU, sides=(32, 64), batch=2)  # type: ignore[arg-type]
    return geneval.GenevalScorer(detector, classifier, mode), network, classifier  # type: ignore[arg-type]


def test_pictures_keep_their_order_over_batches() -> None:
    size = (32, 32)
    boxes = [(i, 0, i + 8, 8) for i in range(5)]
    scorer, network, _ = planted_scorer(logits(dog=0.9).repeat(5, 1, 1), planted(boxes, size)[:, None])
    found = scorer.detector.detect(np.zeros((5, *size, 3), np.uint8))
    assert [[item.box for item in objects] for objects in found] == [[box] for box in boxes]
    assert network.calls == [2, 2, 1]


def test_strict_and_partial_look_once() -> None:
    classes, masks = logits(dog=0.9).repeat(2, 1, 1), planted([(0, 0, 8, 8)] * 2, (32, 32))[:, None]
    strict, network, _ = planted_scorer(classes, masks, "red", "blue")
    partial = geneval.GenevalScorer(strict.detector, strict.classifier, "partial")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    prompts, metadata = ["a red dog", "a red dog"], [RED_DOG, RED_DOG]
    assert strict.score(images, prompts, metadata).tolist() == [1, 0]
    assert partial.score(images.copy(), prompts, metadata).tolist() == [1, 0.5]
    assert strict.score(images, prompts, metadata).tolist() == [1, 0]
    assert network.calls == [2]
    # One pixel differs; the shape differs; it forgets all but the last.
    other = images.copy()
    other[1, 31, 31, 2] ^= 1
    for changed in (other, other.reshape(2, 16, 64, 3), images):
        partial.score(changed, prompts, metadata)
    assert network.calls == [2, 2, 2, 2]


def test_the_classifier_sees_the_box_with_grey_round_the_object() -> None:
    size = (32, 32)
    masks = planted([(4, 6, 12, 26), (16, 0, 30, 10), (0, 0, 32, 32)], size)
    masks[0, 6:10, 4:8] = -20
    classes = torch.stack([logits(dog=0.9), logits(dog=0.8), logits(cat=0.9)])
    scorer, _, classifier = planted_scorer(classes[None].repeat(2, 1, 1), masks[None].repeat(2, 1, 1, 1), "red", "red")
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    scores = scorer.score(images, ["a dog", "a red dog"], [ANY_DOG, RED_DOG])
    assert scores.tolist() == [1, 1]
    # Of the second picture alone, and of its better dog alone.
    expected = images[1, 6:26, 4:12].copy()
    expected[:4, :4] = (0x99, 0x99, 0x99)
    assert classifier.names == ["dog"] and len(classifier.cuts) == 1
    assert np.array_equal(classifier.cuts[0], expected) and classifier.cuts[0].dtype == np.uint8


def test_colours_go_to_their_objects() -> None:
    masks = planted([(0, 0, 8, 8), (16, 16, 24, 24), (8, 8, 12, 12)], (32, 32))
    classes = torch.stack([logits(dog=0.9), logits(cat=0.8), logits(dog=0.6)])
    about = {
        "tag": "color_attr",
        "include": [{"class": "cat", "count": 1, "color": "blue"}, {"class": "dog", "count": 2, "color": "red"}],
    }
    images = np.zeros((1, 32, 32, 3), np.uint8)
    for answers, score in ((("blue", "red", "red"), 1), (("red", "blue", "red"), 0), (("blue", "red", "blue"), 0)):
        scorer, _, classifier = planted_scorer(classes[None], masks[None], *answers)
        assert scorer.score(images, ["a blue cat and two red dogs"], [about]).tolist() == [score]
        assert classifier.names == ["cat", "dog", "dog"]
        assert [cut.shape for cut in classifier.cuts] == [(8, 8, 3), (8, 8, 3), (4, 4, 3)]


def test_an_output_that_is_not_finite_is_an_error() -> None:
    images = np.zeros((3, 32, 32, 3), np.uint8)
    for blamed in ("classes", "masks"):
        classes, masks = logits(dog=0.9).repeat(3, 1, 1), planted([(0, 0, 8, 8)] * 3, (32, 32))[:, None]
        {"classes": classes, "masks": masks}[blamed][2].fill_(float("nan"))
        scorer, _, _ = planted_scorer(classes, masks)
        with pytest.raises(ValueError, match="no finite numbers for image 2"):
            scorer.score(images, ["a dog"] * 3, [ANY_DOG] * 3)


# The colour classifier


class Features:
    """Towers with given features of texts; a picture's are its first pixel's."""

    def __init__(self, texts: dict[str, list[float]]):
        self.texts, self.asked = texts, []

    def text_features(self, prompts: list[str]) -> Tensor:
        self.asked += prompts
        return torch.stack([F.normalize(torch.tensor(self.texts[prompt]), dim=0) for prompt in prompts])

    def image_features(self, images: list[np.ndarray]) -> Tensor:
        return torch.stack([F.normalize(torch.tensor(image[0, 0], dtype=torch.float32), dim=0) for image in images])


def color_texts(color: str, name: str) -> list[str]:
    return [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object"]


def features(**special: list[list[float]]) -> Features:
    """Of dogs and cats: those given, the others point away."""
    texts = {
        text: feature
        for name in ("dog", "cat")
        for color in COLORS
        for text, feature in zip(color_texts(color, name), special.get(color, [[-1.0, -1, -1]] * 3), strict=True)
    }
    return Features(texts)


def colors_of(towers: Features, *pixels: tuple[int, int, int]) -> list[str]:
    cuts = [np.array([[pixel]], np.uint8) for pixel in pixels]
    return detect.ColorClassifier(towers).colors(cuts, ["dog"] * len(cuts))  # type: ignore[arg-type]


def test_a_colour_is_the_mean_of_its_templates() -> None:
    x, y, z = [1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1]
    # Red's best template is exact, but one of three; two of orange's are near.
    towers = features(red=[x, y, y], orange=[[0.9, 0, 0.4], [0.9, 0, -0.4], z])
    assert colors_of(towers, (200, 0, 0), (0, 200, 0)) == ["orange", "red"]
    assert towers.asked[:30] == [text for color in COLORS for text in color_texts(color, "dog")]
    # The mean is brought to unit length: .7 / .74 beats .8.
    wide = [[0.7, 0.714, 0.0], [0.7, -0.714, 0.0], [0.7, 0.0, 0.714]]
    assert colors_of(features(red=[[0.8, 0.6, 0.0]] * 3, white=wide), (9, 0, 0)) == ["white"]


def test_pictures_are_of_any_number_and_size() -> None:
    towers = features(pink=[[1.0, 0, 0]] * 3, black=[[0.0, 0, 1]] * 3)
    assert colors_of(towers) == []
    cuts = [np.full((h, w, 3), pixel, np.uint8) for h, w, pixel in ((1, 9, (5, 0, 0)), (7, 2, (0, 0, 5)))]
    assert detect.ColorClassifier(towers).colors(cuts, ["dog", "cat"]) == ["pink", "black"]  # type: ignore[arg-type]


def test_features_that_are_not_finite_are_an_error() -> None:
    towers = features(red=[[float("nan"), 0, 0]] * 3)
    with pytest.raises(ValueError, match="colour classifier of geneval"):
        colors_of(towers, (1, 0, 0))


@torch.no_grad()
def test_colours_are_clips(folder: Path) -> None:
    classifier = geneval.load(CPU, str(folder)).classifier
    model = CLIPModel.from_pretrained(folder / "classifier").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "classifier")
    generator = np.random.default_rng(1)
    cuts = [
        generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        for height, width in ((32, 32), (32, 64), (64, 32), (40, 40)) * 5
    ]
    names = ["dog", "cat", "person", "dog"] * 5
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = []
    for image, name in zip(cuts, names, strict=True):
        scale = 32 / min(image.shape[:2])
        whole = Image.fromarray(image).resize(
            (int(image.shape[1] * scale), int(image.shape[0] * scale)), Image.Resampling.BICUBIC
        )
        left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
        pixels = (np.asarray(whole.crop((left, top, left + 32, top + 32))) / 255 - mean) / std
        batch = torch.tensor(pixels.transpose(2, 0, 1), dtype=torch.float32)[None]
        seen = model.visual_projection(model.vision_model(batch).pooler_output)
        vectors = []
        for color in COLORS:
            tokens = tokenizer(color_texts(color, name), padding="max_length", truncation=True, return_tensors="pt")
            read = model.text_projection(model.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output)
            vectors.append(F.normalize(read, dim=-1).mean(0))
        expected.append(COLORS[int(F.cosine_similarity(seen, torch.stack(vectors)).argmax())])
    assert classifier.colors(cuts, names) == expected
    assert len(set(expected)) > 1


# Everything, from files


def test_scores_from_files(folder: Path, scorer: geneval.GenevalScorer, images: np.ndarray) -> None:
    metadata = [
        ANY_DOG,
        {"tag": "two_object", "include": [{"class": "dog", "count": 4}, {"class": "cat", "count": 1}]},
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": color} for color in COLORS]},
        {"tag": "two_object", "include": [{"class": "dog", "count": 5}], "exclude": [{"class": "cat", "count": 1}]},
    ]
    prompts = list("abcd")
    found = [len(objects) for objects in scorer.detector.detect(images)]
    assert found == [1, 2, 3, 2]
    partial = geneval.GenevalScorer(scorer.detector, scorer.classifier, "partial")
    scores = partial.score(images, prompts, metadata)
    # Ten times the same dog, of whatever colour, and three are 2 too many.
    assert scores.tolist() == pytest.approx([1, (2 / 4 + 0) / 2, (10 * 0 + 1) / 20, (2 / 5 + 1) / 2])
    alone = [partial.score(images[i : i + 1], prompts[i : i + 1], metadata[i : i + 1]) for i in range(4)]
    assert torch.equal(torch.cat(alone), scores)
    assert scorer.score(images, prompts, metadata).tolist() == [1, 0, 0, 0]
    # At full resolution.
    whole = geneval.load(CPU, str(folder))
    assert whole.name == "geneval" and whole.mode == "strict"
    assert whole.score(images[:2], prompts[:2], metadata[:2]).tolist() == [1, 0]


def test_a_report_shows_both_scores_and_the_detector_looks_once(scorer: geneval.GenevalScorer) -> None:
    """Parked or not: both share the weights."""
    image = np.zeros((1, 64, 64, 3), np.uint8)
    about: list[dict[str, object]] = [{"tag": "single_object", "include": [{"class": "dog", "count": 1}]}]
    for given in (scorer, Parked(scorer, torch.device("cpu:0"))):
        image = image + 1
        looked: list[int] = []
        network = scorer.detector.network
        handle = network.register_forward_hook(lambda *arguments, looked=looked: looked.append(1))
        pairs = variants(given)
        assert [label for label, _ in pairs] == ["geneval strict", "geneval partial"]
        for _, part in pairs:
            assert isinstance(part, Parked) == isinstance(given, Parked)
            part.score(image, ["a dog"], about)
        handle.remove()
        assert looked == [1]


def test_moving_moves_both(scorer: geneval.GenevalScorer) -> None:
    scorer.to(torch.device("meta"))
    assert scorer.detector.network.device.type == scorer.classifier.towers.model.device.type == "meta"
    assert scorer.detector.device.type == scorer.classifier.towers.device.type == "meta"


# Files that are not there, or others


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        geneval.load(CPU, str(path))
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message, message


def test_folders_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "none does not exist")
    refused(tmp_path, f"{tmp_path / 'detector'} does not exist", "facebook/mask2former-swin-small-coco-instance")
    (tmp_path / "detector").mkdir()
    refused(tmp_path, f"{tmp_path / 'classifier'} does not exist", "openai/clip-vit-large-patch14")
    (tmp_path / "classifier").mkdir()
    refused(tmp_path, f"{tmp_path / 'detector' / 'config.json'} cannot be read")
    shutil.copytree(folder / "detector", tmp_path / "detector", dirs_exist_ok=True)
    refused(tmp_path, f"{tmp_path / 'classifier' / 'config.json'} cannot be read")
    (tmp_path / "detector" / "model.safetensors").unlink()
    refused(tmp_path, f"{tmp_path / 'detector'} cannot be loaded")


def test_a_detector_that_is_another(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "detector" / "model.safetensors"
    tensors = load_file(file)
    # What is not in the file would be random.
    save_file({k: v for k, v in tensors.items() if k != "class_predictor.bias"}, file, {"format": "pt"})
    refused(copy, "detector is not a complete Mask2Former (class_predictor.bias is missing)")
    save_file({**tensors, "class_predictor.bias": torch.zeros(5)}, file, {"format": "pt"})
    refused(copy, "detector cannot be loaded")
    file.write_bytes(file.read_bytes()[:-10])
    refused(copy, "detector cannot be loaded")
    shutil.rmtree(copy / "detector")
    shutil.copytree(folder / "classifier", copy / "detector")
    refused(copy, "detector holds a model of type clip, not mask2former")


def test_without_a_network_the_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repository: str, name: str, repo_type: str | None = None) -> str:
        raise LocalEntryNotFoundError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ConfigError) as caught:
        geneval.load(CPU)
    parts = ("config.json", "facebook/mask2former-swin-small-coco-instance", "geneval=PATH", "no connection")
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


def test_a_detection_compares_by_what_it_says() -> None:
    box = (0, 0, 2, 2)
    assert Detection("dog", 0.5, box, mask=np.ones((2, 2), bool)) == Detection("dog", 0.5, box)
