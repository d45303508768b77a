"""Caption refining (paper §3.2): T = T_o + T_g, the original caption first and whole."""

import re

WORD = re.compile(r"[^\W_]+")


def refine(original: str, generated: str, joiner: str = " ") -> str:
    """`original` and `generated` joined; the original alone where the generated one says nothing that it does not.

    The paper stitches with nothing between, its authors' code with "; ": `joiner` is either.
    """
    addition = generated.strip()
    if not addition or _says(original, addition):
        return original
    return f"{original}{joiner}{addition}" if original else addition


def _says(original: str, addition: str) -> bool:
    """Whether the words of `addition` stand in `original`, in this order and with nothing between."""
    first = WORD.search(addition.lower())
    if first and first[0] not in original.lower():  # almost always so, and told in a third of the time
        return False
    return _words(addition) in _words(original)


def _words(text: str) -> str:
    """Lower-case words with a space on either side, so that a caption inside another is found only at word boundaries."""
    words = " ".join(WORD.findall(text.lower()))
    return f" {words} "
