"""The fields of moe.config.Config by what they belong to: each module one part of a training run. Torch-free."""
