"""Vision-language models in Flax NNX, driven by Hugging Face configs."""
