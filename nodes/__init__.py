"""The trainer's ComfyUI nodes: sockets and schemas. `tmpo_trainer` does the computing."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .demo_model import DemoModelLoader
from .diversity import DiversityNode, SelectBranches
from .leaf import Leaf, LeafAdvanced
from .lora import Compare, LoadTmpoLora
from .pause import add_routes
from .sampling import BranchScheduleNode, TreeSamplerAdvanced, TreeSamplerNode, TreeSamplerObject
from .scoring import BoltzmannWeights, CombineScores, ScoreImages
from .share import SaveLeaves, TreeAnimation
from .training import Train, TrainingMonitor
from .tree_view import TreeView


class TmpoExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            DemoModelLoader,
            TreeSamplerNode,
            TreeSamplerAdvanced,
            TreeSamplerObject,
            Leaf,
            LeafAdvanced,
            BranchScheduleNode,
            ScoreImages,
            CombineScores,
            BoltzmannWeights,
            DiversityNode,
            SelectBranches,
            TreeView,
            SaveLeaves,
            TreeAnimation,
            LoadTmpoLora,
            Compare,
            Train,
            TrainingMonitor,
        ]


async def comfy_entrypoint() -> TmpoExtension:
    add_routes()
    return TmpoExtension()
