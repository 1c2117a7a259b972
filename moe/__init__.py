"""The science: a small MoE language model, its training, its score. config, accounting and fingerprint need no torch."""
