"""The science: a small MoE language model, its training, its score. config, accounting, fingerprint need no torch."""
