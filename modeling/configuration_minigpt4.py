"""Config of MiniGPT-4: Blip2Config with a Llama text model.

`model_type` stays that of BLIP-2, so the stock class loads the same checkpoints.

    MiniGPT4Config(text_config=LlamaConfig.from_pretrained("lmsys/vicuna-7b-v1.5"))
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Blip2Config
from transformers.configuration_utils import SubConfigSpec


@strict
class MiniGPT4Config(Blip2Config):
    """Blip2Config with the text model of MiniGPT-4; vision and Q-Former defaults are BLIP-2's."""

    sub_configs_defaults = {
        **Blip2Config.sub_configs_defaults,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    image_token_index: int | None = 32000

    _auto_class = "AutoConfig"
