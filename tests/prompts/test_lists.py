"""Our own prompts: lists that come with the package, generated ones, prompt files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tmpo_trainer.prompts import compositional, rendering
from tmpo_trainer.prompts.lists import PromptList, about, drawn, prompt_index, read_prompts
from tmpo_trainer.rewards import check_prompts, default_prompts
from tmpo_trainer.settings.errors import ConfigError

PREFERENCE = ("pickscore", "hpsv2", "imagereward", "clipscore")


def words(prompt: str) -> frozenset[str]:
    return frozenset("".join(c if c.isalnum() else " " for c in prompt.lower()).split())


def test_preference_prompts_are_many_varied_and_held_out_ones_are_others() -> None:
    train, heldout = (default_prompts(["pickscore"], split) for split in ("train", "heldout"))
    assert train is not None and heldout is not None
    assert len(train.texts) >= 500 and len(heldout.texts) >= 100
    everything = [words(prompt) for prompt in train.texts + heldout.texts]
    assert len(set(everything)) == len(everything)
    nearest = max(len(a & b) / len(a | b) for i, a in enumerate(everything) for b in everything[:i] if len(a & b) > 2)
    assert nearest < 0.6
    lengths = sorted(len(prompt.split()) for prompt in train.texts)
    assert lengths[0] <= 5 and lengths[-1] >= 35


@pytest.mark.parametrize("reward", PREFERENCE)
def test_every_preference_reward_has_prompts(reward: str) -> None:
    assert default_prompts([reward], "train") == default_prompts(list(PREFERENCE), "train")


def test_rewards_without_a_list_in_common() -> None:
    assert default_prompts(["remote"], "train") is None
    assert default_prompts(["remote-a", "remote-b"], "train") is None
    assert default_prompts(["geneval", "ocr"], "train") is None
    assert default_prompts(["geneval", "shapes-partial"], "train") is None
    assert default_prompts(["shapes", "shapes-partial", "sharpness"], "train") == default_prompts(["shapes"], "train")
    # A remote one takes what the others have.
    assert default_prompts(["shapes", "remote"], "train") == default_prompts(["shapes"], "train")
    assert default_prompts(["hpsv2", "geneval"], "heldout") == default_prompts(["geneval"], "heldout")


@pytest.mark.parametrize("reward", ["geneval", "ocr"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_generated_prompts_can_be_scored(reward: str, split: compositional.Split) -> None:
    prompts = default_prompts([reward], split)
    assert prompts is not None
    assert len(set(prompts.texts)) == len(prompts.texts) == {"train": 1500, "heldout": 240}[split]
    check_prompts([reward], prompts)
    assert set(prompts.metadata) == set(prompts.texts)


def test_scenes_of_the_splits_are_disjoint_whatever_the_seed() -> None:
    train = {compositional.scene(entry) for seed in range(3) for entry in compositional.generate("train", 2000, seed)}
    heldout = {
        compositional.scene(entry) for seed in range(3) for entry in compositional.generate("heldout", 240, seed)
    }
    assert not train & heldout and len(train) > 2000 and len(heldout) > 200
    assert compositional.generate("train", 50, 0) != compositional.generate("train", 50, 1)
    assert compositional.generate("train", 50, 0) == compositional.generate("train", 2000, 0)[:50]


def test_texts_of_the_splits_are_disjoint() -> None:
    train = {entry["target"].lower() for seed in range(3) for entry in rendering.generate("train", 3000, seed)}
    heldout = {entry["target"].lower() for seed in range(3) for entry in rendering.generate("heldout", 300, seed)}
    assert not train & heldout and len(train) > 1500 and len(heldout) > 200
    for entry in rendering.generate("train", 300):
        assert f'"{entry["target"]}"' in entry["prompt"] and entry["prompt"].count('"') == 2


def test_shares_of_the_tags() -> None:
    heldout = Counter(entry["tag"] for entry in compositional.generate("heldout", 60))
    assert set(heldout.values()) == {10} and set(heldout) == set(compositional.SHARES["heldout"])
    train = Counter(entry["tag"] for entry in compositional.generate("train", 2200))
    assert train == {tag: 100 * share for tag, share in compositional.SHARES["train"].items()}


def test_words_say_what_the_metadata_says() -> None:
    """Read back from the words: count, colour, place, class."""
    names = sorted(compositional.CLASSES, key=len, reverse=True)
    plurals = {compositional.plural(name): name for name in names}
    numbers = {"two": 2, "three": 3, "four": 4}

    def read(phrase: str) -> dict[str, object]:
        first, _, rest = phrase.partition(" ")
        if first in numbers:
            return {"class": plurals[rest], "count": numbers[first]}
        assert first == ("an" if rest[0] in "aeiou" else "a")
        colour, _, name = rest.partition(" ")
        return {"class": name, "count": 1, "color": colour} if colour in compositional.COLORS and name in names else {
            "class": rest, "count": 1
        }  # fmt: skip

    entries = compositional.generate("train", 1500) + compositional.generate("heldout", 240)
    for entry in entries:
        (phrase,) = {
            entry["prompt"].removeprefix(before).removesuffix(after)
            for before, _, after in (frame.partition("{}") for frame in compositional.FRAMES[::-1])
            if entry["prompt"].startswith(before) and entry["prompt"].endswith(after) and (before or after)
        } or {entry["prompt"]}
        word = next((w for w in ("left of", "right of", "above", "below") if f" {w} " in phrase), None)
        joint = f" {word} " if word else " and "
        parts = [read(part) for part in phrase.split(joint)]
        if word:
            parts = [parts[1], {**parts[0], "position": [word, 0]}]
        assert entry["include"] == parts
        counted = [item for item in entry["include"] if item["count"] > 1]
        assert entry.get("exclude", []) == [{"class": item["class"], "count": item["count"] + 1} for item in counted]


def test_generated_prompts_need_no_rewards() -> None:
    """Nor torch, which the packages above bring along."""
    code = "import sys; import tmpo_trainer.prompts.compositional; print(*{'torch', 'tmpo_trainer.rewards'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_equal_scenes_in_other_words() -> None:
    a, b = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
    scene = compositional.scene
    assert scene({"include": [a, b]}) == scene({"include": [b, a]})
    left = {"include": [b, {**a, "position": ["left of", 0]}]}
    assert scene(left) == scene({"include": [a, {**b, "position": ["right of", 0]}]})
    assert scene(left) != scene({"include": [a, {**b, "position": ["left of", 0]}]})
    assert scene({"include": [{**a, "color": "red"}]}) != scene({"include": [a]})


def test_scenes_can_be_left_out_and_run_out() -> None:
    first = compositional.generate("heldout", 60)
    second = compositional.generate("heldout", 60, exclude=first)
    assert not {compositional.scene(e) for e in first} & {compositional.scene(e) for e in second}
    with pytest.raises(ValueError, match="fewer than 5000 heldout prompts: single_object"):
        compositional.generate("heldout", 5000)
    with pytest.raises(ValueError, match="at most"):
        rendering.generate("heldout", 10**6)


def test_a_jsonl_file(tmp_path: Path) -> None:
    lines = [{"prompt": " a sign ", "target": "open"}, {"prompt": "a dog"}, {"prompt": "a sign", "target": "open"}]
    path = tmp_path / "list.jsonl"
    path.write_text("\ufeff# comment\n\n" + "\n".join(json.dumps(line) for line in lines))
    found = read_prompts(path)
    assert found == PromptList(str(path), ["a sign", "a dog", "a sign"], {"a sign": {"target": "open"}})
    assert about(found.metadata, ["a dog", "a sign"]) == [None, {"target": "open"}]
    assert about({}, ["a dog"]) is None
    assert found.first(2).texts == ["a sign", "a dog"]


def test_lines_end_where_lines_end(tmp_path: Path) -> None:
    """Not at the other marks that Unicode knows."""
    (tmp_path / "a.txt").write_text("one\u0085two\r\nthree\n")
    assert read_prompts(tmp_path / "a.txt").texts == ["one\u0085two", "three"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False))
    assert read_prompts(tmp_path / "a.jsonl").texts == ["one\u2028two"]
    for line in ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "[" * 100_000, '{"prompt": "\\ud800"}'):
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(ConfigError, match=r"a\.jsonl, line 1"):
            read_prompts(tmp_path / "a.jsonl")


def read(folder: Path, name: str, content: str | bytes) -> PromptList:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read_prompts(path)
    assert found.where == str(path)
    return found


@pytest.mark.parametrize(
    ("name", "content", "metadata"),
    [
        ("a.json", '[\n "a red circle, shiny",\n "two dogs"\n]', {}),
        ("a.json", '[{"prompt": "a red circle, shiny", "tag": [1]}, {"prompt": "two dogs"}]', {"tag": [1]}),
        ("a.csv", 'prompt,tag\n"a red circle, shiny",shapes\ntwo dogs,\n', {"tag": "shapes"}),
        ("a.csv", '\ufeffPrompts,Category\r\n"a red circle, shiny",Colors\r\n\r\n two dogs \r\n', {"Category": "Colors"}),
        ("a.CSV", ',id,PROMPT\n0,,"a red circle, shiny"\n1,,two dogs\n', {}),
        ("a.tsv", "Prompt\tCategory\na red circle, shiny\tAbstract\ntwo dogs\t\n", {"Category": "Abstract"}),
        ("prompts", "a red circle, shiny\n# no\ntwo dogs", {}),
        ("prompts-2.1", "a red circle, shiny\ntwo dogs", {}),
        ("a.txt", "a red circle, shiny\rtwo dogs\r", {}),
    ],
)  # fmt: skip
def test_kinds_of_prompt_files(tmp_path: Path, name: str, content: str, metadata: dict[str, object]) -> None:
    found = read(tmp_path, name, content)
    assert found.texts == ["a red circle, shiny", "two dogs"]
    assert found.metadata == ({found.texts[0]: metadata} if metadata else {})


def test_quotes_and_lines_of_a_table_and_what_a_text_may_begin_with(tmp_path: Path) -> None:
    table = 'prompt,target\n"a sign, ""OPEN""",OPEN\n"two\nlines",\na "b" c,\n'
    assert read(tmp_path, "a.csv", table).texts == ['a sign, "OPEN"', "two\nlines", 'a "b" c']
    texts = [
        "[photo] a dog",
        "{{dog}}, red",
        '["Hello World" sign on a door]',
        "{a|b} cat",
        "a prompt, please",
        "شكرا \u200f",
        "a\tb",
    ]
    assert read(tmp_path, "a.txt", "\n".join(texts)).texts == texts


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.yaml", "- a", "a.yaml: .yaml is not read, give a .txt, .jsonl, .json, .csv or .tsv"),
        ("a.txt", '# list\n[\n "a"]', "line 2: this is JSON: name the file .json"),
        ("a.txt", '[{"prompt": "a"}]', "line 1: this is JSON"),
        ("a.txt", '{"prompt": "a"}\n', ".jsonl if every line is an object"),
        ("a.txt", "Prompts,Category\na,b", "line 1: this is the first line of a table: name the file .csv"),
        ("a", '"id"\t"prompt"\n1\ta', "name the file .tsv"),
        ("a.json", '{"prompts": ["a"]}', 'line 1: write a list of prompts or of objects with a "prompt"'),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', "line 2: not JSON (Extra data, is it a .jsonl?)"),
        ("a.json", '["a", 3]', 'item 2: write an object with a "prompt"'),
        ("a.json", "[" * 100_000, "line 1: not JSON"),
        ("a.json", "[]", "is empty"),
        ("a.jsonl", '{"prompt": "a", "n": 1}\n{"prompt": "a", "n": 2}', "line 2: 'a' already has other metadata"),
        ("a.csv", "text,tag\na,b", "line 1: name one column `prompt` and no two alike, not text, tag"),
        ("a.csv", "prompt,Prompts\na,b", "name one column `prompt`"),
        ("a.csv", "prompt,tag,tag\na,b,c", "no two alike"),
        ("a.csv", "prompt,tag\na, b,c", "line 2: 3 cells for 2 columns: put text with a separator in quotes"),
        ("a.csv", "prompt,tag\n,c", "line 2: the prompt is empty"),
        ("a.csv", 'prompt\n"a" b\n', "line 2: ',' expected after"),
        ("a.csv", 'prompt\n"a\n', "unexpected end of data"),
        ("a.csv", "prompt,tag\n", "is empty"),
        ("a.txt", "a\nb".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        ("a.csv", "prompt\nb".encode("utf-16-le"), "it has NUL characters, so it is UTF-16 or no text at all"),
        ("a.txt", "a\nein Würfel".encode("latin-1"), "byte 0xfc in line 2 is not UTF-8"),
        ("a.txt", "a\n\x1b[31mb", "line 2: the character U+001B is not text: remove it"),
        ("a.json", '["a", "\\ud800"]', "item 2: the character U+D800"),
        ("a.txt", "a\n" + "b" * 400_000, "line 2: a prompt of 400000 characters: at most 10000"),
        ("a.csv", "c" * 400_000 + "\nb", "line 1: field larger than field limit"),
        ("a.csv", "c, " * 40_000 + "\nb", "line 1: name one column"),
        ("a.jsonl", '{"prompt": "' + "d" * 9000 + '"}\n{"prompt": "' + "d" * 9000 + '", "n": 1}', "has other metadata"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_is_no_prompt_file_is_one_short_line(tmp_path: Path, name: str, content: str | bytes, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, name, content)
    said = str(caught.value).replace(str(tmp_path), "")
    assert told in said and said.startswith(f"prompt file /{name}") and "\n" not in said and len(said) < 300


def test_the_reward_names_the_prompt_it_cannot_score() -> None:
    with pytest.raises(ConfigError, match="list: prompt 'a dog' has no text to render"):
        check_prompts(["ocr"], PromptList("list", ['a "sign"', "a dog"]))
    with pytest.raises(ConfigError, match=r"list: .*'a dog'"):
        check_prompts(["pickscore", "shapes"], PromptList("list", ["a red circle", "a dog"]))


@pytest.mark.parametrize(("first", "last"), [(0, 5), (5, 9), (8, 23), (3, 1000), (4, 4)])
def test_drawn_prompts_are_those_of_the_training_order(first: int, last: int) -> None:
    prompts = [*"abcdefgh", "a"]
    expected = {prompts[prompt_index(i, 9, seed=3)] for i in range(first, last)}
    assert set(drawn(prompts, first, last, seed=3)) == expected


def test_a_prompt_with_the_name_of_a_column_is_no_table(tmp_path: Path) -> None:
    assert read(tmp_path, "a.txt", "photo, prompt, x\na dog").texts == ["photo, prompt, x", "a dog"]
    assert read(tmp_path, "a.txt", '["a cat" on a sign, night]').texts == ['["a cat" on a sign, night]']
