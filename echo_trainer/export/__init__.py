"""An adapter in another form: portable, merged, a LoRA fitted to a DoRA [forms], GGUF [gguf]."""
