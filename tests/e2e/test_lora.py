"""A run that is tuned with a LoRA: it goes on, samples and is passed on with it, or not at all."""
