"""Caption refining (paper §3.2): T = T_o + T_g, the original caption first. Text is data here: nothing in it is interpreted."""

import re

WORD = re.compile(r"[^\W_]+")


def refine(original: str, generated: str, joiner: str = " ", words_max: int | None = None) -> str:
    """`original` and `generated` joined; the original alone where the generated one says nothing that it does not.

    joiner     the paper stitches with nothing between, its authors' code with "; ".
    words_max  what a trainer reads of a caption (the authors' loader: 30 words). The original gives up its end, so that
               the generated caption stands before the cut; None leaves the original whole.
    """
    addition = generated.strip()
    read = original if words_max is None else _beginning(original, words_max)
    if not addition or _says(read, addition):
        return original
    if words_max is not None:
        original = _beginning(original, words_max - len(addition.split()) - len(joiner.split()))
    return f"{original}{joiner}{addition}" if original else addition


def _says(original: str, addition: str) -> bool:
    """Whether the words of `addition` stand in `original`, in this order and with nothing between."""
    first = WORD.search(addition.lower())
    if first and first[0] not in original.lower():  # almost always so, and told in a third of the time
        return False
    return _words(addition) in _words(original)


def survives(refined: str, generated: str, words_max: int) -> bool:
    """Whether the whole generated caption is read by a trainer that cuts `refined` behind `words_max` words."""
    return _words(generated) in _words(_beginning(refined, words_max))


def _beginning(text: str, count: int) -> str:
    """The first `count` words as they stand, with all that is between them; all of `text` where it has no more."""
    words = list(re.finditer(r"\S+", text))
    if len(words) <= count:
        return text
    return text[: words[count - 1].end()] if count > 0 else ""


def _words(text: str) -> str:
    """Lower-case words with a space on either side, so that a caption inside another is found only at word boundaries."""
    words = " ".join(WORD.findall(text.lower()))
    return f" {words} "
