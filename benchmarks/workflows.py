"""Writes `workflows/api/`: each workflow in the form that scripts post to a running ComfyUI.

python -m benchmarks workflows http://127.0.0.1:8188
The server must have the pack and every node of the workflows. A test compares the files with what this command writes.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tmpo_trainer.settings.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "workflows"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
#: Nodes that the page draws and never queues.
NOTES = ("MarkdownNote",)


def as_prompt(workflow: dict[str, Any], info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A workflow as the page queues it: links by name, widgets' values by their order. info: the server's /object_info.

    Raises:
        ValueError: a node has more values than widgets, or a link joins sockets of different types.
    """
    links = {link[0]: link for link in workflow["links"]}
    kinds = {entry["id"]: entry["type"] for entry in workflow["nodes"]}
    prompt = {}
    for entry in workflow["nodes"]:
        if entry["type"] in NOTES:
            continue
        declared = info[entry["type"]]["input"]
        inputs: dict[str, Any] = {}
        values = iter(entry["widgets_values"])
        for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            options = spec[1] if len(spec) > 1 else {}
            if not (isinstance(spec[0], list) or spec[0] in WIDGETS) or options.get("forceInput"):
                continue
            # A workflow that is older than a widget has no value for it.
            inputs[name] = next(values, options.get("default"))
            # The page adds a widget of its own to seeds.
            if (name in ("seed", "noise_seed") or options.get("control_after_generate")) and next(values) not in (
                "fixed", "increment", "decrement", "randomize",
            ):  # fmt: skip
                raise ValueError(f"{entry['type']} has no control after generate behind {name}")
        if next(values, None) is not None:
            raise ValueError(f"{entry['type']} has more values than widgets")
        for slot in entry["inputs"]:
            if slot["link"] is not None:
                _, source, output, target, _, kind = links[slot["link"]]
                if target != entry["id"] or kind != info[kinds[source]]["output"][output]:
                    raise ValueError(f"{entry['type']}: the link into {slot['name']} has another type or target")
                inputs[slot["name"]] = [str(source), output]
        title = entry.get("title", info[entry["type"]]["display_name"])
        prompt[str(entry["id"])] = {"class_type": entry["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks workflows", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("url", help="of a running ComfyUI with this pack")
    url = parser.parse_args(arguments).url.rstrip("/")
    try:
        with urllib.request.urlopen(f"{url}/object_info", timeout=60) as reply:
            info = json.load(reply)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise ConfigError(f"{url} is not a ComfyUI: {error}") from None
    for path in sorted(FOLDER.glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        missing = {entry["type"] for entry in workflow["nodes"]} - info.keys() - set(NOTES)
        if missing:
            raise ConfigError(f"this ComfyUI has no node {', '.join(sorted(missing))}: use a newer one")
        text = json.dumps(as_prompt(workflow, info), indent=1, ensure_ascii=False)
        (FOLDER / "api" / path.name).write_text(text + "\n", encoding="utf-8")
    return 0
