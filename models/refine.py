"""Caption refining (paper §3.2): T = T_o + T_g, the original caption first and whole."""

import re


def refine(original: str, generated: str, joiner: str = " ") -> str:
    """`original` and `generated` joined; the original alone where the generated one says nothing that it does not.

    The paper stitches with nothing between, its authors' code with "; ": `joiner` is either.
    """
    addition = generated.strip()
    if not addition or _words(addition) in _words(original):
        return original
    return f"{original}{joiner}{addition}" if original else addition


def _words(text: str) -> str:
    """Lower-case words with a space on either side, so that a caption inside another is found only at word boundaries."""
    words = " ".join(re.findall(r"[^\W_]+", text.lower()))
    return f" {words} "
