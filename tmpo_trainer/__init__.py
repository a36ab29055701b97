"""TMPO: reward alignment of flow-matching image models by tree rollouts and Softmax Trajectory Balance."""

__version__ = "0.1.0"
