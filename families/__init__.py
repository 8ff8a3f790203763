"""One file per architecture other than Llama, found by a config's `model_type`."""
