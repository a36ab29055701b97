"""Scores and diversity of picture files, as a table, csv or json."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import ExifTags, Image
from tqdm import tqdm

from .. import diversity
from ..files import write_text
from ..pictures.reading import MOST_PIXELS, read_picture
from ..prompts.lists import LONGEST, PromptList, about
from ..rewards import Scorer, score_all
from ..settings.errors import ConfigError, one_line
from ..settings.text import decode
from . import limit
from .features import Features
from .latents import LatentEncoder

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")

#: The largest number of pictures in memory at once. Large ones are fewer, see `batches`.
BATCH = 32

#: Characters of metadata that are searched for a prompt. ComfyUI's largest graphs have a tenth of it.
LONGEST_TEXT = 2**22

#: Inputs that hold a prompt in ComfyUI's text nodes, in order of preference.
COMFY_TEXTS = ("text", "t5xxl", "clip_l", "clip_g", "text_l", "text_g", "user_prompt", "prompt", "string", "value")

#: What follows the prompt in A1111's text.
A1111_END = re.compile(r"\n(?:Negative prompt: |Steps: \d)")


@dataclass
class Picture:
    """A file to be scored. size: width and height."""

    path: Path
    prompt: str
    size: tuple[int, int]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The given files, and the pictures of given folders by name, 2.png before 10.png, without hidden files such as macOS's
    `._a.png`.

    Raises:
        ConfigError: a path cannot be read, or leads to no picture.
    """
    found: list[Path] = []
    for path in paths:
        try:
            if path.is_dir():
                inside = sorted((file for file in path.iterdir() if _is_picture(file)), key=_order)
                if not inside:
                    raise ConfigError(f"folder {path} holds no pictures ({', '.join(ENDINGS)})")
                found += inside
            elif path.is_file():
                found.append(path)
            else:
                raise ConfigError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return found


def _order(file: Path) -> tuple[list[str | int], str]:
    # Digits are at the odd places, so that like is compared with like.
    parts = re.split(r"(\d+)", file.stem)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name


def _is_picture(file: Path) -> bool:
    return not file.name.startswith(".") and file.suffix.lower() in ENDINGS and file.is_file()


def comfy_prompt(graph: Mapping[str, Any]) -> str | None:
    """The positive prompt of a ComfyUI graph (API format): the texts behind `positive`, or a guider's `conditioning`.

    Returns:
        None if there is none, or if there are several that differ.
    """
    nodes = {str(key): node for key, node in graph.items() if isinstance(node, dict)}
    waiting: list[str] = []
    for node in nodes.values():
        inputs, kind = node.get("inputs"), node.get("class_type")
        guider = isinstance(kind, str) and "Guider" in kind
        for name in ("positive", *(("conditioning",) if guider else ())):
            link = inputs.get(name) if isinstance(inputs, dict) else None
            if _is_link(link):
                waiting.append(str(link[0]))
    # One search from all starts, so that a node is visited once however many of them lead to it.
    found, seen = set(), set(waiting)
    while waiting:
        inputs = nodes.get(waiting.pop(), {}).get("inputs")
        if not isinstance(inputs, dict):
            continue
        own = next((inputs[n] for n in COMFY_TEXTS if isinstance(inputs.get(n), str) and inputs[n].strip()), None)
        if own is not None:
            found.add(own.strip())
            continue
        for name, link in inputs.items():
            if name not in ("negative", "clip", "model", "vae") and _is_link(link) and str(link[0]) not in seen:
                seen.add(str(link[0]))
                waiting.append(str(link[0]))
    return found.pop() if len(found) == 1 else None


def _is_link(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and isinstance(value[1], int)


def _exif_parameters(image: Image.Image) -> str | None:
    """The text that A1111 wrote into the EXIF of a JPEG or WebP; None for a comment by a camera or another program."""
    try:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except Exception:
        # Pillow raises struct.error, SyntaxError, TypeError and others for damaged EXIF.
        return None
    if not isinstance(comment, bytes):
        return None
    # Exif 2.32, 4.6.5: eight bytes name the encoding. A1111's UTF-16 is big-endian; others use the EXIF's order.
    encodings = {b"ASCII\0\0\0": ("utf-8",), b"UNICODE\0": ("utf-16-be", "utf-16-le")}.get(comment[:8], ())
    read = [comment[8:].decode(encoding, "replace") for encoding in encodings]
    return next((text for text in read if A1111_END.search(f"\n{text}")), None)


def embedded_prompt(image: Image.Image) -> str | None:
    """The prompt that ComfyUI (`prompt` of a PNG) or A1111 (`parameters` of a PNG, or EXIF) wrote into a file, or None."""
    texts = (image.info.get("parameters") or _exif_parameters(image), image.info.get("prompt"))
    parameters, graph = (text if isinstance(text, str) and len(text) <= LONGEST_TEXT else "" for text in texts)
    prompt = None
    if parameters.strip():
        prompt = A1111_END.split(f"\n{parameters}", maxsplit=1)[0].strip()
    elif graph:
        try:
            loaded = json.loads(graph)
        except (ValueError, RecursionError):
            return None
        prompt = comfy_prompt(loaded) if isinstance(loaded, dict) else None
    # JSON can hold half a character, which neither tokenizers nor files take.
    return prompt.encode("utf-8", "replace").decode() if prompt else None


def open_images(
    paths: Sequence[Path],
    prompt: str | None,
    listed: PromptList | None,
    advice: str = "give --prompt or --prompts FILE",
    together: str | None = None,
) -> list[Picture]:
    """Opens every file once, so that a bad one is found before anything is scored.

    Args:
        advice: what to do about a picture without a prompt. together: the prompt of all pictures if one of them has
            none, or no two have the same.

    A picture's prompt is `prompt`, else its entry in `listed`, else that of a .txt beside it, else that in its metadata.

    Raises:
        ConfigError: a file is not a picture or has no prompt, or the list has another length.
    """
    if listed is not None and len(listed.texts) != len(paths):
        raise ConfigError(
            f"{listed.where} has {len(listed.texts)} prompts for {len(paths)} pictures: give one per picture"
        )
    found = []
    for i, path in enumerate(paths):
        image = read_picture(path)
        size, own = image.size, embedded_prompt(image)
        beside = path.with_suffix(".txt")
        if prompt is not None:
            own = prompt
        elif listed is not None:
            own = listed.texts[i]
        elif beside.is_file():
            try:
                own = decode(beside.read_bytes()).strip()
            except (OSError, ValueError) as error:
                raise ConfigError(f"{beside} cannot be read as UTF-8 text: {one_line(error)}") from None
        if not own and together is None:
            raise ConfigError(f"{path} has no prompt (in its metadata or {beside.name}): {advice}")
        if own and len(own) > LONGEST:
            raise ConfigError(f"{path}: a prompt of {len(own)} characters: at most {LONGEST}")
        found.append(Picture(path, own or "", size))
    if together is not None and not (all(picture.prompt for picture in found) and by_prompt(found)):
        return [replace(picture, prompt=together) for picture in found]
    return found


def load(pictures: Sequence[Picture]) -> np.ndarray:
    """Reads pictures of one size: uint8 RGB `[N, H, W, 3]`. Transparent areas become white."""
    arrays = []
    for picture in pictures:
        image = read_picture(picture.path)
        if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
            clear = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        arrays.append(np.asarray(image.convert("RGB")))
    return np.stack(arrays)


def batches(pictures: Sequence[Picture]) -> Iterator[list[int]]:
    """Numbers of pictures that fit into one array: of one size, at most `BATCH`, with at most `MOST_PIXELS` together."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for i, picture in enumerate(pictures):
        sizes.setdefault(picture.size, []).append(i)
    for (width, height), numbers in sizes.items():
        count = max(1, min(BATCH, MOST_PIXELS // (width * height)))
        for first in range(0, len(numbers), count):
            yield numbers[first : first + count]


def score_images(
    pictures: Sequence[Picture],
    metadata: Mapping[str, Any],
    scorers: Sequence[tuple[str, Scorer]],
    scores: dict[str, np.ndarray],
) -> None:
    """Scores every picture.

    Args:
        metadata: by prompt. scorers: (name, scorer) pairs. scores: {name: `[N]`}, is filled, batch by batch.

    Raises:
        ValueError: a picture cannot be scored; the error names its file.
    """
    with tqdm(total=len(pictures), unit="image", dynamic_ncols=True, disable=None) as bar:
        for numbers in batches(pictures):
            prompts = [pictures[i].prompt for i in numbers]
            images = load([pictures[i] for i in numbers])
            try:
                found = score_all(scorers, images, prompts, about(metadata, prompts))
            except ValueError as error:
                files = f"{pictures[numbers[0]].path} to {pictures[numbers[-1]].path.name}"
                raise ValueError(f"{files if len(numbers) > 1 else pictures[numbers[0]].path}: {error}") from None
            for name, values in found.items():
                scores[name][numbers] = values.numpy()
            bar.update(len(numbers))


def by_prompt(pictures: Sequence[Picture]) -> dict[str, list[int]]:
    """{prompt: numbers of its pictures}, without prompts that have one picture and so nothing to compare."""
    found: dict[str, list[int]] = {}
    for i, picture in enumerate(pictures):
        found.setdefault(picture.prompt, []).append(i)
    return {prompt: numbers for prompt, numbers in found.items() if len(numbers) > 1}


def check_encodable(pictures: Sequence[Picture], encoder: LatentEncoder) -> None:
    """Raises ConfigError unless all pictures of a prompt have the same size and the VAE can encode it."""
    for prompt, numbers in by_prompt(pictures).items():
        first, *others = (pictures[i] for i in numbers)
        for other in others:
            if other.size != first.size:
                sizes = [f"{picture.path} is {picture.size[0]}x{picture.size[1]}" for picture in (first, other)]
                raise ConfigError(f"--vae: pictures of prompt {prompt!r} differ in size: {', '.join(sizes)}")
        try:
            encoder.check_size(*first.size)
        except ConfigError as error:
            raise ConfigError(f"--vae: {first.path}: {error}") from None


def measure_diversity(
    pictures: Sequence[Picture], features: Features, encoder: LatentEncoder | None
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """The diversity of each prompt's pictures by `diversity.MEASURES`; those on latents need an encoder.

    Returns:
        {prompt: {"images": how many, measure: value}} and {prompt: cosine distances `[n, n]`}, for prompts with two pictures
        or more.
    """
    compared = by_prompt(pictures)
    chosen = [i for numbers in compared.values() for i in numbers]
    vectors: dict[int, torch.Tensor] = {}
    latents: dict[int, torch.Tensor] = {}
    with tqdm(total=len(chosen), unit="image", dynamic_ncols=True, disable=None) as bar:
        for places in batches([pictures[i] for i in chosen]):
            numbers = [chosen[place] for place in places]
            images = load([pictures[i] for i in numbers])
            vectors.update(zip(numbers, features(images), strict=True))
            if encoder is not None:
                latents.update(zip(numbers, encoder(images), strict=True))
            bar.update(len(numbers))

    def measured(numbers: list[int]) -> dict[str, float]:
        own = None if encoder is None else torch.stack([latents[i] for i in numbers])
        return diversity.measure(features=torch.stack([vectors[i] for i in numbers]), latents=own)

    groups = {prompt: {"images": len(numbers), **measured(numbers)} for prompt, numbers in compared.items()}
    tables = {p: diversity.cosine_distances(torch.stack([vectors[i] for i in own])) for p, own in compared.items()}
    return groups, {prompt: table.numpy() for prompt, table in tables.items()}


def limit_table(
    pictures: Sequence[Picture], scores: Mapping[str, np.ndarray], distances: Mapping[str, np.ndarray]
) -> str:
    """Points of the limit if the pictures are the base's, by the first score; see `limit`."""
    name, values = next(iter(scores.items()))
    numbers = by_prompt(pictures)
    # Two pictures are one pair, whose distance no tilt changes.
    distances = {prompt: table for prompt, table in distances.items() if len(table) > 2}
    if not distances:
        return "the limit: no prompt has three pictures, and the distance of two does not change with their weights"
    curve = limit.Front.of(list(distances), [values[numbers[p]] for p in distances], list(distances.values()))
    if curve.flat:
        return "the limit: the pictures of every prompt are alike, so there is no diversity to lose"
    rows = [dict(zip(limit.POINTS_HEAD, cells, strict=True)) for cells in limit.point_rows(curve)]
    lines = [f"the limit of training by {name}, if these are the base's pictures:", _columns(rows[0])]
    return "\n".join([*lines, *(_columns(row, "") for row in rows)])


def text_table(
    pictures: Sequence[Picture], scores: Mapping[str, np.ndarray], groups: Mapping[str, Mapping[str, float]]
) -> str:
    """The table that is printed: a line per picture, their mean, and the diversity per prompt."""
    parts = [_scores_table(pictures, scores)] if scores else []
    return "\n\n".join([*parts, _diversity_table(groups)] if groups else parts)


def _scores_table(pictures: Sequence[Picture], scores: Mapping[str, np.ndarray]) -> str:
    width = min(40, max(len(picture.path.name) for picture in pictures))
    lines = [f"{'file':{width}}  {_columns(scores)}  prompt"]
    for i, picture in enumerate(pictures):
        row = _columns({name: values[i] for name, values in scores.items()}, ".4f")
        lines.append(f"{one_line(picture.path.name, width):{width}}  {row}  {one_line(picture.prompt, 50)}")
    means = _columns({name: values.mean() for name, values in scores.items()}, ".4f")
    return "\n".join([*lines, f"{f'mean of {len(pictures)}':{width}}  {means}"])


def _diversity_table(groups: Mapping[str, Mapping[str, float]]) -> str:
    values = {prompt: {k: v for k, v in group.items() if k != "images"} for prompt, group in groups.items()}
    names = list(next(iter(values.values())))
    lines = [f"images  {_columns(dict.fromkeys(names, 0))}  prompt"]
    for prompt, own in values.items():
        lines.append(f"{groups[prompt]['images']:>6}  {_columns(own, '.4f')}  {one_line(prompt, 50)}")
    if len(values) > 1:
        means = {name: float(np.mean([own[name] for own in values.values()])) for name in names}
        lines.append(f"{'mean':>6}  {_columns(means, '.4f')}  of {len(values)} prompts")
    return "\n".join(lines)


def _columns(values: Mapping[str, Any], form: str | None = None) -> str:
    """A column per name, wide enough for it: the values in a format, or without a format the names themselves."""
    cells = [(name if form is None else f"{value:{form}}", max(len(name), 8)) for name, value in values.items()]
    return "  ".join(f"{cell:>{width}}" for cell, width in cells)


def write(
    path: Path, pictures: Sequence[Picture], scores: Mapping[str, np.ndarray], groups: Mapping[str, Mapping[str, float]]
) -> None:
    """Writes a .json with everything, or a .csv with a line per picture that repeats its prompt's diversity."""
    measures = [name for name in next(iter(groups.values()), {}) if name != "images"]
    rows = [
        {
            "file": str(picture.path),
            "prompt": picture.prompt,
            **{name: float(scores[name][i]) for name in scores},
            # A prompt's only picture has no diversity.
            **{name: groups.get(picture.prompt, {}).get(name, "") for name in measures},
        }
        for i, picture in enumerate(pictures)
    ]
    if path.suffix == ".json":
        means = {name: float(values.mean()) for name, values in scores.items()}
        write_text(path, json.dumps({"images": rows, "mean": means, "diversity": groups}, indent=2) + "\n")
        return
    # A file name need not be UTF-8.
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
