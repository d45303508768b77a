"""Builds the image-text corpora of this project from packages that carry free images; nothing else imports it."""
