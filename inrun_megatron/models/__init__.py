"""GPT models made of megatron-core layers, on GPU and on CPU."""

from inrun_megatron.defaults import padded_vocabulary
from inrun_megatron.models.gpt import GPT, build_gpt, token_losses, transformer_config

__all__ = ["GPT", "build_gpt", "padded_vocabulary", "token_losses", "transformer_config"]
