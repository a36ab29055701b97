"""`fetch`: downloads scorers, models and published prompt lists, and checks the files."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..hub import git_blob, verify
from ..settings.errors import ConfigError, suggest
from .flags import command_parser, path_flag

RAW = "https://raw.githubusercontent.com"

HUB_LISTS = "zhwang/HPDv2"

#: The largest download from GitHub that is accepted, in bytes. The largest list has about 15 million.
MOST = 50_000_000

SECONDS = 60


@dataclass(frozen=True)
class GitFile:
    """A file of a GitHub repository at a commit. blob: its git object id, which is a hash of the contents."""

    repository: str
    commit: str
    path: str
    blob: str

    @property
    def url(self) -> str:
        return f"{RAW}/{self.repository}/{self.commit}/{self.path}"


_FLOW_GRPO = ("yifan123/flow_grpo", "ac4c86e8cae021841f1fde853d340e0db67690dd")

#: {list: {file to write: its source}}. The hub has HPDv2's test prompts in one file per style.
PROMPTS: dict[str, dict[str, GitFile | tuple[str, ...]]] = {
    "drawbench": {
        "drawbench.txt": GitFile(
            "nousr/dream-bench",
            "0b39627b19c2297403de90878208daf15c8ac0ee",
            "prompts/drawbench.json",
            "2676d67498985bf513ab567ad02c96f989da2af7",
        )
    },
    "hpdv2": {
        "hpdv2-train.txt": GitFile(
            "XueZeyue/DanceGRPO",
            "15cc71d53cc2e6e18a68ee607d5fb6ba9a99e344",
            "assets/prompts.txt",
            "b47234e475645222ca9a0bb7742ebf4d08123855",
        ),
        "hpdv2-test.txt": tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
    },
    "geneval": {
        "geneval-train.jsonl": GitFile(
            *_FLOW_GRPO, "dataset/geneval/train_metadata.jsonl", "0b97e8a6802c08fc7537cd00c76ae79c851bddcb"
        ),
        "geneval-test.jsonl": GitFile(
            "djghosh13/geneval",
            "af4902f24d3ca90ebbb446dd9891a59e0f82725f",
            "prompts/evaluation_metadata.jsonl",
            "efc21c7e639cd45554a1e44fac87157211f16d51",
        ),
    },
    "ocr": {
        "ocr-train.txt": GitFile(*_FLOW_GRPO, "dataset/ocr/train.txt", "3ce0521b77b0a9031191d66ecc36ebaaf27a3922"),
        "ocr-test.txt": GitFile(*_FLOW_GRPO, "dataset/ocr/test.txt", "8deb4f8d8f2e863f45353354243669b3c991a6a2"),
    },
    "pickapic": {
        "pickapic-train.txt": GitFile(
            *_FLOW_GRPO, "dataset/pickscore/train.txt", "a437bd921c03fbc00c4e7ce148ae2d28fcd6e49b"
        ),
        "pickapic-test.txt": GitFile(
            *_FLOW_GRPO, "dataset/pickscore/test.txt", "45f05231b969fb5f74c8debd606b22cd3be27f8e"
        ),
    },
}


def fetch_prompts(name: str, folder: Path) -> list[Path]:
    """Writes the files of a prompt list into a folder.

    Raises:
        ConfigError: the list is not known, or a file cannot be downloaded or has another hash.
    """
    if name not in PROMPTS:
        raise ConfigError(f"unknown prompt list {name}{suggest(name, PROMPTS)} (known: {', '.join(PROMPTS)})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output-dir {folder} cannot be created ({error.strerror}): give another folder") from None
    written = []
    for file, source in PROMPTS[name].items():
        content = _from_github(source) if isinstance(source, GitFile) else _from_hub(source)
        path = folder / file
        temporary = path.with_name(f".{file}")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ConfigError(f"{path} cannot be written ({error.strerror}): give another --output-dir") from None
        written.append(path)
    return written


def _from_github(source: GitFile) -> bytes:
    try:
        with urllib.request.urlopen(source.url, timeout=SECONDS) as reply:
            content = reply.read(MOST + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ConfigError(
            f"{source.url} cannot be downloaded ({error}): get it elsewhere and give --prompts FILE"
        ) from None
    if git_blob(content) != source.blob:
        raise ConfigError(
            f"{source.url} is not the expected file (git object {source.blob}): check for a proxy that changes it"
        )
    return _lines(json.loads(content)) if source.path.endswith(".json") else content


def _from_hub(files: Sequence[str]) -> bytes:
    from ..hub import hub_file

    prompts: list[str] = []
    for file in files:
        path = hub_file("the list", HUB_LISTS, file, "--prompts FILE", "dataset")
        verify(path)
        prompts += json.loads(path.read_text(encoding="utf-8"))
    return _lines(prompts)


def _lines(prompts: Sequence[str]) -> bytes:
    return "".join(f"{' '.join(prompt.split())}\n" for prompt in prompts).encode()


def fetch_reward(name: str) -> list[tuple[Path, str | None]]:
    """Downloads a scorer's files to the hub cache: (file, kind of hash that was checked) for each. Raises ConfigError."""
    from ..hub import hub_file
    from ..rewards import find

    found = find(name)
    if found.WEIGHTS == "server":
        raise ConfigError(f"reward {name} runs on another machine: run `fetch` there")
    files = [(repository, file) for repository, names in found.SOURCES for file in names]
    paths = [hub_file(f"reward {name}", repository, file, f"--reward-models {name}=PATH") for repository, file in files]
    return [(path, verify(path)) for path in paths]


def fetch_all(
    rewards: Sequence[str], prompts: Sequence[str], models: Sequence[str], features: str | None, folder: Path
) -> int:
    """Runs `python -m tmpo_trainer fetch`. Returns the exit code. Raises ConfigError."""
    from ..backbones import check_model

    if features is not None:
        from ..evaluation.features import EfficientNetLite, check_features

        check_features(features)
        if features == EfficientNetLite.name:
            raise ConfigError(f"features {features} come with a package: nothing to fetch")
    for name in prompts:
        for path in fetch_prompts(name, folder):
            count = sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
            print(f"{path}: {count} prompts, use --prompts {path} or --eval-prompts {path}")
    for name in rewards:
        found = fetch_reward(name)
        for path, checked in found:
            print(f"reward {name}: {path.name}, {path.stat().st_size / 1e6:.1f} MB, {checked or 'nothing'} checked")
        if not found:
            print(f"reward {name}: has no weights to fetch")
    for model in models:
        print(f"model {model}: {check_model(model)}")
    if features is not None:
        from ..evaluation.features import FILES
        from ..hub import hub_file

        for file in FILES:
            path = hub_file("features", features, file, "--features FOLDER")
            print(
                f"features {features}: {path.name}, {path.stat().st_size / 1e6:.1f} MB, {verify(path) or 'nothing'} checked"
            )
    return 0


def command(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code."""
    parser = command_parser(
        "fetch",
        "Downloads scorers and models to the hub cache (HF_HOME) and published prompt lists to a folder, and checks their "
        "hashes.",
    )
    parser.add_argument("--reward", nargs="+", default=[], metavar="NAME", help="scorers to download")
    parser.add_argument("--prompts", nargs="+", default=[], metavar="NAME", help=f"lists: {', '.join(PROMPTS)}")
    parser.add_argument("--model", nargs="+", default=[], metavar="ID", help="models to train, e.g. owner/name")
    parser.add_argument("--features", metavar="ID", help="a DINOv2 model for diversity, e.g. facebook/dinov2-large")
    parser.add_argument(
        "--output-dir", type=path_flag, default=Path("prompts"), help="folder for prompt lists [prompts]"
    )
    namespace = parser.parse_args(arguments)
    if not (namespace.reward or namespace.prompts or namespace.model or namespace.features):
        raise ConfigError("fetch has nothing to do: give --reward, --prompts, --model or --features")
    return fetch_all(namespace.reward, namespace.prompts, namespace.model, namespace.features, namespace.output_dir)
