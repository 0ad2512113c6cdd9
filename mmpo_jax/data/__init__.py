"""Records of prompts, images and responses, and the readers of the published formats."""
