"""Configuration: what a recipe may say, how it is read, and which contradictions are refused. Torch-free."""

from accord.config.load import load_recipe, recipe_from
from accord.config.sections import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimiserFields,
    PPOConfig,
    Recipe,
    RewardConfig,
    ScratchConfig,
    Section,
    SFTConfig,
    Source,
)

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "OptimiserFields",
    "PPOConfig",
    "Recipe",
    "RewardConfig",
    "SFTConfig",
    "ScratchConfig",
    "Section",
    "Source",
    "load_recipe",
    "recipe_from",
]
