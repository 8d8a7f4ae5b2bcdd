from .lora import LoraConfig as LoraConfig
