"""What options are called elsewhere, and here: for the errors about unknown keys, and docs/migrating.md.

A name of theirs is looked up with its section first (`method.target`, `ppo.batch_size`), then alone. Ours is a key of
the section it was written in, or a whole path.
"""

from __future__ import annotations

from types import MappingProxyType

__all__ = ["ABSENT", "RENAMED"]

_BATCHES = {
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "ppo.per_device_train_batch_size": "prompts_per_step",
    "ppo.batch_size": "prompts_per_step",
    "rollout_batch_size": "prompts_per_step",
    "mini_batch_size": "minibatches",
    "num_mini_batches": "minibatches",
    "ppo.train_batch_size": "minibatches",
    "gradient_accumulation_steps": "micro_batch_tokens",
    "local_rollout_forward_batch_size": "micro_batch_tokens",
    "forward_batch_size": "micro_batch_tokens",
    "micro_train_batch_size": "micro_batch_tokens",
    "micro_rollout_batch_size": "micro_batch_tokens",
    "train_max_tokens_per_gpu": "micro_batch_tokens",
    "rollout_max_tokens_per_gpu": "micro_batch_tokens",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "ppo_epochs": "update_epochs",
    "num_ppo_epochs": "update_epochs",
    "num_iterations": "update_epochs",
    "ppo.max_epochs": "update_epochs",
    "max_epochs": "epochs",
    "total_episodes": "episodes",
    "ppo.steps": "episodes",
    "num_generations": "samples_per_prompt",
    "n_samples_per_prompt": "samples_per_prompt",
    "num_samples": "samples_per_prompt",
    "num_sample_generations": "samples_every",
}

_OPTIMISER = {
    "optim": "optimiser",
    "lr": "learning_rate",
    "actor_learning_rate": "learning_rate",
    "critic_learning_rate": "value_learning_rate",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "warmup_ratio": "warmup_fraction",
    "lr_warmup_ratio": "warmup_fraction",
    "max_norm": "max_grad_norm",
    "l2": "weight_decay",
    "adam_betas": "adam_beta1",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "eval_steps": "eval_every",
}

_PPO = {
    "cliprange": "clip_range",
    "clip_ratio": "clip_range",
    "eps_clip": "clip_range",
    "epsilon": "clip_range",
    "cliprange_value": "value_clip_range",
    "value_clip": "value_clip_range",
    "cliprange_reward": "score_clip",
    "reward_clip_range": "score_clip",
    "init_kl_coef": "kl_coef",
    "target": "target_kl",
    "kl_target": "target_kl",
    "horizon": "kl_horizon",
    "use_kl_loss": "kl_in",
    "adap_kl_ctrl": "kl_controller",
    "early_stopping": "update_kl_stop",
    "kl_penalty": "kl_estimator",
    "lam": "gae_lambda",
    "lambd": "gae_lambda",
    "ent_coef": "entropy_coef",
    "entropy_loss_coef": "entropy_coef",
    "vf_coef": "ppo.value_coef",
    "freezing_actor_steps": "value_warmup",
    "scale_rewards": "advantage_scale",
    "response_length": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "generate_max_len": "max_new_tokens",
    "sft_model_path": "init",
    "reward_model_path": "reward_model",
    "reward_pretrain": "reward_model",
    "critic_pretrain": "value_init",
    "remote_rm_url": "scorers",
    "use_score_scaling": "ppo.shaping.running",
    "use_score_norm": "ppo.shaping.running",
    "normalize_reward": "ppo.shaping.running",
    "overlong_buffer_len": "ppo.shaping.overlong_buffer",
    "overlong_penalty_factor": "ppo.shaping.overlong_penalty",
}

_FIXED_DATA = {
    "center_rewards_coefficient": "centring_coef",
    "loss_type": "loss",
    "simpo_gamma": "target_margin",
    "gamma_beta_ratio": "target_margin",
    "rpo_alpha": "sft_coef",
    "cpo_alpha": "sft_coef",
    "lambda": "odds_ratio_coef",
    "lambda_": "odds_ratio_coef",
    "orpo.beta": "odds_ratio_coef",
    "awac_scale": "awac_coef",
    "cql_scale": "cql_coef",
    "steps_for_target_q_sync": "sync_every",
    "ilql.alpha": "target_rate",
}

_MODEL_AND_DATA = {
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "max_len": "data.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "prompt_max_len": "data.max_prompt_tokens",
    "prompt_data": "data.prompts",
    "query_dataset": "data.prompts",
    "pretrain_data": "data.ptx",
    "eval_dataset": "data.evaluation",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "pretrain": "model.path",
    "model.model_path": "model.path",
    "model.peft_config": "model.adapter",
    "load_in_4bit": "model.quantise",
    "bf16": "model.precision",
    "fp16": "model.precision",
    "dtype": "model.precision",
    "ds.param_dtype": "model.precision",
    "gradient_checkpointing": "model.activation_checkpointing",
    "torch_compile": "model.compile",
    "attn_implementation": "model.attention",
    "flash_attn": "model.attention",
    "use_flash_attention_2": "model.attention",
    "ds.attn_implementation": "model.attention",
    "num_shared_layers": "model.trainable_blocks",
    "model.num_layers_unfrozen": "model.trainable_blocks",
    "model.adapter.r": "rank",
    "model.adapter.lora_alpha": "alpha",
    "model.adapter.target_modules": "targets",
    "model.adapter.rank_pattern": "ranks",
    "model.adapter.use_dora": "kind",
    "lora_r": "model.adapter.rank",
    "lora_rank": "model.adapter.rank",
    "lora_alpha": "model.adapter.alpha",
    "lora_target_modules": "model.adapter.targets",
    "use_dora": "model.adapter.kind",
    "target_modules": "model.adapter.targets",
    "apply_chat_template": "model.template",
    "input_template": "model.template",
    "output_dir": "out",
    "save_path": "out",
}

_TRLX = {
    "method.ppo_epochs": "ppo.update_epochs",
    "method.num_rollouts": "ppo.prompts_per_step",
    "method.chunk_size": "ppo.micro_batch_tokens",
    "method.init_kl_coef": "ppo.kl_coef",
    "method.target": "ppo.target_kl",
    "method.horizon": "ppo.kl_horizon",
    "method.gamma": "ppo.gamma",
    "method.lam": "ppo.gae_lambda",
    "method.cliprange": "ppo.clip_range",
    "method.cliprange_value": "ppo.value_clip_range",
    "method.vf_coef": "ppo.value_coef",
    "method.cliprange_reward": "ppo.score_clip",
    "method.scale_reward": "ppo.shaping.running",
    "method.gen_kwargs.max_new_tokens": "ppo.max_new_tokens",
    "method.gen_kwargs.temperature": "ppo.temperature",
    "method.tau": "ilql.tau",
    "method.alpha": "ilql.target_rate",
    "method.beta": "ilql.awac_beta",
    "method.cql_scale": "ilql.cql_coef",
    "method.awac_scale": "ilql.awac_coef",
    "method.steps_for_target_q_sync": "ilql.sync_every",
    "optimizer.kwargs.lr": "ppo.learning_rate",
    "optimizer.kwargs.weight_decay": "ppo.weight_decay",
    "optimizer.kwargs.eps": "ppo.adam_epsilon",
    "scheduler.name": "ppo.schedule",
    "train.total_steps": "ppo.episodes",
    "train.epochs": "sft.epochs",
    "train.seq_length": "data.max_tokens",
    "train.batch_size": "ppo.minibatches",
    "train.minibatch_size": "ppo.micro_batch_tokens",
    "train.checkpoint_interval": "ppo.checkpoint_every",
    "train.eval_interval": "sft.eval_every",
    "train.checkpoint_dir": "out",
    "train.rollout_logging_dir": "ppo.samples_every",
    "train.seed": "seed",
}

_OPENRLHF = {
    "actor.model_name_or_path": "model.path",
    "reward.model_name_or_path": "ppo.reward_model",
    "critic.model_name_or_path": "ppo.value_init",
    "reward.remote_url": "ppo.scorers",
    "reward.normalize_enable": "ppo.shaping.running",
    "reward.clip_range": "ppo.score_clip",
    "actor.adam.lr": "ppo.learning_rate",
    "critic.adam.lr": "ppo.value_learning_rate",
    "actor.eps_clip": "ppo.clip_range",
    "actor.entropy_coef": "ppo.entropy_coef",
    "actor.freezing_steps": "ppo.value_warmup",
    "critic.value_clip": "ppo.value_clip_range",
    "algo.kl.init_coef": "ppo.kl_coef",
    "algo.kl.target": "ppo.target_kl",
    "algo.kl.horizon": "ppo.kl_horizon",
    "algo.kl.estimator": "ppo.kl_estimator",
    "algo.kl.use_loss": "ppo.kl_in",
    "algo.advantage.lambd": "ppo.gae_lambda",
    "algo.advantage.gamma": "ppo.gamma",
    "rollout.batch_size": "ppo.prompts_per_step",
    "rollout.n_samples_per_prompt": "ppo.samples_per_prompt",
    "rollout.max_new_tokens": "ppo.max_new_tokens",
    "rollout.temperature": "ppo.temperature",
    "rollout.max_tokens_per_gpu": "ppo.micro_batch_tokens",
    "train.max_epochs": "ppo.update_epochs",
    "train.num_episodes": "ppo.episodes",
    "train.max_tokens_per_gpu": "ppo.micro_batch_tokens",
    "data.prompt_dataset": "data.prompts",
    "data.max_len": "data.max_tokens",
    "data.apply_chat_template": "model.template",
    "eval.dataset": "data.evaluation",
    "ckpt.output_dir": "out",
    "ckpt.save_steps": "ppo.checkpoint_every",
    "ckpt.max_num": "ppo.keep_checkpoints",
    "ds.lora.rank": "model.adapter.rank",
    "ds.lora.alpha": "model.adapter.alpha",
    "ds.lora.target_modules": "model.adapter.targets",
}

RENAMED = MappingProxyType(_BATCHES | _OPTIMISER | _PPO | _FIXED_DATA | _MODEL_AND_DATA | _TRLX | _OPENRLHF)

_LOGS = "there is no such option: every step is in metrics.jsonl, and report.html needs no service"
_VALUE = "there is no such option: the value model has all its weights to itself, or none; see `value_trunk`"
_RESUME = "there is no such option: run the same command again, and it continues bit for bit"
_STOP = "there is no such option: an answer ends at the chat template's end of turn or the tokenizer's end token"
_ONE = "there is no such option: one process, and memory is set by `micro_batch_tokens`"
_WHITEN = "there is no such option: it changes what `kl_coef` means from step to step; advantages are whitened"

ABSENT = MappingProxyType(
    dict.fromkeys(
        ("logging_steps", "report_to", "log_with", "tracker_project_name", "use_wandb", "train.tracker"), _LOGS
    )
    | {"method.num_value_layers_unfrozen": _VALUE}
    | dict.fromkeys(
        ("resume_from_checkpoint", "train.resume_from_checkpoint", "load_checkpoint", "ckpt.load_enable"), _RESUME
    )
    | dict.fromkeys(("stop_token", "stop_token_id", "stop_sequences"), _STOP)
    | dict.fromkeys(("ds3_gather_for_generation", "zero_stage", "ds.zero_stage"), _ONE)
    | dict.fromkeys(("whiten_rewards",), _WHITEN)
    | {
        "ratio_threshold": "there is no such option: `update_kl_stop` ends the updates of a rollout that moved too far",
        "lora_dropout": "there is no such option: ratios of probabilities compare two passes, so dropout is off",
        "ref_adapter_name": "there is no such option: the reference is the model without its adapter",
        "push_to_hub": "there is no such option: nothing is uploaded; the `model` folder is in Hugging Face format",
        "save_value_network": "there is no such option: every checkpoint holds the value model",
        "method.two_qs": "there is no such option: ILQL always has two Q heads",
        "tokenizer.tokenizer_path": "there is no such option: the tokenizer lies in the model's folder",
        "tokenizer.padding_side": "there is no such option: padding is masked on either side",
        "advantage_estimator": "there is no such option: each method is a section, ppo, rloo, grpo or reinforce",
        "algo.advantage.estimator": "there is no such option: each method is a section, ppo, rloo, grpo or reinforce",
    }
)
