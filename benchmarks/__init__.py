"""Scripts that measure what is claimed; run by hand, never imported by the application."""
