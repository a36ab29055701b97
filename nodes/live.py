"""What a page sees while a tree is sampled: all leaves in one picture on the sampler, and the tree growing in its Tree View."""

from __future__ import annotations

import base64
import io
import math
import time
from typing import Any

import comfy.utils
import latent_preview
import torch
from PIL import Image
from torch import Tensor

from ..tmpo_trainer.pictures import tree as tree_picture
from ..tmpo_trainer.tree import TreePlan
from .demo_model import DemoLatents

#: The event that Tree View listens to, see `web/tmpo_growing.js`.
EVENT = "tmpo.growing"
#: Pictures are sent at most every so many seconds. They may take this time at once, and this share of the time of sampling.
EVERY, AT_ONCE, SHARE = 0.1, 0.05, 0.01
#: Longest side of the pictures of Tree View's nodes, and the gap between those of the mosaic, in pixels.
SIDE, GAP = 96, 2
#: What a leaf looks like before the model has been asked about it.
NOTHING = (96, 96, 96)


def in_colour(x0: Tensor, latent_format: Any) -> Tensor | None:
    """ComfyUI's latent2rgb: the network's latents `[n, C, h, w]` (or with frames) -> `[n, h, w, 3]` in 0..1.

    Folded latents give larger pictures: FLUX.2's `[n, 2h, 2w, 3]`. None if the latent format has no linear map to colours.
    """
    if isinstance(latent_format, DemoLatents):
        return ((latent_format.rough(x0).movedim(1, -1) + 1) / 2).clamp(0, 1)
    if latent_format.latent_rgb_factors is None:
        return None
    # FLUX.2 folds 2x2 latents into one, and its map is for one of them. Older versions of ComfyUI lack the attribute.
    unfold = getattr(latent_format, "latent_rgb_factors_reshape", None)
    x0 = x0 if unfold is None else unfold(x0)
    x0 = x0[:, :, 0] if x0.dim() == 5 else x0
    factors = torch.tensor(latent_format.latent_rgb_factors, device=x0.device)
    if len(factors) != x0.shape[1]:
        # The map is for other latents. Only the preview is lost.
        return None
    bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0], device=x0.device)
    # In this order, the product is far faster on a CPU.
    colours = (factors.T @ x0.float().flatten(2)).unflatten(2, x0.shape[2:]).movedim(1, -1)
    return ((colours + bias + 1) / 2).clamp(0, 1).cpu()


def to_picture(image: Tensor) -> Image.Image:
    """`[h, w, 3]` in 0..1."""
    return Image.fromarray((255 * image).round().to(torch.uint8).numpy())


class Mosaic:
    """The leaves of a plan in one picture. Each has its own place, in the order of the tree; the size never changes.

    A node that is shared by several leaves stands at the places of all of them.
    """

    def __init__(self, plan: TreePlan, side: int):
        order = sorted((node for node in tree_picture.layout(plan) if node.leaf), key=lambda node: node.row)
        self.order, self.side = [node.index for node in order], side
        self.columns = math.ceil(len(order) ** 0.5)
        self.rows = math.ceil(len(order) / self.columns)
        self.picture: Image.Image | None = None

    def put(self, shown: Image.Image, row: int, width: int) -> None:
        """A node's picture in place of all its leaves. row: its row among the `width` nodes of its step."""
        tile = self.tile(shown)
        if self.picture is None:
            size = tuple(n * (t + GAP) - GAP for n, t in zip((self.columns, self.rows), tile, strict=True))
            self.picture = Image.new("RGB", (size[0], size[1]), NOTHING)
        small = shown.resize(tile, Image.Resampling.BICUBIC)
        for place, leaf in enumerate(self.order):
            # Tiled: the ancestor of leaf l is row l % width.
            if leaf % width == row:
                at = divmod(place, self.columns)
                self.picture.paste(small, (at[1] * (tile[0] + GAP), at[0] * (tile[1] + GAP)))

    def tile(self, shown: Image.Image) -> tuple[int, int]:
        room = self.side // max(self.columns, self.rows) - GAP
        scale = room / max(shown.size)
        return max(round(shown.width * scale), 1), max(round(shown.height * scale), 1)


class Live:
    """Progress in model evaluations with pictures of the predictions. A function of (nodes evaluated, nodes in all, x0).

    sigmas: of all steps. seed: the noise's. workflow: the id of the one that is run, if it has one.
    """

    def __init__(self, guider: Any, plan: TreePlan, sigmas: list[float], seed: int, workflow: str | None = None):
        self.plan, self.sigmas, self.seed = plan, sigmas, seed
        self.format = guider.model_patcher.model.latent_format
        self.previewer = latent_preview.get_previewer(guider.model_patcher.load_device, self.format)
        self.bar = comfy.utils.ProgressBar(plan.rollout_evaluations)
        self.mosaic = Mosaic(plan, latent_preview.MAX_PREVIEW_RESOLUTION)
        self.page = Page(plan, sigmas, seed, workflow) if listening() else None
        #: Predictions that were not shown yet: (step, first row, x0).
        self.waiting: list[tuple[int, int, Tensor]] = []
        self.start = time.perf_counter()
        self.last, self.spent = -math.inf, 0.0

    def __call__(self, done: int, total: int, x0: Tensor) -> None:
        if self.previewer is None and self.page is None:
            self.bar.update_absolute(done, total)
            return
        before, step = 0, 1
        while before + self.plan.widths[step - 1] < done:
            before += self.plan.widths[step - 1]
            step += 1
        complete = done == before + self.plan.widths[step - 1]
        # A whole step replaces what earlier ones have predicted for the same leaves, but for the nodes that Tree View shows.
        self.waiting = [each for each in self.waiting if not complete or each[0] in (step, *self.plan.fanout)]
        self.waiting.append((step, done - len(x0) - before, x0))
        now = time.perf_counter()
        soon = now < self.last + EVERY or self.spent > AT_ONCE + SHARE * (now - self.start)
        if soon and done < total:
            self.bar.update_absolute(done, total)
            return
        # Waits for the GPU, so that the model's time is not taken for that of the pictures.
        x0.flatten()[0].item()
        self.last = time.perf_counter()
        self.bar.update_absolute(done, total, self.show())
        self.spent += time.perf_counter() - self.last

    def show(self) -> Any:
        """Sends what waits to Tree View. Returns the picture for the sampler, None if the user wants no previews."""
        for step, first, x0 in self.waiting:
            for row, shown in enumerate(self.pictures(x0), first):
                if self.previewer is not None:
                    self.mosaic.put(shown, row, self.plan.widths[step - 1])
                if self.page is not None:
                    self.page.put(shown, step, row)
        self.waiting.clear()
        if self.page is not None:
            self.page.send()
        if self.mosaic.picture is None:
            return None
        # ComfyUI encodes it later, in another thread.
        return "JPEG", self.mosaic.picture.copy(), self.mosaic.side

    def pictures(self, x0: Tensor) -> list[Image.Image]:
        """One for each row, as the user's preview method shows them."""
        if self.previewer is not None and not isinstance(self.previewer, latent_preview.Latent2RGBPreviewer):
            # Previewers look only at the first row of a batch.
            found = [self.previewer.decode_latent_to_preview_image("JPEG", row[None]) for row in x0]
            # Previewers of other packs may show the pictures in their own way.
            return [each[1] for each in found if each is not None]
        colours = in_colour(x0, self.format)
        return [] if colours is None else [to_picture(image) for image in colours]


def listening() -> bool:
    """Whether a page waits for this prompt."""
    # Only a running server sets the hook: scripts and tests have none.
    if comfy.utils.PROGRESS_BAR_HOOK is None:
        return False
    from server import PromptServer

    return PromptServer.instance.client_id in PromptServer.instance.sockets


class Page:
    """Sends the tree to the page that has queued it: first its shape, then pictures of its nodes, by their ids there."""

    def __init__(self, plan: TreePlan, sigmas: list[float], seed: int, workflow: str | None):
        from server import PromptServer

        self.server, self.plan, self.workflow = PromptServer.instance, plan, workflow
        nodes = tree_picture.layout(plan)
        #: A node's id by the step at which its children part (None for leaves) and its row there.
        self.ids = {(node.step, node.index): i for i, node in enumerate(nodes) if node.column or node.leaf}
        self.aspect: float | None = None
        self.waiting: dict[int, str] = {}
        self.tree = {
            "seed": str(seed),
            "steps": plan.num_steps,
            "prompts": plan.trees,
            "rows": tree_picture.rows(plan),
            "columns": 2 + len(plan.fanout),
            "score": None,
            "best": None,
            "stars": [],
            "group": "latent",
            "growing": True,
        }
        common = [
            {
                "id": i,
                "parent": node.parent,
                "prompt": node.prompt,
                "column": node.column,
                "row": node.row,
                "path": [node.path[0] // plan.trees, *node.path[1:]] if node.path else [],
                "colours": {},
                "image": None,
            }
            for i, node in enumerate(nodes)
        ]
        both = list(zip(common, nodes, strict=True))
        self.tree["leaves"] = [{**c, "index": n.index, "scores": {}, "q": None} for c, n in both if n.leaf]
        self.tree["nodes"] = [
            {**c, "leaves": n.leaves, "step": n.step, "sigma": n.step and sigmas[n.step - 1], "mean": None}
            for c, n in both
            if not n.leaf
        ]

    def put(self, shown: Image.Image, step: int, row: int) -> None:
        """Until its branch step a node stands for the one that is evaluated there, and then for a leaf."""
        branch = next((each for each in self.plan.fanout if each >= step), None)
        self.aspect = shown.width / shown.height
        small = shown.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
        data = io.BytesIO()
        small.save(data, "JPEG", quality=85)
        self.waiting[self.ids[branch, row]] = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"

    def send(self) -> None:
        if not self.waiting:
            return
        message: dict[str, Any] = {
            "node": self.server.last_node_id,
            "workflow": self.workflow,
            "pictures": self.waiting,
        }
        if self.tree:
            message["tree"] = {**self.tree, "aspect": self.aspect}
        self.server.send_sync(EVENT, message, self.server.client_id)
        self.tree, self.waiting = {}, {}
