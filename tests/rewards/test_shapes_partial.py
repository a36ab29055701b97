"""The partial score of the demo domain as a reward of its own."""

from __future__ import annotations

import numpy as np
import torch

from tmpo_trainer.demo import domain
from tmpo_trainer.demo.domain import Object
from tmpo_trainer.rewards import default_prompts, load_scorer, shapes, variants

GREY = np.array([0.5, 0.52, 0.48])


def test_it_is_the_partial_score_by_its_own_name() -> None:
    image = domain.draw([Object(30.0, 30.0, 10.0, "red", "circle")], GREY)[None]
    scorer = load_scorer("shapes-partial")
    assert scorer.name == "shapes-partial"
    assert scorer.score(image, ["two red circles"]).tolist() == [0.75]
    assert load_scorer("shapes").score(image, ["two red circles"]).tolist() == [0.0]


def test_a_report_shows_both_scores_of_either_reward() -> None:
    image = domain.draw([Object(30.0, 30.0, 10.0, "red", "circle")], GREY)[None]
    for name in ("shapes", "shapes-partial"):
        found = {label: part.score(image, ["two red circles"]) for label, part in variants(load_scorer(name))}
        assert found == {"shapes strict": torch.tensor([0.0]), "shapes partial": torch.tensor([0.75])}
        # The first one is what the run is trained for, and so what a report's verdict and limit are about.
        assert next(iter(found)) == ("shapes strict" if name == "shapes" else "shapes partial")


def test_it_has_the_prompts_of_shapes() -> None:
    prompts = default_prompts(["shapes-partial"], "heldout")
    assert prompts is not None and len(prompts.texts) == 60
    assert prompts == shapes.default_prompts("heldout")
