"""The science: a small MoE language model, its training, its score. moe/README.md is its map."""
