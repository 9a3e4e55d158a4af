"""Configuration: what a recipe may say, how it is read, and which contradictions are refused. Torch-free."""

from accord.config.guards import GuardName, GuardsConfig
from accord.config.load import load_recipe, recipe_from
from accord.config.loop import LoopConfig
from accord.config.offline import (
    MARGIN_FREE,
    DPOConfig,
    ILQLConfig,
    KTOConfig,
    ORPOConfig,
    PairLoss,
    RewardConfig,
    RougeConfig,
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
    TokenKLFields,
)
from accord.config.recipe import EvaluateConfig, Recipe
from accord.config.rewards import EndpointConfig, JudgeConfig, ScorerConfig, ShapingConfig, run_identity
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
    "EndpointConfig",
    "EvaluateConfig",
    "GRPOConfig",
    "GuardName",
    "GuardsConfig",
    "ILQLConfig",
    "JudgeConfig",
    "KTOConfig",
    "LoopConfig",
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
    "RougeConfig",
    "SFTConfig",
    "SamplingFields",
    "ScorerConfig",
    "ScratchConfig",
    "Section",
    "ShapingConfig",
    "Source",
    "TokenKLFields",
    "load_recipe",
    "recipe_from",
    "run_identity",
]
