"""Checkpoints in and out: names, Hugging Face, safetensors, PEFT, Orbax, cards, fingerprints."""
