"""From text to token ids and back: tokenizers, chat templates, windows of a text."""
