"""Configuration: what a recipe may say, how it is read, and which contradictions are refused. Torch-free."""

from accord.config.load import load_recipe, recipe_from
from accord.config.offline import (
    MARGIN_FREE,
    DPOConfig,
    ILQLConfig,
    KTOConfig,
    ORPOConfig,
    PairLoss,
    RewardConfig,
    SFTConfig,
)
from accord.config.online import (
    BestOfNConfig,
    GRPOConfig,
    OnlineDPOConfig,
    PolicyGradientFields,
    PPOConfig,
    REINFORCEConfig,
    RFTConfig,
    RLOOConfig,
    RolloutFields,
    SamplingFields,
)
from accord.config.recipe import EvaluateConfig, Recipe
from accord.config.sections import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OfflineFields,
    OptimiserFields,
    ScratchConfig,
    Section,
    Source,
)

__all__ = [
    "MARGIN_FREE",
    "AdapterConfig",
    "BestOfNConfig",
    "DPOConfig",
    "DataConfig",
    "EvaluateConfig",
    "GRPOConfig",
    "ILQLConfig",
    "KTOConfig",
    "ModelConfig",
    "ORPOConfig",
    "OfflineFields",
    "OnlineDPOConfig",
    "OptimiserFields",
    "PPOConfig",
    "PairLoss",
    "PolicyGradientFields",
    "REINFORCEConfig",
    "RFTConfig",
    "RLOOConfig",
    "Recipe",
    "RewardConfig",
    "RolloutFields",
    "SFTConfig",
    "SamplingFields",
    "ScratchConfig",
    "Section",
    "Source",
    "load_recipe",
    "recipe_from",
]
