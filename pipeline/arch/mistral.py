"""Mistral (with or without a sliding window)."""

from nuteprune.arch.base import Family, read_llama_like

FAMILY = Family("mistral", read_llama_like)
