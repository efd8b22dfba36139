"""Checkpoints as they are downloaded: config.json, safetensors, the tokenizer, the hub."""
