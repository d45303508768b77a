"""`python -m stream …` is `tldr-stream …`."""

from stream.cli import main

main()
