"""Steering inside transformers and lm-eval."""
