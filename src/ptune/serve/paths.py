"""Where a server is asked. Knows nothing else."""

from __future__ import annotations

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CLASSIFY, TAG = "/v1/classify", "/v1/tag"
MODELS, PROMPTS = "/v1/models", "/v1/prompts"
ALIVE, READY, METRICS = "/healthz", "/readyz", "/metrics"
DESCRIPTION = "/openapi.json"

ALL = (CHATS, COMPLETIONS, CLASSIFY, TAG, MODELS, PROMPTS, ALIVE, READY, METRICS)
"""What is counted apart; no path begins with another."""
