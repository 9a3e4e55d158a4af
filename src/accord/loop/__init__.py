"""Iteration: rounds of sampling, labelling, refitting the reward model and training the policy."""
