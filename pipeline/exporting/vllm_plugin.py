"""vLLM serves every export where this package is installed: entry point `vllm.general_plugins` (`register`).

vLLM's own LLaMA, Mistral, Qwen2 and Qwen3 with the layers' own sizes; a layer whose KV groups are unequal gets each
group's K and V as often as makes them equal. The configuration classes are registered too, so that no
`--trust-remote-code` is needed. Imports vLLM only where vLLM calls it; pip install --no-deps nuteprune is enough.
"""

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def register() -> None:
    """Make the architectures of `modeling_ragged` known to vLLM, and their configurations to transformers."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from nuteprune.exporting import modeling_ragged

    for family in FAMILIES:
        config = getattr(modeling_ragged, f"Ragged{family}Config")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        name = f"Ragged{family}ForCausalLM"
        ModelRegistry.register_model(name, "nuteprune.exporting.vllm_models:RaggedForCausalLM")
