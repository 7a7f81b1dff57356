"""Clients of services that speak the OpenAI HTTP shapes: chat completions, and completions with token ids.

vLLM, SGLang, llama.cpp, Fireworks and others serve them. Knows no other adapter and no engine. Read next:
``crucible_kitchen_openai.endpoint``.
"""

from crucible_kitchen_openai.chat import OpenAILLMClient as OpenAILLMClient
from crucible_kitchen_openai.sampling import OpenAISamplingClient as OpenAISamplingClient

__all__ = ["OpenAILLMClient", "OpenAISamplingClient"]
