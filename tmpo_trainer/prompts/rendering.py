"""Prompts that ask for a text in the picture, for the `ocr` reward."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from .split import Split, side

CARRIERS = (
    'a wooden shop sign that reads "{}"', 'a chalkboard outside a cafe with "{}" written on it',
    'a neon sign saying "{}" above a door', 'a road sign with the words "{}"', 'a paperback whose cover says "{}"',
    'a birthday cake with "{}" in icing', 'a t-shirt printed with "{}"', 'a coffee mug that says "{}"',
    'a film poster titled "{}"', 'a newspaper with the headline "{}"', 'a delivery van with "{}" on its side',
    'a banner reading "{}" between two trees', 'an enamel badge with the text "{}"', 'a street wall painted with "{}"',
    'a brass plate engraved with "{}"', 'a tote bag with "{}" on it', 'a laptop screen that shows "{}"',
    'a postage stamp that says "{}"', 'a theatre marquee announcing "{}"', 'a jar with a handwritten label "{}"',
    'a train station board showing "{}"', 'a sandy beach with "{}" drawn in the sand', 'a hot air balloon with "{}" on it',
    'a school notebook with "{}" on the cover', 'a stone arch carved with "{}"', 'a paper ticket printed with "{}"',
    'a garden sign that reads "{}"', 'a lighthouse with "{}" painted around it', 'a fishing boat named "{}"',
    'a knitted scarf with the word pattern "{}"', 'a phone showing the message "{}"', 'a wine bottle labelled "{}"',
    'a cardboard box stamped "{}"', 'a museum plaque that says "{}"', 'a circus tent with "{}" over the entrance',
    'a skateboard deck with "{}" in bold letters', 'a greeting card that says "{}"', 'a record sleeve titled "{}"',
    'a sticky note with "{}" on a fridge', 'a scoreboard that displays "{}"',
)  # fmt: skip

SETTINGS = (
    "", ", soft morning light", ", at night", ", close-up photo", ", watercolour", ", in the rain", ", flat illustration",
    ", product photo on a plain background", ", shallow depth of field", ", seen from the front", ", vintage photo",
    ", 3D render",
)  # fmt: skip

PHRASES = (
    "Fresh Bread Daily", "No Parking", "Mind the Step", "Open Late", "Back in Five Minutes", "Sold Out", "Wet Paint",
    "Please Knock", "Last Stop", "Happy Birthday", "Good Morning", "Thank You", "Closed on Monday", "Push", "Pull", "Exit",
    "Welcome Home", "Lost and Found", "Keep Left", "Slow Down", "Beware of the Goose", "Free Soup", "Half Price", "Try Again",
    "Do Not Feed the Owls", "Best in Show", "Grand Opening", "Quiet Please", "Made by Hand", "Love Wins", "Time Flies",
    "The End", "To Be Continued", "Once Upon a Time", "Under New Management", "All Aboard", "Handle With Care", "This Side Up",
    "Out of Order", "Take a Number", "Pay Here", "Staff Only", "Ring the Bell", "Eat More Plums", "Dance Tonight",
    "Rain or Shine", "See You Soon", "Wish You Were Here", "Congratulations", "Ticket Office", "Swim at Your Own Risk",
    "Nothing Is Impossible", "Stay Curious", "Look Twice", "Catch of the Day", "Two for One", "Home Is Where the Cat Is",
    "Under the Same Moon", "Please Wait Here", "Ask Me Anything",
)  # fmt: skip

QUALITIES = (
    "Golden", "Silent", "Crooked", "Velvet", "Electric", "Wandering", "Hidden", "Crimson", "Frozen", "Little", "Northern",
    "Lucky", "Paper", "Midnight", "Rusty", "Gentle", "Hungry", "Summer", "Winter", "Broken", "Flying", "Honest", "Copper",
    "Salty", "Royal", "Sleepy", "Cosmic", "Green", "Marble", "Clever", "Distant", "Brave", "Hollow", "Sunny", "Wild",
)  # fmt: skip

THINGS = (
    "Lantern", "Harbour", "Garden", "Fox", "Anchor", "Orchard", "Kettle", "Comet", "Bridge", "Sparrow", "Library", "Mirror",
    "Station", "Whale", "Kitchen", "Meadow", "Clock", "Island", "Engine", "Thimble", "Canyon", "Rooster", "Bakery", "Piano",
    "Temple", "Otter", "Forest", "Compass", "Market", "Tiger", "Village", "Rocket", "Castle", "Pepper", "Violin", "Turtle",
    "Cellar", "Planet", "Ribbon", "Beacon",
)  # fmt: skip

PLACES = (
    "Room",
    "Gate",
    "Platform",
    "Route",
    "Floor",
    "Lane",
    "Studio",
    "Pier",
    "Terminal",
    "Dock",
    "Table",
    "Channel",
)

DEEDS = ("Save the", "Visit the", "Meet the", "Follow the", "Return of the", "Under the", "Voices of the", "Ask the")

#: How often a list takes from each kind of phrase.
SHARES = (2, 6, 2, 3)


def _phrases() -> tuple[list[str], ...]:
    return (
        list(PHRASES),
        [f"{quality} {thing}" for quality, thing in itertools.product(QUALITIES, THINGS)],
        [f"{place} {number}" for place, number in itertools.product(PLACES, range(2, 100, 3))],
        [f"{deed} {thing}" for deed, thing in itertools.product(DEEDS, THINGS)],
    )


def generate(split: Split, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different prompts of one split with their `target`, as lines of a .jsonl file. Phrases repeat in other places."""
    generator = random.Random(f"{split}:{seed}")
    pools = [[phrase for phrase in kind if side(phrase.lower()) == split] for kind in _phrases()]
    streams = [_endless(pool, generator) for pool in pools]
    places = [(carrier, setting) for carrier in CARRIERS for setting in SETTINGS]
    most = len(places) * min(len(pool) for pool in pools)
    if count > most:
        raise ValueError(f"there are at most {most} different {split} prompts")
    seen: set[str] = set()
    entries = []
    kinds = [kind for kind, share in enumerate(SHARES) for _ in range(share)]
    while len(entries) < count:
        phrase = next(streams[kinds[len(entries) % len(kinds)]])
        carrier, setting = generator.choice(places)
        prompt = carrier.format(phrase) + setting
        if prompt not in seen:
            seen.add(prompt)
            entries.append({"prompt": prompt, "target": phrase})
    return entries


def _endless(pool: list[str], generator: random.Random) -> Iterator[str]:
    while True:
        yield from generator.sample(pool, len(pool))
