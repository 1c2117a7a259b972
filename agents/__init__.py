"""The minds: who proposes, reviews, improves, plans, judges and draws conclusions."""
